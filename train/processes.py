"""What the processes of one run agree on: the run folder, and the step after which to stop."""

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

#: Seconds within which a file that one host made must be visible to the others: network file systems cache listings.
_SECONDS_TO_APPEAR = 30.0

Asked = Callable[[], signal.Signals | None]


def open_shared_run_folder(config: TrainConfig, *, fresh: bool) -> tuple[RunFolder, bool, bool]:
    """Opens the run folder in process 0, and checks that all processes see it.

    Returns:
        The folder; whether its run is finished; whether this is process 0.

    Raises:
        ConfigError: in process 0, as `open_run_folder`; in any other, the folder of process 0 is not visible.
        ShardingError: the processes have different settings.
    """
    require_same("the settings of the run", f"{to_toml(config)} --fresh={fresh}")
    folder = open_run_folder(config, fresh=fresh) if is_process_zero() else RunFolder(config.run.output_dir)
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


def with_shared_stop(train_step: TrainStep, asked: Asked, mesh: Mesh) -> tuple[TrainStep, Asked]:
    """Shares requests to stop between processes: a wrapped train step, and a function that returns the shared request.

    All processes see the same request after the same step. It is reduced in the train step's own program: a second
    program with a collective would cost time, and on CPUs two such programs can deadlock. It is read after the next
    step has been dispatched, so that the devices never wait for it.

    Args:
        train_step: the jitted step.
        asked: the signal that this process received, or None.
        mesh: of the step.
    """
    if num_processes() == 1:
        return train_step, asked
    one_each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    flags: dict[int, jax.Array] = {}
    before: jax.Array | None = None
    under_way: jax.Array | None = None

    @partial(jax.jit, donate_argnums=0)
    def step_with_request(
        state: TrainState, fixed: Params, batch: Batch, requests: jax.Array
    ) -> tuple[TrainState, StepMetrics, jax.Array]:
        state, metrics = train_step(state, fixed, batch)
        everywhere = NamedSharding(mesh, PartitionSpec())
        return state, metrics, jax.lax.with_sharding_constraint(jnp.max(requests), everywhere)

    def step(state: TrainState, fixed: Params, batch: Batch) -> tuple[TrainState, StepMetrics]:
        nonlocal before, under_way
        mine = int(asked() or 0)
        if mine not in flags:
            own = np.full(len(mesh.local_devices), mine, np.int32)
            flags[mine] = jax.make_array_from_process_local_data(one_each, own)
        before = under_way
        state, metrics, under_way = step_with_request(state, fixed, batch, flags[mine])
        return state, metrics

    def asked_of_any() -> signal.Signals | None:
        number = 0 if before is None else int(before)
        return signal.Signals(number) if number else None

    return step, asked_of_any
