"""Whether two checkpoints are the same model, and what has happened to one of them if they are not.

Both are read once, block by block, whatever their form, under one set of names; only tensors that differ are read
again, for a cause. Nothing of a model's size is held in memory.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from os import PathLike

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.huggingface.checkpoint import Checkpoint, open_checkpoint
from qwen_moe_jax.huggingface.hub import local_folder
from qwen_moe_jax.huggingface.layouts import EMBEDDING, HEAD
from qwen_moe_jax.huggingface.peft import merged, open_adapter
from qwen_moe_jax.storage.progress import bytes_bar
from qwen_moe_jax.storage.tensor import StoredTensor
from qwen_moe_jax.surgery.adapters import diagnose_merge
from qwen_moe_jax.surgery.experts import diagnose_block, sparse_blocks
from qwen_moe_jax.surgery.measure import Difference, Measure, Pair, compare, measure
from qwen_moe_jax.surgery.presence import absent, diagnose_vocabulary
from qwen_moe_jax.surgery.result import Comparison, Finding, Rounded, Verdict
from qwen_moe_jax.surgery.sides import Sides
from qwen_moe_jax.surgery.tensors import diagnose_tensor
from qwen_moe_jax.surgery.tolerance import bounds, stored_dtype

#: Fields of a config that the files decide, or that no forward pass reads.
_NOT_COMPARED = {
    "model_type", "dtype", "tie_word_embeddings", "num_mtp_layers", "vocab_size", "hub_fields", "initializer_range",
    "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "num_labels", "intermediate_size",
    "router_aux_loss_coef", "router_jitter_noise", "float32_parameters",
}  # fmt: skip


def compare_checkpoints(
    first: str | PathLike[str],
    second: str | PathLike[str],
    *,
    adapter: str | PathLike[str] | None = None,
    drop_mtp: bool = False,
) -> Comparison:
    """Compares two checkpoints of any form that `from_pretrained` reads.

    Args:
        first: folder A, or its name on the Hub; what B is measured against.
        second: folder B.
        adapter: a folder of low-rank adapters that B is expected to have merged into A's weights.
        drop_mtp: leave the next-token heads that they may have out of the comparison.

    Raises:
        ConfigError: a config.json, or the adapter's, is missing or not supported.
        CheckpointError: a folder has no weights or cannot be read; the adapter does not fit A.
    """
    a, b = (open_checkpoint(local_folder(folder, drop_mtp=drop_mtp), drop_mtp=drop_mtp) for folder in (first, second))
    for checkpoint in (a, b):
        if not checkpoint.tensors:
            raise CheckpointError(
                f"{checkpoint.folder}: there are no tensors in it that can be read. Check the folder."
            )
    base = a.tensors
    if adapter is not None:
        a = merged(a, open_adapter(adapter, a.config))
    tensors = with_heads(a, b)
    adapted = {name: base[name] for name in tensors[0] if name in base and tensors[0][name] is not base[name]}
    sides = _measured(a.config, tensors, adapted, f"Comparing {b.folder.name}")
    findings = [*_configs(a.config, b.config), *_unreadable(a, "A"), *_unreadable(b, "B")]
    findings += absent(sides, damaged=bool(a.problems or b.problems))
    findings += _diagnosed(sides, adapted, tied=(HEAD not in a.tensors, HEAD not in b.tensors))
    explained = {name for finding in findings for name in finding.names}
    same = [name for name in sides.differences if sides.is_same(name) and name not in explained]
    equal = [name for name in same if sides.differences[name].equal]
    rounded = _rounded(sides, [name for name in same if name not in set(equal)], adapted)
    return Comparison(
        first=str(a.folder),
        second=str(b.folder),
        adapter=None if adapter is None else str(adapter),
        verdict=_verdict(findings, rounded),
        tensors=len(tensors[0].keys() | tensors[1].keys()),
        equal=len(equal),
        rounded=rounded,
        findings=tuple(findings),
    )


def with_heads(a: Checkpoint, b: Checkpoint) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The tensors of both; where one has an output head and the other ties it to the embedding, both have one."""
    found = []
    for own, other in ((a, b), (b, a)):
        tensors = dict(own.tensors)
        if HEAD in other.tensors and HEAD not in tensors and own.config.tie_word_embeddings and EMBEDDING in tensors:
            tensors[HEAD] = tensors[EMBEDDING]
        found.append(tensors)
    return found[0], found[1]


