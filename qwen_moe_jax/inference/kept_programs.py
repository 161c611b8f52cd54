"""Compiled programs that the next start reads without tracing them again.

JAX's persistent cache spares a start the compiler, but not the tracing and lowering that come before it, which take
longer than all else in a short answer. Where a command uses that cache on CPUs, a whole program is kept next to it, by
everything that it was made of: the package's sources, the model's structure, and the shapes and shardings of all
arguments.
"""

import contextlib
import hashlib
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import NamedSharding

from qwen_moe_jax.compilation_cache import folder_in_use, keep, read_kept, source_hash
from qwen_moe_jax.nn.kernels import cpu


class KeptProgram:
    """A jitted function whose compiled programs are kept where the compilation cache is in use.

    Args:
        jitted: the function, by `jax.jit`.
        name: of its files.
        static: names of its static arguments, which are given by name.
    """

    def __init__(self, jitted: Any, name: str, static: Sequence[str]):
        self._jitted, self._name, self._static = jitted, name, tuple(static)
        self._programs: dict[str, Callable[..., Any]] = {}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Runs the program: the kept one, or one that is compiled now."""
        if jax.default_backend() != "cpu" or jax.process_count() > 1 or folder_in_use() is None:
            return self._jitted(*arguments, **named)
        dynamic = {name: value for name, value in named.items() if name not in self._static}
        key = self._key(arguments, dynamic, {name: named[name] for name in self._static if name in named})
        if key not in self._programs:
            self._programs[key] = self._read(key, arguments, dynamic) or self._made(key, arguments, named)
        return self._programs[key](*arguments, **dynamic)

    def lower(self, *arguments: Any, **named: Any) -> Any:
        """As that of the jitted function."""
        return self._jitted.lower(*arguments, **named)

    def _cache_size(self) -> int:
        """How many programs were compiled or read."""
        return self._jitted._cache_size() + len(self._programs)

    def _key(self, arguments: tuple, dynamic: dict[str, Any], static: dict[str, Any]) -> str:
        leaves, structure = jax.tree.flatten((arguments, dynamic))
        settings = {name: value for name, value in jax.config.values.items() if "cache" not in name}
        flags = {name: value for name, value in os.environ.items() if name.startswith(("XLA_", "JAX_"))}
        kinds = [
            (str(jax.typeof(leaf)), jax.typeof(leaf).weak_type, str(leaf.sharding)) for leaf in map(_as_array, leaves)
        ]
        parts = source_hash(), self._name, structure, kinds, static, jax.devices(), sorted(settings.items()), flags
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()

    def _read(self, key: str, arguments: tuple, dynamic: dict[str, Any]) -> Callable[..., Any] | None:
        content = read_kept("programs", f"{self._name}-{key}")
        if content is None:
            return None
        try:
            targets, program, out_structure = pickle.loads(content)
            for target, address in targets.items():
                cpu.register(target, address)
            leaves, structure = jax.tree.flatten((arguments, dynamic))
            return serialize_executable.deserialize_and_load(
                program, structure, out_structure, execution_devices=_devices(leaves)
            )
        except Exception:  # a file that cannot be read, whatever the reason, is written anew
            return None

    def _made(self, key: str, arguments: tuple, named: dict[str, Any]) -> Callable[..., Any]:
        with _without_jax_cache():  # what JAX read from its own cannot be written again
            program = self._jitted.lower(*arguments, **named).compile()
        try:
            executable, _, out_structure = serialize_executable.serialize(program)
            content = pickle.dumps((cpu.registered, executable, out_structure))
        except Exception:  # of a program that cannot be kept
            return program
        keep("programs", f"{self._name}-{key}", content)
        return program


@contextlib.contextmanager
def _without_jax_cache() -> Iterator[None]:
    folder = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        reset_cache()
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        reset_cache()


def _devices(leaves: Sequence[Any]) -> list[jax.Device]:
    """The devices that a program with these arguments runs on, in the order of their mesh."""
    shardings = [leaf.sharding for leaf in leaves if isinstance(leaf, jax.Array)]
    widest = max(shardings, key=lambda sharding: len(sharding.device_set))
    return list(widest.mesh.devices.flat if isinstance(widest, NamedSharding) else widest.device_set)


def _as_array(leaf: Any) -> jax.Array:
    return leaf if isinstance(leaf, jax.Array) else jax.numpy.asarray(leaf)
