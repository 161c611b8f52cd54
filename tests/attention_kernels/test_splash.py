"""TPUs' attention kernels, run as ordinary operations on the CPU, against attention in blocks; and lowered for TPUs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.attention_kernels.blockwise import Blocks, attend_in_blocks
from qwen_moe_jax.attention_kernels.splash import LANES, attend_by_splash
from qwen_moe_jax.config import resolve
from qwen_moe_jax.config.resolve import resolve_attention
from qwen_moe_jax.model import attention
from qwen_moe_jax.model.remat import remat_policy
from tests.cases import CASES
from tests.distance import relative_l2
from tests.model.test_packing import pack

B, T, N, K = 2, 260, 4, 2  # three blocks, the last of them filled up; a window of 30 leaves out one pair of them


def arrays(head_dim: int, dtype: str = "float32") -> tuple[jax.Array, ...]:
    """Queries, keys, values, the gradient of the result; segments with padding in the middle and at the end.

    The gradient is large on padding, and would spoil what it had a part in.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, T, heads, head_dim) for heads in (N, K, K, N)]
    q, k, v, gradient = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    ids = np.ones((B, T), np.int32)
    ids[0, 90:] = 2
    ids[0, 230:] = 0
    ids[1, 50:70] = 0
    padding = (ids == 0)[..., None, None]
    return q, k, v, jnp.where(padding, 1e3 * gradient, gradient), jnp.asarray(ids)


def by_splash(q, k, v, ids, window: int | None) -> jax.Array:
    return attend_by_splash(q, k, v, ids, Blocks.of(T, LANES, window, LANES), True)


def in_blocks(q, k, v, ids, window: int | None) -> jax.Array:
    out = attend_in_blocks(q, k, v, ids, Blocks.of(T, LANES, window))
    return jnp.where((ids != 0)[..., None, None], out, 0)


def both(head_dim: int, window: int | None, dtype: str = "float32"):
    """(name, by splash, in blocks) of the result and of the three gradients."""
    q, k, v, gradient, ids = arrays(head_dim, dtype)
    ours, pull = jax.vjp(functools.partial(by_splash, ids=ids, window=window), q, k, v)
    theirs, pull_in_blocks = jax.vjp(functools.partial(in_blocks, ids=ids, window=window), q, k, v)
    names = "result", "queries", "keys", "values"
    return list(zip(names, (ours, *pull(gradient)), (theirs, *pull_in_blocks(gradient)), strict=True))


@pytest.mark.parametrize("head_dim, window", [(128, None), (64, 30)])
def test_results_and_gradients_are_those_of_blocks(head_dim, window):
    """To 1e-5 of numbers of the order of one: float32 sums of at most 260 terms in another order."""
    for name, ours, theirs in both(head_dim, window):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=name)


def test_bfloat16_costs_about_a_rounding():
    """The scaled queries are rounded once more than in blocks, the weights of the result are not: 2^-9 each at most."""
    for name, ours, theirs in both(64, None, "bfloat16"):
        assert ours.dtype == jnp.bfloat16
        assert relative_l2(ours, theirs) < 2**-7, name


def test_a_model_learns_the_same(monkeypatch):
    """Packed rows, a layer without a window and one with: the losses and the gradient of every parameter."""
    monkeypatch.setattr(resolve, "resolve_attention", lambda execution, *_: resolve_attention(execution, "tpu"))
    monkeypatch.setattr(attention, "attend_by_splash", functools.partial(attend_by_splash, interpret=True))
    sliding = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 2}
    config = qmj.ModelConfig.from_pretrained({**CASES["qwen2-plain"].config, **sliding, "initializer_range": 0.25})
    tokens, segments, positions = pack()

    def loss_and_gradient(method: str):
        execution = qmj.ExecutionConfig(attention=method, remat="dots")
        model = qmj.CausalLM(config, rngs=nnx.Rngs(0), execution=execution)
        assert model.execution_in_use.attention == method

        def loss(model):
            losses = model.token_losses(tokens, tokens, segments, positions).losses
            return jnp.sum(jnp.where(segments != 0, losses, 0))

        return jax.jit(jax.value_and_grad(loss))(model)

    (ours, our_gradient), (theirs, their_gradient) = loss_and_gradient("splash"), loss_and_gradient("blocks")
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    for found, expected in zip(*map(jax.tree.leaves, (our_gradient, their_gradient)), strict=True):
        assert relative_l2(found, expected) < 1e-5


