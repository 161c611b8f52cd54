"""`qwen-moe-jax serve`: a checkpoint behind an OpenAI-compatible HTTP server."""

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_moe_jax.cli.arguments import (
    add_host_arguments,
    add_model_arguments,
    end_all_processes,
    join_processes,
    load_model,
)
from qwen_moe_jax.errors import CheckpointError, ConfigError, RequestError
from qwen_moe_jax.units import format_count

if TYPE_CHECKING:
    from qwen_moe_jax.model.causal_lm import CausalLM
    from qwen_moe_jax.server.service import Service

SUMMARY = "serve a checkpoint over HTTP to OpenAI's clients: many requests share one model and one cache"

#: Tokens of a request where --max-length is not given: all positions of a long model may need too much memory.
DEFAULT_MAX_LENGTH = 8192
#: Seconds between two steps of several processes without a request: the others wait in a collective.
HEARTBEAT = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, several_adapters=True)
    _add_address_arguments(parser)
    _add_limit_arguments(parser)
    add_host_arguments(parser)


def _add_address_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("address")
    group.add_argument("--host", default="127.0.0.1", help="the address to listen on; 127.0.0.1, this computer alone")
    group.add_argument(
        "--port", type=int, default=8000, metavar="N", help="the port; 8000 if not given, 0 is a free one"
    )
    group.add_argument(
        "--served-model-name", metavar="NAME", help="the model's name in requests; the folder's if not given"
    )
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="API keys, one a line, of which requests have to bring one; without, that of the environment variable "
        "QWEN_MOE_JAX_API_KEY, and without that, none is needed",
    )


