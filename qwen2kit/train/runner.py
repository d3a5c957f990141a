"""Carries one run through its phases and keeps its directory up to date."""

from __future__ import annotations

import gc
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from qwen2kit.backend.processes import Processes
from qwen2kit.backend.protocol import DistributedBackend
from qwen2kit.config.freeze import freeze
from qwen2kit.config.train_tree import RewindSpikes
from qwen2kit.config.tree import RunConfig
from qwen2kit.errors import ConfigError, PeerError, Qwen2KitError
from qwen2kit.train.agreement import numbered, on_first, together
from qwen2kit.train.checkpoints import CheckpointStore
from qwen2kit.train.curve import plot_run
from qwen2kit.train.evaluate import Evaluator
from qwen2kit.train.exporting import export_trained
from qwen2kit.train.live import LiveTable
from qwen2kit.train.metrics import JsonlSink, Record, Sinks, read_records
from qwen2kit.train.pace import Pace
from qwen2kit.train.phases import Phase, following, phases
from qwen2kit.train.report import write_report
from qwen2kit.train.run_dir import (
    CHECKPOINT_DIR,
    CURVE_FILE,
    INITIAL_DIR,
    METRICS_FILE,
    MODEL_DIR,
    PROFILE_DIR,
    REPORT_FILE,
    RunResult,
    read_run,
    write_run,
)
from qwen2kit.train.session import Session
from qwen2kit.train.setup import (
    Origin,
    build_data,
    compile_model,
    initial_checkpoint,
    peak_of,
    total_steps,
    training_backend,
)
from qwen2kit.train.signals import Stopped, StopRequest
from qwen2kit.train.trackers import Tracker, open_trackers

if TYPE_CHECKING:
    from rich.console import Console

_REPORT_SECONDS = 3.0
_ABOUT_EVALUATION = frozenset({"event", "step", "seq_len"})


