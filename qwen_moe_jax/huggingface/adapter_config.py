"""adapter_config.json of PEFT ↔ ranks and scalings of low-rank adapters.

What PEFT would apply differently is refused by field: the lists here name the fields and values that are known to be
plain LoRA, and everything else has to be neutral (null, false, empty). Checked against PEFT 0.21.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.fields import Fields, read_json, shown

CONFIG = "adapter_config.json"

#: Fields that are acted on.
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
#: Fields with no effect on a saved adapter's output: what is adapted, and where, is in the names of its tensors.
_WITHOUT_EFFECT = {
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "lora_dropout",
    "runtime_config",
    "megatron_core",
    "qalora_group_size",  # of use_qalora
    "ensure_weight_tying",  # of modules_to_save and embeddings, which have tensors of their own
    "eva_config",  # of init_lora_weights="eva"
}
#: `init_lora_weights` that draw A and B and leave the base as it is.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal")

_MERGE = "merge it there (merge_and_unload, save_pretrained) and give the merged checkpoint"
#: What to do about a field, where merging in PEFT is not the whole answer.
_WAYS_OUT = {
    "alora_invocation_tokens": "It acts only on the tokens from its invocation sequence on, which no merged or "
    "unmerged weights can express: train it as plain LoRA.",
    "bias": f"The trained biases are no part of low-rank adapters: {_MERGE}.",
    "modules_to_save": f"Whole modules were trained along with the adapters: {_MERGE}.",
    "trainable_token_indices": f"Rows of the embedding were trained along with the adapters: {_MERGE}.",
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Ranks and scalings of an adapter folder.

    Attributes:
        where: the file, for messages.
        r, lora_alpha, use_rslora: of matrices that no pattern names.
        rank_pattern, alpha_pattern: overrides by regular expression, which matches the end of a module's path.
        target_parameters: ends of the paths of parameters that are adapted as such, not as modules.
    """

    where: str
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_parameters: tuple[str, ...] = ()

    def rank(self, module: str) -> int:
        """Rank of a module's adapter, by its path as "model.layers.0.self_attn.q_proj"."""
        return _matched(self.rank_pattern, self._key(module), self.r)

    def scaling(self, module: str) -> float:
        """Factor of the product B A of a module's adapter."""
        alpha, r = _matched(self.alpha_pattern, self._key(module), self.lora_alpha), self.rank(module)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def _key(self, module: str) -> str:
        """What patterns are matched with: for a router that is adapted as a parameter, that parameter's path."""
        weight = f"{module}.weight"
        return weight if any(f".{weight}".endswith(f".{target}") for target in self.target_parameters) else module


def _matched(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches a path, as PEFT's `get_pattern_key`."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_adapter_config(path: Path) -> AdapterConfig:
    """Reads an adapter_config.json.

    Raises:
        ConfigError: the file is missing; a field asks for more than low-rank adapters, and the message names it.
    """
    peft = read_json(path)
    where, fields = str(path), Fields(peft, str(path))
    if peft.get("peft_type") != "LORA":
        raise ConfigError(f"{where}: peft_type={shown(peft.get('peft_type'))} is not supported: expected 'LORA'.")
    for name, value in peft.items():
        if name not in _READ | _WITHOUT_EFFECT and not _is_neutral(name, value, peft):
            raise _refused(where, name, value, "it to be absent, null, false or empty")
    _check_init(where, peft.get("init_lora_weights"))
    if peft.get("bias") not in (None, "none"):
        raise _refused(where, "bias", peft["bias"], "'none'")
    # PEFT's own defaults, for configs that leave a field out.
    r, alpha = fields.integer("r", 8), fields.number("lora_alpha", 8.0)
    if r < 1:
        raise fields.error("r", "a positive integer")
    ranks, alphas = dict(fields.mapping("rank_pattern")), dict(fields.mapping("alpha_pattern"))
    for name, patterns, kinds in (("rank_pattern", ranks, int), ("alpha_pattern", alphas, int | float)):
        for pattern, value in patterns.items():
            if not _is_pattern(pattern) or isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
                raise fields.error(name, "regular expressions with a positive number each")
    use_rslora = not fields.is_null("use_rslora") and fields.boolean("use_rslora", False)
    parameters = peft.get("target_parameters") or ()
    if not isinstance(parameters, list | tuple) or not all(isinstance(name, str) for name in parameters):
        raise fields.error("target_parameters", "a list of names")
    return AdapterConfig(where, r, alpha, use_rslora, ranks, alphas, tuple(parameters))


def _is_neutral(name: str, value: Any, peft: Mapping[str, Any]) -> bool:
    # PEFT writes the defaults of loftq_config also for other kinds of init_lora_weights.
    return not value or (name == "loftq_config" and peft.get("init_lora_weights") != "loftq")


def _check_init(where: str, init: Any) -> None:
    if init is None or isinstance(init, bool) or init in _PLAIN_INITS:
        return
    known = "pissa", "olora", "corda", "loftq", "lora_ga"
    if not isinstance(init, str) or not init.startswith(known):
        expected = "true, false, 'gaussian', 'eva' or 'orthogonal'"
        raise ConfigError(f"{where}: init_lora_weights={shown(init)} is not supported: expected {expected}.")
    way_out = (
        f"Quantisation of the base belongs to it: {_MERGE}."
        if init == "loftq"
        else "Save it with PEFT as plain LoRA (save_pretrained with path_initial_model_for_weight_conversion=FOLDER of "
        f"the initial adapter), or {_MERGE}."
    )
    raise ConfigError(
        f"{where}: init_lora_weights={shown(init)} is not supported: it was trained on base weights that this "
        f"initialisation changed, so that A and B alone are not the adapter. {way_out}"
    )


def _refused(where: str, name: str, value: Any, expected: str) -> ConfigError:
    way_out = _WAYS_OUT.get(name, f"PEFT may apply it: {_MERGE}; or, if it has no effect, remove the field.")
    return ConfigError(f"{where}: {name}={shown(value)} is not supported: expected {expected}. {way_out}")


def _is_pattern(text: Any) -> bool:
    try:
        re.compile(text)
    except (re.error, TypeError):
        return False
    return True
