"""The cache of a hybrid gives what the full forward gives, and what linear layers keep does not grow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.inference import programs
from qwen_moe_jax.inference.settings import initial_state, sampling_settings
from qwen_moe_jax.model.cache import Cache, RecurrentState, abstract_cache, empty_cache
from qwen_moe_jax.model.causal_lm import CausalLM
from tests.distance import assert_near, relative_l2
from tests.model.hybrid_configs import hybrid_config, hybrid_model
from tests.subject import on_mesh

# Chunks, the recurrence of single tokens and chunks that start elsewhere sum in other orders: 1e-6 for each, four
# layers deep with matrices of .1. One token at a time it was 1.03e-5 at the worst position, on an AMD EPYC.
TOLERANCE = 1.5e-5
MESH = dict(data=2, expert=2, tensor=2)
CONFIG = hybrid_config("lLflLf")
ROWS, LENGTH = 4, 150
TOKENS_BT = np.random.default_rng(0).integers(0, 98, (ROWS, LENGTH)).astype(np.int32)
#: Tokens that each row reads in each step of 70: across the border of a chunk, at it, few, and none.
PREFILL_SB = np.array([(70, 64, 3, 0), (1, 70, 70, 65), (69, 0, 0, 70)], np.int32)
#: And one at a time: rows that pause go on as if they had not.
DECODE_SB = np.array([(1, 1, 1, 1), (0, 1, 0, 1), (1, 1, 1, 0)] * 2, np.int32)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return hybrid_model(CONFIG)


@pytest.fixture(scope="module")
def expected_BTV(model) -> np.ndarray:
    return np.asarray(model(TOKENS_BT).logits)


def new_cache(model: CausalLM, max_length: int = LENGTH, dtype: str = "float32") -> Cache:
    sizes = dict(batch=ROWS, max_length=max_length, max_write=70, dtype=dtype)
    return empty_cache(abstract_cache(model.config, model.mesh, **sizes))


@jax.jit(donate_argnames="cache")
def extend(model: CausalLM, tokens_BT: jax.Array, counts_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    token_mask_BT = jnp.arange(tokens_BT.shape[1]) < counts_B[:, None]
    out = model(tokens_BT, token_mask_BT, cache=cache)
    return out.logits, out.cache


def next_tokens(known_B: np.ndarray, counts_B: np.ndarray, length: int, padding: int = 0) -> np.ndarray:
    tokens_BT = np.full((ROWS, length), padding, np.int32)
    for row, (known, count) in enumerate(zip(known_B, counts_B, strict=True)):
        tokens_BT[row, :count] = TOKENS_BT[row, known : known + count]
    return tokens_BT


def read(model, cache, steps_SB, length, known_B, expected_BTV) -> tuple[np.ndarray, Cache]:
    """Reads the texts step by step; each token's logits are those of the full forward. Tokens so far, and the cache."""
    for counts_B in steps_SB:
        logits_BTV, cache = extend(model, next_tokens(known_B, counts_B, length), counts_B, cache)
        for row, (known, count) in enumerate(zip(known_B, counts_B, strict=True)):
            found_TV, expected_TV = logits_BTV[row, :count], expected_BTV[row, known : known + count]
            assert_near(found_TV, expected_TV, TOLERANCE, f"row {row}, positions {known} to {known + count}")
        known_B = known_B + counts_B
    return known_B, cache


@pytest.mark.parametrize("axes", [{}, MESH], ids=["one_device", "data2_expert2_tensor2"])
def test_ragged_chunked_prefill_and_decoding_equal_the_full_forward_at_every_position(model, expected_BTV, axes):
    """Padding on the right of a prompt leaves no trace: transformers would decode from another state."""
    if axes:
        model = on_mesh(model, qmj.make_mesh(**axes))
    nothing_B = np.zeros(ROWS, np.int32)
    known_B, cache = read(model, new_cache(model), PREFILL_SB, 70, nothing_B, expected_BTV)
    known_B, cache = read(model, cache, DECODE_SB, 1, known_B, expected_BTV)
    np.testing.assert_array_equal(cache.lengths_B, known_B)


def test_a_text_read_token_by_token_has_the_logits_of_the_full_forward(model, expected_BTV):
    ones_SB, nothing_B = np.ones((70, ROWS), np.int32), np.zeros(ROWS, np.int32)
    read(model, new_cache(model), ones_SB, 1, nothing_B, expected_BTV)


@pytest.mark.parametrize("length", [1, 70])
def test_a_row_without_tokens_keeps_its_state_and_padding_changes_nothing(model, expected_BTV, length):
    """Bit for bit, whatever token stands in the padding."""
    nothing_B = np.zeros(ROWS, np.int32)
    known_B, cache = read(model, new_cache(model), PREFILL_SB[:2], 70, nothing_B, expected_BTV)
    counts_B = np.minimum([length, 3, 0, 1], length).astype(np.int32)
    before, copy = jax.tree.map(np.array, cache), jax.tree.map(jnp.copy, cache)
    logits_BTV, after = extend(model, next_tokens(known_B, counts_B, length), counts_B, cache)
    other_BTV, other = extend(model, next_tokens(known_B, counts_B, length, padding=17), counts_B, copy)
    real_BT = np.arange(length) < counts_B[:, None]
    np.testing.assert_array_equal(np.asarray(logits_BTV)[real_BT], np.asarray(other_BTV)[real_BT])
    for old, new, same in zip(*map(jax.tree.leaves, (before, after, other)), strict=True):
        np.testing.assert_array_equal(new, same)
        rows = (
            (old != new).any(axis=tuple(axis for axis in range(old.ndim) if axis != 1)) if old.ndim > 1 else old != new
        )
        np.testing.assert_array_equal(rows, counts_B > 0)


