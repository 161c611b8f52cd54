"""Compiles a jitted function for abstract arguments and makes a plan of it. Nothing is allocated, and nothing runs."""

import dataclasses
import math
import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

import qwen_moe_jax
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import ShardingError
from qwen_moe_jax.model.segments import plan_segments
from qwen_moe_jax.plan.calibration import Calibration
from qwen_moe_jax.plan.chips import Chip, chip_of
from qwen_moe_jax.plan.collectives import collectives_of
from qwen_moe_jax.plan.cpu_run_time import fresh_bytes, run_time_bytes
from qwen_moe_jax.plan.hlo import Module
from qwen_moe_jax.plan.remarks import remarks_on
from qwen_moe_jax.plan.result import (
    PUBLISHED,
    Collective,
    CompileCost,
    Flops,
    Group,
    Memory,
    Model,
    PlacedArray,
    Plan,
    Roofline,
    Target,
    Work,
)
from qwen_moe_jax.plan.roofline import roofline_of, token_axes
from qwen_moe_jax.plan.targets import TargetRequest
from qwen_moe_jax.plan.worst_case import is_dropless, worst_rounds
from qwen_moe_jax.sharding.mesh import AXES, make_mesh
from qwen_moe_jax.sharding.rules import mesh_axes
from qwen_moe_jax.text import format_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A program to plan, and its arguments.

    Attributes:
        function: jitted.
        arguments: its positional arguments; arrays are `jax.ShapeDtypeStruct`s with shardings.
        groups: the same arrays by name, "parameters" first; each any tree.
        config: of the model.
        name: of the model, for people.
        work: what the step does.
        model_flops: of all devices, by the model's definition.
        gradient_bytes: of one device; 0 where there are none.
        open_loop_times: the trip count, in a step, of a loop whose end depends on data; None if unknown.
    """

    function: Any
    arguments: tuple[Any, ...]
    groups: Mapping[str, Any]
    config: ModelConfig
    name: str
    work: Work
    model_flops: float
    gradient_bytes: int = 0
    open_loop_times: int | None = None


def target_mesh(request: TargetRequest, sizes: Mapping[str, int]) -> Mesh:
    """The mesh over the target's devices.

    Args:
        request: the target.
        sizes: of the mesh axes; those not named are 1.

    Raises:
        ConfigError: the target's compiler is missing.
        ShardingError: the sizes do not come to the target's devices; with proposals.
    """
    devices = request.devices()
    needed = math.prod(sizes.values())
    if needed != len(devices):
        asked = format_mesh(sizes)
        proposals = _proposals(sizes, len(devices))
        raise ShardingError(
            f"the mesh {asked} needs {needed} devices, and the target {request.name} has {len(devices)}. "
            + (
                f"With as many: {'; '.join(proposals)}."
                if proposals
                else f"Choose sizes whose product is {len(devices)}."
            )
        )
    return make_mesh(**sizes, devices=devices)


def _proposals(sizes: Mapping[str, int], devices: int) -> list[str]:
    """Meshes of so many devices that differ from this one in a single axis, as values of `--mesh`."""
    found = []
    for axis in ("fsdp", "data", "expert", "context"):
        others = math.prod(size for name, size in sizes.items() if name != axis)
        if devices % others == 0:
            changed = {**{name: sizes.get(name, 1) for name in AXES}, axis: devices // others}
            found.append(format_mesh(changed, separator=",") if devices > 1 else "data=1")
    return list(dict.fromkeys(found))


def plan_step(step: Step, request: TargetRequest, mesh: Mesh, calibration: Calibration | None = None) -> Plan:
    """The plan of a step, compiled for the mesh's devices. A refusal for lack of memory is a plan, too.

    Args:
        step: what is planned.
        request: the target.
        mesh: over its devices.
        calibration: measured speeds; without, a chip's published ones.

    Raises:
        ConfigError: the calibration is of other devices, or not of the dtype of the activations.
    """
    chip = chip_for(request, mesh.devices.flatten().tolist(), step.work.dtype, calibration)
    target = target_of(request, mesh, chip)
    sizes = {axis: int(size) for axis, size in mesh.shape.items()}
    groups = tuple(group_of(name, tree) for name, tree in step.groups.items())
    compiled, refusal, cost = _compile(step, request, mesh)

    memory = _memory(groups, step.gradient_bytes, compiled, refusal, target)
    module: Module | None = None
    collectives: tuple[Collective, ...] = ()
    program_flops: float | None = None
    roofline: Roofline | None = None
    if compiled is not None:
        text, balanced = compiled.as_text() or "", balanced_rows(step, sizes)
        module = Module(text, layer_repeats(step.config), step.open_loop_times, balanced)
        collectives = collectives_of(module, sizes, request.platform)
        flops = module.matmul_flops()
        program_flops = None if flops is None else flops * target.devices
        speeds = (PUBLISHED, None) if calibration is None else (calibration.speeds, calibration.shares)
        moved = memory.host_arguments + memory.host_temporaries * step.work.accumulation_steps
        others = moved, fresh_bytes(memory.temporaries or 0) if request.platform == "cpu" else 0
        roofline = roofline_of(target, chip, sizes, step, program_flops, module, collectives, *speeds, *others)
    moe = step.config.moe
    plan = Plan(
        target=target,
        mesh=sizes,
        model=Model(
            name=step.name,
            model_type=step.config.model_type,
            parameters=step.config.num_parameters(),
            active_parameters=step.config.num_active_parameters(),
            layers=step.config.num_hidden_layers,
            sparse_layers=step.config.num_sparse_layers,
            experts=moe.num_experts if moe else 0,
            experts_per_token=moe.num_experts_per_tok if moe else 0,
        ),
        work=step.work,
        memory=memory,
        flops=Flops(model=step.model_flops, program=program_flops),
        collectives=collectives,
        roofline=roofline,
        remarks=(),
        refusal=refusal,
        cost=cost,
        versions=_versions(request),
    )
    if module is not None and request.platform == "cpu":
        at_worst = module.with_overflow(worst_rounds(plan) - 1) if is_dropless(plan) else module
        memory = dataclasses.replace(memory, run_time=run_time_bytes(at_worst, target.devices))
        plan = dataclasses.replace(plan, memory=memory)
    return dataclasses.replace(plan, remarks=remarks_on(plan))


def chip_for(
    request: TargetRequest, devices: Sequence[jax.Device], dtype: str, calibration: Calibration | None
) -> Chip | None:
    """The speeds to plan with: those measured or, of a chip, the published ones; None of simulated devices.

    Raises:
        ConfigError: the calibration is of other devices, or has not this dtype.
    """
    if calibration is not None:
        calibration.check_target(request, len(devices))
        return calibration.chip(dtype)
    return None if request.platform == "cpu" else chip_of(devices[0].device_kind)


def target_of(request: TargetRequest, mesh: Mesh, chip: Chip | None) -> Target:
    """The target of a request, with the numbers of its chip."""
    return Target(
        name=request.name,
        platform=request.platform,
        chip="simulated CPU" if chip is None else chip.name,
        devices=mesh.devices.size,
        memory_bytes=chip.memory_bytes if chip else None,
        peak_flops=chip.peak_flops if chip else None,
        memory_bandwidth=chip.memory_bandwidth if chip else None,
    )


def group_of(name: str, tree: Any) -> Group:
    """The arrays of a tree with their shardings. One without a sharding is replicated."""
    arrays = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        shape, sharding = tuple(np.shape(leaf)), getattr(leaf, "sharding", None)
        named = sharding if isinstance(sharding, NamedSharding) else None
        spec = () if named is None else tuple(named.spec)
        local = shape if named is None else named.shard_shape(shape)
        arrays.append(
            PlacedArray(
                name=jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"),
                shape=shape,
                dtype=str(leaf.dtype),
                spec=tuple(mesh_axes(axes) for axes in (*spec, *(None,) * (len(shape) - len(spec)))),
                bytes=math.prod(local) * leaf.dtype.itemsize,
                memory_kind=(named and named.memory_kind) or "device",
            )
        )
    return Group(name=name, arrays=tuple(arrays))


def layer_repeats(config: ModelConfig) -> frozenset[int]:
    """Trip counts of the scans over layers. A scan of a single step is no loop."""
    return frozenset(segment.repeats for segment in plan_segments(config.layers) if segment.repeats > 1)


def balanced_rows(step: Step, mesh: Mapping[str, int]) -> int | None:
    """Rows of one device's experts at a balanced load; None without experts."""
    if step.config.moe is None:
        return None
    tokens = step.work.rows * step.work.tokens_per_row // step.work.accumulation_steps
    return tokens * step.config.moe.num_experts_per_tok // math.prod(mesh[axis] for axis in token_axes(step.work))


