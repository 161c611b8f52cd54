"""`quantization_config` of a config.json → the reader of its method; every other method is refused by its name."""

from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.fields import shown
from qwen_moe_jax.huggingface.quantised import awq, bitsandbytes, compressed_tensors, fp4, fp8, gptq
from qwen_moe_jax.huggingface.quantised.modules import Opener

_METHODS = {
    "fp8": fp8.blocks_opener,
    "fbgemm_fp8": lambda config, where: fp8.simple_opener("fbgemm_fp8"),
    "gptq": gptq.opener,
    "awq": awq.opener,
    "compressed-tensors": compressed_tensors.opener,
    "bitsandbytes": bitsandbytes.opener,
    "mxfp4": fp4.mxfp4_opener,
    "modelopt": fp4.modelopt_opener,
}


def opener_of(hub: Mapping[str, Any], where: str) -> Opener | None:
    """What dequantises the tensors of a folder; None for weights that are not quantised.

    Args:
        hub: content of config.json.
        where: names it in messages.

    Raises:
        ConfigError: a method, or a variant of one, that is not supported.
    """
    found = hub.get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method", _implied(found)) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not isinstance(method, str) or method not in _METHODS:
        raise ConfigError(
            f"{where}: quantization_config (quant_method={shown(method)}) is not supported: expected unquantised "
            f"weights, or one of {', '.join(_METHODS)}. Take the unquantised checkpoint of the same model, or its -FP8 "
            "one."
        )
    return _METHODS[method](found, where)


def _implied(config: Mapping[str, Any]) -> str:
    """The method of configs from before the field: bitsandbytes' alone."""
    return "bitsandbytes" if config.get("load_in_4bit") or config.get("load_in_8bit") else "unknown"
