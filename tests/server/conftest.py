"""Servers around scripted engines, one for the tests of a module."""

import types

import openai
import pytest

from tests.server.scripted import ScriptedEngine, make_service, running
from tests.server.templates import JSON


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """A running server, its engine, and clients for it."""
    engine = ScriptedEngine(max_length=2048)
    service = make_service(tmp_path_factory.mktemp("scripted") / "model", JSON, max_length=2048, adapters=("french",))
    with running(service, engine) as server:
        settings = {"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0}
        with openai.OpenAI(**settings) as client:
            yield types.SimpleNamespace(
                url=server.url, engine=engine, service=service, client=client, settings=settings
            )
