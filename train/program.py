"""What a run compiles, before there is a token or a weight: the model's description, the optimizer, the two steps."""

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
from train.objectives.language_modelling import resolve_loss
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


@dataclass(frozen=True, kw_only=True)
class Program:
    """Two jitted steps, and what goes into them as `jax.ShapeDtypeStruct`s that say where everything lies.

    Attributes:
        model: without weights, in training mode.
        eval_graph: of the same model in eval mode, where no token is dropped; `nnx.merge` with parameters.
        state: what goes from step to step; its parameters are those that are trained.
        fixed: the other parameters of the model (`train.parameters`): no step changes them, and no checkpoint of the
            run holds them.
        batch: what a step reads.
        train_step: (state, fixed, batch) → (state, metrics).
        eval_step: (all parameters, batch) → the summed loss.
        optimizer: what `train_step` applies.
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
        """How many of the parameters are trained, 0 to 1."""
        sizes = self.parameter_sizes
        return sum(sizes[path] for path in paths(self.state.params)) / sum(sizes.values())

    @property
    def parameter_sizes(self) -> dict[str, int]:
        """Elements of each parameter of the model by its path, without padding."""
        return {path: math.prod(param.unpadded_shape) for path, param in parameters_with_paths(self.model)}

    def begin(self, params: Params) -> TrainState:
        """Step 0 with these parameters of all that the model has, placed as `state` says."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return initial_state(select(params, like=self.state.params), self.optimizer, shardings)


def assemble(config: TrainConfig, model_config: qmj.ModelConfig, mesh: Mesh) -> Program:
    """The program of a run; nothing is allocated, and nothing compiled before it is called or lowered.

    Raises:
        ConfigError: something is asked of the model that it does not have, or nothing of it is left to train.
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
    optimizer = make_optimizer(config.optimizer, config.run.max_steps)
    shardings = state_shardings(trained, optimizer, mesh)
    return Program(
        model=model,
        eval_graph=eval_graph,
        state=abstract_state(trained, optimizer, shardings),
        fixed=fixed,
        batch=_describe_batch(config.data.batch_size, config.data.seq_len, batch_sharding(mesh)),
        train_step=make_train_step(
            train_graph,
            optimizer,
            resolve_loss(config.loss, model_config),
            shardings,
            config.run.seed,
            config.run.gradient_accumulation_steps,
        ),
        eval_step=make_eval_step(eval_graph),
        optimizer=optimizer,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all axes that share the batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))


def _fixed_paths(config: TrainConfig, model: qmj.CausalLM) -> frozenset[str]:
    """With adapters, all but them; otherwise what the config freezes."""
    if config.lora is None:
        return frozen_paths(config.optimizer.frozen, model)
    return frozenset(path for path in paths(nnx.to_pure_dict(nnx.state(model))) if not is_adapter(path))


def _describe_batch(rows: int, seq_len: int, sharding: NamedSharding) -> Batch:
    def array(dtype: type) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, seq_len), dtype, sharding=sharding)

    fields: dict[str, Any] = {field.name: array(jnp.int32) for field in dataclasses.fields(Batch)}
    return Batch(**{**fields, "target_mask_BT": array(jnp.bool_)})


def _execution(execution: qmj.ExecutionConfig) -> qmj.ExecutionConfig:
    """The execution of a run: "capacity" in training mode alone, so that no token of held-out text is dropped."""
    return dataclasses.replace(execution, dispatch=None) if execution.dispatch == "capacity" else execution
