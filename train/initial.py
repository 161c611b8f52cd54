"""The model config and the initial weights of a run: those of a checkpoint, or a [model] table's and random ones."""

import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.config import GenerationConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.checkpoint import open_checkpoint
from qwen_moe_jax.huggingface.generation_config import read_generation_config
from qwen_moe_jax.huggingface.hub import local_folder
from qwen_moe_jax.huggingface.load import load_model
from qwen_moe_jax.model.base import Model
from train.checkpoint import Checkpoints
from train.config import TrainConfig
from train.data.corpus import Corpus
from train.folder import HUB_FOLDER
from train.objectives.chosen import objective_of
from train.parameters import Params, select
from train.program import Program
from train.step import TrainState


def check_checkpoint_exists(source: str) -> None:
    """Refuses, before any work is done, to start from the export of a run that has not been trained yet.

    Raises:
        ConfigError: `source` is the hub/ of a run folder and does not exist.
    """
    if Path(source).name == HUB_FOLDER and not Path(source).exists():
        raise ConfigError(
            f"run.model_name_or_path: {source}: there is no such folder yet. It is what another run writes in the end: "
            "train that one first (`make train` writes runs/tiny/hub)."
        )


def initial_model_config(config: TrainConfig, corpus: Corpus) -> qmj.ModelConfig:
    """That of the checkpoint to start from, or of the config's [model] table, with what the objective changes in it.

    Raises:
        ConfigError: its vocabulary is smaller than the tokenizer's, or it is no config of a known family.
    """
    return objective_of(config).model_config(_model_config(config, corpus), corpus)


def _model_config(config: TrainConfig, corpus: Corpus) -> qmj.ModelConfig:
    if config.run.model_name_or_path:
        folder = local_folder(config.run.model_name_or_path)
        drop_mtp = config.run.drop_mtp or not _is_language_model(config)
        model_config = open_checkpoint(folder, drop_mtp=drop_mtp).config
        _check_vocabulary(f"run.model_name_or_path: {folder} has vocab_size", model_config.vocab_size, corpus)
        return dataclasses.replace(model_config, eos_token_id=_with_turn_ends(model_config.eos_token_id, corpus))
    vocab_size = config.model.get("vocab_size", corpus.vocab_size) if config.data.tokenizer else config.data.vocab_size
    _check_vocabulary("model.vocab_size: found", vocab_size, corpus)
    hub_config = {"eos_token_id": corpus.stop_ids, **config.model, "vocab_size": vocab_size}
    model_config = qmj.ModelConfig.from_pretrained(hub_config)
    if config.loss.router_bias_update_rate > 0 and model_config.moe is not None:
        moe = dataclasses.replace(model_config.moe, balancing_bias=True)
        model_config = dataclasses.replace(model_config, moe=moe)
    return model_config


def export_generation_config(config: TrainConfig, model_config: qmj.ModelConfig, corpus: Corpus) -> GenerationConfig:
    """How the exported model generates: as the checkpoint that it started from, and it stops after a turn, too."""
    if not config.run.model_name_or_path:
        return GenerationConfig(eos_token_id=model_config.eos_token_id)
    generation = read_generation_config(local_folder(config.run.model_name_or_path), model_config)
    own = generation.eos_token_id or model_config.eos_token_id
    return dataclasses.replace(generation, eos_token_id=_with_turn_ends(own, corpus))


def _with_turn_ends(stop_ids: tuple[int, ...], corpus: Corpus) -> tuple[int, ...]:
    return tuple(dict.fromkeys([*stop_ids, *corpus.turn_end_ids]))


def initial_state(config: TrainConfig, program: Program, checkpoints: Checkpoints) -> tuple[TrainState, Params]:
    """The state to go on from, and the parameters that are not trained.

    The state is that of the newest checkpoint, else of step 0. What is not trained is in no checkpoint: it is loaded
    or drawn as at the run's first start.
    """
    if checkpoints.latest_step is not None:
        state = checkpoints.restore(like=program.state, model=program.model)
        fixed = select(initial_params(config, program.model), like=program.fixed) if program.fixed else {}
        return state, fixed
    params = initial_params(config, program.model)
    # No reference to `params` outlives this call: the first step reuses the memory of what is trained.
    return program.begin(params), select(params, like=program.fixed)


def initial_params(config: TrainConfig, abstract: Model) -> Params:
    """The parameters of the checkpoint to start from, or random ones; adapters are always new.

    So is a classifier's head, where the checkpoint has none of this kind.
    """
    rngs, head = nnx.Rngs(config.run.seed), type(abstract)
    if config.run.model_name_or_path:
        new_head: dict[str, Any] = {}
        if not _is_language_model(config):
            new_head = {"rngs": rngs, "num_labels": abstract.config.num_labels}
        model = load_model(
            head,
            config.run.model_name_or_path,
            mesh=abstract.mesh,
            execution=abstract.execution,
            drop_mtp=config.run.drop_mtp,
            **new_head,
        )
    else:
        model = head(abstract.config, rngs=rngs, mesh=abstract.mesh, execution=abstract.execution)
    if config.lora is not None:
        qmj.add_lora(model, config.lora, rngs=rngs)
    return nnx.to_pure_dict(nnx.state(model))


def _is_language_model(config: TrainConfig) -> bool:
    return issubclass(objective_of(config).description.model_class, qmj.CausalLM)


def _check_vocabulary(found: str, vocab_size: int, corpus: Corpus) -> None:
    if vocab_size < corpus.vocab_size:
        raise ConfigError(
            f"{found} {vocab_size}, expected at least {corpus.vocab_size}, one more than the largest id of "
            "data.tokenizer."
        )
