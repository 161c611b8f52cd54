"""The program of a run: the abstract model, the optimizer, and the jitted train and eval step."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import qwen_moe_jax as qmj
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.model.lora import is_adapter
from qwen_moe_jax.nn.parameters import parameters_with_paths
from train.config import TrainConfig
from train.data.batches import Batch
from train.objectives import language_modelling
from train.objectives.contract import Objective
from train.optimizer import frozen_paths, make_optimizer
from train.parameters import Params, partition, paths, select
from train.step import (
    EvalStep,
    TrainState,
    TrainStep,
    abstract_state,
    initial_state,
    make_eval_step,
    make_train_step,
    state_shardings,
)

#: The objective of a run.
OBJECTIVE: Objective = language_modelling


@dataclass(frozen=True, kw_only=True)
class Program:
    """The two jitted steps, and their abstract arguments: `jax.ShapeDtypeStruct`s with shardings.

    Attributes:
        model: abstract, in training mode.
        eval_graph: the graphdef of the same model in eval mode, where no token is dropped.
        state: the train state; its parameters are the trained ones.
        fixed: the parameters that are not trained (`train.parameters`); no checkpoint of the run holds them.
        batch: the batch of a step.
        train_step: (state, fixed, batch) → (state, metrics).
        eval_step: (all parameters, batch) → the summed loss.
        optimizer: the optimizer of `train_step`.
    """

    model: qmj.CausalLM
    eval_graph: nnx.GraphDef
    state: TrainState
    fixed: Params
    batch: Batch
    train_step: TrainStep
    eval_step: EvalStep
    optimizer: optax.GradientTransformation

    @property
    def trained_share(self) -> float:
        """The share of the parameters that are trained, 0 to 1."""
        sizes = self.parameter_sizes
        return sum(sizes[path] for path in paths(self.state.params)) / sum(sizes.values())

    @property
    def parameter_sizes(self) -> dict[str, int]:
        """The number of elements of each parameter by its path, without padding."""
        return {path: math.prod(param.unpadded_shape) for path, param in parameters_with_paths(self.model)}

    def begin(self, params: Params) -> TrainState:
        """The state at step 0, sharded as `state`, from all parameters of the model."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return initial_state(select(params, like=self.state.params), self.optimizer, shardings)


def assemble(config: TrainConfig, model_config: qmj.ModelConfig, mesh: Mesh) -> Program:
    """The program of a run. Nothing is allocated, and nothing compiled before the steps are called or lowered.

    Raises:
        ConfigError: a setting needs a part that the model does not have, or no parameter is left to train.
        ShardingError: sizes do not divide over the mesh.
    """
    model = qmj.CausalLM(model_config, rngs=None, mesh=mesh, execution=_execution(config.execution))
    if config.lora is not None:
        qmj.add_lora(model, config.lora, rngs=None)
    eval_graph = nnx.graphdef(model)
    model.train()
    train_graph, abstract = nnx.split(model)
    shapes = nnx.to_pure_dict(abstract)

    trained, fixed = partition(shapes, _fixed_paths(config, model))
    if not trained:
        raise ConfigError(f"optimizer.frozen: {[*config.optimizer.frozen]} leaves no parameter to train.")
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    shardings = state_shardings(trained, optimizer, mesh)
    return Program(
        model=model,
        eval_graph=eval_graph,
        state=abstract_state(trained, optimizer, shardings),
        fixed=fixed,
        batch=_abstract_batch(config.data.batch_size, config.data.seq_len, batch_sharding(mesh)),
        train_step=make_train_step(
            train_graph,
            optimizer,
            OBJECTIVE.resolve_loss(config.loss, model_config),
            shardings,
            config.run.seed,
            config.run.gradient_accumulation_steps,
            OBJECTIVE,
        ),
        eval_step=make_eval_step(eval_graph, OBJECTIVE),
        optimizer=optimizer,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's arrays [B,T]: rows over all axes that share the batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))


def _fixed_paths(config: TrainConfig, model: qmj.CausalLM) -> frozenset[str]:
    """The paths of the parameters that are not trained.

    All but the adapters, or those that the config freezes, and the next-token head where no loss trains it.
    """
    if config.lora is None:
        frozen = frozen_paths(config.optimizer.frozen, model)
        unused = [] if config.loss.mtp_coef or model.mtp is None else paths(nnx.to_pure_dict(nnx.state(model.mtp)))
        return frozen | {f"mtp.{path}" for path in unused}
    return frozenset(path for path in paths(nnx.to_pure_dict(nnx.state(model))) if not is_adapter(path))


def _abstract_batch(rows: int, seq_len: int, sharding: NamedSharding) -> Batch:
    def array(dtype: type) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, seq_len), dtype, sharding=sharding)

    fields: dict[str, Any] = {field.name: array(jnp.int32) for field in dataclasses.fields(Batch)}
    return Batch(**{**fields, "target_mask_BT": array(jnp.bool_)})


def _execution(execution: qmj.ExecutionConfig) -> qmj.ExecutionConfig:
    """The execution of a run, with "capacity" in training mode only: in eval mode no token is dropped."""
    return dataclasses.replace(execution, dispatch=None) if execution.dispatch == "capacity" else execution
