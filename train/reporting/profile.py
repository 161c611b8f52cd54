"""A profiler trace of a few steps, for TensorBoard's profile tab or https://ui.perfetto.dev."""

from pathlib import Path

import jax


class Profiler:
    """Starts JAX's profiler before the first of the given steps, and stops it after the last.

    A context manager, so that the trace is written after an error, too.
    """

    def __init__(self, folder: Path, steps: range) -> None:
        self._folder = folder
        self._steps = steps
        self._running = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def before(self, step: int) -> None:
        """Call it before each step. A run that is resumed within the given steps traces the remaining ones."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def ends_with(self, step: int) -> bool:
        """Whether `stop` has to be called after this step."""
        return self._running and step + 1 not in self._steps

    def stop(self) -> None:
        """Writes the trace, if one is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
