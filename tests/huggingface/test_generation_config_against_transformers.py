"""generation_config.json as transformers itself reads it, and what it takes for granted."""

import dataclasses
import json

import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.generation_config import generation_config_from_hub
from tests.huggingface.test_generation_config import FIELDS, written
from tests.referee import transformers


def as_transformers_reads(hub: dict, folder) -> transformers.GenerationConfig:
    (folder / "generation_config.json").write_text(json.dumps(hub))
    return transformers.GenerationConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", [*FIELDS, "all"])
def test_transformers_reads_the_written_file_as_the_original(name, tmp_path):
    hub = {"bos_token_id": 1, "pad_token_id": 0} | (FIELDS if name == "all" else {name: FIELDS[name]})
    original = as_transformers_reads(hub, tmp_path)
    again = as_transformers_reads(written(generation_config_from_hub(hub)), tmp_path)
    # Its own defaults where the file says nothing: neither side may have invented any.
    assert again.to_dict() == original.to_dict()


def test_transformers_reads_what_was_set_here(tmp_path):
    ours = qmj.GenerationConfig(
        do_sample=True, top_p=0.5, logit_bias={3: 1.5}, bad_words_ids=[[4, 5]], eos_token_id=[7]
    )
    theirs = as_transformers_reads(written(ours), tmp_path)
    assert (theirs.do_sample, theirs.top_p, theirs.eos_token_id) == (True, 0.5, 7)
    assert (theirs.sequence_bias, theirs.bad_words_ids) == ([[[3], 1.5]], [[4, 5]])
    theirs.validate(strict=True)


def test_defaults_are_those_transformers_generates_with():
    theirs = transformers.GenerationConfig()
    theirs.update(**theirs._get_default_generation_params(), defaults_only=True)
    compared = set()
    for field in dataclasses.fields(qmj.GenerationConfig):
        default = getattr(theirs, field.name, None)
        # Where nothing limits a text, transformers stops at 20 tokens; here the model's positions do.
        if default is not None and field.name != "max_length":
            assert getattr(qmj.GenerationConfig(), field.name) == default, field.name
            compared.add(field.name)
    sampling = {"do_sample", "temperature", "top_k", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
    assert compared == sampling | {"repetition_penalty", "no_repeat_ngram_size", "min_length"}
