"""JAX's persistent compilation cache for the commands: what one start has compiled, the next one reads.

Only programs call `use_compilation_cache`; the library leaves JAX's settings to its users. Where it is used, files of
our own are kept next to JAX's: machine code (`nn.kernels`) and whole programs (`inference.kept_programs`).
"""

import functools
import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

#: Bytes; JAX removes the programs that were not used for the longest time.
MAX_SIZE = 2 << 30
#: Files of our own, of each kind; the oldest are removed.
MAX_FILES = 200


def use_compilation_cache() -> Path | None:
    """Switches the cache on, in the user's cache folder, and returns the folder. Imports JAX.

    Where JAX_COMPILATION_CACHE_DIR is set, if only to nothing, JAX's own settings hold, and the result is None. Where
    the folder cannot be created, it is None as well: programs are then compiled at every start.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return None
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_SIZE)
    # Small programs, too: a start compiles a hundred of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def cache_folder() -> Path:
    """`~/.cache/qwen_moe_jax/compiled/…` (XDG_CACHE_HOME in place of ~/.cache), one folder for each kind of processor.

    Programs for CPUs are machine code: computers that share a home folder may lack each other's instructions.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base else Path.home() / ".cache"
    return root / "qwen_moe_jax" / "compiled" / hashlib.sha256(_processor().encode()).hexdigest()[:16]


def folder_in_use() -> Path | None:
    """The folder, where `use_compilation_cache` has switched the cache on in this process, and it still is."""
    import jax

    folder = cache_folder()
    return folder if jax.config.values["jax_compilation_cache_dir"] == str(folder) else None


def read_kept(kind: str, name: str) -> bytes | None:
    """The content of one of our own files in the folder; None where there is no file, or the cache is not in use."""
    folder = folder_in_use()
    if folder is None:
        return None
    try:
        return (folder / kind / name).read_bytes()
    except OSError:
        return None


def keep(kind: str, name: str, content: bytes) -> None:
    """Writes one of our own files where the cache is in use. One that cannot be written is made anew next time."""
    folder = folder_in_use()
    if folder is None:
        return
    try:
        (folder / kind).mkdir(exist_ok=True)
        unfinished = folder / kind / f"{name}.{os.getpid()}.unfinished"
        unfinished.write_bytes(content)
        os.replace(unfinished, folder / kind / name)
        by_age = sorted((folder / kind).iterdir(), key=lambda file: file.stat().st_mtime)
        for file in by_age[:-MAX_FILES]:
            file.unlink()
    except OSError:
        return


@functools.cache
def source_hash() -> str:
    """Of the sources of this package, and of the versions of the libraries that its programs are made by."""
    root = Path(__file__).parent
    found = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        found.update(str(file.relative_to(root)).encode())
        found.update(file.read_bytes())
    for name in ("jax", "jaxlib", "flax", "llvmlite"):
        try:
            found.update(f"{name} {importlib.metadata.version(name)}".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    return found.hexdigest()


def _processor() -> str:
    """Words that differ between processors that differ in their instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        lines = [platform.processor()]
    features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return "\n".join([platform.machine(), *features])
