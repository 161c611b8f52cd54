"""GPTQ: codes of 2, 4 or 8 bits in words along the input axis, a scale and a zero point for each group of inputs.

W[o, i] = scales[g, o] · (code[i, o] − zero[g, o]) with g = g_idx[i], in the dtype of the scales: GPTQModel's
`dequantize_weight`. Files of the first version (`checkpoint_format` "gptq" or none) hold zero points minus one, packed;
like GPTQModel, one is added to every code of a word at once, with the carry between them, which undoes what it does
when it writes such files. Those of the second ("gptq_v2") hold zero points as they are.
"""

from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.huggingface.fields import shown
from qwen_moe_jax.huggingface.quantised.dequantise import ScaledCodes, Transposed
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

_BITS = (2, 4, 8)
_FORMATS = {"gptq": True, "gptq_v2": False}
SCALES = ("float16", "bfloat16", "float32")


def opener(config: Mapping[str, Any], where: str) -> Opener:
    """Of `quant_method="gptq"`.

    Raises:
        ConfigError: three bits, words that are not of 32 bits, or another layout of the files (marlin, bitblas, …).
    """
    bits = config.get("bits")
    if bits not in _BITS:
        raise unsupported(where, "gptq", "bits", shown(bits), "2, 4 or 8")
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    if not isinstance(layout, str) or layout not in _FORMATS:
        raise unsupported(where, "gptq", "checkpoint_format", shown(layout), "'gptq' or 'gptq_v2'")
    if config.get("pack_dtype", "int32") != "int32":
        raise unsupported(where, "gptq", "pack_dtype", shown(config["pack_dtype"]), "'int32'")
    minus_one = _FORMATS[layout]

    def make(module: str, own: Mapping[str, StoredTensor]) -> StoredTensor:
        return _weight(module, own, minus_one=minus_one)

    return lambda tensors: open_modules(tensors, packed_module, ("qweight", "qzeros", "scales", "g_idx"), make)


def packed_module(name: str, tensor: StoredTensor) -> str | None:
    """The module whose packed weight this is."""
    return name.removesuffix(".qweight") if name.endswith(".qweight") else None


def _weight(module: str, own: Mapping[str, StoredTensor], *, minus_one: bool) -> StoredTensor:
    require("gptq", module, own, "qweight", "qzeros", "scales")
    words, zeros, scales = own["qweight"], own["qzeros"], own["scales"]
    for part, tensor in (("qweight", words), ("qzeros", zeros)):
        require_dtype("gptq", f"{module}.{part}", tensor, "int32", "uint32")
    require_dtype("gptq", f"{module}.scales", scales, *SCALES)
    if len(words.shape) != 2 or len(scales.shape) != 2 or len(zeros.shape) != 2:
        raise ProblemError(f"gptq: {module}.qweight in {words.source} is {list(words.shape)}, expected a matrix")
    rows, (groups, _) = words.shape[1], scales.shape
    # Single modules may have other bits than the config says (GPTQModel's `dynamic`).
    bits = next((bits for bits in _BITS if zeros.shape == (groups, ceil_div(rows * bits, 32))), None)
    if scales.shape != (groups, rows) or bits is None:
        raise ProblemError(
            f"gptq: {module} in {words.source} has qweight {list(words.shape)}, scales {list(scales.shape)} and qzeros "
            f"{list(zeros.shape)}, expected [in / n, out], [groups, out] and [groups, out / n] with n codes in a word"
        )
    columns = words.shape[0] * 32 // bits
    if "g_idx" in own:
        require_shape("gptq", f"{module}.g_idx", own["g_idx"], (columns,))
    elif columns % groups:
        raise ProblemError(
            f"gptq: {module}: {columns} inputs are not divided by {groups} groups, and there is no g_idx"
        )
    ones = sum(1 << place for place in range(0, 32, bits)) if minus_one else 0
    zero = WordCodes(zeros, bits, 1, (groups, rows), plus=ones)
    return ScaledCodes(
        codes=Transposed(WordCodes(words, bits, 0, (columns, rows))),
        scale=Transposed(scales),
        block=(1, max(columns // groups, 1)),
        dtype=scales.dtype,
        stored_dtype=f"int{bits} (gptq)",
        stored_bits=bits,
        zero=Transposed(zero),
        groups=own.get("g_idx"),
    )
