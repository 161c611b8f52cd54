"""`qwen-moe-jax generate FOLDER --input FILE --output FILE`: the requests of a file, each answered once."""

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qwen_moe_jax.cli.arguments import load_model
from qwen_moe_jax.cli.batch_file import AnswerFile, BatchRecord, Id, read_batch
from qwen_moe_jax.cli.sampling_arguments import sampling_overrides
from qwen_moe_jax.errors import RequestError

if TYPE_CHECKING:
    from qwen_moe_jax.config import GenerationConfig
    from qwen_moe_jax.inference.request import Request

#: Requests that wait in the engine, for each of its slots: enough that none is idle.
_AHEAD = 2


def run_batch(arguments: argparse.Namespace, default_length: int) -> None:
    """Answers the records that the output file does not answer yet.

    Args:
        arguments: of `generate`.
        default_length: new tokens where nothing says how many.

    Raises:
        RequestError: a file that cannot be used; at the end, if some records could not be served.
        ConfigError, CheckpointError, ShardingError: as `sampling_overrides`, `from_pretrained` and `make_mesh`.
    """
    import dataclasses

    from qwen_moe_jax.config import ModelConfig
    from qwen_moe_jax.huggingface.generation_config import generation_folder, read_generation_config
    from qwen_moe_jax.huggingface.hub import local_folder

    records = read_batch(arguments.input)
    folder = local_folder(arguments.folder)
    generation = read_generation_config(
        generation_folder(folder, arguments.adapter), ModelConfig.from_pretrained(folder), sampling_overrides(arguments)
    )
    if generation.max_new_tokens is None and generation.max_length is None:
        generation = dataclasses.replace(generation, max_new_tokens=default_length)
    with AnswerFile(arguments.output, (record.id for record in records)) as answers:
        waiting = [record for record in records if record.id not in answers.answered]
        if answers.answered:
            print(f"{len(answers.answered)} of {len(records)} are answered in {arguments.output}.", file=sys.stderr)
        refused = _Batch(arguments, folder, generation, answers).run(waiting) if waiting else 0
    if refused:
        raise RequestError(f"{refused} of {len(waiting)} requests could not be served: see {arguments.output}.")


class _Batch:
    """The work on one file."""

    def __init__(self, arguments: argparse.Namespace, folder: Any, generation: "GenerationConfig", answers: AnswerFile):
        from qwen_moe_jax.config import ModelConfig
        from qwen_moe_jax.inference.tokenizer import load_tokenizer

        self._arguments = arguments
        self._folder = folder
        self._generation = generation
        self._answers = answers
        self._config = ModelConfig.from_pretrained(folder)
        self._tokenizer = load_tokenizer(folder)

    def run(self, records: list[BatchRecord]) -> int:
        """Answers records; returns how many could not be served."""
        from qwen_moe_jax.inference.chat_template import load_chat_template
        from qwen_moe_jax.inference.engine import Engine
        from qwen_moe_jax.inference.memory import format_memory
        from qwen_moe_jax.inference.progress import progress_bar
        from qwen_moe_jax.inference.slot_memory import choose_slots

        has_chats = any(record.prompt.is_conversation for record in records)
        render = load_chat_template(self._folder).render if has_chats else None
        requests: dict[Id, Request] = {}
        refusals: dict[Id, str] = {}
        for record in records:
            try:
                requests[record.id] = self._request(record, render)
            except RequestError as error:
                refusals[record.id] = str(error)
        self._answers.add({"id": id, "error": message} for id, message in refusals.items())
        if not requests:
            return len(refusals)
        model = load_model(self._arguments, self._generation)
        longest = max(len(request.token_ids) + _new_tokens(request) for request in requests.values())
        slots = min(self._arguments.slots or choose_slots(model, longest), len(requests))
        engine = Engine(model, slots=slots, max_length=longest)
        sums = "; ".join(format_memory(engine.memory()))
        print(f"{engine.slots} slots of up to {longest} tokens; on each device {sums}", file=sys.stderr)
        with progress_bar("answering") as advance:
            return len(refusals) + self._serve(engine, requests, advance)

    def _request(self, record: BatchRecord, render: Any) -> "Request":
        from qwen_moe_jax.inference.request import Request
        from qwen_moe_jax.inference.tokenizer import encode_prompt

        text = record.text(render)
        ids = encode_prompt(
            self._tokenizer, text, self._config.vocab_size, add_special_tokens=not record.prompt.is_conversation
        )
        return Request(token_ids=ids, config=record.config(self._generation))

    def _serve(self, engine: Any, requests: "dict[Id, Request]", advance: Callable[[int, int], None]) -> int:
        from qwen_moe_jax.cli.answer import Answer
        from qwen_moe_jax.inference.detokenize import TextStream

        left = iter(requests.items())
        running: dict[int, tuple[Id, Answer]] = {}
        began, done, tokens, refused = time.perf_counter(), 0, 0, 0
        while done < len(requests):
            ended: list[dict[str, Any]] = []
            while len(running) < engine.slots * _AHEAD and (item := next(left, None)) is not None:
                id, request = item
                try:
                    number = engine.submit(request)
                except RequestError as error:
                    ended.append({"id": id, "error": str(error)})
                    continue
                running[number] = (id, Answer(TextStream(self._tokenizer, request.config.stop_strings)))
            for chunk in engine.step():
                if chunk.request not in running:
                    continue
                id, answer = running[chunk.request]
                if chunk.finished == "error":
                    ended.append({"id": id, "error": str(chunk.error)})
                else:
                    answer.take(chunk)
                    if answer.finish_reason is None:
                        continue
                    ended.append(_answered(id, answer))
                    tokens += len(answer.token_ids)
                if chunk.finished is None:  # a stop string, of which the engine knows nothing
                    engine.cancel(chunk.request)
                del running[chunk.request]
            self._answers.add(ended)
            done += len(ended)
            refused += sum("error" in one for one in ended)
            advance(done, len(requests))
        seconds = time.perf_counter() - began
        print(f"{done} answers, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} per second", file=sys.stderr)
        return refused


def _new_tokens(request: "Request") -> int:
    config = request.config
    return config.max_new_tokens or max(config.max_length - len(request.token_ids), 1)


def _answered(id: Id, answer: Any) -> dict[str, Any]:
    names = ("text", "token_ids", "log_probs", "finish_reason")
    return {"id": id, **{name: getattr(answer, name) for name in names}}
