"""What the package's HTML pages share: a frame that loads and runs nothing, their look, and a write that is whole.

A page needs nothing besides itself: no script, no font, no network. Its content security policy forbids it to load or
run anything.
"""

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path


def html_page(*, title: str, style: str, body: str, mark: str | None = None, images: str = "'none'") -> str:
    """A whole page.

    Args:
        title: plain text.
        style: CSS, after `BASE_STYLE`.
        body: HTML, with every text in it escaped.
        mark: who wrote the page, put near its start.
        images: where they may come from, as a source list of the content security policy.
    """
    generator = "" if mark is None else f'<meta name="generator" content="{escape(mark)}">'
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{generator}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src {images}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{BASE_STYLE}{style}</style></head>
<body>
{body}
</body></html>
"""


def facts(values: Mapping[str, object]) -> str:
    """Names over values, side by side."""
    shown = (f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in values.items())
    return f"<dl>{''.join(shown)}</dl>"


def write_whole(file: Path, text: str) -> None:
    """Writes beside and renames: a file of this name is always whole."""
    beside = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


BASE_STYLE = """
:root { color-scheme: light dark; --page: #fafaf8; --card: #fff; --ink: #1c1e22; --dim: #6a6f78; --line: #e6e6e1; }
@media (prefers-color-scheme: dark) { :root { --page: #131519; --card: #1a1d22; --ink: #e4e6ea; --dim: #8c929c;
  --line: #2b2f36; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px clamp(12px, 3vw, 32px); max-width: 1240px; background: var(--page);
  color: var(--ink); font: 14px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
header p, figcaption p, dt { color: var(--dim); font-size: 12px; margin: 0; }
h1 { font-size: 24px; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 28px 0 10px; }
h3 { font-size: 14px; margin: 0; }
dl { display: flex; flex-wrap: wrap; gap: 8px 28px; margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
.card { margin: 0; padding: 14px 16px; min-width: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.scroll { overflow-x: auto; }
"""
