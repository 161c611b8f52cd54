"""A cache gives what the full forward gives, holds as many bytes as its formula says, and is written where it lies."""

import jax
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.inference import programs
from qwen_moe_jax.inference.settings import initial_state, sampling_settings
from qwen_moe_jax.model.cache import Cache, abstract_cache, empty_cache, slots
from qwen_moe_jax.model.causal_lm import CausalLM
from tests.cases import CASES
from tests.distance import assert_near, relative_l2
from tests.subject import on_mesh

# The same float32 sums in another order: some 3e-7 a layer.
TOLERANCE = 1e-5
VOCABULARY = 98  # COMMON's, made to divide over tensor=2
LENGTH = 30  # six windows of 5, and nearly four rings of 5 + 4 - 1
WRITE = 4
MESH = dict(data=2, expert=2, tensor=2)

#: Configs by what is odd about their cache.
CONFIGS = {
    "plain": CASES["qwen3_moe-plain"].config,
    "ring": CASES["mixtral-sliding_without_gate"].config,
    "mixed": {  # two kinds of layer in one period, twice
        **CASES["qwen2_moe-sliding_layer_types"].config,
        "num_hidden_layers": 4,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "mlp_only_layers": [0, 2],
    },
    "yarn": CASES["qwen3_moe-yarn_mscale"].config,
}
TOKENS_BT = np.random.default_rng(0).integers(0, VOCABULARY, (4, LENGTH)).astype(np.int32)
#: How many tokens each row reads in each stretch. Row 0 reads one at a time: it shows the logits of every position. The
#: others read as many as there may be, or as it comes: nothing at times, and at times nothing is all that is left.
COUNTS_SB = np.array(
    [(1, 4 if 4 * step + 4 <= LENGTH else 0, (0, 3, 1, 2)[step % 4], (2, 0, 0, 4, 0)[step % 5]) for step in range(20)]
    + [(1, 0, 0, 0)] * 10,
    np.int32,
)


def config_of(name: str, **settings) -> qmj.ModelConfig:
    large = {"vocab_size": VOCABULARY, "initializer_range": 0.3}  # the Hub's 0.02 would hide errors of tiny models
    return qmj.ModelConfig.from_pretrained({**CONFIGS[name], **large, **settings})


def cache_bytes(config: qmj.ModelConfig, *, batch: int, max_length: int, max_write: int, dtype: str) -> int:
    """2 * sum over layers of B * S * K * H * itemsize."""
    attention = config.attention
    num_slots = sum(slots(config, kind, max_length, max_write) for kind in config.layers)
    return 2 * batch * num_slots * attention.num_key_value_heads * attention.head_dim * jax.numpy.dtype(dtype).itemsize


def new_cache(model: CausalLM, max_length: int = LENGTH + 2, dtype: str = "float32") -> Cache:
    sizes = dict(batch=len(TOKENS_BT), max_length=max_length, max_write=WRITE, dtype=dtype)
    return empty_cache(abstract_cache(model.config, model.mesh, **sizes))


@jax.jit(donate_argnames="cache")
def extend(model: CausalLM, tokens_BT: jax.Array, counts_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    token_mask_BT = jax.numpy.arange(tokens_BT.shape[1]) < counts_B[:, None]
    out = model(tokens_BT, token_mask_BT, cache=cache, logits_at=counts_B - 1)
    return out.logits[:, 0], out.cache


def stretch(known_B: np.ndarray, count_B: np.ndarray, padding: int = 0) -> np.ndarray:
    """The next tokens of each row, with padding behind them."""
    tokens_BT = np.full((len(count_B), WRITE), padding, np.int32)
    for row, (known, count) in enumerate(zip(known_B, count_B, strict=True)):
        tokens_BT[row, :count] = TOKENS_BT[row, known : known + count]
    return tokens_BT


def read(model: CausalLM, counts_SB: np.ndarray, cache: Cache) -> tuple[dict[tuple[int, int], np.ndarray], Cache]:
    """Reads the texts by stretches; the logits that came out, by row and position, and the cache."""
    logits, known_B = {}, np.zeros(len(TOKENS_BT), np.int32)
    for count_B in counts_SB:
        new_BV, cache = extend(model, stretch(known_B, count_B), count_B, cache)
        known_B = known_B + count_B
        logits |= {(row, known_B[row] - 1): np.asarray(new_BV[row]) for row in np.flatnonzero(count_B)}
    return logits, cache


def to_host(cache: Cache) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(cache)]


