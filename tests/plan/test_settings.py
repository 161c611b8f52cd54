"""The search over settings: what is tried on a mesh, what the arithmetic leaves out and why. Plans are made by hand."""

import dataclasses

import pytest

from qwen_moe_jax.config import SHARDING_RULES
from qwen_moe_jax.plan import mesh_search
from qwen_moe_jax.plan.draft import draft_of
from qwen_moe_jax.plan.promise import BEATEN, TOO_LARGE, Waiting, unbeaten
from qwen_moe_jax.plan.result import Group
from qwen_moe_jax.plan.search import draft_meshes, search_meshes
from qwen_moe_jax.plan.settings import OFFLOADED, of_execution, other_rules, settings_of, with_settings
from tests.plan.samples import memory, plan, roofline
from tests.plan.test_search import CHIP, describe, shown, target, work

MESH = {"data": 1, "fsdp": 2, "expert": 2, "context": 1, "tensor": 1}


def tried(mesh=MESH, fixed=(), platform="tpu", **changes):
    return list(settings_of(work(**changes), mesh, platform, fixed, sparse=True))


def values(found, name):
    return {settings.get(name) for settings in found}


def on_all(outline, mesh):
    return settings_of(outline.work, mesh, "tpu", sparse=True)


def test_a_training_step_is_tried_under_all_settings_that_leave_whole_rows_to_every_device():
    found = tried()
    assert values(found, "remat") == {"none", "full", "dots", "exchange", "experts"}
    assert values(found, "accumulation_steps") == {1, 2, 4}, "16 rows over 4 devices"
    assert values(found, "exchange") == {None, "all_to_all", "all_gather", "ragged_all_to_all"}
    assert values(found, "buffer_factor") == {None, 2.0, 1.25}
    assert len({tuple(settings.items()) for settings in found}) == len(found)
    assert "ragged_all_to_all" not in values(tried(platform="cpu"), "exchange"), "CPUs have no such collective"
    assert values(tried({**MESH, "expert": 1}), "exchange") == {None}, "nothing is exchanged"


def test_capacity_which_drops_tokens_is_tried_where_it_was_asked_for_only():
    assert values(tried(), "dispatch") == {"dropless", "dense"}
    asked = {"dispatch": "capacity", "exchange": "all_gather", "buffer_factor": None, "remat": "dots"}
    assert values(tried(execution=asked), "dispatch") == {"capacity", "dropless", "dense"}


def test_what_is_fixed_keeps_its_value_and_other_programs_have_nothing_to_vary():
    found = tried(fixed=("remat", "exchange", "dispatch", "accumulation_steps", "buffer_factor"))
    asked = {"remat": "none", "dispatch": "dropless", "exchange": "all_to_all", "buffer_factor": 2.0}
    assert found == [{"accumulation_steps": 1, **asked}]
    assert list(settings_of(work(purpose="decode"), MESH, "tpu", sparse=True)) == [{}]


def test_rules_are_varied_where_they_can_pay_and_none_of_the_users_own_are():
    context = {**MESH, "context": 2}
    asked = work(sharding="expert+fsdp")
    assert other_rules(asked, MESH) == ["fsdp"] and other_rules(asked, {**MESH, "expert": 1}) == []
    assert other_rules(asked, context) == ["expert+fsdp+context", "fsdp"]
    assert other_rules(work(sharding="fsdp"), context) == ["expert+fsdp", "expert+fsdp+context"]
    assert other_rules(asked, MESH, fixed=("rules",)) == [] == other_rules(work(sharding="vocab over tensor"), MESH)
    assert other_rules(work(sharding="expert+fsdp", purpose="decode"), MESH) == []


def test_a_training_run_is_drafted_under_other_rules_and_on_meshes_of_more_devices_than_rows(monkeypatch):
    """Of four devices and two rows: a mesh that shards rows over all is refused, and not the search."""
    from train.config import load_config
    from train.plan import search_training

    def drafts_alone(target, networks, outline_of, compile_plan, *, settings_of, others_of, **_):
        return draft_meshes(target, networks, outline_of, settings_of, others_of)

    monkeypatch.setattr(mesh_search, "search_meshes", drafts_alone)
    changes = [
        "--mesh.data=1",
        "--mesh.fsdp=1",
        "--mesh.expert=1",
        "--data.batch_size=2",
        "--data.seq_len=16384",
        "--run.max_steps=1",
        "--model.num_hidden_layers=1",
    ]

    def found(given=()):
        drafts, refused = search_training(load_config("configs/train/tiny.toml", changes), "cpu:4", given)
        by_rules = {}
        for one in drafts:
            if one.mesh == {**MESH, "fsdp": 1, "context": 2}:
                by_rules.setdefault(one.settings.get("rules"), set()).add(one.arguments)
        return by_rules, {reason for mesh, reason in refused if mesh["fsdp"] == 4}

    by_rules, refused = found()
    assert set(by_rules) == {None, "expert+fsdp+context", "fsdp"} and len(refused) == 1 and "2 rows" in refused.pop()
    assert max(by_rules["expert+fsdp+context"]) < min(by_rules[None]) <= max(by_rules[None]) < min(by_rules["fsdp"])
    assert set(found(["sharding.embed"])[0]) == {None}


