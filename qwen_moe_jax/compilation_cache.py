"""JAX's persistent compilation cache for the commands: what one start has compiled, the next one reads.

Only programs call this; the library leaves JAX's settings to its users.
"""

import hashlib
import os
import platform
from pathlib import Path

#: Bytes; JAX removes the programs that were not used for the longest time.
MAX_SIZE = 2 << 30


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


def _processor() -> str:
    """Words that differ between processors that differ in their instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        lines = [platform.processor()]
    features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return "\n".join([platform.machine(), *features])
