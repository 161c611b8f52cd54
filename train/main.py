"""`python -m train CONFIG [--section.key value ...]`. Arguments are parsed before JAX is imported."""

import argparse
import sys

from qwen_moe_jax.cli.arguments import (
    add_cache_argument,
    add_calibration_arguments,
    add_dispatch_argument,
    add_dtype_argument,
    add_host_arguments,
    add_mesh_argument,
    end_all_processes,
    join_processes,
)
from qwen_moe_jax.cli.interrupts import INTERRUPTED, leaving_on_interrupt
from qwen_moe_jax.cli.parser import Parser
from qwen_moe_jax.config import MESH_AXES, SHARDING_RULES
from train.config import TrainConfig, describe_keys, key_options, load_config, split_overrides
from train.errors import CANNOT_WRITE


def main(words: list[str]) -> int:
    """Runs the training that the command line asks for.

    Args:
        words: of the command line, without the program's name.

    Returns:
        The exit code: 0; 1 where loss or gradient are not finite; 2 for a refusal; 74 where a file of the run cannot be
        written (a full disk, say), after which the same command resumes from the last complete checkpoint; 130 for
        Ctrl-C and 143 for SIGTERM, after either of which it resumes the run. Of several processes, all end with the
        code of the one that fails; with 75 where one was killed or crashed, or its host is gone; rarely with 134, where
        JAX was the first to notice. After these two, the same command resumes from the last checkpoint.
    """
    parser = _parser()
    if {"-h", "--help"} & set(words):
        parser.parse_args(["--help"])  # answers and exits

    from qwen_moe_jax.compilation_cache import use_compilation_cache
    from qwen_moe_jax.errors import CheckpointError, ConfigError, ShardingError
    from train.errors import NonFiniteError, SaveError
    from train.folder import open_run_folder
    from train.stopping import LEFT, Stopped, leave

    folder, process_zero = None, True  # which reports for all
    try:
        with leaving_on_interrupt(leave=lambda: leave(folder)):
            overrides, others = split_overrides(words)
            arguments = parser.parse_args(others)
            for name in ("search", "json", "html", "calibrate", "calibration"):
                if getattr(arguments, name) and not arguments.plan:
                    raise ConfigError(f"--{name} has a meaning with --plan only.")
            given = [*_short_options(arguments), *overrides]
            config = load_config(arguments.config, given)
            if arguments.plan:
                _plan(config, arguments, given)
                return 0
            if join_processes(arguments):
                from train.processes import open_shared_run_folder

                _simulate_devices(config)
                folder, finished, process_zero = open_shared_run_folder(config, fresh=arguments.fresh)
            else:
                folder = open_run_folder(config, fresh=arguments.fresh)
                finished = folder.finished
            if not finished:
                _simulate_devices(config)
                if not arguments.no_cache:
                    use_compilation_cache()
                from train.loop import train

                train(config, folder)
            elif process_zero:
                print(
                    f"The run in {folder.path} is finished; --fresh trains it anew, a larger --run.max_steps goes on."
                )
            if process_zero:
                print(folder.describe_result())
    except (CheckpointError, ConfigError, ShardingError) as error:
        return _failed(2, f"{type(error).__name__}: {error}")
    except SaveError as error:
        return _failed(CANNOT_WRITE, f"SaveError: {error}")
    except Stopped as stopped:
        if process_zero:
            print(f"Stopped after step {stopped.step}, saved. The same command goes on from there.", file=sys.stderr)
        return 128 + stopped.signal
    except NonFiniteError as error:
        if process_zero:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _failed(INTERRUPTED, LEFT)
    finally:
        if folder is not None:
            folder.unlock()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m train",
        description="Train a Qwen, Qwen-MoE or Mixtral model from one TOML file, for example configs/train/tiny.toml.",
        epilog="keys: every key of the file can be changed as --section.key value\n\n" + describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        also_known=key_options(),
    )
    parser.add_argument("config", metavar="CONFIG", help="a TOML file")
    parser.add_argument("--fresh", action="store_true", help="delete the run in run.output_dir and start a new one")
    add_cache_argument(parser)
    _add_short_options(parser)
    add_host_arguments(parser)
    parser.add_argument(
        "--plan",
        metavar="TARGET",
        help="instead of training, compile a step for hardware that need not be present, and report its memory, "
        "communication and time: cpu:8, tpu:v5p:4x8x8, gpu:h200:8",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="with --plan: instead of the file's, estimate all meshes of the target's devices with all ways to "
        "recompute, split the batch and exchange tokens, but for keys of the command line; compile the most "
        "promising, and show the best",
    )
    add_calibration_arguments(parser, "with --plan: ")
    parser.add_argument("--json", metavar="FILE", help="with --plan: write the plan as JSON; - for standard output")
    parser.add_argument("--html", metavar="FILE", help="with --plan: write a self-contained page")
    return parser


