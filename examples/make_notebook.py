"""Makes look_at_routing.ipynb from look_at_routing.py: a cell for each paragraph of `main`, with what it prints.

python examples/make_notebook.py
"""

import ast
import contextlib
import io
import os
import textwrap
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

HERE = Path(__file__).parent
SCRIPT, NOTEBOOK = HERE / "look_at_routing.py", HERE / "look_at_routing.ipynb"


def cells_of(script: str) -> list[str]:
    """The code of a script as cells: all before `main`, then the paragraphs of `main`."""
    tree = ast.parse(script)
    lines = script.splitlines()
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    head = "\n".join(lines[tree.body[0].end_lineno : main.lineno - 1]).replace("Path(__file__).parent", "Path.cwd()")
    body = textwrap.dedent("\n".join(lines[main.body[0].lineno - 1 : main.end_lineno]))
    return [head.strip(), *body.split("\n\n")]


def notebook_of(script: str, *, run: bool) -> nbformat.NotebookNode:
    """The notebook; `run` executes the cells, in the folder of the script, and keeps what they print."""
    title, _, rest = (ast.get_docstring(ast.parse(script)) or "").partition("\n")
    cells = [new_markdown_cell(f"# {title}\n\nMade from `{SCRIPT.name}` by `make notebook`.", id="title")]
    namespace: dict[str, object] = {}
    for number, source in enumerate(cells_of(script), start=1):
        cell = new_code_cell(source, id=f"cell-{number}", execution_count=number if run else None)
        if run:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(source, namespace)
            cell.outputs = [new_output("stream", name="stdout", text=printed.getvalue())] if printed.getvalue() else []
        cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def main() -> None:
    os.chdir(HERE)
    notebook = notebook_of(SCRIPT.read_text(encoding="utf-8"), run=True)
    nbformat.validate(notebook)
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.name}: {len(notebook.cells)} cells, {NOTEBOOK.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
