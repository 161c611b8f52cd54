"""The metrics.jsonl of a run that never was, on eight chips whose peak is known."""

import dataclasses

from train.reporting.start import Start

START = Start(
    time="2026-01-02 03:04:05",
    parameters=1000,
    active_parameters=400,
    trained_parameters=1000,
    sparse_layers=[1, 3],
    mesh={"data": 2, "fsdp": 1, "expert": 4, "tensor": 1},
    device_kind="TPU v4",
    execution={"dispatch": "capacity", "group_size": None},
    weight_bytes=2_000_000,
    moment_bytes=4_000_000,
    gradient_bytes=2_000_000,
    text_tokens=5000,
    tokens_per_step=64,
    flops_per_token=6e6,
    peak_flops=275e12,
    versions={"jax": "0.10.2"},
)


def step_records(first: int, last: int) -> list[dict]:
    """What a start that goes from one step to another writes."""
    records = [{"step": first - 1, "start": dataclasses.asdict(START)}]
    for step in range(first, last + 1):
        speed = {"tokens_per_second": 640.0, "tokens_per_second_per_device": 80.0, "mfu": 0.314}
        numbers = {"loss": 5.1 - step / 10, "cross_entropy": 5 - step / 10, "balance_loss": 1.0, "router_z": 2.0}
        numbers |= {"gradient_norm": 1.0, "learning_rate": 1e-3, "dropped": 0.05, "load_imbalance": 1.5, "tokens": 64}
        records.append({"step": step, **numbers, "step_seconds": 0.1, "data_seconds": 0.01, **speed})
        layers = {
            "load": [[40, 20, 30, 38], [0, 128, 0, 0]],
            "entropy": [1.3, 0.2],
            "dropped": [2, 60],
            "rounds": [1, 1],
        }
        records.append({"step": step, "layers": layers})
    return [*records, {"step": last, "evaluation_seconds": 0.5}, {"step": last, "heldout_loss": 4.25}]
