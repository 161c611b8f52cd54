"""Routing as data: the experts of every token recorded, stored, edited, and prescribed to the routers again.

Routing replay (arXiv 2510.11370): the experts that generated a text are those that learn from it.
"""

import dataclasses
import zipfile
import zlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.config import MoEConfig
from qwen_moe_jax.errors import CheckpointError, RequestError
from qwen_moe_jax.moe.router import ForcedRouting
from qwen_moe_jax.moe.stats import RouterTrace
from qwen_moe_jax.storage.arrays import read_arrays, write_arrays

#: In place of an expert: the router chooses.
OPEN = -1


@dataclasses.dataclass(frozen=True, eq=False)
class RecordedRouting:
    """The experts of every token of one text in every sparse layer, on the host, in as few bytes as hold them.

    Attributes:
        experts: integers [L_sparse, T, A], the strongest first; -1 where the router chooses. uint8 up to 256 experts,
            uint16 beyond; int16 (int32 beyond 32,768 experts) where some are open.
        num_experts: E.

    Raises:
        RequestError: another shape, experts that do not exist, or one twice for a token.
    """

    experts: np.ndarray = dataclasses.field(repr=False)
    num_experts: int

    def __post_init__(self) -> None:
        experts = np.asarray(self.experts)
        if experts.ndim != 3 or experts.dtype.kind not in "iu" or 0 in (experts.shape[0], experts.shape[2]):
            raise RequestError(
                f"recorded experts are {experts.dtype} {list(experts.shape)}, expected integers [sparse layers, "
                "tokens, experts per token]."
            )
        _check_experts("recorded experts", experts, self.num_experts)
        object.__setattr__(self, "experts", experts.astype(packed_dtype(self.num_experts, bool((experts < 0).any()))))

    @classmethod
    def of_trace(cls, trace: RouterTrace, row: int = 0, length: int | None = None) -> "RecordedRouting":
        """What a forward pass recorded (`out.router.trace`) about one row of its batch.

        Args:
            trace: stacked [L_sparse, B, T, …].
            row: which text.
            length: its tokens, from the left; None is all of the row.
        """
        return cls(np.asarray(trace.experts[:, row, :length]), trace.logits.shape[-1])

    @classmethod
    def all_open(cls, layers: int, tokens: int, moe: MoEConfig) -> "RecordedRouting":
        """A routing that prescribes nothing, to be edited."""
        return cls(np.full((layers, tokens, moe.num_experts_per_tok), OPEN), moe.num_experts)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.experts.shape[1]

    def edit(
        self, *, layers: Any = slice(None), tokens: Any = slice(None), experts: Sequence[int] | None
    ) -> "RecordedRouting":
        """The same routing with other experts in some layers, for some tokens.

            recorded.edit(layers=3, tokens=slice(5, 9), experts=[17, 2])  # these two, then the router's best
            recorded.edit(layers=[0, 1], experts=None)  # the router chooses in the first two sparse layers

        Args:
            layers, tokens: a number, a slice or a list of numbers, as NumPy indexes.
            experts: those of each of the tokens; the router chooses the remaining ones. None: it chooses all.

        Raises:
            RequestError: there are no such layers, tokens or experts, or too many experts.
        """
        given = [] if experts is None else list(experts)
        chosen = self.experts.shape[2]
        if len(given) > chosen:
            raise RequestError(f"experts has {len(given)} experts, expected at most {chosen}: those of one token.")
        if any(not 0 <= expert < self.num_experts for expert in given):
            raise RequestError(f"experts={given}, expected numbers from 0 to {self.num_experts - 1}.")
        edited = self.experts.astype(np.int32)
        try:
            rows = np.ix_(np.arange(edited.shape[0])[layers].ravel(), np.arange(edited.shape[1])[tokens].ravel())
        except IndexError as error:
            raise RequestError(
                f"layers={layers!r}, tokens={tokens!r}: {error}; the routing has {edited.shape[0]} sparse layers and "
                f"{edited.shape[1]} tokens."
            ) from None
        edited[rows] = given + [OPEN] * (chosen - len(given))
        return RecordedRouting(edited, self.num_experts)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes it to a file whose name ends in .npz (compressed) or .safetensors.

        Raises:
            RequestError: another ending.
        """
        path = _checked_path(path)
        arrays = {"experts": self.experts, "num_experts": np.array([self.num_experts], np.int32)}
        if path.suffix == ".npz":
            np.savez_compressed(path, experts=arrays["experts"], num_experts=arrays["num_experts"])
        else:
            write_arrays(path, arrays)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "RecordedRouting":
        """Reads what `save` wrote.

        Raises:
            RequestError: another ending, or the file holds no recorded routing.
            CheckpointError: there is no such file, or it is damaged.
        """
        path = _checked_path(path)
        arrays = _read_npz(path) if path.suffix == ".npz" else read_arrays(path)
        if set(arrays) != {"experts", "num_experts"} or arrays["num_experts"].shape != (1,):
            raise RequestError(
                f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}, expected experts and num_experts, as "
                "RecordedRouting.save writes them."
            )
        try:
            return cls(arrays["experts"], int(arrays["num_experts"][0]))
        except RequestError as error:
            raise RequestError(f"{path}: {error}") from None


#: What `replay` may be: see `model.base.Model.__call__`.
Replay = RouterTrace | RecordedRouting | Sequence[RecordedRouting] | jax.typing.ArrayLike
#: What `without` may be: pairs (layer, expert), or bool [L_sparse, E].
Without = Sequence[tuple[int, int]] | jax.typing.ArrayLike


def packed_dtype(num_experts: int, some_open: bool = False) -> np.dtype:
    """The smallest integers that hold experts: unsigned, or signed where -1 is one of them."""
    if some_open:
        return np.dtype(np.int16 if num_experts <= 2**15 else np.int32)
    return np.dtype(np.uint8 if num_experts <= 2**8 else np.uint16 if num_experts <= 2**16 else np.int32)


def forced_routing(
    replay: Replay | None, without: Without, moe: MoEConfig | None, layers: int, shape: tuple[int, ...]
) -> ForcedRouting | None:
    """What is prescribed to the routers, from what a caller gives; None where nothing is.

    Args:
        replay, without: see `model.base.Model.__call__`.
        moe: of the model; None where it has no sparse layer.
        layers: its sparse ones.
        shape: [B, T] of the tokens.

    Raises:
        RequestError: they do not fit the model or the tokens.
    """
    excluded = isinstance(without, jax.Array | np.ndarray) or len(without) > 0  # type: ignore[arg-type]
    if replay is None and not excluded:
        return None
    if moe is None or not layers:
        raise RequestError(f"{'without' if replay is None else 'replay'} was given, but the model has no sparse layer.")
    return ForcedRouting(
        experts=None if replay is None else _replayed(replay, moe, layers, shape),
        without=_excluded(without, moe, layers) if excluded else None,
    )


def _replayed(replay: Any, moe: MoEConfig, layers: int, shape: tuple[int, ...]) -> Any:
    """Experts [L_sparse, B, T, A], checked where they are not traced."""
    expected = (layers, *shape, moe.num_experts_per_tok)
    if isinstance(replay, RouterTrace):
        replay = replay.experts
    if isinstance(replay, RecordedRouting):
        replay = [replay]
    if isinstance(replay, Sequence) and any(isinstance(row, RecordedRouting) for row in replay):
        return _stacked(replay, moe, expected)
    experts = replay if isinstance(replay, jax.Array) else np.asarray(replay)
    if experts.shape != expected or not jnp.issubdtype(experts.dtype, jnp.integer):
        raise RequestError(
            f"replay is {experts.dtype} {list(experts.shape)}, expected integers {list(expected)}: [sparse layers, "
            "batch, length, experts per token]."
        )
    is_traced = isinstance(experts, jax.core.Tracer)
    if not is_traced and (not isinstance(experts, jax.Array) or experts.is_fully_addressable):
        _check_experts("replay", np.asarray(experts), moe.num_experts)
    return experts


def _stacked(rows: Sequence[Any], moe: MoEConfig, expected: tuple[int, ...]) -> np.ndarray:
    """One recording a row, open after its end."""
    layers, batch, length, chosen = expected
    if len(rows) != batch:
        raise RequestError(f"replay has {len(rows)} recordings, expected {batch}: one for each row of the tokens.")
    stacked = np.full(expected, OPEN, packed_dtype(moe.num_experts, some_open=True))
    for index, row in enumerate(rows):
        if not isinstance(row, RecordedRouting):
            raise RequestError(f"replay[{index}] is {type(row).__name__}, expected a RecordedRouting for every row.")
        found = row.experts.shape
        fits = found[0] == layers and found[1] <= length and found[2] == chosen
        if not fits or row.num_experts != moe.num_experts:
            raise RequestError(
                f"replay[{index}] has {found[0]} sparse layers, {found[1]} tokens and {found[2]} of {row.num_experts} "
                f"experts per token, expected {layers}, at most {length}, and {chosen} of {moe.num_experts}."
            )
        stacked[:, index, : found[1]] = row.experts
    return stacked


def _excluded(without: Any, moe: MoEConfig, layers: int) -> Any:
    """bool [L_sparse, E]."""
    shape = (layers, moe.num_experts)
    if isinstance(without, jax.Array | np.ndarray):
        if without.shape != shape or without.dtype != jnp.bool_:
            raise RequestError(
                f"without is {without.dtype} {list(without.shape)}, expected pairs (layer, expert), or bool "
                f"{list(shape)}: [sparse layers, experts]."
            )
        excluded = without
    else:
        excluded = np.zeros(shape, bool)
        for pair in without:
            if not _is_pair(pair, shape):
                raise RequestError(
                    f"without holds {pair!r}, expected pairs (layer, expert): one of {shape[0]} sparse layers, one of "
                    f"{shape[1]} experts, both counted from 0."
                )
            excluded[pair[0], pair[1]] = True
    if isinstance(excluded, np.ndarray):
        left_L = np.sum(~excluded, axis=1)
        layer = int(np.argmin(left_L))
        if left_L[layer] < moe.num_experts_per_tok:
            raise RequestError(
                f"without leaves {left_L[layer]} experts of sparse layer {layer}, expected at least "
                f"{moe.num_experts_per_tok}, the experts of a token."
            )
    return excluded


def _is_pair(pair: Any, shape: tuple[int, int]) -> bool:
    if not isinstance(pair, Sequence | np.ndarray) or len(pair) != 2:
        return False
    return all(
        isinstance(number, int | np.integer) and 0 <= number < size for number, size in zip(pair, shape, strict=True)
    )


def _check_experts(name: str, experts: np.ndarray, num_experts: int) -> None:
    """Refuses numbers that are no experts, and a token with one expert twice."""
    if experts.size == 0:
        return
    if experts.max() >= num_experts or experts.min() < OPEN:
        wrong = experts[(experts.astype(np.int64) >= num_experts) | (experts.astype(np.int64) < OPEN)][0]
        raise RequestError(
            f"{name}: found expert {wrong}, expected numbers from 0 to {num_experts - 1}, or {OPEN} where the router "
            "chooses."
        )
    ordered = np.sort(experts, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:].astype(np.int64) != OPEN)
    if twice.any():
        place = tuple(int(number) for number in np.argwhere(twice)[0][:-1])
        raise RequestError(f"{name}: one expert twice for the token at {place}, expected different ones.")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file.") from None
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{path}: damaged, it cannot be read as .npz ({error}).") from None


def _checked_path(path: str | PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in (".npz", ".safetensors"):
        raise RequestError(f"{path} ends in {path.suffix!r}, expected .npz or .safetensors.")
    return path
