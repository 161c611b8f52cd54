"""The collectives of a compiled program: over which mesh axes, with how many bytes."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import cast, get_args

import numpy as np

from qwen_moe_jax.plan.hlo import Module, Run
from qwen_moe_jax.plan.hlo_text import Array, Instruction, parameter_number
from qwen_moe_jax.plan.result import Collective, CollectiveKind

_KINDS = frozenset(get_args(CollectiveKind))

#: Instructions that pass on the numbers of their operands.
_SAME_NUMBERS = frozenset(
    "bitcast copy reshape transpose slice dynamic-slice concatenate get-tuple-element tuple broadcast pad copy-start "
    "copy-done gather select dynamic-update-slice".split()
)


def collectives_of(module: Module, mesh: Mapping[str, int], platform: str) -> tuple[Collective, ...]:
    """The collectives of a step, equal ones merged, those with most bytes first.

    Bytes sent are those of algorithms that send nothing twice, for n devices: all-gather (n-1) times a device's
    operand; reduce-scatter and all-to-all (n-1)/n of it; all-reduce twice that; a permute the operand. A ragged
    all-to-all counts as one of the rows of a balanced load, where the module knows these, and else as a full one: how
    many rows there are is known when it runs.

    Args:
        module: of a program for all devices of the mesh.
        mesh: sizes of the axes, in the order of the devices.
        platform: whose compiler it was. The CPU's has no bfloat16 collectives and widens their numbers; bytes are those
            of the program asked for, as far as the text shows where it was widened.
    """
    found: dict[Collective, int | None] = {}
    for run in module.runs:
        if run.times == 0 or module.goes_on(run) or (one := _collective(module, run, mesh, platform)) is None:
            continue
        counted = dataclasses.replace(one, count=0)
        before = found.get(counted, 0)
        found[counted] = None if before is None or one.count is None else before + one.count
    whole = [dataclasses.replace(one, count=count) for one, count in found.items()]
    return tuple(sorted(whole, key=lambda one: -one.bytes * (1 if one.count is None else one.count)))


def _collective(module: Module, run: Run, mesh: Mapping[str, int], platform: str) -> Collective | None:
    instruction = run.instruction
    kind = "reduce-scatter" if _scatters(run) else instruction.opcode.removesuffix("-start")
    if kind not in _KINDS:
        return None
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attributes.split("source_target_pairs=")[-1])
        groups = [[int(source), int(target)] for source, target in pairs]
    else:
        groups = replica_groups(instruction, math.prod(mesh.values()))
    axes = mesh_axes(groups, mesh)
    devices = math.prod(mesh[axis] for axis in axes) if kind == "collective-permute" else len(groups[0])
    given = module.operand_arrays(run)
    if kind == "ragged-all-to-all":
        given = given[:1]  # the others are where it is written, offsets and sizes
    if devices == 1 or not given:
        return None
    size = sum(array.bytes for array in given)
    if kind == "ragged-all-to-all" and module.balanced_rows is not None:
        size = min(size, size * module.balanced_rows // given[0].shape[0])
    largest = max([*given, *instruction.results], key=lambda array: array.bytes)
    narrower = _narrower(module, run) if platform == "cpu" else None
    if narrower is not None:
        size = size * Array(narrower, (1,)).bytes // Array(largest.dtype, (1,)).bytes
    sent = {
        "all-gather": size * (devices - 1),
        "all-reduce": 2 * size * (devices - 1) // devices,
        "collective-permute": size,
    }.get(kind, size * (devices - 1) // devices)
    return Collective(
        kind=cast(CollectiveKind, kind),
        axes=axes,
        devices=devices,
        dtype=largest.dtype,
        shape=largest.shape,
        bytes=sent,
        count=run.times,
        in_layers=run.layers > 0,
        widened_from=narrower,
        source=instruction.source,
        asynchronous=module.is_asynchronous(run),
    )


def _scatters(run: Run) -> bool:
    """Whether it is an all-reduce of which each device takes its slice in the same fusion.

    libtpu's compiler writes its reduce-scatters so, padded where shards are not whole tiles.
    """
    if not (run.fused and run.instruction.opcode == "all-reduce"):
        return False
    root = next((one for one in run.computation.values() if one.root), None)
    return root is not None and root.opcode == "dynamic-slice" and root.operands[0] == run.instruction.name


def replica_groups(instruction: Instruction, devices: int) -> list[list[int]]:
    """The groups of devices that communicate, as their indices in the mesh.

    The text has them as lists, `{{0,1},{2,3}}`; as a reshaped and transposed range, `[2,4]<=[4,2]T(1,0)`; or as axes of
    a mesh of XLA's own, `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}`, parts of axes as `'a':(2)4`.
    """
    text = instruction.attributes.split("replica_groups=")[-1]
    if text.startswith("{{"):
        return [
            [int(one) for one in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text.split("}}")[0] + "}")
        ]
    if match := re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _range(match[2]).reshape([int(size) for size in match[1].split(",")]).tolist()
    if match := re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?\]?(?:T\([\d,]+\))?)\))? \{(.*?)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        order = _range(match[2]) if match[2] else np.arange(math.prod(sizes.values()))
        shape: list[int] = []
        chosen: list[int] = []
        parts = {
            name: (int(before), int(size)) for name, before, size in re.findall(r"'(\w+)':\((\d+)\)(\d+)", match[3])
        }
        whole = set(re.findall(r"'(\w+)'(?!:)", match[3]))
        for name, size in sizes.items():
            if name in parts:  # an axis is split into what comes before, the part, and what comes after
                before, part = parts[name]
                chosen.append(len(shape) + 1)
                shape += [before, part, size // (before * part)]
            else:
                if name in whole:
                    chosen.append(len(shape))
                shape.append(size)
        rest = [axis for axis in range(len(shape)) if axis not in chosen]
        grid = order.reshape(shape).transpose([*rest, *chosen])
        return grid.reshape(-1, math.prod(shape[axis] for axis in chosen)).tolist()
    return [list(range(devices))]  # none are named: all devices


def _range(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: the numbers from 0, reshaped and transposed."""
    sizes, _, permutation = text.partition("]")
    shape = [int(size) for size in sizes.strip("[(").split(",")]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    axes = re.findall(r"\d+", permutation)
    return numbers.transpose([int(axis) for axis in axes]).ravel() if axes else numbers.ravel()


