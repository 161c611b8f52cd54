"""The numbers of /metrics, in Prometheus' format."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qwen_moe_jax.inference.expert_loads import ExpertLoads
from qwen_moe_jax.inference.request import Chunk
from qwen_moe_jax.server.runner import Ticket

#: Upper bounds in seconds.
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
#: Fields of the engine's load; those that are not here are named by their own words.
_LOAD = {
    "waiting": "Sequences that wait for a slot.",
    "active_slots": "Slots in use.",
    "free_slots": "Slots that are free.",
    "cached_tokens": "Tokens in the cache.",
    "prefix_hit_tokens": "Tokens of prompts that were in the cache already, since the start.",
    "read_tokens": "Tokens of prompts that were read, since the start.",
    "decoded_tokens": "Tokens decoded since the start.",
    "steps": "Steps of the engine since the start.",
}
#: The most experts, of all layers together, that have a counter each: a page of thousands of lines is no use.
_MOST_EXPERTS = 1024


class Metrics:
    """The metrics of one server.

    Args:
        load: the engine's load, a dataclass of numbers, or None while there is no engine.
        expert_loads: tokens of the engine's experts, or None while there are none.
    """

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, load: Callable[[], Any], expert_loads: Callable[[], ExpertLoads | None] = lambda: None):
        self._registry = CollectorRegistry()
        self._registry.register(_Experts(expert_loads))
        ProcessCollector(registry=self._registry)  # memory and processor time
        self._load = load
        made: Any = {"namespace": "qwen_moe_jax", "registry": self._registry}
        self._requests = Counter("http_requests", "Answers, by path and status.", ["path", "status"], **made)
        self._ended = Counter("sequences", "Sequences that have ended, by finish reason.", ["finish"], **made)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts.", **made)
        self._generated = Counter("generated_tokens", "Tokens that were generated.", **made)
        self._first = Histogram(
            "time_to_first_token_seconds", "From submission to the first token.", buckets=_FIRST_TOKEN, **made
        )
        self._between = Histogram(
            "inter_token_latency_seconds", "Between tokens of a sequence.", buckets=_BETWEEN_TOKENS, **made
        )
        self._whole = Histogram("sequence_seconds", "From submission to the last token.", buckets=_WHOLE, **made)
        self._rate = Gauge("tokens_per_second", "Tokens decoded per second since this page was read before.", **made)
        self._gauges: dict[str, Gauge] = {}  # of the engine's load, by field
        self._make_gauge = lambda name: Gauge(name, _LOAD.get(name, f"{name.replace('_', ' ')} of the engine."), **made)
        self._compilations = Counter("compilations", "Programs that XLA has compiled, or read from its cache.", **made)
        self._seen = (time.monotonic(), 0)
        self._seconds, self._count = 0.0, 0  # of sequences that have ended

    def count_compilations(self) -> None:
        """Counts the programs that are compiled from now on, in all threads. Imports JAX."""
        import jax

        def listen(event: str, duration_secs: float, **_: Any) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                self._compilations.inc()

        jax.monitoring.register_event_duration_secs_listener(listen)

    def answered(self, path: str, status: int) -> None:
        """Counts an answer."""
        self._requests.labels(path, str(status)).inc()

    def observe(self, chunks: Iterable[tuple[Ticket, Chunk]]) -> None:
        """Counts the tokens of a step; keeps in the tickets when the last one came."""
        now = time.monotonic()
        for ticket, chunk in chunks:
            count = len(chunk.token_ids)
            if count:
                self._generated.inc(count)
                if ticket.tokens == 0:
                    self._prompt.inc(len(ticket.request.token_ids))
                    self._first.observe(now - ticket.submitted)
                else:
                    for _ in range(count):
                        self._between.observe((now - ticket.last) / count)
                ticket.tokens, ticket.last = ticket.tokens + count, now
            if chunk.finished is not None:
                self._ended.labels(chunk.finished).inc()
                self._whole.observe(now - ticket.submitted)
                self._seconds, self._count = self._seconds + now - ticket.submitted, self._count + 1

    def mean_seconds(self) -> float:
        """The mean time from submission to the last token of the sequences that have ended; 1 before the first."""
        return self._seconds / self._count if self._count else 1.0

    def text(self) -> bytes:
        """The page."""
        load = self._load()
        if load is not None:
            for name, value in dataclasses.asdict(load).items():
                if isinstance(value, int | float):
                    gauge = self._gauges.get(name) or self._gauges.setdefault(name, self._make_gauge(name))
                    gauge.set(value)
            now, before = (time.monotonic(), load.decoded_tokens), self._seen
            if now[0] > before[0]:
                self._rate.set((now[1] - before[1]) / (now[0] - before[0]))
            self._seen = now
        return generate_latest(self._registry)


class _Experts(Collector):
    """Tokens of the experts, read from the devices when the page is."""

    def __init__(self, expert_loads: Callable[[], ExpertLoads | None]):
        self._expert_loads = expert_loads

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment; none while there are no experts."""
        loads = self._expert_loads()
        if loads is None:
            return
        name = "qwen_moe_jax_dropped_tokens"
        yield CounterMetricFamily(name, "Choices of an expert whose capacity was exceeded.", value=loads.dropped)
        imbalance = GaugeMetricFamily(
            "qwen_moe_jax_expert_imbalance",
            "Tokens of a layer's busiest expert over the mean of its experts, since the start; 1 is balance.",
            labels=["layer"],
        )
        rows = list(zip(map(str, loads.layers), loads.tokens_LE.tolist(), strict=True))
        for layer, tokens in rows:
            imbalance.add_metric([layer], max(tokens) * len(tokens) / max(1, sum(tokens)))
        yield imbalance
        if loads.tokens_LE.size <= _MOST_EXPERTS:
            each = CounterMetricFamily(
                "qwen_moe_jax_expert_tokens", "Tokens that chose an expert.", labels=["layer", "expert"]
            )
            for layer, tokens in rows:
                for expert, count in enumerate(tokens):
                    each.add_metric([layer, str(expert)], count)
            yield each

    def describe(self) -> list[Metric]:
        """Nothing: which metrics there are is known with the model."""
        return []
