"""Python source → questions and answers from the docstrings of its public names. Nothing is imported or run."""

import ast
import inspect
import warnings
from collections.abc import Iterator

from qwen_moe_jax.errors import ConfigError


def questions_of(source: str, name: str, place: str) -> Iterator[tuple[str, str]]:
    """Pairs such as ("What does textwrap.dedent do?", "Remove any common leading whitespace from every line in text.").

    The module, its classes and functions and their methods, in the order of the file, each name once; the answer is the
    first paragraph of the docstring, on one line.

    Args:
        source: of one file.
        name: the file's path below the source's folder, which gives the module's name: json/decoder.py is json.decoder.
        place: of the file, for messages.

    Raises:
        ConfigError: it is not Python of this version.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the file
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: this cannot be read as Python ({error}); leave it out by data.pattern.") from None
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    seen = set()
    for kind, path, docstring in _described(tree, module):
        answer = " ".join(inspect.cleandoc(docstring).partition("\n\n")[0].split())
        if answer and path not in seen and not any(part.startswith("_") for part in path.split(".")):
            seen.add(path)
            yield (f"What does {path} do?" if kind == "function" else f"What is {path}?"), answer


def _described(node: ast.Module | ast.ClassDef, path: str) -> Iterator[tuple[str, str, str]]:
    """Kind, dotted name and docstring of a module or class, and of everything that it defines."""
    yield "thing", path, ast.get_docstring(node, clean=False) or ""
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _described(child, f"{path}.{child.name}")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield "function", f"{path}.{child.name}", ast.get_docstring(child, clean=False) or ""
