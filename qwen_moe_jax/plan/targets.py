"""Compilation targets: how a command line names hardware, and its compile-only devices.

`parse_target` parses the name and imports nothing. `TargetRequest.devices` makes the devices in this process, which
must not have used JAX before: it sets the environment that JAX, libtpu and XLA read when they start.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import TYPE_CHECKING, Any, Literal

from qwen_moe_jax.errors import ConfigError

if TYPE_CHECKING:
    import jax

#: Generation → the dimensions of its torus.
_TPUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
#: A chip of v4 is one device to JAX, and two to libtpu without this option.
_LIBTPU_OPTIONS = {"v4": {"chip_config_name": "megacore"}}

_EXAMPLES = "cpu:8, tpu:v5p:4x8x8 (v4, v5e, v5p, v6e, tpu7x) or gpu:h200:8 (a100, h100, h200, b200)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Gpu:
    """A GPU's description for XLA, under XLA's names (stream_executor/device_description.proto).

    The numbers are those of XLA's descriptions, xla/backends/gpu/target_config/specs.
    """

    name: str
    capability: str
    core_count: int
    fpus_per_core: int
    clock_rate_ghz: float
    memory_size: int
    memory_bandwidth: int
    l2_cache_size: int
    shared_memory_optin: int
    shared_memory_per_core: int

    def to_proto_text(self) -> str:
        """The description as text for XLA's CUDA compiler; versions are those of CUDA 13."""
        return f"""
gpu_device_info {{
  cuda_compute_capability {{ {self.capability} }}
  core_count: {self.core_count}
  fpus_per_core: {self.fpus_per_core}
  clock_rate_ghz: {self.clock_rate_ghz}
  device_memory_size: {self.memory_size}
  memory_bandwidth: {self.memory_bandwidth}
  l2_cache_size: {self.l2_cache_size}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {self.shared_memory_optin}
  shared_memory_per_core: {self.shared_memory_per_core}
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
device_description_str: "{self.name}"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 13 }}
"""


