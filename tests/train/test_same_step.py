"""A step is the same step in one batch or in micro-batches, and on any mesh: losses, gradients and counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.model.output import RouterOutput, TokenLosses
from qwen_moe_jax.moe.losses import (
    global_batch_loss,
    load_balancing_loss,
    router_losses,
    router_z_loss,
    sequence_loss,
)
from qwen_moe_jax.moe.stats import sum_stats
from tests.subject import on_mesh
from tests.train.test_language_modelling import STATS
from tests.train.test_step import HUB_CONFIG
from train.config import LossConfig
from train.data.batches import Mixture, batch_at, heldout_batches
from train.data.rows import pack
from train.objectives.language_modelling import training_loss, whole_batch
from train.step import initial_state, make_train_step, state_shardings

SIZES = dict(num_attention_heads=8, num_key_value_heads=8, head_dim=8, num_experts=8)  # what eight devices can share


@functools.cache
def model_on_one_device() -> qmj.CausalLM:
    config = qmj.ModelConfig.from_pretrained({**HUB_CONFIG, **SIZES, "num_hidden_layers": 1, "initializer_range": 0.3})
    execution = qmj.ExecutionConfig(dtype="float32", dispatch="dense")
    return qmj.CausalLM(config, rngs=nnx.Rngs(0), execution=execution)


def first_state_and_step(accumulation_steps: int, mesh):
    """Plain descent, whose change of the weights is the gradient."""
    model = on_mesh(model_on_one_device(), mesh)
    model.train()
    graph, params = nnx.split(model)
    optimizer = optax.sgd(0.1)
    params = jax.tree.map(jnp.copy, nnx.to_pure_dict(params))  # a step takes its state's memory
    shardings = state_shardings(params, optimizer, mesh)
    loss = LossConfig(
        load_balancing_type="global_batch", router_aux_loss_coef=0.5, router_z_loss_coef=0.1, z_loss_coef=0.01
    )
    step = make_train_step(graph, optimizer, loss, shardings, seed=0, accumulation_steps=accumulation_steps)
    return initial_state(params, optimizer, shardings), step


def three_steps(accumulation_steps: int, mesh):
    """Metrics and parameters of three steps."""
    state, step = first_state_and_step(accumulation_steps, mesh)
    seen = []
    numbers = np.random.default_rng(0)
    # Documents of all lengths, and padding at the end: micro-batches have unlike numbers of targets.
    rows = pack([numbers.integers(1, 64, size) for size in numbers.integers(1, 14, 36)], 8)
    for number in range(3):
        state, metrics = step(state, {}, batch_at(rows, number, 32, seed=0))
        seen.append(jax.device_get(metrics))
    return seen, jax.device_get(state.params)


@pytest.fixture(scope="module")
def one_device():
    return three_steps(1, qmj.make_mesh())


@pytest.mark.parametrize(
    ("accumulation_steps", "axes"),
    [
        (4, dict(data=2)),
        (1, dict(data=2, fsdp=2, tensor=2)),
        (1, dict(expert=4, tensor=2)),
        *((1, {axis: 8}) for axis in ("data", "fsdp", "expert", "tensor")),
    ],
    ids=["4 x 8 rows on data=2", "data x fsdp x tensor", "expert x tensor", "data", "fsdp", "expert", "tensor"],
)
def test_three_steps_are_those_of_32_rows_on_one_device(one_device, accumulation_steps, axes):
    expected, expected_params = one_device
    found, params = three_steps(accumulation_steps, qmj.make_mesh(**axes))
    for metrics, expected_metrics in zip(found, expected, strict=True):
        np.testing.assert_array_equal(metrics.router.tokens_per_expert, expected_metrics.router.tokens_per_expert)
        for name, value in {**vars(expected_metrics), **expected_metrics.terms}.items():
            if name not in ("router", "terms"):
                found_value = metrics.terms[name] if name in metrics.terms else getattr(metrics, name)
                np.testing.assert_allclose(found_value, value, rtol=1e-5, err_msg=name)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), params, expected_params)


def test_documents_laid_end_to_end_teach_what_they_teach_one_to_a_row():
    numbers = np.random.default_rng(1)
    documents = [numbers.integers(1, 64, size) for size in (3, 5, 8, 2, 6, 4, 4, 7)]
    documents.append(numbers.integers(1, 64, 1))  # with the one before, five full rows
    together = pack(documents, 8)
    alone = Mixture([pack([document], 8) for document in documents], [1.0] * len(documents))
    state, step = first_state_and_step(1, qmj.make_mesh())
    seen = []
    for rows, count in ((together, 5), (alone, 9)):
        [batch] = heldout_batches(rows, count, 9)  # filled up with rows of padding: one shape, one program
        new, metrics = step(jax.tree.map(jnp.copy, state), {}, batch)
        seen.append(jax.device_get((metrics, new.params)))
    (packed, packed_params), (unpacked, unpacked_params) = seen
    assert packed.tokens == unpacked.tokens == 40
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(getattr(packed, name), getattr(unpacked, name), rtol=1e-5, err_msg=name)
    assert packed.terms.keys() == {"cross_entropy", "balance_loss", "router_z", "z_loss"}
    for name in packed.terms:
        np.testing.assert_allclose(packed.terms[name], unpacked.terms[name], rtol=1e-5, err_msg=name)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), packed_params, unpacked_params)


def test_the_whole_batch_is_what_balance_is_judged_by():
    """It says something only where the global batch's loss is not the mean of the micro-batches'."""
    first, second = micro_batches()
    mean = (global_batch_loss(first) + global_batch_loss(second)) / 2
    assert abs(mean - global_batch_loss(sum_stats([first, second]))) > 1e-2


def micro_batches():
    """The stats of two micro-batches with loads that even each other out, in part."""
    flipped = dataclasses.replace(
        STATS,
        tokens=jnp.array([6, 6]),
        tokens_per_expert=jnp.array([[2, 10], [7, 5]]),
        probs_per_expert=jnp.array([[1.0, 5.0], [3.5, 2.5]]),
        sequences=jnp.array([2, 2]),
    )
    return STATS, flipped


def test_shares_of_all_losses_sum_to_those_of_the_batch_and_the_pooled_one_is_a_mean():
    batch = batch_at(pack([np.arange(1, 50), np.arange(1, 25)], 8), step=0, batch_size=5, seed=0)
    numbers = np.random.default_rng(0)
    losses_BT, logsumexp_BT = numbers.random((2, 5, 8), np.float32)
    first, second = micro_batches()
    counts = dataclasses.replace(
        whole_batch(batch, 2), tokens=jnp.int32(18), sequences=jnp.int32(5), router=sum_stats([first, second])
    )

    def share(rows: slice, stats, balance: str, counts=counts):
        out = TokenLosses(
            losses=jnp.asarray(losses_BT[rows]),
            logsumexp=jnp.asarray(logsumexp_BT[rows]),
            router=RouterOutput(stats=stats, losses=router_losses(stats)),
        )
        part = jax.tree.map(lambda x: x[rows], batch)
        return training_loss(out, part, counts, LossConfig(load_balancing_type=balance, router_aux_loss_coef=0.5))

    expected = {
        "pooled": (load_balancing_loss(first) + load_balancing_loss(second)) / 2,
        "global_batch": global_batch_loss(sum_stats([first, second])),
        "sequence": sequence_loss(sum_stats([first, second])),
    }
    for balance, value in expected.items():
        parts = share(slice(0, 3), first, balance), share(slice(3, 5), second, balance)
        loss = jax.tree.map(lambda x, y: x + y, *parts)
        np.testing.assert_allclose(loss.balance, value, rtol=1e-6, err_msg=balance)
        np.testing.assert_allclose(loss.router_z, router_z_loss(sum_stats([first, second])), rtol=1e-6)
        np.testing.assert_allclose(loss.cross_entropy, losses_BT[batch.target_mask_BT].mean(), rtol=1e-6)
        np.testing.assert_allclose(loss.z, (logsumexp_BT[batch.target_mask_BT] ** 2).mean(), rtol=1e-6)
        np.testing.assert_allclose(loss.total, loss.cross_entropy + 0.5 * loss.balance, rtol=1e-6)
    # Where nothing is weighed by it, its counts are not worth a pass through the layers: it is shown as a mean.
    alone = dataclasses.replace(counts, router=None)
    shown = sum(float(share(slice(0, 3), stats, "global_batch", alone).balance) for stats in (first, second))
    np.testing.assert_allclose(shown, (global_batch_loss(first) + global_batch_loss(second)) / 2, rtol=1e-6)
