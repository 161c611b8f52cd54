"""Suggestions for misspelt names, as error messages give them. Imports neither JAX nor numpy."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

#: Arguments of transformers, and what does the same here.
HUB_ARGUMENTS = {
    "torch_dtype": "dtype",
    "device_map": "mesh",
    "attn_implementation": "execution=ExecutionConfig(attention=…)",
    "quantization_config": "weights='int8' or 'int4'; quantised checkpoints are read as they are",
    "load_in_8bit": "weights='int8'",
    "load_in_4bit": "weights='int4'",
    "low_cpu_mem_usage": "nothing: weights are always read in blocks",
    "trust_remote_code": "nothing: no code of a checkpoint is run",
    "config": "ModelConfig.from_pretrained and CausalLM(config, rngs=…) for fresh weights",
    "input_ids": "tokens, the first argument",
    "attention_mask": "segment_ids (an attention mask of ones and zeros is one)",
    "position_ids": "positions",
    "past_key_values": "cache",
    "use_cache": "cache",
    "labels": "targets of the method token_losses(tokens, targets), where targets[:, t] follows tokens[:, t]",
    "output_attentions": "nothing: attention weights are never materialised",
    "return_dict": "nothing: the result is always a dataclass",
}


#: Methods and attributes of models in transformers and PyTorch, and what does the same here.
HUB_METHODS = {
    "generate": "qwen_moe_jax.generate(model, prompts, …)",
    "save_pretrained": "qwen_moe_jax.save_pretrained(model, folder)",
    "push_to_hub": "qwen_moe_jax.push_to_hub(model, 'owner/model')",
    "load_adapter": "qwen_moe_jax.load_adapter(model, folder)",
    "parameters": "nnx.state(model, nnx.Param)",
    "state_dict": "nnx.state(model)",
    "num_parameters": "model.config.num_parameters()",
    "gradient_checkpointing_enable": "execution=ExecutionConfig(remat='full')",
    "to": "from_pretrained(…, mesh=…, dtype=…)",
    "cuda": "from_pretrained(…, mesh=…)",
    "cpu": "from_pretrained(…, mesh=…)",
    "half": "from_pretrained(…, dtype='float16')",
    "bfloat16": "from_pretrained(…, dtype='bfloat16')",
    "float": "from_pretrained(…, dtype='float32')",
    "device": "model.mesh",
    "dtype": "model.execution.dtype",
}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question to insert before the list of known names; empty where none of them is similar.

        raise ConfigError(f"run.stepz: unknown key; {did_you_mean('stepz', known)}known: {', '.join(known)}.")
        # run.stepz: unknown key; did you mean 'steps'? known: steps, seed.

    Args:
        word: what was found.
        known: what would have been accepted.

    Returns:
        "did you mean 'steps'? ", with the space at its end, or "".
    """
    near = similar(word, known, count=1)
    return f"did you mean {near[0]!r}? " if near else ""


def similar(word: str, known: Iterable[str], *, count: int = 3, cutoff: float = 0.6) -> list[str]:
    """The known names that are spelt most like a word, the most similar first.

    Args:
        word: what was found.
        known: what would have been accepted.
        count: how many names at most.
        cutoff: the least similarity, 0 to 1, as `difflib.get_close_matches` measures it.
    """
    return difflib.get_close_matches(word, list(known), n=count, cutoff=cutoff)


def missing_attribute(kind: str, name: str) -> AttributeError:
    """The error for an attribute that a model does not have, with what does the same here.

    Args:
        kind: name of the model's class.
        name: of the attribute.
    """
    ours = f": here that is {HUB_METHODS[name]}" if name in HUB_METHODS else ""
    return AttributeError(f"{kind!r} object has no attribute {name!r}{ours}")


def refuse_hub_arguments(function: str, given: Mapping[str, Any], known: Iterable[str] = ()) -> None:
    """Refuses keyword arguments that a function does not take, with the name that does the same here.

    Args:
        function: its name, for the message.
        given: the keyword arguments that it has no parameter for.
        known: names of its parameters, for suggestions.

    Raises:
        TypeError: any were given.
    """
    for name in given:
        ours = f"here that is {HUB_ARGUMENTS[name]}" if name in HUB_ARGUMENTS else did_you_mean(name, known).strip()
        raise TypeError(f"{function}() has no argument {name!r}" + (f": {ours}" if ours else ""))
