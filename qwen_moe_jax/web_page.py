"""Self-contained HTML pages: Jinja2 templates with autoescape, their style sheets inlined, no script and no network.

A page extends `templates/page.html.j2`, whose content security policy forbids it to load or run anything. Templates
are next to the module that renders them (`plan/templates`, `cli/templates`, …) and are given one typed context, `page`;
numbers are formatted by the filters of `FILTERS`.
"""

import functools
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qwen_moe_jax.text import format_mesh, join_words
from qwen_moe_jax.units import format_bytes, format_count, format_flops, format_rate, format_seconds

#: What all pages share: the frame, the style sheet, macros.
SHARED = Path(__file__).parent / "templates"

FILTERS = {
    "bytes": format_bytes,
    "count": format_count,
    "flops": format_flops,
    "rate": format_rate,
    "seconds": format_seconds,
    "mesh": format_mesh,
    "and_words": join_words,
    "thousands": "{:,}".format,
    "percent": "{:.4%}".format,
    "number": "{:g}".format,
}


def render(template: str, folder: Path, page: Any) -> str:
    """Renders a template.

    Args:
        template: its file name.
        folder: where it is; templates that it includes, imports or extends are there or in `SHARED`.
        page: its context. Strings are escaped; `Markup` is HTML already.
    """
    return _environment(folder).get_template(template).render(page=page)


def render_markup(template: str, folder: Path, page: Any) -> Markup:
    """As `render`, for a part of another page."""
    return Markup(render(template, folder, page))  # what autoescape has made is safe to insert


@functools.cache
def _environment(folder: Path) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, SHARED]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= FILTERS
    return environment
