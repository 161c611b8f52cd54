"""A worker process: `python -m train.rewards.worker FUNCTION …` reads requests and answers with rewards, a line each.

A request is JSON `[number of the function, prompt, completion, row]`, an answer `{"reward": …}` or `{"error": …}`. The
first answer says that the functions are imported, or why not. What a function prints goes to standard error.
"""

import importlib
import json
import math
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from numbers import Real
from typing import Any

from train.rewards.builtin import BUILTIN


def load_function(name: str) -> Callable[[Any, str, dict], Any]:
    """The function of a name: one of `BUILTIN`, or `package.module:function`.

    Raises:
        ValueError: there is none of that name; anything that importing the module raises.
    """
    if ":" not in name:
        if name not in BUILTIN:
            raise ValueError(f"no such reward: expected package.module:function, or one of {', '.join(BUILTIN)}")
        return BUILTIN[name]
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute, None)
    if not callable(function):
        raise ValueError(f"the module {module} has no function {attribute}")
    return function


def main(names: list[str]) -> None:
    """Serves requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a function that prints must not print into the answers
    sys.path.insert(0, os.getcwd())

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    try:
        functions = [load_function(name) for name in names]
    except BaseException as error:  # a module may raise anything, SystemExit too
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({"ready": True})
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=[requests], daemon=True).start()
    shown: set[type] = set()
    while True:
        function, *arguments = json.loads(requests.get())
        answer(_reward(functions[function], arguments, shown))


def _read(requests: queue.SimpleQueue) -> None:
    """Ends the process with its input, even within a function that hangs: the trainer may have been killed."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def _reward(function: Callable[..., Any], arguments: list[Any], shown: set[type]) -> dict[str, Any]:
    """The answer to a request. Of each kind of exception the first traceback is printed; `shown` has the kinds."""
    try:
        found = function(*arguments)
        if not isinstance(found, Real) or not math.isfinite(found):
            raise ValueError(f"found {found!r:.80}, expected a finite number")
        return {"reward": float(found)}
    except Exception as error:
        if type(error) not in shown:
            traceback.print_exc()
            shown.add(type(error))
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main(sys.argv[1:])
