"""Whole runs on simulated devices: the loss falls, the folder is complete, stopping and going on changes nothing."""

import contextlib
import io
import json
import math
import re
import shutil
import tomllib

import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.cli.terminal import visible
from qwen_moe_jax.inference.chat_template import load_chat_template
from train.config import DataConfig
from train.data.batches import heldout_batches
from train.data.corpus import load_corpus
from train.data.rows import pack
from train.main import main

CONFIG = """
[model]
model_type = "qwen3_moe"
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
moe_intermediate_size = 16
num_experts = 4
num_experts_per_tok = 2
norm_topk_prob = true
router_aux_loss_coef = 0.01
max_position_embeddings = 64
tie_word_embeddings = true

[mesh]
data = 2
expert = 2
simulated = true

[execution]
group_size = 16

[data]
megabytes = 0.03
vocab_size = 300
seq_len = 32
batch_size = 4
heldout_fraction = 0.2
heldout_rows = 6

[optimizer]
learning_rate = 1e-2
warmup_steps = 2

[run]
max_steps = 12
logging_steps = 4
eval_steps = 6
save_steps = 4
sample_tokens = 4
"""

ASIDE_KEYS = ("evaluation_seconds", "checkpoint_seconds")

pytestmark = pytest.mark.usefixtures("programs_compiled_once")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "small.toml"
    file.write_text(CONFIG)
    return file


