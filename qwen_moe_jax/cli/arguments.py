"""Arguments that several commands share: the checkpoint, and how it is run."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from qwen_moe_jax.config import (
    DTYPES,
    INFERENCE_SHARDING,
    MESH_AXES,
    SHARDING_RULES,
    ExecutionConfig,
    GenerationConfig,
)
from qwen_moe_jax.config.checks import dtype_name
from qwen_moe_jax.config.docs import first_sentence
from qwen_moe_jax.config.execution import DISPATCHERS
from qwen_moe_jax.config.weights import Weights
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.hub import is_hub_name

if TYPE_CHECKING:
    from qwen_moe_jax.model.causal_lm import CausalLM


def add_model_arguments(parser: argparse.ArgumentParser, *, several_adapters: bool = False) -> None:
    """FOLDER, and the arguments of `load_model`; `several_adapters` have names, and the model has none of them."""
    parser.add_argument(
        "folder", type=_folder, metavar="FOLDER", help="a checkpoint with its tokenizer.json, or its name on the Hub"
    )
    if several_adapters:
        text = "a LoRA adapter in PEFT's layout, which requests choose by this name; may be repeated"
        parser.add_argument(
            "--adapter",
            action="append",
            type=_named_folder,
            dest="adapters",
            default=[],
            metavar="NAME=FOLDER",
            help=text,
        )
        parser.set_defaults(adapter=None)
    else:
        parser.add_argument(
            "--adapter", metavar="FOLDER", help="LoRA adapters in PEFT's layout, to run with the checkpoint's weights"
        )
    group = parser.add_argument_group("how the model is run")
    add_mesh_argument(group)
    add_sharding_argument(group)
    add_dtype_argument(group, "of weights and activations; the checkpoint's own if not given")
    add_weights_argument(group)
    add_dispatch_argument(group)
    group.add_argument(
        "--capacity-factor",
        type=float,
        metavar="X",
        help="with --dispatch capacity: slots per expert, as a multiple of a balanced load "
        f"({ExecutionConfig.eval_capacity_factor} if not given)",
    )
    add_cache_argument(group)


def add_cache_argument(group: argparse._ActionsContainer) -> None:
    """`--no-cache`."""
    group.add_argument(
        "--no-cache",
        action="store_true",
        help="do not keep compiled programs in ~/.cache/qwen_moe_jax for the next start, and read none",
    )


def add_mesh_argument(group: argparse._ActionsContainer, text: str = "a mesh over devices") -> None:
    """`--mesh`, as sizes by axis; without it, there are none."""
    group.add_argument(
        "--mesh",
        type=mesh_sizes,
        default={},
        metavar="AXIS=SIZE,…",
        help=f"{text}, for example expert=8,data=2; axes: {', '.join(MESH_AXES)}",
    )


def add_dtype_argument(group: argparse._ActionsContainer, text: str) -> None:
    """`--dtype`, as the name of a dtype or None."""
    group.add_argument("--dtype", type=_dtype, metavar="DTYPE", help=f"{', '.join(DTYPES)}: {text}")


def add_weights_argument(group: argparse._ActionsContainer) -> None:
    """`--weights`."""
    group.add_argument(
        "--weights",
        choices=get_args(Weights),
        help="quantise the matrices of the layers while they are read: a quarter or an eighth of the bytes of float32",
    )


def add_dispatch_argument(group: argparse._ActionsContainer, default: str = "dropless") -> None:
    """`--dispatch`; `default` says in words what happens without it."""
    meaning = first_sentence(ExecutionConfig, "dispatch")
    text = f"{meaning}; {default} if not given. Under capacity, full experts drop tokens"
    group.add_argument("--dispatch", choices=DISPATCHERS, help=text)


def add_calibration_arguments(group: argparse._ActionsContainer, text: str = "") -> None:
    """`--calibrate` and `--calibration`; `text` begins their help."""
    group.add_argument(
        "--calibrate",
        metavar="FILE",
        help=f"{text}the target is this machine: measure its products, copies and collectives for some seconds, write "
        "them to FILE, and plan times with them",
    )
    group.add_argument("--calibration", metavar="FILE", help=f"{text}plan times with the speeds that FILE has")


def add_sharding_argument(group: argparse._ActionsContainer) -> None:
    """`--sharding` of commands that run a model forward, so that the default gathers no weights."""
    group.add_argument(
        "--sharding",
        choices=SHARDING_RULES,
        default=INFERENCE_SHARDING,
        help="how a mesh shards the weights. expert+tensor (the default) gathers none: experts are sharded over "
        "expert, all weights over tensor, and the rest is replicated. Where that does not fit, expert+fsdp shards "
        "everything over fsdp and expert, and gathers each layer's weights for every token",
    )


def add_host_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `join_processes`."""
    group = parser.add_argument_group(
        "several hosts", "the same command on each; process 0 prints and writes. See qmj.initialize_distributed"
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes of a TPU pod slice, a Slurm or an Open MPI job, which JAX recognises",
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where JAX recognises none of these: host of process 0 and a free port. --num-processes and --process-id "
        "have to be given, too",
    )
    group.add_argument("--num-processes", type=int, metavar="N", help="how many processes there are")
    group.add_argument("--process-id", type=int, metavar="I", help="the number of this one, from 0")


