"""A plan's memory is that of any routing: a step with all tokens at one device's experts runs in it, and drops none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.plan.compile import plan_step, target_mesh
from qwen_moe_jax.plan.targets import parse_target
from qwen_moe_jax.plan.worst_case import worst_case, worst_rounds
from tests.plan import golden, samples
from tests.train.whole_rows import batch_of
from train.config import build_config
from train.plan import training_step
from train.program import assemble
from train.reporting.planned import step_memory

MODEL = {**golden.TINY, "num_hidden_layers": 1, "hidden_size": 32, "head_dim": 8}
ROWS, LENGTH, WAYS = 8, 64, 4
TABLES = {
    "model": MODEL,
    "mesh": {"data": 2, "expert": WAYS},
    "execution": {"dispatch": "dropless", "exchange": "all_to_all", "buffer_factor": 1.25},
    "data": {"vocab_size": MODEL["vocab_size"], "seq_len": LENGTH, "batch_size": ROWS},
}


@pytest.fixture(scope="module")
def program():
    config = build_config(TABLES, [], "worst case")
    mesh = target_mesh(parse_target("cpu:8"), config.mesh.sizes)
    return config, mesh, assemble(config, qmj.ModelConfig.from_pretrained(MODEL), mesh)


@pytest.fixture(scope="module")
def plan(program):
    config, mesh, assembled = program
    return plan_step(training_step(config, assembled, "worst case"), parse_target("cpu:8"), mesh)


def step(program, *, skewed):
    """One step; with routers of zeros, of equal probabilities, all tokens choose the first two experts."""
    model = qmj.CausalLM(program.model.config, rngs=nnx.Rngs(0), mesh=program.model.mesh)
    params = nnx.to_pure_dict(nnx.state(model))
    if skewed:
        params = jax.tree.map_with_path(
            lambda path, leaf: jnp.zeros_like(leaf) if "'gate'" in jax.tree_util.keystr(path) else leaf, params
        )
    tokens_BT = np.random.default_rng(0).integers(1, MODEL["vocab_size"], (ROWS, LENGTH), dtype=np.int32)
    batch = batch_of(tokens_BT)
    batch = jax.device_put(batch, program.batch.tokens_BT.sharding)
    return program.train_step(program.begin(params), program.fixed, batch)


def test_the_step_runs_in_the_planned_memory_whatever_the_routing(program, plan):
    """One program serves both routings, and its memory is what was planned."""
    _, _, assembled = program
    _, even = step(assembled, skewed=False)
    _, skewed = step(assembled, skewed=True)
    assert int(even.router.rounds.max()) < int(skewed.router.rounds.max()) == worst_rounds(plan)
    load_E = np.asarray(skewed.router.tokens_per_expert)[0]
    assert load_E[:2].sum() == load_E.sum() == ROWS * LENGTH * 2, "all tokens chose the experts of the first device"
    assert int(skewed.dropped) == 0 and np.isfinite(float(skewed.loss))
    arguments = assembled.state, assembled.fixed, assembled.batch
    assert step_memory(assembled, arguments) == plan.memory.compiled
    assert plan.memory.total == plan.memory.compiled + plan.memory.code + plan.memory.run_time
    assert assembled.train_step._cache_size() == 1, "no other program was compiled"


def test_the_rounds_of_the_worst_routing_are_those_of_the_buffers():
    """Of 512 rows that a device sends, each device takes 1.25 × 512 / 4; a token has at most two experts there."""
    execution = {"dispatch": "dropless", "exchange": "all_to_all", "buffer_factor": 1.25}

    def with_(**changes):
        base = samples.plan(mesh={"data": 2, "fsdp": 1, "expert": 4, "context": 1, "tensor": 1})
        work = dataclasses.replace(base.work, rows=8, tokens_per_row=256, execution={**execution, **changes})
        model = dataclasses.replace(base.model, experts=8, experts_per_token=2)
        return dataclasses.replace(base, work=work, model=model)

    assert worst_rounds(with_()) == 4, "512 rows in buffers of 160"
    assert worst_rounds(with_(buffer_factor=4.0)) == 1 and "all at once" in worst_case(with_(buffer_factor=4.0))
    assert worst_rounds(with_(exchange="all_gather", buffer_factor=2.0)) == 2
    assert worst_rounds(with_(buffer_factor=None)) == 2, "twice a balanced load, where the worst case has many rows"
    assert "4 rounds through the same buffers" in worst_case(with_())
    assert "dropped" in worst_case(with_(dispatch="capacity")) and not worst_case(with_(dispatch="dense"))
    with pytest.raises(ValueError, match="'dense'"):
        worst_rounds(with_(dispatch="dense"))
