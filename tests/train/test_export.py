"""What a run hands out keeps what its base has."""

import jax
import numpy as np

import qwen_moe_jax as qmj
from tests.model.hybrid_configs import hybrid_config
from tests.subject import hub_arrays
from train.export import in_dtype

#: What Qwen3.5's files have in float32 among bfloat16.
FLOAT32 = ("linear_attn.A_log", "linear_attn.norm.weight")


def test_what_the_files_of_a_base_have_in_float32_is_exported_in_float32():
    config = hybrid_config("L", linear={"float32_parameters": True}, dtype="bfloat16")
    execution = qmj.ExecutionConfig(dtype="bfloat16", param_dtype="float32")
    model = qmj.CausalLM(config, rngs=0, mesh=qmj.make_mesh(tensor=2), execution=execution)
    exported = in_dtype(model, "bfloat16")
    before = dict(hub_arrays(model))
    for name, tensor in hub_arrays(exported):
        dtype = "float32" if name.endswith(FLOAT32) else "bfloat16"
        assert tensor.dtype == dtype, name
        np.testing.assert_array_equal(tensor, before[name].astype(dtype), err_msg=name)
    assert exported.execution.param_dtype == "bfloat16"
    for ours, theirs in zip(jax.tree.leaves(exported), jax.tree.leaves(model), strict=True):
        assert ours.sharding == theirs.sharding
