"""A sparse block on its own: built small, run under any execution on any mesh, returning plain NumPy."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import AttentionConfig, ExecutionConfig, LayerKind, ModelConfig, MoEConfig
from qwen_moe_jax.config.resolve import resolve
from qwen_moe_jax.moe.block import SparseMoeBlock
from qwen_moe_jax.moe.stats import RouterStats, RouterTrace
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.sharding.explicit import with_explicit_axes
from qwen_moe_jax.sharding.rules import BATCH


def block_config(**moe) -> ModelConfig:
    """A config whose sparse block has 8 experts, 2 a token, unless told otherwise."""
    known = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=12, norm_topk_prob=True)
    return ModelConfig(
        model_type="qwen3_moe",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        layers=(LayerKind(mlp="sparse"),),
        attention=AttentionConfig(num_attention_heads=2, num_key_value_heads=2, head_dim=8),
        moe=MoEConfig(**(known | moe)),
        initializer_range=0.3,  # large, so that routing is decided and experts differ
    )


@functools.cache
def build_block(config: ModelConfig, mesh, router: float | None = None) -> SparseMoeBlock:
    """The same block every time; `router` fills the router's weight with one value instead of a random draw."""
    make = ParameterFactory(
        mesh=mesh, dtype="float32", initializer_range=config.initializer_range, rngs=nnx.Rngs(0), stack=None
    )
    block = SparseMoeBlock(config.hidden_size, config.moe, make=make)
    if router is not None:
        block.gate.weight.set_value(jax.numpy.full_like(block.gate.weight.get_value(), router))
    return block


@dataclasses.dataclass(frozen=True)
class BlockResult:
    """What a block returned, and the gradients of sum(result * seed) with respect to weights and input."""

    mixed_BTD: np.ndarray
    stats: RouterStats
    trace: RouterTrace
    weight_gradients: list[np.ndarray]
    input_gradient: np.ndarray

    @property
    def tokens_per_expert(self) -> np.ndarray:
        return self.stats.tokens_per_expert

    @property
    def dropped_per_expert(self) -> np.ndarray:
        return self.stats.dropped_per_expert


def forward(block, mesh, hidden_BTD, token_mask_BT, execution: ExecutionConfig):
    """The jitted forward pass (block, hidden, real) → (mixed, stats, trace), to be called or compiled."""

    chosen = resolve(execution, block.moe, expert_shards=mesh.shape["expert"], platform="cpu", training=True)

    def run(block, hidden_BTD, token_mask_BT):
        return block(hidden_BTD, token_mask_BT, chosen)

    specs = [P(BATCH, None, None), P(BATCH, None)]
    return with_explicit_axes(run, mesh, specs)(block, hidden_BTD, token_mask_BT)


@functools.cache
def _forward_and_gradients(mesh, execution: ExecutionConfig):
    """Compiled once for each shape, whatever the values."""

    def objective(block, hidden_BTD, token_mask_BT, seed_BTD):
        mixed_BTD, stats, trace = forward(block, mesh, hidden_BTD, token_mask_BT, execution)
        return (mixed_BTD * seed_BTD * token_mask_BT[..., None]).sum(), (mixed_BTD, stats, trace)

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))


@functools.cache
def _forward(mesh, execution: ExecutionConfig):
    return jax.jit(lambda block, hidden_BTD, token_mask_BT: forward(block, mesh, hidden_BTD, token_mask_BT, execution))


def run_block(config, mesh, hidden_BTD, token_mask_BT, execution, seed_BTD=None, router=None) -> BlockResult:
    """Runs a block, and its gradients."""
    seed_BTD = np.ones_like(hidden_BTD) if seed_BTD is None else seed_BTD
    both = _forward_and_gradients(mesh, execution)
    block = build_block(config, mesh, router)
    (_, (mixed_BTD, stats, trace)), (of_block, of_input) = both(block, hidden_BTD, token_mask_BT, seed_BTD)
    return BlockResult(
        mixed_BTD=np.asarray(mixed_BTD),
        stats=jax.device_get(stats),
        trace=jax.device_get(trace),
        weight_gradients=[np.asarray(leaf) for leaf in jax.tree.leaves(of_block)],
        input_gradient=np.asarray(of_input),
    )


def run_forward(config, mesh, hidden_BTD, token_mask_BT, execution) -> tuple[np.ndarray, RouterStats, RouterTrace]:
    """The same without gradients, which compiles in a third of the time."""
    return jax.device_get(_forward(mesh, execution)(build_block(config, mesh), hidden_BTD, token_mask_BT))


def relative(found, wanted) -> float:
    """Relative L2 distance."""
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30))
