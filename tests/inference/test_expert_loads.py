"""The counters of an engine's experts are exact beyond 32 bits, and count real tokens alone."""

import jax
import jax.numpy as jnp
import numpy as np

import qwen_moe_jax as qmj
from qwen_moe_jax.inference.expert_loads import Counters, chosen_by, dropped_of_rows, no_counts, on_host
from qwen_moe_jax.inference.speculative import packed_experts
from tests.cases import CASES

CONFIG = qmj.ModelConfig.from_pretrained(CASES["qwen3_moe-plain"].config)


def test_counts_carry_over_32_bits():
    zeros = no_counts(CONFIG)
    near = np.full_like(zeros.tokens_2LE, 2**32 - 1)
    near[1] = 5
    counters = Counters(tokens_2LE=near, dropped_2=np.array([2**32 - 2, 0], np.uint32))
    more = np.arange(near[0].size).reshape(near[0].shape)
    loads = on_host(jax.tree.map(jnp.asarray, counters).plus(jnp.asarray(more), jnp.int32(7)), CONFIG)
    assert (loads.tokens_LE == 5 * 2**32 + 2**32 - 1 + more).all() and loads.dropped == 2**32 + 5
    assert loads.layers == tuple(range(CONFIG.num_hidden_layers))


def test_choices_are_those_of_the_statistics_and_capacity_drops_are_counted():
    execution = qmj.ExecutionConfig(dispatch="capacity", eval_capacity_factor=0.5)
    model = qmj.CausalLM(CONFIG, rngs=0, execution=execution)
    tokens_BT = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 16))
    mask_BT = np.arange(16) < np.array([[16], [9]])
    out = model(tokens_BT, mask_BT, output_router_logits=True)
    chosen_LE = chosen_by(packed_experts(out.router), mask_BT, CONFIG.moe.num_experts)
    np.testing.assert_array_equal(chosen_LE, out.router.stats.tokens_per_expert)
    assert dropped_of_rows(out.router).sum() == out.router.stats.dropped_per_expert.sum() > 0
