"""What `moe_block.py` computes, and the methods that it times: sizes, routing, inputs and answers."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

PASSES = ("forward", "forward+backward")

#: Names that other rows are divided by.
JAX_LIMIT, TORCH_LIMIT, GROUPED_MM = "JAX, limit", "torch, limit", "transformers, grouped_mm"
EAGER = "transformers, eager"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What is computed."""

    dtype: str
    routing: str
    tokens: int
    hidden: int
    ffn: int
    experts: int
    active: int

    @property
    def any_routing(self) -> "Subject":
        """The same for whatever does not depend on the routing: weights, programs and limits."""
        return dataclasses.replace(self, routing="any")

    @property
    def rows(self) -> int:
        """Assignments of a token to an expert."""
        return self.tokens * self.active

    @property
    def useful_flops(self) -> float:
        """Of a forward pass through the experts that were chosen."""
        return 6.0 * self.rows * self.hidden * self.ffn

    @property
    def hub(self) -> dict[str, Any]:
        """The config.json, for transformers and for us."""
        return dict(
            model_type="qwen3_moe",
            vocab_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            hidden_size=self.hidden,
            moe_intermediate_size=self.ffn,
            num_experts=self.experts,
            num_experts_per_tok=self.active,
            norm_topk_prob=True,
            initializer_range=self.hidden**-0.5,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a block computes, as float32 NumPy: the result, and the gradients of its inner product with a cotangent."""

    result_TD: np.ndarray
    of_hidden_TD: np.ndarray
    of_router_ED: np.ndarray
    of_gate_up: np.ndarray
    of_down: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Something to be timed.

    Attributes:
        run: for each of `PASSES`, a call that returns when the work is done.
        flops: useful ones of a forward pass; a backward pass has twice as many.
        limit: the name of the method that bounds this one; None for a limit.
        answer: what it computes; None where it need not be what the others compute.
        dropped: the share of assignments that reach no expert.
    """

    run: Mapping[str, Callable[[], Any]]
    flops: float
    limit: str | None = None
    answer: Callable[[], Answer] | None = None
    dropped: float = 0.0


#: A row of the table: what is computed, and the name of the method.
Row = tuple[Subject, str]
#: What compiles a method and brings its arrays to the device.
Builders = dict[Row, Callable[[], Method]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """NumPy: tokens, the cotangent of the result, and the experts that the routers must find."""

    hidden_TD: np.ndarray
    cotangent_TD: np.ndarray
    experts_TA: np.ndarray

    def check(self, found_TA: np.ndarray, name: str) -> None:
        """Raises unless a router found them."""
        if not np.array_equal(np.sort(found_TA, axis=1), np.sort(self.experts_TA, axis=1)):
            raise AssertionError(f"{name}: the router did not choose the wanted experts.")


@functools.cache
def inputs_of(subject: Subject) -> Inputs:
    """Tokens that carry their logits in their first coordinates."""
    rng = np.random.default_rng(0)
    hidden_TD = rng.standard_normal((subject.tokens, subject.hidden), np.float32)
    experts_TA = wanted_experts(subject, rng)
    logits_TE = 0.5 * rng.standard_normal((subject.tokens, subject.experts), np.float32)
    # Eighths below 8 are exact in bfloat16, so that it routes as float32 does.
    np.put_along_axis(logits_TE, experts_TA, 7.875 - np.arange(subject.active, dtype=np.float32) / 8, axis=1)
    hidden_TD[:, : subject.experts] = logits_TE
    return Inputs(
        hidden_TD=hidden_TD,
        cotangent_TD=rng.standard_normal(hidden_TD.shape, np.float32),
        experts_TA=experts_TA,
    )


def wanted_experts(subject: Subject, rng: np.random.Generator) -> np.ndarray:
    """Distinct experts for every token, int [T, A], the strongest first."""
    if subject.routing == "balanced":
        in_turn_TA = np.arange(subject.rows).reshape(subject.tokens, subject.active) % subject.experts
        return rng.permutation(in_turn_TA)  # of the tokens: as in a text, neighbours may want the same
    popularity_E = rng.permutation(1 / np.arange(1, subject.experts + 1))
    # The A largest of log-probabilities with Gumbel noise are a draw of A without replacement.
    keys_TE = np.log(popularity_E) + rng.gumbel(size=(subject.tokens, subject.experts))
    return np.argsort(-keys_TE, axis=1)[:, : subject.active]
