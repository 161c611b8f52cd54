"""The page of a run: whole from a recorded metrics.jsonl, whatever state the run is in, and of one file alone."""

import json
import re
import subprocess
import sys
import xml.dom.minidom
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")

from tests.train.recorded import step_records
from train import report
from train.config import build_config, to_toml
from train.folder import RunFolder
from train.reporting.figures import _thinned
from train.reporting.metrics import read_metrics


def write_run(path, records: list[dict], tail: str = "") -> RunFolder:
    path.mkdir()
    folder = RunFolder(path)
    config = build_config({"model": {"model_type": "qwen3_moe"}}, ["--run.sample_prompt=<b>&"], source="test")
    folder.config.write_text(to_toml(config))
    folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return folder


def page_of(folder: RunFolder) -> str:
    page = report.write_report(folder).read_text(encoding="utf-8")
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        xml.dom.minidom.parseString(svg)
    return page


def titles(page: str) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", page)


class References(HTMLParser):
    """All that a page would load, run or lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes):
        if tag in ("script", "link", "iframe", "object"):
            self.found.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not value.startswith(("#", "data:image/png;base64,")):
                self.found.append(value)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "a <run>"
    return page_of(write_run(path, step_records(1, 8)))


def test_a_page_shows_losses_speed_time_routers_and_what_ran(page):
    learning = ["Loss", "Speed and MFU", "Gradient norm", "Learning rate", "Time of a step"]
    routers = ["Load-balancing loss", "Largest load", "Dropped", "Entropy of the routers", "Load of the experts"]
    assert titles(page) == learning + routers
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts["step"] == "8" and facts["tokens"] == "512"
    assert facts["held-out loss"] == "4.250" and facts["training loss"] == "4.550"
    assert facts["tokens/s"] == "640" and facts["per device"] == "80" and facts["MFU"] == "31.4%"
    assert facts["dropped"] == "5.0%" and facts["largest load"] == "1.5 × the mean"
    assert facts["time"] == "1.30 s: steps 54%, compiling 8%, evaluation 38%"
    assert facts["parameters"] == "1,000, 400 active per token"
    assert facts["mesh"] == "data=2, expert=4" and facts["devices"] == "8 × TPU v4"
    assert facts["each device holds"] == "2.00 MB of weights, 4.00 MB of moments, 2.00 MB of gradients"
    assert facts["execution"] == "dispatch capacity" and facts["versions"] == "jax 0.10.2"
    assert "[optimizer]" in page and "Training run, not finished" in page


def test_a_page_needs_nothing_besides_itself_and_escapes_what_it_quotes(page):
    references = References()
    references.feed(page)
    assert references.found == []
    assert "a &lt;run&gt;" in page and "&lt;b&gt;&amp;" in page and "<b>" not in page
    # Its figures have the page's colours, and no placeholders are left.
    assert "var(--dim)" in page and not re.search("#010203|#040506|#070809", page)


def test_a_page_lists_samples_over_steps_and_of_many_the_first_and_the_last_and_some_between(tmp_path):
    samples = [{"step": step, "prompt": "<def", "sample": f" f{step}(a & b)"} for step in range(0, 50)]
    folder = write_run(tmp_path / "run", [*step_records(1, 50), *samples])
    folder.finish({"steps": 50, "prompt": "<def", "sample": " the end"})
    page = page_of(folder)
    shown = re.findall(r"<dt>step (\d+)</dt><dd><pre><span>&lt;def</span>(.*?)</pre>", page)
    assert len(shown) == 12 and shown[0] == ("0", " f0(a &amp; b)") and shown[-1] == ("50", " the end")
    assert "<h2>Samples" not in page_of(write_run(tmp_path / "none", step_records(1, 4)))


def test_a_line_that_is_being_written_is_left_for_later(tmp_path):
    folder = write_run(tmp_path / "going", step_records(1, 4), tail='{"step": 5, "loss": 3.')
    assert [record["step"] for record in read_metrics(folder.metrics).steps] == [1, 2, 3, 4]
    assert "<dt>step</dt><dd>4</dd>" in page_of(folder)


def test_a_run_that_was_gone_on_with_has_neither_start_s_compilation_in_its_speed(tmp_path):
    folder = write_run(tmp_path / "twice", [*step_records(1, 4), *step_records(5, 8)])
    metrics = read_metrics(folder.metrics)
    assert [record["step"] for record in metrics.timed_steps] == [2, 3, 4, 6, 7, 8]
    folder.finish({})
    page = page_of(folder)
    assert "Training run, finished" in page and "<dt>step</dt><dd>8</dd>" in page


def test_a_dense_run_after_one_step_on_an_unknown_chip_has_a_page(tmp_path):
    records = [record for record in step_records(1, 1) if "layers" not in record and "heldout_loss" not in record]
    records[0]["start"] |= {"sparse_layers": [], "peak_flops": None}
    del records[1]["mfu"]
    page = page_of(write_run(tmp_path / "dense", records))
    assert titles(page) == ["Loss", "Speed", "Gradient norm", "Learning rate", "Time of a step"]
    assert "MFU" not in page and "dropped" not in page and "held-out" not in page.split("<main>")[0]


def test_rounds_are_shown_where_a_load_exceeded_its_buffers(tmp_path, page):
    records = step_records(1, 2)
    records[4]["layers"]["rounds"] = [1, 3]  # of step 2
    assert "<dt>rounds</dt><dd>3 of dropless buffers" in page_of(write_run(tmp_path / "skewed", records))
    assert "<dt>rounds" not in page


def test_many_steps_are_thinned_to_means():
    import numpy as np

    steps, values = _thinned(np.arange(1, 2502), np.arange(2501) % 3)
    assert len(steps) == len(values) == 834
    assert (steps[0], values[0]) == (2, 1) and steps[-1] == 2500.5


@pytest.mark.parametrize(
    ("records", "complaint"), [(None, "there is no such file"), (step_records(1, 0), "no training step yet")]
)
def test_a_folder_without_a_step_is_refused(tmp_path, capsys, records, complaint):
    folder = tmp_path / "empty"
    if records is not None:
        write_run(folder, records)
    assert report.main([str(folder)]) == 2
    assert complaint in capsys.readouterr().err


def test_several_runs_are_compared_by_results_curves_and_settings(tmp_path, capsys):
    one, other = (write_run(tmp_path / name, step_records(1, 8)) for name in ("one", "other <b>"))
    other.config.write_text(other.config.read_text().replace("learning_rate = 0.003", "learning_rate = 0.25"))
    records = [{**record, "rewards/margins": 1.5} if "loss" in record else record for record in step_records(1, 8)]
    other.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    file = tmp_path / "both.html"
    assert report.main([str(one.path), str(other.path), "--output", str(file)]) == 0
    assert capsys.readouterr().out == f"wrote {file}\n"
    page = file.read_text(encoding="utf-8")
    references = References()
    references.feed(page)
    assert references.found == [] and "<b>" not in page and "other &lt;b&gt;" in page
    found = titles(page)
    assert {"held-out loss", "training cross_entropy", "training rewards/margins", "training gradient_norm"} <= {*found}
    assert re.search(r"<th>optimizer.learning_rate</th><td>0.003</td><td>0.25</td>", page)
    assert "optimizer.beta1" not in page  # on which both agree


def test_help_answers_without_jax():
    code = (
        "import sys; from train import report\n"
        "try: report.main(['--help'])\n"
        "except SystemExit: print(sorted({'jax', 'grain', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")
