"""The sizes and settings of a run at its start: printed, kept in metrics.jsonl, and shown in the report."""

import dataclasses
import math
import platform
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import jax
from jax.sharding import Mesh

import qwen_moe_jax as qmj
from qwen_moe_jax.plan.chips import peak_flops
from qwen_moe_jax.plan.compile import group_of
from qwen_moe_jax.plan.flops import training_flops_per_token
from qwen_moe_jax.plan.work import format_sharding
from qwen_moe_jax.text import format_mesh
from qwen_moe_jax.units import format_bytes
from train.config import TrainConfig
from train.optimizer import moves_by_itself
from train.parameters import Params, paths
from train.program import Program
from train.step import TrainState


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run. Bytes are of one device: its shards of all arrays.

    Attributes:
        time: the local time.
        parameters, active_parameters, trained_parameters: of the model; those used for one token; those that are
            trained.
        sparse_layers: the numbers of the layers with a router.
        mesh: sizes of the axes.
        device_kind: that of `jax.Device`, or "simulated".
        execution: the model's `execution_in_use` in training mode.
        weight_bytes, moment_bytes, gradient_bytes: gradients exist only within a step; fixed weights have
            neither moments nor gradients.
        text_tokens: of the training text.
        tokens_per_step: positions of a batch, padding included.
        flops_per_token: model FLOPs, forward and backward.
        peak_flops: of one device in a second, in bfloat16; None where it is not known.
        versions: of Python and the libraries.
        objective: its name.
        loss_term: the term that lines and curves show as the loss.
        shown: further terms in progress lines.
        captions: of terms, for the page.
        other_bytes: what a device holds besides, by name: the cache in which completions are sampled, a reference.
        host_bytes: of the moments in the memory of the host, of one device's shards.
    """

    time: str
    parameters: int
    active_parameters: int
    trained_parameters: int
    sparse_layers: list[int]
    mesh: dict[str, int]
    device_kind: str
    execution: dict[str, Any]
    weight_bytes: int
    moment_bytes: int
    gradient_bytes: int
    text_tokens: int
    tokens_per_step: int
    flops_per_token: float
    peak_flops: float | None
    versions: dict[str, str]
    objective: str = "language modelling"
    loss_term: str = "cross_entropy"
    shown: list[str] = field(default_factory=list)
    captions: dict[str, str] = field(default_factory=dict)
    other_bytes: dict[str, int] = field(default_factory=dict)
    host_bytes: int = 0

    @property
    def parameters_in_words(self) -> str:
        """Parameters, active parameters and, where not all are trained, trained parameters, in words."""
        trained = "" if self.trained_parameters == self.parameters else f", {self.trained_parameters:,} trained"
        return f"{self.parameters:,}, {self.active_parameters:,} active per token{trained}"

    @property
    def memory(self) -> dict[str, int]:
        """The bytes of one device by what they are for, without activations."""
        own = {"weights": self.weight_bytes, "moments": self.moment_bytes, "gradients": self.gradient_bytes}
        return {**own, **self.other_bytes}

    @property
    def devices(self) -> int:
        """The number of devices of the mesh."""
        return math.prod(self.mesh.values())


def start_of(
    config: TrainConfig,
    program: Program,
    mesh: Mesh,
    state: TrainState,
    fixed: Params,
    text_tokens: int,
    other_bytes: dict[str, int],
) -> Start:
    """The start of a run whose state is on its devices."""
    model, description = program.model, program.objective.description
    device_kind = jax.devices()[0].device_kind
    trained_bytes = bytes_per_device(state.params)
    execution, on_host = model.execution_in_use, group_of("moments", state.optimizer).host_bytes
    average = {} if state.ema is None else {"averaged weights": bytes_per_device(state.ema)}
    parameters, active = model.config.num_parameters(), model.config.num_active_parameters()
    if not isinstance(model, qmj.CausalLM):  # another head than the config counts
        whole = sum(program.parameter_sizes.values())
        parameters, active = whole, active - parameters + whole
    return Start(
        time=time.strftime("%Y-%m-%d %H:%M:%S"),
        parameters=parameters,
        active_parameters=active,
        trained_parameters=_count_trained(program),
        sparse_layers=[number for number, kind in enumerate(model.config.layers) if kind.mlp == "sparse"],
        mesh={axis: int(size) for axis, size in mesh.shape.items()},
        device_kind="simulated" if config.mesh.simulated else device_kind,
        execution={**dataclasses.asdict(execution), "sharding": format_sharding(execution.rules)},
        weight_bytes=trained_bytes + bytes_per_device(fixed),
        moment_bytes=bytes_per_device(state.optimizer) - on_host,
        gradient_bytes=trained_bytes,  # shapes, dtypes and shardings are those of the trained parameters
        text_tokens=text_tokens,
        tokens_per_step=config.data.batch_size * description.sequences * config.data.seq_len,
        flops_per_token=training_flops_per_token(model.config, config.data.seq_len, program.trained_share),
        peak_flops=peak_flops(device_kind),
        versions={
            "qwen_moe_jax": qmj.__version__,
            **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
            "python": platform.python_version(),
        },
        objective=description.name,
        loss_term=description.loss,
        shown=[*description.shown],
        captions=dict(description.captions),
        other_bytes={**average, **other_bytes},
        host_bytes=on_host,
    )


def introduction(start: Start, epochs: float) -> str:
    """The start in three lines, for the terminal; `epochs` are those of all steps."""
    mesh = format_mesh(start.mesh)
    bytes_needed, split = sum(start.memory.values()), start.memory
    weights = f"; weights {low_bit}" if (low_bit := start.execution.get("weights")) else ""
    on_host = f"; in the host's memory: moments {format_bytes(start.host_bytes)}" if start.host_bytes else ""
    objective = "" if start.objective == "language modelling" else f"{start.objective}; "
    return (
        f"{objective}parameters: {start.parameters_in_words}; "
        f"{start.devices} {start.device_kind} device(s): {mesh}; dispatch {start.execution['dispatch']}{weights}\n"
        f"{format_bytes(bytes_needed)} per device without activations: "
        f"{', '.join(f'{name} {format_bytes(size)}' for name, size in split.items())}{on_host}\n"
        f"{start.text_tokens / 1e6:.2f}M tokens of text, {epochs:.1f} epochs of steps of {start.tokens_per_step} tokens"
    )


def _count_trained(program: Program) -> int:
    """The trained parameters, counted as by `ModelConfig.num_parameters`: without balancing biases and padding."""
    trained, sizes = program.state.params, program.parameter_sizes
    by_rule = jax.tree.leaves(moves_by_itself(trained))
    return sum(sizes[path] for path, moved in zip(paths(trained), by_rule, strict=True) if not moved)


def bytes_per_device(arrays: Any) -> int:
    """The bytes that one device holds of a tree of sharded arrays."""
    return sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize for array in jax.tree.leaves(arrays)
    )
