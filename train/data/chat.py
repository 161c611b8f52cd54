"""Conversations → token ids, and which of them the assistant wrote, by the tokenizer's own chat template.

No template says where the assistant's words are. But at its turn a model reads the conversation so far, rendered with
the beginning of an answer, and is to write what the template renders beyond that: the difference of the two renderings
is exactly what it has to learn, with the mark that ends its turn, whatever the template is.
"""

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from qwen_moe_jax.errors import ConfigError, RequestError
from qwen_moe_jax.inference.chat_template import ChatTemplate
from qwen_moe_jax.inference.tokenizer import encode
from train.data.sources import Conversation


@dataclass(frozen=True)
class Turns:
    """Token ids, and for each whether the model is to learn to write it."""

    ids: np.ndarray
    learned: np.ndarray


def conversation_documents(
    conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer, place: str
) -> list[Turns]:
    """The fewest documents that show every turn of the assistant after exactly what a model reads before it.

    That is one document, unless the template writes a turn differently once others follow it, as Qwen3's leaves
    earlier thoughts out: then a new one begins with the first turn that does not go on from the ids of the last.
    Messages after the assistant's last turn are left out, as nobody learns from them.

    Raises:
        ConfigError: the template refuses the conversation, or does not go on, at the assistant's turn, from the
            beginning of an answer that it renders itself. The message names `place`.
    """
    documents: list[Turns] = []
    for number, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        before = _render(conversation, template, number, place, add_generation_prompt=True)
        after = _render(conversation, template, number + 1, place, add_generation_prompt=False)
        if not after.startswith(before):
            same = _common_length(before, after)
            raise ConfigError(
                f"{place}: messages[{number}]: the chat template of {template.folder} renders "
                f"{after[same : same + 40]!r} where its own beginning of an answer has {before[same : same + 40]!r}; "
                f"expected the assistant's turn to go on from that, so that its words can be told from the others'."
            )
        prompt, ids = (np.array(encode(tokenizer, text, add_special_tokens=False)) for text in (before, after))
        learned = np.zeros(len(ids), bool)
        # Where the answer's first characters merge with the prompt's last into one token, that token is the answer's.
        learned[_common_length(prompt, ids) :] = True
        if documents and np.array_equal(ids[: len(documents[-1].ids)], documents[-1].ids):
            earlier = documents.pop()
            learned[: len(earlier.ids)] = earlier.learned
        documents.append(Turns(ids, learned))
    return documents


def _render(
    conversation: Conversation, template: ChatTemplate, count: int, place: str, *, add_generation_prompt: bool
) -> str:
    try:
        return template.render(
            conversation.messages[:count], add_generation_prompt=add_generation_prompt, **conversation.variables
        )
    except RequestError as error:
        raise ConfigError(f"{place}: {error}") from None


def _common_length(one: str | np.ndarray, other: str | np.ndarray) -> int:
    """How many elements two sequences share from their beginnings."""
    both = list(zip(one, other, strict=False))
    return next((number for number, (a, b) in enumerate(both) if a != b), len(both))
