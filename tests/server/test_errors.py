"""What cannot be served is refused in OpenAI's form, with the field named; wrong bodies never reach the engine."""

import asyncio
import json

import httpx
import pytest

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.server.app import make_app
from qwen_moe_jax.server.keys import VARIABLE, ApiKeys, read_keys
from tests.server.scripted import VOCABULARY, make_service
from tests.server.templates import JSON, PLAIN

HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "add"}}
SUB = {"type": "function", "function": {"name": "sub"}}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    service = make_service(tmp_path_factory.mktemp("errors") / "model", JSON, max_body_bytes=20_000)
    service.life.ready()
    return service


def ask(service, path="/v1/chat/completions", *, method="POST", headers=(), **settings):
    """The answer of the application, without a server: nothing here gets as far as the engine."""

    async def send():
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=dict(headers), **settings)

    return asyncio.run(send())


CHAT = {"model": "tiny", "messages": HI}
TEXT = {"model": "tiny", "prompt": "x"}


@pytest.mark.parametrize(
    "path, body, param, message",
    [
        ("chat/completions", {}, "messages", "is missing"),
        ("chat/completions", {**CHAT, "messages": []}, "messages", "at least 1"),
        ("chat/completions", {**CHAT, "temprature": 1}, "temprature", "Did you mean 'temperature'?"),
        ("chat/completions", {**CHAT, "temperature": "hot"}, "temperature", "found 'hot'"),
        ("chat/completions", {**CHAT, "temperature": -1}, "temperature", "greater than or equal to 0"),
        ("chat/completions", {**CHAT, "messages": [{"role": "bob"}]}, "messages[0].role", "'system'"),
        (
            "chat/completions",
            {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            "'image_url', expected text",
        ),
        ("chat/completions", {**CHAT, "functions": [{}]}, "functions", "is not supported"),
        ("chat/completions", {**CHAT, "store": True}, "store", "expected false or nothing"),
        ("chat/completions", {**CHAT, "n": 1000}, "n", "128"),
        ("chat/completions", {**CHAT, "max_tokens": 100_000}, "max_tokens", "a sequence has at most 512 tokens"),
        (
            "chat/completions",
            {**CHAT, "max_tokens": 5, "max_completion_tokens": 9},
            "max_completion_tokens",
            "max_completion_tokens is 9 and max_tokens is 5",
        ),
        (
            "chat/completions",
            {**CHAT, "messages": [*HI, {"role": "assistant", "reasoning": "a", "reasoning_content": "b"}]},
            "messages[1].reasoning_content",
            "reasoning is 'a'",
        ),
        ("chat/completions", {**CHAT, "max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
        ("chat/completions", {**CHAT, "top_logprobs": 2}, "top_logprobs", "without logprobs"),
        ("chat/completions", {**CHAT, "logit_bias": {"one": 1}}, "logit_bias", "numbers by token id"),
        ("chat/completions", {**CHAT, "logit_bias": {str(VOCABULARY): 1}}, "logit_bias", f"to {VOCABULARY - 1}"),
        ("chat/completions", {**CHAT, "stop": list("abcde")}, "stop", "at most 4"),
        ("chat/completions", {**CHAT, "stop_token_ids": [-1]}, "stop_token_ids", "token id -1"),
        ("chat/completions", {**CHAT, "tool_choice": "required"}, "tool_choice", "there are no tools"),
        ("chat/completions", {**CHAT, "tools": [TOOL, SUB, TOOL]}, "tools[2].function.name", "'add' is also that of"),
        ("chat/completions", {**CHAT, "stream_options": {}}, "stream_options", "with stream: true only"),
        ("chat/completions", {**CHAT, "tools": [TOOL], "tool_choice": SUB}, "tool_choice", "names 'sub', expected"),
        ("chat/completions", {**CHAT, "response_format": {"type": "json_schema"}}, "response_format.json_schema", ""),
        (
            "chat/completions",
            {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "thing"}}}},
            "response_format",
            "thing",
        ),
        ("chat/completions", {**CHAT, "chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs", "has tools"),
        ("completions", {**TEXT, "prompt": ""}, "prompt", "empty"),
        ("completions", {**TEXT, "prompt": ["a", ""]}, "prompt[1]", "empty"),
        ("completions", {**TEXT, "prompt": [1, VOCABULARY]}, "prompt", f"token id {VOCABULARY}"),
        ("completions", {**TEXT, "prompt": [[1], "a"]}, "prompt", "a list of either"),
        ("completions", {**TEXT, "prompt": "half \ud83d"}, "prompt", "not valid UTF-8"),
        ("completions", {**TEXT, "prompt": [3] * 512}, "prompt", "has 512 tokens"),
        ("completions", {**TEXT, "prompt": ["a"] * 20, "n": 10}, "n", "at most 128 sequences"),
        ("completions", {**TEXT, "suffix": "b"}, "suffix", "is not supported"),
        ("completions", {**TEXT, "max_tokens": 0}, "max_tokens", "or echo"),
        ("completions", {**TEXT, "logprobs": 21}, "logprobs", "20"),
        ("embeddings", {"input": "x", "dimensions": 3}, "dimensions", "is not supported"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(service, path, body, param, message):
    answer = ask(service, f"/v1/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), error
    assert message in error["message"]
    assert not service.runner.unfinished


def test_defaults_of_fields_that_are_not_supported_are_accepted(service):
    """The request gets as far as the tools, of which there are none."""
    defaults = {"store": False, "service_tier": "auto", "functions": None, "best_of": 1, "user": "me", "metadata": {}}
    answer = ask(service, json={**CHAT, **defaults, "tool_choice": "required"})
    assert answer.json()["error"]["param"] == "tool_choice"


@pytest.mark.parametrize(
    "content, kind, status, message",
    [
        (b"{", "application/json", 400, "the body is not JSON"),
        (b"[1]", "application/json; charset=utf-8", 400, "of type list, expected a JSON object"),
        (b"[" * 10_000, "application/json", 400, "not JSON"),
        (b"\xff\xfe", "application/json", 400, "not JSON"),
        (b"{}", "text/plain", 415, "expected application/json"),
        (b" " * 20_001, "application/json", 413, "more than 20000 bytes"),
    ],
)
def test_a_wrong_body(service, content, kind, status, message):
    answer = ask(service, content=content, headers={"Content-Type": kind})
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_a_body_whose_length_is_not_given_is_read_up_to_the_limit(service):
    async def parts():
        for _ in range(100):
            yield b" " * 1000

    answer = ask(service, content=parts(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for(tmp_path):
    async def parts():
        yield b"{"
        await asyncio.sleep(5)

    service = make_service(tmp_path / "model", JSON, write_seconds=0.05)
    service.life.ready()
    answer = ask(service, content=parts(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 408 and "0.05 seconds" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path, method, status", [("/v1/nothing", "GET", 404), ("/v1/completions", "GET", 405)])
def test_paths_and_methods_that_are_not_there(service, path, method, status):
    answer = ask(service, path, method=method)
    message = answer.json()["error"]["message"]
    assert answer.status_code == status and path in message
    assert status != 404 or "/v1/chat/completions, " in message and message.endswith("/metrics.")


def test_models_without_a_template_tools_or_a_stop_token(tmp_path):
    for template, settings, body, param in [
        (None, {}, {}, "messages"),
        (PLAIN, {}, {"tools": [TOOL]}, "tools"),
        (PLAIN, {"grammars": None}, {"response_format": {"type": "json_object"}}, "response_format"),
    ]:
        service = make_service(tmp_path / "model", template, **settings)
        service.life.ready()
        answer = ask(service, json={**CHAT, **body})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_keys(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst\n\n  second \n")
    service = make_service(tmp_path / "model", keys=read_keys(file))
    service.life.ready()
    for header, status in [
        (None, 401), ("Bearer third", 401), ("first", 401), ("Basic first", 401), ("Bearer first", 200),
        ("bearer second", 200), ("Bearer \xe9", 401),
    ]:  # fmt: skip
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        answer = ask(service, "/v1/models", method="GET", headers=headers)
        assert answer.status_code == status, header
    assert ask(service, "/health", method="GET").status_code == 200
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    file.write_text("# none\n")
    for path in (file, tmp_path / "absent"):
        with pytest.raises(RequestError, match="no API key|cannot be read"):
            read_keys(path)
    monkeypatch.setenv(VARIABLE, "mine")
    assert len(read_keys(None)) == 1
    monkeypatch.setenv(VARIABLE, " ")
    with pytest.raises(RequestError, match="is set and empty"):
        read_keys(None)
    assert ApiKeys().admit(None)
