"""Optimizer state and activations in the host's memory change numbers by rounding at most: steps and plans."""

import dataclasses

import jax
import jax.extend.core
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.plan.compile import plan_step
from qwen_moe_jax.plan.targets import parse_target
from tests.train.test_ema import HUB_CONFIG
from tests.train.whole_rows import batch_of
from train import adamw_cpu, offload
from train.checkpoint import Checkpoints
from train.config import build_config
from train.optimizer import stack_axes
from train.plan import training_step
from train.program import assemble
from train.reporting.planned import step_memory

HOST = "pinned_host"
MODEL = {**HUB_CONFIG, "vocab_size": 259, "num_hidden_layers": 3}
TABLES = {"model": MODEL, "data": {"vocab_size": 259, "batch_size": 4, "seq_len": 8}, "mesh": {"fsdp": 2}}


def assembled(kind, **optimizer):
    config = build_config({**TABLES, "optimizer": {"memory_kind": kind, "warmup_steps": 0, **optimizer}}, [], "a test")
    mesh = qmj.make_mesh(fsdp=2)
    return config, mesh, assemble(config, qmj.ModelConfig.from_pretrained(MODEL), mesh)


@pytest.fixture(scope="module")
def programs():
    return {kind: assembled(kind) for kind in ("device", HOST)}


def begin(program):
    model = qmj.CausalLM(program.model.config, rngs=nnx.Rngs(0), mesh=program.model.mesh)
    return program.begin(nnx.to_pure_dict(nnx.state(model)))


def batches(program):
    tokens = np.random.default_rng(0).integers(1, 32, (3, 4, 8), dtype=np.int32)
    return [jax.device_put(batch_of(tokens_BT), program.batch.tokens_BT.sharding) for tokens_BT in tokens]


def kinds(state):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim}


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_close(found, expected):
    """Equal but for float32's rounding, half of 1.2e-7 of a number, which three steps carry on.

    By XLA's own settings the steps were equal bit for bit; compiled as tests are, without LLVM's optimisations, they
    differ by up to 1.5e-8.
    """

    def check(found, expected):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())

    jax.tree.map(check, *(jax.tree.map(np.asarray, one) for one in (found, expected)))


def test_at_most_one_layers_moments_are_copied_to_the_devices_at_a_time(programs):
    """Those of arrays that are no stacks, as the embedding's, are copied whole."""
    _, _, program = programs[HOST]
    jaxpr = jax.make_jaxpr(program.train_step)(program.state, program.fixed, program.batch)
    copied = [var.aval for var in copied_to_devices(jaxpr.jaxpr)]
    moments = jax.tree.leaves(adamw_cpu.moments_of(program.state.optimizer)[1:])
    stacked = {path: axes for path, axes in stack_axes(program.model).items() if axes}
    assert len(copied) == len(moments) and len(stacked) > 5
    assert sum(aval.shape[0] == 1 for aval in copied) == 2 * len(stacked)


def copied_to_devices(jaxpr):
    """The variables that a program copies from the host's memory, those of its loops once."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "device_put" and eqn.params["devices"][0].memory_kind == "device":
            yield eqn.invars[0]
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from copied_to_devices(inner)


def test_steps_do_not_depend_on_the_memory_and_go_on_from_a_checkpoint(programs, tmp_path):
    """Saved by a run with its state in the host's memory, restored by one with it on the devices, and the reverse."""
    found = {}
    for kind, (_, _, program) in programs.items():
        state, (*first, last) = begin(program), batches(program)
        assert kinds(state) == {kind}
        for batch in first:
            state, _ = program.train_step(state, program.fixed, batch)
        with Checkpoints(tmp_path / kind, keep=1) as checkpoints:
            checkpoints.save(2, state)  # the next step reuses the state's memory while it is written
            state, metrics = program.train_step(state, program.fixed, last)
        before = jax.tree.map(np.asarray, state)
        nothing = dataclasses.replace(last, target_mask_BT=last.target_mask_BT & False)
        unmoved, _ = program.train_step(state, program.fixed, nothing)
        assert_equal(*((one.params, one.optimizer) for one in (unmoved, before)))
        state = dataclasses.replace(unmoved, step=unmoved.step - 1)
        assert kinds(state) == {kind}
        found[kind] = state, metrics
    assert_close(*found.values())

    for saved, restored in (("device", HOST), (HOST, "device")):
        _, _, program = programs[restored]
        with Checkpoints(tmp_path / saved, keep=1) as checkpoints:
            state = checkpoints.restore(program.state, program.model)
        assert kinds(state) == {restored}
        state, _ = program.train_step(state, program.fixed, batches(program)[2])
        assert_close(state, found[saved][0])


