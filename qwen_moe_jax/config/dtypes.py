"""Dtypes by name. Nothing here imports JAX; NumPy is imported only where a dtype is not given by its name."""

from typing import Any, Literal, TypeAlias, get_args

#: The supported dtypes of weights and activations, by the names that configs keep.
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)

#: What a dtype may be given as: anything that `jnp.dtype` takes (jnp.bfloat16, np.float32, "bfloat16", np.dtype("f4")).
DTypeLike: TypeAlias = Any


def as_dtype_name(found: DTypeLike) -> str | None:
    """NumPy's name of a dtype ("float32", "int8"); None for what is no dtype."""
    if isinstance(found, str) and found in DTYPES:
        return found
    if found is None:
        return None  # NumPy takes it for float64
    import numpy

    try:
        return numpy.dtype(found).name
    except (TypeError, ValueError):
        return None
