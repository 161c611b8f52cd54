"""Divergences from a teacher are PyTorch's over the whole vocabulary, and of K tokens and a tail by the formula."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.test_run import CONFIG, metrics, start
from train.objectives.distillation import divergence, log_probs_at, top_k

KINDS = ("forward_kl", "reverse_kl")


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(size=(2, 2, 3, 11)).astype(np.float32) * 3


def compared(own, teacher, count, kind):
    kept = top_k(jnp.asarray(teacher), count)
    return divergence(kept, log_probs_at(own, kept.ids_BTK), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_of_the_whole_vocabulary_it_is_pytorchs_with_its_gradient(logits, kind):
    torch = pytest.importorskip("torch")
    teacher, own = torch.tensor(logits[0]), torch.tensor(logits[1], requires_grad=True)
    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(own, -1)
    one, other = (log_q, log_p) if kind == "forward_kl" else (log_p, log_q)
    expected = torch.nn.functional.kl_div(one, other, reduction="none", log_target=True).sum(-1)
    expected.sum().backward()
    found, gradient = jax.value_and_grad(lambda own: jnp.sum(compared(own, logits[0], 11, kind)))(logits[1])
    np.testing.assert_allclose(found, expected.sum().item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, own.grad.numpy(), atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_of_some_tokens_and_a_tail_it_is_that_of_the_coarser_distributions(logits, kind):
    p, q = (np.exp(x - x.max(-1, keepdims=True)).astype(np.float64) for x in logits)
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1)
    p, q = (np.take_along_axis(x, order, -1) for x in (p, q))
    before = 0.0
    for count in (1, 4, 10, 11):
        coarse = [np.concatenate([x[..., :count], x[..., count:].sum(-1, keepdims=True)], -1) for x in (p, q)]
        one, other = coarse if kind == "forward_kl" else coarse[::-1]
        expected = np.sum(np.where(one > 0, one * np.log(np.maximum(one, 1e-300) / np.maximum(other, 1e-300)), 0), -1)
        found = np.asarray(compared(logits[1], logits[0], count, kind))
        np.testing.assert_allclose(found, expected, rtol=2e-5)
        assert (found >= before - 1e-5).all()  # more of the vocabulary shows more of the divergence
        before = found
        gradient = jax.grad(lambda own, count=count: jnp.sum(compared(own, logits[0], count, kind)))(logits[1])
        assert np.isfinite(gradient).all()


def test_a_run_comes_nearer_to_its_teacher_and_says_what_the_teacher_takes(tmp_path, programs_compiled_once):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": f"count {n} {n + 1} {n + 2}"}) + "\n" for n in range(120)))
    data = f'[data]\npath = "{file}"\nformat = "jsonl"\n'
    base = CONFIG.replace("data = 2\nexpert = 2", "data = 2").replace("[data]\n", data) + "sample_steps = 0\n"
    (tmp_path / "teacher.toml").write_text(base)
    code, _, complaint = start(tmp_path / "teacher.toml", tmp_path / "teacher")
    assert code == 0, complaint
    teacher = tmp_path / "teacher" / "hub"
    own = base.replace("[data]\n", f'[data]\ntokenizer = "{teacher}"\n').replace("vocab_size = 300\n", "")
    table = f'[distillation]\nteacher = "{teacher}"\ntop_k = 8\ncross_entropy_coef = 0.1\n'
    (tmp_path / "own.toml").write_text(own + table)
    code, output, complaint = start(tmp_path / "own.toml", tmp_path / "own", "--run.seed=1", "--run.export=false")
    assert code == 0, complaint
    heldout = [record["heldout_loss"] for record in metrics(tmp_path / "own") if "heldout_loss" in record]
    assert heldout[-1] < 0.5 * heldout[0]
    assert "teacher " in output and f"distillation from {teacher}; " in output
    of_teacher = metrics(tmp_path / "teacher")[-1]["heldout_loss"]
    steps = [record for record in metrics(tmp_path / "own") if "divergence" in record]
    assert steps[-1]["cross_entropy"] < 1.5 * of_teacher + 1
