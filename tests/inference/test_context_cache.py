"""Text that is generated on a mesh whose axis `context` shards the cache is that of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.attention_kernels.cached_context import chunk_bytes, combined_bytes
from qwen_moe_jax.attention_kernels.context_delta import part_bytes
from qwen_moe_jax.config import INFERENCE_SHARDING
from qwen_moe_jax.inference.memory import blocks_for
from qwen_moe_jax.model.cache import Blocks, Cache, abstract_cache, empty_cache
from qwen_moe_jax.plan.compile import group_of, plan_step, target_of
from qwen_moe_jax.plan.draft import Draft, Outline, draft_of
from qwen_moe_jax.plan.inference import prefill_step
from qwen_moe_jax.plan.targets import parse_target
from tests.model.hybrid_configs import hybrid_config, hybrid_model
from tests.plan import golden
from tests.plan.golden import TINY

#: Prompts in chunks of 8, with padding in every chunk but one, and 5 more tokens.
LENGTHS, CHUNK, NEW = (13, 8, 3, 1), 8, 5
SLOTS = 32
#: By family: a mixture, sliding and full layers (windows of 5, rings of 12 slots), linear and full layers.
MODELS = {
    "qwen3_moe": dataclasses.replace(qmj.ModelConfig.from_pretrained({**TINY, "num_hidden_layers": 2}), vocab_size=98),
    "sliding": hybrid_config("Wf"),
    "hybrid": hybrid_config("lF"),
}
MESHES = {
    "qwen3_moe": (dict(data=2, expert=2, context=2), dict(sharding="expert+fsdp+context")),
    "sliding": (dict(context=3, tensor=2), dict(sharding=INFERENCE_SHARDING)),
    "hybrid": (dict(context=8), dict(dispatch="capacity", eval_capacity_factor=8.0)),
}


@functools.partial(jax.jit, donate_argnames="cache")
def read_tokens(model: qmj.CausalLM, tokens_BT: jax.Array, count_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    mask_BT = jnp.arange(tokens_BT.shape[1]) < count_B[:, None]
    out = model(tokens_BT, mask_BT, cache=cache)
    return out.logits, out.cache


def continued(model: qmj.CausalLM, prompts: list[list[int]]) -> tuple[list[list[int]], list[np.ndarray]]:
    """The most probable tokens after each prompt, and the logits [T, V] of all tokens that were read."""
    sizes = dict(batch=len(prompts), max_length=SLOTS, max_write=CHUNK, dtype="float32")
    cache = empty_cache(abstract_cache(model.config, model.mesh, **sizes))
    texts, logits = [list(prompt) for prompt in prompts], [[] for _ in prompts]
    while len(texts[0]) < len(prompts[0]) + NEW:
        unread = [text[len(read) :] for text, read in zip(texts, logits, strict=True)]
        length = 1 if max(map(len, unread)) == 1 else CHUNK
        parts = [tokens[:length] for tokens in unread]
        tokens_BT = np.array([part + [0] * (length - len(part)) for part in parts])
        logits_BTV, cache = read_tokens(model, tokens_BT, np.array(list(map(len, parts))), cache)
        for row, part in enumerate(parts):
            logits[row].extend(np.asarray(logits_BTV[row, : len(part)]))
        if all(len(text) == len(read) for text, read in zip(texts, logits, strict=True)):
            for text, read_TV in zip(texts, logits, strict=True):
                text.append(int(read_TV[-1].argmax()))
    return texts, list(map(np.stack, logits))


@pytest.mark.parametrize("family", MODELS)
def test_prompts_and_new_tokens_over_context_give_what_one_device_gives(family):
    """One device reads the texts that were written whole, without a cache."""
    drawn = np.random.default_rng(0)
    prompts = [drawn.integers(1, 98, length).tolist() for length in LENGTHS]
    axes, execution = MESHES[family]
    texts, found = continued(
        hybrid_model(MODELS[family], qmj.make_mesh(**axes), qmj.ExecutionConfig(**execution)), prompts
    )
    longest = len(texts[0])
    tokens_BT = np.array([text + [0] * (longest - len(text)) for text in texts])
    mask_BT = np.arange(longest) < np.array(list(map(len, texts)))[:, None]
    logits_BTV = np.asarray(hybrid_model(MODELS[family])(tokens_BT, mask_BT).logits)
    for prompt, text, ours, whole_TV in zip(prompts, texts, found, logits_BTV, strict=True):
        expected = whole_TV[: len(ours)]
        assert np.linalg.norm(ours - expected) < 1e-5 * np.linalg.norm(expected)
        assert text[len(prompt) :] == expected[len(prompt) - 1 :].argmax(axis=-1).tolist()


@pytest.fixture(scope="module")
def on_two_by_two() -> qmj.CausalLM:
    mesh = qmj.make_mesh(context=2, tensor=2)
    return hybrid_model(MODELS["sliding"], mesh, qmj.ExecutionConfig(sharding=INFERENCE_SHARDING))


def greedy_after(prompt: list[int], count: int) -> list[int]:
    """The most probable tokens after a prompt, each by a forward pass of one device over all before it."""
    model, text = hybrid_model(MODELS["sliding"]), list(prompt)
    padded = len(prompt) + count
    for _ in range(count):
        tokens_BT = np.array([text + [0] * (padded - len(text))])
        text.append(int(model(tokens_BT, np.arange(padded)[None] < len(text)).logits[0, len(text) - 1].argmax()))
    return text[len(prompt) :]


def test_generation_and_an_engine_over_context_write_what_one_device_writes(on_two_by_two):
    """Prompts longer than a window and than a chunk; the second request joins when the first has begun."""
    drawn = np.random.default_rng(1)
    prompts = [drawn.integers(1, 98, length).tolist() for length in (21, 3)]
    expected = [greedy_after(prompt, NEW) for prompt in prompts]
    assert [list(found.token_ids) for found in qmj.complete(on_two_by_two, prompts, max_new_tokens=NEW)] == expected
    engine = qmj.Engine(on_two_by_two, slots=2, max_length=SLOTS, prefill_chunk=16)
    config, tokens = qmj.GenerationConfig(max_new_tokens=NEW), {}
    waiting = list(prompts)
    while waiting or not engine.idle:
        if waiting:
            tokens[engine.submit(qmj.Request(token_ids=waiting.pop(0), config=config))] = []
        for chunk in engine.step():
            tokens[chunk.request].extend(chunk.token_ids)
    assert list(tokens.values()) == expected


def drafted(name: str) -> Draft:
    """The estimate for one of the compiled steps."""
    step, request, mesh = golden.cached_step(name), parse_target("cpu:8"), qmj.make_mesh(**golden.CACHED_MESH)
    groups = tuple(group_of(group, tree) for group, tree in step.groups.items())
    outline = Outline(config=step.config, work=step.work, flops=step.model_flops, groups=groups)
    return draft_of(outline, mesh.shape, target_of(request, mesh, None), ())


def test_a_step_sends_partial_softmaxes_and_no_keys():
    """All-reduces as long as the formula says, nothing else over `context`, and no all-gather at all."""
    plan = golden.compiled("decode-context4-tensor2")
    over = [one for one in plan.collectives if "context" in one.axes]
    assert {one.kind for one in over} == {"all-reduce"} and all(one.in_layers for one in over)
    assert "all-gather" not in {one.kind for one in plan.collectives}
    heads = TINY["num_attention_heads"] // 2
    reduced = TINY["num_hidden_layers"] * combined_bytes(rows=4, tokens=1, heads=heads, head_dim=TINY["head_dim"])
    assert sum(one.bytes * one.count for one in over) == reduced * 2 * 3 / 4  # a ring of four devices
    assert drafted("decode-context4-tensor2").traffic[("context",)] == reduced * 2 * 3 / 4


def test_a_chunk_of_a_prompt_sends_its_own_queries_and_keys_and_nothing_of_the_cache():
    """By a gather, an all-reduce and a reduce-scatter in the full layer, and two gathers in the three linear ones.

    Outside of layers, the last token of each row is sent, and its logits.
    """
    name, config = "prefill-hybrid-context4-tensor2", qmj.ModelConfig.from_pretrained(golden.TINY_HYBRID)
    sizes = dict(rows=4, tokens=32, heads=config.attention.num_attention_heads // 2, head_dim=config.attention.head_dim)
    gathered, reduced, scattered = chunk_bytes(**sizes, kv_heads=1, itemsize=4)
    linear = config.linear_attention
    sizes = linear.num_value_heads // 2, linear.key_head_dim, linear.value_head_dim
    state, columns = (part_bytes(*sizes, columns=n, channels=linear.conv_dim // 2, itemsize=4) for n in (0, 3))
    expected = {
        ("all-gather", gathered * 3 / 4, 1),
        ("all-reduce", reduced * 2 * 3 / 4, 1),
        ("reduce-scatter", scattered * 3 / 4, 1),
        ("all-gather", 4 * state * 3, 3),
        ("all-gather", 4 * (columns - state) * 3, 3),
    }
    over = [one for one in golden.compiled(name).collectives if one.axes == ("context",)]
    assert expected <= {(one.kind, one.bytes, one.count) for one in over}
    layers = sum(size * count for _, size, count in expected)
    assert drafted(name).traffic[("context",)] == layers
    tokens = 4 * (4 * config.vocab_size // 2 + 2 * config.hidden_size) * 4
    assert sum(one.bytes * one.count for one in over) - layers < tokens


def test_a_device_does_its_share_of_the_work_on_a_prompt():
    """A dense model, whose program has the FLOPs of the model and those of scores that the causal mask leaves out."""
    mesh = qmj.make_mesh(context=8)
    step = prefill_step(hybrid_config("FF"), "tiny", mesh, qmj.ExecutionConfig(), rows=1, prompt=128, max_length=128)
    flops = plan_step(step, parse_target("cpu:8"), mesh).flops
    assert flops.model <= flops.program < 1.5 * flops.model


def test_a_device_holds_its_share_of_the_cache_and_no_copy_of_it():
    plan = golden.compiled("decode-context4-tensor2")
    [cache] = [group for group in plan.memory.groups if group.name == "cache"]
    whole = 2 * TINY["num_hidden_layers"] * 4 * 64 * TINY["num_key_value_heads"] * TINY["head_dim"] * 4
    lengths = 4 * 4
    assert cache.bytes == whole / (4 * 2) + lengths
    assert plan.memory.temporaries < cache.bytes


def test_blocks_of_an_engine_have_as_many_slots_on_every_device():
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(TINY), rngs=None, mesh=qmj.make_mesh(context=3))
    blocks = blocks_for(model, slots=2, max_length=70, cache_tokens=None)
    assert blocks == Blocks(count=2 * 70 // 33 + 1 + 1, size=33)
    sizes = dict(batch=2, max_length=70, max_write=8, dtype="float32")
    cache = abstract_cache(model.config, model.mesh, **sizes, blocks=blocks)
    keys = cache.segments[0][0].keys_LPSKH
    assert keys.sharding.shard_shape(keys.shape)[2] == 11
    with pytest.raises(qmj.ShardingError, match="blocks of 32 tokens do not divide over the mesh axis context=3"):
        abstract_cache(model.config, model.mesh, **sizes, blocks=dataclasses.replace(blocks, size=32))
