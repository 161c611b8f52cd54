"""Serving against transformers: `python benchmarks/serve.py`.

The mixture of 115M parameters, random weights, saved once and opened by both servers, one after the other, each in a
process of its own. One client asks both for the same streams: 1, 8 and 32 closed loops, each of which asks again when
its answer has ended, and requests that arrive at random times (a Poisson process). Prompts of 32 to 256 tokens are
continued greedily by 32 to 128. Every load goes on for `--before` seconds and then `--seconds`, which are measured.

Printed are the new tokens of these seconds, the time to the first token and the time between tokens (tokens that come
together share theirs), and what our engine alone does with the same streams without HTTP. Its `decoding` rows begin
when all prompts are read and end before the first answer does; those of a session are the same without an engine: one
batch of prompts, decoded 32 tokens a call. After `--minutes`, no other row is begun.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import httpx
import mixture
import tokenizers

CLIENTS = (1, 8, 32)
MAX_LENGTH = 512
#: Of the `decoding` rows: tokens of every request before the measurement, and of the first that ends it.
WARM_TOKENS, DECODED = 16, 370
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


async def ask(url: str, one: Ask) -> Answer:
    """Streams one answer, over a connection of its own.

    httpx takes 0.14 ms of a core for every event, which the servers then lack: both run on the same cores.
    """
    body = {"prompt": one.prompt, "max_tokens": one.tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    content, host = json.dumps(body).encode(), url.removeprefix("http://")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    answer = Answer(time.perf_counter())
    reader, writer = await asyncio.open_connection(*host.split(":"))
    writer.write(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    status = await reader.readline()
    assert status.split()[1] == b"200", await reader.read()
    # Both servers send an event in one chunk, so no chunk's length comes within a line.
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            found = json.loads(line.removeprefix(b"data: "))
            assert "error" not in found, found
            words = sum(len(choice["text"].split()) for choice in found["choices"])
            if words:
                answer.times.append(time.perf_counter())
                answer.counts.append(words)
    writer.close()
    assert sum(answer.counts) == one.tokens, (answer.counts, one.tokens)
    return answer


async def closed_loops(url: str, asks: Iterator[Ask], clients: int, window: Window) -> list[Answer]:
    """So many clients, each with one request at a time."""
    answers = []

    async def loop() -> None:
        while time.perf_counter() < window.end:
            answers.append(await ask(url, next(asks)))

    await asyncio.gather(*(loop() for _ in range(clients)))
    return answers


async def arrivals(url: str, asks: Iterator[Ask], window: Window) -> list[Answer]:
    """Every request at its time, whatever the others do."""
    sent = []
    while time.perf_counter() < window.end:
        one = next(asks)
        sent.append(asyncio.create_task(ask(url, one)))
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
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        window = Window.of(arguments)
        load = closed_loops(url, asks, clients, window) if clients else arrivals(url, asks, window)
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


class Alone:
    """Our engine without HTTP, with as many slots as the server: its programs are read from the server's cache."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, vocab_size: int):
        import qwen_moe_jax as qmj
        from qwen_moe_jax.compilation_cache import use_compilation_cache

        use_compilation_cache()
        self._arguments, self._vocab_size = arguments, vocab_size
        self._model = qmj.from_pretrained(folder, dtype=arguments.dtype)
        self._engine = qmj.Engine(self._model, slots=arguments.slots, max_length=MAX_LENGTH)
        self._engine.compile()

    def loops(self, clients: int) -> str:
        """The row of so many closed loops."""
        asks, answers = draw(self._vocab_size, seed=clients), dict[int, Answer]()
        running, steps, window = set[int](), 0, Window.of(self._arguments)
        while (now := time.perf_counter()) < window.end:
            for one in itertools.islice(asks, clients - len(running)):
                number = self._submit(one.prompt, one.tokens)
                answers[number] = Answer(time.perf_counter())
                running.add(number)
            chunks = self._engine.step()
            steps += now in window
            for chunk in chunks:
                answers[chunk.request].times.append(time.perf_counter())
                answers[chunk.request].counts.append(len(chunk.token_ids))
                if chunk.finished:
                    running.discard(chunk.request)
        self._cancel(running)
        begun = [answer for answer in answers.values() if answer.times]
        return f"{figures(window, begun)} {1000 * self._arguments.seconds / steps:9.2f}"

    def decoding(self, rows: int) -> str:
        """The row of so many requests whose prompts are read: tokens/s, and milliseconds of a forward pass."""
        running = [self._submit(prompt, MAX_LENGTH) for prompt in self._prompts(rows)]
        got = dict.fromkeys(running, 0)
        while min(got.values()) < WARM_TOKENS:
            self._step(got)
        start, before = time.perf_counter(), sum(got.values())
        while time.perf_counter() < start + self._arguments.seconds / 4 and max(got.values()) < DECODED:
            self._step(got)
        rate = (sum(got.values()) - before) / (time.perf_counter() - start)
        self._cancel(running)
        return _rate(rate, rows)

    def session(self, rows: int) -> str:
        """The same figures of a session."""
        import qwen_moe_jax as qmj
        from qwen_moe_jax.inference.session import stream

        times, tokens = [], 0
        for _ in range(2):  # the first compiles
            times, tokens = [], 0
            configs = [qmj.GenerationConfig(max_new_tokens=1 + 3 * 32)] * rows
            for chunk in stream(self._model, self._prompts(rows), configs):
                times.append(time.perf_counter())
                tokens += len(chunk.token_ids)
        # The chunks of the first tokens come before any is decoded.
        return _rate((tokens - rows) / (times[-1] - times[rows - 1]), rows)

    def _prompts(self, rows: int) -> list[list[int]]:
        chosen = random.Random(rows)
        return [[chosen.randrange(self._vocab_size) for _ in range(128)] for _ in range(rows)]

    def _submit(self, prompt: list[int], tokens: int) -> int:
        import qwen_moe_jax as qmj

        return self._engine.submit(qmj.Request(token_ids=prompt, config=qmj.GenerationConfig(max_new_tokens=tokens)))

    def _step(self, got: dict[int, int]) -> None:
        for chunk in self._engine.step():
            got[chunk.request] += len(chunk.token_ids)

    def _cancel(self, running: Iterable[int]) -> None:
        for number in running:
            self._engine.cancel(number)
        self._engine.step()


