"""Speeds of devices that are present, measured in seconds, in place of a chip's published numbers.

All devices work at once, as in a training step; simulated ones share the processor, so each has its share of it.
"""

import dataclasses
import json
import math
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
#: Sizes of what is measured on a CPU and on an accelerator: a matrix's side, numbers of an array that is read and
#: written, and of one that is sent.
_SIZES = {"cpu": (384, 2**22, 2**19), "": (4096, 2**27, 2**23)}
#: Matrices of a few experts.
_TRANSPOSED = (16, 256, 256)
#: Numbers of an array for which a CPU's C library asks the system, and which it gives back (`cpu_run_time.ASKED`).
_FRESH = 2**23
#: Of the time of a step, in the order of `Roofline.parts`.
PARTS = ("compute", "memory", "network", "operations", "pages")
#: Weight of a share of 1 among the measured steps: that of one of them. A few steps do not tell five parts from others.
_PRIOR = 1.0
#: Part of a step that any part is taken to be at least, so that one of nothing has a share.
_LEAST = 0.01
#: Runs of which the fastest counts; small collectives, and steps of a loop, in one run.
_RUNS, _SMALL, _OPERATIONS = 5, 50, 200
#: Products, and passes over an array, in one run.
_REPEATS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured speeds of one of several devices that work at once.

    Attributes:
        date: local time of the measurement.
        platform, device_kind: as JAX has them.
        devices: how many worked at once.
        flops: FLOP/s of matrix products, by dtype.
        memory_bandwidth: bytes a second, read and written in place.
        transposed_bandwidth: bytes a second, read and written by copies into another order.
        fresh_bandwidth: bytes a second of memory that the system hands out anew; None of devices with their own memory.
        network_bandwidth: bytes a second that a device sends in collectives over all devices; 0 with one device.
        collective_seconds: of a collective of one number; 0 with one device.
        operation_seconds: of an operation on few numbers.
        memory_bytes: of one device; of simulated ones, its share of the machine's memory. None where not known.
        versions: of jax and jaxlib.
        shares: of `PARTS`, how much of its time each took in steps that were measured (`fit_shares`); empty without.
    """

    date: str
    platform: str
    device_kind: str
    devices: int
    flops: dict[str, float]
    memory_bandwidth: float
    transposed_bandwidth: float
    fresh_bandwidth: float | None
    network_bandwidth: float
    collective_seconds: float
    operation_seconds: float
    memory_bytes: int | None
    versions: dict[str, str]
    shares: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The measurement in words."""
        kind = "simulated CPU" if self.platform == "cpu" else self.device_kind
        return f"{self.devices} × {kind} on {self.date}"

    @property
    def speeds(self) -> str:
        """`Roofline.speeds` of plans by it."""
        return f"speeds measured on {self.name}"

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
            transposed_bandwidth=self.transposed_bandwidth,
            fresh_bandwidth=self.fresh_bandwidth,
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


def measure(devices: Sequence[jax.Device], clock: Callable[[], float] = time.perf_counter) -> Calibration:
    """Measures devices that work at once, in a few seconds of a clock."""
    bench = _Bench(mesh=Mesh(np.array(devices), ("all",), axis_types=(AxisType.Auto,)), clock=clock)
    platform = devices[0].platform
    side, numbers, sent = _SIZES.get(platform, _SIZES[""])
    many = len(devices) > 1
    return Calibration(
        date=time.strftime("%Y-%m-%d %H:%M"),
        platform=platform,
        device_kind=devices[0].device_kind,
        devices=len(devices),
        flops={dtype: _flops(bench, side, dtype) for dtype in DTYPES},
        memory_bandwidth=_memory_bandwidth(bench, numbers),
        transposed_bandwidth=_transposed_bandwidth(bench),
        fresh_bandwidth=_fresh_bandwidth(bench) if platform == "cpu" else None,
        network_bandwidth=_network_bandwidth(bench, sent) if many else 0.0,
        collective_seconds=_collective_seconds(bench) if many else 0.0,
        operation_seconds=_operation_seconds(bench),
        memory_bytes=_memory_bytes(devices),
        versions={"jax": jax.__version__, "jaxlib": jax.lib.__version__},
    )


