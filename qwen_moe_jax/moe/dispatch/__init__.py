"""Dispatchers: how tokens reach their experts and come back, by name.

A dispatcher is anything with two functions, a module for example:

    rows, plan = dispatcher.dispatch(hidden_BTD, routing, execution)
    rows = experts(rows, execution.grouped_matmul)
    combined_BTD, drops = dispatcher.combine(rows, plan)

`rows` is one of the layouts that `Experts` multiplies (`moe.dispatch.rows`); `plan` is whatever `combine` needs, a
pytree. Both functions are called while tracing, with explicitly sharded arrays.
"""

from typing import Any, Protocol, get_args

import jax

from qwen_moe_jax.config import ExecutionConfig
from qwen_moe_jax.config.execution import DISPATCHERS
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.moe.dispatch import capacity, dense, dropless
from qwen_moe_jax.moe.dispatch.rows import Rows
from qwen_moe_jax.moe.router import Routing
from qwen_moe_jax.moe.stats import Drops
from qwen_moe_jax.suggest import did_you_mean


class Dispatcher(Protocol):
    """The two functions of a dispatcher."""

    def dispatch(self, hidden_BTD: jax.Array, routing: Routing, execution: ExecutionConfig) -> tuple[Rows, Any]:
        """Tokens, sharded as `tokens_spec` says, to rows on their experts' devices, and the plan of the way back."""

    def combine(self, rows: Any, plan: Any) -> tuple[jax.Array, Drops]:
        """The experts' results to each token's weighted sum [B, T, D], and which assignments were dropped."""


_REGISTERED: dict[str, Dispatcher] = {"capacity": capacity, "dense": dense, "dropless": dropless}


def register_dispatcher(name: str, dispatcher: Dispatcher, *, overwrite: bool = False) -> None:
    """Makes a dispatcher known as `ExecutionConfig(dispatch=name)`. Do so before the config is created.

    Args:
        name: for `ExecutionConfig.dispatch`.
        dispatcher: anything with the two functions.
        overwrite: replace one of this name, as a notebook's cell that is run again. Programs that are compiled keep the
            old one.

    Raises:
        ConfigError: it lacks one of the two functions, or another dispatcher has the name.
    """
    missing = [verb for verb in ("dispatch", "combine") if not callable(getattr(dispatcher, verb, None))]
    if missing:
        raise ConfigError(
            f"dispatcher {name!r}: found no function {' and '.join(missing)}, expected dispatch and combine."
        )
    if not overwrite and _REGISTERED.get(name, dispatcher) is not dispatcher:
        raise ConfigError(
            f"dispatcher {name!r}: another one is registered under this name. Choose another name, or pass "
            "overwrite=True."
        )
    _REGISTERED[name] = dispatcher
    if name not in DISPATCHERS:
        DISPATCHERS.append(name)


def checked_rows(name: str, found: Any) -> tuple[Rows, Any]:
    """What a dispatcher's `dispatch` returned.

    Args:
        name: of the dispatcher.
        found: its result.

    Raises:
        ConfigError: it is no pair, or its first item is no layout of rows.
    """
    layouts = ", ".join(layout.__name__ for layout in get_args(Rows))
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], get_args(Rows)):
        raise ConfigError(
            f"dispatcher {name!r}: dispatch returned {_described(found)}, expected a pair of rows (one of {layouts}, "
            "of qwen_moe_jax.moe.dispatch.rows) and the plan that combine is given."
        )
    return found


def checked_combined(name: str, found: Any, shape: tuple[int, ...]) -> tuple[jax.Array, Drops]:
    """What a dispatcher's `combine` returned.

    Args:
        name: of the dispatcher.
        found: its result.
        shape: of the block's hidden states, (B, T, D).

    Raises:
        ConfigError: it is no pair of an array of this shape and `Drops`.
    """
    is_pair = isinstance(found, tuple) and len(found) == 2
    if not is_pair or not isinstance(found[1], Drops) or getattr(found[0], "shape", None) != shape:
        raise ConfigError(
            f"dispatcher {name!r}: combine returned {_described(found)}, expected a pair of the tokens' sums, an array "
            f"{list(shape)}, and Drops, of qwen_moe_jax.moe.stats (no_drops(routing) where none are dropped)."
        )
    return found


def _described(found: Any) -> str:
    if isinstance(found, tuple):
        return f"a tuple of {len(found)} ({', '.join(map(_described, found))})"
    if hasattr(found, "shape") and hasattr(found, "dtype"):
        return f"an array {list(found.shape)}"
    return "nothing" if found is None else type(found).__name__


def get_dispatcher(name: str) -> Dispatcher:
    """The dispatcher of this name.

    Raises:
        ConfigError: none is registered under it; the message suggests near names.
    """
    if name not in _REGISTERED:
        raise ConfigError(
            f"dispatch: found {name!r}, expected one of {', '.join(map(repr, _REGISTERED))}."
            f" {did_you_mean(name, _REGISTERED)}Register your own by qwen_moe_jax.moe.dispatch.register_dispatcher."
        )
    return _REGISTERED[name]
