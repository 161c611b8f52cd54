"""Thousands of damaged headers, indexes and configs: each is opened or refused by name, in little time and memory."""

import dataclasses
import functools
import itertools
import json
import math
import re
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.checkpoint import open_checkpoint, problems_of
from qwen_moe_jax.huggingface.generation_config import read_generation_config
from qwen_moe_jax.huggingface.tensors import hub_parameters
from qwen_moe_jax.model.rotary import inverse_frequencies

SINGLE, INDEX, CONFIG, GENERATION = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
)
HUB = dict(
    model_type="qwen3_moe",
    architectures=["Qwen3MoeForCausalLM"],
    vocab_size=24,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    num_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=6,
    mlp_only_layers=[0],
    max_position_embeddings=32,
    torch_dtype="float32",
)
#: The text model of a multimodal folder, a linear layer and a full one.
HYBRID = dict(
    model_type="qwen3_5_moe_text",
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=2,
    linear_value_head_dim=2,
    linear_conv_kernel_dim=2,
    shared_expert_intermediate_size=2,
    rope_parameters={"rope_theta": 100.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 0, 0]},
    mtp_num_hidden_layers=0,
    **{
        name: value
        for name, value in HUB.items()
        if name not in ("model_type", "architectures", "intermediate_size", "mlp_only_layers")
    },
)
#: What stands in place of a value. Infinity is written as 1e400 at times, which JSON allows.
DEEP = functools.reduce(lambda inner, _: [inner], range(300), 1)
NASTY = [
    *(None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**12, 10**30, 10**400, -(10**30)),
    *(0.5, -0.5, 2.0, 1e-300, 1e300, math.inf, -math.inf, math.nan),
    *("", "x", "1", "null", "\ud800", "\0", "../x", "float32", "qwen2", [], {}, [1, 2], [[]], [None], [{}], ["x"]),
    *({"a": 1}, {"a": {"b": [None]}}, DEEP),
]
#: The same, as text of its own: some of it is no JSON.
TOKENS = [
    *(
        b"null",
        b"true",
        b"-1",
        b"0",
        b"1",
        b"2",
        b"1e400",
        b"-1e400",
        b"NaN",
        b"Infinity",
        b"0x10",
        b"1.0",
        b"1e1",
        b"-0",
    ),
    *(b'""', b'"x"', b'"F32"', b'"\xff"', b'"\\ud800"', b"[]", b"{}", b"", b",", b"]", b"}", b"99999999999999999999"),
    *(b"9" * 5000, b"[" * 2000, b"[" * 100_000, b'{"a":' * 2000, b"\x00", b"\xef\xbb\xbf", b"1" + b"0" * 400),
]
MEMORY = 1 << 30
SECONDS = 10.0


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A whole checkpoint as one file, and as several with an index."""
    folder = tmp_path_factory.mktemp("fuzz")
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(HUB), rngs=nnx.Rngs(0))
    qmj.save_pretrained(model, folder / "single")
    qmj.save_pretrained(model, folder / "sharded", max_shard_size=3000)
    hybrid = qmj.CausalLM(qmj.ModelConfig.from_pretrained(HYBRID), rngs=nnx.Rngs(0))
    qmj.save_pretrained(hybrid, folder / "hybrid")
    nested = {"model_type": "qwen3_5_moe", "text_config": HYBRID, "vision_config": {}, "tie_word_embeddings": False}
    (folder / "hybrid" / CONFIG).write_text(json.dumps(nested))
    return folder


@pytest.fixture
def folder_of(pristine, tmp_path):
    def copy(kind: str) -> Path:
        return Path(shutil.copytree(pristine / kind, tmp_path / kind))

    return copy


# ---- mutations ------------------------------------------------------------------------------------------------------


def places(found: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = list(found) if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ()
    return [(found, key) for key in keys] + [place for key in keys for place in places(found[key])]


def edit_value(numbers: np.random.Generator, content: Any) -> None:
    """Changes one value of a JSON object in place: puts something else there, removes it, or moves it."""
    some = places(content)
    container, key = some[numbers.integers(len(some))]
    kind = numbers.integers(6)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container[key], int):
        container[key] += int(numbers.choice([-1, 1, 2, 1 << 20, 1 << 40, 1 << 62]))
    elif kind == 2:
        other, its_key = some[numbers.integers(len(some))]
        container[key] = json.loads(json.dumps(other[its_key]))  # a copy: nothing may come to hold itself
    elif kind == 3 and isinstance(container, dict):
        container[str(numbers.choice(["", "x", "\ud800", "model.norm.weight", "lm_head.weight"]))] = container.pop(key)
    else:
        container[key] = NASTY[numbers.integers(len(NASTY))]


def edit_text(numbers: np.random.Generator, text: bytes) -> bytes:
    """Changes the text of a JSON object: bytes flipped, tokens replaced, parts repeated or cut out."""
    start, end = sorted(int(place) for place in numbers.integers(0, len(text), 2))
    kind = numbers.integers(6)
    if kind == 0:
        data = np.frombuffer(text, np.uint8).copy()
        where = numbers.integers(0, len(data), numbers.integers(1, 4))
        data[where] ^= (1 << numbers.integers(0, 8, len(where))).astype(np.uint8)
        return data.tobytes()
    if kind == 1:
        return text[:start] + text[end:]
    if kind == 2:
        return text[:end] + text[start:]
    if kind == 3:
        return text[:start] + numbers.bytes(int(numbers.integers(1, 9))) + text[start:]
    tokens = list(re.finditer(rb'"[^"]*"|-?[\d.]+|true|null', text))
    if not tokens:
        return b""
    token = tokens[numbers.integers(len(tokens))]
    return text[: token.start()] + TOKENS[numbers.integers(len(TOKENS))] + text[token.end() :]


def mutations(text: bytes, count: int, seed: int, edit: Callable = edit_value) -> Iterator[bytes]:
    """A JSON object with one to three of its values changed, or its text, or both."""
    numbers = np.random.default_rng(seed)
    for _ in range(count):
        content = json.loads(text)
        for _ in range(numbers.integers(0, 3)):
            if content:
                edit(numbers, content)
        changed = json.dumps(content).encode()
        if numbers.integers(3) == 0:
            changed = changed.replace(b"Infinity", b"1e400")
        yield edit_text(numbers, changed) if numbers.integers(2) == 0 else changed


def edit_header(numbers: np.random.Generator, header: dict[str, Any]) -> None:
    """Changes one thing that only a header has: consistent lies, which no check of a single field finds."""
    names = [name for name in header if isinstance(header[name], dict) and "shape" in header[name]]
    kind = numbers.integers(8)
    if kind > 3 or len(names) < 2:
        edit_value(numbers, header)
        return
    one, other = (str(name) for name in numbers.choice(names, 2, replace=False))
    if kind == 0:  # another shape of as many elements, or of none
        shapes = [[-1], [0], [1] * 40, [1] * 70, [2**40, 0, 2**40], [2**62, 0, 0], [0, 2**62], [2**40, 2, 1]]
        header[one]["shape"] = shapes[numbers.integers(len(shapes))]
        if 0 in header[one]["shape"]:
            header[one]["data_offsets"] = [0, 0]
    elif kind == 1:  # another element type of as many bytes
        header[one]["dtype"] = str(numbers.choice(["I32", "U32", "F32", "F64", "BF16", "F8_E4M3", "C64", "F4"]))
    elif kind == 2:  # two that share their data, or have each other's
        header[one], header[other] = header[other], header[one if numbers.integers(2) else other]
    else:  # tensors that are not the model's
        name = str(
            numbers.choice(
                [
                    "model.layers.1.mlp.experts.gate_up_proj",
                    "model.layers.1.mlp.experts.down_proj",
                    "layers.1.mlp.experts.down_proj",
                    "embed_tokens.weight",
                    "mtp.layers.0.weight",
                    "model.norm.weight_scale_inv",
                ]
            )
        )
        shape = [int(size) for size in numbers.choice([0, 1, 2, 1 << 40, 1 << 62], 3)]
        at = int(numbers.integers(0, 2)) * 4
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}


# ---- what must hold -------------------------------------------------------------------------------------------------


class Held:
    """Opens folders, and holds every outcome to what must be.

    Attributes:
        outcomes: how many were sound, how many refused.
        to_load: how many sound ones are loaded as well: it costs much more.
    """

    def __init__(self, to_load: int):
        self.outcomes = Counter()
        self.to_load = to_load
        self._described = functools.cache(lambda head, config: hub_parameters(head(config, rngs=None)))

    def __call__(self, folder: Path) -> None:
        began = time.process_time()
        refusal = self._refusal(folder)
        if refusal is None and self.to_load:
            self.to_load -= 1
            self.outcomes["loaded"] += 1
            qmj.from_pretrained(folder)
        took = time.process_time() - began
        assert took < SECONDS, f"{took} seconds"
        if refusal is not None:
            assert str(folder) in refusal and len(refusal) < 5000, refusal
            assert all(line.isprintable() for line in refusal.splitlines()), refusal
        self.outcomes["sound" if refusal is None else "refused"] += 1

    def _refusal(self, folder: Path) -> str | None:
        try:
            checkpoint = open_checkpoint(folder)
            # Most of the time of an opening goes here, and most changes do not change the model.
            config = dataclasses.replace(checkpoint.config, hub_fields=(), rope=qmj.config.RopeConfig())
            problems = problems_of(checkpoint, self._described(checkpoint.head, config))
            if not problems:
                read_generation_config(folder, checkpoint.config)
        except (qmj.CheckpointError, qmj.ConfigError) as error:
            return str(error)
        rope = checkpoint.config.rope
        if rope.rope_type != "dynamic":
            frequencies, factor = inverse_frequencies(rope, checkpoint.config.rotary_dim)
            assert np.isfinite(frequencies).all() and math.isfinite(factor)
        return None if not problems else f"{folder}: " + "\n".join(problems[:40])


@pytest.fixture
def held():
    """Asserts at the end that the memory of this process has not grown beyond reason."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = Held(to_load=40)
    yield held
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY, f"{grown} bytes"


