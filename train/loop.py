"""Training from the top, what `python -m train CONFIG` does once its config is read: config → mesh → data → program →
loop → checkpoint and export."""

import time
from dataclasses import dataclass
from typing import Any

from flax import nnx
from jax.sharding import Mesh

import qwen_moe_jax as qmj
from qwen_moe_jax.sharding.distributed import barrier, is_process_zero
from train.checkpoint import Checkpoints
from train.config import RunConfig, TrainConfig
from train.data.corpus import Corpus, load_corpus
from train.data.feed import BatchFeed, make_feed
from train.export import export, export_dtype
from train.folder import RunFolder
from train.initial import check_checkpoint_exists, initial_model_config, initial_state
from train.nonfinite import NonFiniteGuard
from train.optimizer import make_schedule, schedule_notes
from train.parameters import Params, merge
from train.processes import Asked, with_shared_stop
from train.program import Program, assemble, batch_sharding
from train.reporting.profile import Profiler
from train.reporting.progress import NoReport, Report
from train.reporting.samples import Sampler
from train.reporting.start import Start, introduction, start_of
from train.reporting.tensorboard import require_tensorboard
from train.step import TrainState, heldout_loss
from train.stopping import Stopped, leave, stop_requests
from train.write_errors import write_errors


def train(config: TrainConfig, folder: RunFolder) -> None:
    """Trains, evaluates, exports and samples into `folder`; goes on from its last checkpoint, if it has one.

    Raises:
        SaveError: a file of the run cannot be written.
        ConfigError: there is too little text; the model's config means nothing; a library is asked for and missing.
        ShardingError: there are too few devices, or sizes that do not divide over the mesh.
        Stopped: a signal asked for it; the last step is saved.
        NonFiniteError: a loss or a gradient is no finite number, and the config says to stop.
    """
    with write_errors(folder.path, "the start"):
        _train(config, folder)


