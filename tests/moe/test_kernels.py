"""The accelerators' grouped matmuls, run as ordinary operations on the CPU, against a loop over the experts."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.moe.kernels import cpu
from qwen_moe_jax.moe.kernels.grouped_matmul import buffer_rows, grouped_matmul
from qwen_moe_jax.nn.kernels import matmul
from qwen_moe_jax.nn.matmul import matmul_precision

BACKENDS = ("tpu", "nvidia")

#: Rows, the widths of a matrix, and the rows of each expert; rows past their sum are padding.
CASES = {
    "full tiles": (256, 128, 256, [128, 128]),
    "experts without rows": (300, 128, 128, [0, 10, 0, 0, 250, 40, 0]),
    "all rows to one expert": (260, 128, 128, [0, 260, 0]),
    "no rows": (64, 128, 128, [0, 0, 0, 0]),
    "fewer rows than experts": (5, 128, 128, [1, 0, 0, 2, 0, 0]),
    "padding": (400, 128, 128, [100, 1, 0, 150]),
    "odd widths": (77, 48, 330, [30, 0, 40, 3]),
}
#: Sums of up to a few hundred products, and for bfloat16 one rounding of the result.
TOLERANCE = {"float32": 2e-5, "bfloat16": 8e-3}


def backend(name):
    return importlib.import_module(f"qwen_moe_jax.moe.kernels.{name}")


def experts_rows(sizes):
    """Each expert's number and rows."""
    ends = np.cumsum(sizes)
    return [(expert, slice(end - size, end)) for expert, (size, end) in enumerate(zip(sizes, ends, strict=True))]


def draw(case, dtype):
    """Two sets of rows, whose padding would spoil every sum it took part in, matrices, and sizes."""
    rows, width_in, width_out, sizes = CASES[case]
    rng = np.random.default_rng(0)
    inputs_RI, gradient_RO = rng.normal(size=(rows, width_in)), rng.normal(size=(rows, width_out))
    inputs_RI[sum(sizes) :], gradient_RO[sum(sizes) :] = np.nan, np.inf
    weights_EOI = rng.normal(size=(len(sizes), width_out, width_in))
    return *(jnp.asarray(array, dtype) for array in (inputs_RI, gradient_RO, weights_EOI)), np.array(sizes, np.int32)


def assert_close(found, wanted, dtype):
    assert found.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(found, np.float64), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(1, abs(wanted).max())
    )


@pytest.mark.parametrize("case, dtype", [*((case, "float32") for case in CASES), ("padding", "bfloat16")])
@pytest.mark.parametrize("name", BACKENDS)
class TestAgainstALoop:
    def test_rows(self, name, case, dtype):
        inputs_RI, gradient_RO, weights_EOI, sizes_E = draw(case, dtype)
        ragged = functools.partial(backend(name).ragged, interpret=True)
        wide_RO = ragged(inputs_RI, weights_EOI, jnp.asarray(sizes_E), transposed=True)
        back_RI = ragged(gradient_RO, weights_EOI, jnp.asarray(sizes_E), transposed=False)
        assert wide_RO.shape == gradient_RO.shape and back_RI.shape == inputs_RI.shape
        for expert, rows in experts_rows(sizes_E):
            matrix_OI = np.asarray(weights_EOI[expert], np.float64)
            if sizes_E[expert]:
                assert_close(wide_RO[rows], np.asarray(inputs_RI[rows], np.float64) @ matrix_OI.T, dtype)
                assert_close(back_RI[rows], np.asarray(gradient_RO[rows], np.float64) @ matrix_OI, dtype)

    def test_outer(self, name, case, dtype):
        inputs_RI, gradient_RO, weights_EOI, sizes_E = draw(case, dtype)
        of_weights_EOI = backend(name).outer(gradient_RO, inputs_RI, jnp.asarray(sizes_E), interpret=True)
        assert of_weights_EOI.shape == weights_EOI.shape
        for expert, rows in experts_rows(sizes_E):
            left, right = (np.asarray(array[rows], np.float64) for array in (gradient_RO, inputs_RI))
            assert_close(of_weights_EOI[expert], left.T @ right, dtype)  # zeros for an expert without rows


def test_on_tpus_few_rows_meet_the_experts_of_all_layers_without_a_copy():
    weights, sizes = np.arange(3 * 4 * 2 * 5).reshape(3, 4, 2, 5), np.array([1, 0, 7, 2], np.int32)
    for rows in (40, 8192):  # of many rows, the tiles are sized by the number of a layer's experts
        chosen, counts = backend("tpu").select_layer(jnp.asarray(weights), jnp.asarray(sizes), jnp.int32(1), rows)
        assert len(chosen) == len(counts) == (12 if rows == 40 else 4)
        np.testing.assert_array_equal(np.asarray(chosen)[counts > 0], weights[1][sizes > 0])
        np.testing.assert_array_equal(np.asarray(counts)[counts > 0], sizes[sizes > 0])


