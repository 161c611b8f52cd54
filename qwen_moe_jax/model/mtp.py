"""The next-token head (multi-token prediction): one decoder layer that predicts the token after the next.

From the decoder's final state of token t and the embedding of token t + 1 it predicts token t + 2, by the decoder's
own embedding and output head (DeepSeek-V3, arXiv 2412.19437; Qwen3-Next). In training it is a second loss; in decoding
its predictions are drafts that the decoder verifies several at a time.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_moe_jax.config import ExecutionConfig, ModelConfig
from qwen_moe_jax.model.cache import Cache, LayerCache
from qwen_moe_jax.model.inputs import TokenContext
from qwen_moe_jax.model.layer import DecoderLayer, LayerOutput
from qwen_moe_jax.model.remat import with_remat
from qwen_moe_jax.moe.stats import RouterStats
from qwen_moe_jax.nn.linear import Linear
from qwen_moe_jax.nn.norm import rms_norm
from qwen_moe_jax.nn.parameters import ParameterFactory

#: Logical axes of `fc`: from an embedding and a hidden state, side by side, to a hidden state.
_FC = ("embed", "embed_pair")


class NextTokenHead(nnx.Module):
    """`norm(layer(fc([norm(embedding), norm(hidden)])))`: the embedding first. The layer is one of full attention."""

    def __init__(self, config: ModelConfig, make: ParameterFactory):
        width = config.hidden_size
        norm = functools.partial(
            rms_norm, size=width, eps=config.rms_norm_eps, make=make, zero_centered=config.zero_centered_norm
        )
        self.pre_fc_norm_embedding = norm("mtp.pre_fc_norm_embedding")
        self.pre_fc_norm_hidden = norm("mtp.pre_fc_norm_hidden")
        self.fc = Linear("mtp.fc", _FC, (width, 2 * width), make)
        self.layers = nnx.List([DecoderLayer("mtp.layers.0", config.mtp_layer, config, make)])
        self.norm = norm("mtp.norm")

    def __call__(
        self,
        embedded_BTD: jax.Array,
        hidden_BTD: jax.Array,
        context: TokenContext,
        execution: ExecutionConfig,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None, RouterStats | None]:
        """The states [B, T, D] for the output head, the cache with the new tokens, where there is one, and what the
        layer's router did, where it is sparse.

        Args:
            embedded_BTD: embedding of the token after each one.
            hidden_BTD: of each token, after the decoder's final norm; of a draft, what this head returned for it.
            context: segments and rotations of the tokens. A token without another after it in its segment is padding.
            execution: with no setting None.
            cache: of the previous tokens, as `Cache` of the one layer. None: all tokens are given.
        """
        with jax.named_scope("mtp"):
            pair = self.pre_fc_norm_embedding(embedded_BTD), self.pre_fc_norm_hidden(hidden_BTD)
            mixed_BTD = self.fc(jnp.concatenate(pair, axis=-1))
            [layer] = self.layers
            if cache is None:
                out = with_remat(functools.partial(_run_layer, execution=execution), execution, unrolled=True)(
                    layer, mixed_BTD, context
                )
                return self.norm(out.hidden_BTD), None, out.stats
            [[stored]] = cache.segments
            out = layer(
                mixed_BTD,
                context,
                execution,
                cache=LayerCache(stored=stored, layer=jnp.int32(0), lengths_B=cache.lengths_B),
            )
            new_B = jnp.sum(context.token_mask_BT, axis=1, dtype=jnp.int32)
            cache = Cache(segments=((out.cache.stored,),), lengths_B=cache.lengths_B + new_B)
            return self.norm(out.hidden_BTD), cache, out.stats


def following(x_BT: jax.Array, segment_ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What each token's successor in its segment has, and whether there is one.

    Args:
        x_BT: of every token.
        segment_ids_BT: 0 is padding.

    Returns:
        `x_BT` of the next token (0 after the last), and bool [B, T].
    """
    next_BT = jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))
    same_BT = (segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1]) & (segment_ids_BT[:, 1:] != 0)
    return next_BT, jnp.pad(same_BT, ((0, 0), (0, 1)))


def _run_layer(
    layer: DecoderLayer, hidden_BTD: jax.Array, context: TokenContext, *, execution: ExecutionConfig
) -> LayerOutput:
    return layer(hidden_BTD, context, execution)
