"""Uploads and model cards, against a Hub on this machine."""

import inspect
import json

import jax
import numpy as np
import pytest
from flax import nnx
from huggingface_hub import ModelCard as HubCard

import qwen_moe_jax as qmj
from qwen_moe_jax.cli.main import main
from qwen_moe_jax.huggingface.push import push_folder
from tests.huggingface.fake_hub import TOKEN, FakeHub, use
from tests.surgery.folders import arrays_of, config_of, write

#: Of huggingface_hub 2.4 itself, as it uploads.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "someone/tiny-moe"
CASE = "qwen3_moe-plain"


@pytest.fixture(scope="module")
def server():
    return FakeHub()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    use(server, tmp_path / "cache", monkeypatch, TOKEN)
    return server


@pytest.fixture
def folder(tmp_path):
    folder = write(tmp_path / "model", arrays_of(CASE), config_of(CASE))
    (folder / "tokenizer.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache/notes").write_text("mine")
    return folder


@pytest.fixture
def run(tmp_path):
    """The folder of a training run, with what it has exported."""
    run = tmp_path / "run"
    write(run / "hub", arrays_of(CASE), config_of(CASE))
    (run / "config.toml").write_text(
        '[data]\npath = "/home/me/secret/texts"\n[run]\nmodel_name_or_path = "someone/base@main"\n'
    )
    records = [{"step": 1, "loss": 5.0, "tokens": 1024}, {"step": 2, "loss": 4.5, "tokens": 1024}]
    records.append({"step": 2, "heldout_loss": 4.25})
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    return run


def test_a_model_is_uploaded_in_one_commit_and_loaded_again_by_its_name(hub):
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(config_of(CASE)), rngs=nnx.Rngs(0))
    card = qmj.ModelCard(license="apache-2.0", base_model=("someone/dense",), tags=("upcycled",))
    url = qmj.push_to_hub(model, NAME, private=True, model_card=card, max_shard_size="60KB")
    repository = hub.repositories[NAME]
    assert url == f"{hub.url}/{NAME}/commit/{repository.refs['main']}" and repository.private
    assert repository.messages[1:] == ["Upload CausalLM"]
    assert sum(name.endswith(".safetensors") for name in repository.files) > 1
    again = qmj.from_pretrained(NAME)
    assert all(map(np.array_equal, jax.tree.leaves(model), jax.tree.leaves(again)))
    data = HubCard(repository.files["README.md"].decode()).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert data.base_model == ["someone/dense"] and set(data.tags) == {"qwen3_moe", "jax", "qwen_moe_jax", "upcycled"}


def test_the_arguments_are_those_of_transformers():
    """Of PreTrainedModel.push_to_hub in 5.23, commit_description and tags aside (importing it takes ten seconds)."""
    theirs = {"repo_id", "commit_message", "private", "token", "revision", "create_pr", "max_shard_size"}
    assert theirs <= inspect.signature(qmj.push_to_hub).parameters.keys()


def test_what_breaks_off_leaves_the_repository_as_it_was(hub, folder, capsys):
    push_folder(folder, NAME)
    before = dict(hub.repositories[NAME].files)
    write(folder, arrays_of(CASE, seed=1), config_of(CASE))
    for where in ("upload", "commit"):
        hub.fail = where
        assert main(["push", str(folder), NAME]) == 2
        said = capsys.readouterr().err
        assert f"{NAME}: could not be uploaded (" in said and "Nothing in the repository has changed" in said
        assert hub.repositories[NAME].files == before


def test_weights_of_other_names_are_removed_in_the_same_commit(hub, folder):
    push_folder(folder, NAME)
    repository = hub.repositories[NAME]
    old = {"pytorch_model.bin": b"old", "model-00001-of-00002.safetensors": b"old", "notes.md": b"mine"}
    repository.commit(repository.files | old)
    write(folder, arrays_of(CASE, seed=1), config_of(CASE))
    push_folder(folder, NAME)
    names = {"config.json", "model.safetensors", "tokenizer.json", "README.md", "notes.md", ".gitattributes"}
    assert set(repository.files) == names and len(repository.messages) == 4


def test_a_card_is_the_folders_or_the_repositorys_before_it_is_made(hub, folder, capsys):
    push_folder(folder, NAME)
    repository = hub.repositories[NAME]
    assert repository.files["README.md"].startswith(b"---\nlibrary_name") and not (folder / "README.md").exists()
    repository.commit(repository.files | {"README.md": b"written by hand"})
    push_folder(folder, NAME)
    assert repository.files["README.md"] == b"written by hand"
    assert main(["card", str(folder), "--license", "mit"]) == 0
    push_folder(folder, NAME)
    assert b"license: mit" in repository.files["README.md"]
    assert main(["card", str(folder)]) == 2
    assert "is not replaced unasked: with --replace it is" in capsys.readouterr().err
    assert main(["card", str(folder), "--replace"]) == 0 and "license" not in (folder / "README.md").read_text()