def test_over_context_keys_are_gathered_or_go_round_with_a_kernel_that_does_so():
    def ways(**changes):
        found = tried({**MESH, "context": 2}, **changes)
        return {(one.get("context_parallel"), one.get("attention")) for one in found}

    gathered, ring = ("all_gather", "blocks"), ("ring", "blocks")
    assert values(tried(), "context_parallel") == {None}, "rows are whole"
    assert ways() == {("all_gather", "splash"), gathered, ring}
    assert ways(platform="cpu") == {gathered, ring} == ways(dtype="float16")
    asked = {**work().execution, "context_parallel": "ring", "attention": "blocks"}
    assert ways(execution=asked, fixed=("context_parallel",)) == {(None, "blocks")}
    assert ways(execution=asked, fixed=("attention",)) == {("all_gather", None), ("ring", None)}


def test_a_ring_holds_fewer_keys_and_sends_more():
    mesh = {**MESH, "expert": 1, "context": 4}
    gathered, ring = (
        draft_of(describe(mesh), mesh, target(8), CHIP.networks, {"remat": "full", "context_parallel": way})
        for way in ("all_gather", "ring")
    )
    keys = 16 // 2 * 128 // 4 * 2 * 2 * 16 * 2  # of a device's tokens: keys and values, two heads of 16, bfloat16
    assert gathered.workspace - ring.workspace == keys, "three other parts, or one and the next"
    assert ring.sent > gathered.sent, "gradients go round as float32"


def draft(**settings):
    return draft_of(describe(MESH), MESH, target(4), CHIP.networks, {"accumulation_steps": 1, **settings})


def test_recomputing_takes_time_and_saves_memory_and_so_do_micro_batches():
    none, dots, full = (draft(remat=remat, dispatch="dropless") for remat in ("none", "dots", "full"))
    assert none.seconds <= dots.seconds < full.seconds
    assert none.workspace > dots.workspace > full.workspace
    split = draft(remat="none", dispatch="dropless", accumulation_steps=4)
    assert split.workspace < none.workspace and split.sent > none.sent, "weights are gathered for each micro-batch"
    dense = draft(remat="none", dispatch="dense")
    assert dense.seconds > none.seconds, "all four experts compute, and two were chosen"
    assert with_settings(work(), full.settings).execution["remat"] == "full"


def test_settings_that_others_beat_in_time_and_memory_are_left_out_with_the_reason():
    drafts, _ = draft_meshes(target(4), CHIP.networks, describe, on_all)
    left, beaten = unbeaten(drafts)
    assert len(left) + len(beaten) == len(drafts) and beaten
    assert all(reason.startswith(BEATEN) for _, reason in beaten)
    for one in left:
        alike = [other for other in left if other.mesh == one.mesh and other is not one]
        assert not any(other.seconds <= one.seconds and other.total <= one.total for other in alike)


def test_the_last_compilations_go_to_other_settings_of_the_best_mesh():
    drafts, _ = draft_meshes(target(4), CHIP.networks, describe, on_all)
    waiting, taken = Waiting(drafts, 6), []
    for _ in range(4):
        taken.append((waiting.take(taken), plan()))
    assert len({tuple(one.mesh.values()) for one, _ in taken}) == 4, "a mesh each, under its best settings"
    variant = waiting.take(taken)
    assert variant.mesh == taken[0][0].mesh and variant.settings != taken[0][0].settings


def test_a_plan_that_needs_more_than_its_draft_leads_to_settings_that_need_less():
    """The compiler needs a hundred times the workspace of the draft: what arithmetic lets fit, does not."""
    drafts, _ = draft_meshes(target(4, memory_bytes=10**9), CHIP.networks, describe, on_all)
    waiting = Waiting(drafts, 1)
    best = waiting.take([])
    needed = memory(temporaries=100 * best.workspace, groups=(), padding=0, outputs=0, code=0, available=10**5)
    nearest = waiting.take([(best, plan(memory=needed))])
    assert nearest.mesh == best.mesh and nearest.total < best.total