class Runner:
    """One call of a run, on one of its processes.

    Args:
        console: where progress is shown; None is silent (and on all processes but the first).
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        origin: Origin,
        processes: Processes,
        console: Console | None,
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._origin = origin
        self._processes = processes
        self._console = console
        self._first = processes.rank == 0
        self._started = perf_counter()
        self._backend = training_backend(config)
        self._phases = phases(config, origin.spec, processes.world)
        self._store = CheckpointStore(run_dir / CHECKPOINT_DIR, config.checkpoint.keep, processes)
        self._provenance = self._recorded = freeze(config, self._backend.versions())
        self._jsonl = JsonlSink(run_dir / METRICS_FILE)
        self._sinks = Sinks([self._jsonl] if self._first else [])
        self._trackers: list[Tracker] | None = None
        self._screen: LiveTable | None = None
        self._session: Session | None = None
        self._stop, self._listening = StopRequest(), ExitStack()

    def run(self, *, resuming: bool) -> RunResult:
        """Train, evaluate, export; or stop at a signal.

        Raises:
            Qwen2KitError: what went wrong, which ``run.json`` then says too.
            PeerError: another process reports the failure.
        """
        with self._listening:
            result = self._run(resuming)
        self._processes.close()
        return result

    def _run(self, resuming: bool) -> RunResult:
        try:
            if resuming:
                # Until it has gone on, it is what it was: an attempt that fails changes no recipe.
                self._recorded = read_run(self._run_dir)["provenance"]
            self._write("running")
            return self._conclude(self._train(resuming))
        except Qwen2KitError as error:
            if self._must_report(error):
                raise
            raise PeerError(str(error)) from error
        except Exception as error:
            if self._processes.world > 1 and self._is_lost_process(error):
                raise PeerError(f"lost another process: {error}") from error
            raise
        finally:
            for tracker in self._trackers or ():
                tracker.close()

    def _train(self, resuming: bool) -> str | None:
        """All phases; the name of the signal that ended them, if one did."""
        with ExitStack() as stack, suppress(Stopped):
            self._open(resuming)
            if resuming:
                self._recorded = self._provenance
                self._write("running")
            if self._screen is not None:
                stack.enter_context(self._screen)
            while True:
                if self.session.train(self._stop):
                    break
                if self.session.finished:
                    return None
                self._open(resuming=True)
        return self._signal

    @property
    def session(self) -> Session:
        """The phase at hand."""
        assert self._session is not None
        return self._session

    def _open(self, resuming: bool) -> None:
        """Enter the next phase: of the newest checkpoint if ``resuming``, else the first."""
        going_on = self._session is not None
        if resuming and self._config.adapter is not None:
            # Before any checkpoint is read: none of them is to blame for what its base lacks.
            self._enter(self._phases[0]).begin(initial_checkpoint(self._config.model))
        restored = self._store.restore(self._read) if resuming else None
        if restored is None:
            if resuming:
                self._note(f"no checkpoint in {self._store.directory}: starting again from step 0")
            self._enter(self._phases[0])
            self._keep_records(-1)
            self._track(0)
            self._begin()
            return
        for warning in restored.warnings:
            self._note(f"warning: {warning}")
        self.session.adopt(restored.state)
        self._listen()
        step = self.session.progress.step
        if going_on:
            self._note(f"step {step}: rows of {self.session.phase.config.seq_len} tokens from now")
        else:
            self._keep_records(step)
            self._track(step)
            self._catch_up(restored.state)
            self._note(f"resuming after step {step} of {self.session.total} ({restored.path.name})")

    def _catch_up(self, state: dict[str, Any]) -> None:
        """The evaluation that was due after the checkpoint, if the run ended before it."""
        session, step = self.session, state["step"]
        every = self._config.eval.every
        if every == 0 or step % every or step in (0, session.total):
            return
        if state["phase"] == session.phase.number and not on_first(
            self._processes, lambda: self._evaluation(step)
        ):
            session.evaluate(session.progress)

    def _evaluation(self, step: int) -> Record | None:
        """What was measured after ``step``, if that is on record."""
        records = read_records(self._run_dir / METRICS_FILE)
        return next((r for r in records if (r["event"], r["step"]) == ("eval", step)), None)

    def _read(self, path: Path, state: dict[str, Any]) -> None:
        session = self._enter(following(self._phases, state["step"]))
        session.model.restore_state(path)

    def _begin(self) -> None:
        session = self.session
        session.begin(initial_checkpoint(self._config.model))
        self._listen()
        if self._config.checkpoint.initial:
            self._export(INITIAL_DIR)
        session.evaluate(session.progress)
        if isinstance(self._config.train.spike, RewindSpikes):
            session.save(session.progress)
            session.finish()

    def _enter(self, phase: Phase) -> Session:
        if self._session is not None and self._session.phase.number == phase.number:
            return self._session
        if self._session is not None:
            self._session.close()
            self._session = None
            gc.collect()  # the old model's memory, before the new one is compiled
        config = phase.config
        model = compile_model(self._backend, config, phase.spec, self._processes.world)
        tokenizer, shard = self._origin.tokenizer, model.data_shard
        data = together(self._processes, lambda: build_data(config, tokenizer, self._note, shard))
        total = total_steps(self._config, data.train)
        if self._screen is None and self._console is not None:
            self._screen = LiveTable(self._console, total, config.name)
            self._sinks.add(self._screen)
        self._session = Session(
            phase,
            total,
            model=model,
            data=data,
            evaluator=Evaluator(config, tokenizer, data.held_out),
            store=self._store,
            processes=self._processes,
            sink=self._sinks,
            pace=self._pace(phase),
            profile_dir=self._run_dir / PROFILE_DIR,
            go_on=self._go_on,
        )
        return self._session

    def _track(self, step: int) -> None:
        """Open the trackers, once, for a run that goes on after ``step``."""
        if self._first and self._trackers is None:
            self._trackers = open_trackers(self._config, self._run_dir, step, self._note)
            for tracker in self._trackers:
                self._sinks.add(tracker)

    def _pace(self, phase: Phase) -> Pace:
        peak = peak_of(self._backend, phase.config, self._processes.world)
        return Pace(phase.flops_per_token, peak)

    def _listen(self) -> None:
        """From now on signals are requests; before, there is nothing to save."""
        if not self._stop.entered:
            self._listening.enter_context(self._stop)

    def _go_on(self) -> None:
        """Raise Stopped if a process was asked to stop (collective)."""
        if self._processes.any(self._stop.requested is not None):
            raise Stopped

    @property
    def _signal(self) -> str:
        """What stopped the run; of a signal to another process the kind is not known."""
        return self._stop.requested or "SIGTERM"

    def _conclude(self, stopped: str | None) -> RunResult:
        session, config = self.session, self._config
        if stopped is None:
            try:
                self._measure_trained()
                self._export(MODEL_DIR)
            except Stopped:
                stopped = self._signal
        session.close()
        result = self._result(stopped)
        values = result.to_json()
        self._write(values.pop("status"), **values)
        if self._first and config.logging.plot:
            self._draw(result)
        return result

    def _measure_trained(self) -> None:
        """The last evaluation, unless an earlier call made it and was stopped while exporting."""
        session, step = self.session, self.session.total
        found = on_first(self._processes, lambda: self._evaluation(step))
        if found is None:
            session.evaluate(session.progress)
        else:
            session.held.latest = {
                name: value for name, value in found.items() if name not in _ABOUT_EVALUATION
            }

    def _draw(self, result: RunResult) -> None:
        records = [*read_records(self._run_dir / METRICS_FILE)]
        picture = self._run_dir / CURVE_FILE
        if plot_run(picture, records, self._config.name):
            page = self._run_dir / REPORT_FILE
            write_report(page, picture, result.to_json(), self._provenance)

    def _result(self, stopped: str | None) -> RunResult:
        session = self.session
        progress, finished = session.progress, stopped is None
        return RunResult(
            run_dir=self._run_dir,
            status="finished" if finished else "stopped",
            signal=stopped,
            step=progress.step,
            total_steps=session.total,
            tokens=progress.tokens,
            skipped=progress.skipped,
            rewinds=session.guard.rewinds,
            loss=progress.last_loss,
            before=session.held.before,
            after=session.held.latest if finished else {},
            seconds=round(perf_counter() - self._started, 3),
            reports=self._first,
        )

    def _export(self, name: str) -> None:
        export_trained(
            self.session,
            self._config,
            self._origin.tokenizer,
            self._run_dir / name,
            processes=self._processes,
            go_on=self._go_on,
        )

    def _keep_records(self, step: int) -> None:
        """Those up to ``step``; at the run's end not its evaluation, if another is wanted now."""
        if self._first:
            before, now = (one["config"]["eval"] for one in (self._recorded, self._provenance))
            again = self.session.finished and before | {"every": 0} != now | {"every": 0}
            self._jsonl.keep_upto(step, evaluated=not again)

    def _write(self, status: str, **values: Any) -> None:
        if self._first:
            write_run(self._run_dir, status, self._recorded, **values)

    def _note(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, markup=False, soft_wrap=True)

    def _is_lost_process(self, error: Exception) -> bool:
        backend = self._backend
        return isinstance(backend, DistributedBackend) and backend.lost_process(error)

    def _must_report(self, error: Qwen2KitError) -> bool:
        """Whether this process is the one that has to say what went wrong."""
        if isinstance(error, PeerError):
            return False
        if self._first:
            with suppress(OSError):  # the disk may be full, which is then the error to report
                self._write("failed", error=str(error))
            return True
        if self._is_said(str(error)):
            return False
        numbered(self._processes, error)
        return True

    def _is_said(self, message: str) -> bool:
        """Whether process 0 fails for the same reason, as it does where all see the same figures or
        files; asked of ``run.json``, because a failing run cannot rely on its connections."""
        deadline = perf_counter() + _REPORT_SECONDS
        while perf_counter() < deadline:
            with suppress(ConfigError):
                run = read_run(self._run_dir)
                if run["status"] == "failed" and run.get("error") == message:
                    return True
            time.sleep(0.1)
        return False
