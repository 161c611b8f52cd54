"""How many slots an engine's cache may have in the memory there is."""

import dataclasses
import math
from pathlib import Path

import jax
from jax.sharding import Mesh

from qwen_moe_jax.inference.programs import PREFILL_BUCKETS
from qwen_moe_jax.model.cache import abstract_cache
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.sharding.distributed import broadcast
from qwen_moe_jax.sharding.rules import BATCH
from qwen_moe_jax.units import format_bytes

#: The part of the free memory that the cache may take; the rest is for activations and logits.
SHARE = 0.6
#: The most slots that are chosen: more are worth their memory only where the devices are fast enough for them.
MOST_SLOTS = {"cpu": 32}
MOST_SLOTS_ELSEWHERE = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotPlan:
    """Slots, and the arithmetic behind their number.

    Attributes:
        slots: requests at once.
        max_length: tokens of a request.
        slot_bytes: of the cache of one slot, on all devices together.
        free_bytes: of all devices, with the weights in place; None where they do not say.
    """

    slots: int
    max_length: int
    slot_bytes: int
    free_bytes: int | None

    def __str__(self) -> str:
        """`32 of up to 8192 tokens: 32 × 402.65 MB of cache = 12.88 GB, of 61.06 GB free`."""
        whole = (
            f"{self.slots} × {format_bytes(self.slot_bytes)} of cache = {format_bytes(self.slots * self.slot_bytes)}"
        )
        free = "" if self.free_bytes is None else f", of {format_bytes(self.free_bytes)} free"
        return f"{self.slots} of up to {self.max_length} tokens: {whole}{free}"


def plan_slots(model: CausalLM, max_length: int, slots: int | None = None) -> SlotPlan:
    """The slots that were asked for; or as many as fit into `SHARE` of the free memory, up to `MOST_SLOTS`.

    The same in all processes. At least one for each of the devices that share the batch, whether it fits or not.
    """
    mesh = model.mesh
    shards = math.prod(mesh.shape[axis] for axis in BATCH)
    cache = abstract_cache(
        model.config,
        mesh,
        batch=shards,
        max_length=max_length,
        max_write=PREFILL_BUCKETS[-1],
        dtype=model.execution.dtype,
    )
    slot_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache)) // shards
    free_bytes = int(broadcast(str(_free_bytes(mesh) or 0))) or None
    if slots is None:
        most = MOST_SLOTS.get(mesh.devices.flat[0].platform, MOST_SLOTS_ELSEWHERE)
        fitting = most if free_bytes is None else int(free_bytes * SHARE) // slot_bytes
        slots = max(shards, min(most, fitting) // shards * shards)
    return SlotPlan(slots=slots, max_length=max_length, slot_bytes=slot_bytes, free_bytes=free_bytes)


def _free_bytes(mesh: Mesh) -> int | None:
    """Of all devices of the mesh, as far as this process sees, each as free as its own."""
    devices = list(mesh.local_devices)
    if devices[0].platform == "cpu":
        path = Path("/proc/meminfo")
        lines = path.read_text().splitlines() if path.exists() else []
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        processes = mesh.devices.size // len(devices)
        return found[0] * processes if found else None
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in one for one in stats):
        return None
    free = sum(one["bytes_limit"] - one.get("bytes_in_use", 0) for one in stats)
    return free * mesh.devices.size // len(devices)