def run(held: Held, folder: Path, path: Path, contents: Iterator[bytes]) -> None:
    pristine = path.read_bytes()
    held(folder)
    assert held.outcomes["sound"] == 1, "the folder itself is not sound"
    for number, content in enumerate(contents):
        path.write_bytes(content)
        try:
            held(folder)
        except BaseException as error:
            error.add_note(f"mutation {number}: {content[:4000]!r}")
            raise
    path.write_bytes(pristine)


# ---- the files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_mutated_header_is_read_or_refused(held, folder_of, tied):
    """With a tied config the two tables are read already when the folder is opened, to be compared."""
    folder = folder_of("single")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    path = folder / SINGLE
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    numbers = np.random.default_rng(tied)

    def files() -> Iterator[bytes]:
        for text in mutations(header, 1300, seed=2 + tied, edit=edit_header):
            said = len(text)
            if numbers.integers(10) == 0:
                said += int(numbers.choice([-8, -1, 1, 8, 1 << 20, 1 << 40]))
            own = data
            if numbers.integers(10) == 0:
                own = data[: numbers.integers(len(data))] if numbers.integers(2) else data + bytes(8)
            yield (said % 2**64).to_bytes(8, "little") + text + own

    run(held, folder, path, files())
    assert held.outcomes["sound"] > 50 and held.outcomes["refused"] > 800, held.outcomes


