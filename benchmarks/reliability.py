"""Reliability: killed processes lose no results, and each damaged input leads to a one-line error.

    python benchmarks/reliability.py --out benchmarks/results/reliability.txt

Kills: caching and training of all four jobs, also with two ranks, are killed (SIGKILL) at random moments and repeated
until they finish. Caches must then verify, and their records and the students' weights must equal those of an
uninterrupted run bit for bit. Damage: the cases of ``tests/fuzz``. Each case must end in success, or in a one-line
error with exit code 2, without a traceback, a hang, execution of code from a file, or files written outside its folder.

Processes are forked from one that has imported the package, so that kills interrupt the work and not the imports. All
runs are on the CPU. Power failures, which a kill does not simulate, and file systems that reorder writes are not
tested.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from common import REPOSITORY, Sheet, arguments, note, use_device
from safetensors.torch import load_file

from samdistill.cli import main as command
from samdistill.store import FeatureStore

sys.path.insert(0, str(REPOSITORY / "tests" / "fuzz"))
import material
from campaign import LINES, Campaign, Outcome, place_of
from targets import TARGETS

MEMORY = 24 * 2**30
"""Address space of a process: input that makes one ask for more fails there and not on the whole machine."""


@dataclass(frozen=True)
class Work:
    """A command to be killed. made: what it makes, below the folder of the material."""

    name: str
    verb: str
    job: str
    made: str
    ranks: int = 1

    def words(self) -> list[str]:
        """The same for the first call and for those that go on."""
        longer = ["train.epochs=4"] if self.job in ("encoder", "prompt") else []
        phase = {"detection": "all", "video": "memory"}.get(self.job)
        longer += [f"train.phases=[{{name: {phase}, epochs: 4, lr: 1e-3}}]"] if phase else []
        return [self.verb, f"configs/{self.job}.yaml", *longer, "train.batch_size=2"]


@dataclass
class Kills:
    """What became of one kind of work."""

    kills: int = 0
    finished: int = 0
    equal: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


WORKS = [
    Work("cache, encoder", "cache", "encoder", "runs/encoder/embeddings"),
    Work("train, encoder", "train", "encoder", "runs/encoder/student"),
    Work("train, detection", "train", "detection", "runs/detection/student"),
    Work("cache, prompt", "cache", "prompt", "runs/prompt/features"),
    Work("train, prompt", "train", "prompt", "runs/prompt/student"),
    Work("cache, video", "cache", "video", "runs/video/features"),
    Work("train, video", "train", "video", "runs/video/student"),
    Work("cache, encoder, two ranks", "cache", "encoder", "runs/encoder/embeddings", 2),
    Work("train, encoder, two ranks", "train", "encoder", "runs/encoder/student", 2),
]


def forked(run: Callable[[], int], log: Path) -> int:
    """The id of a process that ends with ``run``'s exit code; what it prints goes to ``log``."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(sink, stream)
        sys.stdout = sys.stderr = os.fdopen(sink, "w", buffering=1)
        code = run()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def start(words: Sequence[str], folder: Path, ranks: int) -> list[int]:
    """The processes of a command in ``folder``: one, or ranks as torchrun starts them."""
    port = _free_port()

    def rank(number: int) -> int:
        os.chdir(folder)
        os.environ["OMP_NUM_THREADS"] = "1"
        if ranks > 1:
            one = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            os.environ |= {name: str(value) for name, value in one.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return command(list(words))

    return [forked(lambda number=number: rank(number), folder / "log.txt") for number in range(ranks)]


def finish(processes: Sequence[int], kill_after: float | None = None, limit: float = 600.0) -> list[int] | None:
    """Exit codes, or None where the processes were killed after ``kill_after`` seconds."""
    begun, left, codes = time.monotonic(), list(processes), dict.fromkeys(processes, -1)
    killed = False
    while left:
        for process in list(left):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                left.remove(process)
                codes[process] = os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - begun
        if left and not killed and (passed > (limit if kill_after is None else kill_after)):
            killed = True
            for process in left:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.002)
    return None if killed else list(codes.values())


def result(path: Path) -> dict[str, bytes]:
    """What was made, without what may differ: records of stores by key, tensors of a student by name."""
    if (path / "model.safetensors").is_file():
        return {name: tensor.numpy().tobytes() for name, tensor in load_file(path / "model.safetensors").items()}
    stores = sorted(manifest.parent for manifest in path.rglob("manifest.json"))
    return {
        f"{store.relative_to(path)}/{key}": FeatureStore(store).read(key).features.numpy().tobytes()
        for store in stores for key in FeatureStore(store)
    }  # fmt: skip


