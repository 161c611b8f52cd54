"""Speeds of devices that are present, measured in seconds, in place of a chip's published numbers.

All devices work at once, as in a training step; simulated ones share the processor, so each has its share of it.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.plan.chips import Chip, Network, chip_of
from qwen_moe_jax.plan.targets import TargetRequest
from qwen_moe_jax.whole_file import write_whole

#: Dtypes whose matrix products are measured.
DTYPES = ("float32", "bfloat16")
#: Sizes of what is measured on a CPU and on an accelerator: a matrix's side, numbers of an array that is copied, and of
#: one that is sent.
_SIZES = {"cpu": (384, 2**22, 2**19), "": (4096, 2**27, 2**23)}
#: Runs of which the fastest counts; small collectives, and steps of a loop, in one run.
_RUNS, _SMALL, _OPERATIONS = 5, 50, 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured speeds of one of several devices that work at once.

    Attributes:
        date: local time of the measurement.
        platform, device_kind: as JAX has them.
        devices: how many worked at once.
        flops: FLOP/s of matrix products, by dtype.
        memory_bandwidth: bytes a second, read and written.
        network_bandwidth: bytes a second that a device sends in collectives over all devices; 0 with one device.
        collective_seconds: of a collective of one number; 0 with one device.
        operation_seconds: of an operation on few numbers.
        memory_bytes: of one device; of simulated ones, its share of the machine's memory. None where not known.
        versions: of jax and jaxlib.
    """

    date: str
    platform: str
    device_kind: str
    devices: int
    flops: dict[str, float]
    memory_bandwidth: float
    network_bandwidth: float
    collective_seconds: float
    operation_seconds: float
    memory_bytes: int | None
    versions: dict[str, str]

    @property
    def name(self) -> str:
        """The measurement in words."""
        kind = "simulated CPU" if self.platform == "cpu" else self.device_kind
        return f"{self.devices} × {kind} on {self.date}"

    def chip(self, dtype: str) -> Chip:
        """The measured device as a chip, for products in `dtype`.

        Raises:
            ConfigError: they were not measured in that dtype.
        """
        if dtype not in self.flops:
            known = ", ".join(self.flops)
            raise ConfigError(f"calibration: found products in {known}, expected {dtype}: measure again (--calibrate).")
        network = Network(
            name="measured", bandwidth=self.network_bandwidth, reach=None, latency=self.collective_seconds
        )
        return Chip(
            name="simulated CPU" if self.platform == "cpu" else self.device_kind,
            device_kinds=(self.device_kind,),
            peak_flops=self.flops[dtype],
            memory_bytes=self.memory_bytes,
            memory_bandwidth=self.memory_bandwidth,
            networks=(network,) if self.network_bandwidth else (),
            operation_seconds=self.operation_seconds,
        )

    def check_target(self, request: TargetRequest, count: int) -> None:
        """Refuses a target of other devices.

        Raises:
            ConfigError: the platform, or the number of simulated devices, is another.
        """
        simulated = request.platform == "cpu"
        if self.platform != request.platform or (simulated and self.devices != count):
            raise ConfigError(
                f"calibration: found one of {self.name}, expected one of {request.name}: measure that with --calibrate."
            )

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        write_whole(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Reads what `save` wrote.

        Raises:
            ConfigError: the file is missing, or not of this form.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"calibration {path}: cannot be read ({error.strerror}).") from None
        except (ValueError, TypeError) as error:
            expected = "expected a JSON file that --calibrate wrote with this version: measure again"
            raise ConfigError(f"calibration {path}: {error}; {expected}.") from None


def present_devices(request: TargetRequest) -> list[jax.Device]:
    """The devices of a target that this machine has.

    Raises:
        ConfigError: it has others.
    """
    if request.platform == "cpu":
        return request.devices()
    devices = jax.devices()
    here, asked = chip_of(devices[0].device_kind), request.chip.lower()
    if devices[0].platform != request.platform or here is None or asked not in here.name.lower().replace(" ", ""):
        raise ConfigError(
            f"--calibrate: found {len(devices)} × {devices[0].device_kind}, expected devices of {request.name}. A "
            "measurement needs the devices themselves; cpu:8 measures this machine's processor."
        )
    return devices


