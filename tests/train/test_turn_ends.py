"""Where conversations were learned, what is exported stops after a turn, and is otherwise as the model it came from."""

import dataclasses
import json
import shutil

import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.generation_config import generation_folder, read_generation_config
from qwen_moe_jax.inference.chat_template import load_chat_template
from tests.inference.chat_templates import MIXTRAL, QWEN2, QWEN3
from tests.inference.tokenizer_kinds import byte_fallback, byte_level
from tests.train.test_run import start
from train.data.chat import conversation_documents
from train.data.records import Conversation
from train.data.tokenizer import name_turn_ends, save_tokenizer, train_tokenizer
from train.data.turn_ends import TurnEnds

TALK = [
    {"role": "user", "content": "The quick fox?"},
    {"role": "assistant", "content": "It jumps."},
    {"role": "user", "content": "And the dog?"},
    {"role": "assistant", "content": "It is not here."},
]
OTHER_NAME = """\
{%- for message in messages %}
    {{- '<|' + message.role + '|>' + message.content }}
    {%- if message.role == 'assistant' %}{{ '<|over|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{%- endif %}"""
WITHOUT_END = OTHER_NAME.replace("<|over|>", "")
RUN = """
[mesh]
data = 2
simulated = true
[data]
format = "jsonl"
seq_len = 32
batch_size = 2
heldout_fraction = 0.1
heldout_rows = 2
[optimizer]
warmup_steps = 1
[lora]
r = 2
[run]
max_steps = 2
sample_steps = 0
sample_tokens = 4
"""


def turn_ends(tokenizer, template, folder, messages=TALK):
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_text(template)
    found = TurnEnds(tokenizer)
    for turns in conversation_documents(Conversation(messages), load_chat_template(folder), tokenizer, "line 1"):
        found.add(turns)
    return found


def with_token(token, special=True):
    tokenizer = byte_level()
    if special:
        tokenizer.add_special_tokens([token])
    else:
        tokenizer.add_tokens([token])
    return tokenizer


@pytest.mark.parametrize(
    ("make", "template", "token"),
    [
        (byte_level, QWEN2, "<|im_end|>"),
        (byte_level, QWEN3, "<|im_end|>"),
        (byte_fallback, MIXTRAL, "</s>"),
        (lambda: with_token("<|over|>"), OTHER_NAME, "<|over|>"),
        (lambda: with_token("<|over|>", special=False), OTHER_NAME, "<|over|>"),
    ],
)
def test_the_token_that_ends_a_turn_is_found_whatever_its_name(make, template, token, tmp_path):
    found = turn_ends(make(), template, tmp_path / "model")
    assert found.ids() == [make().token_to_id(token)]
    assert found.notes() == [f"an assistant's turn ends with {token!r}: a stop token of the exported model"]


def test_a_template_without_such_a_token_says_that_nothing_stops_the_model(tmp_path):
    found = turn_ends(byte_level(), WITHOUT_END, tmp_path / "model")
    assert found.ids() == [] and "no stop token" in found.notes()[0]
    assert TurnEnds(byte_level()).notes() == []  # without conversations


