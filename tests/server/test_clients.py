"""The real `openai` client gets what OpenAI's API promises."""

import asyncio
import base64
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import openai
import pytest

from tests.server.scripted import STOP, TOKENIZER, eventually

ROOT = Path(__file__).parent.parent.parent
HI = [{"role": "user", "content": "Hi"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
            "required": ["x", "y"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": 2}}\n</tool_call>'


def ids(text):
    return TOKENIZER.encode(text).ids


@pytest.fixture
def client(scripted):
    return scripted.client


def writes(scripted, text):
    scripted.engine.answer = lambda prompt: text


def chat(scripted, **settings):
    return scripted.client.chat.completions.create(**{"model": "tiny", "messages": HI, **settings})


def test_a_completion(scripted, client):
    writes(scripted, " fox 你好👍🏽")
    done = client.completions.create(model="tiny", prompt="The quick", max_tokens=50)
    [choice] = done.choices
    assert (choice.text, choice.finish_reason) == (" fox 你好👍🏽", "stop")
    assert choice.logprobs is None
    assert done.usage.prompt_tokens == len(ids("The quick"))
    assert done.usage.completion_tokens == len(ids(" fox 你好👍🏽")) + 1  # with the stop token
    assert done.usage.prompt_tokens_details.cached_tokens == 0
    assert client.completions.create(model="tiny", prompt="x").usage.completion_tokens <= 16  # OpenAI's default


@pytest.mark.parametrize(
    "prompt, texts",
    [
        ("The", ["The"]),
        (["The", "fox"], ["The", "fox"]),
        (ids("The"), ["The"]),
        ([ids("The"), ids("fox")], ["The", "fox"]),
    ],
)
def test_prompts_are_texts_or_token_ids_or_several(scripted, client, prompt, texts):
    scripted.engine.answer = lambda prompt: f"{prompt}!"
    done = client.completions.create(model="tiny", prompt=prompt, n=2, max_tokens=50)
    assert [choice.text for choice in done.choices] == [f"{text}!" for text in texts for _ in range(2)]
    assert [choice.index for choice in done.choices] == list(range(2 * len(texts)))


def test_a_stream_is_the_whole_answer_in_pieces(scripted, client):
    writes(scripted, "The quick brown fox 你好👍🏽 stop")
    events = list(
        client.completions.create(
            model="tiny", prompt="x", max_tokens=50, n=2, stream=True, stream_options={"include_usage": True}
        )
    )
    for number in range(2):
        choices = [event.choices[0] for event in events[:-1] if event.choices[0].index == number]
        assert "".join(choice.text for choice in choices) == "The quick brown fox 你好👍🏽 stop"
        assert [choice.finish_reason for choice in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1].finish_reason == "stop" and len(choices) > 1
    assert events[-1].choices == [] and events[-1].usage.completion_tokens > 10
    assert all(event.usage is None for event in events[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_ends_before_a_stop_string_and_its_slot_is_free(scripted, client, stream, monkeypatch):
    writes(scripted, "over the lazy dog. " * 20)
    monkeypatch.setattr(scripted.engine, "delay", 0.005)
    before = len(scripted.engine.cancelled)
    done = client.completions.create(model="tiny", prompt="x", stop=["dog", "zzz"], max_tokens=200, stream=stream)
    texts = [event.choices[0].text for event in done] if stream else [done.choices[0].text]
    assert "".join(texts) == "over the lazy "
    eventually(lambda: len(scripted.engine.cancelled) == before + 1)


def test_echo_and_log_probabilities(scripted, client):
    """lm-eval scores a text this way."""
    writes(scripted, " fox")
    done = client.completions.create(model="tiny", prompt="The quick", echo=True, logprobs=2, max_tokens=1)
    [choice] = done.choices
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text and choice.text.startswith("The quick")
    count = len(ids("The quick"))
    assert found.token_logprobs == [None, *(-0.5 - place for place in range(count - 1)), -0.25]
    assert found.top_logprobs[0] is None
    assert all(found.tokens[at] in found.top_logprobs[at] for at in range(1, count + 1))
    assert all(choice.text[at:].startswith(token) for at, token in zip(found.text_offset, found.tokens, strict=True))
    only = client.completions.create(model="tiny", prompt="The quick", echo=True, logprobs=0, max_tokens=0)
    assert only.choices[0].text == "The quick" and len(only.choices[0].logprobs.tokens) == count
    assert only.usage.completion_tokens == 0


def test_log_probabilities_of_bytes_that_are_no_text(scripted):
    writes(scripted, "é👍")
    found = chat(scripted, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert b"".join(bytes(one.bytes) for one in found[:-1]).decode() == "é👍"
    assert [one.token for one in found][-1] == "<|im_end|>"
    assert any(one.token.startswith("bytes:\\x") for one in found)
    assert all(one.top_logprobs[0].logprob == one.logprob == -0.25 for one in found)


def test_sampling_fields_reach_the_engine(scripted, client):
    writes(scripted, "x")
    chat(
        scripted,
        n=2,
        temperature=0.5,
        top_p=0.9,
        seed=2**64 - 1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"5": -3, "6": 2},
        max_completion_tokens=7,
        stop="zz",
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [9], "min_tokens": 1},
    )
    first, second = (request.config for request in scripted.engine.seen[-2:])
    assert (first.do_sample, first.temperature, first.top_p, first.top_k, first.min_p) == (True, 0.5, 0.9, 5, 0.1)
    assert (first.seed, second.seed) == (2**64 - 1, 0)  # each choice has a seed of its own
    assert (first.presence_penalty, first.frequency_penalty, first.repetition_penalty) == (0.5, -0.5, 1.1)
    assert first.logit_bias == ((5, -3.0), (6, 2.0))
    assert (first.max_new_tokens, first.min_new_tokens) == (7, 1)
    assert first.eos_token_id == (STOP, 9) and first.stop_strings == ("zz",)
    chat(scripted, temperature=0, top_p=0.9)
    assert not scripted.engine.seen[-1].config.do_sample
    chat(scripted)
    prompt = scripted.engine.seen[-1]
    assert prompt.config.max_new_tokens == 2048 - len(prompt.token_ids)
    chat(scripted, model="french")
    assert scripted.engine.seen[-1].adapter == "french" and prompt.adapter is None


def test_a_chat_goes_through_the_template(scripted):
    writes(scripted, "<think>\nhm\n</think>\n\nHello!")
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1, "y": 2}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]
    done = chat(
        scripted, messages=messages, tools=[ADD], extra_body={"chat_template_kwargs": {"enable_thinking": False}}
    )
    prompt = TOKENIZER.decode(list(scripted.engine.seen[-1].token_ids), skip_special_tokens=False)
    assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>" in prompt
    assert f"<|im_start|>assistant\n{CALL}<|im_end|>" in prompt
    assert prompt.endswith("<think>\n\n</think>\n\n") and json.dumps(ADD["function"]["name"]) in prompt
    message = done.choices[0].message
    assert (message.content, message.reasoning_content) == ("Hello!", "hm")


def test_tool_calls(scripted):
    writes(scripted, f"I will.\n{CALL}\n{CALL}")
    done = chat(scripted, tools=[ADD], max_tokens=300)
    [choice] = done.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I will."
    assert [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls] == [
        ("add", {"x": 1, "y": 2})
    ] * 2
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert len(chat(scripted, tools=[ADD], parallel_tool_calls=False).choices[0].message.tool_calls) == 1
    assert CALL in chat(scripted, tools=[ADD], tool_choice="none").choices[0].message.content


def test_tool_calls_in_a_stream(scripted):
    writes(scripted, f"<think>\nhm\n</think>\n\nI will.\n{CALL}\n{CALL}")
    with scripted.client.chat.completions.stream(model="tiny", messages=HI, tools=[ADD]) as stream:
        done = stream.get_final_completion()
    [choice] = done.choices
    assert choice.message.content == "I will." and choice.finish_reason == "tool_calls"
    assert [call.function.arguments for call in choice.message.tool_calls] == ['{"x": 1, "y": 2}'] * 2


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_call_can_be_required(scripted, choice):
    """Text before the call, and after it, is not allowed by the grammar."""
    writes(scripted, CALL + "Well, that was it.")
    done = chat(scripted, tools=[ADD], tool_choice=choice, max_tokens=100).choices[0]
    [call] = done.message.tool_calls
    assert json.loads(call.function.arguments) == {"x": 1, "y": 2} and done.message.content is None
    assert done.finish_reason == "tool_calls"
    writes(scripted, "Well, 1 + 2 is 3.")
    settings = {"max_tokens": 3, "extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    text = chat(scripted, tools=[ADD], tool_choice=choice, **settings).choices[0].message.content
    assert text.startswith("<tool_call>")  # the first part of a call is shown, where there is no more


def test_json_of_a_schema(scripted):
    writes(scripted, '{"x": 1, "y": 22} and more that no schema allows')
    asked = {
        "type": "json_schema",
        "json_schema": {"name": "sum", "schema": ADD["function"]["parameters"], "strict": True},
    }
    done = chat(scripted, response_format=asked).choices[0]
    assert json.loads(done.message.content) == {"x": 1, "y": 22} and done.finish_reason == "stop"
    done = chat(scripted, response_format={"type": "json_object"}).choices[0]
    assert json.loads(done.message.content) == {"x": 1, "y": 22}
    assert "more" in chat(scripted, response_format={"type": "text"}).choices[0].message.content


def test_the_asynchronous_client(scripted):
    scripted.engine.answer = lambda prompt: prompt[-3:]

    async def ask_all():
        async with openai.AsyncOpenAI(**scripted.settings) as client:

            async def ask(number):
                stream = await client.completions.create(model="tiny", prompt=f"x {number:03}", stream=True)
                return "".join([event.choices[0].text async for event in stream])

            return await asyncio.gather(*map(ask, range(12)))

    assert asyncio.run(ask_all()) == [f"{number:03}" for number in range(12)]


def test_models(scripted, client):
    base, adapter = client.models.list().data
    assert (base.id, adapter.id, adapter.parent) == ("tiny", "french", "tiny")
    assert client.models.retrieve("french").id == "french"
    with pytest.raises(openai.NotFoundError, match="did you mean 'french'"):
        client.models.retrieve("frensh")


class _Embedder:
    max_length = 20

    def embed(self, sequences):
        return np.array([[len(ids), 0.5] for ids in sequences], np.float32)


def test_embeddings(scripted, client, monkeypatch):
    monkeypatch.setattr(scripted.service, "embedder", _Embedder())
    found = client.embeddings.create(model="tiny", input=["The", "The quick"])  # the client asks for base64
    assert [one.embedding for one in found.data] == [[1.0, 0.5], [len(ids("The quick")), 0.5]]
    assert client.embeddings.create(model="tiny", input=[1, 2], encoding_format="float").data[0].embedding == [2, 0.5]
    assert found.usage.prompt_tokens == 1 + len(ids("The quick"))
    raw = client.embeddings.with_raw_response.create(model="tiny", input="The", encoding_format="base64")
    assert np.frombuffer(base64.b64decode(raw.http_response.json()["data"][0]["embedding"]), "<f4").tolist() == [1, 0.5]
    with pytest.raises(openai.BadRequestError, match="input has 21 tokens, expected at most 20"):
        client.embeddings.create(model="tiny", input=[1] * 21)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_the_curl_line_of_a_page_is_answered(scripted, page):
    writes(scripted, " fox")
    [line] = re.findall(r"^curl http://127.0.0.1:8000.*$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    words = shlex.split(line.replace("http://127.0.0.1:8000", scripted.url))
    answer = json.loads(subprocess.run([*words, "--silent", "--fail"], check=True, capture_output=True).stdout)
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] > 0
