"""What a run says while it runs: bars or lines on the console, a log per rank, JSONL, TensorBoard."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .state import written

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"


class Tracker:
    """Writes into the run folder; rank 0 alone writes metrics and speaks on the console.

    ``metrics.jsonl`` holds one object per logged step: ``step`` (completed), ``epoch`` (from 1), ``terms`` (name to
    value), ``weights``, ``total`` (weighted), ``lr``, ``grad_norm`` (before clipping; null when the fp16 scaler skipped
    the step), ``images_per_second``, ``seconds`` (of training, earlier parts included); and one per validation:
    ``step``, ``epoch``, ``validate``. On a terminal the console shows a bar with every term, else the log's lines.
    """

    def __init__(self, run_dir: Path, rank: int, total: int, start: int, every: int) -> None:
        """``start``: steps already done; what an earlier, longer part logged beyond it is dropped."""
        self.rank, self.total, self.start, self.every = rank, total, start, every
        self.run_dir = run_dir
        self.log = logging.getLogger(f"samdistill.run.{rank}")

    def __enter__(self) -> Tracker:
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        self._handlers: list[logging.Handler] = [logging.FileHandler(self.run_dir / f"log_rank{self.rank}.txt")]
        self._handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._bar: Progress | None = None
        if self.rank == 0:
            self._open_metrics()
            console = Console(stderr=True)
            if console.is_terminal:
                self._bar = _progress(console)
                self._task = self._bar.add_task("train", total=self.total, completed=self.start, epoch=1, terms="")
                self._bar.start()
            else:
                self._handlers.append(logging.StreamHandler())
                self._handlers[-1].addFilter(lambda line: line.levelno < logging.ERROR)  # the caller reports those
        for handler in self._handlers:
            self.log.addHandler(handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self.rank == 0:
            self._metrics.close()
            self._on_board(lambda board: board.close())
        for handler in self._handlers:
            self.log.removeHandler(handler)
            handler.close()

    def _open_metrics(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        path = self.run_dir / METRICS
        lines = [line for line in read_lines(path) if line["step"] <= self.start]
        with written(path) as aside:
            aside.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self._metrics = open(path, "a")  # noqa: SIM115 - closed by __exit__
        self._board: SummaryWriter | None = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self.start + 1)

    def info(self, text: str) -> None:
        """A line in this rank's log, on rank 0 also on the console."""
        self.log.info(text)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)

    def step(self, record: dict[str, Any]) -> None:
        """After every step; what is written depends on ``every``."""
        if self.rank != 0:
            return
        step = record["step"]
        text = "  ".join(f"{name} {value:.4g}" for name, value in record["terms"].items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, epoch=record["epoch"], terms=text)
        if step % self.every and step not in (1, self.total):
            return
        self._write(record)
        for name, value in record["terms"].items():
            self._on_board(lambda board, n=name, v=value: board.add_scalar(f"terms/{n}", v, step))
        for name in ("total", "lr", "grad_norm", "images_per_second"):
            self._on_board(lambda board, n=name: board.add_scalar(f"train/{n}", record[n], step))
        self.log.info(
            f"epoch {record['epoch']} step {step}/{self.total}  {text}  total {record['total']:.4g}  "
            f"lr {record['lr']:.3g}  grad {record['grad_norm']:.3g}  {record['images_per_second']:.1f} images/s"
        )

    def validation(self, step: int, epoch: int, figures: Mapping[str, float]) -> None:
        """Figures of ``Task.validate``."""
        self.info(f"epoch {epoch} validate  " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        if self.rank == 0:
            self._write({"step": step, "epoch": epoch, "validate": dict(figures)})
            for name, value in figures.items():
                self._on_board(lambda board, n=name, v=value: board.add_scalar(f"validate/{n}", v, step))

    def _on_board(self, act: Callable[[SummaryWriter], None]) -> None:
        """TensorBoard writes from a thread and reports a full disk at a later call: that must not end or mask a run."""
        if self._board is None:
            return
        try:
            act(self._board)
        except OSError as error:
            self._board = None
            self.log.warning(f"TensorBoard stopped: {error.strerror or error}; {METRICS} goes on")

    def _write(self, record: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._metrics.flush()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("epoch {task.fields[epoch]}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[terms]}"), console=console, refresh_per_second=4,
    )  # fmt: skip


def _finite(node: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    return None if isinstance(node, float) and not math.isfinite(node) else node


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a ``metrics.jsonl``; a last line torn by a kill is left out. No file: no lines."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    with written(path) as aside:
        aside.write_text(text)
