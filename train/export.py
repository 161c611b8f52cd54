"""The end of a run: hub/ and adapter/ in the Hub's layout, and a sample from the folder that others will load."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.convert import convert
from qwen_moe_jax.huggingface.generation_config import generation_config_to_hub
from qwen_moe_jax.huggingface.load import load_model
from qwen_moe_jax.huggingface.save import write_configs
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.sharding.distributed import is_process_zero, num_processes
from train.config import TrainConfig
from train.data.corpus import Corpus
from train.data.tokenizer import copy_tokenizer, name_turn_ends
from train.folder import RunFolder
from train.initial import export_generation_config


def export(trained: Model, config: TrainConfig, folder: RunFolder, corpus: Corpus) -> str | None:
    """Writes what the config asks for, and returns the continuation of `run.sample_prompt`.

    A classifier has none, nor has a model whose mesh shards positions: it does not decode.
    The sample is of the exported model, loaded again, where one is exported; it is always greedy.

    Args:
        trained: the model in eval mode. Its adapters are merged into its weights.
    """
    trained.generation_config = export_generation_config(config, trained.config, corpus)
    if config.lora is not None and isinstance(trained, qmj.CausalLM):  # a classifier's adapters need its head
        qmj.save_adapter(trained, folder.adapter, base=config.run.model_name_or_path)
        if is_process_zero():
            _save_tokenizer(folder, folder.adapter, corpus)
            generation = generation_config_to_hub(trained.generation_config, trained.config)
            write_configs(folder.adapter, {"generation_config.json": _without_nulls(generation)})
    if config.run.export and config.execution.weights is not None:
        trained = _export_over_floats(trained, config, folder, corpus)
    elif config.run.export:
        if config.lora is not None:
            qmj.merge_lora(trained)
        if is_process_zero():
            _save_tokenizer(folder, folder.hub, corpus)
        qmj.save_pretrained(in_dtype(trained, export_dtype(config, trained)), folder.hub)
        trained = type(trained).from_pretrained(folder.hub, mesh=trained.mesh if num_processes() > 1 else None)
    if not isinstance(trained, qmj.CausalLM):
        return None
    greedy = dataclasses.replace(trained.generation_config, do_sample=False)
    prompt, count = config.run.sample_prompt, config.run.sample_tokens
    [sample] = qmj.generate(trained, [prompt], greedy, max_new_tokens=count, tokenizer=corpus.tokenizer)
    return str(sample)


def _export_over_floats(trained: Model, config: TrainConfig, folder: RunFolder, corpus: Corpus) -> Model:
    """Merges the exported adapter into the weights of the run's base, and loads the result.

    The run's own weights are rounded to few bits, and the result is loaded in as few, since floats need not fit: one
    process merges them tensor by tensor.
    """
    base, dtype, several = config.run.model_name_or_path, export_dtype(config, trained), num_processes() > 1
    if several:
        floats = load_model(type(trained), base, mesh=trained.mesh, dtype=dtype, drop_mtp=config.run.drop_mtp)
        qmj.load_adapter(floats, folder.adapter)
        qmj.merge_lora(floats)
        qmj.save_pretrained(floats, folder.hub)
    else:
        convert(base, folder.hub, adapter=folder.adapter, dtype=dtype, drop_mtp=config.run.drop_mtp)
    if is_process_zero():
        _save_tokenizer(folder, folder.hub, corpus)
        generation = generation_config_to_hub(trained.generation_config, trained.config)
        write_configs(folder.hub, {"generation_config.json": _without_nulls(generation)})
    return type(trained).from_pretrained(
        folder.hub, mesh=trained.mesh if several else None, weights=config.execution.weights
    )


def export_dtype(config: TrainConfig, model: Model) -> str:
    """The dtype of the weights in hub/: `run.export_dtype`, else the dtype of the run's base, else the model's."""
    base = model.config.dtype if config.run.model_name_or_path else None
    return config.run.export_dtype or base or model.execution.param_dtype


def in_dtype(model: Model, dtype: str) -> Model:
    """The model with parameters of another dtype, sharded as before; those that are always float32 stay so."""
    if dtype == model.execution.param_dtype:
        return model
    execution = dataclasses.replace(model.execution, param_dtype=dtype)
    described = type(model)(
        model.config, rngs=None, mesh=model.mesh, execution=execution, generation_config=model.generation_config
    )
    weights, wanted = jax.tree.leaves(model), jax.tree.leaves(described)
    cast = jax.jit(
        lambda weights: [weight.astype(like.dtype) for weight, like in zip(weights, wanted, strict=True)],
        out_shardings=[weight.sharding for weight in weights],
    )
    return jax.tree.unflatten(jax.tree.structure(described), cast(weights))


def _save_tokenizer(run: RunFolder, folder: Path, corpus: Corpus) -> None:
    copy_tokenizer(run.corpus / "tokenizer", folder)
    name_turn_ends(folder, corpus.turn_ends)


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
