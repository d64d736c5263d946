"""Time and peak memory of matching and the eight loss terms at full size, compared with the models.

    python benchmarks/matching_cost.py --out benchmarks/results/matching_cost.txt
    python benchmarks/matching_cost.py --tiny --device cpu       # the same at 126 px in a minute

The described student (random weights, train mode, float32) at 1008 px, one phrase per image, and random teacher outputs
of the real sizes: 200 queries with masks of 288 px, feature maps of 288, 144 and 72 px, a token grid of 72. A step is
that of the job: student forward, cost matrix, Hungarian assignment, eight terms, their backward pass to the student's
outputs, and the backward pass through the student. Times are medians. Peak memory of each stage is measured in its own
process. --teacher FOLDER also times the forward pass of a real teacher, such as the one that
``full_size_detection.py --keep`` leaves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from common import Sheet, arguments, use_device
from full_size_common import peak_bytes
from torch import Tensor, nn

from samdistill.config import TeacherConfig
from samdistill.dist import default_device
from samdistill.jobs.detection.config import DetectionLossConfig, MatchConfig
from samdistill.jobs.detection.losses import FEATURE_TERMS, OUTPUT_TERMS, feature_terms, output_terms
from samdistill.ops.matching import MATCHERS, MatchCost, match, match_cost
from samdistill.students import EfficientSam3Model, efficient_sam3_config
from samdistill.types import ConceptPrompts, DetectorOutput, ImageBatch, Term, Terms

GOAL = 0.10
T = TypeVar("T")


@dataclass(frozen=True)
class Sizes:
    """Of both models. side: pixels of the input; mask, levels, grid: sides of the teacher's maps."""

    side: int = 1008
    hidden: int = 256
    ours: int = 100
    theirs: int = 200

    @property
    def grid(self) -> int:
        return self.side // 14

    @property
    def levels(self) -> tuple[int, int, int]:
        return 4 * self.grid, 2 * self.grid, self.grid


FULL, TINY = Sizes(), Sizes(126, 32, 5, 10)


def random_answer(sizes: Sizes, queries: int, images: int) -> DetectorOutput:
    """One question about each image; masks and boxes as spread as a model's, features of unit variance."""
    levels = sizes.levels
    middle, half = torch.rand(images, queries, 2), torch.rand(images, queries, 2) / 4
    return DetectorOutput(
        4 * torch.randn(images, queries, levels[0], levels[0]), torch.cat([middle - half, middle + half], -1),
        torch.randn(images, queries), torch.randn(images, 1), torch.randn(images, 1, levels[0], levels[0]),
        tuple(torch.randn(images, sizes.hidden, side, side) for side in levels),
        torch.randn(images, sizes.hidden, levels[-1], levels[-1]),
    )  # fmt: skip


