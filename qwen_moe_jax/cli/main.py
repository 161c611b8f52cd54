"""`qwen-moe-jax COMMAND …`. Arguments are parsed before anything heavy is imported."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen_moe_jax import __version__
from qwen_moe_jax.cli import (
    card,
    chat,
    convert,
    evaluate,
    generate,
    grow,
    inspect,
    merge,
    plan,
    prune,
    push,
    route,
    score,
    serve,
    split,
    upcycle,
    verify,
)
from qwen_moe_jax.cli.arguments import end_all_processes
from qwen_moe_jax.cli.interrupts import INTERRUPTED, leaving_on_interrupt
from qwen_moe_jax.cli.parser import Parser
from qwen_moe_jax.errors import CheckpointError, ConfigError, RequestError, ShardingError

#: The exit code where the output cannot be written: EX_IOERR of sysexits.h.
CANNOT_WRITE = 74

#: A command is a module with `SUMMARY` (a line of help), `add_arguments(parser)` and `run(arguments)`, which may
#: return an exit code. It imports JAX in `run`, so that help and refused arguments need not wait for it.
COMMANDS = {
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "route": route,
    "score": score,
    "eval": evaluate,
    "inspect": inspect,
    "convert": convert,
    "verify": verify,
    "upcycle": upcycle,
    "grow": grow,
    "split": split,
    "prune": prune,
    "merge": merge,
    "card": card,
    "push": push,
    "plan": plan,
}


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        words: of the command line, without the program's name; None takes this process's own.

    Returns:
        The exit code: 0, the command's own (`verify`: 1), 2 for a refusal (one message on stderr), 74 where the output
        cannot be written (a full disk), 130 for Ctrl-C, 141 for a reader that has gone.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an unencodable character is no reason to stop
    arguments = _parser().parse_args(words)
    try:
        with leaving_on_interrupt(leave=lambda: end_all_processes(INTERRUPTED, "Ctrl-C")):
            code = COMMANDS[arguments.command].run(arguments)
            sys.stdout.flush()
    except (CheckpointError, ConfigError, RequestError, ShardingError) as error:
        print(f"qwen-moe-jax {arguments.command}: error: {error}", file=sys.stderr)
        end_all_processes(2, f"{type(error).__name__}: {error}")
        return 2
    except KeyboardInterrupt:
        end_all_processes(INTERRUPTED, "Ctrl-C")
        return INTERRUPTED
    except BrokenPipeError:  # the reader has closed the pipe: `… | head`
        _drop_output()
        return 141
    except OSError as error:
        from qwen_moe_jax.storage.write_errors import write_errno

        number = write_errno(error, Path.cwd())
        if number is None:
            raise
        print(f"qwen-moe-jax {arguments.command}: error: cannot write: {os.strerror(number)}.", file=sys.stderr)
        _drop_output()
        return CANNOT_WRITE
    return code or 0


def _drop_output() -> None:
    """Standard output to nowhere, or Python complains once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qwen-moe-jax",
        description="Work with Qwen, Qwen-MoE and Mixtral checkpoints in JAX.",
        epilog="qwen-moe-jax COMMAND --help describes a command.",
    )
    parser.add_argument("--version", action="version", version=f"qwen_moe_jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name, command in COMMANDS.items():
        texts = {"help": command.SUMMARY, "description": command.SUMMARY[0].upper() + command.SUMMARY[1:] + "."}
        command.add_arguments(commands.add_parser(name, **texts))
    return parser
