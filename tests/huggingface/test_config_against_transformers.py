"""config.json as transformers itself writes and reads it."""

import inspect
import json

import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.config import read_config
from qwen_moe_jax.huggingface.export_config import config_to_hub
from tests.cases import CASES, HYBRID_CASES
from tests.huggingface.test_config import meaning
from tests.referee import transformers

EVERY = CASES | HYBRID_CASES
# What a config carries about the library and the file rather than about the model.
ASIDE = {"transformers_version", "architectures", "_name_or_path"}


def as_transformers_reads(hub: dict, folder) -> dict:
    """The fields that transformers knows, in one spelling each: it keeps the aliases and unknown keys of a file too."""
    (folder / "config.json").write_text(json.dumps(hub))
    config = transformers.AutoConfig.from_pretrained(folder).get_text_config()
    known = type(config)().to_dict().keys() | {"head_dim"}
    fields = {key: value for key, value in config.to_dict().items() if key in known - ASIDE}
    fields["rope_parameters"].pop("type", None)
    if fields.get("head_dim") is None:
        fields["head_dim"] = config.hidden_size // config.num_attention_heads
    return fields


@pytest.mark.parametrize("name", EVERY)
def test_old_keys_mean_what_transformers_writes_for_them_in_new_keys(references, name):
    reference = references[name]
    assert meaning(qmj.ModelConfig.from_pretrained(reference.folder)) == meaning(
        qmj.ModelConfig.from_pretrained(reference.case.config)
    )


@pytest.mark.parametrize("name", EVERY)
def test_parameters_are_counted_as_transformers_has_them(references, name):
    reference = references[name]
    config = qmj.ModelConfig.from_pretrained(reference.folder)
    assert config.num_parameters() == sum(parameter.numel() for parameter in reference.model.parameters())


@pytest.mark.parametrize("name", EVERY)
def test_transformers_reads_the_written_config_as_the_original(name, tmp_path):
    case = EVERY[name]
    original = as_transformers_reads(case.config, tmp_path)
    written = as_transformers_reads(config_to_hub(qmj.ModelConfig.from_pretrained(case.config)), tmp_path)
    assert written == original


def test_no_published_field_of_a_language_model_is_refused_as_a_misspelt_one():
    classes = list(transformers.MODEL_FOR_CAUSAL_LM_MAPPING)
    names = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    assert len(names) > 500
    mapping = CASES["qwen3_moe-plain"].config
    refused = set()
    for name in names - mapping.keys():
        try:
            read_config({**mapping, name: "of another family"})
        except qmj.ConfigError as error:
            if "no field of model_type" in str(error):
                refused.add(name)
    assert refused <= {"num_experts_per_token"}  # here that is num_experts_per_tok
