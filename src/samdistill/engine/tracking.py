"""Logging of a run: console, one log file per rank, JSON lines, and TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from ..io import Appender, write_lines
from ..reading import read_json_lines
from ..types import UserError
from .state import kept

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"


class _Place(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    step: Annotated[int, Field(ge=0)]
    epoch: Annotated[int, Field(ge=1)]


class Step(_Place):
    """Logged values of a step. None for a value that is not finite."""

    terms: dict[str, float | None]
    weights: dict[str, float]
    total: float | None
    lr: float
    grad_norm: float | None
    images_per_second: float
    seconds: float


class Validation(_Place):
    """Logged metrics of a validation."""

    validate: dict[str, float | None]


Line = Step | Validation


class Tracker:
    """Logger of a run. Only rank 0 writes metrics and prints to the console.

    ``metrics.jsonl`` has one object per logged step, with ``step`` (completed steps), ``epoch`` (from 1), ``terms``
    (values by name), ``weights``, ``total`` (weighted), ``lr``, ``grad_norm`` (before clipping; null if the fp16 scaler
    skipped the step), ``images_per_second`` and ``seconds`` (training time, earlier parts included). It has one object
    per validation, with ``step``, ``epoch`` and ``validate``. A terminal shows a progress bar with every term;
    otherwise log lines are printed.
    """

    def __init__(self, run_dir: Path, rank: int, total: int, start: int, every: int) -> None:
        """Set up the logger. Lines that an earlier part of the run logged after step ``start`` are removed.

        Args:
            run_dir: Run folder.
            rank: Rank of this process.
            total: Steps of the run.
            start: Completed steps.
            every: Interval of logged steps.
        """
        self.rank, self.total, self.start, self.every = rank, total, start, every
        self.run_dir = run_dir
        self.log = logging.getLogger(f"samdistill.run.{rank}")

    def __enter__(self) -> Tracker:
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        self._handlers: list[logging.Handler] = [_LogFile(self.run_dir / f"log_rank{self.rank}.txt")]
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
                self._handlers[-1].addFilter(lambda line: line.levelno < logging.ERROR)  # the caller reports errors
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
            threading.excepthook = self._hook
            self._on_board(lambda board: board.close())
        for handler in self._handlers:
            self.log.removeHandler(handler)
            handler.close()

    def _open_metrics(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imported here because it is slow, and only rank 0 needs it

        path = self.run_dir / METRICS
        lines = [line for line in read_lines(path) if line["step"] <= self.start]
        write_lines(path, lines, hint=kept(self.run_dir))
        self._metrics = Appender(path, kept(self.run_dir))
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        self._board: SummaryWriter | None = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self.start + 1)

    def info(self, text: str) -> None:
        """Write a line to this rank's log, and on rank 0 to the console."""
        self.log.info(text)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)

    def step(self, record: dict[str, Any]) -> None:
        """Log a step. It is called after every step and writes those that ``every`` selects, the first and the last."""
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
        """Log metrics of ``Task.validate``."""
        self.info(f"epoch {epoch} validate  " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        if self.rank == 0:
            self._write({"step": step, "epoch": epoch, "validate": dict(figures)})
            for name, value in figures.items():
                self._on_board(lambda board, n=name, v=value: board.add_scalar(f"validate/{n}", v, step))

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Suppress the traceback of TensorBoard's thread for a full disk. The next call raises the error again."""
        if not (issubclass(failure.exc_type, OSError) and type(failure.thread).__name__ == "_AsyncWriterThread"):
            self._hook(failure)

    def _on_board(self, act: Callable[[SummaryWriter], None]) -> None:
        """Call TensorBoard, and stop using it after an error.

        Its thread reports a full disk in a later call, and this must not end the run or hide another error.
        """
        if self._board is None:
            return
        try:
            act(self._board)
        except OSError as error:
            self._board = None
            self.log.warning(f"TensorBoard stopped: {error.strerror or error}; {METRICS} goes on")

    def _write(self, record: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(_finite(record), allow_nan=False) + "\n")


class _LogFile(logging.Handler):
    """Log file of a rank. It is closed after a disk error. The run reports the error when its own files fail."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file: Appender | None = Appender(path)

    def emit(self, record: logging.LogRecord) -> None:
        if self._file is not None:
            try:
                self._file.write(self.format(record) + "\n")
            except UserError:
                self.close()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(UserError):
                file.close()
        super().close()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("epoch {task.fields[epoch]}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[terms]}"), console=console, refresh_per_second=4,
    )  # fmt: skip


def _finite(node: Any) -> Any:
    """Replace NaN and infinity with None, because JSON has neither."""
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    return None if isinstance(node, float) and not math.isfinite(node) else node


def read_lines(path: Path) -> list[Line]:
    """Read a ``metrics.jsonl``. An incomplete last line is left out. A missing file has no lines.

    Raises:
        UserError: A line is invalid.
    """
    if not path.exists():
        return []
    return read_json_lines(path, Line, "not a line of metrics, remove it", torn=True)
