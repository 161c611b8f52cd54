"""`qwen-moe-jax merge`: a mixture of experts with similar experts averaged."""

import argparse

from qwen_moe_jax.cli.surgery import add_folders, add_reduction, calibration_rows, on_cpu, report_reduction
from qwen_moe_jax.errors import RequestError

SUMMARY = (
    "average each expert of a mixture with the one of the most chosen whose router logits on a text are most like its "
    "own"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folders(parser, "a mixture of experts")
    add_reduction(parser)


def run(arguments: argparse.Namespace) -> None:
    """Writes the smaller mixture, and prints which experts are together.

    Raises:
        RequestError: there is no text, or it cannot be read.
        ConfigError, CheckpointError: as `merge`; the target is untouched then.
    """
    if arguments.calibrate is None:
        raise RequestError("--calibrate is missing: which experts are similar is measured on a text. Give its file.")
    on_cpu()
    from qwen_moe_jax.surgery.prune import merge

    reduced = merge(
        arguments.source,
        arguments.target,
        num_experts=arguments.experts,
        tokens=calibration_rows(arguments),
        num_experts_per_tok=arguments.top_k,
        max_shard_size=arguments.max_shard_size,
    )
    report_reduction(arguments, reduced)
