"""Pages are rendered from templates that are installed with the package, and every text in them is escaped."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from qwen_moe_jax.web_page import render, render_markup
from qwen_moe_jax.whole_file import write_whole

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Context:
    text: str


def template(folder: Path, text: str) -> tuple[str, Path]:
    folder.mkdir(exist_ok=True)
    (folder / "x.html.j2").write_text(text, encoding="utf-8")
    return "x.html.j2", folder


def test_text_is_escaped_and_markup_is_not(tmp_path):
    inner = render_markup(*template(tmp_path, "<i>{{ page.text }}</i>"), Context("<&\"'>"))
    assert inner == "<i>&lt;&amp;&#34;&#39;&gt;</i>"
    assert render(*template(tmp_path / "outer", "<b>{{ page.text }}</b>"), Context(inner)) == f"<b>{inner}</b>"


def test_a_field_that_the_context_lacks_is_an_error(tmp_path):
    with pytest.raises(UndefinedError, match="missing"):
        render(*template(tmp_path, "{{ page.missing }}"), Context(""))


def test_templates_load_nothing():
    """No page could: its content security policy forbids it. Here it is seen before a browser is."""
    files = [*ROOT.glob("qwen_moe_jax/**/templates/*"), *ROOT.glob("train/**/templates/*")]
    assert len(files) >= 8
    for file in files:
        text = file.read_text(encoding="utf-8")
        for word in ("<script", "<link", "src=", "url(", "@import", "http:", "https:", "| safe"):
            assert word not in text, f"{file.name} has {word}"


def test_every_template_is_package_data():
    import tomllib

    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    package = ROOT / "qwen_moe_jax"
    packaged = {file for pattern in data["qwen_moe_jax"] for file in package.glob(pattern)}
    assert {file for file in package.glob("**/templates/*") if file.is_file()} <= packaged


def test_a_file_is_complete_or_as_it_was(tmp_path):
    file = tmp_path / "page.html"
    write_whole(file, "one")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "\udcff")
    assert file.read_text(encoding="utf-8") == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
