"""A hundred requests of all kinds: every well-formed one is answered, and the server is then as it was before."""

import asyncio

from qwen_moe_jax.server.keys import ApiKeys
from tests.server.scripted import TOKENIZER, ScriptedEngine, eventually, make_service, running
from tests.server.soak import KEY, Soak
from tests.server.templates import PLAIN


def expected(prompt, count):
    """The scripted engine's answer, cut off after so many tokens."""
    return TOKENIZER.decode(TOKENIZER.encode(f"{prompt} again and again").ids[:count]).rstrip(
        "\N{REPLACEMENT CHARACTER}"
    )


def test_a_soak(tmp_path):
    engine = ScriptedEngine(lambda prompt: f"{prompt} again and again", slots=3)
    engine.delay = 0.0005
    service = make_service(tmp_path / "model", PLAIN, slots=3, keys=ApiKeys([KEY]))
    with running(service, engine) as server:
        soak = Soak(server.url, expected)
        asyncio.run(soak.run(100))
        assert soak.counts.total() == 100 and len(soak.counts) >= 10
        eventually(lambda: engine.idle and service.life.active == 0)
        assert engine.load.free_slots == 3 and engine.load.waiting == 0
        assert not service.runner.unfinished and service.life.state == "ready"