def test_a_program_writes_only_its_experts_rows():
    """A GPU runs programs in any order; here the last writes last, and would cover up for one that wrote too much."""
    _, _, weights_EOI, sizes_E = draw("padding", "float32")
    ones_RI = jnp.ones((CASES["padding"][0], weights_EOI.shape[2]))
    wide_RO = backend("nvidia").ragged(ones_RI, weights_EOI, jnp.asarray(sizes_E), transposed=True, interpret=True)
    written_R = ~np.isnan(wide_RO).any(axis=1)  # what nobody writes is not a number when interpreted
    np.testing.assert_array_equal(written_R, np.arange(len(wide_RO)) < sum(sizes_E))


@pytest.mark.parametrize("name", BACKENDS)
def test_inside_shard_map(name):
    """As the dropless dispatch calls them: each device its own rows and experts."""
    inputs_RI, gradient_RO, weights_EOI, sizes_E = draw("full tiles", "float32")
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Explicit,))

    def local(inputs_RI, gradient_RO, weights_EOI, sizes_E):
        wide_RO = backend(name).ragged(inputs_RI, weights_EOI, sizes_E, transposed=True, interpret=True)
        return wide_RO, backend(name).outer(gradient_RO, inputs_RI, sizes_E, interpret=True)

    arrays = inputs_RI, gradient_RO, weights_EOI, jnp.asarray(sizes_E)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(array, jax.NamedSharding(mesh, P("expert"))) for array in arrays]
        split = jax.jit(jax.shard_map(local, in_specs=P("expert"), out_specs=P("expert"), check_vma=False))(*placed)
    for found, wanted in zip(split, local(*arrays), strict=True):
        np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [65536 + 128, 64 + 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "name, platform, custom_call", [("tpu", "tpu", "tpu_custom_call"), ("nvidia", "cuda", "triton")]
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_lowers_for_its_platform(name, platform, custom_call, dtype, rows):
    """For training and for decoding with Qwen3-30B-A3B's experts; what XLA then makes of it needs its compilers."""
    D, F, E = 2048, 768, 128
    inputs_RD, gradient_RF = jax.ShapeDtypeStruct((rows, D), dtype), jax.ShapeDtypeStruct((rows, F), dtype)
    weights_EFD, sizes_E = jax.ShapeDtypeStruct((E, F, D), dtype), jax.ShapeDtypeStruct((E,), np.int32)

    def all_three(inputs_RD, gradient_RF, weights_EFD, sizes_E):
        with matmul_precision(inputs_RD.dtype):
            return (
                backend(name).ragged(inputs_RD, weights_EFD, sizes_E, transposed=True),
                backend(name).ragged(gradient_RF, weights_EFD, sizes_E, transposed=False),
                backend(name).outer(gradient_RF, inputs_RD, sizes_E),
            )

    h200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((), (), abstract_device=h200 if platform == "cuda" else None)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(all_three).trace(inputs_RD, gradient_RF, weights_EFD, sizes_E)
        assert traced.lower(lowering_platforms=(platform,)).as_text().count(custom_call) >= 3


@pytest.mark.parametrize("dtype, precise", [("float32", True), ("bfloat16", False)])
def test_float32_means_float32_in_the_backward_pass_too(monkeypatch, dtype, precise):
    """Otherwise accelerators would round its factors. No context says so here, as none does in a training step."""
    monkeypatch.setattr(matmul, "on_cpu", lambda: False)  # the products are XLA's
    rows, gradient, weights, sizes = draw("full tiles", dtype)
    traced = jax.make_jaxpr(lambda *x: jax.vjp(lambda *y: grouped_matmul(*y, sizes, "blocks"), *x)[1](gradient))
    program = str(traced(rows, weights))
    assert program.count("dot_general[") == 3
    assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == (3 if precise else 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_of_several_lengths_multiply_each_row_once(monkeypatch, dtype):
    """On CPUs: experts without rows, with one, with as many as a block has, and with more than the longest has."""
    monkeypatch.setattr(cpu, "SEVERAL_LENGTHS", 0)
    sizes = [0, 37, 130, 1, 64, 0, 24]
    rows = buffer_rows(sum(sizes))
    assert len(cpu.block_lengths(rows, len(sizes), 1)) > 4
    rng, sizes_E = np.random.default_rng(0), np.array(sizes, np.int32)
    inputs_RI, gradient_RO = (jnp.asarray(rng.normal(size=(rows, width)), dtype) for width in (8, 16))
    stacked_LEOI = jnp.asarray(rng.normal(size=(2, len(sizes), 16, 8)), dtype)
    wide_RO = grouped_matmul(inputs_RI, stacked_LEOI, sizes_E, "blocks", layer=jnp.int32(1))
    back_RI = cpu.ragged(gradient_RO, stacked_LEOI[1], sizes_E, transposed=False)
    of_weights_EOI = cpu.outer(gradient_RO, inputs_RI, sizes_E)
    for expert, own in experts_rows(sizes):
        x, g, matrix_OI = (
            np.asarray(x, np.float64) for x in (inputs_RI[own], gradient_RO[own], stacked_LEOI[1, expert])
        )
        assert_close(of_weights_EOI[expert], g.T @ x, dtype)
        if len(x):
            assert_close(wide_RO[own], x @ matrix_OI.T, dtype)
            assert_close(back_RI[own], g @ matrix_OI, dtype)