_HOPPER: dict[str, Any] = dict(
    capability="major: 9",
    core_count=132,
    fpus_per_core=128,
    clock_rate_ghz=1.98,
    l2_cache_size=52428800,
    shared_memory_optin=232448,
    shared_memory_per_core=233472,
)
_GPUS = {
    "a100": _Gpu(
        name="NVIDIA A100-SXM4-80GB",
        capability="major: 8",
        core_count=108,
        fpus_per_core=64,
        clock_rate_ghz=1.41,
        memory_size=85100068864,
        memory_bandwidth=2039040000000,
        l2_cache_size=41943040,
        shared_memory_optin=166912,
        shared_memory_per_core=167936,
    ),
    "h100": _Gpu(name="NVIDIA H100 80GB HBM3", memory_size=84942979072, memory_bandwidth=3352320000000, **_HOPPER),
    "h200": _Gpu(name="NVIDIA H200", memory_size=151397597184, memory_bandwidth=4800000000000, **_HOPPER),
    "b200": _Gpu(
        name="NVIDIA B200",
        capability="major: 10",
        core_count=148,
        fpus_per_core=128,
        clock_rate_ghz=1.965,
        memory_size=191514411008,
        memory_bandwidth=7672320000000,
        l2_cache_size=132644864,
        shared_memory_optin=232448,
        shared_memory_per_core=233472,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetRequest:
    """A parsed target.

    Attributes:
        name: as it was written.
        platform: of the compiler.
        chip: generation of the TPU, kind of the GPU; "cpu" for simulated devices.
        shape: of a TPU slice, in chips; of the others, how many there are.
    """

    name: str
    platform: Literal["cpu", "tpu", "gpu"]
    chip: str
    shape: tuple[int, ...]

    def devices(self) -> list["jax.Device"]:
        """The devices to compile for, in order. Nothing runs on those of TPUs and GPUs.

        Raises:
            ConfigError: the compiler for them is not installed, or does not take this slice.
            ShardingError: JAX was used before in this process, with fewer devices (simulated ones only).
        """
        _prepare_process()
        if self.platform == "cpu":
            return _simulated(self.shape[0])
        return _tpus(self) if self.platform == "tpu" else _gpus(self)


def parse_target(text: str) -> TargetRequest:
    """Parses `cpu:8`, `tpu:v5p:4x8x8` or `gpu:h200:8`.

    Raises:
        ConfigError: it is none of these.
    """
    platform, *words = text.lower().split(":")
    if platform == "cpu" and len(words) == 1 and _is_count(words[0]):
        return TargetRequest(name=text, platform="cpu", chip="cpu", shape=(int(words[0]),))
    if platform == "gpu" and len(words) == 2 and words[0] in _GPUS and _is_count(words[1]):
        return TargetRequest(name=text, platform="gpu", chip=words[0], shape=(int(words[1]),))
    if platform == "tpu" and len(words) == 2 and words[0] in _TPUS and re.fullmatch(r"\d+(x\d+)*", words[1]):
        shape = tuple(map(int, words[1].split("x")))
        dimensions = _TPUS[words[0]]
        if len(shape) != dimensions or math.prod(shape) == 0:
            example = "x".join(["4"] * dimensions)
            raise ConfigError(
                f"target {text}: found a slice of {words[1]}, expected {dimensions} dimensions for {words[0]}, as in "
                f"tpu:{words[0]}:{example}."
            )
        return TargetRequest(name=text, platform="tpu", chip=words[0], shape=shape)
    raise ConfigError(f"target: found {text!r}, expected one like {_EXAMPLES}.")


def _is_count(word: str) -> bool:
    return word.isascii() and word.isdigit() and int(word) > 0


def _prepare_process() -> None:
    """Sets what JAX, libtpu and XLA read when they start. In a process that uses them already, nothing changes."""
    import jax

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no query of a cloud's metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile at once
    # Without these, libtpu warns that they are missing; their values have no effect on what it compiles.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        jax.config.update("jax_platforms", "cpu")  # an accelerator of this machine is not used
    except RuntimeError:
        pass


def _simulated(count: int) -> list["jax.Device"]:
    import jax

    from qwen_moe_jax.sharding.mesh import simulate_devices

    simulate_devices(count)
    return jax.devices("cpu")[:count]


def _tpus(request: TargetRequest) -> list["jax.Device"]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"target {request.name}: the compiler for TPUs is not installed. pip install 'qwen-moe-jax[plan]' brings "
            "it (libtpu); no TPU is needed."
        )
    from jax.experimental import topologies

    shape = "x".join(map(str, request.shape))
    try:
        topology = topologies.get_topology_desc(
            f"{request.chip}:{shape}", "tpu", **_LIBTPU_OPTIONS.get(request.chip, {})
        )
    except Exception as error:  # libtpu raises several kinds of exceptions, none of them its own
        raise ConfigError(
            f"target {request.name}: libtpu does not know this slice ({_first_line(error)}). Expected the shape of an "
            "existing slice; those of v4 and v5p consist of 4x4x4 cubes or are parts of one."
        ) from None
    return list(topology.devices)


def _gpus(request: TargetRequest) -> list["jax.Device"]:
    from jax.experimental import topologies

    # Nodes of eight, joined within by NVLink.
    count = request.shape[0]
    shape = f"1x{count // 8}x8" if count % 8 == 0 else f"1x1x{count}"
    try:
        topology = topologies.get_topology_desc(
            shape, "cuda", topology=shape, target_config=_GPUS[request.chip].to_proto_text()
        )
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(
            f"target {request.name}: the compiler for NVIDIA GPUs is not installed ({_first_line(error)}). pip install "
            "'qwen-moe-jax[plan-gpu]' brings it; no GPU is needed."
        ) from None
    return list(topology.devices)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
