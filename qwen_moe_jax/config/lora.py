"""Low-rank adapters: which matrices have one, and how it is scaled."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.config.checks import Checks, strings


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters added to matrices that are not trained: `W x + scaling · B A x` (LoRA, arXiv 2106.09685).

    The fields are PEFT's, except that more is accepted in `target_modules`.

    Attributes:
        r: rank: rows of A [r, in] and columns of B [out, r].
        lora_alpha: the adapters' weight, `scaling = lora_alpha / r`.
        target_modules: matrices that have an adapter: q_proj wherever there is one, experts all of the routed experts,
            shared_expert.down_proj that one; all-linear all but routers, gates and the head.
        use_rslora: `scaling = lora_alpha / sqrt(r)`, with which higher ranks learn as fast (rsLoRA, arXiv 2312.03732).
        rank_pattern: other values of r by regular expression, as (pattern, value) pairs or a mapping. A pattern matches
            the end of a matrix's path in its layer, self_attn.q_proj; the first one wins.
        alpha_pattern: other values of lora_alpha, as rank_pattern.

    Raises:
        ConfigError: a value outside its range.
    """

    r: int = 16
    lora_alpha: float = 32.0
    target_modules: tuple[str, ...] = ("all-linear",)
    use_rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, name)
            pairs = tuple(patterns.items() if isinstance(patterns, Mapping) else map(tuple, patterns))
            object.__setattr__(self, name, pairs)
        object.__setattr__(self, "target_modules", strings("target_modules", self.target_modules))
        with Checks(self) as check:
            check(0 < self.r < 2**31, "r", "a positive integer below 2**31 (without adapters, no LoraConfig)")
            check(0 < self.lora_alpha < math.inf, "lora_alpha", "a positive number")
            check(len(self.target_modules) > 0, "target_modules", "at least one name")
            for name in ("rank_pattern", "alpha_pattern"):
                positive = all(isinstance(key, str) and 0 < value < 2**31 for key, value in getattr(self, name))
                check(positive, name, "pairs of a regular expression and a positive number")

    def of_matrix(self, path: str) -> "LoraConfig":
        """The config of one matrix, by its path in its layer: with the r and lora_alpha that the patterns give it."""
        found: dict[str, Any] = {}
        for field, patterns in (("r", self.rank_pattern), ("lora_alpha", self.alpha_pattern)):
            values = (value for key, value in patterns if re.match(rf"(.*\.)?({key})$", path))
            found[field] = next(values, getattr(self, field))
        return dataclasses.replace(self, **found, rank_pattern=(), alpha_pattern=())

    @property
    def scaling(self) -> float:
        """The factor of the product of the two matrices."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