def measure(devices: Sequence[jax.Device]) -> Calibration:
    """Measures devices that work at once, in a few seconds."""
    mesh = Mesh(np.array(devices), ("all",), axis_types=(AxisType.Auto,))
    platform = devices[0].platform
    side, copied, sent = _SIZES.get(platform, _SIZES[""])
    many = len(devices) > 1
    return Calibration(
        date=time.strftime("%Y-%m-%d %H:%M"),
        platform=platform,
        device_kind=devices[0].device_kind,
        devices=len(devices),
        flops={dtype: _flops(mesh, side, dtype) for dtype in DTYPES},
        memory_bandwidth=_memory_bandwidth(mesh, copied),
        network_bandwidth=_network_bandwidth(mesh, sent) if many else 0.0,
        collective_seconds=_collective_seconds(mesh) if many else 0.0,
        operation_seconds=_operation_seconds(mesh),
        memory_bytes=_memory_bytes(devices),
        versions={"jax": jax.__version__, "jaxlib": jax.lib.__version__},
    )


def _memory_bytes(devices: Sequence[jax.Device]) -> int | None:
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    stats = devices[0].memory_stats() or {}
    return stats.get("bytes_limit")


def _seconds(mesh: Mesh, function: Callable[[jax.Array], Any], shape: tuple[int, ...], dtype: str = "float32") -> float:
    """The fastest run of a function of one array on all devices, each with its own of this shape."""
    sharding = NamedSharding(mesh, P("all"))
    x = jax.device_put(np.ones((mesh.size, *shape), np.float32), sharding).astype(dtype)
    local = jax.shard_map(
        lambda x: function(x[0])[None], mesh=mesh, in_specs=P("all"), out_specs=P("all"), check_vma=False
    )
    compiled = jax.jit(local).lower(x).compile()
    jax.block_until_ready(compiled(x))
    times = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        jax.block_until_ready(compiled(x))
        times.append(time.perf_counter() - began)
    return min(times)


def _flops(mesh: Mesh, side: int, dtype: str) -> float:
    repeats = 8

    def products(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, repeats, lambda _, y: (x @ y / side).astype(x.dtype), x)

    return repeats * 2 * side**3 / _seconds(mesh, products, (side, side), dtype)


def _memory_bandwidth(mesh: Mesh, numbers: int) -> float:
    """Of a sum of two arrays: two are read, one is written."""
    seconds = _seconds(mesh, lambda x: x[0] + x[1], (2, numbers))
    return 3 * 4 * numbers / seconds


def _network_bandwidth(mesh: Mesh, numbers: int) -> float:
    """Of the three collectives of a training step, all of whose devices send at once."""
    ways = mesh.size
    numbers -= numbers % ways
    gather = _seconds(mesh, partial(jax.lax.all_gather, axis_name="all"), (numbers // ways,))
    scatter = _seconds(mesh, lambda x: jax.lax.psum_scatter(x, "all", tiled=True), (numbers,))
    exchange = _seconds(mesh, lambda x: jax.lax.all_to_all(x, "all", 0, 0, tiled=True), (numbers,))
    return 3 * 4 * numbers * (ways - 1) / ways / (gather + scatter + exchange)


def _collective_seconds(mesh: Mesh) -> float:
    def sums(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _SMALL, lambda _, y: jax.lax.pmean(y + 1, "all"), x)

    return _seconds(mesh, sums, (1,)) / _SMALL


def _operation_seconds(mesh: Mesh) -> float:
    """Of a small product, which no compiler fuses with the next."""

    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _OPERATIONS, lambda _, y: jnp.sort(y[::-1]), x)

    return _seconds(mesh, loop, (8,)) / _OPERATIONS


def calibration_for(request: TargetRequest, *, measure_to: str | None, read_from: str | None) -> Calibration | None:
    """The speeds that a command asks for: measured now and written to a file, or read from one; None without a file.

    Raises:
        ConfigError: both were asked for; the devices are not here; the file cannot be written or read.
    """
    if measure_to and read_from:
        raise ConfigError(
            "--calibrate and --calibration: found both, expected one. The first measures, the second reads."
        )
    if read_from:
        return Calibration.load(Path(read_from))
    if not measure_to:
        return None
    path = Path(measure_to)
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent} to write into.")
    measured = measure(present_devices(request))
    try:
        measured.save(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}).") from None
    return measured
