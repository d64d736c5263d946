"""What a run says while it runs: bars or lines on the console, a log per rank, JSONL, TensorBoard."""

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
    """What is logged of a step; a figure that is not finite is None."""

    terms: dict[str, float | None]
    weights: dict[str, float]
    total: float | None
    lr: float
    grad_norm: float | None
    images_per_second: float
    seconds: float


class Validation(_Place):
    """The figures of a validation."""

    validate: dict[str, float | None]


Line = Step | Validation


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
            threading.excepthook = self._hook
            self._on_board(lambda board: board.close())
        for handler in self._handlers:
            self.log.removeHandler(handler)
            handler.close()

    def _open_metrics(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        path = self.run_dir / METRICS
        lines = [line for line in read_lines(path) if line["step"] <= self.start]
        write_lines(path, lines, hint=kept(self.run_dir))
        self._metrics = Appender(path, kept(self.run_dir))
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
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

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread dies of a full disk with a traceback, and says it again at the next call."""
        if not (issubclass(failure.exc_type, OSError) and type(failure.thread).__name__ == "_AsyncWriterThread"):
            self._hook(failure)

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


class _LogFile(logging.Handler):
    """A rank's log. A disk that fails ends it quietly: what the run itself cannot write is told where that happens."""

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
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    return None if isinstance(node, float) and not math.isfinite(node) else node


def read_lines(path: Path) -> list[Line]:
    """The objects of a ``metrics.jsonl``; a last line torn by a kill is left out. No file: no lines.

    Raises ``UserError`` for a line that is something else.
    """
    if not path.exists():
        return []
    return read_json_lines(path, Line, "not a line of metrics, remove it", torn=True)
