"""Prompts of a run: records of JSON files, a prompt as text or messages and whatever else the reward reads."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.chat_template import ChatTemplate
from qwen_moe_jax.inference.tokenizer import Tokenizer, encode
from train.config import ColumnsConfig
from train.data.messages import (
    Conversation,
    checked_messages,
    refuse,
    refuse_surrogates,
    refuse_template_fields,
    template_variables,
)
from train.data.rendered import require_rendered
from train.data.tool_calls import with_arguments_as_rendered

_WANTED = '{"prompt": text or messages, …} or {"messages": […], …}, with what the reward reads in other columns'


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt.

    Attributes:
        token_ids: as the model reads it.
        prompt: as the record has it: a text, or a list of messages.
        row: the whole record, for the reward.
        name: file and line; sampling seeds are derived from it.
    """

    token_ids: tuple[int, ...]
    prompt: str | list[dict[str, Any]]
    row: dict[str, Any]
    name: str

    @property
    def text(self) -> str:
        """The prompt, or the last of its messages, to be shown."""
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1]["content"])


class Prompts(Sequence[Prompt]):
    """Prompts on disk: one array of token ids, and a line of JSON each."""

    def __init__(self, folder: Path, name: str, chosen: np.ndarray | None = None) -> None:
        """Opens what `write_prompts` wrote of the source `name`; `chosen` are the numbers of some of them."""
        arrays = np.load(folder / "prompts.npz")
        self._folder, self.name = folder, name
        self._tokens, self._ends, self._lines = arrays["tokens"], arrays["ends"], arrays["lines"]
        self.is_heldout = arrays["heldout"]
        self._chosen = np.arange(len(self._ends)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, number: int) -> Prompt:  # type: ignore[override]  # there are no slices
        at = int(self._chosen[number])
        start = int(self._ends[at - 1]) if at else 0
        with (self._folder / "prompts.jsonl").open("rb") as file:
            file.seek(int(self._lines[at]))
            record = json.loads(file.readline())
        return Prompt(token_ids=tuple(self._tokens[start : self._ends[at]].tolist()), **record)

    @property
    def num_tokens(self) -> int:
        """Of all prompts."""
        starts = np.concatenate([[0], self._ends[:-1]])
        return int((self._ends - starts)[self._chosen].sum())

    def select(self, mask: np.ndarray) -> "Prompts":
        """Those that a mask [all prompts of the folder] selects."""
        return Prompts(self._folder, self.name, np.flatnonzero(mask))


def prompt_of(
    record: Any, columns: ColumnsConfig, tokenizer: Tokenizer, template: ChatTemplate | None, place: str, name: str
) -> Prompt:
    """The prompt of a record.

    Args:
        record: of a JSON file.
        columns: which column is `prompt`, or `messages`.
        tokenizer: the model's.
        template: the tokenizer's, for messages; None where it has none.
        place, name: file and line, for messages and for the prompt.

    Raises:
        ConfigError: it is none; the message begins with `place`.
    """
    if not isinstance(record, dict):
        refuse(f"{place}: found {record!r:.80}, expected {_WANTED}.")
    refuse_surrogates(record, place)
    named = {"prompt": columns.prompt or "prompt", "messages": columns.messages or "messages"}
    present = [column for column in named.values() if record.get(column) is not None]
    if len(present) != 1:
        found = "both " + " and ".join(present) if present else f"the keys {', '.join(record) or '(none)'}"
        refuse(f"{place}: found {found}, expected {_WANTED}.")
    prompt = record[present[0]]
    if isinstance(prompt, str) and present[0] == named["prompt"]:
        names = {field: columns.given.get(field, field) for field in ("tools", "chat_template_kwargs")}
        refuse_template_fields({field: record.get(name) for field, name in names.items()}, names, place)
        token_ids = encode(tokenizer, prompt)
    else:
        prompt = checked_messages(prompt, place, present[0])
        token_ids = _rendered(prompt, record, columns, tokenizer, template, place, present[0])
    if not token_ids:
        refuse(f"{place}: {present[0]}: found no token, expected a prompt.")
    return Prompt(token_ids=tuple(token_ids), prompt=prompt, row=record, name=name)


def _rendered(
    messages: list[dict[str, Any]],
    record: dict[str, Any],
    columns: ColumnsConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    place: str,
    column: str,
) -> list[int]:
    """Messages through the chat template, which begins the assistant's answer."""
    if template is None:
        refuse(f"{place}: {column}: found messages, and data.tokenizer has no chat template: expected a text.")
    if messages[-1]["role"] == "assistant":
        refuse(f"{place}: {column}: the last message is the assistant's, expected one that is to be answered.")
    tools, own = columns.tools or "tools", columns.chat_template_kwargs or "chat_template_kwargs"
    variables = template_variables(record.get(tools), record.get(own), place, tools, own)
    conversation = with_arguments_as_rendered(Conversation(messages, variables), template, place)
    require_rendered(conversation, template, place)
    try:
        text = template.render(conversation.messages, add_generation_prompt=True, **variables)
    except RequestError as error:
        refuse(f"{place}: {error}")
    return encode(tokenizer, text, add_special_tokens=False)


def write_prompts(
    folder: Path, prompts: Iterable[Prompt], *, longest: int, heldout_fraction: float, heldout: Iterable[Prompt] = ()
) -> int:
    """Writes prompts to a folder, and returns how many of them were left out, being longer than `longest` tokens.

    Args:
        folder: to be created.
        prompts: to train on.
        longest: tokens of a prompt.
        heldout_fraction: the share of `prompts` that is held out, those whose names have the smallest hashes; 0 is
            none, else at least one is.
        heldout: prompts of a file of their own, all of which are held out.
    """
    folder.mkdir(parents=True)
    tokens: list[np.ndarray] = []
    lines, digests, is_heldout, left_out = [], [], [], 0
    with (folder / "prompts.jsonl").open("wb") as file:
        for given, own in ((prompts, False), (heldout, True)):
            for prompt in given:
                if len(prompt.token_ids) > longest:
                    left_out += 1
                    continue
                lines.append(file.tell())
                record = {"prompt": prompt.prompt, "row": prompt.row, "name": prompt.name}
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                tokens.append(np.array(prompt.token_ids, np.uint32))
                digests.append(int.from_bytes(hashlib.sha256(prompt.name.encode()).digest()[:8], "big"))
                is_heldout.append(own)
    mask = np.array(is_heldout, bool)
    if heldout_fraction and len(mask) > 1:
        mask[np.argsort(np.array(digests, np.uint64))[: max(1, round(len(mask) * heldout_fraction))]] = True
    np.savez(
        folder / "prompts.npz",
        tokens=np.concatenate([*tokens, np.zeros(0, np.uint32)]),
        ends=np.cumsum([len(ids) for ids in tokens], dtype=np.int64),
        lines=np.array(lines, np.int64),
        heldout=mask,
    )
    return left_out
