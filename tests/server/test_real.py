"""The command `serve` with a real model: the openai client gets the tokens and numbers of the package's functions."""

import asyncio
import json
import types

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.cli.main import _parser as command_line
from qwen_moe_jax.cli.serve import Start, prepare
from qwen_moe_jax.config import MESH_AXES
from qwen_moe_jax.inference.chat_template import load_chat_template
from qwen_moe_jax.inference.embed import HiddenOf
from qwen_moe_jax.inference.tokenizer import encode
from qwen_moe_jax.model.lora import matrices
from qwen_moe_jax.server.keys import ApiKeys
from tests.cases import CASES
from tests.server.scripted import STOP, TOKENIZER, VOCABULARY, Running
from tests.server.templates import JSON

HI = [{"role": "user", "content": "Hi"}]
PROMPTS = ["The quick brown", "naïve 你好", "x", "stop here. stops there"]
SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "boolean"}, "y": {"enum": ["a", "b"]}},
    "required": ["x", "y"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "tiny"
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 96, "initializer_range": 0.4}
    config = qmj.ModelConfig.from_pretrained({**CASES["qwen3_moe-plain"].config, **sizes})
    qmj.save_pretrained(qmj.CausalLM(config, rngs=nnx.Rngs(3)), folder)
    TOKENIZER.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": JSON, "eos_token": "<|im_end|>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": STOP}))
    return folder


@pytest.fixture(scope="module")
def adapted(folder, tmp_path_factory):
    """The folder of an adapter, and the model that it is merged into."""
    model, path = qmj.from_pretrained(folder), tmp_path_factory.mktemp("real") / "adapter"
    qmj.add_lora(model, qmj.LoraConfig(r=2, lora_alpha=4.0, target_modules=("q_proj", "lm_head")), rngs=nnx.Rngs(1))
    for matrix in matrices(model):
        if matrix.lora is not None:
            b = matrix.lora.lora_B
            b.set_value(jnp.asarray(np.random.default_rng(2).normal(0, 0.3, b.shape), jnp.float32))
    qmj.save_adapter(model, path)
    qmj.merge_lora(model)
    return path, model


@pytest.fixture(scope="module")
def real(folder, adapted):
    """A running server, as the command starts it, and a client."""
    words = ["serve", str(folder), "--port", "0", "--slots", "4", "--no-cache", "--adapter", f"pirate={adapted[0]}"]
    arguments = command_line().parse_args(words)
    service = prepare(arguments, ApiKeys())
    start = Start(arguments, service)
    server = Running(service, start.load, drain_seconds=0).ready()
    if server.error:
        raise server.error
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield types.SimpleNamespace(client=client, start=start, service=service, url=server.url)
    server.signal()
    assert server.join() == 0


def compilations(service):
    lines = service.metrics.text().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("qwen_moe_jax_compilations_total"))


@pytest.fixture(scope="module")
def model(folder):
    return qmj.from_pretrained(folder)


def complete(real, **settings):
    return real.client.completions.create(**{"model": "tiny", "temperature": 0, "max_tokens": 12, **settings})


def test_greedy_answers_are_those_of_generate_and_nothing_is_compiled(real, model):
    expected = qmj.generate(model, PROMPTS, max_new_tokens=12, tokenizer=TOKENIZER)
    before = compilations(real.service)
    assert [choice.text for choice in complete(real, prompt=PROMPTS).choices] == expected
    for prompt, text in zip(PROMPTS, expected, strict=True):
        pieces = [event.choices[0].text for event in complete(real, prompt=prompt, stream=True)]
        assert "".join(pieces) == text
    ids = [TOKENIZER.encode(prompt).ids for prompt in PROMPTS]
    assert [choice.text for choice in complete(real, prompt=ids).choices] == expected
    assert compilations(real.service) == before > 0


def test_a_seed_gives_the_same_text_alone_and_among_others(real):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{real.url}/v1", api_key="none") as client:
            settings = {"model": "tiny", "max_tokens": 12, "temperature": 1.0, "top_p": 0.9, "n": 2}
            asks = [client.completions.create(prompt=prompt, seed=3, **settings) for prompt in PROMPTS * 2]
            return [[choice.text for choice in one.choices] for one in await asyncio.gather(*asks)]

    together = asyncio.run(ask())
    assert together[: len(PROMPTS)] == together[len(PROMPTS) :]
    for prompt, texts in zip(PROMPTS, together, strict=False):
        alone = complete(real, prompt=prompt, seed=3, temperature=1.0, top_p=0.9)
        assert alone.choices[0].text == texts[0] != texts[1]


def test_a_request_names_the_adapter_that_answers(real, model, adapted):
    assert {one.id for one in real.client.models.list().data} == {"tiny", "pirate"}
    expected = qmj.generate(adapted[1], PROMPTS, max_new_tokens=12, tokenizer=TOKENIZER)
    assert [choice.text for choice in complete(real, prompt=PROMPTS, model="pirate").choices] == expected
    assert expected != qmj.generate(model, PROMPTS, max_new_tokens=12, tokenizer=TOKENIZER)
    with pytest.raises(openai.NotFoundError, match="pirat"):
        complete(real, prompt="x", model="pirat")


