"""transformers' block in `moe_block.py`, with the weights of ours, and what plain matmuls of torch take."""

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from moe_block_jax import our_block
from moe_block_subject import EAGER, GROUPED_MM, TORCH_LIMIT, Answer, Builders, Method, Subject, inputs_of


def why_no_torch() -> str | None:
    """What keeps us from measuring torch, or None."""
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        return f"without torch's rows: {' and '.join(absent)} not installed"
    import torch

    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        return "without torch's rows: JAX uses a GPU that torch does not see"
    return None


def torch_builders(subject: Subject) -> Builders:
    """transformers' block with its implementations of the experts, and their limit."""
    import torch

    torch.set_num_threads(os.cpu_count())
    return {
        (subject.any_routing, TORCH_LIMIT): functools.partial(torch_plain_expert, subject),
        (subject, GROUPED_MM): functools.partial(transformers_method, subject, "grouped_mm"),
        (subject, EAGER): functools.partial(transformers_method, subject, "eager"),
    }


def to_torch(subject: Subject, array: np.ndarray):
    """A tensor where JAX computes, in the subject's dtype."""
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    return torch.tensor(np.asarray(array, np.float32), device=device).to(getattr(torch, subject.dtype))


@functools.cache
def torch_weights(subject: Subject) -> dict[str, Any]:
    """Our block's weights, under transformers' names."""
    block = our_block(subject)
    gate_up = [np.asarray(block.experts.gate_proj[...]), np.asarray(block.experts.up_proj[...])]
    return {
        "gate.weight": to_torch(subject, np.asarray(block.gate.weight[...])),
        "experts.gate_up_proj": to_torch(subject, np.concatenate(gate_up, axis=1)),
        "experts.down_proj": to_torch(subject, np.asarray(block.experts.down_proj[...])),
    }


def transformers_method(subject: Subject, implementation: str) -> Method:
    """Their block, with the weights of ours."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**subject.hub, experts_implementation=implementation))
    block.load_state_dict(torch_weights(subject.any_routing), assign=True)
    inputs = inputs_of(subject)
    hidden_BTD = to_torch(subject, inputs.hidden_TD[None]).requires_grad_()
    cotangent_BTD = to_torch(subject, inputs.cotangent_TD[None])
    asked = [hidden_BTD, block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj]

    def both():
        mixed_BTD = block(hidden_BTD)
        return mixed_BTD, torch.autograd.grad(mixed_BTD, asked, cotangent_BTD)

    def answer() -> Answer:
        mixed_BTD, (of_hidden_BTD, *of_weights) = both()
        found = [mixed_BTD[0].detach(), of_hidden_BTD[0], *of_weights]
        names = [field.name for field in dataclasses.fields(Answer)]
        return Answer(**{name: tensor.float().cpu().numpy() for name, tensor in zip(names, found, strict=True)})

    with torch.no_grad():
        inputs.check(block.gate(hidden_BTD)[2].cpu().numpy(), implementation)
    check_implementation(block, hidden_BTD, implementation)
    return Method(
        run=torch_passes(lambda: block(hidden_BTD), both),
        flops=subject.useful_flops,
        limit=TORCH_LIMIT,
        answer=answer,
    )


def check_implementation(block, hidden_BTD, implementation: str) -> None:
    """Raises unless torch's grouped matmul is called where it should be, and only there."""
    import torch
    from torch.overrides import TorchFunctionMode

    called = set()

    class Listener(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            called.add(function.__name__)
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Listener():
        block(hidden_BTD)
    if any("grouped_mm" in name for name in called) != (implementation == "grouped_mm"):
        raise AssertionError(f"transformers does not compute its experts by {implementation!r}.")


def torch_plain_expert(subject: Subject) -> Method:
    """As `plain_expert`."""
    import torch
    from torch.nn.functional import linear, silu

    rng = np.random.default_rng(0)

    def drawn(rows: int, columns: int):
        return to_torch(subject, rng.standard_normal((rows, columns)) * columns**-0.5).requires_grad_()

    x_RD, down_DF = drawn(subject.rows, subject.hidden), drawn(subject.hidden, subject.ffn)
    gate_FD, up_FD = drawn(subject.ffn, subject.hidden), drawn(subject.ffn, subject.hidden)

    def forward():
        return linear(silu(linear(x_RD, gate_FD)) * linear(x_RD, up_FD), down_DF)

    def both():
        result = forward()
        return torch.autograd.grad(result, [x_RD, gate_FD, up_FD, down_DF], result.detach())

    return Method(run=torch_passes(forward, both), flops=subject.useful_flops)


def torch_passes(forward: Callable[[], Any], both: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """The passes of a `Method`; forward alone keeps nothing for a backward pass."""
    import torch

    def finished(run: Callable[[], Any], gradients: bool) -> None:
        with torch.set_grad_enabled(gradients):
            run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return {
        "forward": functools.partial(finished, forward, False),
        "forward+backward": functools.partial(finished, both, True),
    }
