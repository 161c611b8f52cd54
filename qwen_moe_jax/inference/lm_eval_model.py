"""The lm-eval model `qwen_moe_jax`. Importing this module registers it; it needs the extra `eval`.

    import lm_eval
    from qwen_moe_jax.inference.lm_eval_model import NAME

    lm_eval.simple_evaluate(model=NAME, model_args={"folder": folder, "expert": 8}, tasks=["arc_easy"])

On the command line: `qwen-moe-jax eval FOLDER --tasks arc_easy`.
"""

import inspect
from collections.abc import Mapping
from typing import Any, Self

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.harness import Harness

NAME = "qwen_moe_jax"


@register_model(NAME)
class LMEvalModel(Harness, LM):
    """`Harness` as an `LM`: from a model in memory by its constructor, from a folder by lm-eval's `model_args`."""

    def __init__(self, *args: Any, **kwargs: Any):
        LM.__init__(self)
        Harness.__init__(self, *args, **kwargs)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> Self:
        """The arguments of `Harness.from_folder`. lm-eval's batch size and device are not used: batches are as large as
        memory allows, and devices are what the mesh says.

        Raises:
            RequestError: an argument that is none of those.
            ConfigError, CheckpointError, ShardingError: as `Harness.from_folder`.
        """
        known = list(inspect.signature(cls.from_folder).parameters)
        unknown = [name for name in arg_dict if name not in known]
        if unknown or "folder" not in arg_dict:
            raise RequestError(
                f"model_args has {list(arg_dict)}, expected folder, and of the others some of {known[1:]}."
            )
        return cls.from_folder(**arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> Self:
        """The same from `folder=…,expert=8`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)
