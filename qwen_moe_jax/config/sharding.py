"""Where weights lie at rest."""

import dataclasses
from typing import Literal, get_args

from qwen_moe_jax.config.checks import require

MeshAxis = Literal["data", "fsdp", "expert", "tensor"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Where weights lie at rest: for each logical axis of a weight the mesh axes that cut it, outermost first.

    A layer uses heads, widths and vocabulary cut over `tensor`, routed experts over `expert` (that is no choice: tokens
    travel to them), and everything else whole. What a rule cuts beyond that saves memory and is gathered for the layer,
    forward and again backward; what it does not cut lies on several devices.

    Attributes:
        vocab: rows of the token table and of the head; "tensor" first.
        heads: rows of q, k and v, columns of o; "tensor" first.
        ffn: the width of MLPs and of experts; "tensor" first.
        embed: the hidden axis of all weights but the routed experts'.
        expert_embed: the hidden axis of the routed experts' weights.
    """

    vocab: tuple[MeshAxis, ...] = ("tensor",)
    heads: tuple[MeshAxis, ...] = ("tensor",)
    ffn: tuple[MeshAxis, ...] = ("tensor",)
    embed: tuple[MeshAxis, ...] = ("fsdp", "expert")
    expert_embed: tuple[MeshAxis, ...] = ("fsdp",)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            found = getattr(self, field.name)
            known = isinstance(found, list | tuple) and all(axis in get_args(MeshAxis) for axis in found)
            expected = "mesh axes, some of " + ", ".join(get_args(MeshAxis)) + ", each once"
            require(known and len(set(found)) == len(found), f"sharding rule {field.name}", found, expected)
            object.__setattr__(self, field.name, tuple(found))
        for name in ("vocab", "heads", "ffn"):
            found = getattr(self, name)
            require(found[:1] == ("tensor",), f"sharding rule {name}", found, '"tensor" first: a layer uses it cut so')


#: By what is gathered for a layer. The default keeps no weight twice but over `data`; "fsdp" and "expert" gather dense
#: weights over one axis, and keep copies along the other; "expert+tensor" gathers nothing, as suits inference.
SHARDING_RULES: dict[str, ShardingRules] = {
    "expert+fsdp": ShardingRules(),
    "fsdp": ShardingRules(embed=("fsdp",)),
    "expert": ShardingRules(embed=("expert",), expert_embed=()),
    "expert+tensor": ShardingRules(embed=(), expert_embed=()),
}

#: The rules that commands which run a model forward start with: decoding would gather the same weights for every token.
INFERENCE_SHARDING = "expert+tensor"
