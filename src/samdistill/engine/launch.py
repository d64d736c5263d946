"""Run a command in several processes, with torchrun's agent in this process."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch import distributed
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..io import scratch
from ..processes import GRACE, INTERRUPTED, INTERRUPTION, LAUNCHER, heeded
from ..types import UserError

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def is_worker() -> bool:
    """Whether ``launch`` or torchrun started this process. Such a process must not call ``launch``."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(nproc: int, argv: Sequence[str], program: Sequence[str] = ("-P", "-m", "samdistill")) -> int:
    """Run ``python PROGRAM ARGV`` as ``nproc`` ranks on this node.

    By default there is one node, and the ranks connect through a free port of the loopback interface. For several
    nodes, start the same command on each with ``NNODES`` and either ``MASTER_ADDR``, ``MASTER_PORT`` and ``NODE_RANK``,
    or ``RDZV_ENDPOINT`` (then ``RDZV_BACKEND`` is ``c10d`` by default).

    Only local rank 0 writes to the console. If another rank fails, its message is printed. A rank that was killed by a
    signal is named. SIGINT, SIGTERM, SIGHUP and SIGQUIT are forwarded, unless this process ignores them (``nohup``).
    The ranks then have two minutes to save. They end when this process is killed.

    Args:
        nproc: Number of ranks on this node.
        argv: Arguments of the program.
        program: Python options that select the program. ``-P`` prevents imports from the current folder.

    Returns:
        The exit code: 130 after SIGINT or SIGTERM, 128 + n after another signal n.

    Raises:
        UserError: ``nproc`` is below 1, or environment variables are missing or invalid.
    """
    if nproc < 1:
        raise UserError(f"--nproc {nproc}: give the number of processes, 1 or more")
    for name in ("elastic", "elastic.agent.server.api", "launcher"):  # signals and failures are reported below;
        logging.getLogger(f"torch.distributed.{name}").setLevel(logging.CRITICAL)  # the agent has its own level
    threads = max(1, (os.cpu_count() or 1) // nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # inherited; otherwise each rank starts a thread per core
    os.environ[LAUNCHER] = str(os.getpid())
    with scratch() as logs:
        try:
            elastic_launch(_config(nproc, str(logs)), sys.executable)(*program, *argv)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.local_rank != 0:
                _show(rank, *logs.glob(f"*/attempt_*/{failure.local_rank}/stderr.log"))
            if failure.exitcode < 0:
                print(f"samdistill: {killed(rank, -failure.exitcode)}", file=sys.stderr)
                return 128 - failure.exitcode
            return failure.exitcode
        except SignalException as error:
            if error.sigval == signal.SIGTERM:  # after SIGINT rank 0 has printed it
                print(f"samdistill: {INTERRUPTION}", file=sys.stderr)
            return INTERRUPTED if error.sigval in (signal.SIGINT, signal.SIGTERM) else 128 + int(error.sigval)
        finally:
            os.environ.pop(LAUNCHER, None)
    return 0


def killed(rank: int, number: int) -> str:
    """Return the message about a rank that the signal ``number`` killed."""
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal has no name
        name = "unnamed"
    cause = {
        signal.SIGKILL: "probably out of memory (the system log says so): use fewer or smaller processes, a smaller "
        "batch or fewer data.workers",
        signal.SIGBUS: "probably no shared memory left: use fewer data.workers, or a larger /dev/shm",
        signal.SIGSEGV: "a library crashed",
    }.get(number, "not by this program")
    return f"rank {rank} was killed by signal {number} ({name}), {cause}; the same command goes on"


def leave() -> None:
    """Leave the process group, as the last action of a worker. Otherwise gloo threads can abort the exit (code 134)."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _show(rank: int, *logs: Path) -> None:
    """Print the stderr of a rank that does not write to the console."""
    for path in logs:
        if text := path.read_text(errors="replace").strip():
            print(f"rank {rank}: {text}", file=sys.stderr)


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
        shutdown_timeout=GRACE,
        signals_to_handle=",".join(number.name for number in heeded(_PASSED_ON)),  # for nohup
    )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name}={text!r}: give a whole number")
    return int(text)
