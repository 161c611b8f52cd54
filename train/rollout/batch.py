"""Rollouts, and the batch of a step: rollouts as arrays, one a row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.rollout.prompts import Prompt

#: Of NumPy on the host, of JAX on the devices; or its shape.
Array = Any


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One prompt with a completion.

    Attributes:
        prompt: what was continued.
        token_ids: the completion, with its end token if it has one.
        log_probs: of each, float32, by the model's own distribution.
        experts: of all tokens but the last, integers [L_sparse, T, A]; None for a dense model.
        text: of the completion, without special tokens.
        truncated: it was not ended.
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    log_probs: np.ndarray
    experts: np.ndarray | None
    text: str
    truncated: bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """Prompts and completions of a step, each a row. A completion's last token is a target alone, and read by nothing.

    Attributes:
        tokens_BT, positions_BT: int32; a prompt and its completion.
        segment_ids_BT: int32; 1, and 0 for padding.
        targets_BT: int32; the token after each one.
        target_mask_BT: bool; whether the target is of a completion, and learned from.
        log_probs_BT: float32; of the targets, by the model that sampled them, at the temperature of sampling.
        advantages_B: float32.
        experts_BTLA: the experts that sampling used, in `moe.replay.packed_dtype`; None for a dense model.
        reference_log_probs_BT: float32; of the targets, by the reference; None without one.
    """

    tokens_BT: Array
    positions_BT: Array
    segment_ids_BT: Array
    targets_BT: Array
    target_mask_BT: Array
    log_probs_BT: Array
    advantages_B: Array
    experts_BTLA: Array | None = None
    reference_log_probs_BT: Array | None = None

    @property
    def experts_LBTA(self) -> jax.Array | None:
        """The experts as `CausalLM.token_losses` takes them for replay."""
        return None if self.experts_BTLA is None else jnp.moveaxis(jnp.asarray(self.experts_BTLA), 2, 0)


def rollout_batch(
    rollouts: Sequence[Rollout], advantages: np.ndarray, seq_len: int, *, mask_truncated: bool
) -> RolloutBatch:
    """The arrays of rollouts, which have at most `seq_len` tokens, without a reference.

    Args:
        rollouts: of a step.
        advantages: float32 [B].
        seq_len: T.
        mask_truncated: learn nothing from completions without an end.
    """
    shape = len(rollouts), seq_len
    tokens_BT, targets_BT, segment_ids_BT = np.zeros((3, *shape), np.int32)
    target_mask_BT, log_probs_BT = np.zeros(shape, bool), np.zeros(shape, np.float32)
    experts_BTLA = None
    if (experts := rollouts[0].experts) is not None:
        any_experts = np.arange(experts.shape[2], dtype=experts.dtype)  # of padding, never read
        experts_BTLA = np.broadcast_to(any_experts, (*shape, experts.shape[0], experts.shape[2])).copy()
    for row, rollout in enumerate(rollouts):
        ids = [*rollout.prompt.token_ids, *rollout.token_ids]
        read, first = len(ids) - 1, len(rollout.prompt.token_ids) - 1
        tokens_BT[row, :read], targets_BT[row, :read], segment_ids_BT[row, :read] = ids[:-1], ids[1:], 1
        target_mask_BT[row, first:read] = not (mask_truncated and rollout.truncated)
        log_probs_BT[row, first:read] = rollout.log_probs
        if experts_BTLA is not None and rollout.experts is not None:
            experts_BTLA[row, :read] = np.swapaxes(rollout.experts, 0, 1)
    return RolloutBatch(
        tokens_BT=tokens_BT,
        positions_BT=np.where(segment_ids_BT > 0, np.arange(seq_len, dtype=np.int32), 0),
        segment_ids_BT=segment_ids_BT,
        targets_BT=targets_BT,
        target_mask_BT=target_mask_BT,
        log_probs_BT=log_probs_BT,
        advantages_B=np.asarray(advantages, np.float32),
        experts_BTLA=experts_BTLA,
    )
