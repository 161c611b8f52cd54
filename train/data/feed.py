"""The batches of a run, sharded over its mesh: each process reads the rows that its own devices hold."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import jax
from jax.sharding import Mesh, NamedSharding

from qwen_moe_jax.errors import ConfigError
from train.config import DataConfig, TrainConfig
from train.data.batches import (
    Mixture,
    batch_at,
    batch_of,
    describe_batch,
    heldout_batches,
    rows_of_devices,
)
from train.data.corpus import Corpus
from train.data.rows import PackedRows, Source, pack
from train.parameters import Params

if TYPE_CHECKING:
    from train.folder import RunFolder
    from train.program import Program
    from train.reporting.progress import NoReport, Report


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a feed may need of the run once its state is on the devices; see `Feed.prepare`.

    Attributes:
        config, folder, mesh, program, corpus: of the run.
        report: for lines, times and numbers; it does nothing in all processes but process 0.
        first_step: the number of steps that are done.
    """

    config: TrainConfig
    folder: "RunFolder"
    mesh: Mesh
    program: "Program"
    corpus: Corpus
    report: "Report | NoReport"
    first_step: int


class Feed(Protocol):
    """Where the batches of a run come from. All processes call the same methods in the same order.

    Attributes:
        num_rows, num_tokens: of the training data: an epoch, in the rows of which a batch has `data.batch_size`.
        notes: lines for the start of the run.
        heldout: the batches of the held-out metrics, on their devices.
    """

    @property
    def num_rows(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def notes(self) -> list[str]: ...
    @property
    def heldout(self) -> list[Any]: ...

    def memory(self, program: "Program") -> dict[str, int]:
        """What the feed holds on each device, by name, in bytes; a batch does not count."""

    def prepare(self, setting: Setting, params: Params) -> "Feed":
        """The feed to use from now on; called once, before the first step of this start.

        Here outputs of the initial model are computed, or read where an earlier start of the run did so.

        Args:
            setting: the run.
            params: all parameters, on their devices; no reference to them may outlive the call, since the first step
                reuses their memory.
        """

    def training(self, step: int, params: Params) -> Any:
        """The batch of a step (from 0), on its devices; `params` as in `prepare`, those before the step.

        The same step and parameters give the same batch.
        """

    def evaluate(self, step: int, params: Params) -> Mapping[str, float] | None:
        """The held-out metrics after `step` steps, where the host computes them; None: they are those of `heldout`."""

    def saved(self, step: int) -> None:
        """Called before the checkpoint after `step` steps is written, to store what a resumed run needs besides."""

    def describe(self, step: int) -> str:
        """The batch of a step (from 0), in words for messages."""

    def close(self) -> None:
        """Called in the end, whatever ended the run."""


@dataclass(frozen=True, kw_only=True)
class BatchFeed:
    """Batches that are a pure function of the data, the seed and the step; see `Feed`.

    Attributes:
        rows: the training rows of all sources.
        collate: makes a batch of rows.
        heldout: the batches of the held-out metrics, on their devices.
        batch_size: rows of a batch on all devices together, B.
        seed: of the order of the rows.
        sharding: of the arrays of a batch, [B, …].
        own_rows: the rows of a batch that this process reads.
        notes: lines for the start of the run, one on every source of which rows are left out.
    """

    rows: Mixture
    collate: Callable[[Sequence[Any]], Any] = batch_of
    heldout: list[Any]
    batch_size: int
    seed: int
    sharding: NamedSharding
    own_rows: list[int]
    notes: list[str]

    @property
    def num_rows(self) -> int:
        """See `Feed`."""
        return self.rows.num_rows

    @property
    def num_tokens(self) -> int:
        """See `Feed`."""
        return self.rows.num_tokens

    def memory(self, program: "Program") -> dict[str, int]:
        """Nothing."""
        return {}

    def prepare(self, setting: Setting, params: Params) -> "BatchFeed":
        """This feed: it needs nothing of the run."""
        return self

    def training(self, step: int, params: Params) -> Any:
        """The batch of a step (from 0), on its devices."""
        batch = batch_at(self.rows, step, self.batch_size, self.seed, self.own_rows, self.collate)
        return to_devices(batch, self.sharding)

    def evaluate(self, step: int, params: Params) -> None:
        """The held-out metrics are those of `heldout`."""

    def saved(self, step: int) -> None:
        """Nothing is to be stored."""

    def close(self) -> None:
        """Nothing is open."""

    def describe(self, step: int) -> str:
        """The rows of the batch of a step (from 0), in words for messages."""
        return describe_batch(self.rows, step, self.batch_size, self.seed)


def make_feed(config: DataConfig, corpus: Corpus, mesh: Mesh, sharding: NamedSharding, seed: int) -> BatchFeed:
    """Packs the corpus into rows, leaves out those without a target, and reads the held-out ones.

    Raises:
        ConfigError: a source has no row with a target.
    """
    strategy = config.packing_strategy
    packed = [pack(part.training, config.seq_len, part.name, strategy) for part in corpus.parts]
    training = [_with_targets(rows) for rows in packed]
    heldout = Mixture(
        [_with_targets(pack(part.heldout, config.seq_len, part.name, strategy)) for part in corpus.heldout_parts],
        corpus.heldout_weights([source.weight for source in config.mixture]),
    )
    notes = [
        f"left out {1 - len(kept) / len(found):.1%} of the rows of {found.name} ({len(found) - len(kept):,} of "
        f"{len(found):,}), which have no token to learn"
        for found, kept in zip(packed, training, strict=True)
        if len(kept) < len(found)
    ]
    if strategy != "wrapped":
        notes += [
            f"{rows.padding:.1%} of the tokens of the {len(rows):,} rows of {rows.name} are padding"
            for rows in training
        ]
    return feed_of(training, heldout, config, mesh, sharding, seed, notes=notes)


def feed_of(
    training: Sequence[Source],
    heldout: Mixture,
    config: DataConfig,
    mesh: Mesh,
    sharding: NamedSharding,
    seed: int,
    *,
    notes: list[str],
    collate: Callable[[Sequence[Any]], Any] = batch_of,
) -> BatchFeed:
    """The feed of a mixture of sources, those of `config`, and of held-out rows."""
    own_rows = rows_of_devices(mesh.local_devices, sharding, config.batch_size)
    batches = heldout_batches(heldout, config.heldout_rows, config.batch_size, own_rows, collate)
    return BatchFeed(
        rows=Mixture(training, [source.weight for source in config.mixture]),
        collate=collate,
        heldout=[to_devices(batch, sharding) for batch in batches],
        batch_size=config.batch_size,
        seed=seed,
        sharding=sharding,
        own_rows=own_rows,
        notes=notes,
    )


def _with_targets(rows: PackedRows) -> PackedRows:
    kept = rows.with_targets()
    if not len(kept):
        raise ConfigError(
            f"data: none of the {len(rows)} rows of {rows.name} has a token to learn: expected an answer of the "
            "assistant within data.seq_len tokens. Raise data.seq_len, or data.heldout_fraction if there are few rows."
        )
    return kept


def to_devices(batch: Any, sharding: NamedSharding) -> Any:
    """The global arrays of a batch of which each process has its own rows."""
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
