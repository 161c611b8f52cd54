"""`JAX_ENABLE_X64=1`, as numerical code of the same process may want it, changes no dtype of a model."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp

import qwen_moe_jax as qmj
from qwen_moe_jax.plan.inference import decode_step, prefill_step
from qwen_moe_jax.sharding.mesh import make_mesh
from tests.cases import CASES, FAMILIES, HYBRID_CASES

#: Families, and what of them changes the traced program.
RUNS = [(family, {}) for family in (*FAMILIES, "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")]
RUNS += [("qwen3_moe", {"dispatch": dispatch}) for dispatch in ("capacity", "dense")]


def wide_arrays(family: str, settings: dict[str, str]) -> list[str]:
    """What is of 64 bits in the results of a forward pass, its gradients, of prefill and decoding; only traced."""
    execution = qmj.ExecutionConfig(**settings)
    config = qmj.ModelConfig.from_pretrained({**CASES, **HYBRID_CASES}[f"{family}-plain"].config)
    model, mesh = qmj.CausalLM(config, rngs=None, execution=execution), make_mesh()
    model.train()

    def loss(model, tokens_BT):
        out = model(tokens_BT, output_router_logits=config.moe is not None)
        return jnp.mean(out.logits), out

    gradients = jax.value_and_grad(loss, has_aux=True)
    traced = [jax.eval_shape(gradients, model, jax.ShapeDtypeStruct((2, 40), jnp.int32))]
    for step in (
        prefill_step(config, family, mesh, execution, rows=2, prompt=20, max_length=40),
        decode_step(config, family, mesh, execution, rows=2, max_length=40),
    ):
        traced.append(jax.eval_shape(step.function, *step.arguments))
    found = jax.tree_util.tree_leaves_with_path(traced)
    assert len(found) > 20
    return [f"{family} {settings}{path}: {x.dtype}" for path, x in found if "64" in str(x.dtype)]


def test_every_family_has_the_dtypes_that_it_has_without():
    environment = {**os.environ, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.model.test_x64"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert (found.returncode, found.stdout) == (0, ""), found.stdout + found.stderr[-3000:]


if __name__ == "__main__":
    assert jnp.arange(1).dtype == jnp.int64
    for run in RUNS:
        sys.stdout.writelines(f"{line}\n" for line in wide_arrays(*run))
