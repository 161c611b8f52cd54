"""The parameters of a model as nested dicts, and their partition into trained and fixed ones."""

from collections.abc import Collection
from typing import Any

import jax

Params = dict[str, Any]
"""Nested dict of arrays, named as the model's attributes; `nnx.merge(graphdef, params)` is the model again.

A subset of the parameters has only the dicts on the paths to them."""


def paths(params: Params) -> list[str]:
    """The path of every array, as "model.norm.weight"."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(keys, simple=True, separator=".") for keys, _ in leaves]


def partition(params: Params, fixed: Collection[str]) -> tuple[Params, Params]:
    """Splits parameters into (trained, fixed); no array is copied.

    Args:
        params: arrays, or `jax.ShapeDtypeStruct`s.
        fixed: the paths of the fixed ones, as "model.norm.weight".
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
    """The inverse of `partition`: all parameters of the model; no array is copied."""
    whole = dict(trained)
    for key, part in fixed.items():
        whole[key] = merge(whole[key], part) if key in whole else part
    return whole


def select(params: Params, like: Params) -> Params:
    """The subset of the parameters whose paths are in `like`."""
    return {key: select(params[key], part) if isinstance(part, dict) else params[key] for key, part in like.items()}
