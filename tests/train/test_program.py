"""What a run compiles, before it has a token or a weight."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

import qwen_moe_jax as qmj
from train.config import TrainConfig, build_config
from train.program import Program, assemble

TABLES = {
    "model": {
        "model_type": "qwen3_moe",
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
    },
    "data": {"vocab_size": 300, "batch_size": 4, "seq_len": 8},
    "mesh": {"fsdp": 2, "expert": 2},
}


def config(**sections) -> TrainConfig:
    return build_config({**TABLES, **sections}, [], source="a test")


def assembled(**sections) -> Program:
    mesh = qmj.make_mesh(fsdp=2, expert=2)
    return assemble(config(**sections), qmj.ModelConfig.from_pretrained(TABLES["model"]), mesh)


def test_a_program_allocates_nothing_and_says_where_everything_lies():
    program = assembled()
    for leaf in jax.tree.leaves((program.state, program.batch)):
        assert isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding.mesh.size == 4


def test_one_row_of_a_table_of_sharding_rules_is_changed_by_its_key():
    program = assembled(sharding={"rules": "expert+tensor", "embed": ["expert"]})
    [[layer]] = program.model.model.layers.segments
    assert layer.self_attn.q_proj.weight.spec == P(None, "tensor", "expert")
    assert layer.mlp.experts.gate_proj.spec == P(None, "expert", "tensor", None)
    embedding = program.state.params["model"]["embed_tokens"]["weight"]
    assert embedding.sharding.spec == P("tensor", "expert")


@pytest.mark.parametrize(
    "sharding, message",
    [
        ({"rules": "expert+fdsp"}, r"sharding.rules: found 'expert\+fdsp', expected one of expert\+fsdp, fsdp"),
        ({"embed": ["pipeline"]}, "sharding rule embed=.*'pipeline'.*data, fsdp, expert, tensor"),
    ],
)
def test_rules_that_mean_nothing_are_refused_by_key(sharding, message):
    with pytest.raises(qmj.ConfigError, match=message):
        assembled(sharding=sharding)