def clear(folder: Path, work: Work) -> None:
    """As before the first run: without what the work makes; what it reads stays."""
    run = folder / "runs" / work.job
    keep = {"embeddings", "features"} if work.verb == "train" else set()
    for path in run.iterdir() if run.is_dir() else ():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def once(folder: Path, work: Work) -> tuple[dict[str, bytes], float]:
    """What an undisturbed run makes, and how long it takes."""
    clear(folder, work)
    begun = time.monotonic()
    codes = finish(start(work.words(), folder, work.ranks))
    if codes is None or any(codes):
        raise SystemExit(f"{work.name}: fails undisturbed: {(folder / 'log.txt').read_text()[-2000:]}")
    return result(folder / work.made), time.monotonic() - begun


def kill(folder: Path, work: Work, wanted: int, rng: Random) -> Kills:
    """Kill ``work`` ``wanted`` times, going on each time; every result that is reached is compared."""
    expected, seconds = once(folder, work)
    if not expected:
        raise SystemExit(f"{work.name}: made nothing that could be compared")
    clear(folder, work)
    found, attempts = Kills(seconds=seconds), 0
    while found.kills < wanted or attempts:
        last = found.kills >= wanted
        codes = finish(start(work.words(), folder, work.ranks), None if last else rng.uniform(0, 1.1) * seconds)
        if codes is None and not last:
            found.kills, attempts = found.kills + 1, attempts + 1
            continue
        attempts = 0
        found.finished += 1
        log = (folder / "log.txt").read_text()[-1500:]
        if codes is None or any(codes):
            found.faults.append(f"does not go on after a kill: exit codes {codes}: {log}")
        elif result(folder / work.made) == expected and verified(folder, work):
            found.equal += 1
        else:
            found.faults.append(f"the result is not that of an undisturbed run: {log}")
        clear(folder, work)
    return found


def verified(folder: Path, work: Work) -> bool:
    """``cache --verify`` finds nothing wrong."""
    return work.verb != "cache" or finish(start([*work.words(), "--verify"], folder, 1)) == [0]


def kills(base: Path, folder: Path, count: int, sheet: Sheet) -> dict[str, Any]:
    shutil.copytree(base, folder)
    rng, rows, figures = Random("kills"), [], {}
    for work in WORKS:
        if work.verb == "train" and work.job != "detection":
            cached = Work("", "cache", work.job, "")
            clear(folder, cached)
            finish(start(cached.words(), folder, 1))
        share = max(1, round(count * (0.5 if work.ranks > 1 else 1) / (len(WORKS) - 1)))
        found = kill(folder, work, share, rng)
        note(f"{work.name}: {found.kills} kills, {found.equal} of {found.finished} results equal")
        rows.append([work.name, str(found.kills), str(found.finished), str(found.equal), f"{found.seconds:.1f}"])
        figures[work.name] = asdict(found)
    total = sum(f["kills"] for f in figures.values())
    sheet.table(f"{total} kills; results that were reached, and those equal to an undisturbed run's bit for bit",
                ["work", "kills", "results", "equal", "s undisturbed"], rows)  # fmt: skip
    for name, figure in figures.items():
        for fault in figure["faults"]:
            sheet.say(f"  {name}: {fault}")
    return figures


