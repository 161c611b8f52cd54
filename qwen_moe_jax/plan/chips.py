"""Published numbers of accelerators, for utilisation, memory limits and rooflines."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A network between devices.

    Attributes:
        name: "ICI", "NVLink", …
        bandwidth: bytes a second that one device sends along one mesh axis.
        reach: how many devices it joins; None for all of a slice.
        latency: seconds of a collective of few bytes; 0 where it is not measured.
    """

    name: str
    bandwidth: float
    reach: int | None
    latency: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """An accelerator: one device of JAX.

    Attributes:
        name: for people.
        device_kinds: how jax's `device_kind` begins.
        peak_flops: dense bfloat16 FLOP/s.
        memory_bytes: of its own memory, as far as programs may use it; None where it is not given here.
        memory_bandwidth: bytes a second; None where it is not given here.
        networks: nearest first; what does not fit within one's reach goes over the next.
        operation_seconds: of an operation on few numbers; 0 where it is not measured.
        transposed_bandwidth: bytes a second of copies into another order; None where it is not measured.
        fresh_bandwidth: bytes a second of memory that the system hands out anew; None where it is not measured.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_flops: float
    memory_bytes: int | None = None
    memory_bandwidth: float | None = None
    networks: tuple[Network, ...] = ()
    operation_seconds: float = 0.0
    transposed_bandwidth: float | None = None
    fresh_bandwidth: float | None = None


def _gib(number: float) -> int:
    return int(number * 2**30)


def _ici(bandwidth: float) -> tuple[Network, ...]:
    return (Network(name="ICI", bandwidth=bandwidth, reach=None),)


def _nvlink(bandwidth: float, network_card: float) -> tuple[Network, ...]:
    return (
        Network(name="NVLink", bandwidth=bandwidth, reach=8),
        Network(name="InfiniBand", bandwidth=network_card, reach=None),
    )


# TPUs: https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x: "Peak compute per chip (bf16)", "HBM
# bandwidth per chip", "Bidirectional inter-chip interconnect (ICI) bandwidth per chip". A mesh axis is assumed to be
# along one dimension of the torus, so a device sends on 2 of its 6 links (v4, v5p, tpu7x) or 4 (v5e, v6e) at half of
# their bidirectional bandwidth. Memory is what libtpu 0.0.42.1 says programs may use, when it refuses one.
#
# GPUs: NVIDIA's data sheets of the A100, H100, H200 and (HGX) B200, "BFLOAT16 Tensor Core". From the H100 on they print
# the number with sparsity, which is twice this one. NVLink is half of their bidirectional number; beyond eight GPUs,
# one network card of a DGX A100, H100, H200 or B200 for each GPU: 200, 400, 400 and 400 Gbit/s. Memory and its
# bandwidth are those of XLA's own descriptions (xla/backends/gpu/target_config/specs).
CHIPS = (
    Chip(
        name="TPU v4",
        device_kinds=("TPU v4",),
        peak_flops=275e12,
        memory_bytes=_gib(30.75),
        memory_bandwidth=1228e9,
        networks=_ici(100e9),
    ),
    Chip(
        name="TPU v5e",
        device_kinds=("TPU v5 lite", "TPU v5e"),
        peak_flops=197e12,
        memory_bytes=_gib(15.75),
        memory_bandwidth=819e9,
        networks=_ici(100e9),
    ),
    Chip(
        name="TPU v5p",
        device_kinds=("TPU v5", "TPU v5p"),
        peak_flops=459e12,
        memory_bytes=_gib(95.74),
        memory_bandwidth=2765e9,
        networks=_ici(200e9),
    ),
    Chip(
        name="TPU v6e",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        peak_flops=918e12,
        memory_bytes=_gib(31.25),
        memory_bandwidth=1638e9,
        networks=_ici(200e9),
    ),
    Chip(
        name="TPU7x, half a chip",  # two devices a chip, which share its memory, links and FLOPs
        device_kinds=("TPU7x",),
        peak_flops=2307e12 / 2,
        memory_bytes=_gib(94.75),
        memory_bandwidth=7380e9 / 2,
        networks=_ici(100e9),
    ),
    Chip(
        name="A100",
        device_kinds=("NVIDIA A100",),
        peak_flops=312e12,
        memory_bytes=85_100_068_864,
        memory_bandwidth=2039e9,
        networks=_nvlink(300e9, 25e9),
    ),
    Chip(
        name="H100",
        device_kinds=("NVIDIA H100",),
        peak_flops=989.4e12,
        memory_bytes=84_942_979_072,
        memory_bandwidth=3352e9,
        networks=_nvlink(450e9, 50e9),
    ),
    Chip(name="H100 PCIe", device_kinds=("NVIDIA H100 PCIe",), peak_flops=756e12),
    Chip(name="H100 NVL", device_kinds=("NVIDIA H100 NVL",), peak_flops=835e12),
    Chip(
        name="H200",
        device_kinds=("NVIDIA H200",),
        peak_flops=989.4e12,
        memory_bytes=151_397_597_184,
        memory_bandwidth=4800e9,
        networks=_nvlink(450e9, 50e9),
    ),
    Chip(name="H200 NVL", device_kinds=("NVIDIA H200 NVL",), peak_flops=835e12),
    Chip(
        name="B200",
        device_kinds=("NVIDIA B200",),
        peak_flops=2250e12,
        memory_bytes=191_514_411_008,
        memory_bandwidth=7672e9,
        networks=_nvlink(900e9, 50e9),
    ),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a `device_kind` of JAX, by the longest prefix that matches.

    None for a CPU or an unknown one.
    """
    fits = [(len(kind), chip) for chip in CHIPS for kind in chip.device_kinds if device_kind.startswith(kind)]
    return max(fits, key=lambda fit: fit[0])[1] if fits else None


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device of this kind; None for a CPU or an unknown one."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.peak_flops
