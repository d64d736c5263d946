"""Steps of the text job, of the hosted detector and of joint fine-tuning at full size, with random weights.

    OMP_NUM_THREADS=1 python benchmarks/full_size_hosted.py --out benchmarks/results/full_size_hosted.txt
    python benchmarks/full_size_hosted.py --tiny --device cpu     # the same steps in a minute, on a tiny SAM 3

A SAM 3 of 840M random float32 parameters is saved with a placeholder tokenizer. Then one optimiser step each, one after
the other in this process, on one batch:

- the text job: S0 and S1 with a context of 16 and 32 tokens, 64 phrases, SAM 3's text encoder as the running teacher;
- the hosted detector of ``detection/hosted_es_rv_l``, a photograph at 1008 px: the phase of the trunk alone, then one
  of all terms (the eight and that of the trunk) with SAM 3's own text encoder;
- joint fine-tuning, ``detection/hosted_joint``: the same trunk and a text encoder of the size S0, inside frozen heads.

Each step runs the task of the job and times its parts. Peak memory is the largest resident set in the step, with all
models and memory-mapped weights. Teacher and student share no tensors, as in the job. With random weights this shows
that every step fits and runs, and what it costs; it shows nothing about quality.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Sheet, arguments, setting, use_device
from full_size_common import PHOTOGRAPHS, Clock, reset_peak, stand_in_tokenizer, tiny_config
from torch import nn
from transformers import Sam3Config, Sam3Model

import samdistill
from samdistill.config import Run
from samdistill.engine.groups import Freezing, parameter_groups
from samdistill.engine.task import Phase, Task
from samdistill.jobs.detection.parts import DetectionParts
from samdistill.jobs.loading import load_config
from samdistill.jobs.text.parts import TextParts
from samdistill.jobs.text.task import build_student
from samdistill.sandbox.concepts import PHRASES

TEXTS = 64
CONTEXTS = (16, 32)
HELD_OUT = 8
DATA, TEACHER, STUDENT, TERMS, BACKWARD, OPTIMISER = PARTS = (
    "data", "teacher", "student, forward", "terms and matching", "backward", "clip and optimiser"
)  # fmt: skip
PHASES = "train.phases=[{name: trunk, epochs: 1, lr: 1e-3, terms: [trunk]}, {name: all, epochs: 1, lr: 1e-4}]"
TINY_TEXT = "{hidden: 32, layers: 3, heads: 4, ffn: 64}"
Step = dict[str, Any]
"""``parts`` (seconds by name), ``seconds``, ``peak_bytes``, ``parameters``, ``trained``, ``terms`` and ``batch``."""


def build_teacher(args: argparse.Namespace) -> Path:
    """Save a SAM 3 with random weights and a tokenizer, unless an earlier call did."""
    folder = args.work / "teacher"
    if not (folder / "tokenizer.json").is_file():  # written last
        torch.manual_seed(0)
        model = Sam3Model(Sam3Config(**tiny_config()) if args.tiny else Sam3Config())
        model.save_pretrained(folder)
        text = model.config.text_config
        phrases = (*load_config("detection/efficient_sam3").questions.generic, *PHRASES, "visual")
        stand_in_tokenizer(
            [word for phrase in phrases for word in phrase.split()], text.vocab_size, text.bos_token_id,
            text.eos_token_id, text.max_position_embeddings,
        ).save_pretrained(folder)  # fmt: skip
    return folder


def build_host(args: argparse.Namespace, teacher: Path) -> Path:
    """Merge a text encoder of the size S0 into the teacher, as `samdistill merge` does after a text run."""
    run, out = args.work / "text", args.work / "host"
    if not out.is_dir():
        parts = TextParts(text_config(args, teacher, "s0", max(CONTEXTS)))
        torch.manual_seed(1)
        build_student(parts.config.student, parts.teacher_info).save_pretrained(run / "student")
        parts.words.save(run / "student")
        samdistill.merge(run, teacher, out)
    return out


def text_config(args: argparse.Namespace, teacher: Path, size: str, context: int) -> Any:
    return load_config(f"text/{size}", [
        setting("teacher.path", teacher), setting("output", args.work / "run"), "data.phrases=[sandbox]",
        "data.held_out_fraction=0", "data.workers=0", "cache.mode=online", f"student.context={context}",
        "train.precision=fp32", f"train.batch_size={TEXTS}", *([f"student.size={TINY_TEXT}"] if args.tiny else []),
    ])  # fmt: skip


def detection_config(args: argparse.Namespace, teacher: Path, recipe: str, *further: str) -> Any:
    tiny = ("student.backbone=es_ev_s", "student.head=strided") if args.tiny else ()
    return load_config(f"detection/{recipe}", [
        setting("teacher.path", teacher), setting("output", args.work / "run"), "data.kind=coco",
        setting("data.root", args.images.parent), "data.held_out=null", f"data.held_out_last={HELD_OUT}",
        "data.workers=0", "train.precision=fp32", "train.batch_size=1", "questions.boxes=0.0",
        f"teacher.image_size={126 if args.tiny else 1008}", *tiny, *further,
    ])  # fmt: skip


def one_step(clock: Clock, task: Task[Any], student: nn.Module, config: Run, phase: Phase, images: int) -> Step:
    """One optimiser step, as the engine does it, on the first items of the phase's epoch."""
    clock.parts.clear()
    gc.collect()  # the models of the last step
    reset_peak()
    around, train = clock.around, config.train
    freezing = Freezing(student, train.freeze, train.total_epochs, train.batch_norm == "frozen")
    optimiser = torch.optim.AdamW(
        parameter_groups(student, train.weight_decay, train.rates), 1e-4, train.betas, train.eps
    )
    freezing.start(phase.epoch)
    data = task.dataset(phase.epoch)
    batch = around(DATA, lambda: task.collate([data[index] for index in range(images)], phase))()
    batch = around("move", lambda: task.to(batch, clock.device))()  # the text job asks its teacher here
    forward = student.forward
    student.forward = around(STUDENT, forward)  # type: ignore[method-assign]
    terms = around("all terms", lambda: task.terms(student, batch, phase).only(phase.wanted(config.loss.named)))()
    student.forward = forward  # type: ignore[method-assign]
    around(BACKWARD, terms.total.backward)()

    def update() -> None:
        nn.utils.clip_grad_norm_(student.parameters(), train.clip_norm or float("inf"))
        optimiser.step()

    around(OPTIMISER, update)()
    if bad := terms.nonfinite():
        raise SystemExit(f"not finite: {', '.join(bad)}")
    optimiser.zero_grad()
    return step_of(clock, student, {name: term.value.item() for name, term in terms.items()})


