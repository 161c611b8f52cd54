"""compressed-tensors (llm-compressor): int8, packed int4, float8 and FP4 matrices, by tensor, row, group or block.

(code − zero) · scale in the dtype of the scales, as its `dequantize`. Each module's own tensors say how it is stored,
so that folders of several formats ("mixed-precision") are read, too. Activations are not quantised here.
"""

import functools
from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.huggingface.fields import shown
from qwen_moe_jax.huggingface.quantised.dequantise import FLOAT8, ScaledCodes, read_all
from qwen_moe_jax.huggingface.quantised.fp4 import fp4_codes, mxfp4_weight, nvfp4_weight
from qwen_moe_jax.huggingface.quantised.modules import (
    Opener,
    ProblemError,
    open_modules,
    require,
    require_dtype,
    require_shape,
    unsupported,
)
from qwen_moe_jax.huggingface.quantised.packing import WordCodes
from qwen_moe_jax.rounding import ceil_div
from qwen_moe_jax.storage.tensor import StoredTensor

METHOD = "compressed-tensors"
_FORMATS = (
    "int-quantized", "pack-quantized", "naive-quantized", "float-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mixed-precision", "dense",
)  # fmt: skip
_PARTS = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "weight_global_scale",
)  # fmt: skip
_ACTIVATIONS = tuple(
    f".{part}_{what}" for part in ("input", "output", "k", "v", "q") for what in ("scale", "zero_point", "global_scale")
)
_SCALES = ("float16", "bfloat16", "float32")
_BITS = (2, 4, 8)


def opener(config: Mapping[str, Any], where: str) -> Opener:
    """Of `quant_method="compressed-tensors"`.

    Raises:
        ConfigError: a format that is not supported, sparse weights, or weights that are rotated at run time.
    """
    groups = config.get("config_groups")
    groups = groups if isinstance(groups, Mapping) else {}
    schemes = [scheme for scheme in groups.values() if isinstance(scheme, Mapping)]
    for layout in [config.get("format"), *(scheme.get("format") for scheme in schemes)]:
        if layout is not None and layout not in _FORMATS:
            raise unsupported(where, METHOD, "format", shown(layout), f"one of {', '.join(_FORMATS)}")
    sparse = config.get("sparsity_config")
    if isinstance(sparse, Mapping) and sparse.get("format", "dense") != "dense":
        raise unsupported(where, METHOD, "sparsity_config", shown(sparse.get("format")), "it to be absent, or 'dense'")
    rotations = config.get("transform_config")
    if isinstance(rotations, Mapping) and rotations.get("config_groups"):
        raise unsupported(where, METHOD, "transform_config", shown(rotations), "it to be absent, or empty")
    weights = [scheme["weights"] for scheme in schemes if isinstance(scheme.get("weights"), Mapping)]
    blocks = [own["block_structure"] for own in weights if isinstance(own.get("block_structure"), list | tuple)]
    if any(block != blocks[0] or len(block) != 2 or not all(_is_size(size) for size in block) for block in blocks):
        raise unsupported(
            where, METHOD, "block_structure", shown(blocks), "two positive integers, the same for all groups"
        )
    block = (blocks[0][0], blocks[0][1]) if blocks else None
    make = functools.partial(_weight, bits=_bits(weights, where), block=block)
    return lambda tensors: open_modules(tensors, _module, _PARTS, make, unused=_ACTIVATIONS)


def _bits(weights: list[Mapping[str, Any]], where: str) -> int | None:
    """Bits of packed integers, where there is one number for all of them; the shapes say it where there is a group."""
    found = [own.get("num_bits") for own in weights if own.get("type", "int") == "int"]
    for bits in found:
        if not _is_size(bits) or bits not in _BITS:
            raise unsupported(where, METHOD, "num_bits", shown(bits), "2, 4 or 8")
    return found[0] if len(set(found)) == 1 else None


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _module(name: str, tensor: StoredTensor) -> str | None:
    if name.endswith(".weight_packed"):
        return name.removesuffix(".weight_packed")
    is_quantised = name.endswith(".weight") and tensor.dtype in ("int8", *FLOAT8)
    return name.removesuffix(".weight") if is_quantised else None


def _weight(
    module: str, own: Mapping[str, StoredTensor], *, bits: int | None, block: tuple[int, int] | None
) -> StoredTensor:
    require(METHOD, module, own, "weight_scale")
    if "weight_packed" not in own:
        return _plain(module, own, block)
    if own["weight_packed"].dtype == "uint8":
        return _fp4(module, own)
    return _packed(module, own, bits)


