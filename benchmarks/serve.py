"""Serving against transformers: `python benchmarks/serve.py`.

The mixture of 115M parameters, random weights, saved once and opened by both servers, one after the other, each in a
process of its own. One client asks both for the same streams: 1, 8 and 32 closed loops, each of which asks again when
its answer has ended, and requests that arrive at random times (a Poisson process). Prompts of 32 to 256 tokens are
continued greedily by 32 to 128. Every load goes on for `--before` seconds and then `--seconds`, which are measured.

Printed are the new tokens of these seconds, the time to the first token and the time between tokens (tokens that come
together share theirs), and what our engine alone does with the same streams without HTTP. After `--minutes`, no other
row is begun.

Needs torch and transformers (`pip install -e '.[test]'` on Python 3.11).
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
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
    """A prompt, how many tokens are to follow, and for how many seconds nothing arrives after it."""

    prompt: list[int]
    tokens: int
    gap: float = 0.0


@dataclasses.dataclass(frozen=True)
class Window:
    """When a load is measured, in seconds of `time.perf_counter`; it has begun before, and no request is sent later."""

    start: float
    end: float

    @staticmethod
    def of(arguments: argparse.Namespace) -> "Window":
        """The window of a load that begins now."""
        start = time.perf_counter() + arguments.before
        return Window(start, start + arguments.seconds)

    def __contains__(self, moment: float) -> bool:
        return self.start <= moment < self.end


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


def draw(vocab_size: int, *, rate: float | None = None, seed: int = 0) -> Iterator[Ask]:
    """Requests at random, without end; with a rate per second, they arrive at random times."""
    chosen = random.Random(seed)
    while True:
        prompt = [chosen.randrange(vocab_size) for _ in range(chosen.randint(32, 256))]
        yield Ask(prompt, chosen.randint(32, 128), chosen.expovariate(rate) if rate else 0.0)


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


async def closed_loops(client: httpx.AsyncClient, asks: Iterator[Ask], clients: int, window: Window) -> list[Answer]:
    """So many clients, each with one request at a time."""
    answers = []

    async def loop() -> None:
        while time.perf_counter() < window.end:
            answers.append(await ask(client, next(asks)))

    await asyncio.gather(*(loop() for _ in range(clients)))
    return answers


async def arrivals(client: httpx.AsyncClient, asks: Iterator[Ask], window: Window) -> list[Answer]:
    """Every request at its time, whatever the others do."""
    sent = []
    while time.perf_counter() < window.end:
        one = next(asks)
        sent.append(asyncio.create_task(ask(client, one)))
        await asyncio.sleep(one.gap)
    return await asyncio.gather(*sent)


async def steps_in(client: httpx.AsyncClient, window: Window) -> float:
    """Steps of our server's engine in a window; 0 for the other server, which does not say."""
    counts = []
    for moment in (window.start, window.end):
        await asyncio.sleep(moment - time.perf_counter())
        lines = (await client.get("/metrics")).text.splitlines()
        counts += [float(line.split()[1]) for line in lines if line.startswith("qwen_moe_jax_steps ")]
    return counts[1] - counts[0] if counts else 0.0


async def measured(url: str, arguments: argparse.Namespace, vocab_size: int, clients: int | None) -> str:
    """The row of one load: so many closed loops, or, with None, arrivals."""
    rate = None if clients else arguments.rate
    asks = draw(vocab_size, rate=rate, seed=clients or 99)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        window = Window.of(arguments)
        load = closed_loops(client, asks, clients, window) if clients else arrivals(client, asks, window)
        answers, steps = await asyncio.gather(load, steps_in(client, window))
    per_step = f"{1000 * arguments.seconds / steps:9.2f}" if steps else ""
    return f"{figures(window, answers)} {per_step}".rstrip()


def figures(window: Window, answers: Sequence[Answer]) -> str:
    """What came in a window."""
    pieces = [(time, count) for answer in answers for time, count in zip(answer.times, answer.counts, strict=True)]
    tokens = sum(count for moment, count in pieces if moment in window)
    first = sorted(answer.times[0] - answer.sent for answer in answers if answer.sent in window)
    between = sorted(
        (after - before) / count
        for answer in answers
        for before, after, count in zip(answer.times[:-1], answer.times[1:], answer.counts[1:], strict=True)
        for _ in range(count)
        if after in window
    )
    numbers = [f"{tokens / (window.end - window.start):9.1f}"]
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


