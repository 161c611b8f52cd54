"""Embeddings of token sequences: the mean of a model's last hidden states, or that of the last token."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.model.base import Model, ReadOut, token_at
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.model.decoder import DecoderOutput
from qwen_moe_jax.model.inputs import ModelInputs, checked_inputs
from qwen_moe_jax.sharding.positions import RowOrder
from qwen_moe_jax.sharding.rules import BATCH

Pooling = Literal["mean", "last"]

#: Padded lengths: from the first, each four times the one before, up to the longest sequence.
SHORTEST = 64
#: Tokens of a batch, padding included, where sequences are short; at most so many rows on one device.
TOKENS, MOST_ROWS = 1024, 8


class Embedder:
    """Embeds sequences of up to `max_length` tokens by a few compiled programs.

    An embedding is float32 [D] and of length 1: of the hidden states after the final norm the mean over the tokens, or
    the last token's.

    Args:
        model: in eval mode.
        max_length: tokens of the longest sequence.
        pooling: which of the two.
    """

    def __init__(self, model: CausalLM, max_length: int, pooling: Pooling = "mean"):
        self._model = model
        self._read_out = HiddenOf(pooling=pooling)
        self.max_length = max_length
        shards = math.prod(model.mesh.shape[axis] for axis in BATCH)
        lengths = [SHORTEST]
        while lengths[-1] < max_length:
            lengths.append(lengths[-1] * 4)
        lengths[-1] = max(SHORTEST, min(lengths[-1], max_length))
        self._rows = {length: shards * min(MOST_ROWS, max(1, TOKENS // length)) for length in lengths}

    def compile(self, report: Callable[[str, int, int], None] = lambda name, done, total: None) -> None:
        """Compiles every program, so that `embed` compiles none. `report` gets a name, and how many are done of all."""
        for done, length in enumerate(self._rows):
            report(f"embeddings of {length} tokens", done, len(self._rows))
            self._run([[0]], length)

    def embed(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 [len(sequences), D].

        Raises:
            RequestError: an empty sequence, or one of more than `max_length` tokens.
        """
        for number, ids in enumerate(sequences):
            if not 1 <= len(ids) <= self.max_length:
                raise RequestError(f"input {number} has {len(ids)} tokens, expected 1 to {self.max_length}.")
        found: dict[int, np.ndarray] = {}
        waiting = sorted(range(len(sequences)), key=lambda number: -len(sequences[number]))
        while waiting:
            length = min(size for size in self._rows if size >= len(sequences[waiting[0]]))
            batch, waiting = waiting[: self._rows[length]], waiting[self._rows[length] :]
            rows = self._run([sequences[number] for number in batch], length)
            found |= zip(batch, rows, strict=True)
        return np.stack([found[number] for number in range(len(sequences))])

    def _run(self, sequences: Sequence[Sequence[int]], length: int) -> np.ndarray:
        tokens_BT, mask_BT = (np.zeros((self._rows[length], length), np.int32) for _ in range(2))
        last_B = np.zeros(len(tokens_BT), np.int32)
        for row, ids in enumerate(sequences):
            tokens_BT[row, : len(ids)] = ids
            mask_BT[row, : len(ids)] = 1
            last_B[row] = len(ids) - 1
        out = self._model.run(checked_inputs(tokens_BT, mask_BT, logits_at=last_B), self._read_out)
        return np.asarray(jax.device_get(out.embedding_BD))[: len(sequences)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingOutput:
    """Embeddings, float32 [B, D], each of length 1; those of rows of padding have no meaning."""

    embedding_BD: jax.Array

    def first_rows(self, batch: int) -> "EmbeddingOutput":
        """The same without the rows of padding that filled the mesh."""
        return EmbeddingOutput(embedding_BD=self.embedding_BD[:batch])

    def restored(self, order: RowOrder) -> "EmbeddingOutput":
        """The same: rows have no order."""
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiddenOf(ReadOut):
    """Reads out the hidden states after the final norm, as one vector of length 1 for each row."""

    pooling: Pooling = "mean"

    def __call__(self, model: Model, out: DecoderOutput, inputs: ModelInputs) -> EmbeddingOutput:
        """See `ReadOut`."""
        hidden_BTD = out.hidden_BTD.astype(jnp.float32)
        if self.pooling == "last":
            pooled_BD = token_at(hidden_BTD, inputs.logits_at_B)
        else:
            mask_BT1 = (inputs.segment_ids_BT != 0)[..., None]
            pooled_BD = jnp.sum(jnp.where(mask_BT1, hidden_BTD, 0), axis=1)  # its length does not matter
        norm_B1 = jnp.sqrt(jnp.sum(jnp.square(pooled_BD), axis=-1, keepdims=True))
        return EmbeddingOutput(embedding_BD=pooled_BD / jnp.maximum(norm_B1, jnp.finfo(jnp.float32).tiny))
