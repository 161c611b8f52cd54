"""A plan's numbers are those of theory: bytes of parameters, collectives and FLOPs; refusals are answers."""

import dataclasses
import json

import jax
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.config import ExecutionConfig, ModelConfig
from qwen_moe_jax.errors import ConfigError, ShardingError
from qwen_moe_jax.huggingface.hub import config_file
from qwen_moe_jax.moe.dispatch.capacity import expert_capacity
from qwen_moe_jax.plan.compile import group_of, plan_step, refused_bytes, target_mesh
from qwen_moe_jax.plan.inference import decode_step, forward_step, prefill_step
from qwen_moe_jax.plan.remarks import remarks_on
from qwen_moe_jax.plan.result import Collective, Memory
from qwen_moe_jax.plan.table import print_plan
from qwen_moe_jax.plan.targets import parse_target
from tests.plan import golden, samples
from train.config import build_config
from train.main import main
from train.plan import plan_training, planned_model

LAYERS, WIDTH, EXPERTS, ACTIVE = (
    golden.TINY[key] for key in ("num_hidden_layers", "hidden_size", "num_experts", "num_experts_per_tok")
)


@pytest.fixture(scope="module")
def capacity():
    return golden.compiled("step-data2-expert4-capacity")


def test_parameters_are_as_many_bytes_as_arithmetic_says():
    """Weights are sharded over all devices; norms and routers are replicated."""
    config = ModelConfig.from_pretrained(golden.MODELS / "qwen3-235b-a22b.json")
    described = qmj.CausalLM(config, rngs=None, mesh=golden.abstract_mesh(dict(fsdp=32, expert=8)))
    whole = config.num_hidden_layers * (2 * 4096 + 2 * 128 + 128 * 4096 // 256) + 4096
    sharded = config.num_parameters() - config.num_hidden_layers * (2 * 4096 + 2 * 128 + 128 * 4096) - 4096
    assert group_of("parameters", described).bytes == 2 * (whole + sharded // 256)


@pytest.mark.parametrize(
    ("model", "state_mib", "kib_a_token"),
    [
        ("qwen3-next-80b-a3b-instruct", 72, 24),
        ("qwen3.5-35b-a3b", 60, 20),
        ("qwen3.5-397b-a17b", 180, 30),
        ("qwen3.5-27b", 144, 64),
    ],
)
def test_a_hybrid_s_cache_is_a_state_that_does_not_grow_and_the_keys_of_its_full_layers(model, state_mib, kib_a_token):
    config = ModelConfig.from_pretrained(golden.MODELS / f"{model}.json")
    linear = config.linear_attention
    layers = sum(kind.mixer == "linear" for kind in config.layers)
    columns = layers * (linear.conv_kernel_dim - 1) * linear.conv_dim * 2
    for rows, length in [(1, 4096), (4, 32768)]:
        step = decode_step(config, model, qmj.make_mesh(), ExecutionConfig(), rows=rows, max_length=length)
        assert [*step.groups] == ["parameters", "cache", "recurrent state", "requests"]
        state, cache = (group_of(name, step.groups[name]).bytes for name in ("recurrent state", "cache"))
        assert state == rows * (state_mib * 2**20 + columns)
        assert cache == rows * (length * kib_a_token * 2**10 + 4)  # and an int32, the row's length


def test_memory_is_its_parts(capacity):
    memory = capacity.memory
    assert [group.name for group in memory.groups] == ["parameters", "optimizer state", "batch"]
    parameters, optimizer, _ = (group.bytes for group in memory.groups)
    assert 2 * parameters < optimizer < 2 * parameters + 64, "two moments, and a few counters"
    parts = [memory.arguments, memory.padding, memory.outputs, memory.temporaries, memory.code]
    assert memory.compiled + memory.code == sum(parts) and memory.total == sum(parts) + memory.run_time
    assert memory.fits is None, "a simulated device has no limit"


def test_the_exchange_sends_what_theory_says(capacity):
    """Two all-to-alls of every layer forward and two backward, of [E, G, C, D] sharded over the devices."""
    rows, ways, devices = golden.ROWS * golden.LENGTH, 4, 8
    slots = expert_capacity(64, ACTIVE, EXPERTS, 1.25, 4)
    size = EXPERTS * (rows // 64) * slots * WIDTH * 4 // devices
    sent = [one for one in capacity.collectives if one.kind == "all-to-all" and one.in_layers]
    assert {one.axes for one in sent} == {("expert",)}
    assert {one.bytes for one in sent} == {size * (ways - 1) // ways}
    assert sum(one.count for one in sent) == 4 * LAYERS


def test_gradients_are_summed_over_data_as_shards(capacity):
    whole = EXPERTS // 4 * 32 * WIDTH * 4  # one matrix of a device's experts in a layer
    dense = (4 * WIDTH + EXPERTS) * WIDTH * 4 // 4  # a device's shards of the attention's four and of the router's
    [summed] = [
        one for one in capacity.collectives if one.kind == "all-reduce" and one.axes == ("data",) and one.in_layers
    ]
    assert summed.bytes_per_step == 2 * (3 * whole + dense) // 2 * LAYERS


def test_flops_are_the_models_where_nothing_is_added():
    """All experts active, none of them computed twice; scores of later keys belong to no model."""
    execution = {"dispatch": "dense", "dtype": "float32"}
    tables = {"model": {**golden.TINY, "num_experts": 2}, "mesh": {"fsdp": 2}, "execution": execution}
    tables["data"] = {"vocab_size": 512, "seq_len": 64, "batch_size": 4}
    plan = plan_training(build_config(tables, [], "here"), "cpu:2")
    masked = 3 * 4 * 64 * (64 - 65 / 2) * LAYERS * plan.work.tokens
    assert plan.flops.program == pytest.approx(plan.flops.model + masked, rel=0.05)


def test_decoding_counts_one_token(capacity):
    request = parse_target("cpu:4")
    mesh = target_mesh(request, {"expert": 4})
    config = ModelConfig.from_pretrained(golden.TINY)
    before = len(jax.live_arrays())
    step = decode_step(config, "tiny", mesh, ExecutionConfig(), rows=8, max_length=100)
    plan = plan_step(step, request, mesh)
    assert (plan.work.rows, plan.work.tokens_per_row, plan.work.context) == (8, 1, 128), "rounded up as a session does"
    cache = 2 * LAYERS * 8 * 128 * 4 * 16 * 4 // 4  # keys and values, in float32, rows over four devices
    assert next(group.bytes for group in plan.memory.groups if group.name == "cache") == cache + 8 * 4 // 4
    counts = {one.count for one in plan.collectives if one.in_layers}
    assert counts and all(count % LAYERS == 0 for count in counts)
    assert len(jax.live_arrays()) == before, "nothing is allocated"
    assert "collectives" in {remark.about for remark in plan.remarks}, "dense weights are gathered for every token"


def test_prefill_is_the_chunk_that_a_session_would_run():
    request = parse_target("cpu:1")
    mesh = target_mesh(request, {})
    step = prefill_step(
        ModelConfig.from_pretrained(golden.TINY), "x", mesh, ExecutionConfig(), rows=3, prompt=700, max_length=700
    )
    assert (step.work.rows, step.work.tokens_per_row, step.work.context) == (4, 512, 1024)


def test_a_forward_pass_of_rows_that_do_not_divide_is_refused():
    request = parse_target("cpu:2")
    mesh = target_mesh(request, {"expert": 2})
    config = ModelConfig.from_pretrained(golden.TINY)
    with pytest.raises(
        ShardingError, match="a batch of 3 rows does not divide over .*expert=2.*: expected a multiple of 2"
    ):
        forward_step(config, "tiny", mesh, ExecutionConfig(), rows=3, length=16)


def test_a_mesh_of_another_size_is_refused_with_proposals():
    with pytest.raises(ShardingError, match=r"data=2, expert=2 needs 4 devices, .* cpu:8 has 8. .*data=4,expert=2"):
        target_mesh(parse_target("cpu:8"), {"data": 2, "expert": 2})


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("RESOURCE_EXHAUSTED: the total memory required (640.00G) exceeds available HBM (95.74G).", (640.0, 95.74)),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 130.50G of 95.74G hbm.", (130.5, 95.74)),
        ("RESOURCE_EXHAUSTED: something else", None),
    ],
)
def test_a_refusal_for_lack_of_memory_says_how_much(text, numbers):
    expected = (None, None) if numbers is None else tuple(int(number * 2**30) for number in numbers)
    assert refused_bytes(text) == expected


def test_what_does_not_fit_is_an_answer(capacity):
    memory = dataclasses.replace(
        capacity.memory, temporaries=None, outputs=None, code=None, padding=None, needed=200, available=120
    )
    assert (memory.total, memory.fits, memory.free) == (200, False, -80)
    refused = dataclasses.replace(capacity, memory=memory, collectives=(), refusal="RESOURCE_EXHAUSTED")
    [remark] = [remark for remark in remarks_on(refused) if remark.about == "memory"]
    assert "80 B a device are missing" in remark.text and 'remat = "full"' in remark.text
    work = dataclasses.replace(refused.work, rows=1, execution={**refused.work.execution, "remat": "full"})
    on_tpu = dataclasses.replace(refused, work=work, target=dataclasses.replace(refused.target, platform="tpu"))
    [remark] = [remark for remark in remarks_on(on_tpu) if remark.about == "memory"]
    assert "execution.activation_offloading = true" in remark.text


def test_gathered_experts_are_remarked_on_and_nothing_is_where_there_are_none(capacity):
    assert "gathered experts" not in {remark.about for remark in capacity.remarks}
    gathered = Collective(
        kind="all-gather", axes=("expert",), devices=4, dtype="f32", shape=(8, 32, 64), bytes=49152, count=3,
        in_layers=True, widened_from=None, source="",
    )  # fmt: skip
    worse = dataclasses.replace(capacity, collectives=(*capacity.collectives, gathered))
    assert "gathered experts" in {remark.about for remark in remarks_on(worse)}
    # A dense weight of the shape of one expert, as of a shared expert next to experts that no layer axis precedes.
    spec = (("expert",), ("tensor",), ("fsdp",))
    single = samples.placed("mtp.layers.0.mlp.experts.gate_proj", (256, 512, 2048), spec, 10**6)
    group = dataclasses.replace(samples.PARAMETERS, arrays=(single,))
    shared = samples.collective(axes=("expert",), shape=(1, 512, 64))
    hybrid = samples.plan(memory=samples.memory(groups=(group,)), collectives=(shared,))
    assert "gathered experts" not in {remark.about for remark in remarks_on(hybrid)}


def test_json_has_every_field_and_what_follows_from_them(capacity):
    read = json.loads(capacity.to_json())
    assert set(read) == {field.name for field in dataclasses.fields(capacity)}
    assert read["memory"]["total"] == capacity.memory.total
    assert {field.name for field in dataclasses.fields(Memory)} < set(read["memory"])


def test_the_table_says_what_the_plan_holds(capacity, capsys):
    print_plan(capacity)
    shown = capsys.readouterr().out
    for words in ("8 × simulated CPU (cpu:8): data=2, expert=4", "optimizer state", "all-to-all", "12 in layers"):
        assert words in shown


def test_planning_a_run_reads_no_text_and_makes_no_folder(tmp_path, monkeypatch, capsys):
    config = tmp_path / "run.toml"
    lines = ["[model]", *(f"{key} = {json.dumps(value)}" for key, value in golden.TINY.items())]
    lines += ["[data]", 'path = "nowhere"', 'tokenizer = "no/such"', "batch_size = 2", "seq_len = 16"]
    config.write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    assert main([str(config), "--plan", "cpu:1", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["work"]["rows"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
    assert main([str(config), "--plan", "cpu:two"]) == 2


def test_a_checkpoint_that_is_not_here_is_planned_by_its_published_config():
    config = build_config({"run": {"model_name_or_path": "Qwen/Qwen3-235B-A22B"}}, [], "here")
    model_config, name = planned_model(config)
    assert (model_config.num_hidden_layers, name) == (94, "Qwen/Qwen3-235B-A22B")


def test_what_is_no_model_is_refused():
    with pytest.raises(ConfigError, match="no such folder or config.json, and not a name on the Hub"):
        config_file("here/or/there")
