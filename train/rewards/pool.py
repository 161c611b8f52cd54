"""Worker processes that compute rewards, each with a time limit; one that hangs or dies is replaced."""

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from qwen_moe_jax.errors import ConfigError

#: Seconds in which a worker has to import its functions.
_START_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a reward is computed of.

    Attributes:
        prompt: a text, or a list of messages.
        completion: a text.
        row: the record of the file.
    """

    prompt: Any
    completion: str
    row: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The rewards of samples.

    Attributes:
        rewards: float64 [samples, functions]; 0 where a function failed.
        failures: how often, by reason: "TimeoutError", "died", or the exception's name.
        example: the message of the first failure of each reason.
    """

    rewards: np.ndarray
    failures: Counter[str] = field(default_factory=Counter)
    example: dict[str, str] = field(default_factory=dict)


class RewardPool:
    """Processes that run reward functions; a context manager that ends them.

    The processes are new Python interpreters, not forks: a fork of a program that runs JAX may deadlock. They find
    modules in the current directory.

    Args:
        functions: names, as `worker.load_function` takes them.
        timeout: seconds that one call of a function may take.
        workers: processes.

    Raises:
        ConfigError: a function cannot be imported.
    """

    def __init__(self, functions: Sequence[str], *, timeout: float, workers: int) -> None:
        self._functions, self._timeout = list(functions), timeout
        self._workers: list[_Worker | None] = [None] * workers  # None: to be started
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="rewards")
        try:
            list(self._threads.map(self._start, range(workers)))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        self._threads.shutdown(cancel_futures=True)
        for worker in filter(None, self._workers):
            worker.kill()

    def score(self, samples: Sequence[Sample]) -> Scores:
        """The reward of each sample by each function. A call that fails is a reward of 0 and is counted."""
        calls = [
            json.dumps([function, sample.prompt, sample.completion, sample.row]) + "\n"
            for sample in samples
            for function in range(len(self._functions))
        ]
        answers = list(self._threads.map(self._call, calls))
        failures, example = Counter[str](), dict[str, str]()
        rewards = np.zeros(len(calls))
        for number, answer in enumerate(answers):
            if "reward" in answer:
                rewards[number] = answer["reward"]
            else:
                kind = answer["error"].split(":")[0]
                failures[kind] += 1
                example.setdefault(kind, f"{self._functions[number % len(self._functions)]}: {answer['error']}")
        shape = len(samples), len(self._functions)
        return Scores(rewards=rewards.reshape(shape), failures=failures, example=example)

    def _start(self, number: int) -> None:
        self._workers[number] = self._started()

    def _call(self, line: str) -> dict[str, Any]:
        with self._lock:
            worker = self._workers.pop()  # there are as many as threads
        try:
            worker = worker or self._started()
            return worker.ask(line, self._timeout)
        except (_Died, TimeoutError, ConfigError) as error:
            if worker is not None:
                worker.kill()
                worker = None
            return {"error": f"{'TimeoutError' if isinstance(error, TimeoutError) else 'died'}: {error}"}
        finally:
            with self._lock:
                self._workers.append(worker)

    def _started(self) -> "_Worker":
        worker = _Worker(self._functions)
        try:
            answer = worker.answer(_START_SECONDS)
        except (_Died, TimeoutError) as error:
            answer = {"error": str(error)}
        if "error" in answer:
            worker.kill()
            raise ConfigError(f"grpo: {', '.join(self._functions)} cannot be imported: {answer['error']}.")
        return worker


class _Died(Exception):
    """The process has ended."""


class _Worker:
    """One process."""

    def __init__(self, functions: list[str]) -> None:
        # Where `train` is found, and no device for a function whose module imports JAX: the trainer holds them.
        checkout = str(Path(__file__).resolve().parents[2])
        paths = [checkout, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "train.rewards.worker", *functions],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the trainer
        )
        assert self._process.stdout is not None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._received = b""

    def ask(self, line: str, seconds: float) -> dict[str, Any]:
        """The answer to a request. Raises `_Died`, or TimeoutError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return self.answer(seconds)

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next line. Raises `_Died`, or TimeoutError."""
        assert self._process.stdout is not None
        until = time.monotonic() + seconds
        while b"\n" not in self._received:
            if not self._selector.select(max(until - time.monotonic(), 0)):
                raise TimeoutError(f"no answer within {seconds:g} s")
            found = os.read(self._process.stdout.fileno(), 65536)
            if not found:
                raise self._died()
            self._received += found
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._selector.close()

    def _died(self) -> _Died:
        return _Died(f"the process ended with code {self._process.wait()}")
