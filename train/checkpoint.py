"""Saves and restores a `TrainState` with Orbax; an incomplete checkpoint is never restored."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.experimental import v1 as ocp

from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.nn.parameters import parameters_with_paths
from qwen_moe_jax.sharding.distributed import num_processes
from qwen_moe_jax.sharding.rules import PADDED_AXES
from train.errors import SaveError
from train.step import TrainState
from train.write_errors import quiet_write_errors, write_errors

#: Seconds between two looks at a checkpoint that is waited for.
_POLL_SECONDS = 0.2


class Checkpoints:
    """A folder with one checkpoint per saved step, of which the newest few are kept.

    Several processes share one folder, which all of them see; each writes the shards of its own devices.

    A context manager: on exit, everything that was saved is complete on disk.

    Args:
        folder: `checkpoints` in the run's folder.
        keep: how many checkpoints remain, besides the last one that was saved as the best.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["best_at_step"], n=1, keep_checkpoints_without_metrics=False
        )
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(n=keep), best]),
            cleanup_tmp_directories=True,
        )
        self._run = folder.parent
        self._writing: tuple[int, ocp.AsyncResponse[bool]] | None = None
        self._quiet = ExitStack()
        self._failures: list[int] = []

    def __enter__(self) -> "Checkpoints":
        self._failures = self._quiet.enter_context(quiet_write_errors(self._run))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._quiet:
            failed = kind is not None and issubclass(kind, SaveError)
            try:
                if not failed:
                    self.wait()
            except SaveError:
                failed = True
                raise
            finally:
                # The other processes, which did not fail, are not here: Orbax would wait for them.
                if not (failed and num_processes() > 1):
                    self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        """The newest step whose checkpoint is complete on disk; None where there is none."""
        return None if self._checkpointer.latest is None else self._checkpointer.latest.step

    def save(self, step: int, state: TrainState, *, best: bool = False) -> None:
        """Copies the state to host memory and writes it in the background while training goes on.

        Because of the copy, the next step may reuse (donate) the state's device memory at once. At most one checkpoint
        is written at a time: a second `save` waits for the first.

        Args:
            step: the number of finished steps.
            state: to save.
            best: whether it is the best so far; it is kept until another one is.

        Raises:
            SaveError: this checkpoint, or the one before it, cannot be written.
        """
        self.wait()
        on_host = jax.block_until_ready({name: _copied_to_host(array) for name, array in _named_arrays(state).items()})
        with write_errors(self._run, _saving(step)):
            metrics = {"best_at_step": step} if best else None
            self._writing = step, self._checkpointer.save_async(step, on_host, overwrite=True, metrics=metrics)

    def check(self) -> None:
        """Looks, without waiting, whether the last saved checkpoint failed.

        Raises:
            SaveError: it did.
        """
        self._finish(wait=False)

    def wait(self) -> None:
        """Blocks until the last saved checkpoint is complete on disk.

        Raises:
            SaveError: it cannot be written.
        """
        self._finish(wait=True)

    def _finish(self, *, wait: bool) -> None:
        if self._writing is None:
            return
        step, writing = self._writing
        self._writing, earlier = None, None
        with write_errors(self._run, _saving(step)):
            while True:
                try:
                    writing.result(_POLL_SECONDS if wait else 0)
                    return
                except TimeoutError as error:
                    if error is earlier:  # not of this waiting, but of the save, which gives the same each time
                        raise
                    earlier = error
                if self._failures:  # of several processes, Orbax waits in one that failed until the others time out
                    raise OSError(self._failures[0], os.strerror(self._failures[0]))
                if not wait:
                    self._writing = step, writing
                    return

    def restore(self, like: TrainState, model: Model, step: int | None = None) -> TrainState:
        """The state of a step, None is the newest, sharded as `like` is; the mesh may differ from the one that saved.

        Arrays are stored as they are sharded, so that saving moves nothing between devices: a vocabulary that does
        not divide over the mesh is stored with its rows of padding. They are zero; for another mesh they are removed
        or added.

        Args:
            like: arrays or `jax.ShapeDtypeStruct`s with shardings.
            model: whose parameters the state holds; it may be abstract.
            step: whose checkpoint is complete on disk.

        Raises:
            CheckpointError: an array has another shape, beyond padding.
        """
        named = _named_arrays(like)
        _check_shapes(self._checkpointer.metadata(step).metadata, named, model)
        context = ocp.Context()
        context.array.loading.enable_padding_and_truncation = True
        with context:
            arrays = self._checkpointer.load(step, abstract_state=jax.tree.map(_abstract, named))
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in named])


def _saving(step: int) -> str:
    return f"the checkpoint of step {step}"


def _check_shapes(stored: Mapping[str, Any], named: Mapping[str, jax.Array], model: Model) -> None:
    """Refuses arrays that differ in more than padding, which Orbax would truncate or pad as well."""
    params = dict(parameters_with_paths(model))
    for name, array in named.items():
        found = tuple(stored[name].shape) if name in stored else array.shape  # what is missing, Orbax reports
        if found == array.shape:
            continue
        # Moments have the paths of their parameters, behind the optimizer's.
        param = next((params[path] for path in params if name.endswith(f".{path}")), None)
        if param is None or not _differs_in_padding(found, array.shape, param):
            raise CheckpointError(
                f"the checkpoint has {name} of shape {list(found)}, and the run's is {list(array.shape)}: it was saved "
                "by a run of another model. Give this run another run.output_dir, or start anew with --fresh."
            )


def _differs_in_padding(found: tuple[int, ...], wanted: tuple[int, ...], param: nnx.Variable) -> bool:
    if len(found) != len(wanted):
        return False
    return all(
        one == other or (axis in PADDED_AXES and min(one, other) >= size)
        for one, other, axis, size in zip(found, wanted, param.axes, param.unpadded_shape, strict=True)
    )


def _named_arrays(state: TrainState) -> dict[str, jax.Array]:
    # A flat dict of path → array: it does not depend on how optax nests its tuples.
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _copied_to_host(array: jax.Array) -> jax.Array:
    """The array in host memory, sharded as before.

    What is there already is copied, too: the next step may reuse its memory. It is copied shard by shard: `device_put`
    of the global array would be a program that all processes have to run.
    """
    sharding = array.sharding.with_memory_kind("pinned_host")
    by_device = {shard.device: shard.data for shard in array.addressable_shards}
    parts = [
        jax.device_put(by_device[device], SingleDeviceSharding(device, memory_kind="pinned_host"), may_alias=False)
        for device in sharding.addressable_devices_indices_map(array.shape)
    ]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


def _abstract(array: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
