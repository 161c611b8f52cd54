"""How many slots an engine is given in the memory there is."""

from pathlib import Path

from jax.sharding import Mesh

from qwen_moe_jax.inference.memory import loaded, slots_that_fit
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.sharding.distributed import broadcast
from qwen_moe_jax.sharding.rules import batch_shards

#: The part of a device's free memory that an engine may take.
SHARE = 0.8
#: The most slots that are chosen: more are worth their memory only where the devices are fast enough for them.
MOST_SLOTS = {"cpu": 32}
MOST_SLOTS_ELSEWHERE = 128


def choose_slots(model: CausalLM, max_length: int, cache_tokens: int | None = None) -> int:
    """As many slots as fit into `SHARE` of the memory that the loaded model leaves free, up to `MOST_SLOTS`.

    Its adapters are loaded, too.

    The same in all processes.

    Raises:
        RequestError: not even one for each of the devices that share the batch fits.
    """
    mesh, options = model.mesh, {} if cache_tokens is None else {"cache_tokens": cache_tokens}
    most = MOST_SLOTS.get(mesh.devices.flat[0].platform, MOST_SLOTS_ELSEWHERE)
    most = max(1, most // batch_shards(mesh)) * batch_shards(mesh)
    free = int(broadcast(str(free_bytes(mesh) or 0)))
    if not free:
        return most
    there = sum(size for _, size in loaded(model))
    return min(most, slots_that_fit(model, max_length, there + int(free * SHARE), **options))


def free_bytes(mesh: Mesh) -> int | None:
    """Of the fullest device of this process; None where devices do not say. CPUs share the computer's memory."""
    devices = list(mesh.local_devices)
    if devices[0].platform == "cpu":
        path = Path("/proc/meminfo")
        lines = path.read_text().splitlines() if path.exists() else []
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        return found[0] // len(devices) if found else None
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in one for one in stats):
        return None
    return min(one["bytes_limit"] - one.get("bytes_in_use", 0) for one in stats)
