"""How text is generated: sampling and stopping."""

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from qwen_moe_jax.config.checks import Checks, require, stop_ids, strings, token_ids

#: Tokens that are proposed at a time: fewer than a chunk of decoding returns.
MOST_SPECULATIVE_TOKENS = 15
#: The smallest number that logits are divided by: by a smaller one they become infinite in float32.
LEAST_DIVISOR = 1e-30


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How text is generated and when it ends: transformers' generation_config.json, and five fields of vLLM's.

    The defaults are those that transformers 5.23 generates with where nothing is set. Sequences may be given as lists,
    `logit_bias` as a mapping, and one ending token or stop string alone, as in transformers; they are kept as tuples,
    so that a config can be hashed.

    Attributes:
        eos_token_id: tokens that end a text.
        stop_strings: strings that end a text.
        max_new_tokens: the largest number of new tokens, the ending token included; None leaves it to the caller.
        max_length: the largest number of tokens of prompt and new text; without effect where `max_new_tokens` is set.
        min_new_tokens: `eos_token_id` cannot be sampled before this many new tokens.
        min_length: the same for the tokens of prompt and new text.
        do_sample: sample tokens; otherwise the most probable one is taken, and temperature, top_k, top_p, min_p and
            seed have no effect.
        temperature: divides the logits. It may be 0 where nothing is sampled.
        top_k: sample among the k most probable tokens (0: among all).
        top_p: sample among the fewest most probable tokens whose probabilities sum to at least this.
        min_p: sample among the tokens at least this times as probable as the most probable one.
        typical_p: sample among the most typical tokens whose probabilities sum to at least this (arXiv 2202.00666).
        epsilon_cutoff: sample among the tokens of at least this probability, and the most probable one; 0 for all.
        eta_cutoff: the same with a bound that falls with the entropy (arXiv 2210.15191).
        repetition_penalty: divides the positive and multiplies the negative logits of tokens of the prompt and of the
            generated text (arXiv 1909.05858).
        presence_penalty: subtracted from the logits of tokens that were generated, as in OpenAI's API and vLLM.
        frequency_penalty: the same, times how often they were generated.
        logit_bias: (token, bias) pairs, added to the logits. Instead of a token, a sequence of tokens biases its last
            one where the others came immediately before (transformers' `sequence_bias`).
        bad_words_ids: sequences of tokens that are not completed. A single token that ends a text stays allowed.
        no_repeat_ngram_size: no sequence of this many tokens occurs twice in prompt and new text; 0 allows it.
        suppress_tokens: tokens that are not generated.
        begin_suppress_tokens: tokens that are not generated first.
        forced_bos_token_id: the first new token after a prompt of one token.
        forced_eos_token_id: tokens of which the last new token is one, where the text reaches its largest length.
        exponential_decay_length_penalty: (start, factor): after `start` new tokens, logits of `eos_token_id` grow by
            their size times factor^n - 1, n counting from `start`.
        num_speculative_tokens: tokens that a next-token head (mtp) proposes for every forward pass of the model, which
            verifies them; the text is the same. 0 is plain decoding. In a batch, the largest number is used.
        seed: of the random numbers, below 2**64; None is another one every time.
        hub_fields: the other fields of generation_config.json as (name, JSON) pairs: kept for export, otherwise unused.

    Raises:
        ConfigError: values outside their ranges; the message names all of them.
    """

    eos_token_id: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int | tuple[int, ...], float], ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None
    num_speculative_tokens: int = 0
    seed: int | None = None
    hub_fields: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check.types()
        frozen = {
            "stop_strings": strings("stop_strings", _listed(self.stop_strings)),
            **{name: token_ids(name, getattr(self, name)) for name in _TOKENS},
            **{name: stop_ids(name, getattr(self, name)) for name in ("eos_token_id", "forced_eos_token_id")},
            "logit_bias": _biases("logit_bias", self.logit_bias),
            "bad_words_ids": _words("bad_words_ids", self.bad_words_ids),
        }
        for name, value in frozen.items():
            object.__setattr__(self, name, value)
        if isinstance(self.exponential_decay_length_penalty, Iterable):
            object.__setattr__(self, "exponential_decay_length_penalty", tuple(self.exponential_decay_length_penalty))
        with Checks(self) as check:
            most = MOST_SPECULATIVE_TOKENS
            within = 0 <= self.num_speculative_tokens <= most
            check(within, "num_speculative_tokens", f"between 0 and {most}")
            check(all(self.bad_words_ids), "bad_words_ids", "at least one token in each")
            check.at_least(1, "max_new_tokens", "max_length")
            check.at_least(0, "min_new_tokens", "min_length", "top_k", "no_repeat_ngram_size", "forced_bos_token_id")
            check(0 < self.typical_p <= 1, "typical_p", "in (0, 1]")
            expected = "(start, factor): zero or a positive integer, and a positive number"
            check(_is_decay(self.exponential_decay_length_penalty), "exponential_decay_length_penalty", expected)
            for name in ("top_p", "min_p", "epsilon_cutoff", "eta_cutoff"):
                check(0 <= getattr(self, name) <= 1, name, "in [0, 1]")
            for name in ("presence_penalty", "frequency_penalty"):
                check(-2 <= getattr(self, name) <= 2, name, "in [-2, 2]")
            expected = "a positive number (1 changes nothing)"
            check(LEAST_DIVISOR <= self.repetition_penalty <= 1 / LEAST_DIVISOR, "repetition_penalty", expected)
            if check(0 <= self.temperature < math.inf, "temperature", "a positive number"):
                expected = f"a positive number, at least {LEAST_DIVISOR:g}, or do_sample=False"
                check(self.temperature >= LEAST_DIVISOR or not self.do_sample, "temperature", expected)
            seeded = self.seed is None or 0 <= self.seed < 2**64
            check(seeded, "seed", "between 0 and 2**64, exclusive, or None")


#: Other fields that are lists of token ids.
_TOKENS = ("suppress_tokens", "begin_suppress_tokens")


def _listed(found: Any) -> Any:
    """One string as a tuple of it."""
    return (found,) if isinstance(found, str) else found


def _is_decay(found: Any) -> bool:
    """Whether a penalty is None, or a start and a factor."""
    if found is None:
        return True
    if not isinstance(found, tuple):
        return False
    numbers = len(found) == 2 and all(isinstance(x, int | float) and not isinstance(x, bool) for x in found)
    return numbers and isinstance(found[0], int) and found[0] >= 0 and 0 < found[1] < math.inf


def _words(field: str, found: Any) -> tuple[tuple[int, ...], ...]:
    require(isinstance(found, Iterable), field, found, "a sequence of sequences of token ids")
    return tuple(token_ids(field, word) for word in found)


def _biases(field: str, found: Any) -> tuple[tuple[int | tuple[int, ...], float], ...]:
    """The last of several biases of one sequence counts, as in a mapping; a sequence of one token is that token."""
    biases: dict[int | tuple[int, ...], float] = {}
    expected = "(token id or ids, number) pairs, infinity excluded"
    pairs = list(found.items() if isinstance(found, Mapping) else found) if isinstance(found, Iterable) else [None]
    require(all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs), field, found, expected)
    for key, bias in pairs:
        ids = token_ids(field, key if isinstance(key, Iterable) else (key,))
        require(isinstance(bias, Real) and not isinstance(bias, bool), field, found, expected)
        finite = bias == -math.inf or abs(bias) <= sys.float_info.max
        require(len(ids) > 0 and finite, field, found, expected)
        biases[ids if len(ids) > 1 else ids[0]] = float(bias)
    return tuple(biases.items())
