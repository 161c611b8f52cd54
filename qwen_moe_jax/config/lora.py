"""Low-rank adapters: which matrices have one, and how it is scaled."""

import dataclasses
import math

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

    Raises:
        ConfigError: a value outside its range.
    """

    r: int = 16
    lora_alpha: float = 32.0
    target_modules: tuple[str, ...] = ("all-linear",)
    use_rslora: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", strings("target_modules", self.target_modules))
        with Checks(self) as check:
            check(0 < self.r < 2**31, "r", "a positive integer below 2**31 (without adapters, no LoraConfig)")
            check(0 < self.lora_alpha < math.inf, "lora_alpha", "a positive number")
            check(len(self.target_modules) > 0, "target_modules", "at least one name")

    @property
    def scaling(self) -> float:
        """The factor of the product of the two matrices."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