def _measured(
    config: ModelConfig,
    tensors: tuple[dict[str, StoredTensor], dict[str, StoredTensor]],
    adapted: Mapping[str, StoredTensor],
    title: str,
) -> Sides:
    """Reads everything once."""
    first, second = tensors
    common = [name for name in first if name in second and first[name].shape == second[name].shape]
    known = set(common)
    others: list[list[tuple[str, StoredTensor]]] = [
        [(name, tensor) for name, tensor in side.items() if name not in known] for side in tensors
    ]
    pairs = (Pair(name, first[name], second[name], adapted.get(name)) for name in common)
    total = sum(tensor.nbytes for side in tensors for tensor in side.values())
    with bytes_bar(title, total) as advance:
        differences = compare(pairs, advance)
        measures: list[dict[str, Measure]] = [measure(side, advance) for side in others]
    measures[0] |= {name: difference.first for name, difference in differences.items()}
    measures[1] |= {name: difference.second for name, difference in differences.items()}
    return Sides(config, first, second, (measures[0], measures[1]), differences)


def _diagnosed(sides: Sides, adapted: Mapping[str, StoredTensor], tied: tuple[bool, bool]) -> list[Finding]:
    """A cause for every tensor that both have and that differs."""
    open_names = [name for name in sides.second if name in sides.first and not sides.is_same(name)]
    findings: list[Finding] = []
    for name, base in adapted.items():
        # An adapter may be smaller than the rounding of each value, and still be seen in their sum.
        if name in sides.differences and not sides.differences[name].equal:
            found = diagnose_merge(name, base, sides.first[name], sides.second[name])
            findings += [found] if found is not None else []
    findings += diagnose_vocabulary(sides, open_names, tied)
    explained = {name for finding in findings for name in finding.names}
    remaining = {name for name in open_names if name not in explained}
    for block in sparse_blocks(sides):
        if remaining & {*block.names.values(), block.router}:
            findings += [one for one in diagnose_block(block, sides) if not explained & set(one.names)]
    explained = {name for finding in findings for name in finding.names}
    return findings + [diagnose_tensor(name, sides) for name in open_names if name not in explained]


def _configs(a: ModelConfig, b: ModelConfig) -> list[Finding]:
    """Fields of the configs that change what the weights compute."""
    found = []
    for name, one, two in _fields(dataclasses.asdict(a), dataclasses.asdict(b)):
        text = f"{name}: {one} in A, {two} in B" if len(f"{one}{two}") < 120 else f"{name} differs"
        found.append(Finding(kind="config", words=f"config.json: {text}", names=()))
    return found


def _fields(one: Mapping, two: Mapping, prefix: str = "") -> Iterable[tuple[str, object, object]]:
    for name in one:
        if name in _NOT_COMPARED or one[name] == two.get(name):
            continue
        if isinstance(one[name], Mapping) and isinstance(two.get(name), Mapping):
            yield from _fields(one[name], two[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", one[name], two.get(name)


def _unreadable(checkpoint: Checkpoint, side: str) -> list[Finding]:
    words = (f"{side}: {problem}" for problem in checkpoint.problems)
    return [
        Finding(kind="transposed" if "are transposed" in text else "unreadable", words=text, names=()) for text in words
    ]


def _rounded(sides: Sides, names: list[str], adapted: Mapping[str, StoredTensor]) -> tuple[Rounded, ...]:
    groups: dict[tuple[str, str], list[tuple[str, Difference]]] = {}
    for name in names:
        first, second, difference = sides.first[name], sides.second[name], sides.differences[name]
        limits = bounds(first, second, computed=name in adapted)
        kept = next((bound.words for bound, keeps in zip(limits, difference.within, strict=True) if keeps), "")
        # Scales differ from matrix to matrix: the words of the bound have them, and would make a group of each.
        words = (
            "0" if difference.changed == 0 else kept if "quantised" not in kept else "half a step of quantised values"
        )
        dtypes = f"{stored_dtype(first)} → {stored_dtype(second)}"
        groups.setdefault((dtypes, words), []).append((name, difference))
    found = []
    for (dtypes, words), group in groups.items():
        worst = max(group, key=lambda entry: entry[1].largest)
        relative = max(difference.relative for _, difference in group)
        found.append(
            Rounded(
                dtypes=dtypes,
                bound=words,
                count=len(group),
                largest=worst[1].largest,
                relative=relative,
                name=worst[0],
            )
        )
    return tuple(found)


def _verdict(findings: list[Finding], rounded: tuple[Rounded, ...]) -> Verdict:
    if any(not finding.harmless for finding in findings):
        return "differs"
    if findings:
        return "reordered"
    return "rounding" if rounded else "same"
