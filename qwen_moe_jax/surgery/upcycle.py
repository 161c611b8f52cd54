"""Dense models made sparse, and sparse ones made larger or finer-grained: folder in, folder out, block by block.

Every new expert is made of hidden units of an old one (rows of gate and up, columns of down), so that experts which
together hold each unit once, with weights that sum to one, are the old layer. Where a recipe keeps the function, that
is checked with the new tensors before anything is written: the first, the middle and the last layer, in float32.
"""

import dataclasses
from collections.abc import Callable
from os import PathLike

import ml_dtypes
import numpy as np

from qwen_moe_jax.config import ModelConfig, MoEConfig
from qwen_moe_jax.errors import CheckpointError, ConfigError
from qwen_moe_jax.huggingface.checkpoint import Checkpoint, open_checkpoint, problems_of, require_no_problems
from qwen_moe_jax.huggingface.convert import abstract_model, require_other_folder, write_checkpoint
from qwen_moe_jax.huggingface.hub import local_folder
from qwen_moe_jax.huggingface.sparse_families import (
    FeedForward,
    open_for_upcycling,
    sparse_config,
    sparse_layers,
    with_experts,
)
from qwen_moe_jax.huggingface.tensors import hub_parameters
from qwen_moe_jax.storage.arrays import ArrayTensor
from qwen_moe_jax.storage.tensor import StoredTensor
from qwen_moe_jax.surgery import reference
from qwen_moe_jax.surgery.expert_plan import MATRICES, NewExpert, Redraw, layer_tensors, reasons_against, slices

#: What the routed experts count besides a shared one that is the whole old layer: its gate is sigmoid(0).
_BESIDE_SHARED = 0.5
#: Tokens of the check, and what outputs may differ by as a share of their norm, in float32.
_TOKENS, _TOLERANCE = 8, 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grown:
    """What has been written.

    Attributes:
        model_type: of the new model.
        moe: its experts.
        reasons: why it does not compute what the old one did; empty: it does.
        difference: between new and old layers in the check, as a share of the old one's norm; None without a check.
    """

    model_type: str
    moe: MoEConfig
    reasons: tuple[str, ...]
    difference: float | None

    @property
    def preserved(self) -> bool:
        """Whether the logits are those of the old model, up to rounding."""
        return not self.reasons


def upcycle(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    num_experts: int,
    num_experts_per_tok: int,
    moe_intermediate_size: int | None = None,
    shuffle: bool | None = None,
    redraw: float = 0.0,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
) -> Grown:
    """Writes a mixture of experts whose experts are copies of a dense model's layers, or slices of them.

    Qwen2 becomes Qwen2-MoE, whose shared expert is the old layer (the routed ones count half, and sigmoid(0) is the
    other half), Qwen3 becomes Qwen3-MoE, Mistral and Llama without biases become Mixtral. Routers are drawn with
    `initializer_range`; the slices of one copy have the same row where that keeps the function (He et al., arXiv
    2410.07524), and rows of their own elsewhere. Shuffled slices that are partly drawn anew are the recipe of
    Qwen1.5-MoE and Qwen2-57B-A14B (arXiv 2407.10671).

    Args:
        source: a dense checkpoint's folder, or its name on the Hub.
        target: folder to write.
        num_experts, num_experts_per_tok: of every layer.
        moe_intermediate_size: hidden units of an expert; None is those of the dense layer.
        shuffle: give the hidden units of each copy an order of their own before it is sliced; None does so for slices
            that are drawn anew in part.
        redraw: share of the experts' values that are drawn anew, from a normal distribution of `initializer_range`.
        seed: of everything that is drawn.
        max_shard_size: bytes of a file.

    Raises:
        ConfigError: not a dense model that can be upcycled; numbers that do not fit.
        CheckpointError: the folder does not load, or the target cannot be written.
    """
    folder = local_folder(source)
    require_other_folder(folder, target)
    checkpoint = open_for_upcycling(folder)
    _require_share(redraw)
    old = checkpoint.config
    width = old.intermediate_size
    size = moe_intermediate_size or width
    if not 0 < size <= width:
        raise ConfigError(f"moe_intermediate_size={size}: expected 1 to {width}, the hidden units of the dense layer.")
    config = sparse_config(
        old, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok, moe_intermediate_size=size
    )
    shuffle = redraw > 0 if shuffle is None else shuffle
    reasons = reasons_against(None, config.moe, width=width, redraw=redraw)
    tensors = _upcycled_layers(checkpoint, config, shuffle=shuffle, redraw=redraw, seed=seed, grouped=not reasons)
    changed = dataclasses.replace(checkpoint, config=config, tensors=tensors)
    return _write(checkpoint, changed, target, reasons, max_shard_size)


