"""Weights quantised while they are read: from any folder, over any mesh, in little memory."""

import dataclasses

import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.low_bit import INTEGERS, SCALES, LastScales, QuantisedTensor
from qwen_moe_jax.nn.parameters import parameters_with_paths
from qwen_moe_jax.nn.quantised import quantise
from qwen_moe_jax.storage.arrays import ArrayTensor
from qwen_moe_jax.storage.tensor import StoredTensor, index_shape
from tests.model.low_bit import GROUP, low_bit_model, sparse_config


@dataclasses.dataclass(frozen=True)
class Counted(StoredTensor):
    """A tensor that notes how many numbers are read at a time."""

    tensor: ArrayTensor
    reads: list

    shape = property(lambda self: self.tensor.shape)
    dtype = property(lambda self: self.tensor.dtype)
    source = property(lambda self: self.tensor.source)

    def read_into(self, index, out):
        self.reads.append(int(np.prod(index_shape(index))))
        self.tensor.read_into(index, out)


@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (4, 4)])
def test_parts_are_read_in_slices_and_the_floats_once(bits, groups):
    floats = np.random.default_rng(0).normal(size=(3, 40, 64)).astype(np.float32)
    expected = quantise(floats, bits, groups, np)
    tensor, last = Counted(ArrayTensor(floats, "a test"), []), LastScales()
    integers, scales = (QuantisedTensor(tensor, bits, groups, part, last) for part in (INTEGERS, SCALES))
    assert (integers.shape, scales.shape) == (expected.integers.shape, expected.scales.shape)
    np.testing.assert_array_equal(integers.read(), expected.integers)
    np.testing.assert_array_equal(scales.read(), expected.scales)
    assert sum(tensor.reads) == floats.size
    half = integers.shape[-1] // 2
    for columns in (slice(0, half), slice(half, 2 * half)):
        window = (slice(1, 3), slice(7, 31), columns)
        np.testing.assert_array_equal(integers.read(window), expected.integers[window])
    part = (slice(0, 2), slice(groups // 2, groups), slice(3, 9))
    np.testing.assert_array_equal(
        QuantisedTensor(tensor, bits, groups, SCALES, LastScales()).read(part), expected.scales[part]
    )


def test_a_large_matrix_is_quantised_in_blocks():
    """Eight million floats are never in memory at once: at most a megabyte of them is."""
    zeros = np.broadcast_to(np.float32(0), (4, 2048, 1024))
    tensor = Counted(ArrayTensor(zeros, "a test"), [])
    QuantisedTensor(tensor, 4, 16, INTEGERS, LastScales()).read()
    assert sum(tensor.reads) == zeros.size and 4 * max(tensor.reads) <= 1 << 20


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_folder_is_loaded_as_its_model_is_quantised(weights, tmp_path):
    qmj.save_pretrained(qmj.CausalLM(sparse_config(), rngs=0), tmp_path)
    expected = dict(parameters_with_paths(low_bit_model(sparse_config(), weights)))
    execution = qmj.ExecutionConfig(weights_group_size=GROUP)
    for mesh in (None, qmj.make_mesh(fsdp=2, expert=2, tensor=2)):
        loaded = qmj.from_pretrained(tmp_path, mesh=mesh, weights=weights, execution=execution)
        for path, param in parameters_with_paths(loaded):
            np.testing.assert_array_equal(np.asarray(param[...]), np.asarray(expected[path][...]), err_msg=path)


def test_arguments_of_transformers_are_answered():
    with pytest.raises(TypeError, match="weights='int4'"):
        qmj.from_pretrained("anywhere", load_in_4bit=True)
