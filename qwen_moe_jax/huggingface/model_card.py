"""A checkpoint folder's model card: README.md with the Hub's metadata, made of what its files, run and results say."""

import dataclasses
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from qwen_moe_jax.errors import CheckpointError, ConfigError
from qwen_moe_jax.huggingface.config import read_config
from qwen_moe_jax.huggingface.fields import read_json
from qwen_moe_jax.huggingface.summary import Summary, summarize
from qwen_moe_jax.text_files import read_text
from qwen_moe_jax.units import format_bytes, format_count

CARD = "README.md"
#: The Hub's name of a task, by class.
_TASKS = {
    "CausalLM": ("text-generation", "causal language model"),
    "SequenceClassifier": ("text-classification", "classifier of texts"),
    "TokenClassifier": ("token-classification", "classifier of tokens"),
}
#: Where folders of a recipe are on its machine is private: their last names are enough.
_FOLDERS = re.compile(r'"(?:/|~|\.\.?/)[^"\n]*/([^"/\n]+)/?"')
#: Name of the folder that a training run exports into its own.
_EXPORT = "hub"
#: Rows of held-out losses: the last ones.
_ROWS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a card says that the checkpoint itself does not.

    Attributes:
        base_model: names on the Hub of the models that this one was made of; None is the one that the run started
            from, if it has such a name.
        license: the Hub's name of a licence, as "apache-2.0".
        tags: in addition to the family and the package.
        run: folder of the training run, of which recipe and held-out losses are shown; None is that of a folder which
            a run has exported (RUN/hub).
        results: JSON files of `score --json`, `verify --json` and lm-eval.
    """

    base_model: tuple[str, ...] | None = None
    license: str | None = None
    tags: tuple[str, ...] = ()
    run: str | PathLike[str] | None = None
    results: tuple[str | PathLike[str], ...] = ()


def write_card(folder: Path, details: ModelCard = ModelCard(), *, replace: bool = False) -> Path:
    """Writes a folder's model card.

    Args:
        folder: a complete checkpoint.
        details: what its files do not say.
        replace: replace a card that is there.

    Raises:
        CheckpointError: the folder has a card, or does not load; a file of the details cannot be read.
    """
    target = folder / CARD
    if target.exists() and not replace:
        raise CheckpointError(f"{target} is there, and is not replaced unasked: with --replace it is.")
    target.write_text(model_card(folder, details), encoding="utf-8")
    return target


def model_card(folder: Path, details: ModelCard = ModelCard(), *, name: str | None = None) -> str:
    """The text of a folder's model card, with its metadata in YAML.

    Args:
        folder: a complete checkpoint.
        details: what its files do not say.
        name: of the model; None is the folder's.

    Raises:
        CheckpointError: the folder does not load; a file of the details cannot be read.
    """
    from huggingface_hub import ModelCardData

    summary = complete_summary(folder)
    task, kind = _TASKS[summary.head]
    run = _run(folder, details)
    started = run.config.get("run", {}).get("model_name_or_path", "") if run is not None else ""
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+(@.*)?", started) and not Path(started).exists()
    base = details.base_model if details.base_model is not None else ((started.split("@")[0],) if is_name else ())
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        license=details.license,
        base_model=list(base) or None,
        tags=list(dict.fromkeys([summary.model_type, "jax", "qwen_moe_jax", *details.tags])),
    )
    path = folder.resolve()
    title = name or (path.parent.name if path.name == _EXPORT else path.name)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title.rpartition('/')[2]}",
        _headline(summary, kind, base),
        f"## Model\n\n{_table(_model_rows(folder, summary))}",
        f"## Use\n\n{_use(title, summary)}",
    ]
    if run is not None:
        parts.append(f"## Training\n\n{_training(run)}")
    if details.results:
        parts.append("## Results\n\n" + "\n\n".join(_result(Path(path)) for path in details.results))
    return "\n\n".join(parts) + "\n"


def complete_summary(folder: Path) -> Summary:
    """The summary of a Hub folder that loads.

    Raises:
        CheckpointError: it does not load, or is a native folder.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds low-rank adapters and no model, and a model card is of a model: `push` uploads adapters "
            f"as they are; qwen-moe-jax convert BASE OUT --adapter {folder} writes what they make of their base."
        )
    summary = summarize(folder)
    if summary.problems:
        raise CheckpointError(f"{folder} does not load:\n  " + "\n  ".join(summary.problems))
    if summary.form == "native folder":
        raise CheckpointError(
            f"{folder} is a native folder, which only this package reads: expected safetensors. Convert it first: "
            f"qwen-moe-jax convert {folder} OUT."
        )
    return summary


def _headline(summary: Summary, kind: str, base: Sequence[str]) -> str:
    active = f", of which a token uses {format_count(summary.active_parameters)}" if _is_sparse(summary) else ""
    made = " and ".join(f"[{name}](https://huggingface.co/{name})" for name in base)
    return (
        f"A {kind} of the family `{summary.model_type}` with {format_count(summary.parameters)} parameters{active}"
        + (f", made of {made}" if made else "")
        + "."
    )


