"""FP4: MXFP4 (a power of two for 32 values) and NVFP4 (a float8 scale for 16 values, and a number for the matrix).

MXFP4 is exact in the bfloat16 that it is read in. Of NVFP4, ModelOpt's files multiply by `weight_scale_2`, and the
scales and values are float32; those of compressed-tensors divide by `weight_global_scale` and round to bfloat16.
"""

from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.huggingface.fields import shown
from qwen_moe_jax.huggingface.quantised.dequantise import ScaledCodes, ScaledScales
from qwen_moe_jax.huggingface.quantised.fp8 import simple_opener
from qwen_moe_jax.huggingface.quantised.modules import (
    Opener,
    ProblemError,
    open_modules,
    require,
    require_dtype,
    require_shape,
    unsupported,
)
from qwen_moe_jax.huggingface.quantised.packing import Exponents, Fp4Codes
from qwen_moe_jax.storage.tensor import StoredTensor

_MX, _NV = 32, 16
#: The largest distance of two neighbouring FP4 numbers: 4 and 6.
_STEP = 2.0
_BLOCKS, _SCALES = "_blocks", "_scales"


def mxfp4_opener(config: Mapping[str, Any], where: str) -> Opener:
    """Of `quant_method="mxfp4"`: `X_blocks` [..., in / 32, 16] and `X_scales` [..., in / 32]."""
    return _mxfp4


def _mxfp4(tensors: dict[str, StoredTensor]) -> tuple[dict[str, StoredTensor], list[str]]:
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for name, tensor in tensors.items():
        own = name.removesuffix(_BLOCKS)
        if name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS in tensors:
            continue
        if own == name:
            found[name] = tensor
            continue
        scales = tensors.get(own + _SCALES)
        if scales is None or scales.shape != tensor.shape[:-1] or tensor.shape[-1:] != (_MX // 2,):
            has = "missing" if scales is None else str(list(scales.shape))
            problems.append(
                f"mxfp4: {name} is {list(tensor.shape)} in {tensor.source} and {own + _SCALES} is {has}, expected "
                f"[..., in / {_MX}, {_MX // 2}] and [..., in / {_MX}]"
            )
        elif (tensor.dtype, scales.dtype) != ("uint8", "uint8"):
            problems.append(f"mxfp4: {name} and {own + _SCALES} in {tensor.source} are not both uint8")
        else:
            shape = (*tensor.shape[:-2], tensor.shape[-2] * _MX)
            found[own] = mxfp4_weight(Fp4Codes(tensor, shape), scales)
    return found, problems


def mxfp4_weight(codes: Fp4Codes, scales: StoredTensor) -> ScaledCodes:
    """FP4 numbers and the exponents of their groups; exact in bfloat16."""
    return ScaledCodes(codes, Exponents(scales), (1, _MX), "bfloat16", "mxfp4", 4, step=_STEP)


def nvfp4_weight(
    codes: Fp4Codes, scales: StoredTensor, factor: StoredTensor, *, divide: bool, dtype: str
) -> ScaledCodes:
    """FP4 numbers, the scales of their groups and the number that those are multiplied with, or divided by."""
    return ScaledCodes(codes, ScaledScales(scales, factor, divide), (1, _NV), dtype, "nvfp4", 4, step=_STEP)


def modelopt_opener(config: Mapping[str, Any], where: str) -> Opener:
    """Of `quant_method="modelopt"`: NVFP4 or FP8.

    Raises:
        ConfigError: another `quant_algo`.
    """
    inner = config.get("quantization")
    algorithm = config.get("quant_algo") or (inner.get("quant_algo") if isinstance(inner, Mapping) else None)
    if algorithm == "FP8":
        return simple_opener("modelopt")
    if algorithm not in ("NVFP4", "NVFP4_AWQ"):
        raise unsupported(where, "modelopt", "quant_algo", shown(algorithm), "'NVFP4' or 'FP8'")
    if algorithm == "NVFP4_AWQ":
        raise unsupported(where, "modelopt", "quant_algo", "'NVFP4_AWQ' (inputs have a scale)", "'NVFP4' or 'FP8'")
    return lambda tensors: open_modules(
        tensors,
        _packed_module,
        ("weight", "weight_scale", "weight_scale_2"),
        _modelopt_weight,
        unused=(".input_scale", ".k_scale", ".v_scale"),
    )


def _packed_module(name: str, tensor: StoredTensor) -> str | None:
    is_packed = name.endswith(".weight") and tensor.dtype == "uint8"
    return name.removesuffix(".weight") if is_packed else None


def _modelopt_weight(module: str, own: Mapping[str, StoredTensor]) -> StoredTensor:
    require("modelopt", module, own, "weight", "weight_scale", "weight_scale_2")
    codes = fp4_codes("modelopt", module, own["weight"], own["weight_scale"], _NV)
    require_shape("modelopt", f"{module}.weight_scale_2", own["weight_scale_2"], (), (1,))
    require_dtype("modelopt", f"{module}.weight_scale", own["weight_scale"], "float8_e4m3fn")
    return nvfp4_weight(codes, own["weight_scale"], own["weight_scale_2"], divide=False, dtype="float32")


def fp4_codes(method: str, module: str, packed: StoredTensor, scale: StoredTensor, group: int) -> Fp4Codes:
    """The FP4 numbers of a matrix, checked against the shape of its scales."""
    if len(packed.shape) != 2 or packed.shape[1] * 2 % group:
        raise ProblemError(
            f"{method}: the packed weight of {module} is {list(packed.shape)} in {packed.source}, expected a matrix "
            f"with a multiple of {group // 2} columns"
        )
    rows, columns = packed.shape[0], packed.shape[1] * 2
    require_dtype(method, f"the packed weight of {module}", packed, "uint8")
    require_shape(method, f"{module}.weight_scale", scale, (rows, columns // group))
    return Fp4Codes(packed, (rows, columns))
