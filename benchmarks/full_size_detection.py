"""The detection job at full size: SAM 3 with 840M random weights, the described 100.9M student, photographs at 1008 px.

    python benchmarks/full_size_detection.py --out benchmarks/results/full_size_detection.txt
    python benchmarks/full_size_detection.py --tiny --device cpu     # the same stages in two minutes, on a tiny SAM 3

Each stage runs in its own process: build the teacher and save it with a placeholder tokenizer; one step of the first
phase (all eight terms); one step of the second (six); the check, which differentiates each term of both phases alone.
The steps run the task of the job on one batch of COCO photographs with the recipe's phrases, and time its parts. Peak
memory is the largest resident set of the process (on CUDA, the memory that torch allocated). With random weights the
benchmark shows that everything fits, runs and reaches the student, and what it costs; it shows nothing about quality.
An interrupted call is resumed at the next stage.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Sheet, setting
from full_size_common import (
    PHOTOGRAPHS,
    Clock,
    Row,
    check_table,
    part_table,
    run,
    say_limits,
    stage_arguments,
    stage_table,
    stand_in_tokenizer,
    tiny_config,
)
from transformers import Sam3Config, Sam3Model

from samdistill.engine import check_terms
from samdistill.engine.groups import parameter_groups
from samdistill.engine.task import Phase
from samdistill.jobs.detection import task as detection
from samdistill.jobs.detection.config import DetectionRunConfig
from samdistill.jobs.detection.parts import DetectionParts
from samdistill.jobs.loading import load_config

RECIPE = "detection/efficient_sam3"
HELD_OUT = 8
STEPS = ("step of phase 1", "step of phase 2")
TINY_STUDENT = (
    "student.backbone=es_ev_s", "student.queries=5", "student.heads=4", "student.ffn=64", "student.encoder_layers=1",
    "student.decoder_layers=1", "student.text={hidden: 32, layers: 3, heads: 4, ffn: 64, context: 8}",
)  # fmt: skip


class Stages:
    """Stages that run in child processes. Each method is a stage and returns its results."""

    def __init__(self, args: argparse.Namespace, clock: Clock) -> None:
        self.args, self.clock, self.device = args, clock, clock.device
        self.teacher = args.work / "teacher"

    def config(self) -> DetectionRunConfig:
        settings = [
            setting("teacher.path", self.teacher), setting("data.root", self.args.images.parent), "data.kind=coco",
            "data.held_out=null", f"data.held_out_last={HELD_OUT}", "data.workers=0", "train.precision=fp32",
            f"train.batch_size={self.args.batch}", f"teacher.image_size={126 if self.args.tiny else 1008}",
            *(TINY_STUDENT if self.args.tiny else ()), *self.args.overrides,
        ]  # fmt: skip
        config = load_config(RECIPE, settings)
        assert isinstance(config, DetectionRunConfig)
        return config

    def build(self) -> dict[str, Any]:
        torch.manual_seed(0)
        host = Sam3Config(**tiny_config()) if self.args.tiny else Sam3Config()
        model, text = self.clock.around("random weights", Sam3Model)(host), host.text_config
        self.clock.around("save", model.save_pretrained)(self.teacher)
        phrases = (*load_config(RECIPE).questions.generic, "visual")
        words = [word for phrase in phrases for word in phrase.split()]
        stand_in_tokenizer(
            words, text.vocab_size, text.bos_token_id, text.eos_token_id, text.max_position_embeddings
        ).save_pretrained(self.teacher)
        size = sum(path.stat().st_size for path in self.teacher.iterdir())
        return {"teacher": sum(p.numel() for p in model.parameters()), "bytes": size}

    def step(self, number: int) -> dict[str, Any]:
        """One optimiser step of a phase, as the engine does it, on one batch."""
        config, around = self.config(), self.clock.around
        assert config.train.phases is not None
        phase, epoch = config.train.phases[number], config.train.phase_starts()[number][1]
        task = around("load the teacher", DetectionParts(config).task)()
        torch.manual_seed(config.train.seed)
        student = around("build the student", task.build_student)().to(self.device).train()
        optimiser = torch.optim.AdamW(
            parameter_groups(student, config.train.weight_decay), phase.lr, config.train.betas, config.train.eps
        )
        data, at = task.dataset(epoch), Phase.of(config.train, epoch)
        batch = around("read photographs", lambda: task.collate([data[i] for i in range(self.args.batch)], at))()
        batch = around("move to the device", lambda: task.to(batch, self.device))()
        task.teacher.answer = around("teacher, forward", task.teacher.answer)  # type: ignore[method-assign]
        student.forward = around("student, forward", student.forward)
        names = {"match": "matching", "output_terms": "six terms, forward", "feature_terms": "two features, forward"}
        for name, told in names.items():
            setattr(detection, name, around(told, getattr(detection, name)))
        terms = task.terms(student, batch, at).only(phase.terms or DetectionRunConfig.term_names())
        around("backward", terms.total.backward)()
        clip = around("clip the gradient", torch.nn.utils.clip_grad_norm_)
        norm = clip(student.parameters(), config.train.clip_norm or float("inf")).item()
        around("optimiser", optimiser.step)()
        if bad := terms.nonfinite():
            raise SystemExit(f"not finite: {', '.join(bad)}")
        return {
            "phase": phase.name, "terms": {name: term.value.item() for name, term in terms.items()},
            "gradient norm": norm, "student": sum(p.numel() for p in student.parameters()),
            "questions": len(batch.prompts), "texts": batch.prompts.texts, "images": batch.images.keys,
        }  # fmt: skip

    def check(self) -> dict[str, Any]:
        config = self.config()
        task = DetectionParts(config).task()
        found = self.clock.around("check", check_terms)(
            task, self.device, self.args.batch, config.train.seed, config.train
        )
        return {**found.to_dict(), "dead": found.dead, "problems": found.problems}


def say(args: argparse.Namespace, sheet: Sheet, rows: dict[str, Row]) -> None:
    """Stages, parts of the steps, terms."""
    steps = {stage: rows[stage]["found"] for stage in STEPS}
    size = "a tiny SAM 3 at 126 px" if args.tiny else "SAM 3's default configuration at 1008 px"
    title = (
        f"{size}: {rows['build']['found']['teacher']:,} random float32 parameters "
        f"({rows['build']['found']['bytes'] / 1e9:.2f} GB); student {steps[STEPS[0]]['student']:,}; batch {args.batch}"
    )
    stage_table(sheet, title, rows)
    for stage, step in steps.items():
        asked = f"{', '.join(step['images'])} asked for {', '.join(map(repr, step['texts']))}"
        part_table(sheet, f"{stage} ({step['phase']}): {asked}", rows[stage]["parts"])
    checked = rows["check"]["found"]
    check_table(sheet, "the check: every term alone, on one batch of each phase, by a new student", checked["terms"])
    reached = len(checked["trainable"]) - len(checked["dead"])
    sheet.say(f"{reached} of {len(checked['trainable'])} parameter tensors get a gradient from some term")
    if checked["dead"]:
        modules = sorted({".".join(name.split(".")[:2]) for name in checked["dead"]})
        sheet.say(f"without one on these batches: {len(checked['dead'])} tensors of {', '.join(modules)}")
    sheet.say("; ".join(checked["problems"]) or "every term reaches the student")
    missing = (
        "answers of any use, the published tokenizer (a stand-in with as many tokens), half precision, further steps, "
        "checkpoints, several questions per image"
    )
    say_limits(sheet, "Every part ran once, the first time in its process.", missing)


def main() -> None:
    tiny = "a tiny SAM 3 and student at 126 px"
    parser = stage_arguments(__doc__, "full_size_detection", tiny, "4 GB")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe")
    parser.add_argument("--images", type=Path, default=PHOTOGRAPHS, help="photographs, COCO's instances.json beside")
    parser.add_argument("--batch", type=int, default=1, help="photographs of a step, one question each (1)")
    args = parser.parse_args()
    args.images = args.images.resolve()
    stages = {
        "build": lambda clock: Stages(args, clock).build(),
        **{name: lambda clock, number=number: Stages(args, clock).step(number) for number, name in enumerate(STEPS)},
        "check": lambda clock: Stages(args, clock).check(),
    }
    words = [*args.overrides, "--images", str(args.images), "--batch", str(args.batch)]
    run(__file__, args, stages, words, partial(say, args))


if __name__ == "__main__":
    main()