def _rate(rate: float, rows: int) -> str:
    return f"{rate:9.1f} {1000 * rows / rate:49.2f}"


class Report:
    """Rows of the table, printed as they come; none is begun after so many minutes."""

    def __init__(self, minutes: float):
        self.lines: list[str] = []
        self._end = time.perf_counter() + 60 * minutes

    def say(self, line: str) -> None:
        """Prints a line, and keeps it."""
        print(line, flush=True)
        self.lines.append(line)

    @property
    def has_time(self) -> bool:
        """Whether another row may be begun."""
        return time.perf_counter() < self._end

    def add(self, name: str, row: Callable[[], str]) -> None:
        """Measures a row."""
        self.say(f"{name:29} {row() if self.has_time else 'left out: the time was used up'}")


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
        ours += ["--max-length", str(MAX_LENGTH), "--embeddings", "off", "--dtype", arguments.dtype]
        theirs = [str(here / "serve_transformers.py"), str(folder), port, arguments.dtype]
        for name, command in (("ours", ours), ("transformers", theirs)):
            if arguments.only in (None, name):
                with server([sys.executable, *command], int(port)) as url:
                    for clients in (*CLIENTS, None):
                        load = f"{clients:3} clients" if clients else f"{arguments.rate:4.1f} arrivals/s"
                        row = functools.partial(measured, url, arguments, vocab_size, clients)
                        report.add(f"{name:13} {load}", lambda row=row: asyncio.run(row()))
        if arguments.only != "transformers" and report.has_time:
            alone = Alone(folder, arguments, vocab_size)
            rows = {"engine alone  {} clients": alone.loops, "engine alone  {} decoding": alone.decoding}
            for name, measure in {**rows, "session       {} decoding": alone.session}.items():
                for count in CLIENTS:
                    report.add(name.format(f"{count:3}"), functools.partial(measure, count))
    if arguments.markdown:
        text = "\n".join(report.lines)
        arguments.markdown.write_text(f"# Serving\n\n```\n{text}\n```\n", encoding="utf-8")


if __name__ == "__main__":
    main()