def test_every_mesh_and_setting_is_compiled_or_has_a_reason_and_the_reasons_are_printed():
    def compile_plan(mesh, settings):
        return plan(roofline=roofline(seconds_without_overlap=1.0 if settings["remat"] == "dots" else 2.0))

    limit = sorted(one.total for one in draft_meshes(target(4), CHIP.networks, describe, on_all)[0])[20]
    found = search_meshes(
        target(4, memory_bytes=limit), CHIP.networks, describe, compile_plan, settings_of=on_all, keep=3
    )
    drafts, refused = draft_meshes(target(4), CHIP.networks, describe, on_all)
    assert len(found.candidates) == len(drafts) and len(found.refused) == len(refused)
    assert all(bool(candidate.reason) == (candidate.plan is None) for candidate in found.candidates)
    text = " ".join(shown(found).split())
    assert (
        BEATEN in text
        and TOO_LARGE in text
        and "refused, as context=2, tensor=2: Rows of 128 tokens are too short" in text
    )
    assert "3 compiled" in text


def test_optimizer_state_goes_to_the_host_where_nothing_else_fits_and_only_there():
    """Two moments of each weight are two thirds of the arguments."""

    def with_moments(mesh):
        outline = describe(mesh)
        arrays = outline.groups[0].arrays
        moments = [dataclasses.replace(one, name=f"{name}.{one.name}") for name in ("mu", "nu") for one in arrays]
        state = Group(name="optimizer state", arrays=(*moments, dataclasses.replace(moments[0], shape=(), bytes=4)))
        return dataclasses.replace(outline, groups=(*outline.groups, state))

    def kinds(limit):
        found = search_meshes(
            target(4, memory_bytes=limit),
            CHIP.networks,
            with_moments,
            lambda mesh, settings: plan(),
            settings_of=on_all,
            last_resorts=OFFLOADED[:1],
        )
        return {one.settings.get("memory_kind") for one in found.compiled}, found

    smallest = min(draft_meshes(target(4), CHIP.networks, with_moments, on_all)[0], key=lambda one: one.total)
    assert kinds(smallest.total)[0] == {None}
    saved = 2 * sum(one.bytes for one in describe(smallest.mesh).groups[0].arrays)
    offloaded, found = kinds(smallest.total - saved)
    assert "pinned_host" in offloaded and found.candidates[0].settings["memory_kind"] == "pinned_host"
    assert found.candidates[0].draft.arguments == smallest.arguments - saved
    assert "optimizer state in pinned_host" in shown(found)


def test_the_best_is_printed_as_words_and_as_lines_that_are_read_back(tmp_path):
    from train.config import load_config, split_overrides
    from train.plan import paste

    settings = {
        "accumulation_steps": 2,
        "remat": "full",
        "dispatch": "dropless",
        "buffer_factor": 1.25,
        "rules": "fsdp",
        "context_parallel": "ring",
        "attention": "blocks",
    }
    settings |= OFFLOADED[2]
    words, lines = paste({**MESH, "data": 1}, settings)
    overrides, others = split_overrides(words.split())
    read = [load_config("configs/train/tiny.toml", overrides)]
    file = tmp_path / "run.toml"
    file.write_text(f'{lines}\n[model]\nmodel_type = "qwen3"\n[data]\nbatch_size = 8\n', encoding="utf-8")
    read.append(load_config(str(file), []))
    for config in read:
        assert config.mesh.sizes == MESH and config.run.gradient_accumulation_steps == 2 and not others
        assert config.optimizer.memory_kind == "pinned_host"
        assert config.execution.sharding == SHARDING_RULES["fsdp"]
        chosen = dataclasses.asdict(config.execution)
        expected = of_execution(settings)
        assert {name: chosen[name] for name in expected} == expected and len(expected) == 6


def test_a_choice_that_has_no_meaning_in_the_run_is_refused():
    from qwen_moe_jax.errors import ShardingError
    from train.config import load_config
    from train.plan import with_choice

    config = load_config("configs/train/tiny.toml", [])
    with pytest.raises(ShardingError, match="gradient_accumulation_steps"):
        with_choice(config, {**MESH, "fsdp": 8, "expert": 1}, {"accumulation_steps": 3})
    assert with_choice(config, MESH, {"remat": "full"}).execution.remat == "full"
