"""Documentation of config fields, read from the `Attributes:` section of their class's docstring.

One text serves the API reference, `python -m train --help` and the arguments of `qwen-moe-jax`.
"""

import inspect
import re


def field_docs(cls: type) -> dict[str, str]:
    """The text of every field that the docstrings of a class and of its bases describe, on one line each.

    Docstrings are absent under `python -OO`; so are the texts then.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")
        field = ""
        for line in section.splitlines():
            if line and not line.startswith(" "):
                break  # the next section
            entry = re.fullmatch(r" {4}(\w+): (.*)", line)
            if entry:
                field, docs[entry[1]] = entry[1], entry[2]
            elif line.strip():
                docs[field] += " " + line.strip()
    return docs


def first_sentence(cls: type, field: str) -> str:
    """The first clause of a field's text, for a line of help: up to a full stop or a semicolon."""
    return re.split(r"(?<=\w|\))[.;](?:\s|$)", field_docs(cls).get(field, ""), maxsplit=1)[0]
