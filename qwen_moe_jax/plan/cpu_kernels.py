"""FLOPs of the package's own kernels on CPUs, by the shapes that a compiled program calls them with."""

import math
from collections.abc import Sequence

#: How the names begin under which XLA knows them; `nn.kernels.cpu` and `nn.kernels.matmul` register them.
_NAMES = tuple(f"qwen_moe_jax_{product}_matmul_" for product in ("picked", "plain", "transposed", "outer"))
#: Attention that stores new keys and values among those of all layers, in place.
_STORING = "qwen_moe_jax_attention_"
#: The products of attention, by the name of its function, and which of its operands the keys and a row's blocks are.
_ATTENTION: dict[str, tuple[int, int, int | None]] = {
    _STORING: (2, 7, 6),
    "qwen_moe_jax_flash_attention_": (2, 7, 5),
    "qwen_moe_jax_flash_gradients_": (5, 2, None),
}
#: One token of the gated delta rule, and which of its operands the taps of the convolution and the states are.
_RULE, _TAPS, _STATES = "qwen_moe_jax_delta_rule_", 2, 8

Shape = tuple[int, ...]


def product_flops(
    target: str, operands: Sequence[Shape], results: Sequence[Shape], balanced_rows: int | None
) -> float | None:
    """FLOPs of a call; None of another function.

    Args:
        target: the function's name.
        operands, results: shapes; the first operand has the rows.
        balanced_rows: of the experts of a device at a balanced load, which buffers hold of rows for several experts.
            None takes buffers as filled.
    """
    if target.startswith(tuple(_ATTENTION)):
        return _attention_flops(target, operands)
    if target.startswith(_RULE):
        _, rows, heads, key_size, value_size = operands[_STATES]
        return 2.0 * rows * (3 * heads * key_size * value_size + math.prod(operands[_TAPS]))
    if not target.startswith(_NAMES):
        return None
    rows, inputs = operands[0]
    if target.startswith(_NAMES[0]):
        return float(sum(2 * rows * inputs * shape[-1] for shape in results))
    groups = operands[2][0]
    if groups > 1 and balanced_rows is not None:
        rows = min(rows, balanced_rows)
    if target.startswith(_NAMES[3]):
        return 2.0 * rows * inputs * operands[1][1]
    return 2.0 * rows * inputs * math.prod(results[0][1:])


def stores_what_it_is_given(target: str) -> bool:
    """Whether a function writes no more of the arrays that it updates in place than its other operands have."""
    return target.startswith(_STORING)


def _attention_flops(target: str, operands: Sequence[Shape]) -> float:
    """Of whole rows those with a query's own key and all before it; of a cache those with all of its slots."""
    products, keys, blocks = next(found for name, found in _ATTENTION.items() if target.startswith(name))
    batch, tokens, heads, head_dim = operands[0]
    slots = operands[keys][-3] * (1 if blocks is None else operands[blocks][1])
    pairs = tokens * (tokens + 1) // 2 if slots == tokens else tokens * slots
    return 2.0 * products * batch * heads * head_dim * pairs
