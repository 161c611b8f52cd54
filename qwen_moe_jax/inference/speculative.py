"""Speculative decoding: the next-token head proposes tokens, and the model verifies several in one forward pass.

The head reads each token that was decoded together with the model's state of the token before it, as in training, and
proposes the next; from its own state it proposes further ones. A proposal is what the row would choose from the head's
logits, with its own settings and random numbers. The model then chooses every token itself, from its own logits and
with the same random numbers, and goes on as long as what it chooses was proposed. So a text, and the distribution of
texts, is that of plain decoding, whatever the head proposes; a good head only makes it arrive in fewer passes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qwen_moe_jax.inference.sampling import advance, choose, process_logits
from qwen_moe_jax.inference.settings import SamplingSettings, SamplingState
from qwen_moe_jax.model.base import LogitsOf, Model
from qwen_moe_jax.model.cache import Cache
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.model.decoder import DecoderOutput
from qwen_moe_jax.model.inputs import ModelInputs, checked_inputs
from qwen_moe_jax.model.output import ModelOutput, RouterOutput
from qwen_moe_jax.moe.replay import packed_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Drafts:
    """The next-token head's state between two passes of the model.

    Attributes:
        cache: the head's keys and values, of tokens before those below.
        token_BT: int32; the tokens that were decoded by the last pass; T is the number of proposals and one more.
        hidden_BTD: the model's state of the token before each of them.
        count_B: int32; how many they are.
    """

    cache: Cache
    token_BT: jax.Array
    hidden_BTD: jax.Array
    count_B: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LogitsAndStates(LogitsOf):
    """Reads out logits, and as `hidden_states` [1, B, T, D] the states after the final norm."""

    def __call__(self, model: Model, out: DecoderOutput, inputs: ModelInputs) -> ModelOutput:
        """See `ReadOut`."""
        return dataclasses.replace(super().__call__(model, out, inputs), hidden_states=out.hidden_BTD[None])


def read_with_states(
    model: CausalLM,
    tokens_BT: jax.Array,
    count_B: jax.Array,
    cache: Cache,
    logits_at_B: jax.Array | None = None,
    *,
    return_routing: bool = False,
) -> tuple[jax.Array, jax.Array, Cache, jax.Array | None]:
    """Reads the first `count_B` tokens of each row: logits (of tokens `logits_at_B` if given), states, cache, experts.

    The experts are `packed_experts`, where they are asked for.
    """
    inputs = checked_inputs(
        tokens_BT, jnp.arange(tokens_BT.shape[1], dtype=jnp.int32) < count_B[:, None], logits_at=logits_at_B
    )
    out = model.run(inputs, _LogitsAndStates(output_router_logits=return_routing), cache=cache)
    return out.logits, out.hidden_states[0], out.cache, packed_experts(out.router) if return_routing else None


def packed_experts(router: RouterOutput) -> jax.Array:
    """The experts of every token in every sparse layer, [B, T, L_sparse, A], in `moe.replay.packed_dtype`."""
    trace = router.trace
    return jnp.moveaxis(trace.experts, 0, 2).astype(packed_dtype(trace.logits.shape[-1]))


@jax.jit(donate_argnames=("cache", "logits_BV", "head_cache"), static_argnames="return_routing")
def prefill(
    model: CausalLM,
    cache: Cache,
    tokens_BT: jax.Array,
    count_B: jax.Array,
    logits_BV: jax.Array | None,
    head_cache: Cache,
    before_B1D: jax.Array,
    *,
    return_routing: bool = False,
) -> tuple[Cache, jax.Array, jax.Array | None, Drafts]:
    """`programs.prefill` that also reads the tokens into the head's cache.

    `before_B1D` is the model's state of the token before them in each row (`last_state`).
    """
    is_start_B = cache.lengths_B == 0
    new_B1V, hidden_BTD, cache, experts_BTLA = read_with_states(
        model, tokens_BT, count_B, cache, count_B - 1, return_routing=return_routing
    )
    # The head reads a token with the state of the one before: the first of a text has none, and is left out.
    start_B1, start_B11 = is_start_B[:, None], is_start_B[:, None, None]
    head_tokens_BT = jnp.where(start_B1, jnp.roll(tokens_BT, -1, axis=1), tokens_BT)
    shifted_BTD = jnp.concatenate([before_B1D.astype(hidden_BTD.dtype), hidden_BTD[:, :-1]], axis=1)
    head_hidden_BTD = jnp.where(start_B11, hidden_BTD, shifted_BTD)
    head_count_B = jnp.where(is_start_B, jnp.maximum(count_B - 1, 0), count_B)
    mask_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32) < head_count_B[:, None]
    _, _, head_cache = model.mtp_step(head_tokens_BT, head_hidden_BTD, mask_BT, head_cache)
    is_read_B = count_B > 0
    last_B1D = jnp.where(is_read_B[:, None, None], _at(hidden_BTD, count_B - 1), before_B1D)
    drafts = Drafts(cache=head_cache, token_BT=tokens_BT[:, :1], hidden_BTD=last_B1D, count_B=jnp.ones_like(count_B))
    return (
        cache,
        jnp.where(is_read_B[:, None], new_B1V[:, 0], new_B1V[:, 0] if logits_BV is None else logits_BV),
        experts_BTLA,
        drafts,
    )


@jax.jit
def last_state(drafts: Drafts) -> jax.Array:
    """The model's state of the last token of each row that it has read, [B, 1, D]."""
    return _at(drafts.hidden_BTD, drafts.count_B - 1)


