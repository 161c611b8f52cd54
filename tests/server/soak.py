"""Requests of all kinds at random, well-formed and not, by clients that behave and that do not.

By hand, against a server that was started with `--api-key-file` of the key "right":
`python -m tests.server.soak http://127.0.0.1:8000 2000`.
"""

import asyncio
import collections
import json
import random
import sys
import time
from collections.abc import Callable

import httpx

KEY = "right"
PROMPTS = ["The quick brown fox", "def add(a, b):", "naïve 你好", "stop here. ", "x" * 40]
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
JSON_FORMAT = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
#: How often each kind comes.
KINDS = {
    "whole": 6, "stream": 4, "several": 2, "slow": 1, "schema": 1, "vanish": 3, "impatient": 2,
    "malformed": 1, "unknown": 1, "too_long": 1, "wrong_key": 1,
}  # fmt: skip

Expected = Callable[[str, int], str]


class Soak:
    """A number of requests to one server.

    Args:
        url: of the server.
        expected: the text that follows a prompt, by the largest number of new tokens.
        seed: of everything random.

    Attributes:
        counts: how often each kind was as it has to be.
    """

    def __init__(self, url: str, expected: Expected, *, seed: int = 0):
        self._url = url
        self._expected = expected
        self._random = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()

    async def run(self, requests: int, at_once: int = 16) -> None:
        """Asks, a few at a time, and checks every answer."""
        kinds = self._random.choices(list(KINDS), list(KINDS.values()), k=requests)
        limits = httpx.Limits(max_connections=at_once)
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=self._url, headers=headers, timeout=300, limits=limits) as self._client:
            waiting = iter(kinds)

            async def work() -> None:
                for kind in waiting:
                    await getattr(self, f"_{kind}")()
                    self.counts[kind] += 1

            await asyncio.gather(*(work() for _ in range(at_once)))

    def _body(self, **settings: object) -> dict:
        prompt, count = self._random.choice(PROMPTS), self._random.choice([1, 5, 20])
        return {"prompt": prompt, "max_tokens": count, "temperature": 0, **settings}

    async def _post(self, body: dict, path: str = "completions", **settings) -> httpx.Response:
        return await self._client.post(f"/v1/{path}", json=body, **settings)

    async def _whole(self) -> None:
        body = self._body()
        answer = await self._post(body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == self._expected(body["prompt"], body["max_tokens"])

    async def _several(self) -> None:
        body = self._body(n=3)
        choices = (await self._post(body)).json()["choices"]
        assert [choice["text"] for choice in choices] == [self._expected(body["prompt"], body["max_tokens"])] * 3

    async def _stream(self, pause: float = 0.0) -> None:
        body = self._body(stream=True)
        text = ""
        async with self._client.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line async for line in _paused(answer.aiter_lines(), pause)]
        events = [line.removeprefix("data: ") for line in lines if line]
        assert events.pop() == "[DONE]"
        for event in map(json.loads, events):
            text += event["choices"][0]["text"]
        assert text == self._expected(body["prompt"], body["max_tokens"])

    async def _slow(self) -> None:
        await self._stream(pause=0.01)

    async def _schema(self) -> None:
        messages = [{"role": "user", "content": "Hi"}]
        answer = await self._post(
            {"messages": messages, "response_format": JSON_FORMAT, "max_tokens": 40, "temperature": 0},
            "chat/completions",
        )
        [choice] = answer.json()["choices"]
        text = choice["message"]["content"] or "{"
        assert text.startswith("{") and (choice["finish_reason"] == "length" or "x" in json.loads(text))

    async def _vanish(self) -> None:
        async with self._client.stream("POST", "/v1/completions", json=self._body(stream=True, n=2)) as answer:
            async for _ in answer.aiter_lines():
                return

    async def _impatient(self) -> None:
        try:
            await self._post(self._body(n=2), timeout=self._random.choice([0.001, 0.02]))
        except httpx.TimeoutException:
            pass

    async def _malformed(self) -> None:
        content = self._random.choice([b"{", b"[]", b"\xff", b'{"prompt": }', b"null"])
        answer = await self._client.post(
            "/v1/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400, answer.text

    async def _unknown(self) -> None:
        answer = await self._post(self._body(tempreature=1))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tempreature")

    async def _too_long(self) -> None:
        answer = await self._post(self._body(prompt=[3] * 100_000))
        assert answer.json()["error"]["code"] == "context_length_exceeded"

    async def _wrong_key(self) -> None:
        answer = await self._post(self._body(), headers={"Authorization": "Bearer wrong"})
        assert answer.status_code == 401


async def _paused(lines, pause: float):
    async for line in lines:
        yield line
        if pause:
            await asyncio.sleep(pause)


def main(url: str, requests: int) -> None:
    """The soak by hand: every answer equals that of the same request alone."""
    alone: dict[tuple[str, int], str] = {}
    with httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=300) as client:
        for prompt in PROMPTS:
            for count in (1, 5, 20):
                body = {"prompt": prompt, "max_tokens": count, "temperature": 0}
                alone[prompt, count] = client.post(f"{url}/v1/completions", json=body).json()["choices"][0]["text"]
        before = client.get(f"{url}/metrics").text
        began = time.perf_counter()
        soak = Soak(url, lambda prompt, count: alone[prompt, count])
        asyncio.run(soak.run(requests))
        print(f"{requests} requests in {time.perf_counter() - began:.1f} s: {dict(soak.counts)}")
        time.sleep(1)
        after = client.get(f"{url}/metrics").text
        print(client.get(f"{url}/health").text)
    for name in (
        "waiting",
        "active_slots",
        "free_slots",
        "cached_tokens",
        "compilations_total",
        "resident_memory_bytes",
    ):
        lines = [line for text in (before, after) for line in text.splitlines() if not line.startswith("#")]
        print(name, *[float(line.split()[-1]) for line in lines if line.split()[0].endswith(f"_{name}")])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
