"""Outputs of the initial model for every pair, computed once before the first step and stored with the corpus."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.sharding.distributed import barrier, is_process_zero
from train.config import TrainConfig
from train.data.corpus import Corpus
from train.data.examples import Examples, batches_in_order, example_feed, example_rows
from train.data.feed import BatchFeed, Setting, to_devices
from train.data.parts import Part
from train.parameters import Params

#: The file in a corpus that holds them.
FILE = "reference.npz"


@dataclass(frozen=True, kw_only=True)
class ReferenceFeed(BatchFeed):
    """A feed of pairs whose batches have `reference_P2` once it is prepared; see `Feed`.

    Attributes:
        output: (output of the objective's `forward`, batch) → float32 [P, 2].
    """

    output: Callable[[Any, Any], jax.Array]

    @classmethod
    def of(cls, pairs: BatchFeed, output: Callable[[Any, Any], jax.Array]) -> "ReferenceFeed":
        """That of a feed of pairs."""
        return cls(**vars(pairs), output=output)

    def prepare(self, setting: Setting, params: Params) -> BatchFeed:
        """The feed of the same pairs with the reference's outputs.

        Raises:
            CheckpointError: those of an earlier start are missing, or of other pairs or another model.
        """
        file, wanted = setting.folder.corpus / FILE, fingerprint(setting.config, setting.corpus)
        if setting.first_step == 0:
            with setting.report.aside("reference"):
                found = self._computed(setting, params)
            if is_process_zero():
                _write(file, {**found, "fingerprint": np.array(wanted)})
            barrier("the reference's log-probabilities are computed")
            number = sum(len(values) for values in found.values())
            setting.report.say(f"reference: log-probabilities of {number:,} pairs under the initial model, in {file}")
        return _with_references(self, setting, _read(file, wanted))

    def _computed(self, setting: Setting, params: Params) -> dict[str, np.ndarray]:
        """By the name of the set of pairs, float32 [pairs, 2] each."""
        objective, graph = setting.program.objective, setting.program.eval_graph
        everywhere = NamedSharding(setting.mesh, PartitionSpec())

        @jax.jit(out_shardings=everywhere)
        def outputs(params: Params, batch: Any) -> jax.Array:
            return self.output(objective.forward(nnx.merge(graph, params), batch), batch)

        found = {}
        for name, rows in _all_rows(setting.corpus, setting.config.data.seq_len).items():
            batches = batches_in_order(rows, self.batch_size, setting.mesh, self.sharding, self.collate)
            parts = [np.asarray(outputs(params, to_devices(batch(), self.sharding))) for batch in batches]
            found[name] = np.concatenate(parts)[: len(rows)]
        return found


def fingerprint(config: TrainConfig, corpus: Corpus) -> str:
    """A hash of the pairs and of what names the initial weights."""
    digest = hashlib.sha256()
    origin = [config.run.model_name_or_path, config.run.seed, config.run.drop_mtp, config.data.seq_len, config.model]
    digest.update(json.dumps(origin, sort_keys=True, default=str).encode())
    for part in {id(part): part for part in [*corpus.parts, *corpus.heldout_parts]}.values():
        for documents in (part.training, part.heldout):
            for number in range(len(documents)):
                digest.update(documents[number].tobytes())
                digest.update(documents.learned_in(number).tobytes() + b"|")
    return digest.hexdigest()


def _all_rows(corpus: Corpus, seq_len: int) -> dict[str, Examples]:
    """The training and the held-out pairs of all parts, by the name of their array in the file."""
    rows = {}
    for kind, parts in (("training", corpus.parts), ("heldout", corpus.heldout_parts)):
        for number, part in enumerate(parts):
            rows[f"{number}.{kind}"] = example_rows(part, seq_len, heldout=kind == "heldout")
    return rows


def _with_references(pairs: BatchFeed, setting: Setting, references: dict[str, np.ndarray]) -> BatchFeed:
    def with_numbers(part: Part, key: str, kind: str) -> Part:
        numbers = {**getattr(part, f"{kind}_numbers"), "reference": references[key]}
        changes: dict[str, Any] = {f"{kind}_numbers": numbers}
        return dataclasses.replace(part, **changes)

    corpus = setting.corpus
    parts = [with_numbers(part, f"{number}.training", "training") for number, part in enumerate(corpus.parts)]
    validation = corpus.validation
    if validation is None:
        parts = [with_numbers(part, f"{number}.heldout", "heldout") for number, part in enumerate(parts)]
    else:
        validation = with_numbers(validation, "0.heldout", "heldout")
    corpus = dataclasses.replace(corpus, parts=parts, validation=validation)
    return example_feed(setting.config, corpus, setting.mesh, pairs.sharding, pairs.collate)


def _write(file: Path, arrays: dict[str, np.ndarray]) -> None:
    partial = file.with_name(f".{file.name}.partial.npz")
    np.savez(partial, **arrays)  # type: ignore[arg-type]
    os.replace(partial, file)


def _read(file: Path, wanted: str) -> dict[str, np.ndarray]:
    way_out = "Add --fresh to start the run anew."
    if not file.is_file():
        raise CheckpointError(f"{file}: found no such file, expected what the run's first start wrote. {way_out}")
    arrays = dict(np.load(file))
    if str(arrays.pop("fingerprint", "")) != wanted:
        raise CheckpointError(
            f"{file}: found the reference's log-probabilities of other pairs or another initial model, expected those "
            f"of this run: a file of the run's folder was changed. {way_out}"
        )
    return arrays