@functools.partial(jax.jit, static_argnames="proposals")
def begin(drafts: Drafts, token_B: jax.Array, *, proposals: int) -> Drafts:
    """The state after `prefill` and the choice of the first tokens."""
    hidden_BTD = jnp.pad(_at(drafts.hidden_BTD, drafts.count_B - 1), ((0, 0), (0, proposals), (0, 0)))
    token_BT = jnp.pad(token_B[:, None], ((0, 0), (0, proposals)))
    return dataclasses.replace(drafts, token_BT=token_BT, hidden_BTD=hidden_BTD, count_B=jnp.ones_like(token_B))


def propose(
    model: CausalLM, drafts: Drafts, left_B: jax.Array, settings: SamplingSettings, sampling: SamplingState
) -> tuple[list[jax.Array], Cache]:
    """Tokens [B] that may follow the last one, one after the other, and the head's cache with what was decoded.

    Args:
        model: with a next-token head.
        drafts: after the last pass.
        left_B: int32; tokens that each row may still generate, 0 for one that has ended.
        settings: of the rows.
        sampling: their state, after the last token.
    """
    size = drafts.token_BT.shape[1]
    mask_BT = (jnp.arange(size, dtype=jnp.int32) < drafts.count_B[:, None]) & (left_B > 0)[:, None]
    logits_BV, hidden_BD, cache = model.mtp_step(drafts.token_BT, drafts.hidden_BTD, mask_BT, drafts.cache)
    lengths_B, proposed = cache.lengths_B, list[jax.Array]()
    while len(proposed) < size - 1:
        if proposed:
            goes_B = left_B > len(proposed)
            sampling = advance(sampling, proposed[-1], goes_B)
            logits_BV, hidden_BD, cache = model.mtp_step(
                proposed[-1][:, None], hidden_BD[:, None], goes_B[:, None], cache
            )
        proposed.append(choose(process_logits(logits_BV, settings, sampling), settings, sampling))
    # What was read of the proposals is read again with the model's own states.
    return proposed, dataclasses.replace(cache, lengths_B=lengths_B)


def _at(x_BTD: jax.Array, index_B: jax.Array) -> jax.Array:
    """One token of each row, [B, 1, D]."""
    return jnp.take_along_axis(x_BTD, jnp.maximum(index_B, 0)[:, None, None], axis=1)
