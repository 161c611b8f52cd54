"""The parameters of a model as nested dicts, and apart: those that are trained, and those that are fixed."""

from collections.abc import Collection
from typing import Any

import jax

Params = dict[str, Any]
"""Nested dict of arrays, named as the model's attributes; `nnx.merge(graphdef, params)` is the model again.

Of a part of the parameters it holds no more than what is on the way to them."""


def paths(params: Params) -> list[str]:
    """Of every array, as "model.norm.weight"."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(keys, simple=True, separator=".") for keys, _ in leaves]


def partition(params: Params, fixed: Collection[str]) -> tuple[Params, Params]:
    """Parameters as (those that are trained, those that are fixed), the same arrays.

    Args:
        params: arrays, or shapes.
        fixed: paths of the latter, as "model.norm.weight".
    """
    parts: tuple[Params, Params] = ({}, {})
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        part = parts[path in fixed]
        for key in keys[:-1]:
            part = part.setdefault(key.key, {})
        part[keys[-1].key] = leaf
    return parts


def merge(trained: Params, fixed: Params) -> Params:
    """The inverse of `apart`: all parameters of the model, the same arrays."""
    whole = dict(trained)
    for key, part in fixed.items():
        whole[key] = merge(whole[key], part) if key in whole else part
    return whole


def select(params: Params, like: Params) -> Params:
    """Those of the parameters that `like` has too."""
    return {key: select(params[key], part) if isinstance(part, dict) else params[key] for key, part in like.items()}
