"""FP8: float8 matrices with one scale per block (Qwen's, DeepSeek's), per row (fbgemm_fp8) or per matrix (ModelOpt).

As Fp8Dequantize of transformers: multiplied in float32, then rounded to the parameter's dtype, once.
"""

from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.fields import shown
from qwen_moe_jax.huggingface.quantised.dequantise import FLOAT8, ScaledCodes
from qwen_moe_jax.huggingface.quantised.modules import Opener, open_modules, require, require_dtype, require_shape
from qwen_moe_jax.rounding import ceil_div
from qwen_moe_jax.storage.tensor import CastTensor, StoredTensor

SCALE = "_scale_inv"
#: Dtypes of scales. uint8 is refused: other formats use it for exponents.
_SCALES = ("float32", "bfloat16", "float16", "float8_e8m0fnu")


def blocks_opener(config: Mapping[str, Any], where: str) -> Opener:
    """Of `quant_method="fp8"`: a scale for each block of rows and columns."""
    block = config.get("weight_block_size")
    sizes = isinstance(block, list | tuple) and all(type(size) is int and 0 < size < 2**31 for size in block)
    if not sizes or len(block) != 2:
        raise ConfigError(
            f"{where}: quantization_config: weight_block_size={shown(block)} is not supported: expected two positive "
            "integers, as in the Qwen3 FP8 checkpoints. Take the unquantised checkpoint of the same model."
        )
    size = (block[0], block[1])
    return lambda tensors: _blocks(tensors, size)


def _blocks(tensors: dict[str, StoredTensor], block: tuple[int, int]) -> tuple[dict[str, StoredTensor], list[str]]:
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for name, tensor in tensors.items():
        scaled = tensors.get(name.removesuffix(SCALE))
        if name.endswith(SCALE) and scaled is not None and scaled.dtype in FLOAT8:
            continue
        if tensor.dtype not in FLOAT8:
            found[name] = tensor
            continue
        scale = tensors.get(name + SCALE)
        grid = [ceil_div(size, part) for size, part in zip(tensor.shape, block, strict=False)]
        # Where something is wrong, it is reported once below, and this tensor is never read.
        found[name] = CastTensor(tensor, "float32")
        if len(tensor.shape) != 2 or scale is None or list(scale.shape) != grid:
            has = "no" if scale is None else f"{list(scale.shape)} for its"
            problems.append(
                f"fp8: {name} {list(tensor.shape)} in {tensor.source} has {has} {name + SCALE}, expected {grid}: one "
                f"scale for {block[0]} × {block[1]} values"
            )
        elif scale.dtype not in _SCALES:
            problems.append(
                f"fp8: {name + SCALE} in {scale.source} is {scale.dtype}, expected one of {', '.join(_SCALES)}"
            )
        else:
            found[name] = scaled_float8(tensor, scale, block, "float32")
    return found, problems


def scaled_float8(weight: StoredTensor, scale: StoredTensor, block: tuple[int, int], dtype: str) -> ScaledCodes:
    """A float8 matrix and its scales."""
    return ScaledCodes(weight, scale, block, dtype, weight.dtype, 8)


def simple_opener(method: str) -> Opener:
    """A scale for the matrix, or one for each row, under `weight_scale`."""

    def make(module: str, own: Mapping[str, StoredTensor]) -> StoredTensor:
        require(method, module, own, "weight", "weight_scale")
        weight, scale = own["weight"], own["weight_scale"]
        require_shape(method, f"{module}.weight_scale", scale, (), (1,), (weight.shape[0],), (weight.shape[0], 1))
        require_dtype(method, f"{module}.weight_scale", scale, *_SCALES[:3])
        return scaled_float8(weight, scale, (1, weight.shape[1]), "float32")

    return lambda tensors: open_modules(
        tensors, float8_module, ("weight", "weight_scale"), make, unused=(".input_scale", ".k_scale", ".v_scale")
    )


def float8_module(name: str, tensor: StoredTensor) -> str | None:
    """The module whose float8 weight this is."""
    if not name.endswith(".weight") or tensor.dtype not in FLOAT8 or len(tensor.shape) != 2:
        return None
    return name.removesuffix(".weight")
