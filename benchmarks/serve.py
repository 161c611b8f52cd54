"""Serving beside transformers: `python benchmarks/serve.py`.

The mixture of 115M parameters, random weights, saved once and opened by both servers, one after the other, each in a
process of its own. One client asks both for the same streams: 1, 8 and 32 closed loops, each of which asks again when
its answer has ended, and requests that arrive at random times (a Poisson process). Prompts of 32 to 256 tokens are
continued greedily by 32 to 128. Of every load, one run before the measured one warms up.

Printed are all new tokens over the time of the load, the time to the first token and the time between tokens (tokens
that come together share theirs), and what our engine alone does with the same requests without HTTP.

Needs torch and transformers (`pip install -e '.[test]'` on Python 3.11).
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import mixture
import tokenizers

CLIENTS = (1, 8, 32)
HUB_CONFIG = {**mixture.HUB_CONFIG, "initializer_range": 0.05}
TINY = {
    **HUB_CONFIG, "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts": 8,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Ask:
    """A prompt, how many tokens are to follow, and when it arrives, in seconds from the start."""

    prompt: list[int]
    tokens: int
    at: float = 0.0


@dataclasses.dataclass
class Answer:
    """When the request was sent and when tokens came, in seconds; how many came each time."""

    sent: float
    times: list[float] = dataclasses.field(default_factory=list)
    counts: list[int] = dataclasses.field(default_factory=list)


def make_checkpoint(folder: Path, config: dict) -> None:
    """Random weights, and a tokenizer in which every token is a word, so that words of a stream are its tokens."""
    from flax import nnx

    import qwen_moe_jax as qmj

    qmj.save_pretrained(qmj.CausalLM(qmj.ModelConfig.from_pretrained(config), rngs=nnx.Rngs(0)), folder)
    words = {f"w{number}": number for number in range(config["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def draw(count: int, vocab_size: int, *, rate: float | None = None, seed: int = 0) -> list[Ask]:
    """Requests at random; with a rate per second, they arrive at random times."""
    chosen, at, asks = random.Random(seed), 0.0, []
    for _ in range(count):
        at += chosen.expovariate(rate) if rate else 0.0
        prompt = [chosen.randrange(vocab_size) for _ in range(chosen.randint(32, 256))]
        asks.append(Ask(prompt, chosen.randint(32, 128), at))
    return asks


async def ask(client: httpx.AsyncClient, one: Ask) -> Answer:
    """Streams one answer."""
    body = {"prompt": one.prompt, "max_tokens": one.tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    answer = Answer(time.perf_counter())
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                found = json.loads(line.removeprefix("data: "))
                assert "error" not in found, found
                words = sum(len(choice["text"].split()) for choice in found["choices"])
                if words:
                    answer.times.append(time.perf_counter())
                    answer.counts.append(words)
    assert sum(answer.counts) == one.tokens, (answer.counts, one.tokens)
    return answer


async def closed_loops(url: str, asks: Sequence[Ask], clients: int) -> tuple[float, list[Answer]]:
    """So many clients, each with one request at a time; the seconds it took, and the answers."""
    waiting, answers = iter(asks), []
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=clients)) as client:

        async def loop() -> None:
            for one in waiting:
                answers.append(await ask(client, one))

        began = time.perf_counter()
        await asyncio.gather(*(loop() for _ in range(clients)))
        return time.perf_counter() - began, answers


async def arrivals(url: str, asks: Sequence[Ask]) -> tuple[float, list[Answer]]:
    """Every request at its time, whatever the others do."""
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:

        async def one_at(one: Ask) -> Answer:
            await asyncio.sleep(one.at)
            return await ask(client, one)

        began = time.perf_counter()
        answers = await asyncio.gather(*map(one_at, asks))
        return time.perf_counter() - began, answers


def figures(seconds: float, answers: Sequence[Answer]) -> str:
    """One row of the table."""
    tokens = sum(sum(answer.counts) for answer in answers)
    first = sorted(answer.times[0] - answer.sent for answer in answers)
    between = sorted(
        (after - before) / count
        for answer in answers
        for before, after, count in zip(answer.times[:-1], answer.times[1:], answer.counts[1:], strict=True)
        for _ in range(count)
    )
    numbers = [f"{tokens / seconds:9.1f}"]
    for values in (first, between):
        numbers += [f"{1000 * at(values, share):9.1f}" for share in (0.5, 0.99)]
    return " ".join(numbers)


def at(values: Sequence[float], share: float) -> float:
    """A quantile of sorted values; NaN without any."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