@pytest.fixture(scope="module", params=CONFIGS)
def case(request) -> tuple[CausalLM, np.ndarray]:
    """A model on one device, and the logits of its full forward."""
    model = CausalLM(config_of(request.param), rngs=nnx.Rngs(0))
    return model, np.asarray(model(TOKENS_BT).logits)


@pytest.mark.parametrize("axes", [{}, MESH], ids=["one_device", "data2_expert2_tensor2"])
def test_incremental_decoding_equals_the_full_forward_at_every_position(case, axes):
    """Row 0 at every position; rows that read other numbers of tokens, or none, in every company."""
    model, expected_BTV = case
    if axes:
        model = on_mesh(model, qmj.make_mesh(**MESH))
    logits, cache = read(model, COUNTS_SB, new_cache(model))
    assert {position for row, position in logits if row == 0} == set(range(LENGTH))
    assert (COUNTS_SB == 0).any(axis=0)[1:].all() and (COUNTS_SB.sum(axis=0) > 20).all(), "ragged, and past the rings"
    for (row, position), found_V in logits.items():
        assert_near(found_V, expected_BTV[row, position], TOLERANCE, f"row {row}, position {position}")
    np.testing.assert_array_equal(cache.lengths_B, COUNTS_SB.sum(axis=0))


def test_only_the_tokens_that_are_there_are_written_and_read(case):
    """Bit for bit: a row without tokens keeps its state, one with tokens changes their slots, padding changes nothing.

    Padding has other tokens in the second run: whatever stands there, no logits and no slot of any row move.
    """
    model, _ = case
    _, cache = read(model, COUNTS_SB[:5], new_cache(model))
    known_B, count_B = COUNTS_SB[:5].sum(axis=0), np.array([2, 4, 0, 1], np.int32)
    before = to_host(cache)
    copy = jax.tree.map(jax.numpy.copy, cache)  # `extend` takes what it is given
    logits_BV, after = extend(model, stretch(known_B, count_B), count_B, cache)
    other_BV, other = extend(model, stretch(known_B, count_B, padding=17), count_B, copy)

    np.testing.assert_array_equal(logits_BV[count_B > 0], other_BV[count_B > 0])
    for old, new, same in zip(before, to_host(after), to_host(other), strict=True):
        np.testing.assert_array_equal(new, same)
        if new.ndim == 1:
            np.testing.assert_array_equal(new, known_B + count_B)
            continue
        room, changed_BS = new.shape[2], (old != new).any(axis=(0, 3, 4))
        for row, (known, count) in enumerate(zip(known_B, count_B, strict=True)):
            assert set(np.flatnonzero(changed_BS[row])) == {slot % room for slot in range(known, known + count)}


def test_keys_and_values_in_bfloat16_stay_near():
    """Each is rounded by up to 2**-9 = 2e-3 of itself, and six roundings on the way, at scores near 5, make some 1e-2.

    The layers are dense: a rounded key may send a token to another expert, which is no longer a rounding error.
    """
    model = CausalLM(config_of("plain", mlp_only_layers=[0, 1, 2]), rngs=nnx.Rngs(0))
    expected_BTV = np.asarray(model(TOKENS_BT).logits)
    cache = new_cache(model, dtype="bfloat16")
    assert all(leaf.dtype == jax.numpy.uint16 for leaf in jax.tree.leaves(cache.segments)), "its bits"
    logits, _ = read(model, COUNTS_SB[:12], cache)
    distances = [relative_l2(found_V, expected_BTV[place]) for place, found_V in logits.items()]
    assert 1e-4 < max(distances) < 2e-2, distances


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_memory_is_what_the_formula_says(name, dtype):
    config = config_of(name)
    sizes = dict(batch=4, max_length=64, max_write=16, dtype=dtype)
    cache = empty_cache(abstract_cache(config, qmj.make_mesh(), **sizes))
    found = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.segments))
    assert found == cache_bytes(config, **sizes)
    itemsize, attention = jax.numpy.dtype(dtype).itemsize, config.attention
    places = sum(64 if kind.mixer == "full" else 5 + 16 - 1 for kind in config.layers)
    assert found == 2 * 4 * places * attention.num_key_value_heads * attention.head_dim * itemsize


