"""`qwen-moe-jax route` shows what the model's own trace says: on the terminal, in the page, as numbers."""

import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx
from rich.cells import cell_len
from rich.console import Console
from tokenizers import decoders, models, pre_tokenizers, trainers

import qwen_moe_jax as qmj
from qwen_moe_jax.cli.main import main
from qwen_moe_jax.cli.route import MARK
from qwen_moe_jax.cli.routing import LayerRouting, PromptRouting
from qwen_moe_jax.cli.routing_page import routing_page
from qwen_moe_jax.cli.routing_table import EXPERTS_LISTED, print_routing
from tests.cases import CASES

PROMPT = "def add(a, b):\n    return a + b  # déjà"
SPARSE_LAYERS = (1, 3)
CAPACITY = ["--dispatch", "capacity", "--capacity-factor", "0.5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose layers 1 and 3 have routers, sure enough of themselves to fill an expert, and its tokenizer."""
    case = CASES["qwen2_moe-mlp_only_layers"]
    config = qmj.ModelConfig.from_pretrained({**case.config, "vocab_size": 300, "initializer_range": 0.4})
    folder = tmp_path_factory.mktemp("route") / "tiny-moe"
    qmj.save_pretrained(qmj.CausalLM(config, rngs=nnx.Rngs(3)), folder)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([PROMPT] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def traces(folder):
    """What the model says itself, without and with a bound on what experts take."""
    tokens = [tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids]

    def router(**execution):
        model = qmj.from_pretrained(folder, execution=qmj.ExecutionConfig(**execution))
        return jax.device_get(model(tokens, output_router_logits=True).router)

    return {"dropless": router(), "capacity": router(dispatch="capacity", eval_capacity_factor=0.5)}


def route(folder, *words: str, prompt: str = PROMPT) -> int:
    return main(["route", str(folder), "--prompt", prompt, *words])


def printed_layers(text: str) -> dict[int, str]:
    """The text below each layer's headline, by the layer's number."""
    parts = re.split(r"^Layer (\d+) · ", text, flags=re.MULTILINE)
    return {int(number): part for number, part in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.mark.parametrize("dispatch, words", [("dropless", []), ("capacity", CAPACITY)])
def test_terminal_shows_the_trace(folder, traces, capsys, monkeypatch, dispatch, words):
    monkeypatch.setenv("COLUMNS", "200")
    assert route(folder, *words) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text  # plain where it is no terminal
    assert f"tiny-moe · {traces[dispatch].trace.experts.shape[2]} tokens · 8 experts · dispatch {dispatch}" in text
    layers = printed_layers(text)
    assert tuple(layers) == SPARSE_LAYERS

    trace, stats = traces[dispatch].trace, traces[dispatch].stats
    assert trace.dropped.any() == (dispatch == "capacity")
    for index, layer in enumerate(SPARSE_LAYERS):
        tokens_part, experts_part = layers[layer].split("expert  load  tokens")
        expected = [
            " · ".join(
                f"{expert} {weight:.2f}".replace(" 0.", " .") + ("✗" if dropped else "")
                for expert, weight, dropped in zip(*choices, strict=True)
            )
            for choices in zip(trace.experts[index, 0], trace.weights[index, 0], trace.dropped[index, 0], strict=True)
        ]
        rows = [re.split(r" {2,}", line.strip(), maxsplit=2) for line in tokens_part.splitlines()[2:] if line.strip()]
        assert [row[0] for row in rows] == [str(number) for number in range(len(expected))]
        assert [re.sub(r" +", " ", row[2]).strip() for row in rows] == expected

        loads = {int(expert): int(load) for expert, load in re.findall(r"^ +(\d+) +(\d+)  \d", experts_part, re.M)}
        counted = stats.tokens_per_expert[index]
        assert loads == {expert: load for expert, load in enumerate(counted) if load}
        assert list(loads.values()) == sorted(loads.values(), reverse=True)
        assert experts_part.count("✗") == trace.dropped[index].sum()

        headline = layers[layer].splitlines()[0]
        assert f"entropy {stats.entropy[index]:.2f} of {np.log(8):.2f} nats" in headline
        assert f"{stats.load_imbalance[index]:.1f} × the mean" in headline
        assert f"dropped {trace.dropped[index].sum()} of {trace.dropped[index].size}" in headline


def test_layers_are_chosen_by_their_true_numbers(folder, capsys):
    assert route(folder, "--layers", "3") == 0
    assert list(printed_layers(capsys.readouterr().out)) == [3]


@pytest.mark.parametrize("words", [[], CAPACITY, ["--mesh", "data=2,expert=2"]], ids=["plain", "capacity", "mesh"])
def test_json_holds_the_numbers(folder, traces, tmp_path, capsys, words):
    file = tmp_path / "routing.json"
    assert route(folder, "--json", str(file), *words) == 0
    assert capsys.readouterr().out.startswith(f"Wrote {file}")
    found = json.loads(file.read_text(encoding="utf-8"))
    router = traces["capacity" if words == CAPACITY else "dropless"]
    assert found["prompt"] == PROMPT
    assert "".join(found["tokens"][:3]) == "def␣add("
    assert [layer["layer"] for layer in found["layers"]] == list(SPARSE_LAYERS)
    for index, layer in enumerate(found["layers"]):
        assert layer["experts"] == router.trace.experts[index, 0].tolist()
        assert layer["dropped"] == router.trace.dropped[index, 0].tolist()
        assert layer["load"] == router.stats.tokens_per_expert[index].tolist()
        np.testing.assert_allclose(layer["weights"], router.trace.weights[index, 0], rtol=1e-4, atol=1e-6)


class Page(HTMLParser):
    """The elements of a page, and the texts of those named title."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.titles: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)
        if tag == "title":
            self.titles.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "title":
            self.titles[-1] += data


@pytest.mark.parametrize("dispatch, words", [("dropless", []), ("capacity", CAPACITY)])
def test_page_holds_the_numbers(folder, traces, tmp_path, dispatch, words):
    file = tmp_path / "routing.html"
    assert route(folder, "--html", str(file), *words) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["routing.html"]
    text = file.read_text(encoding="utf-8")
    page, trace = Page(text), traces[dispatch].trace
    assert not page.open
    assert "tiny-moe" in text and f"<dd>{dispatch}" in text

    cells = [re.match(r"(\d+) .*→ expert (\d+): (\S+)", title, re.DOTALL) for title in page.titles]
    found = [(int(cell[1]), int(cell[2]), cell[3]) for cell in cells if cell]
    layers, _, tokens, active = trace.experts.shape
    expected = [
        (token, trace.experts[layer, 0, token, rank], f"{trace.weights[layer, 0, token, rank]:.3f}")
        for layer, token, rank in np.ndindex(layers, tokens, active)
    ]
    assert found == expected
    outlined = [attributes for tag, attributes in page.elements if attributes.get("class") == "cell lost"]
    assert len(outlined) == trace.dropped.sum()

    bars = [re.match(r"expert (\d+): (\d+) of", title) for title in page.titles]
    loads = sorted((int(bar[1]), int(bar[2])) for bar in bars if bar)
    counted = traces[dispatch].stats.tokens_per_expert
    assert loads == sorted((expert, load) for layer in counted for expert, load in enumerate(layer) if load)


def made_up(tokens: tuple[str, ...], *, layers: int = 1, experts: int = 4, active: int = 2, model: str = "m"):
    numbers = np.random.default_rng(0)

    def layer(number: int) -> LayerRouting:
        chosen = np.argsort(numbers.random((len(tokens), experts)))[:, :active].astype(np.int32)
        return LayerRouting(
            layer=number,
            experts=chosen,
            weights=np.full(chosen.shape, 1 / active, np.float32),
            dropped=np.zeros(chosen.shape, bool),
            load=np.bincount(chosen.ravel(), minlength=experts).astype(np.int32),
            entropy=1.0,
            max_logit=2.0,
            rounds=1,
        )

    return PromptRouting(
        model=model,
        num_layers=layers,
        num_experts=experts,
        dispatch="dropless",
        capacity_factor=None,
        prompt="".join(tokens),
        token_ids=tuple(range(len(tokens))),
        tokens=tokens,
        layers=tuple(map(layer, range(layers))),
    )


def test_rounds_are_shown_where_a_load_exceeded_its_buffers():
    routing = made_up(("a", "b"))
    several = dataclasses.replace(routing, layers=(dataclasses.replace(routing.layers[0], rounds=3),))
    console = Console(width=200, file=io.StringIO(), highlight=False)
    for shown in (routing, several):
        print_routing(shown, console)
    assert console.file.getvalue().count("rounds") == console.file.getvalue().count("3 rounds") == 1
    assert "<dt>rounds</dt><dd>3</dd>" in routing_page(several, mark=MARK)
    assert "rounds" not in routing_page(routing, mark=MARK)


def test_no_text_becomes_a_part_of_the_page():
    """Whatever a prompt holds, the page has the elements and attributes that harmless words of its length bring."""
    bad = ("</title><script>alert(1)</script>", '" onload="alert(1)', "'><img src=x>", "</svg></style>", "&lt;b&gt;")
    harmless = tuple("x" * len(token) for token in bad)

    def outline(tokens, model):
        page = Page(routing_page(made_up(tokens, model=model), mark=MARK))
        assert not page.open
        return [(tag, sorted(attributes)) for tag, attributes in page.elements], page.titles

    found, titles = outline(bad, "</title><script>")
    expected, _ = outline(harmless, "y" * len("</title><script>"))
    assert found == expected
    assert "script" not in {tag for tag, _ in found}
    assert any("&lt;b&gt;" in title for title in titles)  # shown as it was typed


def test_page_loads_nothing_and_stays_small():
    tokens = tuple(f"␣word{number}" for number in range(60))
    text = routing_page(made_up(tokens, layers=48, experts=128, active=8), mark=MARK)
    assert len(text.encode()) < 5e6
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|url\(|src=|@import|<link|<script", text)


@pytest.mark.parametrize("width", [24, 40, 80])
def test_narrow_terminals_and_many_experts(width):
    routing = made_up(("def", "␣a_name_that_does_not_end", "漢字", "(") * 20, experts=128, active=8)
    console = Console(width=width, file=io.StringIO(), highlight=False)
    print_routing(routing, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    experts_from = next(number for number, line in enumerate(lines) if line.startswith("expert  load"))
    assert "more experts with" in " ".join(lines[experts_from:])
    assert len(lines) - experts_from <= 2 * EXPERTS_LISTED + 5
    for token in range(80):  # every token has its row, with every choice in it
        assert any(re.match(rf" *{token} ", line) for line in lines[:experts_from])
    assert sum(line.count(".12") for line in lines[:experts_from]) == 80 * 8


@pytest.mark.parametrize(
    "words, prompt, message",
    [
        ([], "", "the prompt is empty"),
        ([], "a\udce4", "not valid UTF-8"),
        (["--layers", "0-1"], "x", "--layers: layer 0 has no router, expected some of 1,3."),
        (["--layers", "9"], "x", "--layers: layer 9 does not exist, expected some of 1,3."),
        (["--capacity-factor", "2"], "x", "--capacity-factor has a meaning with --dispatch capacity only"),
        (["--dispatch", "capacity", "--capacity-factor", "-1"], "x", "expected a positive number"),
        (["--mesh", "data=512"], "x", "data=512 needs 512 devices"),
        (["--html", "/nowhere/at/all.html"], "x", "there is no folder /nowhere/at"),
    ],
)
def test_refusals(folder, capsys, words, prompt, message):
    assert route(folder, *words, prompt=prompt) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("qwen-moe-jax route: error: ") and message in error


def test_a_file_is_routed_as_the_prompt_that_it_holds(folder, tmp_path, capsys):
    def found(*words):
        assert main(["route", str(folder), *words, "--json", str(tmp_path / "routing.json")]) == 0
        return json.loads((tmp_path / "routing.json").read_text(encoding="utf-8"))

    expected = found("--prompt", PROMPT)
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    (tmp_path / "prompt.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    assert found("--file", str(tmp_path / "prompt.txt")) == found("--file", str(tmp_path / "prompt.jsonl")) == expected


def test_a_conversation_of_a_file_is_routed_as_the_chat_template_writes_it(folder, tmp_path, capsys):
    own = shutil.copytree(folder, tmp_path / "chat")
    (own / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "add"}]}))
    assert main(["route", str(own), "--file", str(tmp_path / "a.jsonl"), "--json", str(tmp_path / "routing.json")]) == 0
    assert json.loads((tmp_path / "routing.json").read_text(encoding="utf-8"))["prompt"] == "<user>add"


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n', "a.jsonl: found 2 requests, expected one: route shows one"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "found no chat template"),
        ("a.txt", "", "the prompt is empty"),
    ],
)
def test_a_file_that_holds_no_prompt_is_refused(folder, tmp_path, capsys, name, text, message):
    (tmp_path / name).write_text(text)
    assert main(["route", str(folder), "--file", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):  # one of both
        main(["route", str(folder), "--file", str(tmp_path / name), "--prompt", "a"])


def test_model_without_routers(tmp_path, capsys):
    """Refused by its config alone: no weights are there to be read."""
    (tmp_path / "config.json").write_text(json.dumps(CASES["qwen3-plain"].config))
    assert route(tmp_path) == 2
    assert "no layer of this model has a router" in capsys.readouterr().err


def test_tokenizer_of_another_model(folder, tmp_path, capsys):
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 97}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert route(tmp_path) == 2
    assert "below the model's vocab_size=97" in capsys.readouterr().err


def test_only_files_of_its_own_are_replaced(folder, tmp_path, capsys):
    page, notes = tmp_path / "page.html", tmp_path / "notes.html"
    for _ in range(2):
        assert route(folder, "--layers", "1", "--html", str(page)) == 0
    notes.write_text("mine")
    assert route(folder, "--html", str(notes)) == 2
    assert "was not written by this command" in capsys.readouterr().err
    assert notes.read_text() == "mine"