def test_a_text_is_scored_as_by_score(real, model):
    """What lm-eval's local-completions asks for."""
    ids = [TOKENIZER.encode(prompt).ids for prompt in PROMPTS]
    ids = [one for one in ids if len(one) > 1]
    done = complete(real, prompt=ids, max_tokens=1, echo=True, logprobs=1)
    scores = qmj.score(model, ids)
    for choice, score, tokens in zip(done.choices, scores, ids, strict=True):
        found = choice.logprobs
        log_probs = found.token_logprobs[1 : len(tokens)]
        np.testing.assert_allclose(log_probs, score.token_log_probs, atol=2e-5)
        tops = found.top_logprobs[1 : len(tokens)]
        greedy = [max(top, key=top.get) == token for top, token in zip(tops, found.tokens[1:], strict=False)]
        assert all(greedy) == score.greedy


def test_a_chat_with_alternatives_to_each_token_and_its_embedding(real, model):
    prompt = encode(TOKENIZER, load_chat_template(real.start.folder).render(HI), add_special_tokens=False)
    out = model([prompt], output_hidden_states=True)
    settings = {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 6}
    [choice] = real.client.chat.completions.create(**settings, logprobs=True, top_logprobs=3).choices
    logits = np.asarray(out.logits[0, -1], np.float64)
    expected = np.sort(logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())[::-1][:3]
    first = choice.logprobs.content[0]
    np.testing.assert_allclose([top.logprob for top in first.top_logprobs], expected, atol=2e-5)
    assert first.logprob == first.top_logprobs[0].logprob and len(choice.logprobs.content) <= 6
    [found] = real.client.embeddings.create(model="tiny", input=prompt).data
    mean_D = np.asarray(out.hidden_states[-1][0], np.float64).mean(0)
    np.testing.assert_allclose(found.embedding, mean_D / np.linalg.norm(mean_D), atol=2e-5)


@pytest.mark.parametrize("pooling, expected", [("mean", [[0.6, 0.8], [1, 0]]), ("last", [[0, 1], [1, 0]])])
def test_padding_is_not_in_an_embedding(pooling, expected):
    hidden_BTD = jnp.array([[[6, 7], [0, 1], [9, 9]], [[2, 0], [5, 5], [5, 5]]], jnp.bfloat16)
    inputs = types.SimpleNamespace(segment_ids_BT=jnp.array([[1, 1, 0], [1, 0, 0]]), logits_at_B=jnp.array([1, 0]))
    explicit = (jax.sharding.AxisType.Explicit,) * len(MESH_AXES)
    with jax.set_mesh(jax.make_mesh((1,) * len(MESH_AXES), MESH_AXES, explicit)):  # as in a model's program
        found = HiddenOf(pooling=pooling)(None, types.SimpleNamespace(hidden_BTD=hidden_BTD), inputs)
    np.testing.assert_allclose(found.embedding_BD, expected, atol=1e-6)


def test_a_random_model_writes_json_of_a_schema(real):
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    for seed in range(3):
        [choice] = real.client.chat.completions.create(
            model="tiny", messages=HI, temperature=1, seed=seed, response_format=asked, extra_body=extra, max_tokens=60
        ).choices
        if choice.finish_reason == "stop":
            assert set(json.loads(choice.message.content)) == {"x", "y"}
        else:
            assert choice.message.content.startswith("{")


def test_the_page_of_metrics_has_the_tokens_of_every_expert(real):
    lines = dict(line.rsplit(" ", 1) for line in httpx.get(f"{real.url}/metrics").text.splitlines() if line[0] != "#")
    found = [float(count) for name, count in lines.items() if name.startswith("qwen_moe_jax_expert_tokens_total{")]
    tokens = float(lines["qwen_moe_jax_read_tokens"]) + float(lines["qwen_moe_jax_decoded_tokens"])
    moe = CASES["qwen3_moe-plain"].config
    assert len(found) == 2 * moe["num_experts"] and sum(found) == 2 * tokens * moe["num_experts_per_tok"] > 0
    assert float(lines["qwen_moe_jax_dropped_tokens_total"]) == 0
    assert all(float(lines[f'qwen_moe_jax_expert_imbalance{{layer="{layer}"}}']) > 1 for layer in (0, 1))


def test_the_start_says_what_is_served(real):
    rows = real.start.rows
    assert rows["model"].startswith("tiny: ") and "one device" in rows["model"]
    assert rows["slots"] == "4 of up to 96 tokens; 256 more may wait"
    assert all(part in rows["memory"] for part in ("weights", "adapters", "blocks of"))
    assert rows["adapters"] == "pirate"
    assert "every client that reaches the address" in rows["keys"]
