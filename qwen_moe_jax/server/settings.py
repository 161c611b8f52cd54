"""The sampling fields of a request, as a `GenerationConfig`."""

import dataclasses
from typing import Any

from qwen_moe_jax.config import GenerationConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.server.errors import invalid
from qwen_moe_jax.server.protocol import SamplingRequest
from qwen_moe_jax.server.service import Service

#: New tokens of /v1/completions where the request does not say how many, as in OpenAI's API.
COMPLETION_TOKENS = 16
#: Fields of `GenerationConfig` under the names that requests have for them.
_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_strings": "stop"}


def settings_of(
    body: SamplingRequest, service: Service, *, prompt: int, asked: int | None, default: int | None, where: str
) -> GenerationConfig:
    """How a request's text is generated: its own fields before those of generation_config.json.

    Args:
        body: of the request.
        service: whose settings hold where the body has none.
        prompt: tokens of the prompt.
        asked: new tokens that the request asks for, at least 1; None leaves it open.
        default: for that case; None is all that fit.
        where: the field that the prompt is from, for messages.

    Raises:
        ApiError: 400: a sequence of more tokens than there may be, or a setting outside its range.
    """
    base, most = service.generation, service.limits.max_length
    left = most - prompt
    if left < 1 or (asked is not None and asked > left):
        new = "" if left < 1 else f", and {asked} new ones are asked for"
        raise invalid(
            f"{where} has {prompt} tokens{new}: a sequence has at most {most} tokens on this server.",
            where if left < 1 else "max_tokens",
            code="context_length_exceeded",
        )
    budget = asked if asked is not None else min(left, default or base.max_new_tokens or left)
    given: dict[str, Any] = {
        "max_new_tokens": budget,
        "stop_strings": (*base.stop_strings, *body.stop),
        "eos_token_id": (*(() if body.ignore_eos else base.eos_token_id), *(body.stop_token_ids or ())),
        "num_speculative_tokens": 0,
        **_sampling(body),
    }
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        if (value := getattr(body, name)) is not None:
            given[name] = value
    if body.min_tokens is not None:
        given["min_new_tokens"] = body.min_tokens
    if body.logit_bias:
        _require_tokens("logit_bias", list(body.logit_bias), service)
        given["logit_bias"] = (*base.logit_bias, *body.logit_bias.items())
    _require_tokens("stop_token_ids", body.stop_token_ids or [], service)
    try:
        return dataclasses.replace(base, **given)
    except ConfigError as error:
        name = error.problems[0].field if error.problems else None
        raise invalid(str(error), _NAMES.get(name, name)) from None


def _sampling(body: SamplingRequest) -> dict[str, Any]:
    """Temperature and what shapes the distribution; a temperature of 0 is greedy."""
    given: dict[str, Any] = {
        name: value for name in ("top_p", "top_k", "min_p") if (value := getattr(body, name)) is not None
    }
    if given.get("top_k") == -1:
        given["top_k"] = 0
    if body.temperature is not None:
        given |= {"temperature": body.temperature, "do_sample": body.temperature > 0}
    elif given:
        given["do_sample"] = True
    if body.seed is not None:
        given["seed"] = body.seed % 2**64
    return given


def with_seed_of(config: GenerationConfig, choice: int) -> GenerationConfig:
    """The settings of one of `n` choices: each has a seed of its own, the first the request's."""
    if config.seed is None or choice == 0:
        return config
    return dataclasses.replace(config, seed=(config.seed + choice) % 2**64)


def _require_tokens(name: str, tokens: list[int], service: Service) -> None:
    wrong = [token for token in tokens if not 0 <= token < service.vocab_size]
    if wrong:
        raise invalid(f"{name} has token id {wrong[0]}, expected ids from 0 to {service.vocab_size - 1}.", name)
