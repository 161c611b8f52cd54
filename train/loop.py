"""Training from the top, what `python -m train CONFIG` does once its config is read: config → mesh → data → program →
loop → checkpoint and export."""

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from flax import nnx
from jax.sharding import Mesh

import qwen_moe_jax as qmj
from qwen_moe_jax.sharding.distributed import barrier, is_process_zero
from train.best import Best, best_so_far
from train.checkpoint import Checkpoints
from train.config import RunConfig, TrainConfig
from train.data.corpus import Corpus
from train.data.feed import Feed, Setting
from train.data.lengths import position_notes
from train.export import export, export_dtype
from train.folder import RunFolder
from train.initial import check_checkpoint_exists, initial_model_config, initial_state
from train.nonfinite import NonFiniteGuard
from train.objectives.chosen import objective_of
from train.objectives.contract import Objective
from train.optimizer import make_schedule, schedule_notes
from train.parameters import Params, merge
from train.plan import training_step
from train.processes import Asked, with_shared_stop
from train.program import Program, assemble, batch_sharding
from train.reporting.planned import PlanCheck, Planned
from train.reporting.profile import Profiler
from train.reporting.progress import NoReport, Report
from train.reporting.samples import Sampler
from train.reporting.start import Start, introduction, start_of
from train.reporting.trackers import require_trackers
from train.step import TrainState, heldout_metrics
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
    require_trackers(config.run)
    check_checkpoint_exists(config.run.model_name_or_path)
    planned = Planned.read(config.run.plan) if config.run.plan else None
    sizes: dict[str, Any] = config.mesh.sizes
    mesh = qmj.make_mesh(**sizes)
    objective = objective_of(config)
    corpus = _shared_corpus(objective, folder, config)
    feed = objective.feed(config, corpus, mesh, batch_sharding(mesh))
    epochs, config = config.run.num_train_epochs, config.with_steps_of(feed.num_rows)
    program = assemble(config, initial_model_config(config, corpus), mesh)  # shapes and shardings, no weights yet

    with Checkpoints(folder.checkpoints, config.run.save_total_limit) as checkpoints:
        state, fixed = initial_state(config, program, checkpoints)
        first_step = int(state.step)
        other_bytes = feed.memory(program)
        start = start_of(config, program, mesh, state, fixed, text_tokens=feed.num_tokens, other_bytes=other_bytes)
        best = best_so_far(config.run, folder.metrics, first_step)
        report, profiler = _reports(config, folder, start, first_step=first_step)
        with report, profiler, stop_requests(lambda: leave(folder), says=is_process_zero()) as asked:
            notes = [*corpus.forms, *corpus.notes, *feed.notes]
            notes += position_notes(config.data.seq_len, program.model.config.max_position_embeddings)
            notes += schedule_notes(config.optimizer, config.run.steps)
            notes += [] if planned is None else planned.notes(training_step(config, program, "").work, mesh.shape)
            notes += _length_notes(config.run, epochs, feed, config.data.batch_size, folder)
            all_epochs = config.run.steps * config.data.batch_size / feed.num_rows
            report.say("\n".join([introduction(start, all_epochs), *notes]))
            setting = Setting(
                config=config,
                folder=folder,
                mesh=mesh,
                program=program,
                corpus=corpus,
                report=report,
                first_step=first_step,
            )
            feed = feed.prepare(setting, merge(state.params, fixed))
            loop = Loop(
                config=config.run,
                folder=folder,
                mesh=mesh,
                program=program,
                feed=feed,
                fixed=fixed,
                checkpoints=checkpoints,
                best=best,
                report=report,
                profiler=profiler,
                sampler=_sampler(config, program, corpus),
                plan_check=None if planned is None else PlanCheck(planned, program, report.say),
                guard=NonFiniteGuard(config.run, batch_of=lambda step: "on " + feed.describe(step - 1), say=report.say),
            )
            with closing(feed):
                state, heldout = loop.run(state, asked)
            last_step = int(state.step)
            if best is not None and best.step not in (None, last_step):
                state, heldout = loop.restore_best()

    trained = nnx.merge(program.eval_graph, merge(state.evaluated, fixed))
    with write_errors(folder.path, "the export"):
        sample = export(trained, config, folder, corpus)
        if is_process_zero():
            folder.finish(
                {
                    "steps": int(state.step),
                    "last_step": last_step,
                    "heldout_loss": heldout["loss"],
                    "heldout": dict(heldout),
                    "best_metric": config.run.metric_for_best_model or None,
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
        plan_check: compares the first steps with the plan of the run, where there is one.
        best: of the evaluations, where the config names a metric.
    """

    config: RunConfig
    folder: RunFolder
    mesh: Mesh
    program: Program
    feed: Feed
    fixed: Params
    checkpoints: Checkpoints
    best: Best | None
    report: Report | NoReport
    profiler: Profiler
    sampler: Sampler | None
    guard: NonFiniteGuard
    plan_check: PlanCheck | None = None

    def run(self, state: TrainState, asked: Asked) -> tuple[TrainState, Mapping[str, float]]:
        """Makes all steps that are left, and returns the last state and the last held-out metrics.

        With a metric for the best checkpoint, the last step is evaluated before it is saved; it may come early.

        Raises:
            Stopped: `asked` has a signal; the step under way is finished and saved.
            NonFiniteError: see `NonFiniteGuard`.
            SaveError: a checkpoint, or what the run reports, cannot be written.
        """
        done, heldout = int(state.step), None
        train_step, asked_to_stop = with_shared_stop(self.program.train_step, asked, self.mesh)
        with write_errors(self.folder.path, lambda: f"step {done}"):
            self._begin(done, state)
            while not self._is_over(done):
                done += 1
                self.profiler.before(done)
                with self.report.fetching():
                    batch = self.feed.training(done - 1, merge(state.params, self.fixed))
                state, metrics = train_step(state, self.fixed, batch)
                self.report.step(done, metrics)
                if self.plan_check is not None:
                    self.plan_check.step(state, self.fixed, batch)
                self.guard.step(done, metrics)
                heldout = self._between_steps(done, state)
                stop = asked_to_stop()
                self.checkpoints.check()
                is_best = self.best is not None and self.best.step == done
                over = self._is_over(done)
                if done % self.config.save_steps == 0 or is_best or over or stop:
                    self._save(done, state, is_best)
                if stop and not over:
                    raise Stopped(done, stop)
            if done < self.config.steps:
                name, patience = self.config.metric_for_best_model, self.config.early_stopping_patience
                self.report.say(f"step {done}  the run ends early: {patience} evaluations without a better {name}")
            return state, heldout or self._evaluate(done, state)

    def restore_best(self) -> tuple[TrainState, Mapping[str, float]]:
        """The state of the best evaluation, and its metrics.

        Raises:
            SaveError: a checkpoint cannot be written.
        """
        self.checkpoints.wait()
        state = self.checkpoints.restore(self.program.state, self.program.model, self.best.step)
        return state, self.best.metrics

    def _is_over(self, done: int) -> bool:
        return done >= self.config.steps or self.best is not None and self.best.stops

    def _begin(self, first_step: int, state: TrainState) -> None:
        """Says where a resumed run goes on; evaluates and samples a new one."""
        if first_step > 0:
            self.guard.saved(first_step)
            self.report.say(f"going on from the checkpoint of step {first_step}")
        else:
            self._evaluate(0, state)
            self._sample(0, state)

    def _between_steps(self, done: int, state: TrainState) -> Mapping[str, float] | None:
        """What comes after a step; the held-out metrics, where the step is evaluated."""
        if self.profiler.ends_with(done):
            with self.report.aside("profile"):
                self.profiler.stop()
        is_last, heldout = done == self.config.steps, None
        if self.best is not None if is_last else done % self.config.eval_steps == 0:
            heldout = self._evaluate(done, state)
        self._sample(done, state)
        return heldout

    def _evaluate(self, done: int, state: TrainState) -> Mapping[str, float]:
        program = self.program
        with self.report.aside("evaluation"):
            params = merge(state.evaluated, self.fixed)
            heldout = self.feed.evaluate(done, params) or heldout_metrics(
                program.eval_step, params, self.feed.heldout, program.objective
            )
        self.report.heldout(done, heldout)
        if self.best is not None:
            self.best.add(done, heldout)
        return heldout

    def _sample(self, done: int, state: TrainState) -> None:
        if self.sampler is not None:
            self.sampler.sample(done, merge(state.evaluated, self.fixed), self.report)

    def _save(self, done: int, state: TrainState, is_best: bool) -> None:
        with self.report.aside("checkpoint"):
            self.guard.settle()
            self.feed.saved(done)
            self.checkpoints.save(done, state, best=is_best)
        self.guard.saved(done)


def _shared_corpus(objective: Objective, folder: RunFolder, config: TrainConfig) -> Corpus:
    """Process 0 makes the corpus in the run folder, which all processes see; the others open it."""
    if is_process_zero():
        objective.load_corpus(folder.corpus, config)
    barrier("the corpus is made")
    return objective.load_corpus(folder.corpus, config)


def _sampler(config: TrainConfig, program: Program, corpus: Corpus) -> Sampler | None:
    """What continues `run.sample_prompt`; None for a classifier."""
    if not isinstance(program.model, qmj.CausalLM):
        return None
    return Sampler(config.run, program.eval_graph, corpus.tokenizer)


def _length_notes(run: RunConfig, epochs: float | None, feed: Feed, batch_size: int, folder: RunFolder) -> list[str]:
    """What the start says about the number of steps, where it follows from epochs or was raised."""
    notes = []
    if epochs is not None:
        rows = f"{feed.num_rows:,} rows of text, {batch_size} a step"
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