@pytest.mark.parametrize("remat, forward_kernels", [("none", 1), ("dots", 1), ("experts", 1), ("full", 2)])
def test_dots_keeps_what_the_kernel_made(remat, forward_kernels):
    q, k, v, gradient, ids = arrays(128, "bfloat16")
    attend = functools.partial(attend_by_splash, segment_ids_BT=ids, blocks=Blocks.of(T, LANES, None, LANES))
    layer = jax.checkpoint(attend, policy=remat_policy(qmj.ExecutionConfig(remat=remat)))
    traced = jax.jit(lambda *x: jax.vjp(layer, *x)[1](gradient)).trace(q, k, v)
    program = str(traced.jaxpr)
    found = [program.count(f"name=splash_mha_{kernel}_") for kernel in ("fwd", "dq", "dkv")]
    assert found == [forward_kernels, 1, 1]


@pytest.mark.parametrize("dtype, precise", [("float32", True), ("bfloat16", False)])
def test_float32_means_float32_in_the_backward_pass_too(dtype, precise):
    """Otherwise a TPU would round its factors to bfloat16. No context says so here, as none does in a training step."""
    q, k, v, gradient, ids = arrays(128, dtype)
    attend = functools.partial(attend_by_splash, segment_ids_BT=ids, blocks=Blocks.of(T, LANES, None, LANES))
    program = str(jax.make_jaxpr(lambda *x: jax.vjp(attend, *x)[1](gradient))(q, k, v))
    products = program.count("dot_general[")
    assert products >= 2 + 3 + 4
    assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == (products if precise else 0)


@pytest.mark.parametrize("head_dim, dtype", [(128, "bfloat16"), (64, "float32")])
def test_lowers_for_tpus(head_dim, dtype):
    """What XLA then makes of it needs its compiler."""
    q, k, v, gradient, ids = arrays(head_dim, dtype)
    attend = functools.partial(attend_by_splash, segment_ids_BT=ids, blocks=Blocks.of(T, LANES, 30, LANES))
    for kernels, program in (1, attend), (3, lambda *x: jax.vjp(attend, *x)[1](gradient)):
        lowered = jax.jit(program).trace(q, k, v).lower(lowering_platforms=("tpu",))
        assert lowered.as_text().count("tpu_custom_call") == kernels


class TestChoice:
    execution = qmj.ExecutionConfig(dtype="bfloat16")

    @pytest.mark.parametrize("platform, method", [("tpu", "splash"), ("gpu", "blocks"), ("cpu", "blocks")])
    def test_takes_the_kernels_where_they_run(self, platform, method):
        assert resolve_attention(self.execution, platform).attention == method

    def test_what_is_asked_for_is_taken(self):
        asked = dataclasses.replace(self.execution, attention="blocks", attention_block=100)
        assert resolve_attention(asked, "tpu") == asked

    def test_the_kernels_do_not_know_float16(self):
        half = dataclasses.replace(self.execution, dtype="float16")
        assert resolve_attention(half, "tpu").attention == "blocks"
        with pytest.raises(qmj.ConfigError, match="dtype='float16'"):
            resolve_attention(dataclasses.replace(half, attention="splash"), "tpu")

    def test_refuses_other_platforms(self):
        model = qmj.CausalLM(
            qmj.ModelConfig.from_pretrained(CASES["qwen3-plain"].config),
            rngs=None,
            execution=qmj.ExecutionConfig(attention="splash"),
        )
        with pytest.raises(qmj.ConfigError, match="platform 'cpu'.*use 'blocks'"):
            _ = model.execution_in_use

    def test_the_kernels_do_not_know_blocks_shorter_than_a_register(self):
        short = dataclasses.replace(self.execution, attention_block=64)
        assert resolve_attention(short, "tpu").attention == "blocks"
        with pytest.raises(qmj.ConfigError, match="attention_block=64.*at least 128"):
            resolve_attention(dataclasses.replace(short, attention="splash"), "tpu")


@pytest.mark.parametrize("tokens, longest, count, length", [(1, 512, 1, 128), (200, 128, 2, 128), (1030, 600, 3, 384)])
def test_blocks_are_multiples(tokens, longest, count, length):
    blocks = Blocks.of(tokens, longest, None, LANES)
    assert (blocks.count, blocks.length) == (count, length)
