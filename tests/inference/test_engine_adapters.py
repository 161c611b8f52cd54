"""Adapters by name: each request of a batch gets the answer of the model that its adapter is merged into."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.errors import ConfigError, RequestError
from qwen_moe_jax.inference import memory, programs
from qwen_moe_jax.model.lora import matrices
from tests.cases import CASES, HYBRID_CASES
from tests.distance import assert_near
from tests.subject import on_mesh

CONFIG = {**CASES["qwen2_moe-plain"].config, "vocab_size": 98, "num_hidden_layers": 2, "initializer_range": 0.4}
PROMPT = np.random.default_rng(0).integers(4, 98, 20).tolist()


HYBRID = {
    **HYBRID_CASES["qwen3_next-plain"].config,
    "vocab_size": 98,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "initializer_range": 0.3,
}


def build(config=CONFIG) -> qmj.CausalLM:
    return qmj.CausalLM(qmj.ModelConfig.from_pretrained(config), rngs=nnx.Rngs(0))


def adapted(rank: int, targets: tuple[str, ...], config=CONFIG) -> qmj.CausalLM:
    model, numbers = build(config), np.random.default_rng(rank)
    qmj.add_lora(model, qmj.LoraConfig(r=rank, lora_alpha=4.0, target_modules=targets), rngs=nnx.Rngs(rank))
    for matrix in matrices(model):
        if matrix.lora is not None:
            b = matrix.lora.lora_B
            b.set_value(jnp.asarray(numbers.normal(0, 0.2, b.shape), jnp.float32))
    return model


def make(folder, targets, config=CONFIG):
    """Folders of two adapters, and the models for None and each name, adapters merged."""
    folders, models = {}, {None: build(config)}
    for rank, (name, words) in zip((2, 5), targets.items(), strict=True):
        models[name] = adapted(rank, words, config)
        folders[name] = folder / name
        qmj.save_adapter(models[name], folders[name])
        qmj.merge_lora(models[name])
    return folders, models


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    targets = {"small": ("q_proj", "shared_expert"), "large": ("q_proj", "o_proj", "embed_tokens", "lm_head")}
    return make(tmp_path_factory.mktemp("adapters"), targets)


@pytest.fixture(scope="module")
def engine(made):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "BLOCK_SIZE", 8)
        engine = qmj.Engine(made[1][None], slots=4, max_length=48, prefill_chunk=16, adapters=made[0])
    engine.compile()
    return engine


def serve(engine, names):
    config = qmj.GenerationConfig(max_new_tokens=6)
    order = [engine.submit(qmj.Request(token_ids=PROMPT, config=config, adapter=name)) for name in names]
    chunks = {number: [] for number in order}
    while not engine.idle:
        for chunk in engine.step():
            chunks[chunk.request].append(chunk)
    return [chunks[number] for number in order]


def test_each_request_gets_the_answer_of_its_merged_model_and_shares_blocks_with_its_own_adapter_alone(made, engine):
    names, before = [None, "small", "large"], programs.compilations()
    answers = serve(engine, names)
    again = serve(engine, ["large", None])
    assert programs.compilations() == before
    assert [chunks[0].cached_tokens for chunks in answers] == [0, 0, 0]
    assert [chunks[0].cached_tokens for chunks in again] == [16, 16]
    for name, chunks in [*zip(names, answers, strict=True), ("large", again[0]), (None, again[1])]:
        [expected] = qmj.complete(made[1][name], [PROMPT], max_new_tokens=6)
        assert [token for chunk in chunks for token in chunk.token_ids] == list(expected.token_ids), name
        assert_near([x for chunk in chunks for x in chunk.log_probs], expected.log_probs, 1e-5, str(name))


def test_on_a_mesh_with_linear_attention_each_row_has_its_own_adapter_too(tmp_path):
    """Four rows on each of two shards, of which calls decode one or two; the merged model reads on one device.

    In float64 a merged model and its adapter agree to 1e-14. In float32 each of them is 1.4e-5 to 2.9e-5 away from
    that, at matrices of a spread of 0.4: with linear attention, the two differ by rounding and no more than that.
    """
    targets = {"small": ("q_proj", "in_proj_qkv", "shared_expert"), "large": ("o_proj", "out_proj", "lm_head")}
    folders, models = make(tmp_path, targets, HYBRID)
    mesh = qmj.make_mesh(expert=2, context=2, tensor=2)
    engine = qmj.Engine(on_mesh(models[None], mesh), slots=8, max_length=48, prefill_chunk=32, adapters=folders)
    names = ["large", None, "small", "small", "large"]
    answers = serve(engine, names[:1]) + serve(engine, names)
    for name, chunks in zip([names[0], *names], answers, strict=True):
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        log_probs_TV = np.asarray(nnx.log_softmax(models[name]([[*PROMPT, *tokens]]).logits))[0, len(PROMPT) - 1 : -1]
        assert tokens == log_probs_TV.argmax(-1).tolist(), name
        assert_near([x for chunk in chunks for x in chunk.log_probs], log_probs_TV.max(-1), 3e-5, str(name))


def test_adapters_are_counted_in_the_memory_of_an_engine(made, engine):
    """A and B of 2 layers, float32: ranks 2 and 5 of q_proj, 2 of the shared experts, 5 of the rest."""
    config = made[1][None].config
    hidden, heads = config.hidden_size, config.attention.num_attention_heads * config.attention.head_dim
    shared = 3 * (hidden + config.moe.shared_expert_intermediate_size)
    layers = 2 * ((2 + 5) * (hidden + heads) + 2 * shared + 5 * (heads + hidden))
    (weights, _), (name, size) = engine.memory()[:2]
    assert (weights, name, size) == ("weights", "adapters", 4 * (layers + 2 * 5 * (hidden + 98)))
    base = qmj.Engine(made[1][None], slots=4, max_length=48, prefill_chunk=16)
    assert base.memory()[0] == engine.memory()[0] and [part for part, _ in base.memory()].count("adapters") == 0


def test_an_unknown_name_is_refused_with_a_suggestion(engine):
    assert engine.adapter_names == ("small", "large")
    with pytest.raises(RequestError, match="did you mean 'small'"):
        engine.submit(qmj.Request(token_ids=PROMPT, config=qmj.GenerationConfig(), adapter="smal"))


def test_an_adapter_of_routed_experts_is_refused_with_the_way_out(made, tmp_path):
    qmj.save_adapter(adapted(2, ("experts",)), tmp_path)
    with pytest.raises(ConfigError, match="'e'.*routed experts.*convert --adapter"):
        qmj.Engine(made[1][None], slots=1, max_length=48, adapters={"e": tmp_path})
