"""A folder's tensors sorted into quantised modules and all the others."""

from collections.abc import Callable, Mapping

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.storage.tensor import StoredTensor

#: A folder's tensors → those of the same folder without quantisation, and the problems found, a line each.
Opener = Callable[[dict[str, StoredTensor]], tuple[dict[str, StoredTensor], list[str]]]
#: (name of the module, its tensors by the last part of their names) → its weight.
Maker = Callable[[str, Mapping[str, StoredTensor]], StoredTensor]


class ProblemError(Exception):
    """What is wrong with a module's tensors, a line."""


def open_modules(
    tensors: dict[str, StoredTensor],
    anchor: Callable[[str, StoredTensor], str | None],
    parts: tuple[str, ...],
    make: Maker,
    *,
    unused: tuple[str, ...] = (),
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors with `X.weight` for each quantised module X, and the problems found, a line each.

    What is quantised is decided by the tensors that are there, module by module: those that a config's list leaves out
    (`modules_to_not_convert`, `ignore`) have an ordinary weight in the files.

    Args:
        tensors: of the folder.
        anchor: (name, tensor) → the name of the module whose packed weight it is, None for other tensors.
        parts: the last parts of the names of a quantised module's tensors.
        make: the module's weight.
        unused: endings of the names of tensors that describe activations, which are not quantised here.

    A module that `make` refuses has no weight.
    """
    anchors = {name: module for name, tensor in tensors.items() if (module := anchor(name, tensor)) is not None}
    owned: dict[str, dict[str, StoredTensor]] = {}
    claimed = set()
    for module in anchors.values():
        names = {part: f"{module}.{part}" for part in parts}
        owned[module] = {part: tensors[name] for part, name in names.items() if name in tensors}
        claimed |= {names[part] for part in owned[module]}
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for name, tensor in tensors.items():
        if name in anchors:
            module = anchors[name]
            try:
                found[f"{module}.weight"] = make(module, owned[module])
            except ProblemError as problem:
                problems.append(str(problem))
        elif name not in claimed and not name.endswith(unused):
            found[name] = tensor
    return found, problems


def require(method: str, module: str, own: Mapping[str, StoredTensor], *parts: str) -> None:
    """Checks that a module has these tensors."""
    missing = [f"{module}.{part}" for part in parts if part not in own]
    if missing:
        some = next(iter(own.values())).source
        raise ProblemError(f"{method}: {', '.join(missing)} missing in {some}, which has other tensors of {module}")


def require_shape(method: str, name: str, tensor: StoredTensor, *shapes: tuple[int, ...]) -> None:
    """Checks that a tensor has one of these shapes."""
    if tensor.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ProblemError(f"{method}: {name} is {list(tensor.shape)} in {tensor.source}, expected {expected}")


def require_dtype(method: str, name: str, tensor: StoredTensor, *dtypes: str) -> None:
    """Checks that a tensor has one of these dtypes."""
    if tensor.dtype not in dtypes:
        raise ProblemError(f"{method}: {name} is {tensor.dtype} in {tensor.source}, expected {' or '.join(dtypes)}")


def unsupported(where: str, method: str, field: str, value: str, expected: str) -> ConfigError:
    """The refusal of a field of quantization_config."""
    return ConfigError(
        f"{where}: quantization_config (quant_method={method!r}): {field}={value} is not supported: expected "
        f"{expected}. Take the unquantised checkpoint of the same model, or another quantisation of it."
    )
