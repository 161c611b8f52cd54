"""Training, from the top: what `python -m train CONFIG` does once its config is read."""

import dataclasses
import math
import time

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import qwen_moe_jax as qmj
from train.checkpoint import Checkpoints
from train.config import ExecutionSettings, TrainConfig
from train.corpus import load_corpus, save_tokenizer
from train.data import Batch, batch_at, heldout_batches, pack, rows_at
from train.folder import RunFolder
from train.loss import resolve_loss
from train.nonfinite import NonFiniteGuard
from train.optimizer import frozen_paths, make_optimizer, make_schedule
from train.report import Report
from train.step import heldout_loss, initial_state, make_eval_step, make_train_step, state_shardings


def train(config: TrainConfig, folder: RunFolder) -> None:
    """Trains, evaluates, exports and samples into `folder`; goes on from its last checkpoint, if it has one.

    Raises:
        ConfigError: there is too little text; the model's config means nothing.
        ShardingError: there are too few devices, or sizes that do not divide over the mesh.
        NonFiniteError: a loss or a gradient is no finite number, and the config says to stop.
    """
    began = time.perf_counter()
    mesh = qmj.make_mesh(**{axis: getattr(config.mesh, axis) for axis in ("data", "fsdp", "expert", "tensor")})
    execution = _execution(config.execution)

    # Data: documents of tokens, packed into rows of T.
    corpus = load_corpus(folder.corpus, config.data)
    rows = pack(corpus.training, config.data.seq_len)
    heldout_rows = pack(corpus.heldout, config.data.seq_len)
    heldout = heldout_batches(heldout_rows, config.data.heldout_rows, config.data.batch_size)
    heldout = [_place(batch, mesh) for batch in heldout]

    # Model: a definition for each mode, and one set of parameters for both.
    model = _make_model(config, corpus.end_id, mesh, execution)
    model.eval()  # no token is dropped
    eval_graph = nnx.graphdef(model)
    model.train()
    train_graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)

    # Step: two compiled functions, and the state that goes from step to step.
    frozen = frozen_paths(config.optimizer.frozen, model)
    optimizer = make_optimizer(config.optimizer, config.run.steps, frozen)
    shardings = state_shardings(params, optimizer, mesh)
    loss_config = resolve_loss(config.loss, model.config)
    train_step = make_train_step(
        train_graph, optimizer, loss_config, shardings, config.run.seed, config.run.accumulation_steps, frozen
    )
    eval_step = make_eval_step(eval_graph)
    state = initial_state(params, optimizer, shardings)

    with Checkpoints(folder.checkpoints) as checkpoints:
        state = checkpoints.restore_latest(like=state) or state
        first_step, last_step = int(state.step), config.run.steps
        report = Report(
            folder.metrics,
            first_step=first_step,
            last_step=last_step,
            log_every=config.run.log_every,
            schedule=make_schedule(config.optimizer, last_step),
        )
        with report:
            report.say(_introduction(config, model.config, tokens=rows.tokens_NT.size))
            guard = NonFiniteGuard(
                config.run, batch_of=lambda step: _name_batch(config, len(rows), step), say=report.say
            )
            if first_step > 0:
                guard.saved(first_step)
                report.say(f"going on from the checkpoint of step {first_step}")
            else:
                report.heldout(0, heldout_loss(eval_step, state.params, heldout))

            for step in range(first_step, last_step):
                batch = batch_at(rows, step, config.data.batch_size, config.run.seed)
                state, metrics = train_step(state, _place(batch, mesh))
                done = step + 1
                report.step(done, metrics)
                guard.step(done, metrics)
                if done % config.run.eval_every == 0 and done < last_step:
                    with report.aside():
                        loss = heldout_loss(eval_step, state.params, heldout)
                    report.heldout(done, loss)
                if done % config.run.checkpoint_every == 0 or done == last_step:
                    with report.aside():
                        guard.settle()
                        checkpoints.save(done, state)
                    guard.saved(done)

            loss = heldout_loss(eval_step, state.params, heldout)
            report.heldout(last_step, loss)

    # Export, and let the exported folder speak: what is shown is what others will load.
    trained = nnx.merge(eval_graph, state.params)
    if config.run.export:
        save_tokenizer(corpus.tokenizer, folder.hub)
        qmj.save_pretrained(trained, folder.hub)
        trained = qmj.from_pretrained(folder.hub)
    prompt = config.run.sample_prompt
    [sample] = qmj.generate(trained, [prompt], max_new_tokens=config.run.sample_tokens, tokenizer=corpus.tokenizer)
    folder.finish(
        {
            "steps": last_step,
            "heldout_loss": loss,
            "tokens_per_second": report.tokens_per_second,
            "seconds_of_last_start": time.perf_counter() - began,
            "prompt": prompt,
            "sample": sample,
        }
    )


def _name_batch(config: TrainConfig, num_rows: int, step: int) -> str:
    """The rows that step `step` (from 1) read, for messages."""
    chosen = rows_at(num_rows, step - 1, config.data.batch_size, config.run.seed)
    parts = (f"epoch {epoch + 1}, rows {', '.join(map(str, numbers))}" for epoch, numbers in chosen.items())
    return "on " + "; ".join(parts) + f" of {num_rows}"


def _place(batch: Batch, mesh: Mesh) -> Batch:
    """Rows over all axes that share the batch."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert"))))


def _execution(settings: ExecutionSettings) -> qmj.ExecutionConfig:
    """The package's form of the config's [execution] table."""
    chosen = dataclasses.asdict(settings)
    if settings.dispatch == "capacity":
        chosen["dispatch"] = None  # left open, it is capacity in training mode, and eval mode drops nothing
    if settings.buffer_factor == math.inf:
        chosen["buffer_factor"] = None
    return qmj.ExecutionConfig(**chosen)


def _make_model(config: TrainConfig, end_id: int, mesh: Mesh, execution: qmj.ExecutionConfig) -> qmj.CausalLM:
    """The model of the config's [model] table, with fresh weights and the vocabulary of the tokenizer."""
    hub_config = {"eos_token_id": end_id, **config.model, "vocab_size": config.data.vocab_size}
    model_config = qmj.ModelConfig.from_pretrained(hub_config)
    if config.loss.balancing_bias_rate > 0 and model_config.moe is not None:
        moe = dataclasses.replace(model_config.moe, balancing_bias=True)
        model_config = dataclasses.replace(model_config, moe=moe)
    return qmj.CausalLM(model_config, rngs=nnx.Rngs(config.run.seed), mesh=mesh, execution=execution)


def _introduction(config: TrainConfig, model: qmj.ModelConfig, tokens: int) -> str:
    total, active = model.num_parameters(), model.num_active_parameters()
    per_step = config.data.batch_size * config.data.seq_len
    epochs = config.run.steps * per_step / tokens
    kind = "simulated" if config.mesh.simulated else jax.devices()[0].platform
    return (
        f"{total:,} parameters, {active:,} active per token; {config.mesh.devices} {kind} device(s); "
        f"{tokens / 1e6:.2f}M tokens of text, {epochs:.1f} epochs of steps of {per_step} tokens"
    )