def step_of(clock: Clock, student: nn.Module, terms: dict[str, float]) -> Step:
    """The parts of a step. What is left of its terms after the two models is that of losses and matching."""
    took = {name: part["seconds"] for name, part in clock.parts.items()}
    models = took[TEACHER] + took[STUDENT]
    took[TERMS] = took["all terms"] + took["move"] - models
    parts = {name: took[name] for name in PARTS}
    return {
        "parts": parts, "seconds": sum(parts.values()),
        "peak_bytes": clock.peak(), "terms": terms, "parameters": sum(p.numel() for p in student.parameters()),
        "trained": sum(p.numel() for p in student.parameters() if p.requires_grad),
    }  # fmt: skip


def text_step(args: argparse.Namespace, clock: Clock, teacher: Path, size: str, context: int) -> Step:
    config = text_config(args, teacher, size, context)
    task = TextParts(config).task()
    task.signals.ask = clock.around(TEACHER, task.signals.ask)  # type: ignore[union-attr]
    torch.manual_seed(0)
    student = task.build_student().to(clock.device).train()
    return one_step(clock, task, student, config, Phase.of(config.train, 0), TEXTS)


def detector_steps(clock: Clock, config: Any, say: Callable[[str, Step], None], names: dict[str, int]) -> None:
    """Steps of one student in the epochs ``names``, which is the first one of a phase each."""
    task = DetectionParts(config).task()
    teacher = task.teacher
    for method in ("answer", "text"):
        setattr(teacher, method, clock.around(TEACHER, getattr(teacher, method)))
    task.maps.ask = clock.around(TEACHER, task.maps.ask)  # type: ignore[attr-defined]
    torch.manual_seed(0)
    student = task.build_student().to(clock.device).train()
    for name, epoch in names.items():
        say(name, one_step(clock, task, student, config, Phase.of(config.train, epoch), 1))


def measure(args: argparse.Namespace, sheet: Sheet, clock: Clock) -> dict[str, Step]:
    """All steps, each printed when it is done."""
    found: dict[str, Step] = {}

    def say(name: str, step: Step) -> None:
        found[name] = step
        rows = [[part, f"{seconds:.2f}"] for part, seconds in step["parts"].items()]
        title = (
            f"{name}: {step['seconds']:.1f} s, peak {step['peak_bytes'] / 2**30:.2f} GiB; student "
            f"{step['parameters'] / 1e6:.2f}M, {step['trained'] / 1e6:.2f}M train; load {os.getloadavg()[0]:.1f}"
        )
        sheet.table(title, ["", "seconds"], rows)

    start = time.perf_counter()
    teacher = build_teacher(args)
    for size in ("s0", "s1"):
        for context in CONTEXTS:
            name = f"text job, {size.upper()}, {TEXTS} phrases of {context} tokens"
            say(name, text_step(args, clock, teacher, size, context))
    hosted = detection_config(args, teacher, "hosted_es_rv_l", "loss.trunk=1", PHASES)
    detector_steps(clock, hosted, say, {"hosted detector, phase of the trunk": 0, "hosted detector, all terms": 1})
    host = build_host(args, teacher)
    joint = detection_config(
        args, teacher, "hosted_joint", setting("student.host", host), "student.trunk=null", "questions.source=generic",
        "questions.file=null", "questions.negatives=0.0",
    )  # fmt: skip
    detector_steps(clock, joint, say, {"joint fine-tuning": 0})
    sheet.say(f"{time.perf_counter() - start:.0f} s in all, with the loading of models")
    return found


def main() -> None:
    parser = arguments(__doc__, "full_size_hosted")
    parser.add_argument("--tiny", action="store_true", help="a tiny SAM 3 at 126 px, to try this script")
    parser.add_argument("--keep", action="store_true", help="keep --work (about 6 GB at full size)")
    parser.add_argument("--images", type=Path, default=PHOTOGRAPHS, help="photographs, COCO's instances.json beside")
    args = parser.parse_args()
    args.images, args.work = args.images.resolve(), args.work.resolve()
    clock = Clock(torch.device(use_device(args.device)))
    sheet = Sheet(str(clock.device))
    found = measure(args, sheet, clock)
    sheet.say()
    sheet.say(
        f"{torch.get_num_threads()} thread(s). Every step ran once, the first time with its model. The phase of the "
        "trunk can read the teacher's maps from a cache (cache.mode=stored), and then needs the student alone."
    )
    sheet.say(
        "Not measured: the published weights (they cannot be had here), answers of any use, half precision, several "
        "images or questions in a step, questions with boxes."
    )
    sheet.save(args.out, {"tiny": args.tiny, "phrases": TEXTS, "steps": found})
    if not args.keep:
        shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
