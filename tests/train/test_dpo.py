"""Twenty steps of DPO are those of a plain PyTorch loop around transformers, on one device and on eight."""

import dataclasses

import jax
import numpy as np
from flax import nnx

import qwen_moe_jax as qmj
from tests.distance import relative_l2
from tests.referee import build, hub_tensors, torch
from tests.subject import hub_arrays
from train.config import DpoConfig, LossConfig, OptimizerConfig
from train.data.examples import ExampleRow, pair_batch
from train.objectives.dpo import Dpo, sum_log_probs
from train.optimizer import make_optimizer, make_schedule
from train.step import initial_state, make_train_step, state_shardings

STEPS, PAIRS, LENGTH = 20, 8, 12
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=4, max_grad_norm=0.7)
#: Losses and weights of float32 numbers that both sides round in other orders, step after step.
TOLERANCE = 1e-4
OBJECTIVE = Dpo(DpoConfig(beta=0.5))


def batches(vocab_size):
    """Pairs of all lengths; of each text the first tokens are the prompt, which both share."""
    numbers = np.random.default_rng(0)
    for _ in range(STEPS):
        rows = []
        for _ in range(PAIRS):
            tokens = numbers.integers(1, vocab_size, (2, LENGTH)).astype(np.int32)
            prompt = numbers.integers(1, 4)
            tokens[1, :prompt] = tokens[0, :prompt]
            real = np.arange(LENGTH) < numbers.integers(prompt + 1, LENGTH + 1, 2)[:, None]
            learned = real & (np.arange(LENGTH) >= prompt)
            rows.append(ExampleRow(np.where(real, tokens, 0), real, learned, np.full((2, LENGTH), -100)))
        yield pair_batch(rows)


EXECUTION = qmj.ExecutionConfig(dtype="float32", dispatch="dropless", buffer_factor=None)


def with_references(folder):
    """The batches with the log-probabilities of the initial model."""
    model = qmj.from_pretrained(folder, execution=EXECUTION)
    reference = jax.jit(lambda model, batch: sum_log_probs(OBJECTIVE.forward(model, batch), batch))
    return [
        dataclasses.replace(batch, reference_P2=np.asarray(reference(model, batch)))
        for batch in batches(model.config.vocab_size)
    ]


def trained_here(folder, mesh, ready):
    """Losses of every step, and the weights in the end by Hub name."""
    model = qmj.from_pretrained(folder, execution=EXECUTION, mesh=mesh)
    model.train()
    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    optimizer = make_optimizer(OPTIMIZER, STEPS)
    shardings = state_shardings(params, optimizer, model.mesh)
    loss = OBJECTIVE.resolve_loss(LossConfig(), model.config)
    step = make_train_step(graph, optimizer, loss, shardings, seed=0, objective=OBJECTIVE)
    state, seen = initial_state(params, optimizer, shardings), []
    for batch in ready:
        state, metrics = step(state, {}, batch)
        seen.append(float(metrics.loss))
    assert float(metrics.terms["rewards/margins"]) != 0
    return seen, dict(hub_arrays(nnx.merge(graph, state.params)))


def torch_log_probs(model, batch):
    tokens = torch.tensor(batch.tokens_P2T.reshape(-1, LENGTH)).long()
    real = torch.tensor(batch.segment_ids_P2T.reshape(-1, LENGTH))
    out = model(tokens, attention_mask=real, output_router_logits=True)
    log_probs = torch.log_softmax(out.logits, -1)
    targets = torch.tensor(batch.targets_P2T.reshape(-1, LENGTH)).long()
    of_targets = log_probs.gather(-1, targets[..., None])[..., 0]
    mask = torch.tensor(batch.target_mask_P2T.reshape(-1, LENGTH))
    return (of_targets * mask).sum(-1).reshape(-1, 2), out.aux_loss


def trained_there(reference):
    """The same as one writes it in PyTorch: losses, and weights by Hub name."""
    model = build(reference.case)
    model.load_state_dict(reference.model.state_dict())
    named = dict(model.named_parameters())
    decay = {name: not ("norm" in name or name.endswith("bias")) for name in named}
    matrices, others = ([named[name] for name in named if decay[name] == kind] for kind in (True, False))
    groups = [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=1e-8)
    schedule, seen = make_schedule(OPTIMIZER, STEPS), []
    for number, batch in enumerate(batches(model.config.vocab_size)):
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(number))
        log_probs, balance = torch_log_probs(model, batch)
        with torch.no_grad():
            base, _ = torch_log_probs(reference.model, batch)
        ratios = log_probs - base
        loss = -torch.nn.functional.logsigmoid(0.5 * (ratios[:, 0] - ratios[:, 1])).mean()
        loss = loss + model.config.router_aux_loss_coef * balance
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        seen.append(loss.item())
    weights = {name: parameter.detach().numpy().copy() for name, parameter in named.items()}
    return seen, hub_tensors(weights, reference.case.model_type)


def test_twenty_steps_on_one_device_and_on_eight_are_those_of_a_pytorch_loop(references):
    reference = references["qwen3_moe-plain"]
    expected, expected_weights = trained_there(reference)
    ready = with_references(reference.folder)
    for mesh in (qmj.make_mesh(), qmj.make_mesh(data=2, fsdp=2, expert=2)):
        found, weights = trained_here(reference.folder, mesh, ready)
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE)
        assert weights.keys() == expected_weights.keys()
        distances = {name: relative_l2(weights[name], expected_weights[name]) for name in weights}
        far = {name: distance for name, distance in distances.items() if not distance <= TOLERANCE}
        assert not far, far
