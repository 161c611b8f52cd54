"""What the commands that write a changed checkpoint have in common."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from qwen_moe_jax.surgery.prune import Reduced
    from qwen_moe_jax.surgery.upcycle import Grown

#: Layers that are printed, and characters of each.
_LAYERS, _WIDTH = 8, 100


def add_folders(parser: argparse.ArgumentParser, source: str) -> None:
    """The source, the target, and the size of files."""
    parser.add_argument("source", metavar="SRC", help=f"{source}: a folder, or a name on the Hub")
    parser.add_argument("target", type=Path, metavar="OUT", help="folder to write; it is complete or not there")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest size of one file (5GB if not given)"
    )


def add_seed(parser: argparse.ArgumentParser, of: str) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=f"of {of} (0 if not given)")


def on_cpu() -> None:
    """Keeps JAX on the CPU: nothing is computed on an accelerator. A partial target is removed on Ctrl-C."""
    import jax

    from qwen_moe_jax.cli.interrupts import raise_interrupts

    jax.config.update("jax_platforms", "cpu")
    raise_interrupts()


def print_grown(target: Path, grown: "Grown") -> None:
    """Prints what has been written, and whether it computes what the source did."""
    moe = grown.moe
    shared = ", and one shared expert" if moe.shared_expert_intermediate_size else ""
    print(
        f"Wrote {target}: model_type {grown.model_type}, {moe.num_experts} experts of {moe.moe_intermediate_size} "
        f"hidden units in each layer, {moe.num_experts_per_tok} a token{shared}."
    )
    if grown.preserved:
        print(
            "Logits are those of SRC up to rounding: layers differ by at most "
            f"{grown.difference:.1e} of their norm in float32."
        )
        return
    print("Logits are not those of SRC:")
    for reason in grown.reasons:
        print(f"  {reason}")


def add_reduction(parser: argparse.ArgumentParser) -> None:
    """What `prune` and `merge` have in common."""
    parser.add_argument("--experts", type=int, required=True, metavar="N", help="experts that each layer keeps")
    parser.add_argument(
        "--top-k", type=int, metavar="N", help="experts that a token chooses; as before, if so many are kept"
    )
    parser.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="text in UTF-8 on which the experts are measured, by layer"
    )
    parser.add_argument(
        "--calibration-tokens", type=int, default=16_384, metavar="N", help="read of it at most (16384 if not given)"
    )
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens of a row (512 if not given)")
    parser.add_argument(
        "--heldout",
        type=Path,
        metavar="FILE",
        help="other text, on which SRC and OUT are scored afterwards; both are loaded for that, one after the other",
    )
    parser.add_argument("--json", action="store_true", help="write the result as JSON")


def calibration_rows(arguments: argparse.Namespace) -> "np.ndarray | None":
    """Rows of tokens [B, T] of the calibration text; None without one.

    Raises:
        RequestError: the file cannot be read, or has fewer tokens than a row.
    """
    if arguments.calibrate is None:
        return None
    import numpy as np

    from qwen_moe_jax.cli.score import read_file
    from qwen_moe_jax.errors import RequestError
    from qwen_moe_jax.huggingface.hub import tokenizer_folder
    from qwen_moe_jax.inference.tokenizer import encode, load_tokenizer

    tokens = encode(load_tokenizer(tokenizer_folder(arguments.source)), read_file(arguments.calibrate))
    window = arguments.window
    rows = min(len(tokens), arguments.calibration_tokens) // window if window > 0 else 0
    if not rows:
        raise RequestError(
            f"{arguments.calibrate}: found {len(tokens):,} token{'s' * (len(tokens) != 1)}, of which at most "
            f"{arguments.calibration_tokens:,} are read (--calibration-tokens); expected at least a row of {window:,} "
            "(--window). Give a longer text or a smaller window."
        )
    return np.array(tokens[: rows * window], np.int32).reshape(rows, window)


def report_reduction(arguments: argparse.Namespace, reduced: "Reduced") -> None:
    """Prints what has been written, and with --heldout what it costs."""
    import json

    scores = {} if arguments.heldout is None else _heldout(arguments)
    if arguments.json:
        groups = [[list(members) for members in layer] for layer in reduced.groups]
        saliency = [layer.tolist() for layer in reduced.saliency]
        content = {"experts": reduced.moe.num_experts, "top_k": reduced.moe.num_experts_per_tok}
        print(json.dumps({**content, "groups": groups, "saliency": saliency, "heldout": scores}))
        return
    print(
        f"Wrote {arguments.target}: {reduced.moe.num_experts} experts in each layer, "
        f"{reduced.moe.num_experts_per_tok} a token."
    )
    for layer, experts in enumerate(reduced.groups[:_LAYERS]):
        shown = ", ".join("+".join(map(str, members)) for members in experts)
        print(f"  sparse layer {layer}: {shown if len(shown) < _WIDTH else shown[:_WIDTH] + ' …'}")
    if len(reduced.groups) > _LAYERS:
        print(f"  … and {len(reduced.groups) - _LAYERS} more; --json lists all of them")
    if scores:
        before, after = scores["before"], scores["after"]
        print(f"Loss on {arguments.heldout}: {before:.4f} before, {after:.4f} after ({after - before:+.4f} a token).")


def _heldout(arguments: argparse.Namespace) -> dict[str, float]:
    """Nats a token of the held-out text under the source and the target."""
    from qwen_moe_jax.cli.score import read_file
    from qwen_moe_jax.huggingface.hub import local_folder
    from qwen_moe_jax.huggingface.load import from_pretrained
    from qwen_moe_jax.inference.score import perplexity
    from qwen_moe_jax.inference.tokenizer import encode, load_tokenizer

    found = {}
    for name, folder in (("before", local_folder(arguments.source)), ("after", arguments.target)):
        tokens = encode(load_tokenizer(folder), read_file(arguments.heldout))
        window = arguments.window
        result = perplexity(from_pretrained(folder), tokens, window=window, stride=max(window // 2, 1))
        found[name] = result.nats_per_token
    return found