@contextlib.contextmanager
def server(command: Sequence[str], port: int) -> Iterator[str]:
    """A server in a process of its own, until it is no longer needed: its URL."""
    process = subprocess.Popen([*command], env=os.environ)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            assert process.poll() is None, f"the server has ended with {process.returncode}"
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def raw_engine(folder: Path, dtype: str, asks: Sequence[Ask], slots: int) -> tuple[float, float]:
    """Tokens per second of our engine without HTTP, all requests at once; and seconds a step."""
    import qwen_moe_jax as qmj
    from qwen_moe_jax.inference.engine import Engine
    from qwen_moe_jax.inference.request import Request

    engine = Engine(qmj.from_pretrained(folder, dtype=dtype), slots=slots, max_length=512)
    engine.compile()
    for _ in range(2):
        steps, began = engine.load.steps, time.perf_counter()
        for one in asks:
            engine.submit(Request(token_ids=one.prompt, config=qmj.GenerationConfig(max_new_tokens=one.tokens)))
        while not engine.idle:
            engine.step()
        seconds = time.perf_counter() - began
    return sum(one.tokens for one in asks) / seconds, seconds / (engine.load.steps - steps)


def steps_of(url: str) -> float:
    """Steps of our server's engine so far; 0 for the other server."""
    with contextlib.suppress(StopIteration):
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("qwen_moe_jax_steps ")))
    return 0.0


def say(report: list[str], line: str) -> None:
    """Prints a line, and keeps it."""
    print(line, flush=True)
    report.append(line)


def measure(report: list[str], name: str, url: str, arguments: argparse.Namespace, vocab_size: int) -> None:
    """The rows of one server."""
    for clients in CLIENTS:
        asks = draw(arguments.requests, vocab_size, seed=clients)
        asyncio.run(closed_loops(url, asks[: 2 * clients], clients))
        steps = steps_of(url)
        seconds, answers = asyncio.run(closed_loops(url, asks, clients))
        steps = steps_of(url) - steps
        per_step = f"{1000 * seconds / steps:9.2f}" if steps else ""
        say(report, f"{name:13} {clients:3} clients     {figures(seconds, answers)} {per_step}")
    asks = draw(arguments.requests, vocab_size, rate=arguments.rate, seed=99)
    say(report, f"{name:13} {arguments.rate:4.1f} arrivals/s {figures(*asyncio.run(arrivals(url, asks)))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=128, help="of each load")
    parser.add_argument("--rate", type=float, default=2.0, help="arrivals per second")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--only", choices=("ours", "transformers"))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    arguments = parser.parse_args()
    config = TINY if arguments.tiny else HUB_CONFIG
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "model"
        make_checkpoint(folder, config)
        report: list[str] = []
        say(report, f"{'':29}{'tokens/s':>10} {'first p50':>9} {'p99':>9} {'next p50':>9} {'p99':>9} ms  ms/step")
        here = Path(__file__).parent
        port = str(free_port())
        ours = ["-m", "qwen_moe_jax", "serve", str(folder), "--port", port, "--slots", str(arguments.slots)]
        ours += ["--max-length", "512", "--embeddings", "off", "--dtype", arguments.dtype]
        theirs = [str(here / "serve_transformers.py"), str(folder), port, arguments.dtype]
        for name, command in (("transformers", theirs), ("ours", ours)):
            if arguments.only in (None, name):
                with server([sys.executable, *command], int(port)) as url:
                    measure(report, name, url, arguments, config["vocab_size"])
        if arguments.only != "transformers":
            for slots in CLIENTS:
                asks = draw(arguments.requests, config["vocab_size"], seed=slots)
                tokens, step = raw_engine(folder, arguments.dtype, asks, slots)
                say(report, f"engine alone  {slots:3} slots       {tokens:9.1f} {'':39} {1000 * step:9.2f}")
    if arguments.markdown:
        text = "\n".join(report)
        arguments.markdown.write_text(f"# Serving\n\n```\n{text}\n```\n", encoding="utf-8")


if __name__ == "__main__":
    main()
