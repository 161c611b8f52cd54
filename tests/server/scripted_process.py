"""A server around a scripted engine, as a process of its own, whose signals are the real ones. It prints its URL."""

import asyncio
import sys
from pathlib import Path

from qwen_moe_jax.server.serve import address_of, bind, serve
from tests.server.scripted import ScriptedEngine, make_service


def main() -> int:
    """Serves until a signal."""
    engine = ScriptedEngine(lambda prompt: "over the lazy dog. " * 4)
    engine.delay = 0.1
    listening = bind("127.0.0.1", 0)
    service = make_service(Path(sys.argv[1]) / "model")

    def ready() -> None:
        print(address_of(listening), flush=True)

    return asyncio.run(serve(service, lambda: engine, listening, drain_seconds=60, on_ready=ready))


if __name__ == "__main__":
    sys.exit(main())