def start(config_file, folder, *words):
    """`python -m train` in this process: its exit code, what it printed and what it complained of."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as complaint:
        code = main([str(config_file), "--run.output_dir", str(folder), *words])
    return code, output.getvalue(), complaint.getvalue()


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, output, complaint = start(config_file, folder)
    assert code == 0, complaint
    return folder, output


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls_on_simulated_devices(finished):
    folder, _ = finished
    losses = [record["cross_entropy"] for record in metrics(folder) if "loss" in record]
    heldout = [record["heldout_loss"] for record in metrics(folder) if "heldout_loss" in record]
    assert len(losses) == 12 and len(heldout) == 3
    assert 5.5 < heldout[0] < 5.9  # log 300 = 5.70: a fresh model knows nothing
    assert heldout[2] < heldout[1] < heldout[0] - 0.2
    assert losses[-1] < losses[0] - 0.4


def test_piped_output_is_whole_lines_with_time_share_done_speed_drops_and_eta(finished):
    _, output = finished
    lines = [line for line in output.splitlines() if "step 8/12" in line]
    assert len(lines) == 1
    for part in ("67%", "loss ", "tokens/s", "dropped ", "max load ", "z-loss ", "ETA 0:"):
        assert part in lines[0]
    assert "\x1b" not in output and "\r" not in output


def test_the_start_says_the_mesh_the_parameters_and_what_a_device_holds(finished):
    folder, output = finished
    [start] = [record["start"] for record in metrics(folder) if "start" in record]
    assert "4 simulated device(s): data=2, expert=2" in output and "per device without activations: " in output
    assert f"parameters: {start['parameters']:,}, {start['active_parameters']:,} active per token; " in output
    assert start["tokens_per_step"] == 4 * 32 and start["sparse_layers"] == [0, 1] and start["peak_flops"] is None
    # Experts and dense weights are sharded two ways; moments are twice the weights, and a few counters.
    assert 4 * start["parameters"] / 2 <= start["weight_bytes"] < 4 * start["parameters"] * 0.6
    assert 0 <= start["moment_bytes"] - 2 * start["weight_bytes"] < 100
    assert start["gradient_bytes"] == start["weight_bytes"]


def test_metrics_have_every_step_its_time_and_now_and_then_every_expert(finished):
    records = metrics(finished[0])
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 13))
    for record in steps:
        assert record["loss"] == pytest.approx(record["cross_entropy"] + 0.01 * record["balance_loss"], rel=1e-5)
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["step_seconds"])
        assert record["tokens_per_second_per_device"] == pytest.approx(record["tokens_per_second"] / 4)
        assert record["data_seconds"] > 0
        assert record["gradient_norm"] > 0 and "mfu" not in record  # no one knows the peak of a CPU
    assert [record["learning_rate"] for record in steps[:3]] == pytest.approx([0, 0.005, 0.01])

    by_step = {record["step"]: record for record in steps}
    layers = {record["step"]: record["layers"] for record in records if "layers" in record}
    assert list(layers) == [1, 4, 8, 12]  # logging_steps
    for step, layer in layers.items():
        loads_LE = np.array(layer["load"])
        assert loads_LE.shape == (2, 4) and (loads_LE.sum(axis=1) == 2 * by_step[step]["tokens"]).all()
        assert sum(layer["dropped"]) / loads_LE.sum() == pytest.approx(by_step[step]["dropped"])
        assert len(layer["entropy"]) == 2 and 0 < max(layer["entropy"]) <= np.log(4)

    asides = [(record["step"], key) for record in records for key in record if key in ASIDE_KEYS]
    evaluations, checkpoints = ([step for step, key in asides if key == kind] for kind in ASIDE_KEYS)
    assert evaluations == [0, 6, 12] and checkpoints == [4, 8, 12]


def test_with_every_held_out_loss_the_model_continues_a_text_by_programs_compiled_once(finished):
    folder, output = finished
    samples = [record for record in metrics(folder) if "sample" in record]
    assert [record["step"] for record in samples] == [0, 6]  # the last step's is the exported model's, in result.json
    assert all(record["prompt"] == "def" for record in samples)
    shown = [line.partition("| ")[2] for line in output.splitlines() if "  | " in line]
    assert shown == [line for record in samples for line in visible("def" + record["sample"]).splitlines()]
    seconds = [record["sample_seconds"] for record in metrics(folder) if "sample_seconds" in record]
    assert len(seconds) == 2 and seconds[1] < seconds[0] / 5


def test_the_run_folder_holds_config_metrics_checkpoints_and_an_export_that_loads(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.toml", "metrics.jsonl", "corpus", "checkpoints", "hub", "result.json"}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"8", "12"}
    hub = {path.name for path in (folder / "hub").iterdir()}
    assert hub >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 12 and result["heldout_loss"] == metrics(folder)[-1]["heldout_loss"]
    exported = json.loads((folder / "hub" / "config.json").read_text())
    assert exported["vocab_size"] == 300 and exported["model_type"] == "qwen3_moe"


def test_starting_a_finished_run_again_says_so_and_how_to_start_afresh(finished, config_file):
    folder, _ = finished
    before = (folder / "metrics.jsonl").read_text()
    code, output, _ = start(config_file, folder)
    assert code == 0
    assert "is finished; --fresh trains it anew" in output and "Held-out loss" in output
    assert (folder / "metrics.jsonl").read_text() == before


def without_model(config_file, file):
    """The same run for --run.model_name_or_path."""
    tables = tomllib.loads(config_file.read_text())
    del tables["model"], tables["data"]["vocab_size"]
    lines = [f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
             for name, table in tables.items()]  # fmt: skip
    file.write_text("\n".join(lines))
    return file


def test_a_chat_fine_tune_learns_the_answers_alone_and_leaves_a_hub_folder_to_chat_with(
    finished, config_file, tmp_path
):
    hub, folder = finished[0] / "hub", tmp_path / "chat"
    words = [
        "--run.model_name_or_path",
        str(hub),
        "--data.format=docstrings",
        "--data.pattern=[t-z]*.py",
        "--run.max_steps=3",
    ]
    words += ["--data.seq_len=64", "--data.megabytes=0.3", "--run.sample_steps=0", "--run.eval_steps=9"]
    code, output, complaint = start(without_model(config_file, tmp_path / "chat.toml"), folder, *words)
    assert code == 0, complaint
    assert "read 0.3 of " in output and "MB of Python's standard library (data.megabytes)" in output

    corpus = load_corpus(folder / "corpus", DataConfig())
    [part] = corpus.parts
    begins, ends = (corpus.tokenizer.encode(mark).ids for mark in ("<|im_start|>assistant\n", "<|im_end|>\n"))
    for documents in (part.training, part.heldout):
        for number in range(len(documents)):
            ids = documents[number].tolist()
            answer = next(at + len(begins) for at in range(len(ids)) if ids[at : at + len(begins)] == begins)
            assert documents.learned_in(number).tolist() == [at >= answer for at in range(len(ids))]
            assert ids[-len(ends) :] == ends

    # And that is what the loss is of, on the weights that the run began with.
    [batch] = heldout_batches(pack(part.heldout, 64), 6, 6)
    losses = qmj.from_pretrained(hub).token_losses(
        batch.tokens_BT, batch.targets_BT, segment_ids=batch.segment_ids_BT, positions=batch.positions_BT
    )
    expected = np.asarray(losses.losses)[batch.target_mask_BT].mean()
    before = next(record["heldout_loss"] for record in metrics(folder) if "heldout_loss" in record)
    assert before == pytest.approx(expected, rel=1e-5)

    tuned = qmj.ModelConfig.from_pretrained(folder / "hub")
    assert tuned.eos_token_id == tuple(corpus.tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>"))
    prompt = load_chat_template(folder / "hub").render([{"role": "user", "content": "What is textwrap?"}])
    assert prompt == "<|im_start|>user\nWhat is textwrap?<|im_end|>\n<|im_start|>assistant\n"


def test_a_fine_tune_of_a_run_that_was_not_trained_yet_says_which_comes_first(config_file, tmp_path):
    file = without_model(config_file, tmp_path / "tune.toml")
    code, _, complaint = start(file, tmp_path / "run", "--run.model_name_or_path", str(tmp_path / "other" / "hub"))
    assert code == 2 and "other/hub: there is no such folder yet" in complaint and "`make train`" in complaint


def test_a_run_begins_with_a_checkpoint_and_its_tokenizer_and_never_goes_back_to_them(finished, config_file, tmp_path):
    """Resumed weights come before those to begin with, and those before fresh ones."""
    hub = finished[0] / "hub"
    file, folder = without_model(config_file, tmp_path / "tune.toml"), tmp_path / "tuned"
    words = ["--run.model_name_or_path", str(hub), "--run.max_steps=4", "--run.save_steps=2", "--run.sample_steps=2"]
    code, output, complaint = start(file, folder, *words, "--run.export=false")
    assert code == 0, complaint
    before = [record["heldout_loss"] for record in metrics(finished[0]) if "heldout_loss" in record][-1]
    first = [record["heldout_loss"] for record in metrics(folder) if "heldout_loss" in record][0]
    assert first == pytest.approx(before, abs=1e-4)  # the same text under the same tokenizer, on the same weights
    samples = {record["step"]: record["sample"] for record in metrics(folder) if "sample" in record}
    assert list(samples) == [0, 2]  # run.sample_steps
    assert samples[0] == json.loads((finished[0] / "result.json").read_text())["sample"]
    assert (folder / "corpus" / "tokenizer" / "tokenizer.json").read_bytes() == (hub / "tokenizer.json").read_bytes()

    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "4")
    code, output, complaint = start(file, folder, *words, "--run.export=false")
    assert code == 0 and "going on from the checkpoint of step 2" in output, complaint


def test_a_run_with_balancing_biases_exports_nothing_and_samples_all_the_same(config_file, tmp_path):
    folder = tmp_path / "biased"
    words = [
        "--run.max_steps=3",
        "--run.export=false",
        "--execution.dispatch=dropless",
        "--loss.load_balancing_type=sequence",
    ]
    words += [
        "--loss.router_bias_update_rate=0.01",
        "--loss.router_aux_loss_coef=1e-4",
        "--loss.router_z_loss_coef=1e-3",
    ]
    code, output, complaint = start(config_file, folder, *words)
    assert code == 0, complaint
    assert "The model goes on from" in output and "Hub folder" not in output
    assert not (folder / "hub").exists() and (folder / "checkpoints" / "3").exists()
    for record in (record for record in metrics(folder) if "loss" in record):
        assert record["dropped"] == 0 and 1 <= record["load_imbalance"] <= 2 and record["router_z"] > 0
        assert 0.9 < record["balance_loss"] < 1.5  # of one sequence, 1 is even


def test_a_dense_run_has_events_a_trace_of_the_steps_asked_for_and_no_experts(config_file, tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra `tensorboard` is not installed")
    folder = tmp_path / "dense"
    words = ["--run.max_steps=4", "--run.export=false", "--run.tensorboard=true", "--run.profile=2:3"]
    words += ["--model.model_type=qwen3", "--mesh.expert=1", "--run.eval_steps=9", "--run.save_steps=9"]
    words += ["--run.sample_steps=0"]
    code, _, complaint = start(config_file, folder, *words)
    assert code == 0, complaint
    records = metrics(folder)
    assert not any("layers" in record or "sample" in record for record in records)
    assert [record["step"] for record in records if "profile_seconds" in record] == [2]
    assert len(list(folder.glob("profile/**/*.xplane.pb"))) == 1
    assert len(list(folder.glob("tensorboard/events.*"))) == 1


def test_a_run_that_goes_astray_skips_so_many_steps_then_stops_and_names_the_last_checkpoint(config_file, tmp_path):
    """Also micro-batches, another schedule, frozen parameters and small moments, in a whole run."""
    folder = tmp_path / "astray"
    words = [
        "--optimizer.learning_rate=1e38",
        "--run.nonfinite=skip",
        "--run.max_skipped=1",
        "--run.save_steps=1",
    ]
    words += ["--mesh.data=1", "--run.gradient_accumulation_steps=2", "--optimizer.frozen=['norm', '^lm_head|embed']"]
    words += ["--optimizer.schedule=wsd", "--optimizer.decay_steps=2", "--optimizer.mu_dtype=bfloat16"]
    words += ["--optimizer.warmup_steps=1"]  # the first step has a rate of zero, the second leads astray
    code, output, complaint = start(config_file, folder, *words)
    assert code == 1
    assert "step 3: the loss is" in output and "skipped (1 of 1)" in output and "on epoch 0 of " in output
    assert "NonFiniteError: step 4: the loss is" in complaint and "the last checkpoint is that of step 3" in complaint
    assert [record["finite"] for record in metrics(folder) if "loss" in record] == [True, True, False, False]


def test_other_settings_in_the_same_folder_are_refused_with_the_difference(finished, config_file):
    folder, _ = finished
    code, _, complaint = start(config_file, folder, "--optimizer.learning_rate", "0.5")
    assert code == 2
    assert "optimizer.learning_rate: 0.01 → 0.5" in complaint and "--fresh" in complaint


def test_a_model_with_fewer_entries_than_its_tokenizer_is_refused(finished, config_file, tmp_path):
    file = tmp_path / "own.toml"
    named = CONFIG.replace("vocab_size = 300", f'tokenizer = "{finished[0] / "hub"}"')
    file.write_text(named.replace("[model]", "[model]\nvocab_size = 299"))
    code, _, complaint = start(file, tmp_path / "run")
    assert code == 2 and "model.vocab_size: found 299, expected at least 300" in complaint


def test_a_folder_that_is_no_run_is_left_alone(config_file, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    code, _, complaint = start(config_file, tmp_path, "--fresh")
    assert code == 2 and "left alone" in complaint
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_stopped_run_goes_on_to_bit_equal_parameters_and_metrics(finished, config_file, tmp_path):
    whole, _ = finished
    folder = tmp_path / "stopped"
    shutil.copytree(whole, folder)  # as it was just before step 12 was saved:
    shutil.rmtree(folder / "checkpoints" / "12")
    shutil.rmtree(folder / "hub")
    (folder / "result.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')  # cut short in the middle of a line

    # How a run is carried out may change on the way, here only how it reports; what it means may not.
    code, output, complaint = start(config_file, folder, "--run.logging_steps", "3")
    assert code == 0, complaint
    assert "going on from the checkpoint of step 8" in output

    def comparable(records):
        timings = ("_seconds", "tokens_per_second", "tokens_per_second_per_device")
        kept = [{key: value for key, value in record.items() if not key.endswith(timings)} for record in records]
        return [record for record in kept if not {"start", "layers"} & set(record)]

    assert comparable(metrics(folder)) == comparable(metrics(whole))
    model = "hub/model.safetensors"
    assert (folder / model).read_bytes() == (whole / model).read_bytes()


def test_a_finished_run_goes_on_for_more_epochs_with_its_moments_as_if_it_had_been_longer(config_file, tmp_path):
    """Under a schedule that is constant but for the last step's end, so that both lengths have the same rates."""
    words = ["--optimizer.schedule=wsd", "--optimizer.decay_steps=1", "--run.eval_steps=9", "--run.sample_steps=0"]
    words += ["--optimizer.ema_decay=0.9"]
    longer, whole = tmp_path / "longer", tmp_path / "whole"
    code, output, complaint = start(config_file, longer, *words, "--run.num_train_epochs=0.02")
    assert code == 0, complaint
    [rows] = re.findall(r"run.num_train_epochs 0.02: 3 steps \((\d+) rows of text, 4 a step\)", output)
    assert math.ceil(0.02 * int(rows) / 4) == 3 and json.loads((longer / "result.json").read_text())["steps"] == 3

    longer_words = [*words, "--run.num_train_epochs=0.04"]
    code, output, complaint = start(config_file, longer, *longer_words, "--mesh", "data=2,expert=2")
    assert code == 0, complaint
    assert "a longer run than before (run.num_train_epochs: 0.02 → 0.04): it keeps weights and moments" in output
    steps = math.ceil(0.04 * int(rows) / 4)
    assert f"follows the schedule of {steps} steps" in output and "going on from the checkpoint of step 3" in output
    assert start(config_file, whole, *longer_words)[0] == 0
    assert [record["step"] for record in metrics(longer) if "loss" in record] == [*range(1, steps + 1)]
    model = "hub/model.safetensors"
    assert (longer / model).read_bytes() == (whole / model).read_bytes()

    code, _, complaint = start(config_file, longer, *words, "--run.num_train_epochs=0.03")
    assert code == 2 and "run.num_train_epochs: 0.04 → 0.03" in complaint and "--fresh" in complaint


def test_a_run_of_an_earlier_version_is_refused_with_the_ways_out(finished, config_file, tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.toml").write_text((finished[0] / "config.toml").read_text().replace("max_steps", "steps"))
    code, _, complaint = start(config_file, folder)
    assert code == 2 and f"{folder} holds a run whose config this version cannot read" in complaint
    assert "run.steps: this key is named run.max_steps now" in complaint and "Add --fresh" in complaint


def test_fresh_deletes_the_old_run_and_ctrl_c_says_how_to_go_on(finished, config_file, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)

    def stop(config, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.loop.train", stop)
    code, _, complaint = start(config_file, folder, "--fresh")
    assert code == 130 and "goes on from the last checkpoint" in complaint
    assert [path.name for path in folder.iterdir()] == ["config.toml"]


def test_the_exported_folder_opens_in_transformers_with_the_same_logits(finished):
    torch = pytest.importorskip("torch", reason="transformers needs torch, which is not installed here")
    transformers = pytest.importorskip("transformers", reason="not installed here")
    folder = str(finished[0] / "hub")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "class Reader:\n    def __init__(self):\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits.numpy()
    found = np.asarray(qmj.from_pretrained(folder)(np.array([ids])).logits)
    # float32 on both sides: rounding only
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
