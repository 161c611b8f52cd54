"""The content of a message as a list of parts, as OpenAI's clients and multimodal data sets have it → one text."""

from collections.abc import Sequence
from typing import Any

#: The types of parts that are text; the second is that of OpenAI's Responses API.
TEXT_PARTS = ("text", "input_text")


def joined_parts(parts: Sequence[Any]) -> str:
    """The texts of the parts with nothing between them.

    Chat templates that read such lists write them so, one part after the other (Qwen3.5's, Qwen2.5-VL's); those that do
    not would leave the content out. A line end that a text needs is in the part.

    Args:
        parts: {"type": "text", "text": …} each.

    Raises:
        ValueError: a part is no text; the message has its number.
    """
    texts = []
    for number, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS:
            found = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"part {number} is of type {found!r:.40}, expected text: this model reads nothing else")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"part {number} has no text")
        texts.append(part["text"])
    return "".join(texts)
