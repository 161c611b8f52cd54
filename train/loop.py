"""Training, from the top: what `python -m train CONFIG` does once its config is read."""

import dataclasses
import math
import time

import jax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import qwen_moe_jax as qmj
from qwen_moe_jax.errors import ConfigError
from train.checkpoint import Checkpoints
from train.config import ExecutionSettings, TrainConfig
from train.corpus import Corpus, copy_tokenizer, load_corpus
from train.data import Batch, Mixture, batch_at, heldout_batches, pack, rows_of_devices
from train.folder import RunFolder
from train.loss import resolve_loss
from train.optimizer import make_optimizer, make_schedule
from train.report import Report
from train.step import heldout_loss, initial_state, make_eval_step, make_train_step, state_shardings


def train(config: TrainConfig, folder: RunFolder) -> None:
    """Trains, evaluates, exports and samples into `folder`; goes on from its last checkpoint, if it has one.

    Raises:
        ConfigError: there is too little text; the model's config means nothing.
        ShardingError: there are too few devices, or sizes that do not divide over the mesh.
    """
    began = time.perf_counter()
    mesh = qmj.make_mesh(**{axis: getattr(config.mesh, axis) for axis in ("data", "fsdp", "expert", "tensor")})
    execution = _execution(config.execution)

    # Data: documents of tokens, packed into rows of T.
    corpus = _load_corpus(folder, config)
    weights, seq_len, batch_size = [s.weight for s in config.data.mixture], config.data.seq_len, config.data.batch_size
    rows = Mixture([pack(part.training, seq_len, part.name) for part in corpus.parts], weights)
    heldout_rows = Mixture([pack(part.heldout, seq_len, part.name) for part in corpus.parts], weights)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
    mine = rows_of_devices(mesh.local_devices, sharding, batch_size)  # what this process has to read of a batch
    heldout = heldout_batches(heldout_rows, config.data.heldout_rows, batch_size, mine)
    heldout = [_place(batch, sharding) for batch in heldout]

    # Model: a definition for each mode, and one set of parameters for both.
    model = _make_model(config, corpus, mesh, execution)
    model.eval()  # no token is dropped
    eval_graph = nnx.graphdef(model)
    model.train()
    train_graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)

    # Step: two compiled functions, and the state that goes from step to step.
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    shardings = state_shardings(params, optimizer, mesh)
    loss_config = resolve_loss(config.loss, model.config)
    train_step = make_train_step(train_graph, optimizer, loss_config, shardings, config.run.seed)
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
            report.say(_introduction(config, model.config, tokens=rows.num_tokens))
            if first_step > 0:
                report.say(f"going on from the checkpoint of step {first_step}")
            else:
                report.heldout(0, heldout_loss(eval_step, state.params, heldout))

            for step in range(first_step, last_step):
                batch = batch_at(rows, step, batch_size, config.run.seed, mine)
                state, metrics = train_step(state, _place(batch, sharding))
                done = step + 1
                report.step(done, metrics)
                if done % config.run.eval_every == 0 and done < last_step:
                    with report.aside():
                        loss = heldout_loss(eval_step, state.params, heldout)
                    report.heldout(done, loss)
                if done % config.run.checkpoint_every == 0 or done == last_step:
                    with report.aside():
                        checkpoints.save(done, state)

            loss = heldout_loss(eval_step, state.params, heldout)
            report.heldout(last_step, loss)

    # Export, and let the exported folder speak: what is shown is what others will load.
    trained = nnx.merge(eval_graph, state.params)
    if config.run.export:
        copy_tokenizer(folder.corpus / "tokenizer", folder.hub)
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


def _load_corpus(folder: RunFolder, config: TrainConfig) -> Corpus:
    """The first process makes the corpus in the run folder, which all can see; the others open it."""
    if jax.process_index() == 0:
        load_corpus(folder.corpus, config.data)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("corpus")
    return load_corpus(folder.corpus, config.data)


def _place(batch: Batch, sharding: NamedSharding) -> Batch:
    """Rows over all axes that share the batch; each process brings its own."""
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def _execution(settings: ExecutionSettings) -> qmj.ExecutionConfig:
    """The package's form of the config's [execution] table."""
    chosen = dataclasses.asdict(settings)
    if settings.dispatch == "capacity":
        chosen["dispatch"] = None  # left open, it is capacity in training mode, and eval mode drops nothing
    if settings.buffer_factor == math.inf:
        chosen["buffer_factor"] = None
    return qmj.ExecutionConfig(**chosen)


def _make_model(config: TrainConfig, corpus: Corpus, mesh: Mesh, execution: qmj.ExecutionConfig) -> qmj.CausalLM:
    """The model of the config's [model] table, with fresh weights and the vocabulary of the tokenizer."""
    vocab_size = config.model.get("vocab_size", corpus.vocab_size) if config.data.tokenizer else config.data.vocab_size
    if vocab_size < corpus.vocab_size:
        raise ConfigError(
            f"model.vocab_size: found {vocab_size}, expected at least {corpus.vocab_size}, one more than the largest "
            f"id of data.tokenizer."
        )
    hub_config = {"eos_token_id": corpus.end_id, **config.model, "vocab_size": vocab_size}
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
