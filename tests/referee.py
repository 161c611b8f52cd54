"""The referee: tiny random transformers models, their checkpoints, and what they answer on one fixed batch.

Importing this module skips the importing test module where torch is not installed. Reference runs are float32 with
eager attention and eager experts, the implementations that keep to the published order of operations.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest

from tests.cases import CASES, HYBRID_CASES, HYBRID_FAMILIES, SPARSE_FAMILIES, SPARSE_HYBRIDS, Case

torch = pytest.importorskip("torch", reason="the referee is transformers on torch, which is not installed here")
transformers = pytest.importorskip("transformers", reason="the referee is transformers, which is not installed here")

load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

torch.set_num_threads(1)  # thread barriers cost more than these matrices, and they collapse on a shared box
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LENGTH = 14
# A token whose k-th and (k+1)-th router logits are closer than this could be routed elsewhere by rounding alone.
SMALLEST_ROUTING_GAP = 1e-4
# A router logit is a sum of 32 products near 1: float32 orders of summation differ by some 1e-6.


@dataclass(frozen=True)
class Batch:
    """Token ids [B,T] and their attention mask; `rows` names which rows are unpadded, left-padded, right-padded."""

    tokens: np.ndarray
    mask: np.ndarray
    rows: dict[str, slice]

    @property
    def real(self) -> np.ndarray:
        return self.mask.astype(bool)

    @property
    def labels(self) -> np.ndarray:
        """Labels in transformers' form (it shifts them itself): only a real token predicted from a real one counts."""
        predicted = self.real.copy()
        predicted[:, 0] = False
        predicted[:, 1:] &= self.real[:, :-1]
        return np.where(predicted, self.tokens, -100)


def make_batch(case: Case, seed: int = 0, length: int = LENGTH) -> Batch:
    """Two rows of each kind of padding. Padding carries the pad token, or token 0 where the case has none."""
    config = case.text_config
    pad = config.get("pad_token_id") or 0
    lengths = {"unpadded": (length, length), "left-padded": (9, 1), "right-padded": (11, 4)}
    numbers = np.random.default_rng(seed)
    mask = np.zeros((6, length), np.int32)
    rows = {}
    for start, (kind, sizes) in zip((0, 2, 4), lengths.items(), strict=True):
        rows[kind] = slice(start, start + 2)
        for row, size in zip((start, start + 1), sizes, strict=True):
            mask[row, length - size :] = 1
            if kind == "right-padded":
                mask[row] = mask[row, ::-1]
    tokens = numbers.integers(1, config["vocab_size"], mask.shape)
    tokens = np.where((tokens == pad), pad + 1, tokens)
    return Batch(tokens=np.where(mask == 1, tokens, pad).astype(np.int32), mask=mask, rows=rows)


