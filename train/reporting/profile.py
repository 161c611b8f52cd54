"""A trace of a few steps, for TensorBoard's profile tab or https://ui.perfetto.dev: what the devices did, and when."""

from pathlib import Path

import jax


class Profiler:
    """Starts jax's profiler before the first of some steps, and stops it once the last of them has ended.

    Used as a context, so that a trace that an error ends is written as well.
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
        """Called before a step begins. Where a run is resumed amid the steps, the trace has those that are left."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def ends_with(self, step: int) -> bool:
        """Whether `stop` is due once this step has ended."""
        return self._running and step + 1 not in self._steps

    def stop(self) -> None:
        """Writes the trace, if there is one."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
