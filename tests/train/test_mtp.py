"""The next-token head is trained with a coefficient, or carried through a run as it is."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import qwen_moe_jax as qmj
from qwen_moe_jax.moe.stats import RouterStats
from tests.train.test_language_modelling import DENSE, scored
from train.config import LossConfig
from train.data.batches import batch_at
from train.data.rows import pack
from train.main import main
from train.objectives.language_modelling import mtp_mask, resolve_loss, training_loss, whole_batch

CONFIG = """
[model]
model_type = "qwen3_5_text"
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
full_attention_interval = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
linear_num_key_heads = 2
linear_num_value_heads = 2
linear_key_head_dim = 8
linear_value_head_dim = 8
mtp_num_hidden_layers = 1
max_position_embeddings = 64

[data]
megabytes = 0.03
vocab_size = 300
seq_len = 32
batch_size = 4
heldout_fraction = 0.2
heldout_rows = 4

[optimizer]
learning_rate = 1e-2
warmup_steps = 1

[loss]
mtp_coef = 0.3

[run]
max_steps = 3
save_steps = 2
sample_tokens = 4
"""


def test_its_targets_are_those_of_the_next_token_within_a_document():
    batch = batch_at(pack([np.arange(1, 8), np.arange(2, 7)], 5), step=0, batch_size=3, seed=0)
    batch = dataclasses.replace(batch, target_mask_BT=batch.target_mask_BT & (batch.targets_BT != 4))
    mask = np.asarray(mtp_mask(batch))
    for row, ids in enumerate(batch.segment_ids_BT):
        for column in range(5):
            whole = column + 2 < 5 and ids[column] != 0 and len({*ids[column : column + 3]}) == 1
            assert mask[row, column] == (whole and batch.tokens_BT[row, column + 2] != 4)
    assert 0 < mask.sum() == int(whole_batch(batch, 1).mtp_targets)

    losses = np.random.default_rng(0).random(mask.shape, np.float32)
    losses[~mask] = np.nan  # what has no meaning counts nowhere
    out = dataclasses.replace(scored(batch, np.zeros((*mask.shape, 11), np.float32)), mtp_losses=jnp.asarray(losses))
    loss = training_loss(out, batch, whole_batch(batch, 1), LossConfig(router_aux_loss_coef=0.0, mtp_coef=0.3))
    np.testing.assert_allclose(loss.mtp, losses[mask].mean(), rtol=1e-6)
    np.testing.assert_allclose(loss.total, loss.cross_entropy + 0.3 * loss.mtp, rtol=1e-6)
    assert "mtp_balance_loss" not in loss.terms


@pytest.mark.parametrize("kind", ["pooled", "global_batch", "sequence"])
def test_its_routers_balancing_loss_is_weighed_as_those_of_other_layers_are(kind):
    """A balanced router's loss, of four experts of which two are chosen, is 2, and 1 by DeepSeek-V3's formula."""
    batch = batch_at(pack([np.arange(1, 8)], 5), step=0, batch_size=2, seed=0)
    stats = RouterStats(
        tokens=jnp.array([8]),
        tokens_per_expert=jnp.full((1, 4), 4),
        dropped_per_expert=jnp.zeros((1, 4), jnp.int32),
        rounds=jnp.ones(1, jnp.int32),
        probs_per_expert=jnp.full((1, 4), 2.0),
        squared_logsumexp=jnp.zeros(1),
        sequences=jnp.array([2]),
        sequence_balance=jnp.full(1, 2.0),
        entropy=jnp.zeros(1),
        max_logit=jnp.zeros(1),
    )
    zeros = np.zeros(batch.tokens_BT.shape, np.float32)
    out = scored(batch, np.zeros((*zeros.shape, 11), np.float32))
    out = dataclasses.replace(out, mtp_losses=jnp.asarray(zeros), mtp_router=stats)
    config = LossConfig(router_aux_loss_coef=0.5, mtp_coef=0.3, load_balancing_type=kind)
    loss = training_loss(out, batch, whole_batch(batch, 1), config)
    assert float(loss.terms["mtp_balance_loss"]) == (1 if kind == "sequence" else 2)
    assert float(loss.total - loss.cross_entropy) == pytest.approx(0.5 * float(loss.mtp_balance), rel=1e-5)


def test_a_model_without_the_head_is_refused():
    with pytest.raises(qmj.ConfigError, match="loss.mtp_coef: found 0.3, and the model has no next-token head"):
        resolve_loss(LossConfig(mtp_coef=0.3), DENSE)


@pytest.mark.usefixtures("programs_compiled_once")
def test_it_is_trained_with_a_coefficient_and_carried_along_bit_equal_without(tmp_path, capsys):
    (tmp_path / "small.toml").write_text(CONFIG)

    def run(name, *words):
        assert main([str(tmp_path / "small.toml"), "--run.output_dir", str(tmp_path / name), *words]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        steps = [record for record in map(json.loads, lines) if "cross_entropy" in record]
        return load_file(tmp_path / name / "hub" / "model.safetensors"), steps

    trained, steps = run("trained")
    for record in steps:
        total = record["cross_entropy"] + 0.3 * record["mtp_loss"]
        assert record["loss"] == pytest.approx(total, rel=1e-5)
    assert steps[-1]["mtp_loss"] < steps[0]["mtp_loss"]
    assert "MTP" in capsys.readouterr().out

    (tmp_path / "small.toml").write_text(CONFIG[CONFIG.index("[data]") :])
    source = str(tmp_path / "trained" / "hub")
    carried, steps = run(
        "carried", "--run.model_name_or_path", source, "--loss.mtp_coef", "0", "--data.tokenizer", source
    )
    assert carried.keys() == trained.keys() and "mtp_loss" not in steps[0]
    for name, value in carried.items():
        assert (value == trained[name]).all() == name.startswith("mtp."), name

    words = ["--run.model_name_or_path", source, "--data.tokenizer", source, "--loss.mtp_coef", "0"]
    without, _ = run("dropped", *words, "--run.drop_mtp", "true")
    assert without.keys() == {name for name in trained if not name.startswith("mtp.")}
