"""Two checkpoints: the same in every form, and each corruption named by what was done."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_moe_jax.cli.main import main
from qwen_moe_jax.huggingface.convert import convert
from qwen_moe_jax.surgery.verify import compare_checkpoints
from tests.surgery.folders import arrays_of, config_of, fp8_config, fused, in_float8, interleaved, write

CASE = "qwen3_moe-plain"
EXPERTS, HEAD_DIM, LAYERS = 8, 8, 3
QUICK = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("a") / "A", arrays_of(CASE), config_of(CASE))


def expert(layer, number, matrix):
    return f"model.layers.{layer}.mlp.experts.{number}.{matrix}_proj.weight"


def attention(layer, part):
    return f"model.layers.{layer}.self_attn.{part}.weight"


def found(folder, changes, tmp_path, config=None, **options):
    """The comparison with A changed: names to arrays, or to None where a tensor is taken out."""
    arrays = {name: value for name, value in {**arrays_of(CASE), **changes}.items() if value is not None}
    return compare_checkpoints(folder, write(tmp_path / "B", arrays, config or config_of(CASE)), **options)


def only(comparison, kind):
    """The one finding, which is of this kind and explains every tensor that differs."""
    assert comparison.verdict != "same"
    assert {finding.kind for finding in comparison.findings} == {kind}, comparison.findings
    return comparison.findings[0]


# the same


@pytest.mark.parametrize("form", ["same", "fused", "bfloat16", "float16", "float8", "fused bfloat16"])
def test_other_forms_of_a_model_are_the_same_model(form, folder, tmp_path):
    arrays, config = arrays_of(CASE), config_of(CASE)
    if "fused" in form:
        arrays = fused(arrays)
    if "float16" in form:
        arrays = {name: value.astype(form.split()[-1]) for name, value in arrays.items()}
    if form == "float8":
        arrays, config = in_float8(arrays), fp8_config(config)
    comparison = compare_checkpoints(folder, write(tmp_path / "B", arrays, config))
    assert comparison.findings == () and comparison.same
    assert comparison.verdict == ("same" if form in ("same", "fused") else "rounding")
    if form == "bfloat16":
        [rounded] = comparison.rounded
        worst = max(
            np.abs(value.astype("bfloat16").astype(np.float32) - value).max() for value in arrays_of(CASE).values()
        )
        assert rounded.largest == pytest.approx(worst) and rounded.count == comparison.tensors
        assert 0 < rounded.relative <= 2**-8


@pytest.mark.parametrize(
    "case", ["qwen2_moe-plain", "mixtral-plain", "qwen2-tied", "qwen3_next-plain", "qwen3_5_moe-plain", "qwen3_5-tied"]
)
def test_every_family_is_the_same_model_in_orbax_and_back_and_in_bfloat16(case, tmp_path):
    hub = write(tmp_path / "hub", arrays_of(case), config_of(case))
    convert(hub, tmp_path / "native", to="orbax")
    convert(tmp_path / "native", tmp_path / "back", dtype="bfloat16")
    native = compare_checkpoints(hub, tmp_path / "native")
    assert (native.verdict, native.findings) == ("same", ())
    back = compare_checkpoints(tmp_path / "native", tmp_path / "back")
    assert (back.verdict, back.findings) == ("rounding", ())


def test_files_of_torch_are_the_same_model(folder, tmp_path):
    torch = pytest.importorskip("torch")
    other = write(tmp_path / "bin", {}, config_of(CASE))
    (other / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(value) for name, value in arrays_of(CASE).items()}, other / "pytorch_model.bin")
    assert compare_checkpoints(folder, other).verdict == "same"


def test_two_quantised_folders_of_one_model_are_the_same_up_to_rounding(tmp_path):
    first = write(tmp_path / "16", in_float8(arrays_of(CASE)), fp8_config(config_of(CASE)))
    second = write(tmp_path / "8", in_float8(arrays_of(CASE), 8), fp8_config(config_of(CASE), 8))
    comparison = compare_checkpoints(first, second)
    assert (comparison.verdict, comparison.findings) == ("rounding", ())


def test_a_head_stored_as_well_as_an_embedding_that_it_equals_is_the_same_model(tmp_path):
    tied = {name: value for name, value in arrays_of(CASE).items() if name != "lm_head.weight"}
    first = write(tmp_path / "A", tied, {**config_of(CASE), "tie_word_embeddings": True})
    both = {**tied, "lm_head.weight": tied["model.embed_tokens.weight"]}
    second = write(tmp_path / "B", both, {**config_of(CASE), "tie_word_embeddings": False})
    assert compare_checkpoints(first, second).verdict == "same"


# experts and routers


@QUICK
@given(layer=st.integers(0, LAYERS - 1), order=st.permutations(range(EXPERTS)), likewise=st.booleans())
def test_permuted_experts_are_named_with_the_permutation(layer, order, likewise, folder, tmp_path_factory):
    arrays = arrays_of(CASE)
    changes = {
        expert(layer, e, m): arrays[expert(layer, order[e], m)] for e in range(EXPERTS) for m in ("gate", "up", "down")
    }
    if likewise:
        changes[f"model.layers.{layer}.mlp.gate.weight"] = arrays[f"model.layers.{layer}.mlp.gate.weight"][list(order)]
    comparison = found(folder, changes, tmp_path_factory.mktemp("b"))
    if list(order) == list(range(EXPERTS)):
        assert comparison.verdict == "same"
        return
    finding = only(comparison, "experts permuted")
    assert (finding.layer, finding.permutation, finding.harmless) == (layer, tuple(order), likewise)
    assert comparison.verdict == ("reordered" if likewise else "differs")


@QUICK
@given(layer=st.integers(0, LAYERS - 1), order=st.permutations(range(EXPERTS)))
def test_router_rows_permuted_alone_are_named(layer, order, folder, tmp_path_factory):
    name = f"model.layers.{layer}.mlp.gate.weight"
    comparison = found(folder, {name: arrays_of(CASE)[name][list(order)]}, tmp_path_factory.mktemp("b"))
    if list(order) != list(range(EXPERTS)):
        finding = only(comparison, "router permuted")
        assert (finding.layer, finding.permutation, comparison.same) == (layer, tuple(order), False)


@QUICK
@given(
    layer=st.integers(0, LAYERS - 1),
    number=st.integers(0, EXPERTS - 1),
    what=st.sampled_from(["exchanged", "transposed", "experts repeated", "random", "constant"]),
    float8=st.booleans(),
)
def test_what_happened_to_one_expert_is_named(layer, number, what, float8, folder, tmp_path_factory):
    arrays = arrays_of(CASE)
    gate, up = expert(layer, number, "gate"), expert(layer, number, "up")
    other = (number + 3) % EXPERTS
    changes = {
        "exchanged": {gate: arrays[up], up: arrays[gate]},
        "transposed": {gate: arrays[gate].T, up: arrays[up].T},
        "experts repeated": {expert(layer, number, m): arrays[expert(layer, other, m)] for m in ("gate", "up", "down")},
        "random": {up: (np.random.default_rng(9).standard_normal((24, 32)) * 0.02).astype(np.float32)},
        "constant": {up: np.zeros((24, 32), np.float32)},
    }[what]
    tmp_path = tmp_path_factory.mktemp("b")
    quantised = what != "constant" and float8
    if quantised:
        config = fp8_config(config_of(CASE))
        comparison = compare_checkpoints(folder, write(tmp_path, in_float8({**arrays, **changes}), config))
    else:
        comparison = found(folder, changes, tmp_path)
    finding = only(comparison, what)
    assert finding.layer == layer and comparison.verdict == "differs"
    assert set(finding.names) == set(changes)
    if what in ("exchanged", "transposed", "experts repeated"):
        assert finding.experts == (number,)
    if what == "experts repeated":
        assert f"{number} is A's {other}" in finding.words


def test_one_kind_of_matrix_permuted_alone_is_named(folder, tmp_path):
    arrays = arrays_of(CASE)
    changes = {expert(0, e, "down"): arrays[expert(0, (e + 1) % EXPERTS, "down")] for e in range(EXPERTS)}
    finding = only(found(folder, changes, tmp_path), "permuted alone")
    assert finding.permutation == (1, 2, 3, 4, 5, 6, 7, 0) and "down matrices" in finding.words


def test_fused_experts_with_up_before_gate_are_exchanged(folder, tmp_path):
    arrays = fused(arrays_of(CASE))
    changed = {name: np.roll(value, 24, axis=1) if "gate_up" in name else value for name, value in arrays.items()}
    comparison = compare_checkpoints(folder, write(tmp_path / "B", changed, config_of(CASE)))
    assert [(finding.kind, finding.layer) for finding in comparison.findings] == [
        ("exchanged", i) for i in range(LAYERS)
    ]
    assert all(finding.experts == tuple(range(EXPERTS)) for finding in comparison.findings)


def test_fused_experts_that_are_transposed_are_named(folder, tmp_path):
    arrays = fused(arrays_of(CASE))
    name = "model.layers.1.mlp.experts.down_proj"
    changed = {**arrays, name: np.swapaxes(arrays[name], 1, 2)}
    comparison = compare_checkpoints(folder, write(tmp_path / "B", changed, config_of(CASE)))
    kinds = {finding.kind for finding in comparison.findings}
    assert kinds == {"transposed", "missing"} and name in comparison.findings[0].words


def test_an_expert_of_another_layer_is_named(folder, tmp_path):
    changes = {expert(0, 2, "up"): arrays_of(CASE)[expert(2, 5, "up")]}
    assert expert(2, 5, "up") in only(found(folder, changes, tmp_path), "another tensor").words


# other tensors


@QUICK
@given(layer=st.integers(0, LAYERS - 1), part=st.sampled_from(["q_proj", "k_proj"]), back=st.booleans())
def test_another_rope_order_is_named(layer, part, back, folder, tmp_path_factory):
    name, tmp_path = attention(layer, part), tmp_path_factory.mktemp("b")
    changed = {**arrays_of(CASE), name: interleaved(arrays_of(CASE)[name], HEAD_DIM, HEAD_DIM)}
    other = write(tmp_path / "B", changed, config_of(CASE))
    finding = only(compare_checkpoints(*((other, folder) if back else (folder, other))), "rope order")
    assert finding.names == (name,)
    assert ("interleaved in A" if back else "interleaved in B") in finding.words


@pytest.mark.parametrize("offset", [-1, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_that_are_off_by_one_are_named(offset, dtype, folder, tmp_path):
    arrays = arrays_of(CASE)
    changes = {name: (value + offset).astype(dtype) for name, value in arrays.items() if "norm" in name}
    comparison = found(folder, changes, tmp_path)
    assert only(comparison, "norm offset") and len(comparison.findings) == len(changes)
    assert all(("larger" if offset > 0 else "smaller") in finding.words for finding in comparison.findings)


@pytest.mark.parametrize("shape", ["square", "oblong"])
def test_a_transposed_matrix_is_named(shape, folder, tmp_path):
    name = attention(1, "q_proj" if shape == "square" else "k_proj")
    assert only(found(folder, {name: arrays_of(CASE)[name].T}, tmp_path), "transposed").names == (name,)


@pytest.mark.parametrize("parts, axis", [([0, 0], 0), ([1, 0], 0), ([0, 1, 1, 3], 0), ([1, 1], 1)])
def test_a_repeated_or_exchanged_shard_is_named(parts, axis, folder, tmp_path):
    name = attention(0, "o_proj")
    split = np.split(arrays_of(CASE)[name], len(parts), axis=axis)
    finding = only(found(folder, {name: np.concatenate([split[at] for at in parts], axis=axis)}, tmp_path), "shards")
    assert finding.names == (name,) and f"A's {parts}" in finding.words
    assert ("repeated" in finding.words) == (len(set(parts)) < len(parts))


def test_vocabularies_of_other_sizes_are_named(folder, tmp_path):
    table, head = (arrays_of(CASE)[name] for name in ("model.embed_tokens.weight", "lm_head.weight"))
    changes = {
        "model.embed_tokens.weight": table[:90],
        "lm_head.weight": np.concatenate([head, np.zeros((7, 32), np.float32)]),
    }
    comparison = found(folder, changes, tmp_path)
    words = {finding.names[0]: finding.words for finding in comparison.findings}
    assert {finding.kind for finding in comparison.findings} == {"vocabulary"}
    assert "truncated from 97 to 90" in words["model.embed_tokens.weight"]
    assert "padded from 97 to 104 rows with zeros" in words["lm_head.weight"]
    assert all("rows are the same" in text for text in words.values())


def test_a_head_in_place_of_a_tied_one_is_named(tmp_path):
    arrays = arrays_of(CASE)
    tied = {name: value for name, value in arrays.items() if name != "lm_head.weight"}
    first = write(tmp_path / "A", tied, {**config_of(CASE), "tie_word_embeddings": True})
    comparison = compare_checkpoints(first, write(tmp_path / "B", arrays, config_of(CASE)))
    finding = only(comparison, "head replaced")
    assert "is tied to the embedding in A and has values of its own in B" in finding.words


def test_missing_and_further_tensors_are_named(folder, tmp_path):
    changes = {"model.norm.weight": None, "model.layers.1.self_attn.q_proj.bias": np.zeros(32, np.float32)}
    comparison = found(folder, changes, tmp_path)
    assert {(finding.kind, finding.names) for finding in comparison.findings} == {
        ("missing", ("model.norm.weight",)),
        ("extra", ("model.layers.1.self_attn.q_proj.bias",)),
    }


def test_a_lost_next_token_head_is_named(tmp_path):
    case = "qwen3_next-plain"
    mtp = {"mtp.norm.weight": np.ones(32, np.float32), "mtp.fc.weight": np.ones((32, 64), np.float32)}
    first = write(tmp_path / "A", arrays_of(case) | mtp, config_of(case))
    finding = only(compare_checkpoints(first, write(tmp_path / "B", arrays_of(case), config_of(case))), "mtp lost")
    assert set(finding.names) == set(mtp)


def test_gaps_scales_and_changes_are_named(folder, tmp_path):
    arrays = arrays_of(CASE)
    holes, rows = arrays[attention(0, "k_proj")].copy(), arrays[attention(1, "v_proj")].copy()
    holes[3, 4] = np.nan
    rows[2] += 0.01
    tuned = arrays[expert(1, 1, "up")] * (1 + 0.01 * np.random.default_rng(0).standard_normal((24, 32)))
    changes = {
        attention(0, "k_proj"): holes,
        attention(1, "v_proj"): rows,
        attention(2, "o_proj"): arrays[attention(2, "o_proj")] * np.float32(0.5),
        expert(1, 1, "up"): tuned.astype(np.float32),
    }
    by_name = {finding.names[0]: finding for finding in found(folder, changes, tmp_path).findings}
    assert by_name.keys() == changes.keys()
    assert by_name[attention(0, "k_proj")].kind == "not finite"
    assert "(rows 2)" in by_name[attention(1, "v_proj")].words
    scaled = by_name[attention(2, "o_proj")]
    assert scaled.kind == "scaled" and scaled.factor == pytest.approx(0.5)
    assert by_name[expert(1, 1, "up")].kind == "changed" and "1% of A's norm" in by_name[expert(1, 1, "up")].words


def test_a_config_that_means_another_function_is_named(folder, tmp_path):
    comparison = found(folder, {}, tmp_path, {**config_of(CASE), "rope_theta": 5e5, "num_experts_per_tok": 2})
    assert {finding.kind for finding in comparison.findings} == {"config"}
    text = " ".join(finding.words for finding in comparison.findings)
    assert "theta: 10000.0 in A, 500000.0 in B" in text and "num_experts_per_tok: 3 in A, 2 in B" in text


# adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder of adapters, and their products scaling · B A by the name of the matrix."""
    folder = tmp_path_factory.mktemp("adapter")
    rng, scaling, tensors, products = np.random.default_rng(5), 2.0, {}, {}
    for layer, part in [(0, "q_proj"), (1, "v_proj")]:
        rows, columns = arrays_of(CASE)[attention(layer, part)].shape
        a, b = (rng.standard_normal(shape).astype(np.float32) * 0.1 for shape in ((4, columns), (rows, 4)))
        path = f"base_model.model.model.layers.{layer}.self_attn.{part}"
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        products[attention(layer, part)] = np.float32(scaling) * (b @ a)
    write(folder, tensors, {})
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, products


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("times, kind", [(0, "missing"), (1, None), (2, "twice"), (0.5, "scaled"), (-1, "scaled")])
def test_how_often_an_adapter_was_added_is_named(times, kind, dtype, folder, adapter, tmp_path):
    where, products = adapter
    changes = {name: arrays_of(CASE)[name] + np.float32(times) * product for name, product in products.items()}
    arrays = {name: value.astype(dtype) for name, value in {**arrays_of(CASE), **changes}.items()}
    comparison = compare_checkpoints(folder, write(tmp_path / "B", arrays, config_of(CASE)), adapter=where)
    if kind is None:
        assert (comparison.same, comparison.findings) == (True, ())
        return
    assert {finding.names[0] for finding in comparison.findings} == set(products)
    assert {finding.kind for finding in comparison.findings} == {f"adapter {kind}"}
    assert all(finding.factor == pytest.approx(times, abs=0.02) for finding in comparison.findings)


