"""Losses of pairs, with their gradients, are TRL's on the same log-probabilities and rewards."""

import types
import warnings
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.config import DpoConfig
from train.objectives.dpo import dpo_losses
from train.objectives.reward import reward_losses

torch = pytest.importorskip("torch", reason="the referee is TRL on torch, which is not installed here")

PAIRS, TOKENS = 5, 9


@pytest.fixture(scope="module")
def trl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what TRL imports
        return pytest.importorskip("trl", reason="the referee is TRL, which is not installed here")


@pytest.fixture(scope="module")
def pairs():
    """Log-probabilities of the tokens of both completions and of the reference, and which tokens count: [P, 2, T]."""
    numbers = np.random.default_rng(0)
    log_probs, reference = -numbers.exponential(size=(2, PAIRS, 2, TOKENS)).astype(np.float32)
    mask = np.arange(TOKENS) < numbers.integers(1, TOKENS + 1, (PAIRS, 2))[..., None]
    return log_probs * mask, reference * mask, mask


def rows(x_P2):
    """TRL's order: the chosen ones, then the rejected ones."""
    return torch.tensor(np.concatenate([x_P2[:, 0], x_P2[:, 1]]))


class Model(torch.nn.Module):
    """Stands in for a model whose outputs are given."""

    def __init__(self, **outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, **inputs):
        return types.SimpleNamespace(**self.outputs)


def trainer_of(model, **settings):
    """What the loss functions of TRL's trainers read of them."""
    accelerator = types.SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    return types.SimpleNamespace(
        model=model, accelerator=accelerator, _metrics=metrics, _total_train_tokens=0, _tp_size=1, **settings
    )


def trl_dpo(trl, pairs, loss_type, **settings):
    """Loss, gradient by the tokens' log-probabilities [P, 2, T], and metrics."""
    log_probs, reference, mask = pairs
    tokens = rows(log_probs).requires_grad_()
    zeros = torch.zeros_like(tokens)
    model = Model(log_probs=tokens, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer = trainer_of(
        model, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=[loss_type], loss_weights=[1.0], use_weighting=False,
        **{"label_smoothing": 0.0, "beta": 0.1, **settings},
    )  # fmt: skip
    completion_mask = torch.cat([torch.zeros(2 * PAIRS, 1), rows(mask)], dim=1).long()  # the prompt is one token
    inputs = {
        "completion_mask": completion_mask,
        "input_ids": completion_mask,
        "attention_mask": completion_mask,
        "ref_chosen_logps": torch.tensor(reference[:, 0].sum(-1)),
        "ref_rejected_logps": torch.tensor(reference[:, 1].sum(-1)),
    }
    loss = trl.DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    loss.backward()
    gradient = tokens.grad.numpy().reshape(2, PAIRS, TOKENS).swapaxes(0, 1)
    return loss.item(), gradient, {name: value[0] for name, value in trainer._metrics["train"].items()}


def own_dpo(pairs, **settings):
    log_probs, reference, mask = map(jnp.asarray, pairs)

    def mean_loss(log_probs):
        ratios = jnp.sum(log_probs * mask, -1) - jnp.sum(reference, -1)
        return jnp.mean(dpo_losses(ratios, jnp.sum(mask, -1), DpoConfig(**settings)))

    return jax.value_and_grad(mean_loss)(log_probs)


@pytest.mark.parametrize(
    "settings",
    [
        dict(loss_type="sigmoid"),
        dict(loss_type="sigmoid", beta=0.5),
        dict(loss_type="ipo"),
        dict(loss_type="hinge", beta=0.3),
        dict(loss_type="robust", label_smoothing=0.1),
    ],
    ids=str,
)
def test_losses_and_gradients_of_dpo_are_those_of_trl(trl, pairs, settings):
    expected, gradient, _ = trl_dpo(trl, pairs, **settings)
    loss, own_gradient = own_dpo(pairs, **settings)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(own_gradient, gradient * pairs[2], rtol=1e-5, atol=1e-7)


def test_conservative_dpo_is_trls_sorted_loss_of_pairs_one_by_one(trl, pairs):
    """TRL has label smoothing of the sigmoid loss in `aot` alone, which is that loss where there is nothing to sort."""
    expected = []
    for pair in range(PAIRS):
        one = tuple(np.tile(x[pair : pair + 1], (PAIRS, 1, 1)) for x in pairs)
        expected.append(trl_dpo(trl, one, "aot", label_smoothing=0.2)[0])
    loss, _ = own_dpo(pairs, loss_type="sigmoid", label_smoothing=0.2)
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)


@pytest.mark.parametrize("center", [0.0, 0.01])
def test_losses_and_gradients_of_rewards_are_those_of_trl(trl, center):
    numbers = np.random.default_rng(1)
    rewards, margin = numbers.normal(size=(PAIRS, 2)).astype(np.float32), numbers.uniform(size=PAIRS).astype(np.float32)
    logits = rows(rewards)[:, None].requires_grad_()
    model = Model(logits=logits)
    trainer = trainer_of(model, args=types.SimpleNamespace(center_rewards_coefficient=center or None))
    inputs = {"margin": torch.tensor(margin), "attention_mask": torch.ones(1)}
    expected = trl.RewardTrainer.compute_loss(trainer, model, inputs)
    expected.backward()
    loss, gradient = jax.value_and_grad(lambda x: jnp.mean(reward_losses(x, margin, center)))(jnp.asarray(rewards))
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, logits.grad.numpy().reshape(2, PAIRS).T, rtol=1e-5, atol=1e-7)
    found = trainer._metrics["train"]
    assert found["accuracy"][0] == pytest.approx(np.mean(rewards[:, 0] > rewards[:, 1]))
