"""The detection job at full size: SAM 3 with 840M random weights, the described 100.9M student, photographs at 1008 px.

    python benchmarks/full_size_detection.py --out benchmarks/results/full_size_detection.txt
    python benchmarks/full_size_detection.py --tiny --device cpu     # the same stages in two minutes, on a tiny SAM 3

Stages, each in a process of its own: build the teacher and save it with a stand-in tokenizer; one step of the first
phase (all eight terms); one step of the second (six); the check, which differentiates every term of both phases alone.
The steps run the job's own task on one batch of COCO photographs and the recipe's questions, with a clock around its
parts. Peak memory is the process's largest resident set (on CUDA what torch allocated). Random weights show that
everything fits, runs and reaches the student, and what it costs, and nothing about quality. A call that was cut off
goes on with the stages that are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Sheet, arguments, open_work, run_stage, setting, use_device
from full_size import PHOTOGRAPHS, peak_bytes, tiny_config
from transformers import PreTrainedTokenizerFast, Sam3Config, Sam3Model

from samdistill.dist import default_device
from samdistill.engine import check_terms
from samdistill.engine.groups import parameter_groups
from samdistill.jobs.detection import task as detection
from samdistill.jobs.detection.config import DetectionRunConfig
from samdistill.jobs.detection.parts import DetectionParts
from samdistill.jobs.loading import load_config

RECIPE = "detection/efficient_sam3"
HELD_OUT = 8
STAGES = ("build", "step of phase 1", "step of phase 2", "check")
TINY_STUDENT = (
    "student.backbone=es_ev_s", "student.queries=5", "student.heads=4", "student.ffn=64", "student.encoder_layers=1",
    "student.decoder_layers=1", "student.text={hidden: 32, layers: 3, heads: 4, ffn: 64, context: 8}",
)  # fmt: skip


def stand_in_tokenizer(words: Sequence[str], count: int, begin: int, end: int, context: int) -> PreTrainedTokenizerFast:
    """One token a word and as many idle ones as fill a vocabulary of ``count``; the published one is not at hand."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    named = {begin: "<bos>", end: "<eos>"}
    free = iter(number for number in range(count) if number not in named)
    named |= {next(free): word for word in ("<pad>", "<unk>", *dict.fromkeys(words))}
    table = {named.get(number, f"<idle{number}>"): number for number in range(count)}
    tokenizer = Tokenizer(WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", begin), ("<eos>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=context, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>",
        eos_token="<eos>",
    )  # fmt: skip


class Clock:
    """Seconds and the memory peak so far after each part, in the order the parts first ended."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.parts = device, dict[str, dict[str, float]]()

    def peak(self) -> int:
        cuda = self.device.type == "cuda"
        return torch.cuda.max_memory_allocated(self.device) if cuda else peak_bytes()

    def around(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """``work`` with a clock; several calls add up."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = work(*args, **kwargs)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            elif self.device.type == "mps":
                torch.mps.synchronize()
            before = self.parts.get(name, {"seconds": 0.0})["seconds"]
            self.parts[name] = {"seconds": before + time.perf_counter() - start, "peak_bytes": self.peak()}
            return found

        return timed


