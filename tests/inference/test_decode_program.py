"""Arrays that the compiled decoding program reads and writes, by the compiler's cost analysis and HLO."""

import importlib.util
import re

import jax
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.inference import programs
from qwen_moe_jax.inference.settings import initial_state, sampling_settings
from qwen_moe_jax.model.cache import abstract_cache
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.moe.kernels import cpu
from tests.cases import CASES

L, E, F, D = 4, 128, 24, 40
#: What only names an array that is there already.
NAMES = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "opt-barrier"}


def abstract_model(dtype: str) -> CausalLM:
    """A model with many experts, of which a token asks for two."""
    sizes = dict(num_hidden_layers=L, num_experts=E, num_experts_per_tok=2, moe_intermediate_size=F, hidden_size=D)
    config = qmj.ModelConfig.from_pretrained({**CASES["qwen3_moe-plain"].config, **sizes})
    return CausalLM(config, rngs=None, execution=qmj.ExecutionConfig(dtype=dtype))


def wide_config() -> qmj.ModelConfig:
    """Matrices that decoding reads where they are stored: a joint product has 2^13 numbers and more."""
    sizes = dict(
        num_hidden_layers=2, moe_intermediate_size=64, hidden_size=128, shared_expert_intermediate_size=128, head_dim=32
    )
    return qmj.ModelConfig.from_pretrained({**CASES["qwen2_moe-no_qkv_bias"].config, **sizes})


def compiled_step(batch: int, dtype: str, model: CausalLM | None = None):
    """The decode program of `abstract_model`, or of another one. Nothing is allocated."""
    model = model or abstract_model(dtype)
    cache = abstract_cache(model.config, model.mesh, batch=batch, max_length=64, max_write=8, dtype=dtype)
    writing = programs.DecodeState(
        token_B=np.zeros(batch, np.int32),
        left_B=np.ones(batch, np.int32),
        sampling=initial_state(settings(batch), [[]] * batch),
    )
    return programs.decode.lower(model, cache, writing, settings(batch)).compile()


def is_param(node) -> bool:
    return isinstance(node, nnx.Variable)


def settings(batch: int):
    return sampling_settings([qmj.GenerationConfig()] * batch, CASES["qwen3_moe-plain"].config["vocab_size"])


def made(program: str, at_least: int) -> list[str]:
    """Instructions that write an array of so many elements or more. Results inside a fusion are not written."""
    found, fused = [], False
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            fused = "fused" in line or "wrapped" in line
        match = re.match(r"\s+(?:ROOT )?%(\S+) = \w+\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if match and not fused and match[3] not in NAMES:
            if np.prod([int(size) for size in match[2].split(",")]) >= at_least:
                found.append(match[0].strip())
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 8])
def test_decoding_reads_the_experts_it_needs_without_copying_them(batch, dtype):
    """No copy of all experts, nor of a layer's: not of one of their three matrices, nor in another dtype."""
    program = compiled_step(batch, dtype)
    assert not made(program.as_text(), at_least=E * F * D)
    assert program.memory_analysis().temp_size_in_bytes < E * F * D * jax.numpy.dtype(dtype).itemsize


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_copies_no_layer_of_experts(dtype):
    """Many rows read their experts where they are stored; a slice of bfloat16 would widen those of all layers."""
    model = abstract_model(dtype)
    batch, length = 8, 16 * E // 8  # two experts a token: 32 rows for each expert
    cache = abstract_cache(model.config, model.mesh, batch=batch, max_length=length, max_write=length, dtype=dtype)
    tokens_BT, count_B = np.zeros((batch, length), np.int32), np.full(batch, length, np.int32)
    program = programs.prefill.lower(model, cache, tokens_BT, count_B, None).compile().as_text()
    assert not [
        line
        for line in made(program, at_least=E * F * D)
        if re.search(rf"\[({L},|{L * E},)?({E},)?({F},{D}|{D},{F})\]", line)
    ]


def test_a_copy_of_the_experts_would_be_detected(monkeypatch):
    def copied(weights, layer):
        return jax.lax.optimization_barrier(jax.lax.dynamic_index_in_dim(weights, layer, keepdims=False)), 0

    monkeypatch.setattr(cpu, "select_layer", copied)
    program = compiled_step(4, "float32")  # a batch that was not compiled the other way before
    assert made(program.as_text(), at_least=E * F * D)
    assert program.memory_analysis().temp_size_in_bytes > E * F * D * 4


@pytest.mark.skipif(importlib.util.find_spec("llvmlite") is None, reason="needs the extra cpu")
@pytest.mark.parametrize("batch, dtype", [(1, "bfloat16"), (3, "float32")])
def test_decoding_on_a_cpu_copies_and_widens_no_weight(batch, dtype):
    model = CausalLM(wide_config(), rngs=None, execution=qmj.ExecutionConfig(dtype=dtype))
    program = compiled_step(batch, dtype, model).as_text()
    assert program.count(f"qwen_moe_jax_picked_matmul_{dtype}") >= 7  # q k v, o, two of experts, two shared, head
    matrices = {param.shape[-2:] for param in jax.tree.leaves(model, is_leaf=is_param) if param.ndim > 1}
    matrices |= {shape[::-1] for shape in matrices}
    shapes = "|".join(f"{rows},{columns}" for rows, columns in matrices)
    assert not [line for line in made(program, at_least=64 * 128) if re.search(rf"\[([\d,]+,)?({shapes})\]", line)]


@pytest.mark.skipif(importlib.util.find_spec("llvmlite") is None, reason="needs the extra cpu")
@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_on_a_cpu_continues_as_the_full_forward_does(batch):
    """The full forward multiplies with XLA's own products."""
    model = CausalLM(wide_config(), rngs=nnx.Rngs(0), execution=qmj.ExecutionConfig(dtype="float32"))
    prompts = np.random.default_rng(0).integers(0, 90, (batch, 5)).tolist()
    written = qmj.generate(model, prompts, max_new_tokens=9, eos_token_id=())
    tokens_BT = np.concatenate([prompts, written], axis=1)
    logits_BTV = np.asarray(model(tokens_BT).logits)
    np.testing.assert_array_equal(logits_BTV[:, 4:-1].argmax(axis=-1), written)
