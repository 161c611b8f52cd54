"""Model → native folder: a Hub folder's configs, and the parameters as an Orbax checkpoint instead of safetensors.

All processes write and read it in parallel, it restores onto any mesh, and needs no renaming or unstacking: parameters
keep their names and shapes in the model.
"""

import dataclasses
from os import PathLike
from pathlib import Path
from typing import Any

from qwen_moe_jax.huggingface.checkpoint import BALANCING_BIAS, ORBAX
from qwen_moe_jax.huggingface.readback import require_same_arrays
from qwen_moe_jax.huggingface.save import configs_to_hub, write_configs
from qwen_moe_jax.huggingface.target import checkpoint_folder, is_companion
from qwen_moe_jax.huggingface.tensors import hub_parameters
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.sharding.distributed import is_process_zero
from qwen_moe_jax.storage.placement import unpadded


def save_orbax(model: Model, folder: str | PathLike[str], *, verify: bool = False) -> None:
    """Writes a model as a native folder, which `from_pretrained` reads like one of the Hub's, on any mesh.

    Written under a temporary name and renamed when complete. Under several processes all call it, with a folder that
    all of them see; each writes the shards of its own devices.

    Args:
        model: any head; its parameters keep their dtype.
        folder: to write. Weights and configs of an existing folder are replaced, its other files are kept; those that
            are no tokenizer, template or licence are named on stderr.
        verify: read the arrays back before they replace the folder, and compare them with the model's, bit for bit.

    Raises:
        ConfigError: the family cannot express the config.
        CheckpointError: `folder` is a file, a mount point or a folder of other files; with `verify`, the arrays differ
            from the model.
    """
    from qwen_moe_jax.storage.orbax import save_arrays, stored_tensors

    model.require_weights()
    configs = _configs(model)
    with checkpoint_folder(Path(folder), expected=is_companion) as new:
        # Without padding, which depends on the mesh.
        parameters = hub_parameters(model)
        arrays = {of.path: unpadded(of.leaf, of.shape) for of in parameters}
        save_arrays(new / ORBAX, arrays)
        if verify:
            require_same_arrays(Path(folder), arrays, stored_tensors(new / ORBAX))
        if is_process_zero():
            write_configs(new, configs)


def _configs(model: Model) -> dict[str, dict[str, Any]]:
    """The configs of a Hub folder, and in config.json the fields that no family of the Hub has."""
    moe = model.config.moe
    if moe is None or not moe.balancing_bias:
        return configs_to_hub(model)
    config = dataclasses.replace(model.config, moe=dataclasses.replace(moe, balancing_bias=False))
    execution, generation = model.execution, model.generation_config
    configs = configs_to_hub(type(model)(config, rngs=None, execution=execution, generation_config=generation))
    configs["config.json"][BALANCING_BIAS] = True
    return configs
