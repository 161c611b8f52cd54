"""`qwen-moe-jax generate`: completions of prompts."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_moe_jax.cli.arguments import add_host_arguments, add_model_arguments, join_processes, load_model
from qwen_moe_jax.cli.prompts import read_prompts
from qwen_moe_jax.cli.sampling_arguments import add_sampling_arguments, sampling_overrides
from qwen_moe_jax.cli.terminal import show
from qwen_moe_jax.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from qwen_moe_jax.cli.answer import Answer

SUMMARY = "complete prompts in one batch, and show the texts while they are decoded"

#: New tokens where neither --max-new-tokens nor generation_config.json says how many.
DEFAULT_LENGTH = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    # One list for both, so that prompts are numbered in their order on the command line.
    parser.add_argument(
        "--prompt", action="append", dest="prompts", metavar="TEXT", help="a prompt; give several, one --prompt each"
    )
    parser.add_argument(
        "--file",
        action="append",
        type=Path,
        dest="prompts",
        metavar="FILE",
        help='a file whose whole content is a prompt, or a .jsonl file of one request a line: {"prompt": …} or '
        '{"messages": […]}; may be repeated. Standard input is a prompt if nothing is given',
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print a line of JSON for each prompt: its number from 1, prompt, text, token_ids, log_probs in nats and "
        "finish_reason (stop, length); number, prompt and error where it cannot be served",
    )
    add_sampling_arguments(parser)
    group = parser.add_argument_group("batch files", "One request a line in, one answer a line out, in the order done.")
    group.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help='requests: {"prompt": …} or {"messages": […]}, with an "id" and with settings of its own, if any',
    )
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="answers, by id: the same command goes on after an interruption, and answers what is missing",
    )
    group.add_argument("--slots", type=int, metavar="N", help="requests at once; what fits, if not given")
    add_host_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints a text for every prompt that can be served, in their order, and on stderr why the others cannot.

    Raises:
        RequestError: at the end, if some prompts could not be served; before the weights are read, if none can, or if
            a file cannot be read, or a line of a .jsonl file is no request.
        ConfigError, CheckpointError, ShardingError: as `sampling_overrides`, `from_pretrained`, `make_mesh` and
            `initialize_distributed`.
    """
    if arguments.input is not None or arguments.output is not None:
        _run_batch(arguments)
        return
    if join_processes(arguments):
        if not arguments.prompts:
            raise RequestError("several processes do not share one standard input: give --prompt or --file.")
        if not arguments.mesh:
            raise ConfigError("several processes need --mesh: how their devices share the model, as in expert=8.")
    prompts = read_prompts(arguments.prompts or [None])

    from qwen_moe_jax.cli.answer import Answer
    from qwen_moe_jax.config import ModelConfig
    from qwen_moe_jax.huggingface.generation_config import generation_folder, read_generation_config
    from qwen_moe_jax.huggingface.hub import local_folder
    from qwen_moe_jax.inference.chat_template import load_chat_template
    from qwen_moe_jax.inference.detokenize import TextStream
    from qwen_moe_jax.inference.request import Chunk
    from qwen_moe_jax.inference.session import stream
    from qwen_moe_jax.inference.tokenizer import encode_prompt, load_tokenizer
    from qwen_moe_jax.sharding.distributed import is_process_zero, require_same

    # Weights take minutes to read: all that can be refused without them is refused first.
    folder = local_folder(arguments.folder)
    config = ModelConfig.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    generation = read_generation_config(
        generation_folder(folder, arguments.adapter), config, sampling_overrides(arguments)
    )
    if generation.max_new_tokens is None and generation.max_length is None:
        generation = dataclasses.replace(generation, max_new_tokens=DEFAULT_LENGTH)

    template = load_chat_template(folder) if any(prompt.is_conversation for prompt in prompts) else None
    texts = {number: prompt.text for number, prompt in enumerate(prompts, 1)}
    requests: dict[int, list[int]] = {}  # by the prompt's number, as are refusals and answers
    refusals: dict[int, str] = {}
    for number, prompt in enumerate(prompts, 1):
        try:
            texts[number] = prompt.rendered(template.render if template else None)
            requests[number] = encode_prompt(
                tokenizer, texts[number], config.vocab_size, add_special_tokens=not prompt.is_conversation
            )
        except RequestError as error:
            refusals[number] = str(error)
            if is_process_zero():
                print(f"prompt {number}: {error}", file=sys.stderr)
    answers = {number: Answer(TextStream(tokenizer, generation.stop_strings)) for number in requests}
    if not is_process_zero():
        output: _Silent | _Lines | _Texts = _Silent()
    elif arguments.json:
        output = _Lines(texts, answers, refusals)
    else:
        output = _Texts(answers, headed=len(prompts) > 1)
    if requests:
        model = load_model(arguments, generation)
        require_same("the prompts and how they are continued", f"{requests} {generation}")
        start, growing = time.perf_counter(), list(answers.values())

        def ended(chunk: Chunk) -> bool:
            growing[chunk.index].take(chunk)
            return growing[chunk.index].finish_reason is not None  # of stop strings the engine knows nothing

        for _ in stream(model, list(requests.values()), [generation] * len(requests), enough=ended):
            output.show()
        if is_process_zero():
            print(_speed(growing, time.perf_counter() - start), file=sys.stderr)
    output.show()
    if refusals:
        raise RequestError(f"{len(refusals)} of {len(prompts)} prompts could not be served: see above.")


