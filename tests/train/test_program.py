"""What a run compiles, before it has a token or a weight."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import qwen_moe_jax as qmj
from qwen_moe_jax.plan.chips import CHIPS
from qwen_moe_jax.sharding import compiler_options
from tests.train.whole_rows import batch_of
from train.config import TrainConfig, build_config
from train.parameters import merge, partition, paths, select
from train.plan import plan_training
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
    for leaf in jax.tree.leaves((program.state, program.fixed, program.batch)):
        assert isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding.mesh.size == 4


def test_a_step_and_its_plan_are_compiled_with_the_options_of_the_device(monkeypatch):
    """Seen by one that no compiler knows, which is refused before anything is compiled."""
    assert compiler_options.compiler_options(qmj.make_mesh(fsdp=2, expert=2)) is None, "of CPUs there are none"
    monkeypatch.setitem(compiler_options.OPTIONS, "cpu", {"xla_of_this_test": "true"})
    program = assembled()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_of_this_test"):
        program.train_step.lower(program.state, program.fixed, program.batch).compile()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_of_this_test"):
        plan_training(config(), "cpu:4")
    monkeypatch.setattr("train.program.make_train_step", lambda *arguments: arguments[-1])
    assert assembled(run={"async_collectives": False}).train_step is None


def test_the_options_are_those_of_a_known_kind_of_device():
    kinds = {kind for chip in CHIPS for kind in chip.device_kinds}
    assert compiler_options.OPTIONS.keys() <= kinds


def test_a_classifier_with_adapters_trains_its_head_beside_them():
    data = {**TABLES["data"], "format": "jsonl", "path": "labels.jsonl"}
    program = assembled(data=data, classification={}, lora={"r": 2, "target_modules": ["q_proj"]})
    trained = {path.split(".")[-1] if "lora" in path else path for path in paths(program.state.params)}
    assert trained == {"lora_A", "lora_B", "score.weight"} and "score.weight" not in paths(program.fixed)
    assert program.batch.labels.shape == (TABLES["data"]["batch_size"],)


def first_step(frozen: list[str]):
    """A program's descriptions, and the parameters before, fixed and after, with the metrics, of one step."""
    program = assembled(
        data={**TABLES["data"], "batch_size": 8},
        execution={"dispatch": "dense"},  # compiles in half the time, and has the same parameters
        optimizer={"frozen": frozen, "warmup_steps": 0},
        run={"gradient_accumulation_steps": 2},
    )
    model = qmj.CausalLM(
        program.model.config, rngs=nnx.Rngs(0), mesh=program.model.mesh, execution=program.model.execution
    )
    params = nnx.to_pure_dict(nnx.state(model))
    before = jax.device_get(params)
    fixed = select(params, like=program.fixed)
    tokens_BT = np.random.default_rng(0).integers(1, 300, (8, 8), dtype=np.int32)
    batch = batch_of(tokens_BT)
    state, metrics = program.train_step(program.begin(params), fixed, batch)
    return program, before, fixed, state, metrics


def test_fixed_parameters_are_no_part_of_what_a_step_changes_keeps_or_measures():
    norms, everything = [], set(paths(assembled().state.params))
    for frozen in ([], [r"mlp|embed|layernorm|model\.norm"], ["self_attn", "lm_head"]):
        program, before, fixed, state, metrics = first_step(frozen)
        norms.append(float(metrics.gradient_norm))
        assert set(paths(state.params)) == set(paths(program.state.params)) == everything - set(paths(fixed))
        assert paths(fixed) == paths(program.fixed) and bool(frozen) == bool(paths(fixed))
        adam = state.optimizer[1][0]
        assert paths(adam.mu) == paths(adam.nu) == paths(state.params)
        jax.tree.map(np.testing.assert_array_equal, fixed, select(before, like=fixed))  # and its memory was not taken
        changed = jax.tree.map(lambda new, old: (new != old).any(), state.params, select(before, like=state.params))
        assert all(jax.tree.leaves(changed))
    whole, *parts = norms  # what the second and the third train is all of the model, between them
    assert whole > max(parts)
    assert whole**2 == pytest.approx(sum(part**2 for part in parts), rel=1e-4)


def test_parts_of_the_parameters_are_put_together_again():
    whole = {"a": {0: {"x": 1, "y": 2}, 1: {"x": 3}}, "b": 4}
    trained, fixed = partition(whole, {"a.0.y", "b"})
    assert trained == {"a": {0: {"x": 1}, 1: {"x": 3}}} and fixed == {"a": {0: {"y": 2}}, "b": 4}
    assert merge(trained, fixed) == whole
    assert select(whole, like=fixed) == fixed


def test_a_run_with_nothing_to_train_is_refused():
    with pytest.raises(qmj.ConfigError, match=r"optimizer.frozen: \['.'\] leaves no parameter to train"):
        assembled(optimizer={"frozen": ["."]})


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
        ({"embed": ["pipeline"]}, "sharding.embed.0.: found 'pipeline'.*'data', 'fsdp', 'expert', 'context', 'tensor'"),
    ],
)
def test_rules_that_mean_nothing_are_refused_by_key(sharding, message):
    with pytest.raises(qmj.ConfigError, match=message):
        assembled(sharding=sharding)
