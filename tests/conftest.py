"""Settings that must stand before JAX and torch start, and the session's reference models."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

# Eight simulated devices on the CPU, for the sharding tests; everything else uses the first one. Nothing outside the
# CPU is touched: float32 comparisons would otherwise depend on an accelerator's reduced-precision matmuls.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Most of a test's time goes into XLA making machine code that runs once: half of that into LLVM optimising it, half of
# the rest into emitters of fusions by way of MLIR, where jaxlib 0.10 still has older and quicker ones. The program that
# is compiled, its collectives and its order of operations stay the same; only the machine code is plainer. It is made
# in one piece: in parts for several threads it takes a tenth longer, and there are no cores for them.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)
# Commands keep no programs in the cache folder of whoever runs the tests; those that share some set a folder.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")
# One thread per process: pytest-xdist already uses the cores, and torch's thread barriers collapse on a shared box.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest

from tests.marks import mark

# A worker comes to millions of objects, which tracing makes and few of which are garbage: by Python's own numbers,
# looking through them takes a tenth of the time.
gc.set_threshold(20_000, 20, 20)

jax.devices()  # starts the eight: else a plan for simulated devices, asked first, starts a number of its own


def pytest_collection_modifyitems(items):
    for item in items:
        mark(item)


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """Reference models by case name, each built on first use and kept for the session."""
    from tests.referee import References  # needs torch; the tests that ask for it are skipped without

    return References(tmp_path_factory.mktemp("references"))


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Lets go of compiled programs once there are many.

    Each maps memory of its own, and Linux allows a process 65,530 maps (vm.max_map_count). At that limit, which a
    worker with half of the suite's programs comes to, XLA's compiler crashes.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()
