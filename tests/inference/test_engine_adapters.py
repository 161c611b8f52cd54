"""Adapters by name: each request of a batch gets the answer of the model that its adapter is merged into."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.errors import ConfigError, RequestError
from qwen_moe_jax.inference import memory, programs
from qwen_moe_jax.model.lora import matrices
from tests.cases import CASES
from tests.distance import assert_near

CONFIG = {**CASES["qwen2_moe-plain"].config, "vocab_size": 98, "num_hidden_layers": 2, "initializer_range": 0.4}
PROMPT = np.random.default_rng(0).integers(4, 98, 20).tolist()


def build() -> qmj.CausalLM:
    return qmj.CausalLM(qmj.ModelConfig.from_pretrained(CONFIG), rngs=nnx.Rngs(0))


def adapted(rank: int, targets: tuple[str, ...]) -> qmj.CausalLM:
    model, numbers = build(), np.random.default_rng(rank)
    qmj.add_lora(model, qmj.LoraConfig(r=rank, lora_alpha=4.0, target_modules=targets), rngs=nnx.Rngs(rank))
    for matrix in matrices(model):
        if matrix.lora is not None:
            b = matrix.lora.lora_B
            b.set_value(jnp.asarray(numbers.normal(0, 0.2, b.shape), jnp.float32))
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of two adapters, and the models for None and each name, adapters merged."""
    folders, models = {}, {None: build()}
    targets = {"small": ("q_proj", "shared_expert"), "large": ("q_proj", "o_proj", "embed_tokens", "lm_head")}
    for rank, (name, words) in zip((2, 5), targets.items(), strict=True):
        models[name] = adapted(rank, words)
        folders[name] = tmp_path_factory.mktemp(name)
        qmj.save_adapter(models[name], folders[name])
        qmj.merge_lora(models[name])
    return folders, models


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


def test_an_unknown_name_is_refused_with_a_suggestion(engine):
    assert engine.adapter_names == ("small", "large")
    with pytest.raises(RequestError, match="did you mean 'small'"):
        engine.submit(qmj.Request(token_ids=PROMPT, config=qmj.GenerationConfig(), adapter="smal"))


def test_an_adapter_of_routed_experts_is_refused_with_the_way_out(made, tmp_path):
    qmj.save_adapter(adapted(2, ("experts",)), tmp_path)
    with pytest.raises(ConfigError, match="'e'.*routed experts.*convert --adapter"):
        qmj.Engine(made[1][None], slots=1, max_length=48, adapters={"e": tmp_path})
