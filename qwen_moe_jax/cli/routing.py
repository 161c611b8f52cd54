"""A prompt's routing as plain data, for tables, the page and --json."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
import tokenizers

from qwen_moe_jax.cli.arguments import format_ranges
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.token_text import readable_tokens
from qwen_moe_jax.inference.tokenizer import encode_prompt
from qwen_moe_jax.model.causal_lm import CausalLM


class Choice(NamedTuple):
    """One token's choice of one expert.

    Attributes:
        token: its index in the prompt.
        expert: the one chosen.
        rank: 0 for the token's strongest.
        weight: of the expert in the token's sum.
        dropped: whether the token did not reach it.
    """

    token: int
    expert: int
    rank: int
    weight: float
    dropped: bool


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """The routing of a prompt in one layer.

    Attributes:
        layer: its number in the model, dense layers counted.
        experts: int32 [T, A]; the experts of each token, the strongest first.
        weights: float32 [T, A].
        dropped: bool [T, A]; choices that did not reach their expert.
        load: int32 [E]; tokens that chose the expert, dropped ones included.
        entropy: mean entropy of the router's distribution over experts, in nats.
        max_logit: the largest router logit.
        rounds: in which dropless served all rows; above 1 where a load exceeded its buffers.
    """

    layer: int
    experts: np.ndarray
    weights: np.ndarray
    dropped: np.ndarray
    load: np.ndarray
    entropy: float
    max_logit: float
    rounds: int

    @property
    def uniform_entropy(self) -> float:
        """The largest entropy there could be, log E, in nats."""
        return math.log(len(self.load))

    @property
    def busiest(self) -> int:
        """The expert that most tokens chose."""
        return int(np.argmax(self.load))

    @property
    def imbalance(self) -> float:
        """The busiest expert's load over the mean load."""
        return float(self.load.max() / self.load.mean())

    def choices(self) -> list[Choice]:
        """All T * A choices, in order of token and rank."""
        return [
            Choice(token, int(self.experts[token, rank]), rank, float(self.weights[token, rank]), bool(dropped))
            for (token, rank), dropped in np.ndenumerate(self.dropped)
        ]

    def choices_by_expert(self) -> dict[int, list[Choice]]:
        """The choices by expert, the busiest first; experts that no token chose are left out."""
        found: dict[int, list[Choice]] = {int(expert): [] for expert in np.argsort(-self.load, kind="stable")}
        for choice in self.choices():
            found[choice.expert].append(choice)
        return {expert: choices for expert, choices in found.items() if choices}


@dataclass(frozen=True, kw_only=True)
class PromptRouting:
    """The routing of a prompt in a model.

    Attributes:
        model: its name, for people.
        num_layers: of the model, dense ones included.
        num_experts: E, in each layer with a router.
        dispatch: how tokens reached their experts.
        capacity_factor: slots per expert as a multiple of a balanced load, under dispatch "capacity".
        prompt: the text.
        token_ids, tokens: of the prompt, T of each; the tokens in readable form.
        layers: the layers looked at, in order.
    """

    model: str
    num_layers: int
    num_experts: int
    dispatch: str
    capacity_factor: float | None
    prompt: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    layers: tuple[LayerRouting, ...]

    @property
    def choices_per_layer(self) -> int:
        """T * A, the number of (token, expert) choices."""
        return self.layers[0].experts.size


def routed_layers(config: ModelConfig, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """The layers to look at: those wanted, or all that have a router.

    Raises:
        RequestError: no layer has one, or one of those wanted has not.
    """
    sparse = tuple(number for number, kind in enumerate(config.layers) if kind.mlp == "sparse")
    if not sparse:
        raise RequestError("no layer of this model has a router: all of them are dense.")
    for layer in wanted or ():
        if layer not in sparse:
            what = "has no router" if layer < len(config.layers) else "does not exist"
            raise RequestError(f"--layers: layer {layer} {what}, expected some of {format_ranges(sparse)}.")
    return tuple(wanted or sparse)


def trace_routing(
    model: CausalLM,
    tokenizer: tokenizers.Tokenizer,
    prompt: str,
    *,
    name: str,
    layers: Sequence[int] | None = None,
    add_special_tokens: bool = True,
) -> PromptRouting:
    """Runs a prompt through a model and returns its routing.

    Args:
        model: in the mode it is to be looked at; `eval` unless switched.
        tokenizer: its tokenizer.
        prompt: a text of at least one token.
        name: of the model, for people.
        layers: numbers of the layers to keep, dense layers counted; None keeps every layer with a router.
        add_special_tokens: those that the tokenizer adds by itself; False for what a chat template wrote.

    Raises:
        RequestError: see `routed_layers` and `encode_prompt`.
    """
    config, execution = model.config, model.execution_in_use
    sparse, wanted = routed_layers(config, None), routed_layers(config, layers)
    ids = encode_prompt(tokenizer, prompt, config.vocab_size, add_special_tokens=add_special_tokens)
    router = jax.device_get(model(np.asarray([ids]), output_router_logits=True).router)
    trace, stats = router.trace, router.stats

    def routing(layer: int) -> LayerRouting:
        index = sparse.index(layer)  # traces are stacked over the layers that have a router
        return LayerRouting(
            layer=layer,
            experts=trace.experts[index, 0],
            weights=trace.weights[index, 0].astype(np.float32),
            dropped=trace.dropped[index, 0],
            load=stats.tokens_per_expert[index],
            entropy=float(stats.entropy[index]),
            max_logit=float(stats.max_logit[index]),
            rounds=int(stats.rounds[index]),
        )

    return PromptRouting(
        model=name,
        num_layers=config.num_hidden_layers,
        num_experts=len(stats.tokens_per_expert[0]),
        dispatch=str(execution.dispatch),
        capacity_factor=execution.capacity_factor if execution.dispatch == "capacity" else None,
        prompt=prompt,
        token_ids=tuple(ids),
        tokens=readable_tokens(tokenizer, ids),
        layers=tuple(map(routing, wanted)),
    )
