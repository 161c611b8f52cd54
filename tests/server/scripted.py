"""An engine that writes what a test tells it to, a tokenizer and templates for it, and a server around them."""

import asyncio
import contextlib
import dataclasses
import itertools
import socket
import threading
import time
from collections.abc import Callable

from qwen_moe_jax.config import GenerationConfig
from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.chat_template import load_chat_template
from qwen_moe_jax.inference.request import Chunk, PromptLogProbs, Request
from qwen_moe_jax.server.chat_form import ChatForm
from qwen_moe_jax.server.grammar import Grammars
from qwen_moe_jax.server.serve import address_of, bind, serve
from qwen_moe_jax.server.service import Limits, Service
from tests.inference.tokenizer_kinds import byte_level

END = "<|im_end|>"


def make_tokenizer():
    """As Qwen3's: thoughts and tool calls are between tokens of their own, which are not special."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["</think>", "<tool_call>", "</tool_call>"])
    return tokenizer


TOKENIZER = make_tokenizer()
VOCABULARY = TOKENIZER.get_vocab_size()
STOP = TOKENIZER.token_to_id(END)


@dataclasses.dataclass(frozen=True)
class Load:
    waiting: int
    active_slots: int
    free_slots: int
    decoded_tokens: int


@dataclasses.dataclass
class _Row:
    request: Request
    script: list[int]
    written: int = 0


class ScriptedEngine:
    """Writes `answer(prompt)`, a token a step for each of a few slots; the rest of the protocol as the real engine.

    Attributes:
        seen: the requests, in the order they came.
        cancelled: numbers of those that were cancelled.
        delay: seconds that a step takes.
        before_step: called with the texts of the prompts in the slots; what it raises ends the engine.
        fails: whether a prompt's logits become NaN at the third token.
    """

    def __init__(
        self,
        answer: Callable[[str], str] = lambda prompt: prompt,
        *,
        slots: int = 4,
        max_length: int = 512,
        tokenizer=TOKENIZER,
    ):
        self._tokenizer = tokenizer
        self._stop = tokenizer.token_to_id(END)
        self.answer = answer
        self.slots = slots
        self.max_length = max_length
        self.delay = 0.0
        self.before_step: Callable[[list[str]], None] = lambda prompts: None
        self.fails: Callable[[str], bool] = lambda prompt: False
        self._numbers = itertools.count()
        self.forget()

    def forget(self) -> None:
        """As after a new start."""
        self.seen: list[Request] = []
        self.cancelled: list[int] = []
        self.steps = self._decoded = 0
        self.closed = False
        self._waiting: dict[int, _Row] = {}
        self._active: dict[int, _Row] = {}

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._active

    @property
    def load(self) -> Load:
        return Load(len(self._waiting), len(self._active), self.slots - len(self._active), self._decoded)

    def expert_loads(self) -> None:
        return None

    def memory(self) -> list[tuple[str, int]]:
        return [("words", 8)]

    def submit(self, request: Request) -> int:
        if len(request.token_ids) >= self.max_length:
            raise RequestError(f"the prompt has {len(request.token_ids)} tokens, the engine takes {self.max_length}.")
        number = next(self._numbers)
        self.seen.append(request)
        text = self._tokenizer.decode(list(request.token_ids), skip_special_tokens=False)
        self._waiting[number] = _Row(request, self._tokenizer.encode(self.answer(text)).ids)
        return number

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)
        self._waiting.pop(number, None)
        self._active.pop(number, None)

    def close(self) -> None:
        self.closed = True

    def step(self) -> list[Chunk]:
        self.steps += 1
        while self._waiting and len(self._active) < self.slots:
            number = next(iter(self._waiting))
            self._active[number] = self._waiting.pop(number)
        self.before_step([self._tokenizer.decode(list(row.request.token_ids)) for row in self._active.values()])
        if self._active:
            time.sleep(self.delay)
        chunks = [self._chunk(number, row) for number, row in self._active.items()]
        for chunk in chunks:
            if chunk.finished:
                self._active.pop(chunk.request, None)
        return chunks

    def _chunk(self, number: int, row: _Row) -> Chunk:
        request, config = row.request, row.request.config
        if request.deadline is not None and time.monotonic() > request.deadline:
            return Chunk(request=number, token_ids=(), log_probs=(), finished="deadline")
        if row.written == 2 and self.fails(self._tokenizer.decode(list(request.token_ids))):
            error = RequestError("the logits are NaN.")
            return Chunk(request=number, token_ids=(), log_probs=(), finished="error", error=error)
        wanted = row.script[row.written] if row.written < len(row.script) else self._stop
        try:
            token = wanted if request.mask is None else self._allowed(request.mask, wanted)
        except RequestError as error:
            return Chunk(request=number, token_ids=(), log_probs=(), finished="error", error=error)
        row.written += 1
        self._decoded += 1
        finished = None
        if token in config.eos_token_id:
            finished = "stop"
        elif row.written == config.max_new_tokens:
            finished = "length"
        elif request.mask is not None:
            request.mask.accept(token)
        first = row.written == 1
        return Chunk(
            request=number,
            token_ids=(token,),
            log_probs=(-0.25,),
            top_logprobs=(_top(token, request.top_logprobs),) if request.top_logprobs else (),
            prompt_logprobs=_of_prompt(request) if first and request.prompt_logprobs is not None else None,
            finished=finished,
        )

    def _allowed(self, mask, wanted: int) -> int:
        """The token the script wants, if the grammar allows it; else the stop token, or the first that is allowed."""
        words = mask.allowed()
        tokens = [token for token in range(VOCABULARY) if words[token // 32] >> (token % 32) & 1]
        for token in (wanted, self._stop):
            if token in tokens:
                return token
        return tokens[0]


def _top(token: int, count: int):
    others = [other for other in range(count + 1) if other != token]
    return tuple((other, -0.25 - place) for place, other in enumerate([token, *others][:count]))


def _of_prompt(request: Request) -> PromptLogProbs:
    tokens = request.token_ids[1:]
    top = tuple(_top(token, request.prompt_logprobs) for token in tokens)
    return PromptLogProbs(log_probs=tuple(-0.5 - place for place in range(len(tokens))), top=top)


def make_service(
    tmp_path, template: str | None = None, *, slots: int = 4, max_length: int = 512, **settings
) -> Service:
    """A service of the scripted engine's vocabulary; `settings` are those of `Service` and of `Limits`."""
    of_limits = {field.name for field in dataclasses.fields(Limits)}
    limits = {name: settings.pop(name) for name in list(settings) if name in of_limits}
    chat = None
    if template is not None:
        tmp_path.mkdir(exist_ok=True)
        (tmp_path / "chat_template.jinja").write_text(template)
        chat = ChatForm(load_chat_template(tmp_path))
    return Service(
        **{
            "name": "tiny",
            "vocab_size": VOCABULARY,
            "tokenizer": TOKENIZER,
            "generation": GenerationConfig(eos_token_id=(STOP,)),
            "limits": Limits(max_length=max_length, slots=slots, **limits),
            "chat": chat,
            "grammars": Grammars(TOKENIZER, VOCABULARY, [STOP]),
            **settings,
        }
    )