def _is_sparse(summary: Summary) -> bool:
    return summary.active_parameters < summary.parameters


def _model_rows(folder: Path, summary: Summary) -> list[tuple[str, str]]:
    config = read_config(folder / "config.json")
    attention, moe = config.attention, config.moe
    rows = [
        ("parameters", f"{summary.parameters:,}"),
        ("active parameters", f"{summary.active_parameters:,}" if _is_sparse(summary) else ""),
        ("next-token head", f"{summary.mtp_parameters:,} parameters" if summary.mtp_parameters else ""),
        ("layers", summary.layers),
        ("experts", f"{moe.num_experts}, {moe.num_experts_per_tok} a token" if moe is not None else ""),
        ("hidden size", f"{config.hidden_size:,}"),
        ("attention", f"{attention.num_attention_heads} heads of {attention.head_dim}, "
                      f"{attention.num_key_value_heads} of keys and values"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("positions", f"{config.max_position_embeddings:,}"),
        ("weights", f"{format_bytes(summary.nbytes)}, {', '.join(sorted({row.dtype for row in summary.rows}))}"),
    ]  # fmt: skip
    return [row for row in rows if row[1]]


def _use(name: str, summary: Summary) -> str:
    auto = {"CausalLM": "CausalLM", "SequenceClassifier": "SequenceClassification"}.get(
        summary.head, "TokenClassification"
    )
    return (
        "```python\n"
        f'from transformers import AutoModelFor{auto}\n\nmodel = AutoModelFor{auto}.from_pretrained("{name}")\n```\n\n'
        "or in JAX\n\n"
        "```python\n"
        f'import qwen_moe_jax as qmj\n\nmodel = qmj.{summary.head}.from_pretrained("{name}")\n```'
    )


@dataclasses.dataclass(frozen=True)
class _Run:
    """A training run: its settings as text and as tables, and the records of its steps."""

    toml: str
    config: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]


def _run(folder: Path, details: ModelCard) -> _Run | None:
    path = Path(details.run) if details.run is not None else folder.resolve().parent
    exported = folder.resolve().name == _EXPORT and (path / "metrics.jsonl").is_file()
    if details.run is None and not exported:
        return None
    try:
        toml = read_text(path / "config.toml")
        lines = read_text(path / "metrics.jsonl").splitlines()
        return _Run(toml, tomllib.loads(toml), tuple(json.loads(line) for line in lines))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected the folder of a training run ({error}).") from None


def _training(run: _Run) -> str:
    steps = [record for record in run.records if "loss" in record and "heldout_loss" not in record]
    heldout = [(record["step"], record["heldout_loss"]) for record in run.records if "heldout_loss" in record]
    tokens = sum(record.get("tokens", 0) for record in steps)
    parts = [f"Trained for {len(steps):,} steps on {tokens:,} tokens by `python -m train` of qwen_moe_jax."]
    if heldout:
        rows = [(f"{step:,}", f"{loss:.4f}") for step, loss in heldout[-_ROWS:]]
        parts.append("Held-out loss in nats a token:\n\n" + _table(rows, ("step", "loss")))
    recipe = _FOLDERS.sub(r'"\1"', run.toml).strip()
    parts.append(f"<details><summary>Settings</summary>\n\n```toml\n{recipe}\n```\n\n</details>")
    return "\n\n".join(parts)


def _result(path: Path) -> str:
    """One file of results, by the keys that it has."""
    try:
        found = read_json(path)
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path}: expected a JSON file of results ({error}).") from None
    if isinstance(found.get("results"), dict):
        rows = [
            (task, key.partition(",")[0], f"{value:.4f}")
            for task, values in found["results"].items()
            for key, value in values.items()
            if isinstance(value, float) and "stderr" not in key
        ]
        return "lm-eval:\n\n" + _table(rows, ("task", "metric", "value"))
    if "nats_per_token" in found:
        words = [("perplexity", "perplexity"), ("nats a token", "nats_per_token"), ("bits a byte", "bits_per_byte")]
        text = f"`{Path(str(found.get('file', ''))).name}`, windows of {found.get('window')} tokens:"
        return f"{text}\n\n" + _table([(word, f"{found[key]:.4f}") for word, key in words], ("measure", "value"))
    if "verdict" in found:
        verdicts = {
            "same": "equal in every bit",
            "rounding": "equal up to rounding",
            "reordered": "the same function, with experts in another order",
            "differs": "different models",
        }
        first, second = (Path(str(found.get(key, ""))).name for key in ("first", "second"))
        verdict = verdicts.get(str(found["verdict"]), found["verdict"])
        return f"`{first}` and `{second}` compared by `qwen-moe-jax verify`: {verdict} ({found['tensors']:,} tensors)."
    raise CheckpointError(
        f"{path}: found the keys {', '.join(list(found)[:8])}; expected the JSON of `score --json`, `verify --json` or "
        "lm-eval."
    )


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ("", "")) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