def _add_short_options(parser: argparse.ArgumentParser) -> None:
    """The options of `qwen-moe-jax` for how a model is run, each in place of keys of the file."""
    group = parser.add_argument_group(
        "how the model is run", "the options of qwen-moe-jax, in place of keys; an option of a key comes before them"
    )
    add_mesh_argument(group, "[mesh]: the sizes of its axes, 1 where one is not named")
    rules = f"sharding.rules: {', '.join(SHARDING_RULES)}"
    group.add_argument("--sharding", choices=SHARDING_RULES, metavar="RULES", help=rules)
    add_dtype_argument(group, "execution.dtype, of activations and matmuls")
    add_dispatch_argument(group, "the file's execution.dispatch")
    group.add_argument("--capacity-factor", metavar="X", help="execution.capacity_factor, with --dispatch capacity")


def _short_options(arguments: argparse.Namespace) -> list[str]:
    """Those that were given, as `load_config` takes overrides."""
    words = {
        "sharding.rules": arguments.sharding,
        "execution.dtype": arguments.dtype,
        "execution.dispatch": arguments.dispatch,
        "execution.capacity_factor": arguments.capacity_factor,
    }
    if arguments.mesh:
        words |= {f"mesh.{axis}": arguments.mesh.get(axis, 1) for axis in MESH_AXES}
    return [f"--{key}={word}" for key, word in words.items() if word is not None]


def _plan(config: TrainConfig, arguments: argparse.Namespace, given: list[str]) -> None:
    """Plans the run's step for `--plan`, as the config says or, with `--search`, as is best; what was given stays."""
    from qwen_moe_jax.plan.calibration import calibration_for
    from qwen_moe_jax.plan.output import show_plan, show_search
    from qwen_moe_jax.plan.targets import parse_target
    from train.plan import paste, plan_rollout, plan_training, search_training

    target, files = arguments.plan, {"json_to": arguments.json, "html_to": arguments.html}
    measured = {"measure_to": arguments.calibrate, "read_from": arguments.calibration}
    calibration = calibration_for(parse_target(target), **measured)
    if arguments.search:
        keys = [word.partition("=")[0].removeprefix("--") for word in given]
        show_search(lambda: search_training(config, target, keys, calibration), target, paste, **files)
    else:
        show_plan(lambda: plan_training(config, target, calibration), target, **files)
        if config.grpo is not None and arguments.json != "-":
            print("\nA token of every completion that is sampled at a time:")
            show_plan(lambda: plan_rollout(config, target, calibration), target, json_to=None, html_to=None)


def _failed(code: int, reason: str) -> int:
    """Prints the reason and ends the other processes, which may not have one."""
    print(reason, file=sys.stderr)
    end_all_processes(code, reason)
    return code


def _simulate_devices(config: TrainConfig) -> None:
    if config.mesh.simulated:
        from qwen_moe_jax.sharding.mesh import simulate_devices

        simulate_devices(config.mesh.devices)  # before JAX looks for devices