class Stages:
    """What the child processes do; each returns what is told of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, default_device()
        self.teacher, self.clock = args.work / "teacher", Clock(self.device)

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
        data = task.dataset(epoch)
        batch = around("read photographs", lambda: task.collate([data[i] for i in range(self.args.batch)]))()
        batch = around("move to the device", lambda: task.to(batch, self.device))()
        task.teacher.answer = around("teacher, forward", task.teacher.answer)  # type: ignore[method-assign]
        student.forward = around("student, forward", student.forward)
        names = {"match": "matching", "output_terms": "six terms, forward", "feature_terms": "two features, forward"}
        for name, told in names.items():
            setattr(detection, name, around(told, getattr(detection, name)))
        terms = task.terms(student, batch, epoch).only(phase.terms or DetectionRunConfig.term_names())
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


def child(args: argparse.Namespace) -> None:
    """One stage; leaves what it found beside the others."""
    stages = Stages(args)
    works: dict[str, Callable[[], dict[str, Any]]] = {
        "build": stages.build, "step of phase 1": lambda: stages.step(0), "step of phase 2": lambda: stages.step(1),
        "check": stages.check,
    }  # fmt: skip
    found = works[args.stage]()
    row = {"found": found, "parts": stages.clock.parts, "peak_bytes": stages.clock.peak()}
    args.result.write_text(json.dumps(row))


def stage_row(args: argparse.Namespace, stage: str) -> dict[str, Any]:
    words = [
        *args.overrides, "--stage", stage, "--images", str(args.images), "--batch", str(args.batch), "--device",
        args.device, *(["--tiny"] if args.tiny else []),
    ]  # fmt: skip
    return run_stage(__file__, args.work, stage, words)


def say(sheet: Sheet, args: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    """Stages, parts of the steps, terms."""
    steps = [rows[stage]["found"] for stage in STAGES[1:3]]
    size = "a tiny SAM 3 at 126 px" if args.tiny else "SAM 3's default configuration at 1008 px"
    sheet.table(
        f"{size}: {rows['build']['found']['teacher']:,} random float32 parameters "
        f"({rows['build']['found']['bytes'] / 1e9:.2f} GB); student {steps[0]['student']:,}; batch {args.batch}; every "
        "stage in a process of its own, imports included",
        ["stage", "seconds", "peak GiB"],
        [[name, f"{row['seconds']:.1f}", f"{row['peak_bytes'] / 2**30:.2f}"] for name, row in rows.items()],
    )
    for stage, step in zip(STAGES[1:3], steps, strict=True):
        parts = rows[stage]["parts"]
        sheet.table(
            f"{stage} ({step['phase']}): {', '.join(step['images'])} asked for {', '.join(map(repr, step['texts']))}",
            ["", "seconds", "peak GiB so far"],
            [[name, f"{part['seconds']:.2f}", f"{part['peak_bytes'] / 2**30:.2f}"] for name, part in parts.items()],
        )
    checked = rows["check"]["found"]
    cells = [
        [term["name"], term["phase"], f"{term['value']:.4g}", f"{term['weight']:g}", f"{term['grad_norm']:.4g}"]
        for term in checked["terms"]
    ]
    sheet.table(
        "the check: every term alone, on one batch of each phase, by a new student",
        ["term", "phase", "value", "weight", "norm of the weighted gradient"],
        cells,
    )
    reached = len(checked["trainable"]) - len(checked["dead"])
    sheet.say(f"{reached} of {len(checked['trainable'])} parameter tensors get a gradient from some term")
    if checked["dead"]:
        modules = sorted({".".join(name.split(".")[:2]) for name in checked["dead"]})
        sheet.say(f"without one on these batches: {len(checked['dead'])} tensors of {', '.join(modules)}")
    sheet.say("; ".join(checked["problems"]) or "every term reaches the student")


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "full_size_detection")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe")
    parser.add_argument("--images", type=Path, default=PHOTOGRAPHS, help="photographs, COCO's instances.json beside")
    parser.add_argument("--batch", type=int, default=1, help="photographs of a step, one question each (1)")
    parser.add_argument("--tiny", action="store_true", help="a tiny SAM 3 and student at 126 px, to try this script")
    parser.add_argument("--keep", action="store_true", help="keep --work (about 4 GB at full size)")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    device = use_device(args.device)
    if args.stage is not None:
        child(args)
        return
    args.work, args.images = args.work.resolve(), args.images.resolve()
    sheet = Sheet(device)
    open_work(args.work, "full_size_detection", [args.tiny, args.batch, args.device, args.overrides])
    rows = {stage: stage_row(args, stage) for stage in STAGES}
    say(sheet, args, rows)
    sheet.say()
    threads = os.environ.get("OMP_NUM_THREADS", "one per core")
    sheet.say(f"{threads} thread(s) in the stages. Every part ran once, the first time in its process.")
    sheet.say(
        "Not measured: the published weights (they cannot be had here), answers of any use, the published tokenizer (a "
        "stand-in with as many tokens), half precision, further steps, checkpoints, several questions per image."
    )
    sheet.save(args.out, {"tiny": args.tiny, "batch": args.batch, "stages": rows})
    if not args.keep:
        shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