def _compile(
    step: Step, request: TargetRequest, mesh: Mesh
) -> tuple[jax.stages.Compiled | None, str | None, CompileCost]:
    began = time.perf_counter()
    if request.platform == "gpu":
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # from which Pallas learns the GPU's kind
            lowered = step.function.trace(*step.arguments).lower(lowering_platforms=("cuda",))
    else:
        lowered = step.function.lower(*step.arguments)
    traced = time.perf_counter()
    compiled, refusal = None, None
    # On the CPU, most of the time would go into machine code that never runs; the program is the same without.
    options = {"xla_backend_optimization_level": 0} if request.platform == "cpu" else None
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(error).strip().splitlines()[0]
    cost = CompileCost(
        trace_seconds=traced - began,
        compile_seconds=time.perf_counter() - traced,
        peak_host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )
    return compiled, refusal, cost


def _memory(
    groups: tuple[Group, ...],
    gradient_bytes: int,
    compiled: jax.stages.Compiled | None,
    refusal: str | None,
    target: Target,
) -> Memory:
    needed, available = refused_bytes(refusal or "")
    arguments = sum(group.bytes for group in groups)
    analysis = None if compiled is None else compiled.memory_analysis()
    # The CPU's compiler has one memory, and counts the host's among the device's.
    found = None if analysis is None else analysis.argument_size_in_bytes + analysis.host_argument_size_in_bytes
    return Memory(
        groups=groups,
        padding=None if found is None else found - arguments,
        gradients=gradient_bytes,
        outputs=None if analysis is None else analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporaries=None if analysis is None else analysis.temp_size_in_bytes,
        code=None if analysis is None else analysis.generated_code_size_in_bytes,
        needed=needed,
        available=available or target.memory_bytes,
        host_temporaries=0 if analysis is None else analysis.host_temp_size_in_bytes,
    )


_SIZE = r"([\d.]+)([KMGT]?)i?B?"


def refused_bytes(refusal: str) -> tuple[int | None, int | None]:
    """(needed, available) from XLA's message about a program that does not fit; None for what it lacks."""
    for pattern in (rf"\({_SIZE}\) exceeds available \w+ \({_SIZE}\)", rf"Used {_SIZE} of {_SIZE}"):
        if match := re.search(pattern, refusal):
            number, unit, limit, limit_unit = match.groups()
            return _as_bytes(number, unit), _as_bytes(limit, limit_unit)
    return None, None


def _as_bytes(number: str, unit: str) -> int:
    return int(float(number) * 2 ** (10 * " KMGT".index(unit or " ")))


def _versions(request: TargetRequest) -> dict[str, str]:
    packages = {"cpu": (), "tpu": ("libtpu",), "gpu": ("jax-cuda13-plugin", "jax-cuda12-plugin")}[request.platform]
    found = {"qwen_moe_jax": qwen_moe_jax.__version__}
    for name in ("jax", "jaxlib", "flax", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
