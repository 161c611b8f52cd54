"""Loading, draining, failing, full queues, clients that vanish or do not read: each leaves the server in order."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest

from tests.server.scripted import Running, ScriptedEngine, eventually, make_service, running

LONG = "over the lazy dog. " * 60


@pytest.fixture
def engine():
    engine = ScriptedEngine(lambda prompt: LONG, max_length=2048)
    engine.delay = 0.002
    return engine


def service_of(tmp_path, **settings):
    return make_service(tmp_path / "model", max_length=2048, **settings)


def complete(url, prompt="x", **settings):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1000, **settings}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


@contextlib.contextmanager
def connected(url, body, *, receive_buffer=None):
    """A client that has asked and reads nothing, until it closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.socket() as client:
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.connect((host, int(port)))
        client.sendall(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        yield


class InBackground(threading.Thread):
    """A request in a thread of its own, and its answer."""

    def __init__(self, *arguments, **settings):
        super().__init__(daemon=True)
        self._call = lambda: complete(*arguments, **settings)
        self.start()

    def run(self):
        self._answer = self._call()

    @property
    def answer(self):
        self.join(60)
        return self._answer


def test_health_while_the_model_is_loaded(tmp_path, engine):
    go_on = threading.Event()
    server = Running(service_of(tmp_path), lambda: go_on.wait(30) and engine, drain_seconds=0)
    health = httpx.get(f"{server.url}/health")
    assert (health.status_code, health.json()["status"]) == (503, "loading")
    refused = complete(server.url)
    assert refused.status_code == 503 and int(refused.headers["Retry-After"]) > 0
    assert httpx.get(f"{server.url}/metrics").status_code == 200
    go_on.set()
    server.ready()
    assert httpx.get(f"{server.url}/health").json() == {"status": "ready", "detail": "", "active_requests": 0}
    server.signal()
    assert server.join() == 0


def test_what_loading_raises_ends_the_server(tmp_path):
    def load():
        raise ValueError("no such checkpoint")

    server = Running(service_of(tmp_path), load)
    server.join()
    assert str(server.error) == "no such checkpoint"


def test_a_drain_lets_requests_end_and_refuses_new_ones(tmp_path, engine):
    lines = {}
    server = Running(service_of(tmp_path), engine, drain_seconds=60, say=lines.__setitem__).ready()
    background = InBackground(server.url)
    eventually(lambda: engine.steps > 3)
    server.signal()
    eventually(lambda: httpx.get(f"{server.url}/health").json()["status"] == "draining")
    refused = complete(server.url)
    assert refused.status_code == 503 and "Retry-After" in refused.headers
    assert refused.json()["error"]["code"] == "draining"
    assert background.answer.json()["choices"][0]["text"] == LONG
    assert server.join() == 0
    assert lines["draining"].startswith("1 request may take 60 s more")
    assert lines["ended"] == "1 request answered since the signal"


def test_a_drain_has_an_end(tmp_path, engine):
    engine.delay = 0.05
    lines = {}
    server = Running(service_of(tmp_path), engine, drain_seconds=0.1, say=lines.__setitem__).ready()
    whole, streamed = InBackground(server.url), InBackground(server.url, stream=True)
    eventually(lambda: engine.load.active_slots == 2 and engine.steps > 9)
    server.signal()
    assert server.join() == 0
    assert lines["ended"] == "0 requests answered since the signal, 2 cut off"
    assert whole.answer.status_code == 503 and whole.answer.json()["error"]["code"] == "draining"
    *events, last = [line for line in streamed.answer.text.split("\n\n") if line]
    assert events and json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"


def test_an_exception_of_the_engine_is_told_and_ends_the_server(tmp_path, engine):
    def explode(prompts):
        if engine.steps > 5:
            raise RuntimeError("the device is lost")

    engine.before_step = explode
    server = Running(service_of(tmp_path), engine, failed_seconds=60).ready()
    answer = complete(server.url)
    assert answer.status_code == 500 and "the device is lost" in answer.json()["error"]["message"]
    health = httpx.get(f"{server.url}/health")
    assert (health.status_code, health.json()["status"]) == (503, "failed")
    assert complete(server.url).status_code == 500
    server.signal()
    assert server.join() == 70


def test_an_error_of_one_request_ends_that_request(tmp_path, engine):
    engine.fails = lambda prompt: prompt == "bad"
    with running(service_of(tmp_path), engine) as server:
        good = InBackground(server.url)
        bad = complete(server.url, "bad")
        assert bad.status_code == 500 and bad.json()["error"]["code"] == "generation_failed"
        assert "NaN" in bad.json()["error"]["message"]
        streamed = complete(server.url, "bad", stream=True)
        assert streamed.status_code == 200 and '"generation_failed"' in streamed.text and "[DONE]" not in streamed.text
        assert good.answer.json()["choices"][0]["text"] == LONG


def test_a_request_that_takes_too_long_is_ended(tmp_path, engine):
    with running(service_of(tmp_path, max_seconds=0.05), engine) as server:
        answer = complete(server.url)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
        eventually(lambda: engine.idle)


def test_a_full_queue(tmp_path, engine):
    with running(service_of(tmp_path, max_waiting=2), engine) as server:
        never = complete(server.url, n=7)
        assert never.status_code == 400 and "takes 6 at once" in never.json()["error"]["message"]
        background = InBackground(server.url, n=6)
        eventually(lambda: engine.load.waiting == 2)
        refused = complete(server.url)
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert len(background.answer.json()["choices"]) == 6
        assert complete(server.url, max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_frees_its_slots(tmp_path, engine, stream):
    engine.delay = 0.02  # the answers alone would take twenty seconds
    service = service_of(tmp_path)
    with running(service, engine) as server:
        with connected(server.url, {"prompt": "x", "n": 6, "max_tokens": 1000, "stream": stream}):
            eventually(lambda: engine.load.active_slots == 4 and engine.load.waiting == 2)
        steps = engine.steps
        eventually(lambda: engine.idle, seconds=5)
        assert engine.steps - steps < 50 and len(engine.cancelled) == 6
        assert not service.runner.unfinished
        eventually(lambda: service.life.active == 0)


def test_a_reader_that_does_not_read_delays_nobody_and_is_left(tmp_path, engine):
    engine.delay = 0
    service = service_of(tmp_path, write_seconds=3.0)
    server = Running(service, engine, drain_seconds=0, send_buffer=4096).ready()
    body = {"prompt": "x", "n": 4, "max_tokens": 1000, "stream": True, "logprobs": 5}
    with connected(server.url, body, receive_buffer=4096):
        assert complete(server.url, max_tokens=20).status_code == 200
        eventually(lambda: service.life.active == 1)  # the lazy one, once the answered one is counted off
        eventually(lambda: service.life.active == 0)  # given up, although most of it was never read
        assert not service.runner.unfinished and engine.idle
    server.signal()
    server.join()


def test_metrics(tmp_path, engine):
    engine.delay = 0
    with running(service_of(tmp_path), engine) as server:
        complete(server.url, max_tokens=10)
        complete(server.url, suffix="no")
        httpx.get(f"{server.url}/v1/{'x' * 50}")
        found = dict(
            line.rsplit(" ", 1)
            for line in httpx.get(f"{server.url}/metrics").text.splitlines()
            if not line.startswith("#")
        )
    name = "qwen_moe_jax_"
    assert found[f'{name}http_requests_total{{path="/v1/completions",status="200"}}'] == "1.0"
    assert found[f'{name}http_requests_total{{path="/v1/completions",status="400"}}'] == "1.0"
    assert found[f'{name}http_requests_total{{path="other",status="404"}}'] == "1.0"
    assert found[f'{name}sequences_total{{finish="length"}}'] == "1.0"
    assert found[f"{name}generated_tokens_total"] == "10.0" and found[f"{name}prompt_tokens_total"] == "1.0"
    assert found[f"{name}time_to_first_token_seconds_count"] == "1.0"
    assert found[f"{name}inter_token_latency_seconds_count"] == "9.0"
    assert found[f"{name}free_slots"] == "4.0" and found[f"{name}waiting"] == "0.0"


@pytest.mark.parametrize("count, code", [(1, 0), (2, 128 + signal.SIGTERM)])
def test_a_signal_drains_and_a_second_one_ends_the_process(tmp_path, count, code):
    command = [sys.executable, "-m", "tests.server.scripted_process", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    url = process.stdout.readline().strip()
    with process, httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "x", "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        eventually(lambda: httpx.get(f"{url}/health").json()["status"] == "draining")
        if count == 2:
            process.send_signal(signal.SIGTERM)
        else:
            assert list(lines)[-2] == "data: [DONE]"
        assert process.wait(20) == code


def test_an_idle_engine_of_several_processes_goes_on_stepping_until_it_is_closed(tmp_path, engine):
    service = service_of(tmp_path)
    service.runner.heartbeat = 0.01
    with running(service, engine):
        eventually(lambda: engine.steps > 3)
        assert not engine.closed
    assert engine.closed
