"""Training loop of all jobs, on Accelerate: any device and number of ranks, with exact resume."""

from __future__ import annotations

import math
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..checkpoints.files import STUDENT_FOLDER
from ..config import TrainConfig
from ..data import reporting, worker_count
from ..io import replacing, write_text
from ..locks import locked
from ..processes import outlive_signals
from ..reading import foreign
from ..types import UserError
from .accelerator import make_accelerator
from .constants import Constants
from .frozen_norm import measure_frozen
from .groups import Freezing, parameter_groups
from .norm import synchronise_batch_norm
from .quantised import Quantisation
from .rng import capture_rng, restore_rng, seed_rng
from .schedule import GlobalBatches, Phases, Shard, stream_seed
from .shares import shares
from .signals import Interrupted, StopSignal
from .state import (
    INTERRUPT,
    Checkpoint,
    Ema,
    data_digest,
    gather,
    kept,
    newest,
    on_main,
    open_run,
    prune,
)
from .task import Phase, Task
from .tracking import Tracker

_UNFIT = "what its checkpoint holds does not fit the run; start again with another output"

_RANK_0_FIRST = 5.0
"""Seconds that other ranks wait before they fail, so that only rank 0, on the console, reports an error of all ranks.
"""


@dataclass(frozen=True)
class FitResult:
    """A finished run.

    ``terms`` are the values at the last step. ``seconds`` is the training time of all parts of the run, without saving
    and validation. ``images_per_second`` is that of this call, 0 if no step was left. ``student`` is a folder for
    ``from_pretrained``, with averaged weights if EMA is on; None if the exported student is not a Hugging Face model.
    """

    steps: int
    epochs: int
    seconds: float
    terms: dict[str, float]
    checkpoint: Path
    student: Path | None
    images_per_second: float


def fit(
    task: Task[Any], config: TrainConfig, run_dir: Path, resume: Path | None = None, workers: int = 2,
    resolved: str = "",
) -> FitResult:  # fmt: skip
    """Train the student of ``task``. Every rank calls it.

    Training continues from the newest checkpoint in ``run_dir``, so the same call can be repeated. The run folder gets
    ``config.yaml``, ``log_rank{r}.txt``, ``metrics.jsonl`` (see ``Tracker``), ``tensorboard/``, ``skipped.jsonl`` if
    inputs are left out, ``ckpt_epoch_{n}.pt`` after n epochs (the last ``config.keep``) and, at the end, ``student/``.

    The first SIGINT or SIGTERM finishes the step, saves a checkpoint and raises ``Interrupted``, a ``SystemExit`` with
    code
    130. A second one aborts.

    Args:
        task: The task.
        config: Settings of the training.
        run_dir: Run folder.
        resume: Another checkpoint or run folder to start from.
        workers: Loader processes per rank.
        resolved: YAML of the whole run, saved as ``config.yaml`` and compared on resume, see ``state.HARMLESS``.

    Raises:
        UserError: The batch does not divide; there is too little data; fp16 without CUDA; another process uses the run
            folder, or it contains another run; settings or data have changed; a checkpoint is damaged; a term or
            gradient is not finite (weights are not changed then); the disk is full. The last good checkpoint is always
            kept.
    """
    accelerator = make_accelerator(config, task.leaves_unused or bool(config.freeze))
    try:
        with ExitStack() as stack:
            on_main(lambda: stack.enter_context(locked(run_dir, "train")))
            started = newest(run_dir) is not None
            stack.enter_context(reporting("train", run_dir, accelerator.process_index, resume=started))
            return _fit(accelerator, task, config, run_dir, resume, workers, resolved)
    except UserError:
        if not accelerator.is_main_process:
            time.sleep(_RANK_0_FIRST)
        raise