def _plain(module: str, own: Mapping[str, StoredTensor], block: tuple[int, int] | None) -> StoredTensor:
    """int8 or float8 codes, one each in `weight`."""
    weight, scale, zero = own["weight"], own["weight_scale"], own.get("weight_zero_point")
    require_dtype(METHOD, f"{module}.weight_scale", scale, *_SCALES)
    size = _block(module, weight.shape, scale, block)
    if zero is not None:
        require_shape(METHOD, f"{module}.weight_zero_point", zero, scale.shape)
    name = weight.dtype if weight.dtype in FLOAT8 else f"{weight.dtype} ({METHOD})"
    return ScaledCodes(
        weight, scale, size, scale.dtype, name, 8, zero=zero, groups=_groups(module, own, weight.shape[1])
    )


def _packed(module: str, own: Mapping[str, StoredTensor], bits: int | None) -> StoredTensor:
    """Integers of 2, 4 or 8 bits in words along the input axis, stored plus half of their range."""
    require(METHOD, module, own, "weight_shape")
    words, scale, zero = own["weight_packed"], own["weight_scale"], own.get("weight_zero_point")
    require_dtype(METHOD, f"{module}.weight_packed", words, "int32")
    require_dtype(METHOD, f"{module}.weight_scale", scale, *_SCALES)
    require_shape(METHOD, f"{module}.weight_shape", own["weight_shape"], (2,))
    rows, columns = (int(size) for size in read_all(own["weight_shape"]))
    fitting = [one for one in _BITS if words.shape == (rows, ceil_div(columns * one, 32))]
    bits = bits if bits in fitting else next(iter(fitting), None)
    if bits is None:
        raise ProblemError(
            f"{METHOD}: {module}.weight_packed is {list(words.shape)} in {words.source}, expected the codes of "
            f"{[rows, columns]} (its weight_shape) in words of 2, 4 or 8 bits a code"
        )
    size = _block(module, (rows, columns), scale, None)
    half = 1 << (bits - 1)
    if zero is not None:
        groups = scale.shape[-1]
        require_shape(METHOD, f"{module}.weight_zero_point", zero, (ceil_div(rows * bits, 32), groups))
        zero = WordCodes(zero, bits, 0, (rows, groups), minus=half)
    return ScaledCodes(
        codes=WordCodes(words, bits, 1, (rows, columns), minus=half),
        scale=scale,
        block=size,
        dtype=scale.dtype,
        stored_dtype=f"int{bits} ({METHOD})",
        stored_bits=bits,
        zero=zero,
        groups=_groups(module, own, columns),
    )


def _fp4(module: str, own: Mapping[str, StoredTensor]) -> StoredTensor:
    packed, scale = own["weight_packed"], own["weight_scale"]
    if scale.dtype in ("uint8", "float8_e8m0fnu"):
        return mxfp4_weight(fp4_codes(METHOD, module, packed, scale, 32), scale)
    require(METHOD, module, own, "weight_global_scale")
    factor = own["weight_global_scale"]
    require_dtype(METHOD, f"{module}.weight_scale", scale, "float8_e4m3fn")
    require_shape(METHOD, f"{module}.weight_global_scale", factor, (), (1,))
    codes = fp4_codes(METHOD, module, packed, scale, 16)
    return nvfp4_weight(codes, scale, factor, divide=True, dtype="bfloat16")


def _block(module: str, shape: tuple[int, ...], scale: StoredTensor, block: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns that share a scale: by matrix, row, group of columns, or block."""
    rows, columns = shape
    if scale.shape in ((), (1,), (rows,)):
        return 1, columns
    if len(scale.shape) == 2 and scale.shape[0] == rows and columns % scale.shape[1] == 0:
        return 1, columns // scale.shape[1]
    if block is not None and scale.shape == (ceil_div(rows, block[0]), ceil_div(columns, block[1])):
        return block
    raise ProblemError(
        f"{METHOD}: {module}.weight_scale is {list(scale.shape)} in {scale.source} for a weight {list(shape)}, "
        "expected a scale for the matrix, each row, each group of columns, or each block "
        f"({block or 'without block_structure'})"
    )


def _groups(module: str, own: Mapping[str, StoredTensor], columns: int) -> StoredTensor | None:
    groups = own.get("weight_g_idx")
    if groups is not None:
        require_shape(METHOD, f"{module}.weight_g_idx", groups, (columns,))
    return groups
