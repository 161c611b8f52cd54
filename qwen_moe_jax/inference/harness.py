"""The requests of EleutherAI's lm-eval, answered like its transformers adapter: same tokens, same truncation.

`lm_eval_model.py` registers it with lm-eval. Nothing here imports lm-eval.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, Self

import tokenizers

from qwen_moe_jax.config import INFERENCE_SHARDING, DTypeLike, ExecutionConfig, GenerationConfig, ModelConfig
from qwen_moe_jax.errors import CheckpointError, RequestError
from qwen_moe_jax.huggingface.fields import read_json
from qwen_moe_jax.huggingface.hub import local_folder
from qwen_moe_jax.huggingface.load import from_pretrained
from qwen_moe_jax.inference.chat_template import load_chat_template
from qwen_moe_jax.inference.generate import generate
from qwen_moe_jax.inference.progress import progress_bar
from qwen_moe_jax.inference.score import Score, score
from qwen_moe_jax.inference.tokenizer import decode, encode, load_tokenizer
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.sharding.mesh import make_mesh

#: Default limit of `max_length`: the memory of attention grows with its square.
LONGEST_DEFAULT = 4096
#: Names that tasks use for the largest number of generated tokens; the first that is given counts.
_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
#: All settings of generation that tasks may give.
_SETTINGS = {"until", *_MAX_TOKENS, *(field.name for field in dataclasses.fields(GenerationConfig))} - {"hub_fields"}

_log = logging.getLogger(__name__)


class Request(Protocol):
    """The part of lm-eval's `Instance` that is read."""

    args: tuple[Any, ...]


