"""lm-eval itself, on local tasks: its results are the scores of the package."""

import json

import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.cli.main import main
from qwen_moe_jax.errors import RequestError
from tests.inference.checkpoints import make_checkpoint

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # of its many dependencies

DOCUMENTS = [
    {"question": "The quick brown", "choices": [" fox", " dog", " stop"], "answer": 0},
    {"question": "jumps over the", "choices": [" here", " lazy dog"], "answer": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{documents}"}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
KINDS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "tiny_generate": """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["e"], do_sample: false, max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Tasks, documents and checkpoint; no network."""
    home = tmp_path_factory.mktemp("lm_eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(home / "cache"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", home / "cache")
        patch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
        (home / "documents.json").write_text(json.dumps(DOCUMENTS))
        (home / "tasks").mkdir()
        for name, kind in KINDS.items():
            text = TASK.format(name=name, documents=home / "documents.json") + kind
            (home / "tasks" / f"{name}.yaml").write_text(text)
        make_checkpoint(home / "model")
        yield home


def test_tasks_get_the_scores_of_the_package(home):
    from lm_eval.tasks import TaskManager

    from qwen_moe_jax.inference.lm_eval_model import NAME

    results = lm_eval.simple_evaluate(
        model=NAME,
        model_args=f"folder={home / 'model'},max_length=64",
        tasks=list(KINDS),
        task_manager=TaskManager(include_path=str(home / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    model = qmj.from_pretrained(home / "model")
    tokenizer = qmj.inference.tokenizer.load_tokenizer(home / "model")
    for sample in results["samples"]["tiny_choice"]:
        context = tokenizer.encode(sample["doc"]["question"]).ids
        choices = [tokenizer.encode(sample["doc"]["question"] + one).ids for one in sample["doc"]["choices"]]
        expected = qmj.score(model, [one[len(context) :] for one in choices], contexts=[context] * len(choices))
        found = [float(answer[0][0]) for answer in sample["resps"]]
        assert found == pytest.approx([one.log_likelihood for one in expected], rel=1e-5)
    for sample in results["samples"]["tiny_generate"]:
        [text] = qmj.generate(model, [sample["doc"]["question"]], max_new_tokens=8, tokenizer=tokenizer)
        assert sample["resps"] == [[text.partition("e")[0]]]


def test_the_command_passes_on_all_arguments(home, capsys, monkeypatch):
    words = ["--tasks", "tiny_choice", "--include_path", str(home / "tasks"), "--limit", "1"]
    monkeypatch.setattr("sys.argv", ["unused"])
    assert main(["eval", str(home / "model"), *words, "--model_args", "max_length=32", "data=2"]) == 0
    assert "tiny_choice" in capsys.readouterr().out


def test_windows_are_those_of_lm_eval(home):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from qwen_moe_jax.inference.harness import Harness

    for max_length in (1, 5, 8, 64):
        harness = Harness.from_folder(home / "model", max_length=max_length)
        text = "The quick brown fox jumps over the lazy dog."
        tokens = harness._encode(text)
        windows = get_rolling_token_windows(tokens, harness._prefix_token, max_length, 1)
        assert list(harness._windows(text)) == [make_disjoint_window(pair) for pair in windows]


def test_unknown_model_argument(home):
    from qwen_moe_jax.inference.lm_eval_model import LMEvalModel

    with pytest.raises(RequestError, match=r"model_args has \['folder', 'batch'\], expected folder"):
        LMEvalModel.create_from_arg_string(f"folder={home / 'model'},batch=4", {"batch_size": 1})