def join_processes(arguments: argparse.Namespace) -> bool:
    """Joins the other processes, if arguments of `add_host_arguments` say so, and returns whether. Call it before JAX.

    Raises:
        ShardingError: as `initialize_distributed`.
    """
    found = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if not arguments.distributed and all(value is None for value in found):
        return False
    from qwen_moe_jax.sharding.distributed import initialize_distributed

    initialize_distributed(*found)
    return True


def end_all_processes(code: int, reason: str) -> None:
    """Ends all processes of a distributed run with an exit code; they would wait for this one otherwise."""
    hosts = sys.modules.get("qwen_moe_jax.sharding.distributed")  # not imported yet, there are none
    if hosts is not None:
        hosts.fail(code, reason)


def load_model(arguments: argparse.Namespace, generation: GenerationConfig | None = None) -> "CausalLM":
    """The checkpoint of `add_model_arguments`, in eval mode.

    Args:
        arguments: parsed.
        generation: in place of generation_config.json; None reads the file.

    Raises:
        ConfigError, CheckpointError, ShardingError: as `from_pretrained` and `make_mesh`.
    """
    settings = {name: getattr(arguments, name) for name in ("dtype", "weights", "dispatch", "sharding")}
    if arguments.capacity_factor is not None:
        if arguments.dispatch != "capacity":
            raise ConfigError("--capacity-factor has a meaning with --dispatch capacity only.")
        settings["eval_capacity_factor"] = arguments.capacity_factor
    execution = ExecutionConfig(**settings)

    from qwen_moe_jax.compilation_cache import use_compilation_cache
    from qwen_moe_jax.huggingface.load import from_pretrained
    from qwen_moe_jax.sharding.mesh import make_mesh

    if not arguments.no_cache:
        use_compilation_cache()
    mesh = make_mesh(**arguments.mesh) if arguments.mesh else None
    return from_pretrained(
        arguments.folder, mesh=mesh, execution=execution, adapter=arguments.adapter, generation_config=generation
    )


def mesh_sizes(text: str) -> dict[str, int]:
    """`expert=8,data=2` as {"expert": 8, "data": 2}."""
    sizes: dict[str, int] = {}
    for word in text.split(","):
        axis, _, size = word.strip().partition("=")
        if axis not in MESH_AXES or axis in sizes or not _is_number(size) or int(size) < 1:
            raise argparse.ArgumentTypeError(
                f"found {word!r} in {text!r}, expected AXIS=SIZE words separated by commas, each axis once, of "
                f"{', '.join(MESH_AXES)}, for example expert=8,data=2"
            )
        sizes[axis] = int(size)
    return sizes


def number_ranges(text: str) -> tuple[int, ...]:
    """`0,3-5` as (0, 3, 4, 5): in order, each once."""
    numbers: set[int] = set()
    for word in text.split(","):
        first, dash, last = word.strip().partition("-")
        last = last if dash else first
        if not (_is_number(first) and _is_number(last) and int(first) <= int(last)):
            raise argparse.ArgumentTypeError(
                f"found {word!r} in {text!r}, expected numbers from 0 and rising ranges separated by commas, for "
                "example 0,3-5"
            )
        numbers.update(range(int(first), int(last) + 1))
    return tuple(sorted(numbers))


def format_ranges(numbers: tuple[int, ...]) -> str:
    """(0, 3, 4, 5) as `0,3-5`: the format of `number_ranges`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _named_folder(text: str) -> tuple[str, str]:
    """`name=folder` as a pair."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected NAME=FOLDER")
    return name, folder


def _dtype(text: str) -> str:
    try:
        return dtype_name("--dtype", text)
    except ConfigError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected one of {', '.join(DTYPES)}") from None


def _folder(text: str) -> Path:
    if not Path(text).is_dir() and not is_hub_name(text):
        raise argparse.ArgumentTypeError(f"{text}: no such folder, and no name on the Hub (owner/model) either")
    return Path(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
