"""Dropless at any skew: routings given directly to the dispatchers, held to `dense` on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import qwen_moe_jax as qmj
from qwen_moe_jax.config import LoraConfig, MoEConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.moe.block import SparseMoeBlock
from qwen_moe_jax.moe.dispatch import dense, get_dispatcher, register_dispatcher
from qwen_moe_jax.moe.experts import MATRICES
from qwen_moe_jax.moe.router import Routing
from qwen_moe_jax.moe.workloads import workload
from qwen_moe_jax.nn.lora import LoraAdapter
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.sharding.explicit import with_explicit_axes
from qwen_moe_jax.sharding.rules import BATCH
from tests.moe.blocks import relative

B, T, D, E, A, F = 8, 12, 16, 8, 2, 12
MOE = MoEConfig(num_experts=E, num_experts_per_tok=A, moe_intermediate_size=F, norm_topk_prob=True)
MESHES = {
    "one device": {},
    "expert=8": dict(expert=8),
    "fsdp=2·expert=4": dict(fsdp=2, expert=4),
    "data=2·expert=2·tensor=2": dict(data=2, expert=2, tensor=2),
}
EXCHANGES = ["all_gather", "all_to_all"]
SKEWS = ["balanced", "zipf", "hot_expert", "hot_device"]


def experts_of(skew: str) -> np.ndarray:
    """The experts of every token, int32 [B, T, A], two different ones each."""
    return workload(skew, (B, T), num_experts=E, chosen=A, devices=4)


@functools.cache
def block_on(axes: tuple[tuple[str, int], ...], lora: bool) -> SparseMoeBlock:
    make = ParameterFactory(mesh=qmj.make_mesh(**dict(axes)), dtype="float32", initializer_range=0.3, rngs=nnx.Rngs(0))
    block = SparseMoeBlock(D, MOE, make=make)
    if lora:
        sizes = {"gate_proj": (E, F, D), "up_proj": (E, F, D), "down_proj": (E, D, F)}
        for name, axes_of in MATRICES.items():
            adapter = LoraAdapter(name, axes_of, sizes[name], LoraConfig(r=4), make)
            value = 0.3 * np.random.default_rng(1).normal(size=adapter.lora_B.shape).astype(np.float32)
            adapter.lora_B.set_value(jax.device_put(value, adapter.lora_B.get_value().sharding))
            block.experts.lora[name] = adapter
    return block


@functools.cache
def program(axes: tuple[tuple[str, int], ...], lora: bool, dispatch: str, exchange: str, factor: float | None):
    """(experts, hidden, weights, chosen, mask, seed) → (result, rounds), gradients of sum(result * seed); compiled."""
    mesh = qmj.make_mesh(**dict(axes))
    execution = qmj.ExecutionConfig(
        dtype="float32", dispatch=dispatch, exchange=exchange, buffer_factor=factor, grouped_matmul="blocks"
    )
    dispatcher = get_dispatcher(dispatch)

    def inside(experts, hidden_BTD, weights_BTA, experts_BTA, token_mask_BT):
        probs_BTE = jnp.zeros((B, T, E), out_sharding=P(BATCH, None, None))
        routing = Routing(
            experts_BTA=experts_BTA, weights_BTA=weights_BTA, probs_BTE=probs_BTE, token_mask_BT=token_mask_BT
        )
        rows, plan = dispatcher.dispatch(hidden_BTD, routing, execution)
        combined_BTD, drops = dispatcher.combine(experts(rows, "blocks"), plan)
        return combined_BTD, drops

    tokens = P(BATCH, None, None)

    def objective(experts, hidden_BTD, weights_BTA, experts_BTA, token_mask_BT, seed_BTD):
        run = with_explicit_axes(inside, mesh, [tokens, tokens, tokens, P(BATCH, None)])
        combined_BTD, drops = run(experts, hidden_BTD, weights_BTA, experts_BTA, token_mask_BT)
        return jnp.sum(combined_BTD * seed_BTD), (combined_BTD, drops)

    example = [np.zeros((B, T, D), np.float32), np.zeros((B, T, A), np.float32), np.zeros((B, T, A), np.int32)]
    example += [np.zeros((B, T), bool), np.zeros((B, T, D), np.float32)]
    gradient = jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True)
    return jax.jit(gradient).lower(block_on(axes, lora).experts, *example).compile()


def run(axes, skew, dispatch, *, lora=False, exchange="all_gather", factor=1.0):
    rng = np.random.default_rng(1)
    token_mask_BT = rng.random((B, T)) < 0.9
    weights_BTA = rng.random((B, T, A)).astype(np.float32) * token_mask_BT[..., None]
    hidden_BTD, seed_BTD = (rng.normal(size=(B, T, D)).astype(np.float32) for _ in range(2))
    axes = tuple(axes.items())
    (_, (combined_BTD, drops)), gradients = program(axes, lora, dispatch, exchange, factor)(
        block_on(axes, lora).experts, hidden_BTD, weights_BTA, experts_of(skew), token_mask_BT, seed_BTD
    )
    gradients = [np.asarray(leaf) for leaf in jax.tree.leaves(gradients)]
    gradients[-1] = gradients[-1] * token_mask_BT[..., None]
    return np.asarray(combined_BTD), jax.device_get(drops), gradients


CASES = [(mesh, exchange, lora) for mesh in MESHES for exchange in EXCHANGES for lora in (False, True)]
# Adapters have nothing to do with the exchange: one mesh with every part is enough for both.
CASES = [case for case in CASES if not case[2] or case[:2] == ("fsdp=2·expert=4", "all_to_all")]


@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("mesh, exchange, lora", CASES)
def test_dropless_equals_dense_at_any_skew(mesh, exchange, lora, skew):
    wanted_BTD, _, wanted = run({}, skew, "dense", lora=lora)
    found_BTD, drops, found = run(MESHES[mesh], skew, "dropless", lora=lora, exchange=exchange)
    assert relative(found_BTD, wanted_BTD) < 1e-5
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative(ours, theirs) < 1e-4
    assert not drops.dropped_BTA.any()
    assert drops.rounds == 1 if mesh == "one device" else drops.rounds > 1 or skew == "balanced"


def test_memory_is_that_of_fixed_buffers():
    """One program serves every routing; what it holds beyond a program without overflow is a round or two more."""
    axes = tuple(MESHES["expert=8"].items())

    def temporary(factor: float) -> int:
        return program(axes, False, "dropless", "all_to_all", factor).memory_analysis().temp_size_in_bytes

    assert temporary(1.0) < 3 * temporary(8.0), "8 times a balanced load is the worst case, in one round"


class StrongestOnly:
    """A dispatcher of a user's own: every token's strongest expert alone, in the layout of dense."""

    @staticmethod
    def dispatch(hidden_BTD, routing, execution):
        strongest_A = jnp.arange(routing.weights_BTA.shape[-1]) == 0
        alone = Routing(
            experts_BTA=routing.experts_BTA,
            weights_BTA=jnp.where(strongest_A, routing.weights_BTA, 0),
            probs_BTE=routing.probs_BTE,
            token_mask_BT=routing.token_mask_BT,
        )
        return dense.dispatch(hidden_BTD, alone, execution)

    combine = staticmethod(dense.combine)


def test_a_users_own_dispatcher_runs_by_its_name():
    register_dispatcher("strongest_only", StrongestOnly)
    assert get_dispatcher(qmj.ExecutionConfig(dispatch="strongest_only").dispatch) is StrongestOnly
    found_BTD, _, _ = run({}, "zipf", "strongest_only")
    both_BTD, _, _ = run({}, "zipf", "dense")
    assert 0.1 < relative(found_BTD, both_BTD) < 1


def test_unknown_and_incomplete_dispatchers_are_refused_with_the_names_there_are():
    with pytest.raises(ConfigError, match=r"found 'droples', expected one of .*did you mean 'dropless'"):
        get_dispatcher("droples")
    with pytest.raises(ConfigError, match=r"did you mean 'dropless'"):
        qmj.ExecutionConfig(dispatch="droples")
    with pytest.raises(ConfigError, match="found no function dispatch and combine"):
        register_dispatcher("nothing", object())
    with pytest.raises(ConfigError, match="another one is registered under this name"):
        register_dispatcher("dense", StrongestOnly)
