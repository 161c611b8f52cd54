"""generation_config.json → GenerationConfig → generation_config.json, and what is refused."""

import dataclasses
import json
import math

import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.generation_config import (
    generation_config_from_hub,
    generation_config_to_hub,
    read_generation_config,
)
from tests.cases import CASES

MODEL = qmj.ModelConfig.from_pretrained(CASES["qwen3-plain"].config)
FIELDS = {
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": [3, 4],
    "stop_strings": ["\n\n", "END"],
    "max_new_tokens": 128,
    "min_new_tokens": 2,
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.05,
    "presence_penalty": 1.5,
    "frequency_penalty": -0.5,
    "sequence_bias": [[[7], -2.5], [[8, 9], 1.0]],
    "bad_words_ids": [[5], [6, 7]],
    "seed": 11,
    "max_length": 200,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0.002,
    "no_repeat_ngram_size": 3,
    "suppress_tokens": [2],
    "begin_suppress_tokens": [6, 7],
    "forced_bos_token_id": 8,
    "forced_eos_token_id": [3, 4],
    "exponential_decay_length_penalty": [5, 1.1],
    "num_beams": 1,
    "guidance_scale": 1.5,
    "transformers_version": "4.51.0",
}


def written(generation: qmj.GenerationConfig) -> dict:
    """What a reader of the file would see: null fields are not written."""
    hub = json.loads(json.dumps(generation_config_to_hub(generation, MODEL)))
    return {name: value for name, value in hub.items() if value is not None}


def test_every_field_is_read():
    found = generation_config_from_hub(FIELDS)
    assert dataclasses.replace(found, hub_fields=()) == qmj.GenerationConfig(
        eos_token_id=(3, 4),
        stop_strings=("\n\n", "END"),
        max_new_tokens=128,
        min_new_tokens=2,
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.05,
        presence_penalty=1.5,
        frequency_penalty=-0.5,
        logit_bias={7: -2.5, (8, 9): 1.0},
        bad_words_ids=((5,), (6, 7)),
        seed=11,
        max_length=200,
        typical_p=0.9,
        epsilon_cutoff=0.001,
        eta_cutoff=0.002,
        no_repeat_ngram_size=3,
        suppress_tokens=(2,),
        begin_suppress_tokens=(6, 7),
        forced_bos_token_id=8,
        forced_eos_token_id=(3, 4),
        exponential_decay_length_penalty=(5, 1.1),
    )


@pytest.mark.parametrize(
    "hub",
    [
        FIELDS,
        {"eos_token_id": 3, "stop_strings": "END", "temperature": 1, "top_k": 50},
        {"eos_token_id": [3], "stop_strings": ["END"], "do_sample": False, "temperature": 0.0},
    ],
)
def test_a_file_is_written_as_it_came(hub):
    ends = {"bos_token_id": MODEL.bos_token_id, "pad_token_id": MODEL.pad_token_id}
    expected = {name: value for name, value in (ends | hub).items() if value is not None}
    assert written(generation_config_from_hub(hub)) == expected


def test_defaults_are_not_written_where_nothing_was_said():
    assert written(qmj.GenerationConfig()).keys() <= {"bos_token_id", "pad_token_id"}
    assert (
        written(qmj.GenerationConfig(eos_token_id=(5,), top_p=0.5)).items() >= {"eos_token_id": 5, "top_p": 0.5}.items()
    )


def test_null_is_the_default():
    found = generation_config_from_hub(dict.fromkeys(FIELDS))
    assert dataclasses.replace(found, hub_fields=()) == qmj.GenerationConfig()


def test_what_was_changed_is_written_and_read_back():
    changed = dataclasses.replace(
        generation_config_from_hub(FIELDS),
        do_sample=False,
        top_k=50,
        max_new_tokens=None,
        logit_bias=(),
        bad_words_ids=[[9]],
        eos_token_id=[4],
        seed=0,
    )
    hub = written(changed)
    assert "max_new_tokens" not in hub and "sequence_bias" not in hub
    assert hub["no_repeat_ngram_size"] == 3 and hub["guidance_scale"] == 1.5
    again = generation_config_from_hub(hub)
    assert dataclasses.replace(again, hub_fields=()) == dataclasses.replace(changed, hub_fields=())