def raw_engine(folder: Path, arguments: argparse.Namespace, vocab_size: int, slots: int) -> str:
    """The row of our engine without HTTP, as many requests at once as it has slots."""
    import qwen_moe_jax as qmj
    from qwen_moe_jax.compilation_cache import use_compilation_cache
    from qwen_moe_jax.inference.engine import Engine
    from qwen_moe_jax.inference.request import Request

    use_compilation_cache()
    engine = Engine(qmj.from_pretrained(folder, dtype=arguments.dtype), slots=slots, max_length=512)
    engine.compile()
    asks, answers = draw(vocab_size, seed=slots), dict[int, Answer]()
    running, steps, window = set[int](), 0, Window.of(arguments)
    while (now := time.perf_counter()) < window.end:
        for one in itertools.islice(asks, slots - len(running)):
            config = qmj.GenerationConfig(max_new_tokens=one.tokens)
            number = engine.submit(Request(token_ids=one.prompt, config=config))
            answers[number] = Answer(time.perf_counter())
            running.add(number)
        chunks = engine.step()
        steps += now in window
        for chunk in chunks:
            answers[chunk.request].times.append(time.perf_counter())
            answers[chunk.request].counts.append(len(chunk.token_ids))
            if chunk.finished:
                running.discard(chunk.request)
    begun = [answer for answer in answers.values() if answer.times]
    return f"{figures(window, begun)} {1000 * arguments.seconds / steps:9.2f}"


class Report:
    """Rows of the table, printed as they come; none is begun after so many minutes."""

    def __init__(self, minutes: float):
        self.lines: list[str] = []
        self._end = time.perf_counter() + 60 * minutes

    def say(self, line: str) -> None:
        """Prints a line, and keeps it."""
        print(line, flush=True)
        self.lines.append(line)

    def add(self, name: str, row: Callable[[], str]) -> None:
        """Measures a row."""
        self.say(f"{name:29} {row() if time.perf_counter() < self._end else 'left out: the time was used up'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=float, default=5.0, help="seconds of each load before those that are measured")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load, measured")
    parser.add_argument("--minutes", type=float, default=9.0, help="in all, after which no row is begun")
    parser.add_argument("--rate", type=float, default=1.0, help="arrivals per second")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--only", choices=("ours", "transformers"))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    arguments = parser.parse_args()
    config = TINY if arguments.tiny else HUB_CONFIG
    vocab_size, port, here = config["vocab_size"], str(free_port()), Path(__file__).parent
    report = Report(arguments.minutes)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "model"
        make_checkpoint(folder, config)
        report.say(f"{'':29} {'tokens/s':>9} {'first p50':>9} {'p99':>9} {'next p50':>9} {'p99':>9} ms  ms/step")
        ours = ["-m", "qwen_moe_jax", "serve", str(folder), "--port", port, "--slots", str(arguments.slots)]
        ours += ["--max-length", "512", "--embeddings", "off", "--dtype", arguments.dtype]
        theirs = [str(here / "serve_transformers.py"), str(folder), port, arguments.dtype]
        for name, command in (("ours", ours), ("transformers", theirs)):
            if arguments.only in (None, name):
                with server([sys.executable, *command], int(port)) as url:
                    for clients in (*CLIENTS, None):
                        load = f"{clients:3} clients" if clients else f"{arguments.rate:4.1f} arrivals/s"
                        row = functools.partial(measured, url, arguments, vocab_size, clients)
                        report.add(f"{name:13} {load}", lambda row=row: asyncio.run(row()))
        if arguments.only != "transformers":
            for slots in CLIENTS[::-1]:
                row = functools.partial(raw_engine, folder, arguments, vocab_size, slots)
                report.add(f"engine alone  {slots:3} slots", row)
    if arguments.markdown:
        text = "\n".join(report.lines)
        arguments.markdown.write_text(f"# Serving\n\n```\n{text}\n```\n", encoding="utf-8")


if __name__ == "__main__":
    main()
