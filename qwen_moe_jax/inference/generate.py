"""Text generation from prompts: `generate` and `complete`."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from qwen_moe_jax.config import DTypeLike, GenerationConfig
from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.detokenize import TextStream
from qwen_moe_jax.inference.request import Chunk, Finish
from qwen_moe_jax.inference.session import check_request, stream, token_list
from qwen_moe_jax.inference.tokenizer import Tokenizer, encode, load_tokenizer, require_unicode
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.moe.replay import RecordedRouting
from qwen_moe_jax.suggest import did_you_mean

#: New tokens where neither the call nor generation_config.json says how many.
MAX_NEW_TOKENS = 64

#: Arguments of transformers' `generate`, and what does the same here.
_HUB_ARGUMENTS = {
    "input_ids": "prompts, the second argument",
    "inputs": "prompts, the second argument",
    "attention_mask": "nothing: prompts of different lengths are given as lists, without padding",
    "generation_config": "config",
    "streamer": "the function stream",
    "return_dict_in_generate": "the function complete, whose results have log-probabilities",
    "output_scores": "the function complete, whose results have log-probabilities",
    "num_return_sequences": "the same prompt several times, with do_sample=True",
}

Prompts = Sequence[str] | Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """The result of one request.

    Attributes:
        token_ids: the new tokens, as in transformers with the stop token, or the one that completed a stop string.
        log_probs: of each, in nats, by the model's own distribution (before temperature and the like). Those of the
            prompt's tokens are `score`'s.
        text: without special tokens, up to a stop string; None without a tokenizer.
        finished: "stop" or "length"; None where there is an error.
        routing: the experts of every token that was read, where they were asked for: the prompt's and the new ones'
            but the last, so `model(tokens, replay=[routing])` and `token_losses` take it for the whole text.
        error: why the request could not be served; the others of its batch were.
    """

    token_ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    text: str | None = None
    finished: Finish | None = None
    error: RequestError | None = None
    routing: RecordedRouting | None = dataclasses.field(default=None, repr=False, compare=False)


def generate(
    model: CausalLM,
    prompts: Prompts | None = None,
    config: GenerationConfig | Sequence[GenerationConfig] | None = None,
    *,
    tokenizer: Tokenizer | str | PathLike[str] | None = None,
    cache_dtype: DTypeLike | None = None,
    **settings: Any,
) -> list[str] | list[list[int]]:
    """Continues every prompt.

    Args:
        model: run in eval mode, whose dispatch drops no token unless the model's `ExecutionConfig` says so.
        prompts: needed: texts, or token ids as lists or arrays of NumPy, JAX or PyTorch, of any lengths.
        config: for all, or one for each; None is the model's own (generation_config.json).
        tokenizer: needed for texts and for stop strings: a tokenizer, or the checkpoint folder that holds one.
        cache_dtype: of the cached keys and values, anything that `jnp.dtype` takes; None is the model's.
        settings: fields of `GenerationConfig` that replace those of `config`: `max_new_tokens=100, do_sample=True,
            temperature=0.7`. Where neither gives it or `max_length`, `max_new_tokens` is 64.

    Returns:
        For texts, the new texts; for token ids, the new token ids (see `Completion`).

    Raises:
        RequestError: requests that cannot be served, each named; none is run then (`complete` serves the others).
    """
    completions = _complete(model, prompts, config, tokenizer, cache_dtype, settings, strict=True, return_routing=False)
    if prompts is not None and all(isinstance(prompt, str) for prompt in prompts):
        return [completion.text or "" for completion in completions]
    return [list(completion.token_ids) for completion in completions]


def complete(
    model: CausalLM,
    prompts: Prompts | None = None,
    config: GenerationConfig | Sequence[GenerationConfig] | None = None,
    *,
    tokenizer: Tokenizer | str | PathLike[str] | None = None,
    cache_dtype: DTypeLike | None = None,
    return_routing: bool = False,
    **settings: Any,
) -> list[Completion]:
    """`generate` with log-probabilities, finish reason and error of each completion.

    A request that cannot be served does not stop the others. With `return_routing`, each has the experts of its tokens
    (`Completion.routing`).

    Raises:
        RequestError: the call as a whole is invalid (texts without a tokenizer, an unknown setting, the routing of a
            model without experts).
    """
    return _complete(
        model, prompts, config, tokenizer, cache_dtype, settings, strict=False, return_routing=return_routing
    )


def _complete(
    model: CausalLM,
    prompts: Prompts | None,
    config: GenerationConfig | Sequence[GenerationConfig] | None,
    tokenizer: Tokenizer | str | PathLike[str] | None,
    cache_dtype: DTypeLike | None,
    settings: Mapping[str, Any],
    *,
    strict: bool,
    return_routing: bool,
) -> list[Completion]:
    _check_settings(settings)
    prompts = _checked_prompts(prompts)
    if isinstance(tokenizer, str | PathLike):
        tokenizer = load_tokenizer(tokenizer)
    configs = request_configs(model, len(prompts), config, settings)
    if tokenizer is None and any(isinstance(prompt, str) for prompt in prompts):
        raise RequestError("the prompts are texts, but no tokenizer was given: pass tokenizer=<checkpoint folder>.")
    if tokenizer is None and any(config.stop_strings for config in configs):
        raise RequestError("stop strings need a tokenizer: pass tokenizer=<checkpoint folder>.")
    ids: list[list[int]] = []
    errors: dict[int, RequestError] = {}
    for index, (prompt, config) in enumerate(zip(prompts, configs, strict=True)):
        try:
            ids.append(_token_ids(f"prompt {index}", prompt, tokenizer))
            check_request(model, f"prompt {index}", ids[index], config)
        except RequestError as error:
            errors[index] = error
            ids[index:] = [[]]
    if errors and strict:
        raise RequestError(" ".join(map(str, errors.values())))
    served = [index for index in range(len(ids)) if index not in errors]
    texts = [TextStream(tokenizer, configs[index].stop_strings) if tokenizer else None for index in served]
    started: list[str] = [""] * len(served)
    chunks: list[list[Chunk]] = [[] for _ in served]

    def has_stop_string(chunk: Chunk) -> bool:
        text = texts[chunk.index]
        if text is None:
            return False
        started[chunk.index] += text.push(chunk.token_ids)
        return text.stopped is not None

    for chunk in stream(
        model,
        [ids[index] for index in served],
        [configs[index] for index in served],
        cache_dtype=cache_dtype,
        enough=has_stop_string,
        return_routing=return_routing,
    ):
        chunks[chunk.index].append(chunk)

    completions = [Completion(error=errors.get(index)) for index in range(len(ids))]
    for index, text, start, parts in zip(served, texts, started, chunks, strict=True):
        completions[index] = _joined(parts, text, start)
        if return_routing:
            read = len(ids[index]) + len(completions[index].token_ids) - 1
            experts = np.concatenate([part.routing for part in parts if part.routing is not None], axis=1)[:, :read]
            routing = RecordedRouting(experts, model.config.moe.num_experts)
            completions[index] = dataclasses.replace(completions[index], routing=routing)
    return completions


def _token_ids(name: str, prompt: Any, tokenizer: Tokenizer | None) -> list[int]:
    """Token ids of a text or of a list of them; RequestError, naming it, for what is neither."""
    if tokenizer is None or not isinstance(prompt, str):
        return token_list(name, prompt)
    require_unicode(name, prompt)
    return encode(tokenizer, prompt)


def _joined(parts: Sequence[Chunk], text: TextStream | None, start: str) -> Completion:
    """The completion of one request from its chunks, without tokens after a stop string."""
    token_ids = tuple(token for part in parts for token in part.token_ids)
    log_probs = tuple(log_prob for part in parts for log_prob in part.log_probs)
    count = len(token_ids) if text is None else text.num_tokens
    finished = "stop" if text is not None and text.stopped is not None else parts[-1].finished
    return Completion(
        token_ids=token_ids[:count],
        log_probs=log_probs[:count],
        text=None if text is None else start + text.finish(),
        finished=finished,
    )


def request_configs(
    model: CausalLM,
    count: int,
    config: GenerationConfig | Sequence[GenerationConfig] | None,
    settings: Mapping[str, Any],
) -> list[GenerationConfig]:
    """The config of each of `count` requests.

    Raises:
        RequestError: another number of configs than prompts, or an unknown setting.
        ConfigError: a setting outside its range.
    """
    _check_settings(settings)
    if config is None or isinstance(config, GenerationConfig):
        configs = [config or model.generation_config] * count
    else:
        configs = list(config)
    if len(configs) != count:
        raise RequestError(f"there are {len(configs)} configs for {count} prompts: expected one for each, or one.")
    configs = [dataclasses.replace(one, **settings) for one in configs]
    return [
        one if one.max_new_tokens or one.max_length else dataclasses.replace(one, max_new_tokens=MAX_NEW_TOKENS)
        for one in configs
    ]


def _check_settings(settings: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(GenerationConfig)]
    for name, value in settings.items():
        if name in _HUB_ARGUMENTS:
            raise RequestError(f"{name} is not an argument: here that is {_HUB_ARGUMENTS[name]}.")
        if name not in known:
            raise RequestError(
                f"{name}={value!r:.80}: there is no such setting of generation; {did_you_mean(name, known)}"
                f"expected one of {', '.join(known)}."
            )


def _checked_prompts(prompts: Any) -> Prompts:
    """The prompts as a list, with one message for what is no list of prompts at all."""
    if isinstance(prompts, str):
        raise RequestError("prompts is one string, expected a list: generate(model, [prompt], …).")
    if isinstance(prompts, Mapping):
        names = ", ".join(map(str, list(prompts)[:5]))
        raise RequestError(f"prompts is a mapping ({names}), expected a list of texts or of token ids.")
    if prompts is None or not isinstance(prompts, Iterable):
        raise RequestError(f"prompts is {prompts!r:.80}, expected a list of texts or of token ids.")
    found = list(prompts)
    if found and all(isinstance(prompt, int | np.integer) or getattr(prompt, "ndim", 1) == 0 for prompt in found):
        raise RequestError(
            "prompts is one list of token ids, expected one list for each prompt: generate(model, [prompt], …)."
        )
    if any(isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping) for prompt in found):
        raise RequestError(
            "a prompt is a list of messages, expected a text: load_chat_template(folder).render(messages) of "
            "qwen_moe_jax.inference.chat_template writes it."
        )
    return found
