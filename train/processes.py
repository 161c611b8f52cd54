"""What several processes of one run have to agree about: the folder, and when to stop."""

import secrets
import signal
import socket
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.sharding.distributed import barrier, broadcast, is_process_zero, num_processes, require_same
from train.config import TrainConfig, to_toml
from train.data.batches import Batch
from train.folder import RunFolder, open_run_folder
from train.parameters import Params
from train.step import StepMetrics, TrainState, TrainStep

#: Seconds in which a file that one host made should be seen by the others: network file systems look now and then.
_SECONDS_TO_APPEAR = 30.0

Asked = Callable[[], signal.Signals | None]


def open_run_folder_together(config: TrainConfig, *, fresh: bool) -> tuple[RunFolder, bool, bool]:
    """The run's folder, opened by process 0 and seen by all; whether its run is finished; whether this is process 0.

    Raises:
        ConfigError: in process 0, as `open_run_folder`; in another, it does not see that folder.
        ShardingError: the processes were given different settings.
    """
    require_same("the settings of the run", f"{to_toml(config)} --fresh={fresh}")
    folder = RunFolder(open_run_folder(config, fresh=fresh).path if is_process_zero() else config.run.output_dir)
    mark = folder.path / f".seen-{broadcast(secrets.token_hex(8))}"
    if is_process_zero():
        mark.touch()
    barrier(str(mark))
    until = time.monotonic() + _SECONDS_TO_APPEAR
    while not mark.exists():
        if time.monotonic() > until:
            raise ConfigError(
                f"run.output_dir: {folder.path.absolute()} on {socket.gethostname()} is not the folder that process 0 "
                "opened, expected one that all hosts see. Put it on a file system that they share (NFS, Lustre, a "
                "mounted bucket): --run.output_dir FOLDER."
            )
        time.sleep(0.2)
    barrier(f"{mark} was seen")
    if is_process_zero():
        mark.unlink()
    return folder, broadcast(str(folder.finished)) == "True", is_process_zero()


def stopping_together(train_step: TrainStep, asked: Asked, mesh: Mesh) -> tuple[TrainStep, Asked]:
    """A train step that takes word of `asked` to all processes, and what any of them was asked before the last step.

    All processes get the same answer after the same step. It travels in the step's own program: another one, with a
    collective of its own, would cost time, and on CPUs such programs can wait for each other for ever. It is read when
    the next step has been started, so that the devices never wait for it.
    """
    if num_processes() == 1:
        return train_step, asked
    one_each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    flags: dict[int, jax.Array] = {}
    before: jax.Array | None = None
    under_way: jax.Array | None = None

    @partial(jax.jit, donate_argnums=0)
    def with_word(
        state: TrainState, fixed: Params, batch: Batch, asked_of_each: jax.Array
    ) -> tuple[TrainState, StepMetrics, jax.Array]:
        state, metrics = train_step(state, fixed, batch)
        everywhere = NamedSharding(mesh, PartitionSpec())
        return state, metrics, jax.lax.with_sharding_constraint(jnp.max(asked_of_each), everywhere)

    def step(state: TrainState, fixed: Params, batch: Batch) -> tuple[TrainState, StepMetrics]:
        nonlocal before, under_way
        mine = int(asked() or 0)
        if mine not in flags:
            own = np.full(len(mesh.local_devices), mine, np.int32)
            flags[mine] = jax.make_array_from_process_local_data(one_each, own)
        before = under_way
        state, metrics, under_way = with_word(state, fixed, batch, flags[mine])
        return state, metrics

    def asked_of_any() -> signal.Signals | None:
        number = 0 if before is None else int(before)
        return signal.Signals(number) if number else None

    return step, asked_of_any
