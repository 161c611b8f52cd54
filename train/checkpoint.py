"""Saves and restores a `TrainState` with Orbax; a checkpoint that was cut short is never seen as one."""

from pathlib import Path

import jax
from orbax.checkpoint.experimental import v1 as ocp

from train.step import TrainState

_KEPT = 2


class Checkpoints:
    """A folder with one checkpoint per saved step, of which the newest few are kept."""

    def __init__(self, folder: Path) -> None:
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(n=_KEPT),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()

    def save(self, step: int, state: TrainState) -> None:
        """Writes the state as of `step` and returns when it is whole on disk.

        It waits because the next training step reuses the state's memory (on a CPU, Orbax reads that very memory).
        """
        self._checkpointer.save(step, _named_arrays(state), overwrite=True)

    def restore_latest(self, like: TrainState) -> TrainState | None:
        """The newest state, placed as `like` is; None if nothing was saved.

        Args:
            like: arrays or `jax.ShapeDtypeStruct`s with shardings. The mesh may differ from the one that saved.
        """
        if self._checkpointer.latest is None:
            return None
        named = _named_arrays(like)
        arrays = self._checkpointer.load(abstract_state=jax.tree.map(_abstract, named))
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in named])


def _named_arrays(state: TrainState) -> dict[str, jax.Array]:
    # One flat table of path → array. It says the same as the tree, and outlives a change in how optax nests its tuples.
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _abstract(array: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
