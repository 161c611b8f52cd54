"""How far two tensors of the same values may be apart, by the dtypes that they are stored in."""

import dataclasses

import ml_dtypes
import numpy as np

from qwen_moe_jax.huggingface.quantised.dequantise import Dequantised
from qwen_moe_jax.storage.tensor import CastTensor, PickedRows, StoredTensor, TensorSlice


@dataclasses.dataclass(frozen=True)
class Bound:
    """|a − b| ≤ relative · size + absolute, for each pair of values.

    Attributes:
        relative: share of the larger of |a| and |b|.
        absolute: for values too small for the dtype's full precision.
        words: the bound, for people.
    """

    relative: float
    absolute: float
    words: str


def bounds(first: StoredTensor, second: StoredTensor, *, computed: bool = False) -> tuple[Bound, ...]:
    """The bounds that a rounded pair keeps, the tightest first; none where the values must be equal.

    Args:
        first, second: the pair.
        computed: the first is computed in float32 and not stored, as a matrix with an adapter merged.
    """
    found = []
    dtypes = first.dtype, second.dtype
    if dtypes[0] != dtypes[1] or computed:
        unit = sum(float(ml_dtypes.finfo(dtype).eps) / 2 for dtype in dtypes)
        tiny = sum(float(ml_dtypes.finfo(dtype).smallest_subnormal) / 2 for dtype in dtypes)
        coarser = max(dtypes, key=lambda dtype: float(ml_dtypes.finfo(dtype).eps))
        # A weight and the product of its adapter are rounded before, and their sum after they are added.
        factor = 4.0 if computed else 1.0
        found.append(Bound(factor * unit, factor * tiny, f"{factor * unit:.1e} of each value ({coarser})"))
    elif dtypes == ("float32", "float32"):
        unit = float(np.finfo(np.float32).eps)
        found.append(Bound(2 * unit, 0.0, f"{2 * unit:.1e} of each value (float32)"))
    quantised = [part for tensor in (first, second) for part in _quantised_parts(tensor)]
    if quantised:
        # Half a step of the codes, and half of float8's smallest number times the largest scale.
        steps = [part.rounding() for part in quantised]
        both = 2 if all(_quantised_parts(tensor) for tensor in (first, second)) else 1
        relative, absolute = (both * max(column) * 1.02 for column in zip(*steps, strict=True))
        share = f"{relative:.1e} of each value and " if relative else ""
        found.append(Bound(relative, absolute, f"{share}{absolute:.1e} (half a step of quantised values)"))
    return tuple(found)


def stored_dtype(tensor: StoredTensor) -> str:
    """What the file has: of an FP8 matrix "float8_e4m3fn", though it is read as float32."""
    parts = _quantised_parts(tensor)
    return parts[0].stored_dtype if parts else tensor.dtype


def _quantised_parts(tensor: StoredTensor) -> list[Dequantised]:
    if isinstance(tensor, Dequantised):
        return [tensor]
    if isinstance(tensor, TensorSlice | CastTensor):
        return _quantised_parts(tensor.tensor)
    if isinstance(tensor, PickedRows):
        distinct = {id(part): part for part, _, _ in tensor.runs}
        return [found for part in distinct.values() for found in _quantised_parts(part)]
    return []