def _fit(
    accelerator: Accelerator, task: Task[Any], config: TrainConfig, run_dir: Path, resume: Path | None,
    workers: int, resolved: str,
) -> FitResult:  # fmt: skip
    shard = Shard(config.batch_size, config.accumulate, accelerator.process_index, accelerator.num_processes)
    data = task.dataset(0)
    items, digest = len(data), data_digest(data)  # type: ignore[arg-type]
    schedule = Phases.of(config, shard.steps_per_epoch(items))
    source = on_main(lambda: open_run(run_dir, resume, resolved))
    saved = Checkpoint.load(source) if source else None
    if saved:
        saved.require_data(source, items, digest)
        saved.require_teacher(source, task.taught_by)
        if saved.step == schedule.total and source.resolve().parent != run_dir.resolve():
            raise UserError(f"{source}: its run is finished, there is nothing to resume; use its student/")
    on_main(lambda: write_text(run_dir / "config.yaml", resolved, hint=kept(run_dir)))
    start = saved.step if saved else 0
    with Tracker(run_dir, shard.rank, schedule.total, start, config.log_every) as tracker:
        try:
            if source:
                tracker.info(f"resumed from {source} at step {start} of {schedule.total}")
            loop = _Loop(
                task, config, run_dir, workers, resolved, accelerator, shard, schedule, items, digest, tracker, saved
            )
            return loop.run()
        except UserError as error:
            tracker.log.error(str(error))
            raise


