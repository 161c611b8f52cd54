"""What README and docs show is true of the code: Python runs, commands are accepted, settings are valid."""

import ast
import json
import re
import shutil
import tomllib

import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.cli.main import _parser as command_line
from qwen_moe_jax.server.protocol import ChatRequest, CompletionRequest, parse
from tests.docs.snippets import PAGES, ROOT, blocks, commands
from tests.inference.checkpoints import make_checkpoint
from train.config import describe_keys, load_config, split_overrides
from train.data.records import read_record

MODEL = tomllib.loads((ROOT / "configs/train/tiny.toml").read_text())["model"]
KEYS = set(re.findall(r"^\s*--(\w+\.\w+)", describe_keys(), re.MULTILINE))
SECTIONS = {key.split(".")[0] for key in KEYS}


def ids(page):
    return page.relative_to(ROOT).as_posix()


def having(language):
    return [page for page in PAGES if blocks(page, language)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("snippets") / "model")


@pytest.fixture
def folder(checkpoint, tmp_path, monkeypatch):
    """A working folder in which the names that the pages use are a tiny checkpoint."""
    for name in ("path/to/Qwen3-30B-A3B", "path/to/Mixtral-8x7B-v0.1", "runs/sft-tiny/hub"):
        shutil.copytree(checkpoint, tmp_path / name)
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", having("python"), ids=ids)
def test_the_python_of_a_page_runs_from_its_first_block_to_its_last(page, folder, capsys):
    namespace = {"__name__": "snippet"}
    for block in blocks(page, "python"):
        code = compile("\n" * (block.line - 1) + block.text, block.where, "exec")
        if block.runs:
            exec(code, namespace)


@pytest.mark.parametrize("page", having("sh"), ids=ids)
def test_the_commands_of_a_page_are_accepted(page, folder):
    for block in blocks(page, "sh"):
        for words in commands(block) if block.runs else []:
            check_command(words, block.where)


def check_command(words, where):
    match words:
        case ["make", *targets]:
            known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {word for word in targets if "=" not in word} <= set(known), where
        case ["qwen-moe-jax", *rest]:
            command_line().parse_args(rest)
        case ["python", "-m", "train", config, *rest]:
            overrides, others = split_overrides(rest)
            load_config(config, overrides)
            check_train_options(others, where)
        case ["python", "-m", module, *_]:
            file = ROOT / module.replace(".", "/")
            assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), where
        case ["python", script, *_]:
            assert (ROOT / script).exists(), where
        case ["curl", url, "-H", "Content-Type: application/json", "-d", body]:
            bodies = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}
            parse(bodies[url.removeprefix("http://127.0.0.1:8000")], body.encode())
        case ["pip", "install", *_] | ["pre-commit", *_] | ["git", *_]:
            pass
        case _:
            pytest.fail(f"{where}: no check is known for the command {words}")


def check_train_options(words, where):
    source = (ROOT / "train/main.py").read_text() + (ROOT / "qwen_moe_jax/cli/arguments.py").read_text()
    for word in words:
        assert not word.startswith("--") or f'"{word}"' in source, f"{where}: {word}"


@pytest.mark.parametrize("page", having("toml"), ids=ids)
def test_the_settings_of_a_page_are_valid(page, folder):
    for block in blocks(page, "toml"):
        text = block.text
        tables = tomllib.loads(text)
        if "model" not in tables and "model_name_or_path" not in tables.get("run", {}):
            text += "\n[model]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in MODEL.items())
        file = folder / "config.toml"
        file.write_text(text)
        load_config(file, {})


def test_the_records_of_the_data_page_show_every_form():
    records = [line for block in blocks(ROOT / "docs/data.md", "json") for line in block.text.splitlines()]
    forms = [read_record(json.loads(line), line).form for line in records]
    assert list(dict.fromkeys(forms)) == [
        "texts",
        "conversations",
        "conversations in ShareGPT's form (from, value)",
        "Alpaca's instructions and outputs",
        "prompts and completions of text",
        "prompts and completions of messages",
    ]


def toml(value):
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_keys_extras_and_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    sections = "|".join(SECTIONS)
    named = re.findall(rf"(?:`|--)((?:{sections})\.[a-z0-9_]+)\b(?!\()", text)
    assert {key for key in named if key not in KEYS} - {"data.sources"} == set()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"'\.\[([\w-]+)\]'", text)) <= set(extras)
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
    for path in re.findall(r"`((?:examples|benchmarks|configs|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_api_reference_has_every_public_name_once():
    named = re.findall(r"^::: qwen_moe_jax\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(named) == qmj.__all__


def test_every_public_name_is_there():
    for name in qmj.__all__:
        assert getattr(qmj, name).__doc__, name


def test_the_legend_of_shape_letters_is_the_one_of_the_notation_page():
    legend = dict(re.findall(r"\b([A-Z])  ([\w/-]+(?: [\w/-]+)*)", qmj.__doc__))
    page = re.findall(r"^\| `([A-Z])` \| ([\w/-]+(?: [\w/-]+)*)", (ROOT / "docs/notation.md").read_text(), re.MULTILINE)
    assert len(legend) == 16 and dict(page).keys() == legend.keys()
    for letter, meaning in page:
        assert meaning.startswith(legend[letter]) or legend[letter].startswith(meaning), letter


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_messages_of_the_troubleshooting_page_are_messages_of_the_code():
    texts = []
    for path in [*ROOT.glob("qwen_moe_jax/**/*.py"), *ROOT.glob("train/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    code = "\n".join(texts)
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").split("## Without a message")[0]
    messages = re.findall(r"^\| `(.*?)` \|", page, re.MULTILINE)
    assert len(messages) > 25
    unknown = [message for message in messages if any(part.strip() not in code for part in message.split("…"))]
    assert unknown == []
