"""What whole runs share."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

SETTINGS = {"jax_persistent_cache_min_compile_time_secs": 0.1, "jax_persistent_cache_min_entry_size_bytes": 0}


@pytest.fixture(scope="module")
def programs_compiled_once(tmp_path_factory):
    """Each start of a run makes its steps anew; what XLA has compiled for one start is taken again for the others."""
    jax.devices()  # before a run starts fewer of them than other tests of this process need
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", *SETTINGS)}
    after = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")), **SETTINGS}
    for settings in (after, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it reads its settings once
        if settings is after:
            yield