def test_a_mutated_index_is_read_or_refused(held, folder_of):
    folder = folder_of("sharded")
    path = folder / INDEX
    run(held, folder, path, mutations(path.read_bytes(), 1200, seed=4))
    assert held.outcomes["sound"] > 50 and held.outcomes["refused"] > 500, held.outcomes


def config_with_one_field_changed(content: dict[str, Any]) -> Iterator[bytes]:
    """Every field, given or not, with every nasty value; and without it."""
    more = [
        "rope_scaling",
        "rope_parameters",
        "quantization_config",
        "layer_types",
        "num_local_experts",
        "sliding_window",
    ]
    more += [
        "use_sliding_window",
        "decoder_sparse_step",
        "id2label",
        "num_labels",
        "partial_rotary_factor",
        "pad_token_id",
    ]
    more += ["eos_token_id", "hidden_act", "max_window_layers", "original_max_position_embeddings", "attention_bias"]
    for name, value in itertools.product(dict.fromkeys([*content, *more]), NASTY):
        yield json.dumps({**content, name: value}).encode()
    for name in content:
        yield json.dumps({key: value for key, value in content.items() if key != name}).encode()


def config_with_one_nested_field_changed(content: dict[str, Any]) -> Iterator[bytes]:
    """Every field of every rope and of quantization_config with every nasty value; layer_types of every kind."""
    numbers = dict(
        factor=2.0,
        original_max_position_embeddings=16,
        attention_factor=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
        beta_fast=32.0,
        beta_slow=1.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        rope_theta=100.0,
    )
    of_each = {
        "linear": ["factor", "rope_theta"],
        "yarn": list(numbers),
        "llama3": ["factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"],
    }
    content = {name: value for name, value in content.items() if name not in ("rope_scaling", "rope_parameters")}
    for rope_type, fields in of_each.items():
        rope = {"rope_type": rope_type, **numbers}
        for name, value in itertools.product([*fields, "rope_type"], NASTY):
            yield json.dumps({**content, "rope_scaling": {**rope, name: value}}).encode()
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for name, value in itertools.product(quantised, NASTY):
        yield json.dumps({**content, "quantization_config": {**quantised, name: value}}).encode()
    for value in NASTY:
        yield json.dumps({**content, "quantization_config": {**quantised, "weight_block_size": [128, value]}}).encode()
        yield json.dumps({**content, "model_type": "qwen3", "layer_types": ["full_attention", value]}).encode()


