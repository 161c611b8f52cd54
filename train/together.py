"""What several processes of one run have to agree about: the folder, and when to stop."""

import secrets
import signal
import socket
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.sharding.hosts import from_first, leads, num_processes, require_same, wait_for_all
from train.config import TrainConfig, to_toml
from train.folder import RunFolder, open_run_folder

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
    folder = RunFolder(open_run_folder(config, fresh=fresh).path if leads() else config.run.folder)
    mark = folder.path / f".seen-{from_first(secrets.token_hex(8))}"
    if leads():
        mark.touch()
    wait_for_all(str(mark))
    until = time.monotonic() + _SECONDS_TO_APPEAR
    while not mark.exists():
        if time.monotonic() > until:
            raise ConfigError(
                f"run.folder: {folder.path.absolute()} on {socket.gethostname()} is not the folder that process 0 "
                "opened, expected one that all hosts see. Put it on a file system that they share (NFS, Lustre, a "
                "mounted bucket): --run.folder FOLDER."
            )
        time.sleep(0.2)
    wait_for_all(f"{mark} was seen")
    if leads():
        mark.unlink()
    return folder, from_first(str(folder.finished)) == "True", leads()


def agreed(asked: Asked, mesh: Mesh) -> Asked:
    """The same answer in all processes, to be asked for once a step by all: the one of any of them, a step later.

    What each was asked travels over the devices behind the step that is under way, and is read when the next one has
    been started, so that the devices never wait for it.
    """
    if num_processes() == 1:
        return asked
    everywhere = NamedSharding(mesh, PartitionSpec())
    one_each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    largest = jax.jit(jnp.max, out_shardings=everywhere)
    sent: dict[int, jax.Array] = {}
    under_way: jax.Array | None = None

    def of_all() -> signal.Signals | None:
        nonlocal under_way
        mine = int(asked() or 0)
        if mine not in sent:
            flags = np.full(len(mesh.local_devices), mine, np.int32)
            sent[mine] = jax.make_array_from_process_local_data(one_each, flags)
        last, under_way = under_way, largest(sent[mine])
        number = 0 if last is None else int(last)
        return signal.Signals(number) if number else None

    return of_all