def randomise(model, seed: int) -> None:
    """Weights large enough that logits reach about 5; norms away from 1 and biases away from 0, so that each counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if name.endswith("norm.weight"):
                values = 1 + 0.3 * noise
            elif parameter.ndim == 1:
                values = 0.3 * noise
            elif name.endswith(("lm_head.weight", "embed_tokens.weight", "score.weight")):
                values = noise * 1.7 / parameter.shape[-1] ** 0.5
            else:
                values = noise * 1.4 / parameter.shape[-1] ** 0.5
            parameter.copy_(values)


def randomise_hybrid(model, seed: int, scale: float = 0.1) -> None:
    """Weights of a hybrid such that every one counts, and that logits of float32 are known to 3e-5.

    A rule's memory makes errors of rounding grow with the size of the weights: of matrices N(0, 0.3²), the logits of
    transformers itself are known to 3e-4 alone. Decays are spread as transformers draws them.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if name.endswith("A_log"):
                parameter.copy_(torch.empty_like(noise).uniform_(0.01, 16, generator=generator).log())
            elif name.endswith("linear_attn.norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("norm.weight"):  # centred at zero
                parameter.copy_(0.2 * noise)
            elif name.endswith("dt_bias"):
                parameter.copy_(noise)
            else:
                parameter.copy_(scale * noise)


def implementations(case: Case, attention: str = "eager", experts: str = "eager") -> dict[str, str]:
    """Options that choose transformers' own implementations; dense families refuse to be told one for experts."""
    chosen = {"attn_implementation": attention}
    return chosen | ({"experts_implementation": experts} if case.model_type in SPARSE_FAMILIES + SPARSE_HYBRIDS else {})


def build(case: Case, auto_class=None, attention: str = "eager", experts: str = "eager", **changes):
    """A transformers model of the case with its fresh (not yet randomised) weights, in eval mode."""
    config = transformers.AutoConfig.for_model(**{**case.config, **changes})
    auto_class = auto_class or transformers.AutoModelForCausalLM
    return auto_class.from_config(config, dtype=torch.float32, **implementations(case, attention, experts)).eval()


def ask(model, batch: Batch, masked: bool = True, **options):
    """Runs a transformers model on a batch."""
    if masked:
        options["attention_mask"] = torch.tensor(batch.mask, dtype=torch.long)
    return model(input_ids=torch.tensor(batch.tokens, dtype=torch.long), use_cache=False, **options)


def logits_of(model, batch: Batch, masked: bool = True) -> np.ndarray:
    """Float32 logits of a transformers model on a batch, without gradients."""
    with torch.no_grad():
        return ask(model, batch, masked).logits.float().numpy()


def routing_gap(router_logits: np.ndarray, top_k: int) -> float:
    """The smallest distance between the last chosen and the first unchosen expert; infinite when all are chosen."""
    ranked = -np.sort(-router_logits, axis=-1)
    if top_k >= ranked.shape[-1]:
        return float("inf")
    return float((ranked[..., top_k - 1] - ranked[..., top_k]).min())


class Reference:
    """One case built, with everything the tests ask of it; expensive answers are computed once."""

    def __init__(self, case: Case, folder: Path, auto_class=None, batch_seed: int = 0, **changes):
        self.case = case
        self.batch = make_batch(case, batch_seed)
        self._folder = folder
        self.model = build(case, auto_class, **changes)
        for seed in range(20):  # the first seed without a near-tie in routing; the same one on every run
            (randomise_hybrid if case.model_type in HYBRID_FAMILIES else randomise)(self.model, seed)
            if not self.num_sparse_layers or self._routing_is_clear():
                break
        else:
            raise AssertionError(f"{case.name}: no seed without near-ties in routing")

    def _routing_is_clear(self) -> bool:
        with torch.no_grad():
            logits = self._routers(self._ask(self.model.model))
        return routing_gap(logits[:, self.batch.real], self.top_k) > SMALLEST_ROUTING_GAP

    @property
    def config(self):
        return self.model.config

    @property
    def top_k(self) -> int:
        return self.config.num_experts_per_tok

    @property
    def num_sparse_layers(self) -> int:
        return sum(hasattr(layer.mlp, "experts") for layer in self.model.model.layers)

    @cached_property
    def folder(self) -> Path:
        """The checkpoint, as transformers saves it."""
        path = self._folder / self.case.name
        self.model.save_pretrained(path)
        return path

    def _ask(self, model, **options):
        """Asks for router logits only where a layer is sparse: with none, transformers 5.23 raises an IndexError."""
        return ask(model, self.batch, **({"output_router_logits": True} if self.num_sparse_layers else {}), **options)

    @cached_property
    def output(self):
        with torch.no_grad():
            return self._ask(self.model, output_hidden_states=True)

    @property
    def logits(self) -> np.ndarray:
        return self.output.logits.numpy()

    @property
    def hidden_states(self) -> np.ndarray:
        return torch.stack(self.output.hidden_states).numpy()

    def _routers(self, output) -> np.ndarray:
        return torch.stack(output.router_logits).float().numpy().reshape(-1, *self.batch.tokens.shape, self.num_experts)

    @property
    def num_experts(self) -> int:
        has_alias = self.case.model_type in ("qwen3_moe", "mixtral")
        return self.config.num_local_experts if has_alias else self.config.num_experts

    @property
    def router_logits(self) -> np.ndarray:
        """[sparse layers, B, T, E], before the softmax."""
        return self._routers(self.output)

    @property
    def tokens_per_expert(self) -> np.ndarray:
        """How many real tokens each expert of each sparse layer was given: [sparse layers, E]."""
        chosen = np.argsort(-self.router_logits, axis=-1)[..., : self.top_k][:, self.batch.real]
        return np.stack([np.bincount(layer.ravel(), minlength=self.num_experts) for layer in chosen])

    @cached_property
    def loss_and_gradients(self) -> tuple[float, dict[str, np.ndarray]]:
        """transformers' own training loss (cross-entropy plus weighted aux loss) and its gradients by Hub name."""
        self.model.zero_grad()
        output = self._ask(self.model, labels=torch.tensor(self.batch.labels, dtype=torch.long))
        output.loss.backward()
        gradients = {name: parameter.grad.numpy().copy() for name, parameter in self.model.named_parameters()}
        self.model.zero_grad()
        return output.loss.item(), hub_tensors(gradients, self.case.model_type)


def hub_tensors(tensors: dict[str, np.ndarray], model_type: str) -> dict[str, np.ndarray]:
    """In-memory names of transformers 5 (fused expert stacks) to the names and layout of the files on the Hub."""
    result = {}
    for name, value in tensors.items():
        if ".mlp.experts." in name or (model_type == "mixtral" and ".mlp." in name):
            result.update(_hub_mlp_tensors(name, value, model_type))
        else:
            result[name] = value
    return result


def _hub_mlp_tensors(name: str, value: np.ndarray, model_type: str) -> Iterator[tuple[str, np.ndarray]]:
    if model_type == "mixtral":
        name = name.replace(".mlp.", ".block_sparse_moe.")
        words = {"gate": "w1", "up": "w3", "down": "w2"}
    else:
        words = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    if name.endswith("experts.gate_up_proj"):
        prefix = name.removesuffix("gate_up_proj")
        for expert, rows in enumerate(value):
            gate, up = np.split(rows, 2)
            yield f"{prefix}{expert}.{words['gate']}.weight", gate
            yield f"{prefix}{expert}.{words['up']}.weight", up
    elif name.endswith("experts.down_proj"):
        prefix = name.removesuffix("down_proj")
        for expert, rows in enumerate(value):
            yield f"{prefix}{expert}.{words['down']}.weight", rows
    else:
        yield name, value


class References:
    """All references of a test session, each built on first use."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._built: dict[str, Reference] = {}

    def __getitem__(self, name: str) -> Reference:
        if name not in self._built:
            self._built[name] = Reference((CASES | HYBRID_CASES)[name], self._folder)
        return self._built[name]