def mesh_axes(groups: list[list[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the devices of every group differ."""
    names, sizes = list(mesh), list(mesh.values())
    indices = np.array([np.unravel_index(group, sizes) for group in groups])  # [groups, axes, members]
    differs = (indices != indices[:, :, :1]).any(axis=(0, 2))
    return tuple(name for name, differ in zip(names, differs, strict=True) if differ)


def _narrower(module: Module, run: Run) -> str | None:
    """The dtype before the CPU's compiler widened the numbers to float32 for this collective; None where it did not.

    What goes in was bfloat16 a moment before, or what comes out is at once made bfloat16 again.
    """
    if not all(array.dtype == "f32" for array in module.operand_arrays(run)):
        return None
    widened = [_was_bfloat16(module, run.computation, name, 0) for name in run.instruction.operands]
    narrowed = _becomes_bfloat16(module, run.computation, run.instruction.name, 0)
    return "bf16" if (widened and all(widened)) or narrowed else None


def _was_bfloat16(module: Module, computation: dict[str, Instruction], name: str, depth: int) -> bool:
    one = computation.get(name)
    if one is None or depth > 12:
        return False
    if one.opcode == "convert":
        source = computation.get(one.operands[0])
        return source is not None and bool(source.results) and source.results[0].dtype == "bf16"
    if one.opcode == "fusion":
        inside = module.computations.get((one.attribute("calls") or "").lstrip("%"), {})
        root = next((each for each in inside.values() if each.root), None)
        return root is not None and _was_bfloat16(module, inside, root.name, depth + 1)
    if one.opcode in _SAME_NUMBERS and one.operands:
        return _was_bfloat16(module, computation, one.operands[0], depth + 1)
    return False


def _becomes_bfloat16(module: Module, computation: dict[str, Instruction], name: str, depth: int) -> bool:
    users = [one for one in computation.values() if name in one.operands]
    return bool(users) and depth <= 12 and all(_narrows(module, computation, one, name, depth) for one in users)


def _narrows(module: Module, computation: dict[str, Instruction], user: Instruction, name: str, depth: int) -> bool:
    if user.opcode == "convert":
        return user.results[0].dtype == "bf16"
    if user.opcode in _SAME_NUMBERS and not user.root:
        return _becomes_bfloat16(module, computation, user.name, depth + 1)
    if user.opcode != "fusion":
        return False
    inside = module.computations.get((user.attribute("calls") or "").lstrip("%"), {})
    positions = [position for position, operand in enumerate(user.operands) if operand == name]
    taken = [one for one in inside.values() if one.opcode == "parameter" and parameter_number(one) in positions]
    return bool(taken) and all(_becomes_bfloat16(module, inside, one.name, depth + 1) for one in taken)
