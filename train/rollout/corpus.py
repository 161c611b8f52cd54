"""The prompts of a run in its folder: made at the first start, opened by every later one."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from qwen_moe_jax.errors import CheckpointError, ConfigError
from qwen_moe_jax.huggingface.hub import tokenizer_folder
from qwen_moe_jax.inference.chat_template import ChatTemplate, load_chat_template
from qwen_moe_jax.inference.tokenizer import load_tokenizer
from train.config import SourceConfig, TrainConfig
from train.data.changed import changed_files
from train.data.corpus import Corpus, end_of_text
from train.data.fingerprints import files_fingerprint, named_files
from train.data.json_files import read_json_file
from train.data.sources import describe_source, files_of
from train.data.tokenizer import copy_tokenizer
from train.rollout.prompts import Prompt, Prompts, prompt_of, write_prompts


@dataclass(frozen=True)
class PromptPart:
    """The prompts of one source."""

    name: str
    training: Prompts
    heldout: Prompts


@dataclass(frozen=True, kw_only=True)
class PromptCorpus(Corpus):
    """A tokenizer and prompts; it has no documents.

    Attributes:
        prompts: of each source, in the order of the config's.
    """

    prompts: list[PromptPart]


def load_prompts(folder: Path, config: TrainConfig) -> PromptCorpus:
    """Opens the prompts in `folder`, or makes them there at the first start of the run.

    Raises:
        ConfigError: a record is no prompt; there are none to train on or to hold out.
        CheckpointError: the tokenizer cannot be read.
    """
    resumed = folder.exists()
    if not resumed:
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        _make(partial, config)
        os.replace(partial, folder)
    described = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    notes = list(described["notes"])
    if resumed:
        for source, (files, named) in zip(_all_sources(config), described.get("files", ()), strict=False):
            notes += changed_files(source, files, named)
    parts = []
    for number, name in enumerate(described["sources"]):
        prompts = Prompts(folder / str(number), name)
        parts.append(PromptPart(name, prompts.select(~prompts.is_heldout), prompts.select(prompts.is_heldout)))
    return PromptCorpus(
        tokenizer=load_tokenizer(folder / "tokenizer"),
        end_id=described["end_id"],
        turn_end_ids=[],
        parts=[],
        forms=[],
        notes=notes,
        prompts=parts,
    )


def _make(folder: Path, config: TrainConfig) -> None:
    assert config.grpo is not None
    data, longest = config.data, config.grpo.longest_prompt(config.data.seq_len)
    copy_tokenizer(tokenizer_folder(data.tokenizer), folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    try:
        template = load_chat_template(folder / "tokenizer")
    except CheckpointError:  # tokenizers of base models have none
        template = None
    notes = []
    for number, source in enumerate(data.mixture):
        name = describe_source(source)
        validation = data.validation if number == 0 else None
        heldout = [] if validation is None else _read(validation, tokenizer, template)
        left_out = write_prompts(
            folder / str(number),
            _read(source, tokenizer, template),
            longest=longest,
            heldout_fraction=0.0 if data.eval_path else data.heldout_fraction,
            heldout=heldout,
        )
        if left_out:
            notes.append(
                f"left out {left_out:,} prompts of {name} that have more than {longest:,} tokens: data.seq_len less "
                "grpo.max_completion_length"
            )
        is_heldout = Prompts(folder / str(number), name).is_heldout
        if is_heldout.all() or not (is_heldout.any() or number and data.eval_path):
            raise ConfigError(
                f"data.path: found {len(is_heldout)} prompts of at most {longest} tokens in {name}, of which "
                f"{is_heldout.sum()} are held out: expected some to train on and some to hold out."
            )
    described = {
        "end_id": end_of_text(tokenizer, folder / "tokenizer", data),
        "sources": [describe_source(source) for source in data.mixture],
        "files": [[files_fingerprint(source), named_files(source)] for source in _all_sources(config)],
        "notes": notes,
    }
    (folder / "corpus.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _all_sources(config: TrainConfig) -> list[SourceConfig]:
    """The sources of prompts, and then that of those that are held out."""
    validation = config.data.validation
    return [*config.data.mixture, *([] if validation is None else [validation])]


def _read(source: SourceConfig, tokenizer: Tokenizer, template: ChatTemplate | None) -> Iterator[Prompt]:
    for file, name in files_of(source):
        for value in read_json_file(file):
            yield prompt_of(
                value.found, source.columns, tokenizer, template, place=value.place, name=f"{name}:{value.number}"
            )