def _add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument("--slots", type=_positive, metavar="N", help="requests at once; what fits, if not given")
    group.add_argument(
        "--max-length",
        type=_positive,
        metavar="N",
        help=f"tokens of a request, prompt and answer; the model's own limit, but at most {DEFAULT_MAX_LENGTH}, if not "
        "given",
    )
    group.add_argument(
        "--cache-tokens",
        type=_positive,
        metavar="N",
        help="tokens of all requests together in the cache; --max-length for each slot, if not given. Where these do "
        "not suffice, a request waits, or is put back into the queue and read again",
    )
    group.add_argument(
        "--max-waiting", type=_not_negative, default=256, metavar="N", help="requests that may wait for a slot; 256"
    )
    group.add_argument(
        "--max-body-bytes", type=_positive, default=8 << 20, metavar="N", help="of the body of a request; 8388608"
    )
    group.add_argument("--max-seconds", type=_seconds, metavar="X", help="of a request; no limit if not given")
    group.add_argument(
        "--write-seconds", type=_seconds, default=60.0, metavar="X",
        help="after which a client that does not read its stream is left; 60",
    )  # fmt: skip
    group.add_argument(
        "--drain-seconds", type=_seconds, default=30.0, metavar="X",
        help="that requests have to end after SIGTERM; 30. A second signal ends the server at once",
    )  # fmt: skip
    group.add_argument(
        "--embeddings",
        choices=("mean", "last", "off"),
        default="mean",
        help="of /v1/embeddings: the mean of the last hidden states (the default), or that of the last token",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal, and returns the exit code: 0, or 70 where the engine has failed.

    Raises:
        RequestError: the extra `serve` is not installed, or the file of keys cannot be used.
        ConfigError, CheckpointError, ShardingError: as `from_pretrained` and `make_mesh`; an address that cannot be
            listened on.
    """
    missing = [name for name in ("starlette", "uvicorn", "prometheus_client", "llguidance") if not _is_there(name)]
    if missing:
        raise RequestError(f"{', '.join(missing)} is not installed: pip install 'qwen-moe-jax[serve]'.")

    several = join_processes(arguments)
    if several:
        if not arguments.mesh:
            raise ConfigError("several processes need --mesh: how their devices share the model, as in expert=8.")
        if arguments.embeddings != "off":
            raise ConfigError("several processes serve no embeddings: give --embeddings off.")

    import asyncio

    from qwen_moe_jax.server.keys import read_keys
    from qwen_moe_jax.server.serve import address_of, bind, serve
    from qwen_moe_jax.sharding.distributed import is_process_zero

    keys = read_keys(arguments.api_key_file)
    # Weights take minutes to read: all that can be refused without them is refused first.
    service = prepare(arguments, keys)
    if not is_process_zero():
        Start(arguments, service).load().follow()
        return 0
    listening = bind(arguments.host, arguments.port)
    start = Start(arguments, service)

    def ready() -> None:
        start.say(address_of(listening))

    service.runner.heartbeat = HEARTBEAT if several else None
    seconds = arguments.drain_seconds
    serving = serve(service, start.load, listening, drain_seconds=seconds, on_ready=ready, say=start.say_row)
    code = asyncio.run(serving)
    if code:
        end_all_processes(code, "the engine of process 0 has failed")
    return code


def prepare(arguments: argparse.Namespace, keys: Any) -> "Service":
    """What is served, without the model's weights.

    Raises:
        ConfigError, CheckpointError: of the folder's config, tokenizer or generation settings.
    """
    from qwen_moe_jax.config import ModelConfig
    from qwen_moe_jax.huggingface.generation_config import read_generation_config
    from qwen_moe_jax.huggingface.hub import local_folder
    from qwen_moe_jax.inference.chat_template import load_chat_template
    from qwen_moe_jax.inference.tokenizer import load_tokenizer
    from qwen_moe_jax.server.chat_form import ChatForm
    from qwen_moe_jax.server.grammar import Grammars
    from qwen_moe_jax.server.service import Limits, Service

    folder = local_folder(arguments.folder)
    config = ModelConfig.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    generation = read_generation_config(folder, config)
    try:
        chat = ChatForm(load_chat_template(folder))
    except CheckpointError as error:
        print(f"{error} /v1/chat/completions is refused.", file=sys.stderr)
        chat = None
    positions = config.max_position_embeddings
    limits = Limits(
        max_length=arguments.max_length or min(positions, DEFAULT_MAX_LENGTH),
        slots=arguments.slots or 1,
        max_waiting=arguments.max_waiting,
        max_body_bytes=arguments.max_body_bytes,
        max_seconds=arguments.max_seconds,
        write_seconds=arguments.write_seconds,
    )
    stops = generation.eos_token_id
    return Service(
        name=arguments.served_model_name or _name_of(arguments.folder),
        vocab_size=config.vocab_size,
        tokenizer=tokenizer,
        generation=generation,
        limits=limits,
        chat=chat,
        grammars=Grammars(tokenizer, config.vocab_size, stops) if stops else None,
        adapters=tuple(name for name, _ in arguments.adapters),
        keys=keys,
    )


class Start:
    """Loads and compiles, in the engine's thread, and says what has come of it.

    Attributes:
        folder: of the checkpoint.
        rows: the table of the start, by name.
    """

    def __init__(self, arguments: argparse.Namespace, service: "Service"):
        self.folder = arguments.folder
        self.rows: dict[str, str] = {}
        self._arguments = arguments
        self._service = service
        self._began = time.perf_counter()

    def load(self) -> Any:
        """The engine, every program compiled."""
        import dataclasses

        from qwen_moe_jax.inference.embed import Embedder
        from qwen_moe_jax.inference.engine import Engine
        from qwen_moe_jax.inference.programs import compilations
        from qwen_moe_jax.inference.progress import progress_bar

        arguments, service = self._arguments, self._service
        service.metrics.count_compilations()
        model = load_model(arguments)
        longest, tokens = service.limits.max_length, arguments.cache_tokens
        adapters = dict(arguments.adapters)
        engine = Engine(model, slots=arguments.slots, max_length=longest, cache_tokens=tokens, adapters=adapters)
        service.limits = dataclasses.replace(service.limits, slots=engine.slots)
        self._describe(model, engine)
        with progress_bar("compiling") as advance:

            def report(name: str, done: int, total: int) -> None:
                service.life.detail = f"compiling, {done} of {total} programs"
                advance(done, total)

            engine.compile(report)
            if arguments.embeddings != "off":
                service.embedder = Embedder(model, longest, arguments.embeddings)
                service.embedder.compile(report)
        seconds = time.perf_counter() - self._began
        self.rows["ready"] = f"after {seconds:.1f} s, {compilations()} programs compiled or read from the cache"
        return engine

    def _describe(self, model: "CausalLM", engine: Any) -> None:
        from qwen_moe_jax.inference.memory import format_memory

        mesh = ", ".join(f"{axis}={size}" for axis, size in model.mesh.shape.items() if size > 1) or "one device"
        weights = "" if model.execution.weights is None else f"{model.execution.weights} weights, "
        self.rows["model"] = (
            f"{self._service.name}: {format_count(model.config.num_parameters())} parameters, "
            f"{model.execution.dtype}, {weights}{mesh}"
        )
        waiting = self._service.limits.max_waiting
        self.rows["slots"] = f"{engine.slots} of up to {engine.max_length} tokens; {waiting} more may wait"
        self.rows["memory"] = f"on each device {'; '.join(format_memory(engine.memory()))}"
        if self._service.adapters:
            self.rows["adapters"] = ", ".join(self._service.adapters)
        keys = len(self._service.keys)
        self.rows["keys"] = f"{keys}" if keys else "none: every client that reaches the address may use the model"
        self.rows["embeddings"] = self._arguments.embeddings

    def say(self, address: str) -> None:
        """Prints the table."""
        self.rows["address"] = f"{address}/v1"
        for name, text in self.rows.items():
            self.say_row(name, text)

    def say_row(self, name: str, text: str) -> None:
        """Prints a row of the table, or one that follows it."""
        width = max(map(len, self.rows))
        print(f"{name:{width}}  {text}", file=sys.stderr, flush=True)


def _name_of(folder: Path) -> str:
    """A Hub name as it is, a folder by its last part."""
    return folder.resolve().name if folder.is_dir() else str(folder)


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a positive integer")
    return int(text)


def _not_negative(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected seconds")
    return found
