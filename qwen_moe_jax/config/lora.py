"""Which matrices of a model have low-rank adapters beside them."""

import dataclasses
import math

from qwen_moe_jax.config.checks import require, require_size, strings


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters beside matrices that stay as they are: `W x + scaling · B A x` (LoRA, arXiv 2106.09685).

    The fields are PEFT's, but for its `target_modules` being read more widely.

    Attributes:
        r: rank: rows of A [r, in] and columns of B [out, r].
        lora_alpha: the adapters' weight, `scaling = lora_alpha / r`.
        target_modules: which matrices have one: "q_proj" wherever there is one, "experts" all of the routed experts,
            "shared_expert.down_proj" that one; "all-linear" all but routers, gates and the head.
        use_rslora: `scaling = lora_alpha / sqrt(r)`, with which higher ranks learn as fast (rsLoRA, arXiv 2312.03732).
    """

    r: int = 16
    lora_alpha: float = 32.0
    target_modules: tuple[str, ...] = ("all-linear",)
    use_rslora: bool = False

    def __post_init__(self) -> None:
        require_size("LoRA rank r", self.r)
        require(0 < self.lora_alpha < math.inf, "lora_alpha", self.lora_alpha, "a positive number")
        object.__setattr__(self, "target_modules", strings("target_modules", self.target_modules))
        require(len(self.target_modules) > 0, "target_modules", self.target_modules, "at least one name")

    @property
    def scaling(self) -> float:
        """What the product of the two matrices is multiplied with."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