def test_a_ring_is_bounded_by_its_window_and_what_is_written_at_once():
    config = config_of("mixed")
    sliding, full, *_ = config.layers
    assert [slots(config, sliding, length, 16) for length in (8, 20, 21, 10**6)] == [8, 20, 20, 20]
    assert [slots(config, full, length, 16) for length in (8, 20, 21, 10**6)] == [8, 20, 21, 10**6]


def test_every_device_holds_its_rows_and_heads_and_no_more():
    config = config_of("mixed")
    sizes = dict(batch=8, max_length=64, max_write=16, dtype="float32")
    for axes in (MESH, dict(data=2, fsdp=2, expert=2)):
        cache = empty_cache(abstract_cache(config, qmj.make_mesh(**axes), **sizes))
        tensor = axes.get("tensor", 1)
        rows, heads = 8 // (8 // tensor), config.attention.num_key_value_heads // tensor
        for leaf in jax.tree.leaves(cache.segments):
            repeats, _, room, _, head_dim = leaf.shape
            held = {shard.data.shape for shard in leaf.addressable_shards}
            assert held == {(repeats, rows, room, heads, head_dim)}, axes
        assert {shard.data.shape for shard in cache.lengths_B.addressable_shards} == {(rows,)}
        held = sum(shard.data.nbytes for leaf in jax.tree.leaves(cache.segments) for shard in leaf.addressable_shards)
        assert held == cache_bytes(config, **sizes), "nothing is held twice"


@pytest.mark.parametrize("axes", [{}, MESH], ids=["one_device", "data2_expert2_tensor2"])
def test_decoding_writes_the_cache_where_it_lies(axes):
    """By the compiler's own account, for a cache of 4096 tokens, 16 layers deep, that nobody allocates.

    The program may hold what one layer's attention reads, converted or turned round, a sixteenth of the cache each, and
    scores; a copy of the cache would be 1.
    """
    config = config_of("plain", num_hidden_layers=16)
    model = CausalLM(config, rngs=None, mesh=qmj.make_mesh(**axes))
    sizes = dict(batch=8, max_length=4096, max_write=512, dtype="float32")
    settings = sampling_settings([qmj.GenerationConfig()] * 8, config.vocab_size)
    writing = programs.DecodeState(
        token_B=np.zeros(8, np.int32), left_B=np.ones(8, np.int32), sampling=initial_state(settings, [[]] * 8)
    )
    cache = abstract_cache(config, model.mesh, **sizes)
    memory = programs.decode.lower(model, cache, writing, settings).compile().memory_analysis()
    held = cache_bytes(config, **sizes) / model.mesh.size
    assert memory.alias_size_in_bytes >= held, "the cache that comes out is the one that went in"
    assert memory.temp_size_in_bytes < 0.25 * held


def test_a_described_cache_allocates_nothing_and_an_empty_one_fits_its_description():
    described = abstract_cache(
        config_of("mixed"), qmj.make_mesh(**MESH), batch=4, max_length=64, max_write=16, dtype="float32"
    )
    cache = empty_cache(described)
    assert jax.tree.structure(described) == jax.tree.structure(cache)
    for shape, leaf in zip(jax.tree.leaves(described), jax.tree.leaves(cache), strict=True):
        assert isinstance(shape, jax.ShapeDtypeStruct)
        assert (shape.shape, shape.dtype, shape.sharding) == (leaf.shape, leaf.dtype, leaf.sharding)
        assert not np.asarray(leaf).any()
