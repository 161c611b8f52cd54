"""Sharding rules: the mesh axes that the weights are stored sharded over."""

import dataclasses
from typing import Literal, get_args

from qwen_moe_jax.config.checks import Checks

MeshAxis = Literal["data", "fsdp", "expert", "context", "tensor"]
#: The axes of a mesh, in this order.
MESH_AXES: tuple[str, ...] = get_args(MeshAxis)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """For each logical axis of the weights, the mesh axes that it is sharded over when stored, outermost first.

    During a layer, heads, feed-forward widths and the vocabulary are sharded over `tensor`, routed experts over
    `expert` (which is no choice: tokens are sent to them), and nothing else is sharded. What a rule shards beyond that
    saves memory and is gathered for the layer, in the forward pass and again in the backward pass; what it does not
    shard is replicated.

    Attributes:
        vocab: rows of the token embedding and of the head; "tensor" first. Padded with zeros where it does not divide.
        heads: rows of q, k and v, columns of o; "tensor" first.
        ffn: the width of MLPs and of experts; "tensor" first.
        embed: the hidden axis of all weights but the routed experts'.
        expert_embed: the hidden axis of the routed experts' weights.

    Raises:
        ConfigError: unknown mesh axes, one named twice, or "tensor" not first where it has to be.
    """

    vocab: tuple[MeshAxis, ...] = ("tensor",)
    heads: tuple[MeshAxis, ...] = ("tensor",)
    ffn: tuple[MeshAxis, ...] = ("tensor",)
    embed: tuple[MeshAxis, ...] = ("fsdp", "expert")
    expert_embed: tuple[MeshAxis, ...] = ("fsdp",)

    def __post_init__(self) -> None:
        with Checks(self) as check:
            for field in dataclasses.fields(self):
                found = getattr(self, field.name)
                known = isinstance(found, list | tuple) and all(axis in MESH_AXES for axis in found)
                expected = "mesh axes, some of " + ", ".join(MESH_AXES) + ", each once"
                if check(known and len(set(found)) == len(found), field.name, expected):
                    object.__setattr__(self, field.name, tuple(found))
            for name in ("vocab", "heads", "ffn"):
                first = tuple(getattr(self, name) or ())[:1]
                check(first == ("tensor",), name, '"tensor" first: a layer computes with it sharded so')


#: By what is gathered for a layer. "expert+fsdp", the default, stores no weight twice except over `data`; "fsdp" and
#: "expert" shard dense weights over one axis and replicate them over the other; "expert+tensor" gathers nothing, as
#: suits inference. "expert+fsdp+context" shards weights over `context` besides, whose devices otherwise all have them.
SHARDING_RULES: dict[str, ShardingRules] = {
    "expert+fsdp": ShardingRules(),
    "fsdp": ShardingRules(embed=("fsdp",)),
    "expert": ShardingRules(embed=("expert",), expert_embed=()),
    "expert+tensor": ShardingRules(embed=(), expert_embed=()),
    "expert+fsdp+context": ShardingRules(embed=("fsdp", "expert", "context"), expert_embed=("fsdp", "context")),
}

#: The rules that commands which run a model forward start with: decoding would gather the same weights for every token.
INFERENCE_SHARDING = "expert+tensor"
