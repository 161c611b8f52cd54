"""`qwen-moe-jax score`: the perplexity of a text file."""

import argparse
import dataclasses
import json
from pathlib import Path

from qwen_moe_jax.cli.arguments import add_model_arguments, load_model
from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.storage.git_lfs import lfs_problem
from qwen_moe_jax.text_files import read_text

SUMMARY = "measure how well a checkpoint predicts a text file: its perplexity"

#: Endings of files that hold records, not a text.
RECORDS = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".parquet")
#: Windows longer than this are asked for: what attention needs grows with their square.
LONGEST_DEFAULT = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help="the text, in UTF-8")
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help=f"tokens that the model sees at once; the model's own, but at most {LONGEST_DEFAULT}, if not given",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens that the window moves: fewer give every token more context and take longer; half a window if not "
        "given",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> None:
    """Prints the perplexity.

    Raises:
        RequestError: a file, window or stride that cannot be; nothing has been loaded then.
        ConfigError, CheckpointError, ShardingError: as `from_pretrained` and `make_mesh`.
    """
    content = read_file(arguments.file)

    from qwen_moe_jax.config import ModelConfig
    from qwen_moe_jax.huggingface.hub import local_folder
    from qwen_moe_jax.inference.progress import progress_bar
    from qwen_moe_jax.inference.score import perplexity, sliding_windows, token_array
    from qwen_moe_jax.inference.tokenizer import encode, load_tokenizer

    # Weights take minutes to read: all that can be refused without them is refused first.
    folder = local_folder(arguments.folder)
    config = ModelConfig.from_pretrained(folder)
    tokens = encode(load_tokenizer(folder), content)
    token_array(str(arguments.file), tokens, config.vocab_size)
    window = min(config.max_position_embeddings, LONGEST_DEFAULT) if arguments.window is None else arguments.window
    stride = max(window // 2, 1) if arguments.stride is None else arguments.stride
    sliding_windows(len(tokens), window, stride)

    model = load_model(arguments)
    with progress_bar("windows") as advance:
        result = perplexity(
            model, tokens, window=window, stride=stride, num_bytes=len(content.encode()), progress=advance
        )
    numbers = {
        "perplexity": result.perplexity,
        "nats_per_token": result.nats_per_token,
        "bits_per_byte": result.bits_per_byte,
    }
    if arguments.json:
        settings = {"model": arguments.folder.resolve().name, "file": str(arguments.file)}
        print(json.dumps({**settings, "window": window, "stride": stride, **numbers, **dataclasses.asdict(result)}))
        return
    print(f"{arguments.file}: {len(tokens):,} tokens, {result.num_bytes:,} bytes; window {window}, stride {stride}")
    for name, number in numbers.items():
        print(f"  {name.replace('_', ' '):<16}{number:.4f}")


def read_file(path: Path) -> str:
    """A text file.

    Raises:
        RequestError: it cannot be read, is not UTF-8, or holds records in place of a text.
    """
    if path.name.endswith(RECORDS):
        raise RequestError(
            f"{path}: holds records, whose braces, names and escapes would be read as text; expected a text file. "
            "Write the texts into one (jq -r .text FILE > FILE.txt), or score them one by one with qwen_moe_jax.score."
        )
    if (problem := lfs_problem(path)) is not None:
        raise RequestError(f"{path}: {problem}.")
    try:
        return read_text(path)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: byte {error.start} is not UTF-8. Convert the file first.") from None