def test_a_row_of_length_0_starts_from_nothing_whatever_is_stored(model, expected_BTV):
    nothing_B = np.zeros(ROWS, np.int32)
    _, cache = read(model, new_cache(model), PREFILL_SB[:1], 70, nothing_B, expected_BTV)
    cache = jax.tree.map(lambda x: jnp.zeros_like(x) if x.ndim == 1 else x, cache)
    _, cache = read(model, cache, PREFILL_SB[:1], 70, nothing_B, expected_BTV)
    cache = jax.tree.map(lambda x: jnp.zeros_like(x) if x.ndim == 1 else x, cache)
    read(model, cache, DECODE_SB[:1], 1, nothing_B, expected_BTV)


def test_a_bfloat16_cache_keeps_states_in_float32_and_stays_near(model, expected_BTV):
    """Keys, values and columns are rounded by up to 2**-9 of themselves; a state would add its roundings up."""
    model = hybrid_model(hybrid_config("LLFLLF"))
    expected_BTV = np.asarray(model(TOKENS_BT).logits)
    cache = new_cache(model, dtype="bfloat16")
    dtypes = {type(kept): [str(leaf.dtype) for leaf in jax.tree.leaves(kept)] for kept in cache.segments[0]}
    assert dtypes[RecurrentState] == ["float32", "uint16"], "columns as their bits, on a CPU"
    _, cache = extend(model, TOKENS_BT[:, :70], np.full(ROWS, 70, np.int32), cache)
    logits_BTV, _ = extend(model, TOKENS_BT[:, 70:71], np.ones(ROWS, np.int32), cache)
    assert 1e-5 < relative_l2(logits_BTV[:, 0], expected_BTV[:, 70]) < 2e-2


def state_bytes(config: qmj.ModelConfig, *, batch: int, dtype: str) -> int:
    """Sum over linear layers of B * (N * Hk * Hv * 4 + (W - 1) * C * itemsize)."""
    linear, layers = config.linear_attention, sum(kind.mixer == "linear" for kind in config.layers)
    state = 4 * linear.num_value_heads * linear.key_head_dim * linear.value_head_dim
    return layers * batch * (state + (linear.conv_kernel_dim - 1) * linear.conv_dim * jnp.dtype(dtype).itemsize)


def kept_bytes(cache: Cache, kind: type) -> int:
    kept = [kept for period in cache.segments for kept in period if isinstance(kept, kind)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_what_the_formula_says_and_a_state_does_not_grow_with_the_length(dtype):
    for config in (CONFIG, hybrid_config("LWLF", linear=dict(conv_kernel_dim=2, num_value_heads=8))):
        sizes = dict(batch=4, max_write=16, dtype=dtype)
        short, long = (abstract_cache(config, qmj.make_mesh(), max_length=length, **sizes) for length in (64, 6400))
        expected = state_bytes(config, batch=4, dtype=dtype)
        assert kept_bytes(short, RecurrentState) == kept_bytes(long, RecurrentState) == expected
        attention = config.attention
        slots = sum({"full": 64, "sliding": 5 + 16 - 1, "linear": 0}[kind.mixer] for kind in config.layers)
        slot = 2 * attention.num_key_value_heads * attention.head_dim * jnp.dtype(dtype).itemsize
        in_all = sum(leaf.nbytes for leaf in jax.tree.leaves(empty_cache(short).segments))
        assert in_all == expected + 4 * slots * slot


def test_every_device_holds_the_states_of_its_rows_and_heads_and_no_more():
    for axes in (MESH, dict(data=2, fsdp=2, expert=2)):
        sizes = dict(batch=8, max_length=64, max_write=16, dtype="float32")
        cache = empty_cache(abstract_cache(CONFIG, qmj.make_mesh(**axes), **sizes))
        tensor = axes.get("tensor", 1)
        rows, linear = tensor, CONFIG.linear_attention
        kept = cache.segments[0][0]
        shapes = [{shard.data.shape[1:] for shard in leaf.addressable_shards} for leaf in jax.tree.leaves(kept)]
        heads, sizes = linear.num_value_heads // tensor, (linear.key_head_dim, linear.value_head_dim)
        assert shapes == [{(rows, heads, *sizes)}, {(rows, linear.conv_kernel_dim - 1, linear.conv_dim // tensor)}]
        held = sum(shard.data.nbytes for leaf in jax.tree.leaves(kept) for shard in leaf.addressable_shards)
        assert held == sum(leaf.nbytes for leaf in jax.tree.leaves(kept)), "nothing is held twice"


@pytest.mark.parametrize("axes", [{}, MESH], ids=["one_device", "data2_expert2_tensor2"])
def test_decoding_writes_states_where_they_are_stored(axes):
    """By the compiler's own account, for 16 linear layers of large states: a copy of the cache would be 1."""
    config = hybrid_config("L" * 16, linear=dict(key_head_dim=64, value_head_dim=64), vocab_size=64)
    model = CausalLM(config, rngs=None, mesh=qmj.make_mesh(**axes))
    settings = sampling_settings([qmj.GenerationConfig()] * 8, config.vocab_size)
    writing = programs.DecodeState(
        token_B=np.zeros(8, np.int32), left_B=np.ones(8, np.int32), sampling=initial_state(settings, [[]] * 8)
    )
    cache = abstract_cache(config, model.mesh, batch=8, max_length=64, max_write=1, dtype="float32")
    memory = programs.decode.lower(model, cache, writing, settings).compile().memory_analysis()
    held = state_bytes(config, batch=8, dtype="float32") / model.mesh.size
    assert memory.alias_size_in_bytes >= held, "the cache that comes out is the one that went in"
    assert memory.temp_size_in_bytes < 0.5 * held
