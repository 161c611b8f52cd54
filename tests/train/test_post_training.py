"""Whole runs of preferences and of labels: what they report, keep and export, and that a killed one ends the same."""

import json

import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.errors import CheckpointError
from tests.train.test_run import CONFIG, metrics, start
from train.folder import RunFolder
from train.loop import Loop
from train.report import write_report

pytestmark = pytest.mark.usefixtures("programs_compiled_once")

DATA = 'path = "{path}"\nformat = "jsonl"\nvocab_size = 300\nseq_len = 24\nbatch_size = 4\n'
MODEL, REST = CONFIG.replace("data = 2\nexpert = 2", "data = 2").split("[data]")
RUN = "[optimizer]" + REST.split("[optimizer]")[1].replace("max_steps = 12", "max_steps = 9") + "sample_steps = 0\n"
WORDS = "red green blue one two three cat dog bird".split()


class Killed(BaseException):
    """Ends a run at once, as a signal that nothing can catch would."""


def write(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def whole_and_killed(config, place, step):
    """The folder of a run, and that of one which is killed in the middle of a step and then started again."""
    code, output, complaint = start(config, place / "whole")
    assert code == 0, complaint
    with pytest.MonkeyPatch.context() as patch:
        between = Loop._between_steps

        def dying(self, done, state):
            if done == step:
                raise Killed
            return between(self, done, state)

        patch.setattr(Loop, "_between_steps", dying)
        with pytest.raises(Killed):
            start(config, place / "killed")
    code, again, complaint = start(config, place / "killed")
    assert code == 0 and "going on from the checkpoint of step 4" in again, complaint
    return place / "whole", place / "killed", output


@pytest.fixture(scope="module")
def preferred(tmp_path_factory):
    place, numbers = tmp_path_factory.mktemp("dpo"), np.random.default_rng(0)
    records = [
        {"prompt": f"say {word}", "chosen": f" {word}", "rejected": f" not {other}"}
        for word, other in numbers.choice(WORDS, (40, 2))
    ]
    data = DATA.format(path=write(place / "pairs.jsonl", records))
    config = place / "dpo.toml"
    config.write_text(f"{MODEL}[data]\n{data}heldout_fraction = 0.2\nheldout_rows = 6\n[dpo]\nbeta = 0.5\n{RUN}")
    return config, *whole_and_killed(config, place, step=6)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    place, numbers = tmp_path_factory.mktemp("labels"), np.random.default_rng(0)
    records = [{"text": f"{word} {other}", "label": word} for word, other in numbers.choice(WORDS[:3], (60, 2))]
    data = DATA.format(path=write(place / "texts.jsonl", records[:40]))
    data += f'eval_path = "{write(place / "eval.jsonl", records[40:])}"\nheldout_rows = 20\n'
    best = 'metric_for_best_model = "accuracy"\nearly_stopping_patience = 3\n'
    config = place / "classify.toml"
    config.write_text(f"{MODEL}[data]\n{data}[classification]\n{RUN.replace('eval_steps = 6', 'eval_steps = 2')}{best}")
    return records[40:], *whole_and_killed(config, place, step=5)


def weights_of(folder):
    return (folder / "hub" / "model.safetensors").read_bytes()


def numbers_of(folder):
    """What a run reports, but for times."""
    kept = ("loss", "heldout_loss", "rewards/margins", "heldout_rewards/margins", "accuracy", "heldout_accuracy")
    found = {}
    for record in metrics(folder):
        found |= {(record["step"], key): value for key, value in record.items() if key in kept}
    return found


def test_a_killed_run_of_preferences_ends_bit_equal(preferred):
    _, whole, killed, _ = preferred
    assert weights_of(whole) == weights_of(killed) and numbers_of(whole) == numbers_of(killed)


def test_preferences_are_learned_from_a_margin_of_zero_on_and_reported_by_trls_names(preferred):
    _, folder, _, output = preferred
    steps = [record for record in metrics(folder) if "loss" in record]
    heldout = [record for record in metrics(folder) if "heldout_loss" in record]
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)  # the reference is the initial model
    assert heldout[0]["heldout_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert heldout[-1]["heldout_loss"] < heldout[0]["heldout_loss"] and steps[-1]["rewards/accuracies"] == 1
    named = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"}
    assert named | {"logps/rejected", "dpo_loss", "balance_loss"} <= steps[-1].keys()
    assert "reference: log-probabilities of 40 pairs under the initial model" in output
    assert "rewards/margins" in output and "direct preference optimization (sigmoid); parameters: " in output


def test_the_page_of_a_run_has_a_curve_of_every_term(preferred):
    pytest.importorskip("matplotlib")
    page = write_report(RunFolder(preferred[1])).read_text()
    assert "<h2>Objective</h2>" in page and "rewards/margins" in page
    assert "beta times the log-ratio of the chosen completion to the reference, in nats" in page


def test_log_probabilities_of_other_pairs_are_refused(preferred):
    config, folder, _, _ = preferred
    file = folder / "corpus" / "reference.npz"
    arrays = dict(np.load(file))
    np.savez(file, **{**arrays, "fingerprint": np.array("of other pairs")})
    code, _, complaint = start(config, folder, "--run.max_steps=10")
    assert code == 2 and "reference.npz: found the reference's log-probabilities of other pairs" in complaint
    assert CheckpointError.__name__ in complaint


def test_a_killed_run_of_labels_ends_bit_equal_and_exports_its_best_checkpoint(labelled):
    _, whole, killed, output = labelled
    assert weights_of(whole) == weights_of(killed) and numbers_of(whole) == numbers_of(killed)
    result = json.loads((killed / "result.json").read_text())
    heldout = {record["step"]: record["heldout_accuracy"] for record in metrics(whole) if "heldout_loss" in record}
    best = max(heldout[step] for step in heldout if step)
    assert result["heldout"]["accuracy"] == heldout[result["steps"]] == best
    assert result["steps"] == next(step for step in heldout if step and heldout[step] == best)
    assert str(result["steps"]) in {path.name for path in (killed / "checkpoints").iterdir()}
    assert "60 records" not in output and "20 records of " in output  # those of the validation file


def test_the_exported_classifier_opens_in_transformers_with_the_same_logits_and_accuracy(labelled):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    records, folder, _, _ = labelled
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "hub")
    assert theirs.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert theirs.config.problem_type == "single_label_classification"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hub")
    inputs = tokenizer([record["text"] for record in records], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = theirs(**{key: inputs[key] for key in ("input_ids", "attention_mask")}).logits.numpy()
    ours = qmj.SequenceClassifier.from_pretrained(folder / "hub")
    found = ours(inputs["input_ids"].numpy(), segment_ids=inputs["attention_mask"].numpy()).logits
    np.testing.assert_allclose(found, logits, atol=1e-5)
    names = [theirs.config.id2label[int(row.argmax())] for row in logits]
    right = [name == record["label"] for name, record in zip(names, records, strict=True)]
    heldout = json.loads((folder / "result.json").read_text())["heldout"]
    assert heldout["accuracy"] == pytest.approx(np.mean(right)) and heldout["accuracy"] > 0.5