def _memory_bytes(devices: Sequence[jax.Device]) -> int | None:
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    stats = devices[0].memory_stats() or {}
    return stats.get("bytes_limit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bench:
    """All devices, each of which runs a function of an array of its own; and a clock."""

    mesh: Mesh
    clock: Callable[[], float]

    def seconds(self, function: Callable[[jax.Array], Any], shape: tuple[int, ...], dtype: str = "float32") -> float:
        """The fastest run of the function, of an array of this shape."""
        everywhere = NamedSharding(self.mesh, P("all"))
        x = jax.device_put(np.ones((self.mesh.size, *shape), np.float32), everywhere).astype(dtype)
        local = jax.shard_map(
            lambda x: function(x[0])[None], mesh=self.mesh, in_specs=P("all"), out_specs=P("all"), check_vma=False
        )
        compiled = jax.jit(local).lower(x).compile()
        jax.block_until_ready(compiled(x))
        times = []
        for _ in range(_RUNS):
            began = self.clock()
            jax.block_until_ready(compiled(x))
            times.append(self.clock() - began)
        return min(times)


def _flops(bench: _Bench, side: int, dtype: str) -> float:
    def products(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _REPEATS, lambda _, y: (x @ y / side).astype(x.dtype), x)

    return _REPEATS * 2 * side**3 / bench.seconds(products, (side, side), dtype)


def _memory_bandwidth(bench: _Bench, numbers: int) -> float:
    """Of a loop that reads an array and writes it in place. The rest of the run, without the loop, is taken off."""

    def passes(x: jax.Array, times: int) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, y: jax.lax.optimization_barrier(y * 0.5 + 1), x)

    few, many = (bench.seconds(partial(passes, times=times), (numbers,)) for times in (2, 2 + _REPEATS))
    return _REPEATS * 2 * 4 * numbers / max(many - few, many / 10)


def _transposed_bandwidth(bench: _Bench) -> float:
    """Of copies of some matrices between two orders, which share no axis whose numbers are next to each other."""

    def copies(x: jax.Array, times: int) -> jax.Array:
        def there_and_back(_: int, y: jax.Array) -> jax.Array:
            turned = jax.lax.optimization_barrier(jnp.transpose(y, (2, 0, 1)))
            return jax.lax.optimization_barrier(jnp.transpose(turned, (1, 2, 0)))

        return jax.lax.fori_loop(0, times, there_and_back, x)

    few, many = (bench.seconds(partial(copies, times=times), _TRANSPOSED) for times in (1, 1 + _REPEATS // 2))
    return _REPEATS * 2 * 4 * math.prod(_TRANSPOSED) / max(many - few, many / 10)


def _fresh_bandwidth(bench: _Bench) -> float:
    """Of an array that is filled."""
    return 4 * _FRESH / bench.seconds(lambda x: jnp.broadcast_to(x, (_FRESH,)), (1,))


def _network_bandwidth(bench: _Bench, numbers: int) -> float:
    """Of the three collectives of a training step, all of whose devices send at once."""
    ways = bench.mesh.size
    numbers -= numbers % ways
    gather = bench.seconds(partial(jax.lax.all_gather, axis_name="all"), (numbers // ways,))
    scatter = bench.seconds(lambda x: jax.lax.psum_scatter(x, "all", tiled=True), (numbers,))
    exchange = bench.seconds(lambda x: jax.lax.all_to_all(x, "all", 0, 0, tiled=True), (numbers,))
    return 3 * 4 * numbers * (ways - 1) / ways / (gather + scatter + exchange)


def _collective_seconds(bench: _Bench) -> float:
    def sums(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _SMALL, lambda _, y: jax.lax.pmean(y + 1, "all"), x)

    return bench.seconds(sums, (1,)) / _SMALL


def _operation_seconds(bench: _Bench) -> float:
    """Of a small product, which no compiler fuses with the next."""

    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _OPERATIONS, lambda _, y: jnp.sort(y[::-1]), x)

    return bench.seconds(loop, (8,)) / _OPERATIONS


def fit_shares(parts: Sequence[Sequence[float]], seconds: Sequence[float]) -> dict[str, float]:
    """How much of each part's time steps take, none of it negative, by least squares of their relative errors.

    Args:
        parts: of each measured step, `Roofline.parts`.
        seconds: that it took.
    """
    rows = np.asarray(parts, float) / np.asarray(seconds, float)[:, None]
    # A share is pulled to 1 by as much as its part is of the time, so that parts of nothing stay there.
    pull = _PRIOR * np.diag(np.mean(rows, axis=0) + _LEAST)
    left, right = np.concatenate([rows, pull]), np.concatenate([np.ones(len(rows)), np.diag(pull)])
    shares = np.ones(len(PARTS))
    for _ in range(2000):  # one share after the other, which converges for so few
        for part in range(len(PARTS)):
            others = right - left @ shares + left[:, part] * shares[part]
            shares[part] = max(0.0, left[:, part] @ others / (left[:, part] @ left[:, part]))
    return dict(zip(PARTS, shares.tolist(), strict=True))


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
