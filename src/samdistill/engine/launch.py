"""Several processes for one command: torchrun's agent inside this process, with one clear message when it fails."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch import distributed
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..types import UserError
from .signals import heeded

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_GRACE = 120
"""Seconds the ranks have to finish their step and save after a signal, before they are killed."""


def is_worker() -> bool:
    """Whether this process was started by ``launch`` or torchrun: it must work, not launch again."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(nproc: int, argv: Sequence[str], program: Sequence[str] = ("-m", "samdistill")) -> int:
    """Run ``python PROGRAM ARGV`` as ``nproc`` ranks on this node; its exit code (130 after a Ctrl-C).

    One node by default, on a free port of the loopback. Several: start the same command on each with ``NNODES`` and
    either ``MASTER_ADDR``, ``MASTER_PORT`` and ``NODE_RANK``, or ``RDZV_ENDPOINT`` (``RDZV_BACKEND`` then is ``c10d``
    unless set). Only local rank 0 speaks on the console; when another one fails its message is shown. SIGINT, SIGTERM,
    SIGHUP and SIGQUIT are passed on unless this process ignores them (``nohup``), and the ranks have two minutes to
    save. Raises ``UserError`` for settings that contradict.
    """
    if nproc < 1:
        raise UserError(f"--nproc {nproc}: give the number of processes, 1 or more")
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # its news of a signal or a failure is retold below
    threads = max(1, (os.cpu_count() or 1) // nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # inherited: else every rank starts a thread per core
    with tempfile.TemporaryDirectory(prefix="samdistill_ranks_") as logs:
        try:
            elastic_launch(_config(nproc, logs), sys.executable)(*program, *argv)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.local_rank != 0:
                _show(rank, *Path(logs).glob(f"*/attempt_*/{failure.local_rank}/stderr.log"))
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        except SignalException as error:
            return 128 + int(error.sigval)
    return 0


def leave() -> None:
    """Leave the group of ranks; the last thing a worker does. Gloo's threads can abort (134) an exit they outlive."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _show(rank: int, *logs: Path) -> None:
    """What a rank that does not speak on the console said before it failed."""
    for path in logs:
        print(f"rank {rank}: {path.read_text(errors='replace').strip()}", file=sys.stderr)


def _config(nproc: int, logs: str) -> LaunchConfig:
    nodes, backend, endpoint = _number("NNODES", 1), os.environ.get("RDZV_BACKEND"), os.environ.get("RDZV_ENDPOINT")
    port = os.environ.get("MASTER_PORT")
    address = os.environ.get("MASTER_ADDR", "127.0.0.1" if nodes == 1 else None)
    if endpoint is None and address is not None and port is not None:
        endpoint, backend = f"{address}:{port}", backend or "static"
    if endpoint is None:
        if nodes > 1:
            raise UserError(
                f"NNODES={nodes} needs a meeting point: set RDZV_ENDPOINT=host:port, "
                "or MASTER_ADDR, MASTER_PORT and NODE_RANK"
            )
        endpoint = "127.0.0.1:0"  # port 0: the first free one
    alone = {r: Std.NONE if r == 0 else Std.ALL for r in range(nproc)}
    return LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=nproc,
        run_id=os.environ.get("RDZV_ID", "samdistill" if nodes > 1 else uuid.uuid4().hex),
        rdzv_backend=backend or "c10d",
        rdzv_endpoint=endpoint,
        rdzv_configs={"rank": _number("NODE_RANK", 0)} if backend == "static" else {},
        max_restarts=0,
        local_addr="127.0.0.1" if nodes == 1 else None,
        logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=alone),
        shutdown_timeout=_GRACE,
        signals_to_handle=",".join(number.name for number in heeded(_PASSED_ON)),  # nohup stays nohup
    )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name}={text!r}: give a whole number")
    return int(text)
