"""The sharding of stored weights changes no number."""

import jax
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.config import SHARDING_RULES
from tests.sharding.test_collectives import collectives

MESH = dict(fsdp=2, expert=2, tensor=2)
TOKENS = np.random.default_rng(0).integers(1, 64, (4, 9))
CONFIG = qmj.ModelConfig.from_pretrained(
    {
        "model_type": "qwen2_moe",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "initializer_range": 0.2,
    }
)
#: The hidden axis not sharded, and its mesh axes given to the other axis: what no named table of rules does.
CROSSWISE = qmj.ShardingRules(
    embed=(), expert_embed=(), vocab=("tensor", "expert"), heads=("tensor", "fsdp"), ffn=("tensor", "fsdp")
)
RULES = {**SHARDING_RULES, "crosswise": CROSSWISE}


def build(rules, **axes) -> qmj.CausalLM:
    execution = qmj.ExecutionConfig(sharding=rules, dtype="float32")
    return qmj.CausalLM(CONFIG, rngs=nnx.Rngs(0), mesh=qmj.make_mesh(**axes), execution=execution)


def losses_and_gradients(model):
    def loss(model):
        return model.token_losses(TOKENS[:, :-1], TOKENS[:, 1:]).losses.mean()

    found, gradients = jax.jit(jax.value_and_grad(loss))(model)
    return float(found), [np.asarray(leaf) for leaf in jax.tree.leaves(gradients)]


@pytest.fixture(scope="module")
def alone():
    """Loss and gradients on one device."""
    return losses_and_gradients(build("expert+fsdp"))


@pytest.mark.parametrize("name", RULES)
def test_rules_change_neither_losses_nor_gradients(name, alone):
    loss, gradients = losses_and_gradients(build(RULES[name], **MESH))
    assert loss == pytest.approx(alone[0], rel=1e-6)
    for found, wanted in zip(gradients, alone[1], strict=True):
        # Sums in another order: float32 rounding, relative to the largest entry.
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max() + 1e-9)


def test_a_device_holds_what_the_rules_leave_on_it():
    """Of q_proj [L, 32 rows over heads, 32 columns over embed], as shares of the whole; fsdp 2, expert 2, tensor 2."""
    shares = {"expert+fsdp": 8, "fsdp": 4, "expert": 4, "expert+tensor": 2, "crosswise": 4}
    for name, num_shards in shares.items():
        execution = qmj.ExecutionConfig(sharding=RULES[name])
        model = qmj.CausalLM(CONFIG, rngs=None, mesh=qmj.make_mesh(**MESH), execution=execution)
        [[layer]] = model.model.layers.segments
        weight = layer.self_attn.q_proj.weight.get_value()
        assert np.prod(weight.shape) == num_shards * np.prod(weight.sharding.shard_shape(weight.shape)), name


def test_expert_tensor_gathers_no_weight():
    model = build("expert+tensor", **MESH)
    program = jax.jit(lambda model, tokens: model(tokens).logits).lower(model, TOKENS[:, :1]).compile()
    found = collectives(program)
    gathered = [size for kind, size in found.outside + found.in_loops if kind == "all-gather"]
    tokens = TOKENS[:, :1].size * CONFIG.hidden_size * 4  # the experts' exchange gathers tokens
    smallest_weight = CONFIG.hidden_size * CONFIG.attention.num_key_value_heads * CONFIG.attention.head_dim * 4 // 2
    assert gathered and max(gathered) <= tokens < smallest_weight


def test_generation_is_the_same_under_rules_of_the_users_own():
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    [wanted, found] = [
        [answer.token_ids for answer in qmj.complete(build(rules, **axes), prompts, max_new_tokens=6)]
        for rules, axes in (("expert+fsdp", {}), (CROSSWISE, MESH))
    ]
    assert found == wanted


@pytest.mark.parametrize(
    "rules, message",
    [
        (dict(embed=("fsdp", "tensor")), "embed_tokens.weight: .*'tensor' is used twice, by 'vocab' and by 'embed'"),
        (dict(expert_embed=("expert",)), "gate_proj: .*'expert' is used twice, by 'expert' and by 'expert_embed'"),
        (dict(embed=("data", "fsdp")), r"'embed' axis of size 32 .* over the mesh axes data=3, fsdp=1.* another"),
    ],
)
def test_collisions_and_sizes_that_do_not_divide_are_refused_by_name(rules, message):
    execution = qmj.ExecutionConfig(sharding=qmj.ShardingRules(**rules))
    with pytest.raises(qmj.ShardingError, match=message):
        qmj.CausalLM(CONFIG, rngs=None, mesh=qmj.make_mesh(data=3), execution=execution)


@pytest.mark.parametrize("axes", [dict(expert=3), dict(expert=3, tensor=2), dict(data=2, expert=3)], ids=str)
def test_experts_that_do_not_divide_are_named_before_anything_else(axes):
    with pytest.raises(qmj.ShardingError, match=r"^num_experts=4 does not divide over the mesh axes expert=3: every"):
        qmj.CausalLM(CONFIG, rngs=None, mesh=qmj.make_mesh(**axes))


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: qmj.ShardingRules(embed=("fdsp",)),
            r"embed=\('fdsp',\) is not supported: .*data, fsdp, expert, context, tensor",
        ),
        (lambda: qmj.ShardingRules(embed=("fsdp", "fsdp")), "each once"),
        (lambda: qmj.ShardingRules(heads=("fsdp", "tensor")), '"tensor" first'),
        (lambda: qmj.ExecutionConfig(sharding="experts"), r"sharding='experts'.*'expert\+fsdp'"),
    ],
)
def test_rules_that_mean_nothing_are_refused(make, message):
    with pytest.raises(qmj.ConfigError, match=message):
        make()