CHANGED: dict[str, Callable[[bytes], Iterator[bytes]]] = {
    "one field": lambda text: config_with_one_field_changed(json.loads(text)),
    "one nested field": lambda text: config_with_one_nested_field_changed(json.loads(text)),
    "at random": lambda text: mutations(text, 600, seed=5),
}


@pytest.mark.parametrize("changed", CHANGED)
def test_a_mutated_config_is_read_or_refused(held, folder_of, changed):
    folder = folder_of("single")
    path = folder / CONFIG
    run(held, folder, path, CHANGED[changed](path.read_bytes()))
    assert held.outcomes["sound"] > 50 and held.outcomes["refused"] > 200, held.outcomes


def hybrid_config_with_one_field_changed(content: dict[str, Any]) -> Iterator[bytes]:
    """Every field that hybrids alone have, given or not, in the text_config, its rope and outside of it."""
    text = content["text_config"]
    more = ["full_attention_interval", "partial_rotary_factor", "tie_word_embeddings", "dtype"]
    own = [
        name for name in text if name.startswith(("linear_", "layer_types", "mtp_", "rope_", "model_type", "shared_"))
    ]
    for name, value in itertools.product([*own, *more], NASTY):
        yield json.dumps({**content, "text_config": {**text, name: value}}).encode()
    for name, value in itertools.product(text["rope_parameters"], NASTY):
        rope = {**text["rope_parameters"], name: value}
        yield json.dumps({**content, "text_config": {**text, "rope_parameters": rope}}).encode()
    for name, value in itertools.product([*content, "dtype", "quantization_config", "architectures"], NASTY):
        yield json.dumps({**content, name: value}).encode()
    for value in NASTY:
        yield json.dumps({**content, "text_config": {**text, "layer_types": ["linear_attention", value]}}).encode()


def test_a_mutated_config_of_a_hybrid_is_read_or_refused(held, folder_of):
    folder = folder_of("hybrid")
    path = folder / CONFIG
    run(held, folder, path, hybrid_config_with_one_field_changed(json.loads(path.read_bytes())))
    assert held.outcomes["sound"] > 50 and held.outcomes["refused"] > 200, held.outcomes


def test_a_mutated_generation_config_is_read_or_refused(folder_of):
    folder = folder_of("single")
    path = folder / GENERATION
    content = dict(
        eos_token_id=[3, 4],
        stop_strings=["a"],
        max_new_tokens=8,
        min_new_tokens=2,
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.05,
        presence_penalty=1.5,
        frequency_penalty=-0.5,
        sequence_bias=[[[7], -2.5], [[8, 9], 1.0]],
        bad_words_ids=[[5], [6, 7]],
        seed=11,
        num_beams=1,
    )
    text = json.dumps(content).encode()
    one_field = [json.dumps({**content, name: value}).encode() for name, value in itertools.product(content, NASTY)]
    config = qmj.ModelConfig.from_pretrained(folder)
    outcomes = Counter()
    for changed in [text, *one_field, *mutations(text, 600, seed=6)]:
        path.write_bytes(changed)
        try:
            read_generation_config(folder, config)
        except qmj.ConfigError as error:
            assert str(error).startswith(str(path)), error
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
    assert outcomes["read"] > 100 and outcomes["refused"] > 500, outcomes
