"""Options of XLA's compilers under which a program's collectives run next to its other work, by kind of device."""

from jax.sharding import Mesh

#: Collectives are started on a TPU's SparseCores, along one dimension of the torus or several, and waited for where
#: their result is needed. Without these options, libtpu lets the chip wait for nearly every collective.
_ON_SPARSECORES = {
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "true"
    for kind in (
        "all_gather",
        "2d_all_gather",
        "3d_all_gather",
        "reduce_scatter",
        "nd_reduce_scatter",
        "all_reduce",
    )
}
_RAGGED = {
    "xla_tpu_enable_async_ragged_all_to_all": "true",
    "xla_tpu_enable_sparse_core_collective_offload_ragged_all_to_all": "true",
}

#: How jax names a device → the options that were compiled for it, by libtpu 0.0.42; benchmarks/results/plan.md has what
#: came of them.
OPTIONS = {
    "TPU v5": {**_ON_SPARSECORES, **_RAGGED},
    "TPU v5p": {**_ON_SPARSECORES, **_RAGGED},
    "TPU v6 lite": _ON_SPARSECORES,
    "TPU v6e": _ON_SPARSECORES,
}


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """The options for `jax.jit(…, compiler_options=…)` of a program over this mesh; None where none are known."""
    return OPTIONS.get(mesh.devices.flat[0].device_kind)