def mutations(base: Path, folder: Path, first: int, count: int, jobs: int) -> list[dict[str, Any]]:
    """Every case's outcome. A process that dies of a case is replaced by one that goes on with the next."""
    folder.mkdir()

    def work(place: Path, numbers: Sequence[int]) -> int:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        torch.set_num_threads(1)
        campaign = Campaign(base, Path(tempfile.mkdtemp(dir=folder)))
        with (place / "outcomes.jsonl").open("a") as file:
            for number in numbers:
                print(json.dumps({"begins": number}), file=file, flush=True)
                print(json.dumps(asdict(campaign.case(number))), file=file, flush=True)
        return 0

    left = {job: list(range(first + job, first + count, jobs)) for job in range(jobs)}
    places = {job: folder / f"job{job}" for job in left}
    for place in places.values():
        place.mkdir()
    running: dict[int, int] = {}
    outcomes: list[dict[str, Any]] = []
    while any(left.values()):
        for job in [job for job in left if left[job] and job not in running.values()]:
            place, numbers = places[job], list(left[job])
            running[forked(lambda place=place, numbers=numbers: work(place, numbers), place / "log.txt")] = job
        process, status = os.wait()
        job = running.pop(process)
        lines = [json.loads(line) for line in (places[job] / "outcomes.jsonl").read_text().splitlines()]
        (places[job] / "outcomes.jsonl").unlink()
        ended = [line for line in lines if "begins" not in line]
        if lines and "begins" in lines[-1]:
            number = lines[-1]["begins"]
            died = f"the process dies: {os.waitstatus_to_exitcode(status)}"
            ended.append(asdict(Outcome(number, kind_of(number), "", status, died, "", 0.0)))
        outcomes += ended
        left[job] = [number for number in left[job] if number > max(line["number"] for line in ended)]
    return outcomes


def intact(base: Path, folder: Path) -> int:
    """How many commands the campaign has, once all of them succeed on undamaged material."""
    folder.mkdir()

    def work() -> int:
        failed = [outcome for outcome in Campaign(base, folder / "work").intact() if outcome.status or outcome.fault]
        for outcome in failed:
            print(outcome.command, outcome.fault, outcome.said)
        return int(bool(failed))

    if finish([forked(work, folder / "log.txt")], limit=3600.0) != [0]:
        raise SystemExit(f"fails on undamaged material: {(folder / 'log.txt').read_text()[-2000:]}")
    return sum(len(target.commands) for target in TARGETS if not target.plants)


def kind_of(number: int) -> str:
    index = number % (len(TARGETS) + 2)
    return TARGETS[index].kind if index < len(TARGETS) else LINES


def tabulate(outcomes: list[dict[str, Any]], sheet: Sheet) -> dict[str, Any]:
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        end = "fault" if outcome["fault"] else {0: "success", 1: "success", 2: "one line"}[outcome["status"]]
        by_kind[outcome["kind"]][end] += 1
    ends = ("success", "one line", "fault")
    rows = [[kind, *(str(found[end]) for end in ends)] for kind, found in by_kind.items()]
    total = sum(by_kind.values(), Counter())
    sheet.table(f"{len(outcomes)} damaged inputs; how their commands end", ["input", *ends],
                [*rows, ["all", *(str(total[end]) for end in ends)]])  # fmt: skip
    causes = Counter(place_of(outcome["fault"]) for outcome in outcomes if outcome["fault"])
    for cause, times in causes.most_common():
        sheet.say(f"  {times} x {cause}")
    slowest = max(outcomes, key=lambda outcome: outcome["seconds"])
    sheet.say(f"slowest case {slowest['seconds']:.1f} s ({slowest['kind']})")
    faults = [outcome for outcome in outcomes if outcome["fault"]]
    ended = {kind: dict(found) for kind, found in by_kind.items()}
    return {"ends": ended, "total": dict(total), "causes": dict(causes), "faults": faults}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--kills", type=int, default=108)
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first damaged input")
    parser.add_argument("--jobs", type=int, default=2, help="processes that damage and try inputs")
    given = parser.parse_args()
    sheet, begun, figures = Sheet(use_device("cpu")), time.monotonic(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as temporary, contextlib.suppress(BrokenPipeError):
        base = Path(temporary) / "material"
        base.mkdir()
        if finish([forked(lambda: material.make(base) or 0, base.parent / "log.txt")]) != [0]:
            raise SystemExit((base.parent / "log.txt").read_text()[-2000:])
        note("material made")
        if given.kills:
            figures["kills"] = kills(base, base.parent / "kills", given.kills, sheet)
        if given.mutations:
            commands = intact(base, base.parent / "intact")
            sheet.say(f"{commands} commands succeed on undamaged material")
            outcomes = mutations(base, base.parent / "damage", given.first, given.mutations, given.jobs)
            figures["mutations"] = tabulate(outcomes, sheet)
    sheet.say(f"{time.monotonic() - begun:.0f} s")
    sheet.save(given.out, figures)
    lost = any(f["faults"] or f["equal"] < f["finished"] for f in figures.get("kills", {}).values())
    return int(lost or bool(figures.get("mutations", {}).get("faults")))


if __name__ == "__main__":
    raise SystemExit(main())
