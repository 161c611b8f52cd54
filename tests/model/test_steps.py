"""Of tokens that were read together any number can be kept: the cache is then that of having read no other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.model.cache import abstract_cache, empty_cache, keep_tokens, with_steps
from tests.cases import HYBRID_CASES, VOCABULARY
from tests.distance import assert_near

ROWS, BLOCK = 5, 4
LENGTHS = np.array([0, 1, 2, 7, 7])  # tokens before the block: none, and fewer than the convolution has taps
TOKENS = np.random.default_rng(0).integers(1, VOCABULARY, (ROWS, 20))


@functools.cache
def model() -> qmj.CausalLM:
    settings = {"num_hidden_layers": 2, "full_attention_interval": 2, "initializer_range": 0.1}
    config = {**HYBRID_CASES["qwen3_5_text-plain"].config, **settings}
    return qmj.CausalLM(qmj.ModelConfig.from_pretrained(config), rngs=0)


@jax.jit
def read(model, cache, tokens_BT, count_B):
    out = model(tokens_BT, jnp.arange(tokens_BT.shape[1]) < count_B[:, None], cache=cache)
    return out.logits, out.cache


@jax.jit
def read_and_keep(model, cache, tokens_BT, count_B, kept_B):
    logits_BTV, after = read(model, with_steps(cache, tokens_BT.shape[1]), tokens_BT, count_B)
    return logits_BTV, keep_tokens(after, cache.lengths_B, kept_B)


def after(dtype, read_B):
    cache = empty_cache(
        abstract_cache(model().config, model().mesh, batch=ROWS, max_length=32, max_write=16, dtype=dtype)
    )
    for position in range(max(read_B)):
        _, cache = read(model(), cache, TOKENS[:, position : position + 1], (position < read_B).astype(np.int32))
    return cache


def block(start_B):
    return np.stack([row[start : start + BLOCK] for row, start in zip(TOKENS, start_B, strict=True)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kept_B", [np.array([0, 1, 2, 3, 4]), np.array([4, 3, 0, 1, 2])], ids=str)
def test_kept_tokens_are_all_that_the_cache_has_read(dtype, kept_B):
    count_B = np.maximum(kept_B, [BLOCK, 1, 3, BLOCK, 2])  # what is read and not kept; what is padding
    before = after(dtype, LENGTHS)
    logits_BTV, cache = read_and_keep(model(), before, block(LENGTHS), count_B, kept_B)
    expected = after(dtype, LENGTHS + kept_B)
    assert cache.lengths_B.tolist() == expected.lengths_B.tolist() == (LENGTHS + kept_B).tolist()
    tolerance = 1e-5 if dtype == "float32" else 2e-2  # of keys, values and columns that are rounded
    found, wanted = (
        read(model(), each, block(LENGTHS + kept_B), np.full(ROWS, BLOCK))[0] for each in (cache, expected)
    )
    assert_near(found, wanted, tolerance, "logits of what follows")
    plain, _ = read(model(), before, block(LENGTHS), count_B)
    real = np.arange(BLOCK) < count_B[:, None]
    assert_near(np.asarray(logits_BTV)[real], np.asarray(plain)[real], tolerance, "logits of the tokens read together")
