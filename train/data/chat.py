"""Conversations and completions → token ids, and which of them are learned, by the tokenizer's own chat template.

Templates do not mark the assistant's tokens. At its turn a model reads the conversation so far, rendered with the
generation prompt; it has to write what the template renders after that. So the learned tokens are the difference of the
two renderings, the end of the turn included, for any template.
"""

from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from qwen_moe_jax.errors import ConfigError, RequestError
from qwen_moe_jax.inference.chat_template import ChatTemplate
from qwen_moe_jax.inference.tokenizer import encode
from train.data.messages import Conversation
from train.data.records import Completion
from train.data.rendered import require_rendered
from train.data.tool_calls import with_arguments_as_rendered


@dataclass(frozen=True)
class Turns:
    """A document.

    Attributes:
        ids: token ids [T].
        learned: whether each is a target of the loss, bool [T].
        labels: of each token, int32 [T], where the objective labels tokens.
    """

    ids: np.ndarray
    learned: np.ndarray
    labels: np.ndarray | None = None

    def first(self, length: int) -> "Turns":
        """The first so many tokens."""
        labels = None if self.labels is None else self.labels[:length]
        return Turns(self.ids[:length], self.learned[:length], labels)


@dataclass(frozen=True)
class Example:
    """What an objective sees at once: one document, or several that it compares, with numbers for the whole."""

    documents: tuple[Turns, ...]
    numbers: dict[str, np.ndarray] = field(default_factory=dict)


def conversation_documents(
    conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer, place: str
) -> list[Turns]:
    """The fewest documents in which every turn of the assistant follows exactly the tokens of its prompt.

    That is one document, unless the template renders a turn differently once others follow it (Qwen3's removes earlier
    thoughts): then the first turn that does not continue the previous ids begins a new document. Messages after the
    assistant's last turn are left out, since they have no targets.

    Messages with `"weight": 0` are context only.

    Raises:
        ConfigError: the template refuses the conversation or ignores a field of it, or its rendering of a turn does
            not begin with its own generation prompt. The message names `place`.
    """
    conversation = with_arguments_as_rendered(conversation, template, place)
    require_rendered(conversation, template, place)
    documents: list[Turns] = []
    for number, message in enumerate(conversation.messages):
        if message["role"] != "assistant" or number in conversation.not_learned:
            continue
        before = _render(conversation, template, number, place, add_generation_prompt=True)
        after = _render(conversation, template, number + 1, place, add_generation_prompt=False)
        if not after.startswith(before):
            same = common_length(before, after)
            raise ConfigError(
                f"{place}: messages[{number}]: the chat template of {template.folder} renders "
                f"{after[same : same + 40]!r} where its own beginning of an answer has {before[same : same + 40]!r}; "
                f"expected the assistant's turn to continue its generation prompt, so that its tokens can be found."
            )
        prompt, ids = (np.array(encode(tokenizer, text, add_special_tokens=False)) for text in (before, after))
        learned = np.zeros(len(ids), bool)
        # A token that merges the last characters of the prompt with the first of the answer belongs to the answer.
        learned[common_length(prompt, ids) :] = True
        if documents and np.array_equal(ids[: len(documents[-1].ids)], documents[-1].ids):
            earlier = documents.pop()
            learned[: len(earlier.ids)] = earlier.learned
        documents.append(Turns(ids, learned))
    return documents


def completion_document(completion: Completion, tokenizer: Tokenizer, end_id: int) -> Turns:
    """The prompt and what follows it as one text, of which the tokens after the prompt's and the end are learned.

    A token that merges the last characters of the prompt with the first of the completion is learned.
    """
    prompt, ids = (
        np.array(encode(tokenizer, text), np.int64)
        for text in (completion.prompt, completion.prompt + completion.completion)
    )
    ids = ids if ids.size and ids[-1] == end_id else np.append(ids, end_id)
    return Turns(ids, np.arange(len(ids)) >= common_length(prompt, ids))


def _render(
    conversation: Conversation, template: ChatTemplate, count: int, place: str, *, add_generation_prompt: bool
) -> str:
    try:
        return template.render(
            conversation.messages[:count], add_generation_prompt=add_generation_prompt, **conversation.variables
        )
    except RequestError as error:
        raise ConfigError(f"{place}: {error}") from None


def common_length(one: str | np.ndarray, other: str | np.ndarray) -> int:
    """The length of the common prefix of two sequences."""
    both = list(zip(one, other, strict=False))
    return next((number for number, (a, b) in enumerate(both) if a != b), len(both))
