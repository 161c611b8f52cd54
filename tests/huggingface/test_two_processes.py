"""Two processes of four simulated devices each, as two hosts of a pod: each reads its part, and they write together."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.tensors import hub_parameters
from tests.cases import CASES
from tests.distance import assert_near
from tests.subject import hub_arrays

ROOT = Path(__file__).parents[2]
SIZES = dict(expert=4, tensor=2)  # the first host has the first two of four groups of experts
TOKENS = np.random.default_rng(0).integers(1, 96, (8, 12))

HOST = """
import json, sys
import jax, numpy as np
import qwen_moe_jax as qmj
number, port, folder, native = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
qmj.initialize_distributed(f"127.0.0.1:{port}", num_processes=2, process_id=number)
qmj.initialize_distributed()  # nothing happens twice
from jax.experimental import multihost_utils
from qwen_moe_jax.sharding.distributed import broadcast
from qwen_moe_jax.storage import safetensors_file
from tests.huggingface.test_two_processes import SIZES, TOKENS

read = []
read_into = safetensors_file.SafetensorsTensor.read_into
def counting(self, index, out):
    read.append(out.nbytes)
    read_into(self, index, out)
safetensors_file.SafetensorsTensor.read_into = counting

mesh = qmj.make_mesh(**SIZES)
model = qmj.from_pretrained(folder, mesh=mesh)
logits = multihost_utils.process_allgather(model(TOKENS).logits, tiled=True)
qmj.save_orbax(model, native)
again = qmj.from_pretrained(native, mesh=mesh)
for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
    for mine, found in zip(one.addressable_shards, other.addressable_shards, strict=True):
        assert np.asarray(mine.data).tobytes() == np.asarray(found.data).tobytes()
qmj.save_pretrained(model, native + "-hub", max_shard_size=60_000)
try:
    qmj.make_mesh(expert=4)
    refused = ""
except qmj.ShardingError as error:
    refused = str(error)
if number == 0:
    np.save(native + "-logits.npy", logits)
print(json.dumps({"read": sum(read), "devices": len(jax.local_devices()), "refused": refused,
                  "first": broadcast(f"of {number}")}))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def bytes_on(leaf: jax.ShapeDtypeStruct, devices: list[jax.Device]) -> int:
    """Of the different parts of an array that lie on these devices."""
    parts = leaf.sharding.devices_indices_map(leaf.shape)
    different = {str(parts[device]) for device in devices}
    return len(different) * math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model on one device, and its folder."""
    config = qmj.ModelConfig.from_pretrained({**CASES["qwen2_moe-plain"].config, "vocab_size": 96})
    model = qmj.CausalLM(config, rngs=nnx.Rngs(0))
    folder = tmp_path_factory.mktemp("source") / "hub"
    qmj.save_pretrained(model, folder, max_shard_size=60_000)
    return model, folder


def test_each_host_reads_its_part_and_the_logits_are_those_of_one(source, tmp_path):
    model, folder = source
    native, port = tmp_path / "native", free_port()
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT)}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(number), str(port), str(folder), str(native)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        answers = [host.communicate(timeout=300) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
            host.wait()
    told = []
    for host, (out, err) in zip(hosts, answers, strict=True):
        assert host.returncode == 0, err
        told.append(json.loads(out.splitlines()[-1]))

    mesh = qmj.make_mesh(**SIZES)
    described = [parameter.leaf for parameter in hub_parameters(qmj.CausalLM(model.config, rngs=None, mesh=mesh))]
    for host, each in enumerate(told):
        assert each["devices"] == 4
        assert each["read"] == sum(bytes_on(leaf, jax.devices()[4 * host : 4 * host + 4]) for leaf in described)
        assert each["read"] < 0.55 * sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        assert "leave none of process 1 in the mesh" in each["refused"]
    assert [each["first"] for each in told] == ["of 0", "of 0"]
    for file in folder.iterdir():
        assert (tmp_path / "native-hub" / file.name).read_bytes() == file.read_bytes(), file.name

    expected = np.asarray(qmj.from_pretrained(folder, mesh=mesh)(TOKENS).logits)
    # The same sums, of which the processes' collectives may add the terms in another order.
    assert_near(np.load(f"{native}-logits.npy"), expected, 1e-5, "logits")
    one = qmj.from_pretrained(native)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "native-hub", "native-logits.npy"]
    for (name, found), (_, original) in zip(hub_arrays(one), hub_arrays(model), strict=True):
        assert found.tobytes() == original.tobytes(), name