class Running:
    """A server in a thread: its URL, and its exit code once it has ended."""

    def __init__(self, service: Service, engine, *, send_buffer: int | None = None, **settings):
        self.service = service
        self.engine = engine
        self.code: int | None = None
        self.error: BaseException | None = None
        self._listening = bind("127.0.0.1", 0)
        if send_buffer is not None:  # of its connections, so that a slow reader is soon noticed
            self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.url = address_of(self._listening)
        self._settings = settings
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.code = asyncio.run(self._serve())
        except BaseException as error:
            self.error = error
            self._ready.set()

    async def _serve(self) -> int:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        load = self.engine if callable(self.engine) else lambda: self.engine
        return await serve(
            self.service, load, self._listening, on_ready=self._ready.set, stop=self._stop, **self._settings
        )

    def ready(self) -> "Running":
        assert self._ready.wait(900)
        return self

    def signal(self) -> None:
        """As a SIGTERM does."""
        self._loop.call_soon_threadsafe(self._stop.set)

    def join(self) -> int | None:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.code


@contextlib.contextmanager
def running(service: Service, engine, **settings):
    server = Running(service, engine, **{"drain_seconds": 0.0, **settings}).ready()
    try:
        yield server
    finally:
        server.signal()
        server.join()


def eventually(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it has not come true"
        time.sleep(0.005)