def _upcycled_layers(
    checkpoint: Checkpoint, config: ModelConfig, *, shuffle: bool, redraw: float, seed: int, grouped: bool
) -> dict[str, StoredTensor]:
    """All tensors of the new model; `grouped`: the slices of one copy have the same row of the router."""
    old, moe = checkpoint.config, config.moe
    width, size, count = old.intermediate_size, moe.moe_intermediate_size, moe.num_experts
    parts, shared = width // size, moe.shared_expert_intermediate_size > 0
    tensors = _without_feed_forward(checkpoint)
    for number, new in enumerate(sparse_layers(config)):
        generator = np.random.default_rng((seed, number))
        units = slices(width, size, count, shuffle=shuffle, generator=generator)
        again = Redraw(redraw, old.initializer_range, seed) if redraw else None
        rows = count // parts if grouped else count
        router = generator.standard_normal((rows, old.hidden_size), np.float32) * np.float32(old.initializer_range)
        names = _old_names(checkpoint, new.path)[0]
        tensors |= layer_tensors(
            checkpoint.tensors,
            [names],
            new,
            [NewExpert(0, own, again) for own in units],
            np.repeat(router, count // rows, axis=0),
            number=number,
            factor=parts * (_BESIDE_SHARED if shared else 1.0),
        )
        if shared:
            tensors |= {new.shared(matrix): checkpoint.tensors[names[matrix]] for matrix in MATRICES}
            gate = np.zeros((1, old.hidden_size), checkpoint.tensors[names["gate"]].dtype)
            tensors[new.shared_gate] = ArrayTensor(gate, "the new gate")
    return tensors


def grow(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    num_experts: int | None = None,
    num_experts_per_tok: int | None = None,
    redraw: float = 0.0,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
) -> Grown:
    """Writes a mixture with more experts, which are copies of the first ones with their router rows, or a larger top-k.

    With m times the experts and m times the experts a token the function is kept: the m copies of each chosen expert
    are chosen, and share its weight. Copies that are equal in everything stay so in training: `redraw` makes them
    differ.

    Args:
        source: a sparse checkpoint's folder, or its name on the Hub.
        target: folder to write.
        num_experts: of every layer, at least as many as it has; None keeps their number.
        num_experts_per_tok: None grows it like the number of experts.
        redraw, seed, max_shard_size: as in `upcycle`; the first experts are kept as they are.

    Raises:
        ConfigError, CheckpointError: as `upcycle`.
    """
    checkpoint = _open_sparse(source, target)
    _require_share(redraw)
    old = checkpoint.config
    count = num_experts or old.moe.num_experts
    if count < old.moe.num_experts:
        raise ConfigError(
            f"num_experts={count}: the model has {old.moe.num_experts}. `prune` and `merge` take some away."
        )
    per_token = num_experts_per_tok or old.moe.num_experts_per_tok * count // old.moe.num_experts
    moe = dataclasses.replace(old.moe, num_experts=count, num_experts_per_tok=per_token)
    added = count > old.moe.num_experts
    reasons = reasons_against(old.moe, moe, width=moe.moe_intermediate_size, redraw=redraw if added else 0.0)

    def layer(number: int) -> tuple[list[NewExpert], list[int]]:
        sources = [expert % old.moe.num_experts for expert in range(count)]
        again = Redraw(redraw, old.initializer_range, seed) if redraw else None
        made = [NewExpert(own, None, again if at >= old.moe.num_experts else None) for at, own in enumerate(sources)]
        return made, sources

    return _regrouped(checkpoint, target, moe, layer, reasons, max_shard_size, factor=1.0)


def split(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    parts: int,
    num_experts_per_tok: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
) -> Grown:
    """Writes a mixture of finer grain: each expert is split into parts with its router row.

    With `parts` times the experts a token, the function is kept: all parts of a chosen expert are chosen, and share its
    weight; their down matrices are multiplied by the number of parts.

    Args:
        source: a sparse checkpoint's folder, or its name on the Hub.
        target: folder to write.
        parts: into which each expert is split; a divisor of its hidden units.
        num_experts_per_tok: None is `parts` times that of the model.
        shuffle: which hidden units are together is drawn.
        seed, max_shard_size: as in `upcycle`.

    Raises:
        ConfigError, CheckpointError: as `upcycle`.
    """
    checkpoint = _open_sparse(source, target)
    old = checkpoint.config
    width = old.moe.moe_intermediate_size
    if parts < 1 or width % parts:
        raise ConfigError(f"parts={parts}: expected a divisor of the experts' {width} hidden units.")
    moe = dataclasses.replace(
        old.moe,
        num_experts=old.moe.num_experts * parts,
        num_experts_per_tok=num_experts_per_tok or old.moe.num_experts_per_tok * parts,
        moe_intermediate_size=width // parts,
    )
    reasons = reasons_against(old.moe, moe, width=width, redraw=0.0)

    def layer(number: int) -> tuple[list[NewExpert], list[int]]:
        generator = np.random.default_rng((seed, number))
        made: list[NewExpert] = []
        for expert in range(old.moe.num_experts):
            units = slices(width, width // parts, parts, shuffle=shuffle, generator=generator)
            made += [NewExpert(expert, own) for own in units]
        return made, [one.source for one in made]

    return _regrouped(checkpoint, target, moe, layer, reasons, max_shard_size, factor=float(parts))


def _open_sparse(source: str | PathLike[str], target: str | PathLike[str]) -> Checkpoint:
    folder = local_folder(source)
    require_other_folder(folder, target)
    checkpoint = open_checkpoint(folder)
    if checkpoint.config.moe is None:
        raise ConfigError(f"{folder}: the model is dense: expected a mixture of experts. `upcycle` makes one of it.")
    return checkpoint


def _regrouped(
    checkpoint: Checkpoint,
    target: str | PathLike[str],
    moe: MoEConfig,
    layer: Callable[[int], tuple[list[NewExpert], list[int]]],
    reasons: tuple[str, ...],
    max_shard_size: int | str,
    *,
    factor: float,
) -> Grown:
    """Writes a mixture whose experts are made of those of another.

    Args:
        layer: number of a layer → its experts, and for each the number of the old expert whose router row it has.
    """
    require_no_problems(checkpoint.folder, problems_of(checkpoint, hub_parameters(abstract_model(checkpoint))))
    config = with_experts(checkpoint.config, moe)
    tensors = dict(checkpoint.tensors)
    for number, new in enumerate(sparse_layers(config)):
        made, rows = layer(number)
        router = checkpoint.tensors[new.router].read().astype(np.float32)
        names = _old_names(checkpoint, new.path)
        for own in names:
            for name in own.values():
                tensors.pop(name, None)
        tensors |= layer_tensors(checkpoint.tensors, names, new, made, router[rows], number=number, factor=factor)
    changed = dataclasses.replace(checkpoint, config=config, tensors=tensors)
    return _write(checkpoint, changed, target, reasons, max_shard_size)


def _old_names(checkpoint: Checkpoint, path: str) -> list[dict[str, str]]:
    """The names of the matrices of each of a layer's experts; of a dense layer, its own."""
    old = FeedForward(checkpoint.config, path)
    if checkpoint.config.moe is None:
        return [{matrix: old.dense(matrix) for matrix in MATRICES}]
    count = checkpoint.config.moe.num_experts
    return [{matrix: old.expert(expert, matrix) for matrix in MATRICES} for expert in range(count)]


def _without_feed_forward(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The tensors of a dense model but those of its feed-forward parts."""
    require_no_problems(checkpoint.folder, problems_of(checkpoint, hub_parameters(abstract_model(checkpoint))))
    paths = [f"model.layers.{layer}" for layer in range(len(checkpoint.config.layers))]
    dropped = {name for path in paths for own in _old_names(checkpoint, path) for name in own.values()}
    dropped |= {FeedForward(checkpoint.config, path).router for path in paths}
    return {name: tensor for name, tensor in checkpoint.tensors.items() if name not in dropped}


def _write(
    old: Checkpoint,
    new: Checkpoint,
    target: str | PathLike[str],
    reasons: tuple[str, ...],
    max_shard_size: int | str,
) -> Grown:
    difference = None
    if not reasons:
        difference = _largest_difference(old, new)
        unit = float(ml_dtypes.finfo(new.tensors[sparse_layers(new.config)[0].router].dtype).eps)
        if not difference <= _TOLERANCE + 4 * unit * (unit > 1e-6):
            raise CheckpointError(
                f"{old.folder}: a layer of the new model differs from the old one by {difference:.1e} of its norm, "
                "expected only rounding. Nothing was written. Two experts may have equal router logits: pass another "
                "seed."
            )
    write_checkpoint(new, target, max_shard_size=max_shard_size)
    return Grown(model_type=new.config.model_type, moe=new.config.moe, reasons=reasons, difference=difference)


def _largest_difference(old: Checkpoint, new: Checkpoint) -> float:
    """Between the first, the middle and the last layers on random tokens, as a share of the old one's norm."""
    layers = sparse_layers(new.config)
    hidden = np.random.default_rng(0).standard_normal((_TOKENS, new.config.hidden_size), np.float32)
    found = []
    for number in sorted({0, len(layers) // 2, len(layers) - 1}):
        before = FeedForward(old.config, layers[number].path)
        compute = reference.dense if old.config.moe is None else reference.sparse
        expected = compute(hidden, before, old.tensors)
        apart = float(np.linalg.norm(reference.sparse(hidden, layers[number], new.tensors) - expected))
        found.append(apart / max(float(np.linalg.norm(expected)), 1e-30))
    return max(found)


def _require_share(redraw: float) -> None:
    if not 0 <= redraw <= 1:
        raise ConfigError(f"redraw={redraw}: expected a share from 0 to 1.")
