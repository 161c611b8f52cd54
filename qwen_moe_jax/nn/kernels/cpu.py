"""Products of a few rows with matrices that are picked out of a stack while the program runs, on CPUs.

XLA has no product that reads a slice where it is stored: it copies the matrix first, and widens bfloat16 on the way,
which takes longer than the product with a few rows. Here LLVM compiles a C function that XLA calls on the whole stack
(`functions.picked`). Without llvmlite (`pip install 'qwen-moe-jax[cpu]'`) callers use XLA's own products.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qwen_moe_jax.nn.kernels import LANES
from qwen_moe_jax.nn.quantised import Quantised, Weight

#: Numbers of all matrices of a product, from which on a call of a C function costs little.
WORTH_A_CALL = 2**13
#: What `register` was called with in this process.
registered: dict[str, Callable[[], int]] = {}


def is_available(format: str, inputs: int) -> bool:
    """Whether `picked_matmul` can multiply with matrices stored like this: llvmlite is installed, on CPUs.

    Call it while tracing under the model's mesh: that says what the devices are.

    Args:
        format: one of `formats.FORMATS`; of weights stored in one array, the name of its dtype.
        inputs: I.
    """
    return on_cpu() and inputs % LANES == 0 and target("picked_matmul", format) is not None


def on_cpu() -> bool:
    """Whether the devices of the current mesh are CPUs."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return platform == "cpu"


def reads_in_place(dtype: jax.typing.DTypeLike, weights: Sequence[Weight]) -> bool:
    """Whether activations of a dtype should be multiplied with these stacks [..., O, I] by `picked_matmul`.

    Not if the matrices are small, nor if they are stored in several formats, or are to be cast to the dtype first.
    """
    numbers = sum(weight.shape[-2] * weight.shape[-1] for weight in weights)
    return (
        numbers >= WORTH_A_CALL
        and len({format_of(weight) for weight in weights}) == 1
        and all(
            (isinstance(weight, Quantised) or weight.dtype == dtype)
            and is_available(format_of(weight), weight.shape[-1])
            for weight in weights
        )
    )


def format_of(weight: Weight) -> str:
    """The name of a stored weight's format in `formats.FORMATS`, if it is there."""
    if not isinstance(weight, Quantised):
        return weight.dtype.name
    return "int8" if weight.bits == 8 else f"int4_{weight.shape[-1] // weight.scales.shape[-2]}"


def arrays_of(weight: Weight) -> tuple[jax.Array, ...]:
    """The arrays [M, …] of stacked matrices [..., O, I], for `picked_matmul`."""
    arrays = jax.tree.leaves(weight)
    return tuple(array.reshape(-1, *array.shape[-2:]) for array in arrays)


def picked_matmul(
    x_RI: jax.Array,
    stacks: Sequence[tuple[jax.Array, ...]],
    matrices_G: jax.Array,
    sizes_G: jax.Array,
    format: str | None = None,
) -> Sequence[jax.Array]:
    """Each row times the transpose of one of a stack's matrices, for several stacks at once, accumulated in float32.

    A matrix is read once for all of its rows, where it is stored. Nothing here can be differentiated. The arrays are
    those of one device: of a program for one, or inside a `jax.shard_map`.

    Args:
        x_RI: float32; rows sorted by group; I a multiple of `LANES`.
        stacks: each the arrays of one stack of matrices, in the Hub's [out, in] order: of float32 and bfloat16 the one
            array [M, O, I]; of all formats the first is [M, O, …]. O may differ between the stacks.
        matrices_G: int32; the matrix of each group, the same number in every stack.
        sizes_G: int32; the rows of each group. Groups without rows cost nothing.
        format: one of `formats.FORMATS`, for which `is_available`; None: the dtype of the first array.

    Returns:
        float32 [R, O] for each stack. Rows past the sum of the sizes are zeros.
    """
    results = [jax.ShapeDtypeStruct((x_RI.shape[0], stack[0].shape[1]), jnp.float32) for stack in stacks]
    name = target("picked_matmul", format or stacks[0][0].dtype.name)
    assert name is not None  # is_available
    arrays = [array for stack in stacks for array in stack]
    return jax.ffi.ffi_call(name, results)(x_RI, matrices_G.astype(jnp.int32), sizes_G.astype(jnp.int32), *arrays)


@functools.cache
def target(kernel: str, format: str) -> str | None:
    """The name under which XLA knows the C function of a kernel (`compiled.KERNELS`) for a format; None: there is none.

    It is compiled and registered when it is first asked for.
    """
    if importlib.util.find_spec("llvmlite") is None:
        return None
    from qwen_moe_jax.nn.kernels import compiled
    from qwen_moe_jax.nn.kernels.llvm.formats import FORMATS

    if format not in FORMATS:
        return None
    name = f"qwen_moe_jax_{kernel}_{format}"
    register(name, functools.partial(compiled.kernel, kernel, format))
    return name


def register(name: str, address: Callable[[], int]) -> None:
    """Tells XLA the name of a C function. `address` compiles it: it can be pickled, for programs that are kept."""
    if name not in registered:
        jax.ffi.register_ffi_target(name, capsule(address()), platform="cpu", api_version=1)
        registered[name] = address


def capsule(address: int) -> Any:
    """The address of a C function as `jax.ffi` takes it."""
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return make(address, None, None)