class Harness:
    """A model and its tokenizer, under the methods of lm-eval's `LM`.

    Args:
        model: see `from_pretrained`.
        tokenizer: its own.
        folder: the checkpoint folder: it names both in lm-eval's caches, and holds the chat template.
        prefix_token: precedes a text for which lm-eval gives no context.
        max_length: tokens the model reads at once; longer requests are truncated on the left, with a warning.
            None is the model's number of positions, but at most 4096.
        max_gen_toks: the largest number of new tokens for a task without a setting of its own.
        generated_together: batch size of generation; the caches of a batch have to fit into memory.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: tokenizers.Tokenizer,
        *,
        folder: str | PathLike[str],
        prefix_token: int,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        generated_together: int = 32,
    ):
        self._model = model
        self._tokenizer = tokenizer
        self._folder = Path(folder)
        self._prefix_token = prefix_token
        self._prefix_text = tokenizer.id_to_token(prefix_token)
        self.max_length = max_length or min(model.config.max_position_embeddings, LONGEST_DEFAULT)
        self.max_gen_toks = max_gen_toks
        self._generated_together = generated_together

    @classmethod
    def from_folder(
        cls,
        folder: str | PathLike[str],
        *,
        dtype: DTypeLike | None = None,
        dispatch: str | None = None,
        sharding: str = INFERENCE_SHARDING,
        data: int = 1,
        fsdp: int = 1,
        expert: int = 1,
        tensor: int = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        generated_together: int = 32,
    ) -> Self:
        """Loads a checkpoint folder with its tokenizer: `dtype`, `dispatch` and `sharding` as in `ExecutionConfig`, the
        mesh as in `make_mesh`. The default sharding gathers no weights.

        Raises:
            ConfigError, CheckpointError, ShardingError: as `from_pretrained` and `make_mesh`.
        """
        folder = local_folder(folder)
        tokenizer = load_tokenizer(folder)
        prefix_token = prefix_of(folder, tokenizer, ModelConfig.from_pretrained(folder))
        one_device = {data, fsdp, expert, tensor} == {1}
        mesh = None if one_device else make_mesh(data=data, fsdp=fsdp, expert=expert, tensor=tensor)
        execution = ExecutionConfig(dtype=dtype, dispatch=dispatch, sharding=sharding)
        model = from_pretrained(folder, mesh=mesh, execution=execution)
        return cls(
            model,
            tokenizer,
            folder=folder,
            prefix_token=prefix_token,
            max_length=max_length,
            max_gen_toks=max_gen_toks,
            generated_together=generated_together,
        )

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's caches."""
        return str(self._folder.resolve()).replace("/", "__")

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """For (context, continuation): the continuation's log-likelihood in nats, and whether it is the greedy one.

        Raises:
            RequestError: a continuation of no token, or of more than `max_length`.
        """
        pairs = [self._encode_pair(*request.args) for request in requests]
        return [(one.log_likelihood, one.greedy) for one in self._score(pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """For (text,): its log-likelihood in nats after the prefix token, every token scored once.

        A text longer than `max_length` is split into windows, the last of which starts earlier to have a full context.
        """
        windows = [(number, *pair) for number, request in enumerate(requests) for pair in self._windows(*request.args)]
        totals = [0.0] * len(requests)
        scores = self._score([(context, tokens) for _, context, tokens in windows])
        for (number, _, _), one in zip(windows, scores, strict=True):
            totals[number] += one.log_likelihood
        return totals

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """For (context, settings): the generated text up to the first of the strings in `until`, without it.

        Settings replace those of the checkpoint's generation_config.json. In sampling, every request has a
        seed of its own, and a second run gives the same texts.

        Raises:
            RequestError: unknown settings, or `max_length` new tokens and more.
            ConfigError: a setting outside its range.
        """
        contexts, settings = zip(*(request.args for request in requests), strict=True) if requests else ((), ())
        configs = [self._config(one, seed=number) for number, one in enumerate(settings)]
        encoded = [self._encode(context) or [self._prefix_token] for context in contexts]
        prompt_lengths = [self.max_length - config.max_new_tokens for config in configs]
        prompts = [ids[-length:] for ids, length in zip(encoded, prompt_lengths, strict=True)]
        truncated = sum(len(ids) > length for ids, length in zip(encoded, prompt_lengths, strict=True))
        self._warn_truncated(truncated, len(requests))
        sizes = [len(prompt) + config.max_new_tokens for prompt, config in zip(prompts, configs, strict=True)]
        longest_first = sorted(range(len(requests)), key=lambda number: -sizes[number])
        texts: dict[int, str] = {}
        with progress_bar("generating") as advance:
            while len(texts) < len(requests):
                batch = longest_first[len(texts) :][: self._generated_together]
                chosen = [prompts[number] for number in batch], [configs[number] for number in batch]
                new_ids: list[Any] = generate(self._model, *chosen, tokenizer=self._tokenizer)
                for number, ids in zip(batch, new_ids, strict=True):
                    texts[number] = cut_at(decode(self._tokenizer, ids), configs[number].stop_strings)
                advance(len(texts), len(requests))
        return [texts[number] for number in range(len(requests))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation rendered by the checkpoint's own template.

        Raises:
            CheckpointError, RequestError: there is no template, or it refuses the messages.
        """
        template = load_chat_template(self._folder)
        return template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """Scores continuations; contexts that are too long are truncated on the left."""
        longest = self.max_length + 1  # the last token is only predicted
        self._warn_truncated(sum(len(context) + len(tokens) > longest for context, tokens in pairs), len(pairs))
        for number, (_, tokens) in enumerate(pairs):
            if len(tokens) > self.max_length:
                raise RequestError(
                    f"request {number} continues for {len(tokens)} tokens, max_length={self.max_length}."
                )
        contexts = [context[max(len(context) + len(tokens) - longest, 0) :] for context, tokens in pairs]
        with progress_bar("scoring") as advance:
            return score(self._model, [tokens for _, tokens in pairs], contexts=contexts, progress=advance)

    def _warn_truncated(self, count: int, total: int) -> None:
        if count:
            _log.warning("%d of %d requests are longer than max_length=%d: truncated.", count, total, self.max_length)

    def _encode(self, text: str) -> list[int]:
        """With the special tokens that the tokenizer adds, unless the text begins with its own."""
        own = bool(self._prefix_text) and text.startswith(self._prefix_text)
        return encode(self._tokenizer, text, add_special_tokens=not own)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Both in tokens of the whole; spaces between them belong to the continuation, as in lm-eval's own adapter."""
        if not context:
            ids = encode(self._tokenizer, continuation, add_special_tokens=False)
            own = ids[:1] == [self._prefix_token]
            return (ids[:1], ids[1:]) if own else ([self._prefix_token], ids)
        before, whole = self._encode(context.rstrip()), self._encode(context + continuation)
        return before or [self._prefix_token], whole[len(before) :]

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        ids = [self._prefix_token, *self._encode(text)]
        for start in range(1, len(ids), self.max_length):
            end = min(start + self.max_length, len(ids))
            yield ids[max(end - self.max_length - 1, 0) : start], ids[start:end]

    def _config(self, settings: Mapping[str, Any], seed: int) -> GenerationConfig:
        """A task's `generation_kwargs`, read as lm-eval reads them."""
        unknown = [name for name in settings if name not in _SETTINGS]
        if unknown:
            raise RequestError(f"generation_kwargs has {unknown}, expected some of {sorted(_SETTINGS)}.")
        given = {name: value for name, value in settings.items() if value is not None}
        until = given.pop("until", ())
        budgets = [int(given.pop(name)) for name in _MAX_TOKENS if name in given]
        budget = budgets[0] if budgets else self.max_gen_toks
        if budget >= self.max_length:
            raise RequestError(
                f"{budget} new tokens leave no tokens for a prompt with max_length={self.max_length}: raise "
                "max_length, or lower max_gen_toks."
            )
        fields = {"do_sample": given.get("temperature", 0.0) > 0, "seed": seed, **given}
        fields["stop_strings"] = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
        return dataclasses.replace(self._model.generation_config, **{**fields, "max_new_tokens": budget})


def prefix_of(folder: str | PathLike[str], tokenizer: tokenizers.Tokenizer, config: ModelConfig) -> int:
    """The token that begins a text, or else the one that ends it: of tokenizer_config.json, else of config.json.

    Raises:
        CheckpointError: neither file names one, or the tokenizer does not know it.
    """
    path = Path(folder) / "tokenizer_config.json"
    named = read_json(path) if path.is_file() else {}
    for name in ("bos_token", "eos_token"):
        text = named.get(name)
        text = text.get("content") if isinstance(text, dict) else text
        if text is not None:
            token = tokenizer.token_to_id(text)
            if token is None:
                raise CheckpointError(f"{path}: {name} is {text!r}, which is no token of tokenizer.json.")
            return token
    known = [token for token in (config.bos_token_id, *config.eos_token_id) if token is not None]
    if not known:
        raise CheckpointError(
            f"{folder}: found neither bos_token nor eos_token, in tokenizer_config.json or config.json."
        )
    return known[0]


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of these strings."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
