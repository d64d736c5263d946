"""The encoder job at full size: SAM 3 with 840M random weights, photographs, two students, one merged ``sam3.pt`` each.

    python benchmarks/full_size.py --out benchmarks/results/full_size.txt
    python benchmarks/full_size.py --tiny --device cpu         # the same stages in a minute, on a tiny SAM 3

Each stage runs in its own process: build the teacher and save it in the original layout; cache embeddings; for each
student, train two steps, merge into the teacher, load the merged file, and predict on a photograph that was not used in
training. Seconds are those of the whole process, including imports. Peak memory is the largest resident set of the
process, including pages of memory-mapped weights. With random weights the benchmark shows that everything fits and runs
and what it costs; it shows nothing about quality. An interrupted call is resumed at the next stage.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import REPOSITORY, Sheet, setting
from full_size_common import PHOTOGRAPHS, Clock, Row, run, say_limits, stage_arguments, stage_table, tiny_config

STUDENTS = ("es_ev_s", "es_rv_m")
PROMPT_TOKENS = 6


class Stages:
    """Stages that run in child processes. Each method is a stage and returns its row of the table."""

    def __init__(self, args: argparse.Namespace, student: str) -> None:
        self.tiny, self.images, self.work = args.tiny, args.images, args.work
        self.count, self.batch, self.student = args.count, args.batch, student
        self.teacher = self.work / "teacher" / "sam3.pt"
        self.size = 126 if self.tiny else 1008

    def _host(self) -> Any:
        from transformers import Sam3Config

        return Sam3Config(**tiny_config()) if self.tiny else Sam3Config()

    def _keys(self) -> list[str]:
        """The photographs to cache, then one more to predict on."""
        from samdistill.data import FolderSource

        keys = FolderSource(self.images).keys[: self.count + 1]
        if len(keys) <= self.count:
            raise SystemExit(f"{self.images}: {len(keys)} images, {self.count + 1} are needed")
        return keys

    def _cli(self, verb: str, *overrides: str) -> None:
        """``samdistill VERB`` on the packaged recipe of the student, in this process so that its memory is seen."""
        from samdistill.cli import main

        places = {
            "teacher.path": self.teacher, "data.root": self.images, "data.ids": self.work / "ids.txt",
            "cache.root": self.work / "embeddings", "output": self.work / self.student,
        }  # fmt: skip
        settings = [
            *(setting(key, path) for key, path in places.items()), f"teacher.image_size={self.size}",
            "teacher.kind=sam3", "data.kind=folder", "data.fraction=1.0", "data.held_out=null",
            "data.held_out_fraction=0.0", "data.workers=0", "cache.codec=fp16", "cache.batch_size=1", "train.epochs=1",
            f"train.batch_size={self.batch}", "train.warmup_epochs=0", "train.precision=fp32", "train.log_every=1",
        ]  # fmt: skip
        if code := main([verb, f"encoder/{self.student}", *settings, *overrides]):
            raise SystemExit(code)

    def build(self) -> str:
        import torch
        from transformers import Sam3Model

        sys.path.insert(0, str(REPOSITORY / "tests" / "checkpoints"))
        from original_names import to_original

        (self.work / "ids.txt").write_text("\n".join(self._keys()[: self.count]) + "\n")
        torch.manual_seed(0)
        model = Sam3Model(self._host())
        state, left = to_original(model.state_dict())
        if left:
            raise SystemExit(f"{len(left)} tensors without an original name, such as {left[0]}")
        self.teacher.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": state}, self.teacher)
        if self.tiny:  # the published architecture needs no configuration
            model.config.save_pretrained(self.teacher.parent)
        count = sum(p.numel() for p in model.parameters())
        return f"{count:,} parameters, {self.teacher.stat().st_size / 1e9:.2f} GB"

    def cache(self) -> str:
        self._cli("cache")
        from samdistill.store import FeatureStore

        store = FeatureStore(self.work / "embeddings")
        if len(store) != self.count:
            raise SystemExit(f"{len(store)} records of {self.count}")
        return f"{len(store)} images, {store.bytes_per_record:,} bytes each"

    def train(self) -> str:
        self._cli("train")
        from samdistill.engine import read_lines

        last = read_lines(self.work / self.student / "metrics.jsonl")[-1]
        terms = ", ".join(f"{name} {value:.4g}" for name, value in last["terms"].items())
        return f"{last['step']} steps of {self.batch}, {last['seconds']:.1f} s in them; {terms}"

    def merge(self) -> str:
        from samdistill import merge

        totals = merge(self.work / self.student, self.teacher, self._merged()).totals
        told = (f"{name} {t['tensors']} tensors ({t['elements'] / 1e6:.1f}M)" for name, t in totals.items())
        return ", ".join(told)

    def _merged(self) -> Path:
        return self.work / f"merged-{self.student}.pt"

    def predict(self) -> str:
        """Load, prove that the trunk is the trained student to the bit, segment one photograph for a random prompt."""
        import torch
        from transformers import Sam3Model

        from samdistill.checkpoints.original import load_original
        from samdistill.data import FolderSource, Geometry
        from samdistill.dist import default_device
        from samdistill.ops.images import normalise
        from samdistill.students import StudentTrunk

        start = time.monotonic()
        model = load_original(self._merged(), Sam3Model, self._host() if self.tiny else None)
        loaded = time.monotonic() - start
        trunk = model.vision_encoder.backbone
        student = StudentTrunk.from_pretrained(self.work / self.student / "student").state_dict()
        merged = trunk.state_dict()
        if not isinstance(trunk, StudentTrunk) or merged.keys() != student.keys():
            raise SystemExit(f"the merged trunk is a {type(trunk).__name__}, not the student")
        changed = [name for name in student if not torch.equal(student[name], merged[name])]
        if changed:
            raise SystemExit(f"{len(changed)} tensors are not those that were trained, such as {changed[0]}")
        canvas, _ = Geometry(self.size).canvas(FolderSource(self.images).load(self._keys()[-1]))
        device, start = default_device(), time.monotonic()
        model, pixels = model.to(device), normalise(canvas[None]).to(device)
        words = model.config.text_config.vocab_size
        tokens = torch.randint(3, words - 3, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
        with torch.inference_mode():
            vision = model.get_vision_features(pixels)
            seen = time.monotonic() - start
            out = model(vision_embeds=vision, input_ids=tokens, attention_mask=torch.ones_like(tokens))
        shapes = {}
        for name in ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg"):
            tensor = getattr(out, name)
            if not bool(torch.isfinite(tensor).all()):
                raise SystemExit(f"{name} is not finite")
            shapes[name] = "x".join(map(str, tensor.shape))
        whole = time.monotonic() - start
        count = sum(p.numel() for p in model.parameters())
        return (
            f"{count / 1e6:.1f}M parameters; load {loaded:.1f} s, vision encoder {seen:.1f} s, heads and text "
            f"{whole - seen:.1f} s; finite, masks {shapes['pred_masks']}"
        )


def stage(args: argparse.Namespace, name: str, student: str, clock: Clock) -> str:
    """One stage, timed as a whole."""
    return clock.around(name, getattr(Stages(args, student), name))()


def say(args: argparse.Namespace, sheet: Sheet, rows: dict[str, Row]) -> None:
    size = "a tiny SAM 3 at 126 px" if args.tiny else "SAM 3's default configuration at 1008 px"
    stage_table(sheet, f"{size}, random float32 weights, {args.count} photographs", rows)
    sheet.say()
    for name, row in rows.items():
        sheet.say(f"{name:<17}{row['found']}")
    told = "The trunks of the merged models are the trained students to the bit."
    say_limits(sheet, told, "masks of any use, accelerators, bf16")


def main() -> None:
    parser = stage_arguments(__doc__, "full_size", "a tiny SAM 3 at 126 px", "7 GB")
    parser.add_argument("--images", type=Path, default=PHOTOGRAPHS, help="a folder of photographs (shared sample)")
    parser.add_argument("--count", type=int, default=4, help="photographs to cache (4)")
    parser.add_argument("--batch", type=int, default=2, help="of a training step (2); one epoch is trained")
    args = parser.parse_args()
    args.images = args.images.resolve()
    stages = {name: partial(stage, args, name, STUDENTS[0]) for name in ("build", "cache")}
    for student in STUDENTS:
        stages |= {f"{name}-{student}": partial(stage, args, name, student) for name in ("train", "merge", "predict")}
    words = ["--images", str(args.images), "--count", str(args.count), "--batch", str(args.batch)]
    run(__file__, args, stages, words, partial(say, args))


if __name__ == "__main__":
    main()