@pytest.mark.parametrize("size", [0.05, 0.001, 1e-8])
def test_an_adapter_below_the_rounding_of_each_weight_is_seen(size, tmp_path):
    """It is missed if it is not there; one that rounding removes altogether is no fault."""
    arrays = {name: value.astype("bfloat16") for name, value in arrays_of(CASE).items()}
    base, where, name = write(tmp_path / "A", arrays, config_of(CASE)), tmp_path / "adapter", "q_proj"
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(shape).astype(np.float32) * 0.1 for shape in ((2, 32), (32, 2)))
    path = f"base_model.model.model.layers.0.self_attn.{name}"
    write(where, {f"{path}.lora_A.weight": a * size, f"{path}.lora_B.weight": b}, {})
    (where / "model.safetensors").rename(where / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [name]}
    (where / "adapter_config.json").write_text(json.dumps(config))
    convert(base, tmp_path / "merged", adapter=where)
    assert compare_checkpoints(base, tmp_path / "merged", adapter=where).same
    without = compare_checkpoints(base, base, adapter=where)
    assert [finding.kind for finding in without.findings] == (["adapter missing"] if size > 1e-5 else [])


def test_what_convert_merges_is_what_is_expected(folder, adapter, tmp_path):
    for dtype in ("float32", "bfloat16"):
        convert(folder, tmp_path / dtype, adapter=adapter[0], dtype=dtype)
        assert compare_checkpoints(folder, tmp_path / dtype, adapter=adapter[0]).same
    assert compare_checkpoints(folder, tmp_path / "float32").verdict == "differs"


# the command


def test_exit_codes_and_output_of_the_command(folder, tmp_path, capsys):
    name = attention(1, "q_proj")
    other = write(tmp_path / "B", {**arrays_of(CASE), name: arrays_of(CASE)[name].T}, config_of(CASE))
    assert main(["verify", str(folder), str(folder)]) == 0
    assert "equal in every bit" in capsys.readouterr().out
    assert main(["verify", str(folder), str(other)]) == 1
    printed = capsys.readouterr().out
    assert "Not the same model" in printed and "transposed" in printed and name in printed
    assert main(["verify", str(folder), str(other), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["verdict"], result["same"], result["findings"][0]["names"]) == ("differs", False, [name])
    assert main(["verify", str(folder), str(tmp_path / "nowhere")]) == 2
    assert main(["verify", str(folder), "--adapter", str(folder)]) == 2
    assert "Give B" in capsys.readouterr().err
