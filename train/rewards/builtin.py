"""Rewards that a config can name without a module: `reward = "exact_match"`.

Each takes the prompt (a text, or a list of messages), the completion (a text) and the row of the file as a dict, and
returns a number from 0 to 1.
"""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

Row = dict[str, Any]

_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
#: A number as people write it: 1,234 or -0.5.
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_PAIRS = {")": "(", "]": "[", "}": "{", ">": "<"}


def exact_match(prompt: Any, completion: str, row: Row) -> float:
    """1 where the completion is the row's `answer`, white space around both aside."""
    return float(completion.strip() == str(row["answer"]).strip())


def regex(prompt: Any, completion: str, row: Row) -> float:
    """1 where the row's `pattern`, a regular expression of Python, is found in the completion."""
    return float(re.search(row["pattern"], completion) is not None)


def arithmetic(prompt: Any, completion: str, row: Row) -> float:
    """1 where the last number of the completion is the value of the row's `expression`, as "12 + 34" or "(3 - 1) * 4".

    Integers and decimals, + - * / and parentheses; fractions are exact.
    """
    found = _NUMBER.findall(completion)
    return float(bool(found) and Fraction(found[-1].replace(",", "")) == value_of(row["expression"]))


def balanced_brackets(prompt: Any, completion: str, row: Row) -> float:
    """1 where prompt and completion, one after the other, close every bracket of ()[]{}<> in its order.

    The row's `text` is read in place of the prompt, where there is one.
    """
    opened: list[str] = []
    for character in row.get("text", prompt if isinstance(prompt, str) else "") + completion:
        if character in _PAIRS.values():
            opened.append(character)
        elif character in _PAIRS and (not opened or opened.pop() != _PAIRS[character]):
            return 0.0
    return float(not opened)


def value_of(expression: str) -> Fraction:
    """The value of an arithmetic expression; its syntax tree is walked, nothing is executed.

    Raises:
        ValueError: it has anything but numbers, + - * / and parentheses.
    """
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError) as error:
        raise ValueError(f"{expression!r}: {error}") from None


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"found {ast.unparse(node)!r}, expected numbers, + - * / and parentheses.")


#: By the names that a config has for them.
BUILTIN: dict[str, Callable[[Any, str, Row], float]] = {
    function.__name__: function for function in (exact_match, regex, arithmetic, balanced_brackets)
}
