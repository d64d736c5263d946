"""A campaign: seeded cases, each a copy of the material with something damaged and one command that meets it.

A case passes if the command succeeds or ends with one clear line on standard error and exit code 2, in time, with
nothing written outside its folder, no process started, no address connected to, and no code of a file executed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from mutations import Canary, mutate_file, plant
from targets import TARGETS, Target, command_line

from samdistill.cli import main

LIMIT_S = 120.0
"""A case that takes longer hangs. Cases take a second; this leaves room for a busy machine."""
LINES = "command line"
_STARTS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "os.startfile"}
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree",
            "os.chmod", "os.chown"}  # fmt: skip


class Hang(BaseException):
    """Raised inside a command that takes too long; no handler of errors may catch it."""


@dataclass(frozen=True)
class Outcome:
    """fault: what is wrong with how it ended, or None. status: the exit code, -1 for none. said: on standard error."""

    number: int
    kind: str
    command: str
    status: int
    fault: str | None
    said: str
    seconds: float


class Watch:
    """An audit hook, which Python keeps for good: what happens between ``start`` and ``stop`` is judged."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def start(self, folder: Path) -> None:
        caches = [os.path.realpath(Path("~/.cache").expanduser()), os.path.realpath(Path("~/.config").expanduser())]
        self.seen, self.allowed = [], (os.path.realpath(folder), "/dev/null", *caches)

    def stop(self) -> list[str]:
        self.allowed = None
        return self.seen

    def _hook(self, event: str, given: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event in _STARTS:
            self.seen.append(f"starts a process: {event}{given[:2]!r:.200}")
        elif event == "socket.connect":
            self.seen.append(f"connects: {given[1]!r}")
        elif event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._check(event, given[0])
        elif event in _CHANGES:
            for place in given[: 2 if event in ("os.rename", "os.link") else 1]:
                self._check(event, place)

    def _check(self, event: str, place: Any) -> None:
        if isinstance(place, str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(place))
            path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            if not any(path == ok or path.startswith(ok + os.sep) for ok in self.allowed or ()):
                self.seen.append(f"writes outside its folder: {event} {os.fsdecode(place)!r}")


WATCH = Watch()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Campaign:
    """material: the folder that ``material.make`` filled, never changed. work: where cases are laid out."""

    def __init__(self, material: Path, work: Path, seed: int = 0) -> None:
        self.material, self.work, self.seed = material, work, seed
        self.canary = Canary(work / "canary")
        self.outside = work / "outside"
        self._lay_out()

    def _lay_out(self) -> None:
        self.outside.mkdir(parents=True)
        (self.outside / "kept").write_text("kept")

    def case(self, number: int) -> Outcome:
        """Case ``number`` depends on it and the seed alone. Its folder stays where it failed."""
        rng = Random(f"{self.seed}/{number}")
        folder = self.work / "a" / "b" / f"case{number}"
        if number % (len(TARGETS) + 2) >= len(TARGETS):
            kind, copy, words = (
                LINES,
                ("configs", "detector", "tracker", "trunk", "photos", "sa1b", "sav", "davis", "results"),
                command_line(rng),
            )
            self._copy(folder, copy)
        else:
            target = TARGETS[number % (len(TARGETS) + 2)]
            kind = target.kind
            self._copy(folder, target.copy)
            self._damage(folder, target, rng)
            words = self._words(folder, rng.choice(target.commands))
        return self._judged(number, kind, folder, words)

    def intact(self) -> Iterator[Outcome]:
        """Every command on undamaged material: each has to succeed, or its cases try nothing."""
        for number, (target, line) in enumerate((t, line) for t in TARGETS if not t.plants for line in t.commands):
            folder = self.work / "a" / "b" / f"intact{number}"
            self._copy(folder, target.copy)
            yield self._judged(-number, target.kind, folder, self._words(folder, line))

    def _words(self, folder: Path, line: str) -> list[str]:
        films = sorted(folder.glob("sav/val/*.mp4"))
        return shlex.split(line.replace("{mp4}", f"sav/val/{films[0].name}" if films else "sav/val/none.mp4"))

    def _judged(self, number: int, kind: str, folder: Path, words: list[str]) -> Outcome:
        before = time.perf_counter()
        status, error, said = self._run(folder, words)
        fault = self._fault(status, error, said)
        if fault is None:
            shutil.rmtree(folder, ignore_errors=True)
        return Outcome(number, kind, shlex.join(words), status, fault, said, time.perf_counter() - before)

    def _copy(self, folder: Path, parts: tuple[str, ...]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        for part in dict.fromkeys(parts):
            shutil.copytree(self.material / part, folder / part)

    def _damage(self, folder: Path, target: Target, rng: Random) -> None:
        files = sorted(path for pattern in target.damage for path in folder.glob(pattern))
        if target.plants:
            plant(files[0], rng, self.canary)
            return
        files = [path for path in files if path.is_file()]
        for path in rng.sample(files, min(len(files), rng.choice([1, 1, 2]))):
            mutate_file(path, rng, self.canary)

    def _run(self, folder: Path, words: list[str]) -> tuple[int, str | None, str]:
        """Exit code, what escaped, and standard error."""
        said, status, error = io.StringIO(), -1, None
        logging.getLogger("samdistill").handlers.clear()
        WATCH.start(folder)
        own, tempfile.tempdir = tempfile.tempdir, str(folder)
        try:
            streams = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said)
            with contextlib.chdir(folder), streams[0], streams[1], time_limit(LIMIT_S):
                status = main(words)
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 1
        except Hang:
            error = "hang:\n" + "".join(traceback.format_exc().splitlines(True)[-12:])
        except BaseException:
            error = "traceback:\n" + traceback.format_exc()
        finally:
            events, tempfile.tempdir = WATCH.stop(), own
        return status, error or (events[0] if events else None), said.getvalue()

    def _fault(self, status: int, error: str | None, said: str) -> str | None:
        if self.canary.path.exists():
            self.canary.path.unlink()
            return "executes code of a file"
        if [path.name for path in self.outside.iterdir()] != ["kept"]:
            found = sorted(path.name for path in self.outside.iterdir())
            shutil.rmtree(self.outside)
            self._lay_out()
            return f"writes outside its folder: {found}"
        if error is not None:
            return error
        if "Traceback (most recent call last)" in said:
            return f"traceback on standard error:\n{said}"
        if status == 2 and not any(line.startswith("samdistill") for line in said.splitlines()):
            return f"exit code 2 without its line: {said!r}"
        if status not in (0, 1, 2):
            return f"exit code {status}"
        return None


def place_of(fault: str) -> str:
    """The innermost line of this package in a traceback, and the error: faults with one cause share it."""
    lines = fault.splitlines()
    own = [number for number, line in enumerate(lines) if "/samdistill/" in line and "File" in line]
    where = lines[own[-1]].strip().partition("samdistill/")[2] if own else ""
    return f"{lines[0][:60]} {where} {lines[-1][:100]}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("material", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a part of the name of the kinds to try")
    return parser.parse_args()


if __name__ == "__main__":  # a driver for development; the tests and benchmarks/reliability.py run the same cases
    given = arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(given.work)
    campaign = Campaign(given.material, given.work, given.seed)
    causes: Counter[str] = Counter()
    ends: Counter[int] = Counter()
    for number in range(given.first, given.first + given.count):
        index = number % (len(TARGETS) + 2)
        if given.only and given.only not in (TARGETS[index].kind if index < len(TARGETS) else LINES):
            continue
        outcome = campaign.case(number)
        ends[outcome.status] += 1
        if outcome.fault:
            causes[place_of(outcome.fault)] += 1
            print(f"--- {number} [{outcome.kind}] {outcome.command[:300]!r}\n{outcome.fault[-1500:]}", flush=True)
        elif outcome.seconds > 20:
            print(f"--- {number} [{outcome.kind}] took {outcome.seconds:.0f} s: {outcome.command[:200]!r}", flush=True)
    print(dict(ends))
    for cause, count in causes.most_common():
        print(count, cause)
