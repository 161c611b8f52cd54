"""AWQ: codes of 4 bits in words along the output axis, in AutoAWQ's order, a scale and a zero point for each group.

W[o, i] = (code[i, o] − zero[g, o]) · scales[g, o] with g = i // group_size, in the dtype of the scales: AutoAWQ's
`dequantize_gemm`.
"""

from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.huggingface.fields import shown
from qwen_moe_jax.huggingface.quantised.dequantise import ScaledCodes, Transposed
from qwen_moe_jax.huggingface.quantised.gptq import SCALES, packed_module
from qwen_moe_jax.huggingface.quantised.modules import (
    Opener,
    ProblemError,
    open_modules,
    require,
    require_dtype,
    unsupported,
)
from qwen_moe_jax.huggingface.quantised.packing import WordCodes
from qwen_moe_jax.storage.tensor import StoredTensor

#: Place in its word, in steps of four bits, of each of eight neighbouring outputs.
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def opener(config: Mapping[str, Any], where: str) -> Opener:
    """Of `quant_method="awq"`.

    Raises:
        ConfigError: not 4 bits, or another layout of the files than that of its gemm kernel.
    """
    bits = config.get("bits", config.get("w_bit", 4))
    if bits != 4:
        raise unsupported(where, "awq", "bits", shown(bits), "4")
    layout = config.get("version") or config.get("format") or "gemm"
    if not isinstance(layout, str) or layout.lower() != "gemm":
        raise unsupported(where, "awq", "version", shown(layout), "'gemm'")
    return lambda tensors: open_modules(tensors, packed_module, ("qweight", "qzeros", "scales"), _weight)


def _weight(module: str, own: Mapping[str, StoredTensor]) -> StoredTensor:
    require("awq", module, own, "qweight", "qzeros", "scales")
    words, zeros, scales = own["qweight"], own["qzeros"], own["scales"]
    for part, tensor in (("qweight", words), ("qzeros", zeros)):
        require_dtype("awq", f"{module}.{part}", tensor, "int32", "uint32")
    require_dtype("awq", f"{module}.scales", scales, *SCALES)
    if len(words.shape) != 2 or len(scales.shape) != 2:
        raise ProblemError(f"awq: {module}.qweight in {words.source} is {list(words.shape)}, expected a matrix")
    columns, rows, groups = words.shape[0], words.shape[1] * 8, scales.shape[0]
    fits = scales.shape == (groups, rows) and zeros.shape == (groups, rows // 8)
    if not fits or columns % groups:
        raise ProblemError(
            f"awq: {module} in {words.source} has qweight {list(words.shape)}, scales {list(scales.shape)} and qzeros "
            f"{list(zeros.shape)}, expected [in, out / 8], [groups, out] and [groups, out / 8]"
        )
    return ScaledCodes(
        codes=Transposed(WordCodes(words, 4, 1, (columns, rows), order=_ORDER)),
        scale=Transposed(scales),
        block=(1, columns // groups),
        dtype=scales.dtype,
        stored_dtype="int4 (awq)",
        stored_bits=4,
        zero=Transposed(WordCodes(zeros, 4, 1, (groups, rows), order=_ORDER)),
    )