class _Loop:
    """State of one call of ``fit``."""

    def __init__(
        self, task: Task[Any], config: TrainConfig, run_dir: Path, workers: int, resolved: str,
        accelerator: Accelerator, shard: Shard, schedule: Phases, items: int, digest: str, tracker: Tracker,
        saved: Checkpoint | None,
    ) -> None:  # fmt: skip
        self.task, self.config, self.run_dir, self.resolved = task, config, run_dir, resolved
        self.workers = worker_count(workers)
        self.accelerator, self.shard, self.schedule, self.items = accelerator, shard, schedule, items
        self.tracker, self.device, self.digest = tracker, accelerator.device, digest
        self.per_epoch = shard.steps_per_epoch(items)
        seed_rng(config.seed)
        self.student = self._build()
        frozen = config.batch_norm == "frozen"
        self.freezing = Freezing(self.student, config.freeze, config.total_epochs, frozen)
        self.quantised = Quantisation(self.student, task.export(self.student), config.qat, schedule.total)
        if layers := len(self.quantised):
            tracker.info(
                f"{layers} layer(s) compute in int8 from step {self.quantised.start + 1}, their ranges are fixed from "
                f"step {self.quantised.fixed + 1}"
            )
        self.constants = Constants.of(self.student) if task.rebuilds_frozen else Constants()
        groups = parameter_groups(self.student, config.weight_decay, config.rates)
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
        if saved:
            with foreign(run_dir, _UNFIT):
                self.constants.load(self.student, saved.model, saved.frozen, run_dir)
                optimizer.load_state_dict(saved.optimizer)
        elif frozen and (measured := measure_frozen(task, self.student, config, self.device)):
            tracker.info(f"statistics of {measured} batch norm(s) measured, they do not change in training")
        self.trainable = [p for p in self.student.parameters() if p.requires_grad]
        self.ema = Ema(self.student, config.ema) if config.ema else None
        self.model, self.optimizer = accelerator.prepare(self.student, optimizer)
        self.step, self.terms, self.seconds, self.images = 0, dict[str, float](), 0.0, 0
        self.weights = dict[str, float]()
        seed_rng(stream_seed(config.seed, shard.rank))
        if saved:
            with foreign(run_dir, _UNFIT):
                self._restore(saved)
        self.earlier = self.seconds

    def _build(self) -> nn.Module:
        student = self.task.build_student().to(self.device)
        if self.config.sync_bn and self.shard.world > 1 and self.config.batch_norm == "batch":
            student = synchronise_batch_norm(student, self.device)
        if self.config.compile:
            student.compile()  # in place, so parameter names do not change, as they would with torch.compile(student)
        return student

    def _restore(self, saved: Checkpoint) -> None:
        self.step, self.terms, self.seconds = saved.step, saved.terms, saved.seconds
        if self.ema is not None and saved.ema is not None:
            self.ema.load(saved.ema)
        if saved.ranges is not None:
            self.quantised.load(saved.ranges)
        self.task.load_state(saved.task, self.shard.rank, self.shard.world)
        if self.accelerator.scaler is not None and saved.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved.scaler)
        if len(saved.rng) == self.shard.world:
            restore_rng(saved.rng[self.shard.rank], self.device)
        else:
            seed_rng(stream_seed(self.config.seed, self.shard.rank, saved.step))
            self.tracker.info(
                f"saved on {len(saved.rng)} rank(s), resumed on {self.shard.world}: the batches stay the same, "
                "random draws such as dropout do not"
            )

    def run(self) -> FitResult:
        if self.step == self.schedule.total:
            self.tracker.info(f"{self.run_dir}: the run is finished, nothing is left to train")
        with StopSignal() as self.stop:
            try:
                for epoch in range(self.step // self.per_epoch, self.config.total_epochs):
                    self._epoch(Phase.of(self.config, epoch))
            except RuntimeError:
                if self.shard.world > 1 and self.stop.arrives():  # a collective failed because another rank failed
                    self.tracker.log.error("stopped, another rank failed", exc_info=True)
                    raise SystemExit(1) from None  # the other rank reports the error
                raise
        student = on_main(self._save_student)
        ran = self.seconds - self.earlier
        checkpoint = newest(self.run_dir)
        assert checkpoint is not None
        return FitResult(
            self.step, self.config.total_epochs, self.seconds, self.terms, checkpoint, student,
            self.images / ran if ran else 0.0,
        )  # fmt: skip

    def _epoch(self, phase: Phase) -> None:
        epoch, data = phase.epoch, self.task.dataset(phase.epoch)
        if len(data) != self.items:  # type: ignore[arg-type]
            raise UserError(f"epoch {epoch} has {len(data)} image(s), the first had {self.items}: they must be equal")  # type: ignore[arg-type]
        order = GlobalBatches(self.items, self.shard, self.config.seed, epoch, self.step % self.per_epoch)
        generator = torch.Generator().manual_seed(stream_seed(self.config.seed, epoch))
        loader = DataLoader(
            data, batch_sampler=order, collate_fn=partial(self.task.collate, phase=phase), num_workers=self.workers,
            worker_init_fn=outlive_signals, generator=generator,
        )  # fmt: skip
        batches = iter(loader)
        try:
            self._steps(phase, batches)
        finally:
            if self.workers:
                batches._shutdown_workers()  # type: ignore[attr-defined] # a traceback keeps them alive
        self._save(f"ckpt_epoch_{epoch + 1}.pt", epoch + 1)
        self._validate(phase)

    def _steps(self, phase: Phase, batches: Any) -> None:
        """Run the remaining steps of an epoch."""
        self.model.train()
        epoch, training = phase.epoch, self.freezing.start(phase.epoch)
        if self.config.freeze:
            self.tracker.info(f"epoch {epoch + 1} trains {training} of {len(self.trainable)} parameter tensors")
        stopping = False
        clock = time.perf_counter()
        while self.step < (epoch + 1) * self.per_epoch:
            stopping = self._step(phase, batches)
            clock, before = time.perf_counter(), clock
            self._record(epoch, clock - before)
            if stopping and self.step < (epoch + 1) * self.per_epoch:
                self._interrupt(INTERRUPT, epoch)
        if stopping and self.step < self.schedule.total:
            self._interrupt(f"ckpt_epoch_{epoch + 1}.pt", epoch + 1)

    def _step(self, phase: Phase, batches: Any) -> bool:
        """Run one optimiser step. Return whether a rank was asked to stop."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(self.step) * group["scale"]
        self.quantised.begin(self.step)
        values: Tensor | float = 0.0
        parts = [next(batches) for _ in range(self.config.accumulate)]
        for part, factors in zip(parts, self._shares(parts), strict=True):
            batch = self.task.to(part, self.device)
            with self.accelerator.accumulate(self.model):
                terms = self.task.terms(self.model, batch, phase).scaled(factors)
                if phase.only is not None:
                    terms = terms.only(phase.only)
                total = terms.total
                if not total.requires_grad:
                    raise UserError(
                        f"epoch {phase.epoch}: no loss term depends on a parameter that trains in it; "
                        "`samdistill check` shows what reaches the student"
                    )
                self.accelerator.backward(total)
            values = values + torch.stack([term.value.detach().float() for term in terms.values()])
        norm = self.accelerator.clip_grad_norm_(self.trainable, self.config.clip_norm or math.inf)
        assert isinstance(values, Tensor) and norm is not None
        asked = torch.tensor([float(self.stop.asked)], device=self.device)
        local = torch.cat([values / self.config.accumulate, norm.detach().float().view(1).to(self.device), asked])
        *figures, self.norm, stopping = self.accelerator.reduce(local, "mean").tolist()  # the only sync
        self.weights = {name: float(term.weight) for name, term in terms.items()}
        self.terms = dict(zip(terms, figures, strict=True))
        self._require_finite()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.quantised.update()
        if self.ema is not None:
            self.ema.update(self.student, self.step)
        self.step += 1
        return stopping > 0

    def _shares(self, parts: list[Any]) -> list[dict[str, Tensor]]:
        counts = [self.task.counts(part) for part in parts]
        return shares(counts, self.shard.world, lambda t: self.accelerator.reduce(t, "sum"), self.device)

    def _require_finite(self) -> None:
        bad = [f"{name} = {value}" for name, value in self.terms.items() if not math.isfinite(value)]
        if bad:
            what = f"not finite: loss term {', '.join(bad)}"
        elif not math.isfinite(self.norm) and self.accelerator.scaler is None:  # the scaler skips such a step
            what = f"every loss term is finite but the gradient is not (norm {self.norm})"
        else:
            return
        good = newest(self.run_dir)
        kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        raise UserError(
            f"step {self.step + 1}: {what}; stopped before the weights were changed, {kept}; "
            "lower train.lr, or look at the data"
        )

    def _record(self, epoch: int, seconds: float) -> None:
        self.seconds += seconds
        self.images += self.config.batch_size
        self.tracker.step({
            "step": self.step, "epoch": epoch + 1, "terms": self.terms, "weights": self.weights,
            "total": sum(value * self.weights[name] for name, value in self.terms.items()),
            "lr": self.schedule(self.step - 1), "grad_norm": self.norm,
            "images_per_second": self.config.batch_size / seconds, "seconds": self.seconds,
        })  # fmt: skip

    def _averaged(self) -> Any:
        return self.ema.applied(self.student) if self.ema is not None else nullcontext()

    def _validate(self, phase: Phase) -> None:
        streams = capture_rng(self.device)
        self.student.eval()
        with self._averaged():
            figures = self.task.validate(self.student, phase)
        restore_rng(streams, self.device)
        if figures:
            self.tracker.validation(self.step, phase.epoch + 1, figures)

    def _save(self, name: str, epochs_done: int) -> Path:
        streams, states = gather(capture_rng(self.device)), gather(self.task.state())
        scaler = self.accelerator.scaler

        def write() -> Path:
            path = self.run_dir / name
            Checkpoint(
                self.step, epochs_done, self.constants.without(self.student.state_dict()),
                self.ema.shadow if self.ema else None, self.optimizer.state_dict(),
                scaler.state_dict() if scaler else None, streams, self.resolved, self.items, self.terms, self.seconds,
                self.digest, self.task.taught_by, self.quantised.state(), states, self.constants.digest,
            ).save(path)  # fmt: skip
            if name != INTERRUPT:
                prune(self.run_dir, self.config.keep)
            return path

        return on_main(write)

    def _interrupt(self, name: str, epochs_done: int) -> None:
        path = self._save(name, epochs_done)
        where = f"interrupted at step {self.step} of {self.schedule.total}"
        self.tracker.info(f"{where}, saved {path}; the same command goes on")
        raise Interrupted(path)

    def _save_student(self) -> Path | None:
        """Save the final student as a folder, atomically. Only rank 0 calls it."""
        hosts = sys.modules.get("transformers.modeling_utils")  # if not imported, it has no instances
        path = self.run_dir / STUDENT_FOLDER
        with self._averaged():
            if not path.exists():
                self.task.finish(self.student)
            student = self.task.export(self.student)
            if hosts is None or not isinstance(student, hosts.PreTrainedModel):
                return None
            if not path.exists():
                from ..checkpoints.loading import quiet_transformers

                with replacing(path, sync=True, hint=kept(self.run_dir)) as new, quiet_transformers():
                    student.save_pretrained(new)
        return path
