"""The losses of GRPO and its variants, and their gradients, equal TRL's on the same log-probabilities."""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.objectives.policy_gradient import PolicyLoss, group_advantages, policy_loss

ROWS, LENGTH, GENERATIONS = 6, 5, 3
VARIANTS = list(itertools.product(("grpo", "dapo", "dr_grpo"), ("token", "sequence"), (0.0, 0.04), (True, False)))


def settings(loss_type="dapo", level="token", beta=0.0, corrected=True):
    return PolicyLoss(
        loss_type=loss_type,
        epsilon=0.2,
        epsilon_high=0.28,
        beta=beta,
        importance_sampling_level=level,
        use_bias_correction_kl=corrected,
        max_completion_length=LENGTH + 2,
    )


def numbers():
    """Log-probabilities whose ratios leave the bounds on both sides, and completions of all lengths, 0 among them."""
    draw = np.random.default_rng(0)
    log_probs = draw.uniform(-3, 0, (ROWS, LENGTH)).astype(np.float32)
    old, reference = (log_probs + draw.normal(0, 0.4, (2, ROWS, LENGTH))).astype(np.float32)
    lengths = np.array([LENGTH, 1, 3, 2, 4, 0])  # the last is masked: its completion was truncated
    mask = np.arange(LENGTH) < lengths[:, None]
    advantages = group_advantages(draw.normal(size=ROWS), GENERATIONS, "group")
    return log_probs, old, reference, advantages, mask


def ours(config, micro_batches=1):
    log_probs, old, reference, advantages, mask = numbers()

    @jax.jit
    def terms(log_probs):
        def part(rows):
            counts = {"tokens": mask.sum(), "sequences": ROWS}
            arrays = log_probs[rows], old[rows], reference[rows], advantages[rows], mask[rows]
            return policy_loss(*arrays, config, **counts)

        parts = [part(np.arange(start, ROWS, micro_batches)) for start in range(micro_batches)]
        total = jax.tree.map(lambda *values: sum(values), *parts)
        return total.loss, total

    (loss, total), gradient = jax.value_and_grad(terms, has_aux=True)(jnp.asarray(log_probs))
    return np.asarray(loss), np.asarray(gradient), total


def test_losses_and_gradients_are_those_of_trl():
    torch = pytest.importorskip("torch")
    trainer_class = pytest.importorskip("trl").GRPOTrainer
    log_probs, old, reference, advantages, mask = map(torch.tensor, numbers())
    for variant in VARIANTS:
        config = settings(*variant)
        leaf = log_probs.clone().requires_grad_()
        trainer = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *_, leaf=leaf, **__: (leaf, torch.zeros_like(leaf), None),
            accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
            args=SimpleNamespace(use_bias_correction_kl=variant[3], delta=None, steps_per_generation=1),
            model=SimpleNamespace(training=True),
            beta=config.beta,
            loss_type=config.loss_type,
            importance_sampling_level=config.importance_sampling_level,
            epsilon_low=config.epsilon,
            epsilon_high=config.epsilon_high,
            max_completion_length=config.max_completion_length,
            current_gradient_accumulation_steps=1,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            aux_loss_enabled=False,
            use_vllm=False,
            _entropy_bonus_enabled=False,
            _metrics={"train": defaultdict(list)},
        )
        ids = torch.zeros((ROWS, LENGTH), dtype=torch.long)
        loss = trainer_class._compute_loss(
            trainer,
            None,
            {
                "prompt_ids": ids[:, :1],
                "prompt_mask": torch.ones_like(ids[:, :1]),
                "completion_ids": ids,
                "completion_mask": mask.int(),
                "advantages": advantages,
                "old_per_token_logps": old,
                "ref_per_token_logps": reference,
                "num_items_in_batch": mask.sum(),
            },
        )
        loss.backward()
        metrics = trainer._metrics["train"]
        found, gradient, terms = ours(config)
        np.testing.assert_allclose(found, loss.detach(), rtol=1e-5, atol=1e-6, err_msg=str(variant))
        np.testing.assert_allclose(gradient, leaf.grad, rtol=1e-5, atol=1e-6, err_msg=str(variant))
        if config.beta:
            np.testing.assert_allclose(terms.kl, metrics["kl"][0], rtol=1e-5)
        if config.importance_sampling_level == "token":
            np.testing.assert_allclose(terms.clipped_low, metrics["clip_ratio/low_mean"][0], rtol=1e-5)
            np.testing.assert_allclose(terms.clipped_high, metrics["clip_ratio/high_mean"][0], rtol=1e-5)
            assert terms.clipped_low > 0 and terms.clipped_high > 0


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_losses_of_micro_batches_add_up_to_that_of_the_batch(loss_type):
    whole, gradient, terms = ours(settings(loss_type, beta=0.04))
    parts, gradient_of_parts, terms_of_parts = ours(settings(loss_type, beta=0.04), micro_batches=3)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    np.testing.assert_allclose(gradient_of_parts, gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jax.tree.leaves(terms_of_parts), jax.tree.leaves(terms), rtol=1e-5)


def test_what_padding_holds_is_not_read():
    log_probs, old, reference, advantages, mask = numbers()
    config = settings(beta=0.04, level="sequence")
    counts = {"tokens": mask.sum(), "sequences": ROWS}

    def loss(log_probs, old, reference):
        return policy_loss(log_probs, old, reference, advantages, mask, config, **counts).loss

    clean = jax.value_and_grad(loss)(log_probs, old, reference)
    bad = np.where(mask, 0, np.nan).astype(np.float32)
    found = jax.value_and_grad(loss)(log_probs + bad, old + bad, reference + bad)
    np.testing.assert_array_equal(found[0], clean[0])
    np.testing.assert_array_equal(np.asarray(found[1])[mask], np.asarray(clean[1])[mask])


def test_advantages_compare_the_completions_of_one_prompt():
    rewards = np.array([1.0, 0.0, 2.0, 5.0, 5.0, 5.0])
    spread = np.std([1, 0, 2], ddof=1)
    np.testing.assert_allclose(group_advantages(rewards, 3, "none"), [0, -1, 1, 0, 0, 0])
    np.testing.assert_allclose(group_advantages(rewards, 3, "group")[:3], np.array([0, -1, 1]) / (spread + 1e-4))
    expected = np.array([0, -1, 1, 0, 0, 0]) / (np.std(rewards, ddof=1) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, 3, "batch"), expected, rtol=1e-6)
    assert group_advantages(rewards, 3, "group").dtype == np.float32
