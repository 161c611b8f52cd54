"""`qwen-moe-jax chat`: a conversation with a checkpoint, line by line."""

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qwen_moe_jax.cli.arguments import add_model_arguments, load_model
from qwen_moe_jax.cli.interrupts import raise_interrupts
from qwen_moe_jax.cli.sampling_arguments import add_sampling_arguments, sampling_overrides
from qwen_moe_jax.cli.terminal import interruption, show
from qwen_moe_jax.errors import RequestError

if TYPE_CHECKING:
    from qwen_moe_jax.config import GenerationConfig
    from qwen_moe_jax.inference.chat_template import ChatTemplate
    from qwen_moe_jax.inference.request import Chunk
    from qwen_moe_jax.inference.session import Session
    from qwen_moe_jax.inference.tokenizer import Tokenizer

SUMMARY = "talk with a checkpoint through its own chat template; the cache keeps the conversation"

#: Tokens of a conversation where --max-length is not given: the cache for all of a long model's positions may not fit.
DEFAULT_MAX_LENGTH = 8192

#: What to do where a conversation is as long as it may be.
_FULL = "/reset begins a new conversation; --max-length N, at the start, allows for a longer one."

HELP = "/reset begins anew, /system TEXT too and with another system prompt, /quit ends; Ctrl-C stops an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system prompt")
    parser.add_argument(
        "--no-thinking", action="store_true", help="render the template with enable_thinking=False, for Qwen3's"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help=f"tokens of the whole conversation; the model's own limit, but at most {DEFAULT_MAX_LENGTH}, if not given",
    )
    add_sampling_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Reads lines and prints answers until the lines end. A refused turn is reported on stderr.

    Raises:
        RequestError: a length that cannot be.
        ConfigError, CheckpointError, ShardingError: as `sampling_overrides`, `load_chat_template`, `from_pretrained`
            and `make_mesh`.
    """
    if arguments.max_length is not None and arguments.max_length < 1:
        raise RequestError(f"--max-length {arguments.max_length}, expected at least 1.")

    from qwen_moe_jax.config import ModelConfig
    from qwen_moe_jax.huggingface.generation_config import generation_folder, read_generation_config
    from qwen_moe_jax.huggingface.hub import local_folder
    from qwen_moe_jax.inference.chat_template import load_chat_template
    from qwen_moe_jax.inference.session import Session
    from qwen_moe_jax.inference.tokenizer import load_tokenizer

    # Weights take minutes to read: all that can be refused without them is refused first.
    folder = local_folder(arguments.folder)
    config = ModelConfig.from_pretrained(folder)
    tokenizer, template = load_tokenizer(folder), load_chat_template(folder)
    generation = read_generation_config(
        generation_folder(folder, arguments.adapter), config, sampling_overrides(arguments)
    )
    model = load_model(arguments, generation)
    max_length = arguments.max_length or min(config.max_position_embeddings, DEFAULT_MAX_LENGTH)
    session = Session(model, max_length)
    conversation = Conversation(
        session=session,
        tokenizer=tokenizer,
        template=template,
        generation=generation,
        vocab_size=config.vocab_size,
        max_length=max_length,
        variables={"enable_thinking": False} if arguments.no_thinking else {},
    )
    conversation.begin(arguments.system)
    raise_interrupts()  # they end an answer, not the program
    if sys.stdin.isatty():
        _notify(f"{arguments.folder.resolve().name}. {HELP}")
    for line in _lines():
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        elif command == "/reset":
            conversation.begin(conversation.system)
        elif command == "/system":
            conversation.begin(rest.strip() or None)
        else:
            try:
                conversation.say(line)
            except RequestError as error:
                _notify(str(error))


@dataclass(kw_only=True)
class Conversation:
    """A conversation and the model it is held with.

    Attributes:
        session: caches the conversation, so that a turn prefills only what is new.
        tokenizer, template: of the checkpoint.
        generation: how answers are made.
        vocab_size: of the model.
        max_length: tokens of the whole conversation.
        variables: for the template.
        system: the system prompt.
        messages: all turns so far, the system prompt first.
    """

    session: "Session"
    tokenizer: "Tokenizer"
    template: "ChatTemplate"
    generation: "GenerationConfig"
    vocab_size: int
    max_length: int
    variables: dict[str, Any]
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def begin(self, system: str | None) -> None:
        """Begins a new conversation."""
        self.system = system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def say(self, text: str) -> None:
        """Sends a message and prints the answer while it is decoded. Ctrl-C ends the answer, which is kept so far.

        Raises:
            RequestError: the template refuses it, or the conversation is too long; it is unchanged then.
        """
        from qwen_moe_jax.cli.answer import Answer
        from qwen_moe_jax.inference.detokenize import TextStream
        from qwen_moe_jax.inference.tokenizer import encode_prompt

        messages = [*self.messages, {"role": "user", "content": text}]
        whole = self.template.render(messages, **self.variables)
        # The template has written all special tokens itself.
        ids = encode_prompt(self.tokenizer, whole, self.vocab_size, add_special_tokens=False)
        answer = Answer(TextStream(self.tokenizer, self.generation.stop_strings))
        with interruption() as interrupted:

            def ended(chunk: "Chunk") -> bool:
                show(answer.take(chunk))
                return interrupted() or answer.finish_reason is not None

            try:
                for _ in self.session.generate(ids, self.generation, ended):
                    pass
            except RequestError as error:
                raise RequestError(f"{error} {_FULL}") if self._is_full(len(ids)) else error from None
        if answer.finish_reason is None:
            show(answer.close())
        print()
        if answer.finish_reason != "stop":
            count = len(answer.token_ids)
            _notify(f"stopped after {count} tokens" + (f": {_FULL}" if self._is_full(len(ids) + count) else ""))
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]

    def _is_full(self, tokens: int) -> bool:
        """Whether a conversation of so many tokens leaves none for an answer."""
        of_answers = self.generation.max_length if self.generation.max_new_tokens is None else None
        return tokens >= min(self.max_length, of_answers or self.max_length)


def _lines() -> Iterator[str]:
    """Lines that are typed or piped in, without empty ones. Ctrl-C empties the line, Ctrl-D ends."""
    typed = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is refused as a turn
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() edits lines with it
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not typed:
                raise
            _notify(f"\n{HELP}")
            continue
        if line:
            yield line


def _notify(text: str) -> None:
    """Prints a message of the program, not of the model."""
    print(text, file=sys.stderr, flush=True)