def _run_batch(arguments: argparse.Namespace) -> None:
    """The batch of --input and --output; raises RequestError for what does not go with them."""
    if arguments.input is None or arguments.output is None:
        raise RequestError("a batch needs both: --input FILE of requests, and --output FILE for their answers.")
    if arguments.prompts or arguments.json:
        raise RequestError("--prompt, --file and --json do not go with --input: its records are the prompts.")
    if arguments.distributed or arguments.coordinator:
        raise RequestError("a batch is one process's work: give each of several its own --input and --output.")
    if arguments.slots is not None and arguments.slots < 1:
        raise RequestError(f"--slots {arguments.slots}, expected at least 1.")

    from qwen_moe_jax.cli.batch import run_batch

    run_batch(arguments, DEFAULT_LENGTH)


class _Texts:
    """Texts on the terminal, in order: the first unfinished one while it is decoded, the others after it."""

    def __init__(self, answers: "Mapping[int, Answer]", *, headed: bool):
        self._answers = answers
        self._headed = headed
        self._waiting = list(answers)
        self._written: int | None = None  # characters of the first one's text; None before its heading

    def show(self) -> None:
        while self._waiting:
            number, answer = self._waiting[0], self._answers[self._waiting[0]]
            if self._written is None and self._headed:
                print(f"── {number} ──")
            show(answer.text[self._written or 0 :])
            self._written = len(answer.text)
            if answer.finish_reason is None:
                return
            print()
            self._waiting.pop(0)
            self._written = None


class _Silent:
    """The output of all processes but process 0: none."""

    def show(self) -> None:
        pass


class _Lines:
    """A line of JSON for each prompt, in order."""

    def __init__(self, texts: Mapping[int, str], answers: "Mapping[int, Answer]", refusals: Mapping[int, str]):
        self._answers = answers
        self._refusals = refusals
        self._waiting = list(texts.items())

    def show(self) -> None:
        while self._waiting:
            number, prompt = self._waiting[0]
            line = {"number": number, "prompt": prompt}
            if number in self._refusals:
                line |= {"error": self._refusals[number]}
            else:
                answer = self._answers[number]
                if answer.finish_reason is None:
                    return
                names = ("text", "token_ids", "log_probs", "finish_reason")
                line |= {name: getattr(answer, name) for name in names}
            print(json.dumps(line, ensure_ascii=False), flush=True)
            self._waiting.pop(0)


def _speed(answers: "Sequence[Answer]", seconds: float) -> str:
    from qwen_moe_jax.inference.programs import compilations

    count = sum(len(answer.token_ids) for answer in answers)
    return (
        f"{count} tokens in {seconds:.1f} s, {compilations()} programs compiled or read in that time: "
        f"{count / seconds:.1f} tokens per second"
    )