def leaves(output: DetectorOutput) -> DetectorOutput:
    """The same values, cut from their graph and ready to receive gradients."""

    def cut(value: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        return tuple(map(cut, value)) if isinstance(value, tuple) else value.detach().requires_grad_()

    return DetectorOutput(*(cut(getattr(output, field.name)) for field in fields(output)))


def flat(output: DetectorOutput) -> list[Tensor]:
    values = (getattr(output, field.name) for field in fields(output))
    return [tensor for value in values for tensor in (value if isinstance(value, tuple) else (value,))]


class Clock:
    """Seconds by name, each waited for on an accelerator."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, list[float]]()

    def time(self, name: str, work: Callable[[], T]) -> T:
        self._wait()
        start = time.perf_counter()
        found = work()
        self._wait()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def every_term(student: DetectorOutput, teacher: DetectorOutput, matches: Any) -> dict[str, Tensor]:
    return output_terms(student, teacher, matches) | feature_terms(student, teacher)


def total(values: dict[str, Tensor]) -> Tensor:
    weights = DetectionLossConfig()
    return Terms(
        {name: Term(values[name], getattr(weights, name)) for name in (*OUTPUT_TERMS.weights, *FEATURE_TERMS.weights)}
    ).total


class Stages:
    """Stages that run in child processes. Each method records the seconds of its parts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.sizes, self.device = args, TINY if args.tiny else FULL, default_device()
        self.clock, pairs = Clock(self.device), MatchConfig()
        self.cost = MatchCost(pairs.mask, pairs.box, pairs.logit, pairs.resolution, pairs.floor)
        torch.manual_seed(args.seed)

    def answer(self, queries: int) -> DetectorOutput:
        with self.device:
            return random_answer(self.sizes, queries, self.args.batch)

    def losses(self) -> None:
        """Matching and losses alone, both assignments, masks and levels of the teacher's size on both sides."""
        theirs, ours = self.answer(self.sizes.theirs), self.answer(self.sizes.ours)
        allowed = torch.zeros_like(theirs.scores, dtype=torch.bool)
        allowed.scatter_(1, theirs.scores.topk(self.sizes.ours, dim=1).indices, True)
        for _ in range(self.args.loss_repeats + 1):
            cut = leaves(ours)
            with torch.no_grad():
                cost = self.clock.time("cost matrix", lambda cut=cut: match_cost(cut, theirs, self.cost))
            for name in ("greedy", "hungarian"):
                solve = MATCHERS.get(name)
                matches = self.clock.time(f"assignment, {name}", lambda s=solve, c=cost: s(c, allowed))
            outputs = self.clock.time("six terms, forward", lambda c=cut, m=matches: output_terms(c, theirs, m))
            features = self.clock.time("fpn and encoder, forward", lambda c=cut: feature_terms(c, theirs))
            self.clock.time("eight terms, backward", lambda v=outputs | features: total(v).backward())

    def step(self) -> None:
        """The student's whole step, in parts."""
        theirs, student = self.answer(self.sizes.theirs), self.student()
        pixels = torch.randn(self.args.batch, 3, self.sizes.side, self.sizes.side, device=self.device)
        vocabulary = student.config.text_config.vocab_size
        tokens = torch.randint(3, vocabulary - 3, (self.args.batch, 32), device=self.device)
        asked = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        for _ in range(self.args.repeats + 1):
            time_, student_ = self.clock.time, student
            found = time_("student, forward", lambda s=student_: s(pixel_values=pixels, **asked).answer())
            cut = leaves(found)
            matches = time_("matching", lambda c=cut: match(c, theirs, self.cost))
            value = time_("eight terms, forward", lambda c=cut, m=matches: total(every_term(c, theirs, m)))
            time_("eight terms, backward", value.backward)
            del matches, value
            grads = [x.grad if x.grad is not None else torch.zeros_like(x) for x in flat(cut)]
            time_("student, backward", lambda f=found, g=grads: torch.autograd.backward(flat(f), g))
            del found, cut, grads
            student.zero_grad(set_to_none=True)

    def student(self) -> nn.Module:
        sizes = self.sizes
        small = {"hidden_size": 32, "projection_dim": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                 "intermediate_size": 64, "vocab_size": 1000}  # fmt: skip
        config = (
            efficient_sam3_config("es_ev_s", sizes.side, sizes.hidden, 4, 64, 1, 1, sizes.ours, small)
            if self.args.tiny
            else efficient_sam3_config(image_size=sizes.side, queries=sizes.ours)
        )
        student = EfficientSam3Model(config)
        student.vision_encoder.to(memory_format=torch.channels_last)
        return student.to(self.device).train()

    def teacher(self) -> None:
        """The forward of a real one for one question per image."""
        from samdistill.teachers import Sam3Detector

        teacher = Sam3Detector(TeacherConfig(path=str(self.args.teacher)), self.device)
        side = teacher.info.image_size
        images = ImageBatch.full(torch.randint(0, 256, (self.args.batch, 3, side, side), dtype=torch.uint8))
        prompts = ConceptPrompts.words(["object"] * self.args.batch, range(self.args.batch))
        for _ in range(self.args.repeats + 1):
            self.clock.time("teacher, forward", lambda: teacher.answer(images, prompts))

    def result(self) -> dict[str, Any]:
        """The first round of each part is a warm-up."""
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else peak_bytes()
        return {"seconds": {n: took[1:] or took for n, took in self.clock.seconds.items()}, "peak_bytes": peak}


def run_stage(args: argparse.Namespace, stage: str) -> dict[str, Any]:
    """In a process of its own, unless an earlier call with the same settings finished it."""
    kept = args.work / f"{stage}.json"
    words = [f"--{name}={getattr(args, name)}" for name in ("batch", "repeats", "loss_repeats", "seed")]
    words = [word.replace("_", "-", 1) if word.startswith("--loss") else word for word in words]
    words += ["--tiny"] if args.tiny else []
    words += [f"--teacher={args.teacher}"] if stage == "teacher" else []
    if kept.is_file() and (found := json.loads(kept.read_text()))["settings"] == words:
        return found
    print(f"[{time.strftime('%H:%M:%S')}] {stage}", file=sys.stderr, flush=True)
    partial = kept.with_suffix(".partial")
    command = [sys.executable, __file__, *words, "--device", args.device, "--stage", stage, "--result", str(partial)]
    if code := subprocess.run(command, stdout=sys.stderr).returncode:
        raise SystemExit(f"stage {stage} ended with {code}; the same call goes on")
    found = {"settings": words, **json.loads(partial.read_text())}
    kept.write_text(json.dumps(found))
    partial.unlink()
    return found


def say(sheet: Sheet, args: argparse.Namespace, found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Parts, then shares of the step; the shares are returned."""
    titles = {
        "losses": "matching and losses alone, random outputs on both sides, masks of both at the teacher's size",
        "step": "the student's step, its own random weights' outputs against the random teacher",
        "teacher": f"the teacher {args.teacher}",
    }
    medians: dict[str, dict[str, float]] = {}
    for stage, result in found.items():
        medians[stage] = {n: statistics.median(took) / args.batch for n, took in result["seconds"].items()}
        rows = [
            [name, f"{1e3 * medians[stage][name]:.1f}", f"{1e3 * min(took) / args.batch:.1f}",
             f"{1e3 * max(took) / args.batch:.1f}", str(len(took))] for name, took in result["seconds"].items()
        ]  # fmt: skip
        sheet.table(titles[stage], ["milliseconds per image", "median", "min", "max", "runs"], rows)
        sheet.say(f"  peak memory of its process: {result['peak_bytes'] / 2**30:.2f} GiB")
    step = medians["step"]
    ours = sum(seconds for name, seconds in step.items() if not name.startswith("student"))
    shares = {"of the student's step": ours / sum(step.values())}
    if "teacher" in medians:
        whole = sum(step.values()) + medians["teacher"]["teacher, forward"]
        shares["of the step with the teacher's forward"] = ours / whole
    rows = [[name, f"{share:.2%}", "met" if share <= GOAL else "MISSED"] for name, share in shares.items()]
    sheet.table(
        f"matching, eight terms and their backward: {1e3 * ours:.1f} ms per image", ["share", "", f"goal {GOAL:.0%}"],
        rows,
    )  # fmt: skip
    return shares


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "matching_cost")
    parser.add_argument("--batch", type=int, default=1, help="images of a step (1)")
    parser.add_argument("--repeats", type=int, default=3, help="of the models, after one to warm up (3)")
    parser.add_argument("--loss-repeats", type=int, default=10, help="of the losses alone, after one to warm up (10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher", type=Path, help="time the forward of the detector in this folder too")
    parser.add_argument("--tiny", action="store_true", help="126 px, 5 and 10 queries, to try this script")
    parser.add_argument("--stage", choices=["losses", "step", "teacher"], help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    device = use_device(args.device)
    if args.stage is not None:
        stages = Stages(args)
        getattr(stages, args.stage)()
        args.result.write_text(json.dumps(stages.result()))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    sheet, sizes = Sheet(device), TINY if args.tiny else FULL
    sheet.say(
        f"{sizes.side} px, {sizes.ours} x {sizes.theirs} queries, teacher's masks {sizes.levels[0]} px, "
        f"{args.batch} image(s) a step, one question each, float32, seed {args.seed}"
    )
    wanted = ["losses", "step", *(["teacher"] if args.teacher is not None else [])]
    found = {stage: run_stage(args, stage) for stage in wanted}
    shares = say(sheet, args, found)
    sheet.say()
    teacher = "" if args.teacher is not None else "a teacher's forward (--teacher), "
    sheet.say(
        f"Not measured: {teacher}the optimiser, reading images, half precision, several questions per image, exemplar "
        "boxes, and a trained pair of models, whose costs the assignment may sort in another time than random ones."
    )
    sheet.save(args.out, {"stages": found, "shares": shares, "goal": GOAL, "tiny": args.tiny, "batch": args.batch})


if __name__ == "__main__":
    main()