def test_sequences_are_frozen_whatever_they_were():
    given = qmj.GenerationConfig(
        eos_token_id=3, stop_strings="a", bad_words_ids=[[1, 2]], logit_bias=[([4], 1), ((5, 6), -math.inf)]
    )
    assert given == qmj.GenerationConfig(
        eos_token_id=(3,), stop_strings=("a",), bad_words_ids=((1, 2),), logit_bias={4: 1.0, (5, 6): -math.inf}
    )
    assert hash(given) == hash(dataclasses.replace(given))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token_id", (-1,)),
        ("eos_token_id", 1.5),
        ("eos_token_id", True),
        ("stop_strings", ""),
        ("stop_strings", ("",)),
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", -1),
        ("max_length", 0),
        ("min_length", -1),
        ("no_repeat_ngram_size", -1),
        ("suppress_tokens", (-1,)),
        ("begin_suppress_tokens", 3),
        ("forced_bos_token_id", -1),
        ("forced_eos_token_id", (-1,)),
        ("exponential_decay_length_penalty", (-1, 1.1)),
        ("exponential_decay_length_penalty", (1, 0.0)),
        ("exponential_decay_length_penalty", (1,)),
        ("typical_p", 0.0),
        ("epsilon_cutoff", -0.1),
        ("eta_cutoff", 1.1),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("logit_bias", {3: math.inf}),
        ("bad_words_ids", ((),)),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.5),
        ("top_k", 2.5),
        ("max_new_tokens", True),
        ("do_sample", "no"),
        ("temperature", None),
        ("repetition_penalty", 1e-40),  # 0 in float32, by which logits are divided
        ("bad_words_ids", 5),
        ("logit_bias", {1: "x"}),
        ("logit_bias", [(1, 2, 3)]),
        ("exponential_decay_length_penalty", 5),
    ],
)
def test_refusal_names_field_and_value(field, value):
    with pytest.raises(qmj.ConfigError, match=f"^{field}=.*expected") as failure:
        qmj.GenerationConfig(**{field: value})
    assert repr(value) in str(failure.value)


@pytest.mark.parametrize(("field", "value"), [("logit_bias", {4: 1.0, -3: 1.0}), ("bad_words_ids", ((1, 2), (-3,)))])
def test_refusal_names_the_one_entry_of_many(field, value):
    with pytest.raises(qmj.ConfigError, match=rf"^{field}=\(-3,\).*token ids"):
        qmj.GenerationConfig(**{field: value})


def test_nothing_is_drawn_at_temperature_zero():
    assert qmj.GenerationConfig(temperature=0.0).temperature == 0
    with pytest.raises(qmj.ConfigError, match="temperature=0.0.*do_sample=False"):
        qmj.GenerationConfig(temperature=0.0, do_sample=True)
    with pytest.raises(qmj.ConfigError, match="temperature=1e-40.*at least 1e-30, or do_sample=False"):
        qmj.GenerationConfig(temperature=1e-40, do_sample=True)  # of which no logit would be finite


def test_numbers_of_numpy_are_kept_as_pythons():
    found = qmj.GenerationConfig(seed=np.int64(3), top_k=5.0, temperature=1, do_sample=np.True_)
    assert [type(value) for value in (found.seed, found.top_k, found.temperature, found.do_sample)] == [
        int,
        int,
        float,
        bool,
    ]
    assert found == qmj.GenerationConfig(seed=3, top_k=5, temperature=1.0, do_sample=True)


@pytest.mark.parametrize(
    ("hub", "words"),
    [
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": "many"}, "top_k='many'.*an integer"),
        ({"do_sample": 1}, "do_sample=1.*true or false"),
        ({"bad_words_ids": [3]}, "bad_words_ids=.*lists of token ids"),
        ({"sequence_bias": {"(3,)": 1.0}}, r"sequence_bias=.*\[token ids, number\]"),
        ({"stop_strings": [1]}, "stop_strings=.*strings"),
        ({"eos_token_id": "</s>"}, "eos_token_id=.*integer"),
    ],
)
def test_refusal_names_the_file(hub, words, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(hub))
    with pytest.raises(qmj.ConfigError, match=f"{tmp_path}/generation_config.json: {words}"):
        read_generation_config(tmp_path, MODEL)


def test_an_override_that_is_refused_is_not_called_the_files():
    with pytest.raises(qmj.ConfigError, match=r"^max_new_tokens=0 is not supported"):
        generation_config_from_hub({"temperature": 0.5}, "the file", {"max_new_tokens": 0})
    with pytest.raises(qmj.ConfigError, match=r"^the file: .*temperature=-1"):
        generation_config_from_hub({"temperature": -1.0}, "the file", {"max_new_tokens": 3})
