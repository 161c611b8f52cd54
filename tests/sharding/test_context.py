"""Models whose rows are sharded over `context` say what one device says."""

import jax
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.config.resolve import resolve
from tests.model.hybrid_configs import hybrid_config, hybrid_model
from tests.sharding.test_mesh import MOE, SEGMENTS_BT, TOKENS_BT, build, one_device, run  # noqa: F401

#: A document in every part, cut or not, and padding before, between and after them.
B, T = 2, 40
ROWS = np.random.default_rng(1).integers(1, 98, (B, T))
IDS = np.zeros((B, T), np.int32)
IDS[0, :9], IDS[0, 9:22], IDS[0, 24:33], IDS[0, 33:] = 1, 2, 3, 4
IDS[1, 11:30], IDS[1, 30:37] = 1, 2
CASES = {
    "all-gather, dropless": (dict(data=2, context=4), dict(dispatch="dropless", context_parallel="all_gather")),
    "ring, capacity": (
        dict(fsdp=2, expert=2, context=2),
        dict(dispatch="capacity", context_parallel="ring", sharding="expert+fsdp+context", attention_block=2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_over_context_give_what_one_device_gives(name, one_device):  # noqa: F811
    axes, execution = CASES[name]
    model = build(qmj.make_mesh(**axes), eval_capacity_factor=8.0, remat="full", **execution)
    ((loss, logits_BTV), gradients), real = one_device, SEGMENTS_BT != 0
    (found_loss, found), found_gradients = run(model)
    assert np.linalg.norm((found - logits_BTV)[real]) < 2e-6 * np.linalg.norm(logits_BTV[real])
    assert float(found_loss) == pytest.approx(float(loss), rel=2e-6)
    for ours, theirs in zip(jax.tree.leaves(found_gradients), jax.tree.leaves(gradients), strict=True):
        assert np.linalg.norm(ours - theirs) < 5e-6 * np.linalg.norm(theirs) + 1e-9


def test_linear_layers_and_the_next_token_head_give_what_one_device_gives():
    """In the order of the rows: states and columns pass from one part to the next, and so do next tokens."""
    config = hybrid_config("LF", num_mtp_layers=1)

    def losses(mesh):
        model = hybrid_model(config, mesh, qmj.ExecutionConfig(dispatch="dense", attention_block=4))
        targets = np.roll(ROWS, -1, axis=1)
        out = jax.jit(lambda model: model.token_losses(ROWS, targets, segment_ids=IDS, mtp=True))(model)
        follows = (IDS[:, 1:] == IDS[:, :-1]) & (IDS[:, 1:] != 0)
        return np.concatenate([out.losses[IDS != 0], out.mtp_losses[:, :-1][follows]])

    found, expected = losses(qmj.make_mesh(context=4, tensor=2)), losses(None)
    assert np.linalg.norm(found - expected) < 2e-6 * np.linalg.norm(expected)


def test_a_sequence_is_classified_by_its_last_token_wherever_that_is_stored():
    config = qmj.ModelConfig.from_pretrained(MOE | dict(num_hidden_layers=1, num_labels=3, pad_token_id=None))

    def logits(mesh):
        model = qmj.SequenceClassifier(config, rngs=nnx.Rngs(0), mesh=mesh)
        return np.asarray(model(TOKENS_BT, SEGMENTS_BT == 1).logits)

    assert np.linalg.norm(logits(qmj.make_mesh(context=2)) - logits(None)) < 2e-6 * np.linalg.norm(logits(None))


def in_use(mesh, **execution):
    config = qmj.ModelConfig.from_pretrained(MOE)
    return qmj.CausalLM(config, rngs=None, mesh=mesh, execution=qmj.ExecutionConfig(**execution)).execution_in_use


def test_keys_are_gathered_on_few_devices_and_passed_around_on_many():
    assert in_use(None).context_parallel is None
    assert in_use(qmj.make_mesh(context=2)).context_parallel == "all_gather"  # two query heads share a key head
    assert in_use(qmj.make_mesh(context=4)).context_parallel == "ring"
    assert in_use(qmj.make_mesh(context=4), context_parallel="all_gather").context_parallel == "all_gather"


def test_tpus_gather_keys_for_the_kernels_of_splash():
    for asked, expected in {None: ("splash", "all_gather"), "ring": ("blocks", "ring")}.items():
        execution = qmj.ExecutionConfig(dtype="bfloat16", context_parallel=asked)
        chosen = resolve(execution, None, expert_shards=1, platform="tpu", training=True, context_shards=16)
        assert (chosen.attention, chosen.context_parallel) == expected


def test_kernels_that_need_whole_rows_are_refused_by_name():
    mesh = qmj.make_mesh(context=2)
    with pytest.raises(qmj.ConfigError, match="attention='splash' found with context_parallel='ring'.*'all_gather'"):
        in_use(mesh, attention="splash", context_parallel="ring")
    with pytest.raises(qmj.ConfigError, match="attention='splash' found devices of the platform 'cpu'"):
        in_use(mesh, attention="splash")
