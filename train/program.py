"""The program of a run: the abstract model, the optimizer, and the jitted train and eval step."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import qwen_moe_jax as qmj
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.model.lora import is_adapter
from qwen_moe_jax.nn.parameters import parameters_with_paths
from qwen_moe_jax.nn.quantised import QuantisedParam
from qwen_moe_jax.sharding.compiler_options import compiler_options
from train.config import TrainConfig
from train.objectives.chosen import objective_of
from train.objectives.contract import Objective
from train.offload import DEVICE, HOST, check_arguments, check_memory_kind, in_memory
from train.optimizer import frozen_paths, make_optimizer, stack_axes
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


@dataclass(frozen=True, kw_only=True)
class Program:
    """The two jitted steps, and their abstract arguments: `jax.ShapeDtypeStruct`s with shardings.

    Attributes:
        objective: what is minimised.
        model: abstract, in training mode.
        eval_graph: the graphdef of the same model in eval mode, where no token is dropped.
        state: the train state; its parameters are the trained ones.
        fixed: the parameters that are not trained (`train.parameters`); no checkpoint of the run holds them.
        batch: the batch of a step.
        train_step: (state, fixed, batch) → (state, metrics).
        eval_step: (all parameters, batch) → sums for the objective's held-out metrics.
        optimizer: the optimizer of `train_step`.
    """

    objective: Objective
    model: Model
    eval_graph: nnx.GraphDef
    state: TrainState
    fixed: Params
    batch: Any
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
        sizes = {}
        for path, param in parameters_with_paths(self.model):
            sizes[path] = param.numbers if isinstance(param, QuantisedParam) else math.prod(param.unpadded_shape)
        return sizes

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
    objective = objective_of(config)
    head = objective.description.model_class
    model = head(model_config, rngs=None, mesh=mesh, execution=_execution(config.execution))
    if config.lora is not None:
        qmj.add_lora(model, config.lora, rngs=None)
    eval_graph = nnx.graphdef(model)
    model.train()
    train_graph, abstract = nnx.split(model)
    shapes = nnx.to_pure_dict(abstract)

    if config.execution.activation_offloading:
        check_memory_kind(HOST, mesh, "execution.activation_offloading")
    trained, fixed = partition(shapes, _fixed_paths(config, model))
    if not trained:
        raise ConfigError(f"optimizer.frozen: {[*config.optimizer.frozen]} leaves no parameter to train.")
    optimizer = make_optimizer(config.optimizer, config.run.steps, stack_axes(model))
    shardings = state_shardings(trained, optimizer, mesh)
    if (kind := config.optimizer.memory_kind) != DEVICE:
        check_memory_kind(kind, mesh)
        check_arguments(kind, mesh)
        moments = in_memory(kind, shardings.optimizer, jax.eval_shape(optimizer.init, trained))
        shardings = dataclasses.replace(shardings, optimizer=moments)
    if config.optimizer.ema_decay is not None:
        shardings = dataclasses.replace(shardings, ema=shardings.params)
    return Program(
        objective=objective,
        model=model,
        eval_graph=eval_graph,
        state=abstract_state(trained, optimizer, shardings),
        fixed=fixed,
        batch=_sharded(objective.abstract_batch(config, model_config), batch_sharding(mesh)),
        train_step=make_train_step(
            train_graph,
            optimizer,
            objective.resolve_loss(config.loss, model_config),
            shardings,
            config.run.seed,
            config.run.gradient_accumulation_steps,
            objective,
            config.optimizer.ema_decay,
            compiler_options(mesh) if config.run.async_collectives else None,
        ),
        eval_step=make_eval_step(eval_graph, objective),
        optimizer=optimizer,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's arrays [B, …]: rows over all axes that share the batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))


def _fixed_paths(config: TrainConfig, model: Model) -> frozenset[str]:
    """The paths of the parameters that are not trained.

    All but the adapters and a classifier's head, or those that the config freezes, and the next-token head where no
    loss trains it.
    """
    if config.lora is None:
        frozen = frozen_paths(config.optimizer.frozen, model)
        mtp = getattr(model, "mtp", None)  # classifiers have none
        unused = [] if config.loss.mtp_coef or mtp is None else paths(nnx.to_pure_dict(nnx.state(mtp)))
        return frozen | {f"mtp.{path}" for path in unused}
    # A classifier's head is new and small: it is trained whole, as PEFT's modules_to_save.
    known = paths(nnx.to_pure_dict(nnx.state(model)))
    return frozenset(path for path in known if not (is_adapter(path) or path.startswith("score.")))


def _sharded(batch: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)


def _execution(execution: qmj.ExecutionConfig) -> qmj.ExecutionConfig:
    """The execution of a run, with "capacity" in training mode only: in eval mode no token is dropped."""
    return dataclasses.replace(execution, dispatch=None) if execution.dispatch == "capacity" else execution
