"""How a model's text is made."""

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from qwen_moe_jax.config.checks import require, strings, token_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How a model's text is made and where it ends: transformers' generation_config.json, and four fields of vLLM's.

    The defaults are those that transformers 5.23 generates with where nothing is said. Sequences may be given as lists,
    `logit_bias` as a mapping; they are kept as tuples, so that a config can be hashed.

    Attributes:
        eos_token_id: tokens that end a text.
        stop_strings: strings that end a text.
        max_new_tokens: at most so many, the ending token included; None leaves it to the caller.
        min_new_tokens: `eos_token_id` cannot be chosen before so many.
        do_sample: draw tokens; otherwise the most probable one is taken, and neither temperature, top_k, top_p, min_p
            nor seed count.
        temperature: divides the logits. It may be 0 where nothing is drawn.
        top_k: draw among the k most probable tokens; 0 among all.
        top_p: draw among the fewest most probable tokens whose probabilities sum to at least this.
        min_p: draw among the tokens at least this times as probable as the most probable one.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that stand in the prompt
            or in what was generated (arXiv 1909.05858).
        presence_penalty: subtracted from the logits of tokens that were generated, as OpenAI and vLLM have it.
        frequency_penalty: the same, times how often they were generated.
        logit_bias: (token, bias) pairs, added to the logits. In place of a token may stand a sequence of tokens: its
            last one is biased where the others were the last to be read or generated (transformers' `sequence_bias`).
        bad_words_ids: sequences of tokens that are not completed. A single token that ends a text stays allowed.
        seed: of the random numbers, below 2**64; None is another one every time.
        hub_fields: the other fields of generation_config.json as (name, JSON) pairs: kept for export, and not acted on.

    Raises:
        ConfigError: a value outside its range.
    """

    eos_token_id: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int | tuple[int, ...], float], ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    hub_fields: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        frozen = {
            "eos_token_id": token_ids("eos_token_id", self.eos_token_id),
            "stop_strings": strings("stop_strings", self.stop_strings),
            "logit_bias": _biases("logit_bias", self.logit_bias),
            "bad_words_ids": tuple(token_ids("bad_words_ids", word) for word in self.bad_words_ids),
        }
        for name, value in frozen.items():
            object.__setattr__(self, name, value)
        require(all(self.bad_words_ids), "bad_words_ids", self.bad_words_ids, "at least one token in each")
        found = self.max_new_tokens
        require(found is None or found >= 1, "max_new_tokens", found, "a positive integer, or None")
        for name in ("min_new_tokens", "top_k"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "zero or a positive integer")
        for name in ("top_p", "min_p"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            require(-2 <= getattr(self, name) <= 2, name, getattr(self, name), "in [-2, 2]")
        found = self.repetition_penalty
        require(0 < found < math.inf, "repetition_penalty", found, "a positive number (1 changes nothing)")
        found = self.temperature
        require(0 <= found < math.inf, "temperature", found, "a positive number")
        require(
            found > 0 or not self.do_sample, "temperature", found, "a positive number, or do_sample=False beside it"
        )
        found = self.seed
        require(found is None or 0 <= found < 2**64, "seed", found, "between 0 and 2**64, exclusive, or None")


def _biases(field: str, found: Any) -> tuple[tuple[int | tuple[int, ...], float], ...]:
    """The last of several biases of one sequence counts, as in a mapping; a sequence of one token is that token."""
    biases: dict[int | tuple[int, ...], float] = {}
    for key, bias in found.items() if isinstance(found, Mapping) else found:
        ids = token_ids(field, key if isinstance(key, Iterable) else (key,))
        finite = bias == -math.inf or abs(bias) <= sys.float_info.max
        require(len(ids) > 0 and finite, field, found, "(token id or ids, number) pairs, infinity excluded")
        biases[ids if len(ids) > 1 else ids[0]] = float(bias)
    return tuple(biases.items())