def _train(config: TrainConfig, folder: RunFolder) -> None:
    began = time.perf_counter()
    if config.run.tensorboard:
        require_tensorboard()
    check_checkpoint_exists(config.run.model_name_or_path)
    sizes: dict[str, Any] = config.mesh.sizes
    mesh = qmj.make_mesh(**sizes)
    corpus = _shared_corpus(folder, config)
    feed = make_feed(config.data, corpus, mesh, batch_sharding(mesh), config.run.seed)
    epochs, config = config.run.num_train_epochs, config.with_steps_of(feed.rows.num_rows)
    program = assemble(config, initial_model_config(config, corpus), mesh)  # shapes and shardings, no weights yet

    with Checkpoints(folder.checkpoints, config.run.save_total_limit) as checkpoints:
        state, fixed = initial_state(config, program, checkpoints)
        start = start_of(config, program, mesh, state, fixed, text_tokens=feed.rows.num_tokens)
        report, profiler = _reports(config, folder, start, first_step=int(state.step))
        with report, profiler, stop_requests(lambda: leave(folder), says=is_process_zero()) as asked:
            notes = [*corpus.forms, *corpus.notes, *feed.notes]
            notes += schedule_notes(config.optimizer, config.run.steps)
            notes += _length_notes(config.run, epochs, feed, folder)
            report.say("\n".join([introduction(start, config.run.steps), *notes]))
            loop = Loop(
                config=config.run,
                folder=folder,
                mesh=mesh,
                program=program,
                feed=feed,
                fixed=fixed,
                checkpoints=checkpoints,
                report=report,
                profiler=profiler,
                sampler=Sampler(config.run, program.eval_graph, corpus.tokenizer),
                guard=NonFiniteGuard(config.run, batch_of=lambda step: "on " + feed.describe(step - 1), say=report.say),
            )
            state, loss = loop.run(state, asked)

    trained = nnx.merge(program.eval_graph, merge(state.params, fixed))
    with write_errors(folder.path, "the export"):
        sample = export(trained, config, folder, corpus)
        if is_process_zero():
            folder.finish(
                {
                    "steps": config.run.steps,
                    "heldout_loss": loss,
                    "tokens_per_second": report.tokens_per_second,
                    "seconds_of_last_start": time.perf_counter() - began,
                    "prompt": config.run.sample_prompt,
                    "sample": sample,
                    "export_dtype": export_dtype(config, program.model) if config.run.export else None,
                }
            )


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The steps of a run, with what happens between them: evaluation, samples, traces, checkpoints and the way out.

    Attributes:
        config: the intervals and the last step.
        folder: of the run.
        mesh: of the compiled steps.
        program: the compiled steps.
        feed: the batches.
        fixed: the parameters that are not trained.
        checkpoints, report, profiler, sampler, guard: called after the steps that concern them.
    """

    config: RunConfig
    folder: RunFolder
    mesh: Mesh
    program: Program
    feed: BatchFeed
    fixed: Params
    checkpoints: Checkpoints
    report: Report | NoReport
    profiler: Profiler
    sampler: Sampler
    guard: NonFiniteGuard

    def run(self, state: TrainState, asked: Asked) -> tuple[TrainState, float]:
        """Makes all steps that are left, and returns the last state and the last held-out loss.

        Raises:
            Stopped: `asked` has a signal; the step under way is finished and saved.
            NonFiniteError: see `NonFiniteGuard`.
            SaveError: a checkpoint, or what the run reports, cannot be written.
        """
        done, last_step = int(state.step), self.config.steps
        train_step, asked_to_stop = with_shared_stop(self.program.train_step, asked, self.mesh)
        with write_errors(self.folder.path, lambda: f"step {done}"):
            self._begin(done, state)
            while done < last_step:
                done += 1
                self.profiler.before(done)
                with self.report.fetching():
                    batch = self.feed.training(done - 1)
                state, metrics = train_step(state, self.fixed, batch)
                self.report.step(done, metrics)
                self.guard.step(done, metrics)
                self._between_steps(done, state)
                stop = asked_to_stop()
                self.checkpoints.check()
                if done % self.config.save_steps == 0 or done == last_step or stop:
                    self._save(done, state)
                if stop and done < last_step:
                    raise Stopped(done, stop)
            return state, self._evaluate(last_step, state)

    def _begin(self, first_step: int, state: TrainState) -> None:
        """Says where a resumed run goes on; evaluates and samples a new one."""
        if first_step > 0:
            self.guard.saved(first_step)
            self.report.say(f"going on from the checkpoint of step {first_step}")
        else:
            self._evaluate(0, state)
            self._sample(0, state)

    def _between_steps(self, done: int, state: TrainState) -> None:
        if self.profiler.ends_with(done):
            with self.report.aside("profile"):
                self.profiler.stop()
        if done % self.config.eval_steps == 0 and done < self.config.steps:
            self._evaluate(done, state)
        self._sample(done, state)

    def _evaluate(self, done: int, state: TrainState) -> float:
        with self.report.aside("evaluation"):
            loss = heldout_loss(self.program.eval_step, merge(state.params, self.fixed), self.feed.heldout)
        self.report.heldout(done, loss)
        return loss

    def _sample(self, done: int, state: TrainState) -> None:
        self.sampler.sample(done, merge(state.params, self.fixed), self.report)

    def _save(self, done: int, state: TrainState) -> None:
        with self.report.aside("checkpoint"):
            self.guard.settle()
            self.checkpoints.save(done, state)
        self.guard.saved(done)


def _shared_corpus(folder: RunFolder, config: TrainConfig) -> Corpus:
    """Process 0 makes the corpus in the run folder, which all processes see; the others open it."""
    if is_process_zero():
        load_corpus(folder.corpus, config.data)
    barrier("the corpus is made")
    return load_corpus(folder.corpus, config.data)


def _length_notes(run: RunConfig, epochs: float | None, feed: BatchFeed, folder: RunFolder) -> list[str]:
    """What the start says about the number of steps, where it follows from epochs or was raised."""
    notes = []
    if epochs is not None:
        rows = f"{feed.rows.num_rows:,} rows of text, {feed.batch_size} a step"
        notes.append(f"run.num_train_epochs {epochs:g}: {run.steps:,} steps ({rows})")
    if folder.lengthened:
        notes.append(
            f"a longer run than before ({folder.lengthened}): it keeps weights and moments, and the learning rate now "
            f"follows the schedule of {run.steps:,} steps"
        )
    return notes


def _reports(
    config: TrainConfig, folder: RunFolder, start: Start, *, first_step: int
) -> tuple[Report | NoReport, Profiler]:
    """Those of process 0 are of all processes; the others report nothing."""
    if not is_process_zero():
        return NoReport(), Profiler(folder.profile, range(0))
    schedule = make_schedule(config.optimizer, config.run.steps)
    report = Report(folder, config.run, start, first_step=first_step, schedule=schedule)
    return report, Profiler(folder.profile, config.run.profile_steps)