def test_a_plan_counts_the_memory_of_the_host_apart(programs):
    request, plans = parse_target("cpu:2"), {}
    for kind, (config, mesh, program) in programs.items():
        plans[kind] = plan_step(training_step(config, program, "offload"), request, mesh).memory
    on_device, on_host = plans["device"], plans[HOST]
    moments = sum(array.bytes for array in on_device.groups[1].arrays if array.shape)
    assert moments == on_host.host_arguments > 0 and on_device.host_arguments == 0
    assert on_host.arguments == on_device.arguments - moments and on_host.padding == on_device.padding
    _, _, program = programs[HOST]
    assert step_memory(program, (program.state, program.fixed, program.batch)) == on_host.compiled


def test_a_memory_that_devices_do_not_have_is_refused_with_the_way_out():
    mesh = qmj.make_mesh(fsdp=2)
    offload.check_memory_kind(HOST, mesh)
    with pytest.raises(ConfigError, match=r"optimizer.memory_kind: it needs 'tape'.*Leave the key out"):
        offload.check_memory_kind("tape", mesh)


def test_a_memory_that_arguments_would_silently_not_be_in_is_refused(monkeypatch):
    """As for GPUs that are only compiled for: JAX drops the name."""
    sharding = jax.sharding.NamedSharding
    monkeypatch.setattr(offload, "NamedSharding", lambda mesh, spec, memory_kind: sharding(mesh, spec))
    with pytest.raises(ConfigError, match=r"optimizer.memory_kind: found 'pinned_host'.*Plan without the key"):
        offload.check_arguments(HOST, qmj.make_mesh(fsdp=2))


@pytest.mark.parametrize("kind", ["muon", "adafactor"])
def test_every_optimizers_arrays_are_offloaded_and_its_counters_are_not(kind):
    _, _, program = assembled(HOST, type=kind)
    state = program.state
    assert kinds(state) == {HOST} and state.step.sharding.memory_kind != HOST
    counters = [leaf for leaf in jax.tree.leaves(state.optimizer) if not leaf.ndim]
    assert all(leaf.sharding.memory_kind != HOST for leaf in counters)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} != {HOST}


@pytest.mark.parametrize("remat", ["full", "exchange", "experts", "dots"])
def test_gradients_do_not_depend_on_the_memory_in_which_activations_wait(remat):
    """CPUs have one memory, but the program asks for the other: each named value is sent there, and fetched from it."""
    tokens_BT = np.random.default_rng(0).integers(1, 32, (4, 8))
    found = []
    for activation_offloading in (False, True):
        execution = qmj.ExecutionConfig(remat=remat, activation_offloading=activation_offloading)
        config = qmj.ModelConfig.from_pretrained(MODEL)
        model = qmj.CausalLM(config, execution=execution, rngs=nnx.Rngs(0), mesh=qmj.make_mesh(fsdp=2, expert=2))
        graph, params = nnx.split(model)

        def loss(params, graph=graph):
            return nnx.merge(graph, params).token_losses(tokens_BT, tokens_BT).losses.sum()

        moved = str(jax.make_jaxpr(jax.grad(loss))(params)).count("MemorySpace.Host")
        assert (moved > 0) is activation_offloading
        found.append(jax.jit(jax.grad(loss))(params))
    assert_equal(*found)


def test_activations_of_no_policy_are_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"activation_offloading=True.*remat='none'.*take remat='dots'"):
        qmj.ExecutionConfig(activation_offloading=True)
