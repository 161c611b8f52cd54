"""The time of a step as an interval, by published or measured speeds; `Roofline` lists the assumptions."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qwen_moe_jax.plan.chips import Chip, Network
from qwen_moe_jax.plan.hlo import Module
from qwen_moe_jax.plan.result import PUBLISHED, AxisTraffic, Bound, Collective, Roofline, Target, Work
from qwen_moe_jax.sharding.positions import SHORTEST_CHUNK
from qwen_moe_jax.sharding.rules import BATCH, CONTEXT
from qwen_moe_jax.units import format_bytes

if TYPE_CHECKING:
    from qwen_moe_jax.plan.compile import Step


BOUNDS: tuple[Bound, ...] = ("compute", "memory", "network")


def roofline_of(
    target: Target,
    chip: Chip | None,
    mesh: Mapping[str, int],
    step: "Step",
    program_flops: float | None,
    module: Module,
    collectives: Sequence[Collective],
    speeds: str = PUBLISHED,
    shares: Mapping[str, float] | None = None,
    host_bytes: int = 0,
    fresh_bytes: int = 0,
) -> Roofline | None:
    """The estimate of a step; None for a chip whose numbers are not known.

    `host_bytes` are copied from the host's memory and back; of a device's temporaries, `fresh_bytes` are handed out by
    the system in every step. Where the program's FLOPs are not known, the model's are used, with a third more for
    layers that are computed again.
    """
    if chip is None or target.peak_flops is None or target.memory_bandwidth is None:
        return None
    again = 4 / 3 if recomputes(step.work) else 1
    compute = (program_flops or step.model_flops * again) / target.devices / target.peak_flops
    memory_bytes = int(module.memory_bytes())
    memory = memory_bytes / target.memory_bandwidth
    if chip.transposed_bandwidth:  # which is less
        slower = 1 / chip.transposed_bandwidth - 1 / target.memory_bandwidth
        memory += module.transposed_bytes() * max(slower, 0.0)
    traffic = traffic_of(collectives, chip.networks, mesh)
    network = sum(one.seconds or 0.0 for one in traffic)
    parts: dict[str, float] = {"compute": compute, "memory": memory, "network": network}
    operations = module.operations() * chip.operation_seconds
    pages = fresh_bytes / chip.fresh_bandwidth if chip.fresh_bandwidth else 0.0
    bound: Bound = max(BOUNDS, key=parts.__getitem__)
    seconds = parts[bound]
    measured = {**parts, "operations": operations, "pages": pages}
    expected = sum(share * measured[name] for name, share in shares.items()) if shares else None
    return Roofline(
        compute=compute,
        memory=memory,
        memory_bytes=memory_bytes,
        traffic=traffic,
        network=network,
        bound=bound,
        seconds=seconds,
        seconds_without_overlap=sum(measured.values()),
        tokens_per_second=step.work.tokens / seconds,
        utilisation=step.model_flops / target.devices / target.peak_flops / seconds,
        operations=operations,
        pages=pages,
        speeds=speeds,
        assumptions=_assumptions(step, program_flops, speeds, host_bytes, seconds),
        expected=expected,
    )


def recomputes(work: Work) -> bool:
    """Whether the backward pass computes the layers' products again."""
    return work.purpose == "train" and work.execution.get("remat") in ("full", "exchange", "experts")


def token_axes(work: Work) -> tuple[str, ...]:
    """The mesh axes that share the new tokens: behind a cache, `context` shards those of a chunk, and no fewer."""
    return BATCH if work.context and work.tokens_per_row < SHORTEST_CHUNK else (*BATCH, CONTEXT)


def _assumptions(
    step: "Step", program_flops: float | None, speeds: str, host_bytes: int, seconds: float
) -> tuple[str, ...]:
    """What the times rest on, in words."""
    found = ["the shortest time has compute, memory and network overlap, the longest has nothing overlap"]
    if speeds == PUBLISHED:
        found.append("every product, copy and collective runs at the published peak")
    else:
        found.append("products, copies and collectives run at the speeds of large ones")
    if step.config.moe is not None and step.work.execution.get("dispatch") == "dropless":
        found.append("experts have a balanced load: an overflow adds a round to the layer")
    if program_flops is None:
        found.append("FLOPs are the model's: the program has loops or kernels that do not state theirs")
    if host_bytes:
        found.append(
            f"{format_bytes(host_bytes)} are copied from the host's memory and back in no time: within the shortest, "
            f"that takes {format_bytes(round(host_bytes / seconds))}/s each way"
        )
    return tuple(found)


def traffic_of(
    collectives: Sequence[Collective], networks: Sequence[Network], mesh: Mapping[str, int]
) -> tuple[AxisTraffic, ...]:
    """Bytes a step by the axes they are sent along, most first. Collectives of unknown count count once."""
    sent: dict[tuple[str, ...], int] = {}
    times: dict[tuple[str, ...], int] = {}
    for one in collectives:
        count = 1 if one.count is None else one.count
        sent[one.axes] = sent.get(one.axes, 0) + one.bytes * count
        times[one.axes] = times.get(one.axes, 0) + count
    found = []
    for axes, size in sorted(sent.items(), key=lambda item: -item[1]):
        network = network_of(axes, networks, mesh)
        found.append(
            AxisTraffic(
                axes=axes,
                bytes=size,
                bandwidth=network.bandwidth if network else None,
                network=network.name if network else "",
                seconds=size / network.bandwidth + times[axes] * network.latency if network else None,
            )
        )
    return tuple(found)


def network_of(axes: tuple[str, ...], networks: Sequence[Network], mesh: Mapping[str, int]) -> Network | None:
    """The nearest network that joins all devices of a group; devices are numbered along the mesh."""
    numbers = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    group = numbers[tuple(slice(None) if axis in axes or not axes else 0 for axis in mesh)]
    last = int(group.max())
    return next((one for one in networks if one.reach is None or last < one.reach), None)
