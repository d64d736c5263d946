"""The video job at full size on real videos: SAM 3 with 840M random weights at 504 px, the 101M student, SA-V, DAVIS.

    python benchmarks/full_size_video.py --videos ../shared/data --out benchmarks/results/full_size_video.txt
    python benchmarks/full_size_video.py --videos ../shared/data --tiny --device cpu    # the same stages, tiny models

Each stage runs in its own process: build the teacher and the image student; cache level 3 of every annotated frame;
check; a few steps of alignment and of memory training; evaluate against the ground-truth masks; predict an MP4; and
cache and evaluate data in the layout of DAVIS. With random weights the benchmark shows that everything fits, runs and
reaches the student, and what it costs; it shows nothing about quality. An interrupted call is resumed at the next
stage.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import Sheet, setting
from full_size_common import (
    Clock,
    Row,
    check_table,
    run,
    say_limits,
    stage_arguments,
    stage_table,
    stand_in_tokenizer,
    tiny_config,
)
from PIL import Image
from transformers import Sam3Config, Sam3Model

import samdistill
from samdistill.data.sav import SavSource
from samdistill.dist import default_device
from samdistill.evaluation.evaluate_videos import evaluate_videos
from samdistill.inference.concepts import StudentDetector, load_concept_model
from samdistill.inference.predict_video import predict_video
from samdistill.inference.video import VideoSession
from samdistill.jobs.loading import load_config
from samdistill.jobs.video.config import VideoRunConfig
from samdistill.jobs.video.parts import VideoParts
from samdistill.students import build_detector, efficient_sam3_config
from samdistill.types import ImageBatch

RECIPE = "video/efficient_sam3"
STAGES = ("build", "parts", "cache", "check", "train", "evaluate", "predict", "davis")
KEY, DAVIS_FRAMES, PREDICTED = "sav_900010", 8, 12
PHASES = (
    "train.phases=[{name: align, epochs: 1, lr: 1e-3, terms: [align]}, "
    "{name: memory, epochs: 2, lr: 1e-3, terms: [mask, box_l1, giou, iou, presence, select]}]"
)


class Stages:
    """Stages that run in child processes. Each method is a stage and returns its results."""

    def __init__(self, args: argparse.Namespace, clock: Clock) -> None:
        self.args, self.clock = args, clock
        self.work: Path = args.work
        self.teacher, self.student, self.run = (self.work / name for name in ("teacher", "image", "run"))

    @property
    def size(self) -> int:
        return 126 if self.args.tiny else 504

    def config(self, data: str = "sav", kind: str = "sav") -> VideoRunConfig:
        own = ["student.memory={latents: 12, windows: 2}"] if self.args.tiny else []
        settings = [
            setting("teacher.path", self.teacher), f"teacher.image_size={self.size}", f"data.kind={kind}",
            setting("data.root", self.work / data), setting("output", self.run), setting("student.start", self.student),
            setting("cache.root", self.work / f"features-{data}"), "data.workers=0", "train.batch_size=1",
            "train.accumulate=1", "clips.per_video=2", "train.log_every=1", PHASES, *own, *self.args.overrides,
        ]  # fmt: skip
        config = load_config(RECIPE, settings)
        assert isinstance(config, VideoRunConfig)
        return config

    def build(self) -> dict[str, Any]:
        torch.manual_seed(0)
        host = Sam3Config(**tiny_config()) if self.args.tiny else Sam3Config()
        text = host.text_config
        model = self.clock.around("teacher, random weights", Sam3Model)(host)
        self.clock.around("save it", model.save_pretrained)(self.teacher)
        count = sum(p.numel() for p in model.parameters())
        del model
        words = stand_in_tokenizer(
            ("object", "visual"), text.vocab_size, text.bos_token_id, text.eos_token_id, text.max_position_embeddings
        )
        words.save_pretrained(self.teacher)
        sizes: dict[str, Any] = {"hidden_size": host.vision_config.fpn_hidden_size, "image_size": self.size}
        if self.args.tiny:
            sizes |= {"backbone": "es_ev_s", "heads": 4, "ffn": 64, "encoder_layers": 1, "decoder_layers": 1}
            small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
            sizes["text"] = {**small, "projection_dim": 32, "vocab_size": text.vocab_size}
        student = self.clock.around("student, random weights", build_detector)(efficient_sam3_config(**sizes))
        student.save_pretrained(self.student)
        words.save_pretrained(self.student)
        self._videos()
        return {"teacher": count, "student": sum(p.numel() for p in student.parameters())}

    def _videos(self) -> None:
        """The one real video to train on and to hold out, and the first frames of the DAVIS folder."""
        for part in ("train", "val"):
            (self.work / "sav" / part).mkdir(parents=True)
            for name in (f"{KEY}.mp4", f"{KEY}_manual.json"):
                shutil.copy(self.args.videos / "sav" / name, self.work / "sav" / part / name)
            for kind in ("JPEGImages", "Annotations"):
                source, target = (
                    self.args.videos / "davis" / kind / "chair",
                    self.work / "davis" / part / kind / "chair",
                )
                target.mkdir(parents=True)
                for path in sorted(source.iterdir())[:DAVIS_FRAMES]:
                    shutil.copy(path, target / path.name)

    def parts(self) -> dict[str, Any]:
        """Seconds per frame of decoding, of the teacher's vision encoder and of the student with its memory."""
        config = self.config()
        parts = VideoParts(config)
        source = SavSource(self.work / "sav" / "train")
        record = source.record(KEY)
        rows, device = record.annotated[:4], default_device()
        start = time.perf_counter()
        frames = source.frames(KEY, rows)
        decode = (time.perf_counter() - start) / len(rows)
        teacher, took = parts.teacher(device), list[float]()
        for frame in frames:
            canvas = parts.cached_view(Image.fromarray(frame), 0)[0]
            start = time.perf_counter()
            teacher.pyramid(ImageBatch.full(canvas[None]))
            took.append(time.perf_counter() - start)
        return {
            "frames": record.frames, "annotated": len(record.annotated), "size": record.size, "decode": decode,
            "teacher": min(took), "teacher_first": took[0],
        }  # fmt: skip

    def cache(self) -> dict[str, Any]:
        report = samdistill.cache(self.config(), verify=True, progress=False)
        return report.to_dict()

    def check(self) -> dict[str, Any]:
        found = samdistill.check(self.config())
        return {**found.to_dict(), "dead": found.dead, "problems": found.problems}

    def train(self) -> dict[str, Any]:
        found = samdistill.train(self.config())
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "total" in line and "terms" in line]
        seconds = [steps[0]["seconds"], *(b["seconds"] - a["seconds"] for a, b in pairwise(steps))]
        size = (self.run / found.checkpoint.name).stat().st_size
        return {"steps": found.steps, "seconds": seconds, "checkpoint_bytes": size, "terms": found.terms}

    def evaluate(self) -> dict[str, Any]:
        found = evaluate_videos(self.run, self.work / "sav", progress=False)
        return found.to_dict()

    def predict(self) -> dict[str, Any]:
        source = SavSource(self.work / "sav" / "train")
        mask = source.masks(KEY, 0)[0]
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        box = tuple(float(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        found = predict_video(
            source.path(KEY), str(self.run), boxes=[box], out=self.work / "out.mp4", frames=PREDICTED, progress=False,
        )  # fmt: skip
        return {
            "frames": found.frames, "seconds": found.seconds, "student": self._per_frame(source),
            "bytes": (self.work / "out.mp4").stat().st_size,
        }  # fmt: skip

    def _per_frame(self, source: SavSource) -> dict[str, float]:
        """Seconds of the student's push, one object, with a memory that is full and without one."""
        student, told = load_concept_model(self.run, device=default_device()), dict[str, float]()
        assert isinstance(student, StudentDetector)
        frames = source.frames(KEY, source.record(KEY).annotated[:12])
        for name, context in (("with memory", None), ("without memory", 0)):
            session, took = VideoSession(student, context=context, stride=1), list[float]()
            session.add_mask(source.masks(KEY, 0)[0])
            for frame in frames:
                start = time.perf_counter()
                session.push(frame)
                took.append(time.perf_counter() - start)
            told[name] = sorted(took[9:])[1]
        return told

    def davis(self) -> dict[str, Any]:
        report = samdistill.cache(self.config("davis", "davis"), progress=False)
        found = evaluate_videos(self.run, self.work / "davis", progress=False)
        return {"records": report.records, "evaluation": found.to_dict()}


def stage(args: argparse.Namespace, name: str, clock: Clock) -> Any:
    return getattr(Stages(args, clock), name)()


def say(args: argparse.Namespace, sheet: Sheet, rows: dict[str, Row]) -> None:
    found = {stage: row["found"] for stage, row in rows.items()}
    parts, cached, trained, predicted = (found[stage] for stage in ("parts", "cache", "train", "predict"))
    size = "a tiny SAM 3 at 126 px" if args.tiny else "SAM 3's default configuration at 504 px"
    height, width = parts["size"]
    title = (
        f"{size}, {found['build']['teacher']:,} random float32 parameters; image student "
        f"{found['build']['student']:,}; {KEY}: {parts['frames']} frames of {width} x {height}, {parts['annotated']} "
        "annotated"
    )
    stage_table(sheet, title, rows)
    student = predicted["student"]
    sheet.table(
        "seconds per frame", ["", "seconds"],
        [["decode (seeking, 4 annotated frames)", f"{parts['decode']:.3f}"],
         ["teacher's vision encoder (best of 4)", f"{parts['teacher']:.2f}"],
         ["student with a full memory, 1 object", f"{student['with memory']:.2f}"],
         ["student without memory", f"{student['without memory']:.2f}"]],
    )  # fmt: skip
    sheet.say(
        f"cache: {cached['records']} records of {cached['bytes_per_record']:,} bytes "
        f"({cached['bytes_per_record'] / 1e6:.3f} MB a frame), {cached['verified']} computed again, worst relative "
        f"difference {cached['worst_error']:.2g}"
    )
    check_table(sheet, "the check", found["check"]["terms"])
    sheet.say("; ".join(found["check"]["problems"]) or "every term reaches the memory")
    steps = ", ".join(f"{s:.1f}" for s in trained["seconds"])
    sheet.say(f"train: {trained['steps']} steps of one clip (two of align, four of memory), seconds: {steps}")
    sheet.say(f"a checkpoint of the memory and its optimiser: {trained['checkpoint_bytes'] / 1e6:.1f} MB")
    for name, result in (("sav", found["evaluate"]), ("davis", found["davis"]["evaluation"])):
        figures = ", ".join(f"{row['name']} {row['jf']:.3f}" for row in result["models"])
        sheet.say(f"evaluate {name}: J&F {figures} (random weights)")
    spent = ", ".join(f"{part} {s / predicted['frames']:.3f}" for part, s in predicted["seconds"].items())
    sheet.say(f"predict: {predicted['frames']} frames into {predicted['bytes']:,} bytes; seconds a frame: {spent}")
    missing = (
        "the published tokenizer, answers of any use, half precision, long trainings; of the DAVIS folder the first "
        f"{DAVIS_FRAMES} frames were taken"
    )
    say_limits(sheet, "Every part ran once.", missing)


def main() -> None:
    parser = stage_arguments(__doc__, "full_size_video", "tiny models at 126 px", "5 GB")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe")
    parser.add_argument("--videos", type=Path, required=True, help="a folder with sav/ and davis/ in it")
    args = parser.parse_args()
    args.videos = args.videos.resolve()
    stages = {name: partial(stage, args, name) for name in STAGES}
    run(__file__, args, stages, [*args.overrides, "--videos", str(args.videos)], partial(say, args))


if __name__ == "__main__":
    main()