def test_saving_with_a_card_keeps_the_one_that_is_there(tmp_path):
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(config_of(CASE)), rngs=nnx.Rngs(0))
    qmj.save_pretrained(model, tmp_path / "out", model_card=qmj.ModelCard())
    card = tmp_path / "out/README.md"
    assert "# out\n" in card.read_text()
    card.write_text("mine")
    qmj.save_pretrained(model, tmp_path / "out", model_card=qmj.ModelCard())
    assert card.read_text() == "mine"


def test_a_branch_is_made_and_a_pull_request_leaves_main_alone(hub, folder, capsys):
    push_folder(folder, NAME)
    repository = hub.repositories[NAME]
    first = repository.refs["main"]
    write(folder, arrays_of(CASE, seed=1), config_of(CASE))
    assert main(["push", str(folder), f"{NAME}@trial", "--message", "one more"]) == 0
    assert repository.refs["trial"] != first == repository.refs["main"] and repository.messages[-1] == "one more"
    assert push_folder(folder, NAME, create_pr=True) == f"{hub.url}/{NAME}/discussions/1"
    assert repository.refs["main"] == first


def test_a_folder_that_does_not_load_is_not_uploaded(hub, folder, tmp_path, capsys):
    arrays = dict(arrays_of(CASE))
    arrays.pop("model.norm.weight")
    write(folder, arrays, config_of(CASE))
    assert main(["push", str(folder), NAME]) == 2
    assert "missing: model.norm.weight" in capsys.readouterr().err and NAME not in hub.repositories
    assert main(["push", str(tmp_path / "nowhere"), NAME]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_run_given_instead_of_its_export_is_refused_with_the_folder_of_that(run, capsys):
    assert main(["push", str(run), NAME]) == 2
    assert f"The model of this training run is in {run / 'hub'}." in capsys.readouterr().err


def test_what_cannot_be_a_repository_is_refused_with_the_form_of_one(folder, capsys):
    assert main(["push", str(folder), "my-model"]) == 2
    assert "my-model: is not the name of a repository on the Hub; expected owner/model" in capsys.readouterr().err


def test_without_the_right_to_write_the_way_out_is_a_token(hub, folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["push", str(folder), NAME]) == 2
    said = capsys.readouterr().err
    assert "the Hub refuses access (" in said and "hf auth login" in said and said.count("\n") == 1


def test_adapters_are_uploaded_as_they_are(hub, tmp_path):
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(config_of(CASE)), rngs=nnx.Rngs(0))
    qmj.add_lora(model, qmj.LoraConfig(r=2, target_modules=("q_proj",)), rngs=nnx.Rngs(0))
    qmj.save_adapter(model, tmp_path / "adapter")
    push_folder(tmp_path / "adapter", NAME)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(hub.repositories[NAME].files)


def test_a_card_of_a_run_has_its_losses_and_settings_without_private_folders(run):
    assert main(["card", str(run / "hub")]) == 0
    card = (run / "hub/README.md").read_text()
    assert HubCard(card).data.base_model == ["someone/base"]
    assert "Trained for 2 steps on 2,048 tokens" in card and "| 2 | 4.2500 |" in card
    assert 'path = "texts"' in card and "secret" not in card
    assert "| experts | 8, " in card and "of which a token uses" in card


def test_results_are_shown_by_what_they_are(folder, tmp_path, capsys):
    results = {
        "eval.json": {"results": {"arc_easy": {"acc,none": 0.5, "acc_stderr,none": 0.01, "alias": "arc"}}},
        "score.json": {
            "perplexity": 7.5,
            "nats_per_token": 2.0,
            "bits_per_byte": 0.9,
            "file": "/a/b.txt",
            "window": 64,
        },
        "verify.json": {"verdict": "rounding", "first": "/x/A", "second": "/x/B", "tensors": 1234},
        "other.json": {"what": 1},
    }
    for name, content in results.items():
        (tmp_path / name).write_text(json.dumps(content))
    words = [word for name in list(results)[:3] for word in ("--results", str(tmp_path / name))]
    assert main(["card", str(folder), *words]) == 0
    card = (folder / "README.md").read_text()
    assert "| arc_easy | acc | 0.5000 |" in card and "stderr" not in card and "| nats a token | 2.0000 |" in card
    assert "`A` and `B` compared by `qwen-moe-jax verify`: equal up to rounding (1,234 tensors)" in card
    assert main(["card", str(folder), "--replace", "--results", str(tmp_path / "other.json")]) == 2
    assert "found the keys what; expected the JSON of" in capsys.readouterr().err
