"""Training, from the top: what `python -m train CONFIG` does once its config is read."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding

import qwen_moe_jax as qmj
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.checkpoint import open_checkpoint
from qwen_moe_jax.huggingface.hub import local_folder
from qwen_moe_jax.sharding.distributed import barrier, is_process_zero, num_processes
from train.checkpoint import Checkpoints
from train.config import TrainConfig
from train.data.batches import Batch, Mixture, batch_at, describe_batch, heldout_batches, pack, rows_of_devices
from train.data.corpus import Corpus, copy_tokenizer, load_corpus
from train.folder import HUB_FOLDER, RunFolder
from train.nonfinite import NonFiniteGuard
from train.optimizer import make_schedule
from train.parameters import Params, merge, select
from train.processes import stopping_together
from train.program import assemble, batch_sharding
from train.reporting.profile import Profiler
from train.reporting.progress import NoReport, Report
from train.reporting.samples import Sampler
from train.reporting.start import introduction, start_of
from train.reporting.tensorboard import require_tensorboard
from train.step import heldout_loss
from train.stopping import Stopped, stop_requests


def train(config: TrainConfig, folder: RunFolder) -> None:
    """Trains, evaluates, exports and samples into `folder`; goes on from its last checkpoint, if it has one.

    Raises:
        ConfigError: there is too little text; the model's config means nothing; a library is asked for and missing.
        ShardingError: there are too few devices, or sizes that do not divide over the mesh.
        Stopped: a signal asked for it; the last step is saved.
        NonFiniteError: a loss or a gradient is no finite number, and the config says to stop.
    """
    began = time.perf_counter()
    if config.run.tensorboard:
        require_tensorboard()
    _check_checkpoint_exists(config.run.model_name_or_path)
    sizes: dict[str, Any] = config.mesh.sizes
    mesh = qmj.make_mesh(**sizes)

    # Data: documents of tokens, packed into rows of T.
    corpus = _load_corpus(folder, config)
    weights, seq_len, batch_size = [s.weight for s in config.data.mixture], config.data.seq_len, config.data.batch_size
    rows = Mixture([pack(part.training, seq_len, part.name) for part in corpus.parts], weights)
    heldout_rows = Mixture([pack(part.heldout, seq_len, part.name) for part in corpus.parts], weights)
    sharding = batch_sharding(mesh)
    mine = rows_of_devices(mesh.local_devices, sharding, batch_size)  # what this process has to read of a batch
    heldout = heldout_batches(heldout_rows, config.data.heldout_rows, batch_size, mine)
    heldout = [_place(batch, sharding) for batch in heldout]

    # Model, optimizer and the two compiled steps; shapes so far, that say where everything will lie.
    program = assemble(config, _model_config(config, corpus), mesh)
    sampler = Sampler(config.run, program.eval_graph, corpus.tokenizer)

    with Checkpoints(folder.checkpoints, config.run.save_total_limit) as checkpoints:
        if checkpoints.latest_step is not None:
            state = checkpoints.restore_latest(like=program.state, model=program.model)
            # What is not trained is in no checkpoint: it comes from where it came from at the first start.
            fixed = select(_first_weights(config, program.model), like=program.fixed) if program.fixed else {}
        else:
            params = _first_weights(config, program.model)
            state, fixed = program.begin(params), select(params, like=program.fixed)
            del params  # the first step takes over the memory of what is trained
        first_step, last_step = int(state.step), config.run.max_steps
        start = start_of(config, program, mesh, state, fixed, text_tokens=rows.num_tokens)
        schedule = make_schedule(config.optimizer, last_step)
        report: Report | NoReport
        if is_process_zero():
            report = Report(folder, config.run, start, first_step=first_step, schedule=schedule)
            profiler = Profiler(folder.profile, config.run.profile_steps)
        else:  # what process 0 reports is of all
            report, profiler = NoReport(), Profiler(folder.profile, range(0))
        with report, profiler, stop_requests() as asked:
            train_step, asked_to_stop = stopping_together(program.train_step, asked, mesh)
            report.say("\n".join([introduction(start, last_step), *corpus.cut_short]))
            guard = NonFiniteGuard(
                config.run,
                batch_of=lambda step: "on " + describe_batch(rows, step - 1, batch_size, config.run.seed),
                say=report.say,
            )
            if first_step > 0:
                guard.saved(first_step)
                report.say(f"going on from the checkpoint of step {first_step}")
            else:
                with report.aside("evaluation"):
                    loss = heldout_loss(program.eval_step, merge(state.params, fixed), heldout)
                report.heldout(0, loss)
                sampler.sample(0, merge(state.params, fixed), report)

            for step in range(first_step, last_step):
                done = step + 1
                profiler.before(done)
                with report.fetching():
                    batch = _place(batch_at(rows, step, batch_size, config.run.seed, mine), sharding)
                state, metrics = train_step(state, fixed, batch)
                report.step(done, metrics)
                guard.step(done, metrics)
                if profiler.ends_with(done):
                    with report.aside("profile"):
                        profiler.stop()
                if done % config.run.eval_steps == 0 and done < last_step:
                    with report.aside("evaluation"):
                        loss = heldout_loss(program.eval_step, merge(state.params, fixed), heldout)
                    report.heldout(done, loss)
                sampler.sample(done, merge(state.params, fixed), report)
                stop = asked_to_stop()
                if done % config.run.save_steps == 0 or done == last_step or stop:
                    with report.aside("checkpoint"):
                        guard.settle()
                        checkpoints.save(done, state)
                    guard.saved(done)
                if stop and done < last_step:
                    raise Stopped(done, stop)

            with report.aside("evaluation"):
                loss = heldout_loss(program.eval_step, merge(state.params, fixed), heldout)
            report.heldout(last_step, loss)

    # Export, and let the exported folder speak: what is shown is what others will load.
    trained = nnx.merge(program.eval_graph, merge(state.params, fixed))
    if config.lora is not None:
        qmj.save_adapter(trained, folder.adapter, base=config.run.model_name_or_path)
    if config.run.export:
        if config.lora is not None:
            qmj.merge_lora(trained)
        if is_process_zero():
            copy_tokenizer(folder.corpus / "tokenizer", folder.hub)
        qmj.save_pretrained(trained, folder.hub)
        trained = qmj.from_pretrained(folder.hub, mesh=mesh if num_processes() > 1 else None)
    prompt = config.run.sample_prompt
    [sample] = qmj.generate(trained, [prompt], max_new_tokens=config.run.sample_tokens, tokenizer=corpus.tokenizer)
    if is_process_zero():
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


def _check_checkpoint_exists(source: str) -> None:
    """Tells of a missing result of another run before anything else is made of it."""
    if Path(source).name == HUB_FOLDER and not Path(source).exists():
        raise ConfigError(
            f"run.model_name_or_path: {source}: there is no such folder yet. It is what another run writes in the end: "
            "train that one first (`make train` writes runs/tiny/hub)."
        )


def _load_corpus(folder: RunFolder, config: TrainConfig) -> Corpus:
    """The first process makes the corpus in the run folder, which all can see; the others open it."""
    if is_process_zero():
        load_corpus(folder.corpus, config.data)
    barrier("the corpus is made")
    return load_corpus(folder.corpus, config.data)


def _place(batch: Batch, sharding: NamedSharding) -> Batch:
    """Rows over all axes that share the batch; each process brings its own."""
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def _model_config(config: TrainConfig, corpus: Corpus) -> qmj.ModelConfig:
    """That of the checkpoint to begin with, or of the config's [model] table."""
    if config.run.model_name_or_path:
        folder = local_folder(config.run.model_name_or_path)
        model_config = open_checkpoint(folder).config
        _check_vocabulary(f"run.model_name_or_path: {folder} has vocab_size", model_config.vocab_size, corpus)
        return model_config
    vocab_size = config.model.get("vocab_size", corpus.vocab_size) if config.data.tokenizer else config.data.vocab_size
    _check_vocabulary("model.vocab_size: found", vocab_size, corpus)
    hub_config = {"eos_token_id": corpus.stop_ids, **config.model, "vocab_size": vocab_size}
    model_config = qmj.ModelConfig.from_pretrained(hub_config)
    if config.loss.router_bias_update_rate > 0 and model_config.moe is not None:
        moe = dataclasses.replace(model_config.moe, balancing_bias=True)
        model_config = dataclasses.replace(model_config, moe=moe)
    return model_config


def _check_vocabulary(found: str, vocab_size: int, corpus: Corpus) -> None:
    if vocab_size < corpus.vocab_size:
        raise ConfigError(
            f"{found} {vocab_size}, expected at least {corpus.vocab_size}, one more than the largest id of "
            "data.tokenizer."
        )


def _first_weights(config: TrainConfig, described: qmj.CausalLM) -> Params:
    """Those of the checkpoint to begin with, or fresh ones; adapters are fresh."""
    rngs = nnx.Rngs(config.run.seed)
    if config.run.model_name_or_path:
        model = qmj.from_pretrained(config.run.model_name_or_path, mesh=described.mesh, execution=described.execution)
    else:
        model = qmj.CausalLM(described.config, rngs=rngs, mesh=described.mesh, execution=described.execution)
    if config.lora is not None:
        qmj.add_lora(model, config.lora, rngs=rngs)
    return nnx.to_pure_dict(nnx.state(model))