@pytest.mark.parametrize(
    ("template", "config", "expected"),
    [
        ("{{ messages }}", {"eos_token": "</s>"}, {"eos_token": "<|over|>", "pad_token": "</s>"}),
        ("{{ messages }}", {"eos_token": {"content": "</s>"}, "pad_token": "<pad>"},
         {"eos_token": "<|over|>", "pad_token": "<pad>"}),
        ("{{ eos_token }}", {"eos_token": "</s>"}, {"eos_token": "</s>"}),
    ],
)  # fmt: skip
def test_tokenizer_config_has_both_stop_tokens_and_templates_render_as_before(template, config, expected, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(template)
    name_turn_ends(tmp_path, ["<|over|>"])
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert {key: written[key] for key in expected} == expected
    assert {"</s>", "<|over|>"} <= {written["eos_token"], *written["additional_special_tokens"]}
    name_turn_ends(tmp_path, ["<|over|>"])
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == written


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A base in bfloat16 that samples and stops at the end of texts, and a run of adapters on conversations."""
    place = tmp_path_factory.mktemp("tuned")
    base = place / "base"
    tokenizer = train_tokenizer([message["content"] for message in TALK], 300)
    tokenizer.add_special_tokens(["<|over|>"])
    save_tokenizer(tokenizer, base)
    (base / "chat_template.jinja").write_text(OTHER_NAME)
    hub_config = {
        "model_type": "qwen3", "vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
        "eos_token_id": 0,
    }  # fmt: skip
    generation = qmj.GenerationConfig(eos_token_id=(0, 2), do_sample=True, temperature=0.7, top_k=20)
    config, execution = qmj.ModelConfig.from_pretrained(hub_config), qmj.ExecutionConfig(dtype="bfloat16")
    model = qmj.CausalLM(config, rngs=nnx.Rngs(0), execution=execution, generation_config=generation)
    qmj.save_pretrained(model, base)
    lines = [json.dumps({"messages": TALK}) for _ in range(40)]
    (place / "chats.jsonl").write_text("\n".join(lines))
    (place / "run.toml").write_text(RUN)
    words = ["--run.model_name_or_path", str(base), "--data.path", str(place / "chats.jsonl")]
    code, output, complaint = start(place / "run.toml", place / "run", *words)
    assert code == 0, complaint
    return base, place / "run", output, tokenizer.token_to_id("<|over|>")


@pytest.mark.parametrize("name", ["hub", "adapter"])
def test_a_base_tuned_on_chats_stops_after_a_turn_and_generates_otherwise_as_before(tuned, name):
    base, run, output, over = tuned
    config = qmj.ModelConfig.from_pretrained(base)
    before, after = read_generation_config(base, config), read_generation_config(run / name, config)
    assert after.eos_token_id == (0, 2, over)
    assert dataclasses.replace(after, eos_token_id=(0, 2), hub_fields=()) == dataclasses.replace(before, hub_fields=())
    tokenizer_config = json.loads((run / name / "tokenizer_config.json").read_text())
    assert tokenizer_config["eos_token"] == "<|over|>" and tokenizer_config["pad_token"] == "<|endoftext|>"
    assert load_chat_template(run / name).render(TALK) == load_chat_template(base).render(TALK)
    assert "an assistant's turn ends with '<|over|>': a stop token of the exported model" in output


def test_an_adapter_brings_its_stop_tokens_to_the_base(tuned):
    base, run, _, over = tuned
    model = qmj.from_pretrained(base, adapter=run / "adapter")
    assert model.generation_config.eos_token_id == (0, 2, over) and model.generation_config.temperature == 0.7
    chosen = qmj.GenerationConfig(eos_token_id=(5,))
    model = qmj.from_pretrained(base, adapter=run / "adapter", generation_config=chosen)
    assert model.generation_config == chosen


def test_the_commands_read_the_generation_config_of_an_adapter_that_has_one(tuned, tmp_path):
    base, run, _, _ = tuned
    assert generation_folder(base, None) == base and generation_folder(base, run / "adapter") == run / "adapter"
    shutil.copytree(run / "adapter", tmp_path / "bare")
    (tmp_path / "bare" / "generation_config.json").unlink()
    assert generation_folder(base, tmp_path / "bare") == base


def test_the_export_has_the_dtype_of_its_base_and_the_end_says_so(tuned):
    _, run, output, over = tuned
    config = qmj.ModelConfig.from_pretrained(run / "hub")
    assert config.dtype == "bfloat16" and config.eos_token_id == (0, over)
    assert f"Hub folder in {run / 'hub'} (bfloat16)" in output
    assert qmj.from_pretrained(run / "hub").model.norm.weight.dtype == "bfloat16"
