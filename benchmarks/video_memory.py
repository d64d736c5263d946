"""Ablation of the video job: the gain from a memory, and from each of its parts.

    python benchmarks/video_memory.py --jobs 2 --out benchmarks/results/video_memory.txt
    python benchmarks/video_memory.py --part parts --seeds 1 --out benchmarks/results/video_memory_parts.txt

The sandbox recipe on rendered videos. Each variant is queried for every object in some frames of held-out videos, with
the ground-truth masks of the frames before in its memory: without memory, with the teacher's maps and with its own.

main:   memory        the recipe
        described     the teacher's level 3 alone, no masks in the memory, global latents, five terms
parts:  no marks      features of past frames without masks; a query is about all objects of a name
        no select     without the term for the choice of the query
        global        64 latents that attend to all positions, instead of 49 with a window each and 15 global ones
        level 3       the coarsest level (4 x 4 cells here), aligned for one epoch first
        teacher only  trained on the teacher's maps to the end
        own only      trained on the student's own maps from the start
sizes:  T = 2, 4, 16 and 16, 256 latents

Finished trainings in --work are not repeated, and an interrupted training is resumed after its last epoch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from common import Sheet, arguments, note, run_python, setting, spread, use_device
from PIL import Image
from study import Trainings, say_figures
from torch import Tensor

import samdistill
from samdistill.checkpoints.student import load_with_memory
from samdistill.data import Geometry
from samdistill.data.videos import VideoSource, open_videos
from samdistill.evaluation.clips import evaluate_clips
from samdistill.inference.concepts import StudentDetector, load_concept_model
from samdistill.jobs.loading import load_config
from samdistill.jobs.video.config import VideoRunConfig
from samdistill.jobs.video.parts import VideoParts
from samdistill.teachers import Frame, Maps, Sam3Detector
from samdistill.types import ConceptPrompts, ImageBatch

RECIPE, BASELINE = "video/sandbox", "memory"
KINDS = ("none", "teacher", "own")
GROUPS = ("all", "lookalikes", "unique", "occluded", "reappeared")
FIVE = "[mask, box_l1, giou, iou, presence]"
ALL = "[mask, box_l1, giou, iou, presence, select]"


def phases(terms: str, epochs: int, before: str = "") -> str:
    return f"train.phases=[{before}{{name: memory, epochs: {epochs}, lr: 3e-3, warmup_steps: 30, terms: {terms}}}]"


def variants(part: str, epochs: int) -> dict[str, list[str]]:
    """Overrides of the recipe by name."""
    align = "{name: align, epochs: 1, lr: 1e-3, warmup_steps: 30, terms: [align]}, "
    plain, teacher = [phases(ALL, epochs)], "clips.own=[0.0, 0.0]"
    described = [
        phases(FIVE, epochs), "student.memory={latents: 64, layers: 2, windows: 0, level: 3, marks: false}", teacher,
        "clips.lost=0.0",
    ]  # fmt: skip
    found = {
        "main": {BASELINE: plain, "described": described},
        "parts": {
            BASELINE: plain,
            "no marks": [*plain, "student.memory.marks=false"],
            "no select": [phases(FIVE, epochs)],
            "global": [*plain, "student.memory.windows=0"],
            "level 3": [phases(ALL, epochs, align), "student.memory={level: 3, windows: 4}"],
            "teacher only": [*plain, teacher],
            "own only": [*plain, "clips.own=[1.0, 1.0]"],
        },
        "sizes": {
            BASELINE: plain,
            **{f"T = {count}": [*plain, f"clips.context={count}"] for count in (2, 4, 16)},
            "16 latents": [*plain, "student.memory={latents: 16, windows: 3}"],
            "256 latents": [*plain, "student.memory={latents: 256, windows: 8}"],
        },
    }
    return found[part]


def level_of(overrides: Sequence[str]) -> int:
    config = load_config(RECIPE, overrides)
    assert isinstance(config, VideoRunConfig)
    return config.student.memory.level


def video_study(args: argparse.Namespace) -> Trainings:
    """The chosen variants on rendered videos, which are drawn and cached first."""
    work = args.work.resolve()
    data = work / f"videos-{args.videos}-{args.val}"
    samdistill.render_sandbox(data, train=args.videos, val=args.val, size=126, format="sav", progress=False)
    base = ["data.workers=0", setting("data.root", data), f"clips.per_video={args.per_video}", *args.overrides]
    chosen = variants(args.part, args.epochs)
    if args.only is not None:
        chosen = {name: chosen[name] for name in (n.strip() for n in args.only.split(","))}
    for name, own in chosen.items():
        level = level_of([*base, *own])
        root = setting("cache.root", work / f"cache-{args.videos}-level{level}")
        own.append(root)
        config = load_config(RECIPE, [*base, *own])
        if not (config.store_root / "manifest.json").is_file():
            note(f"caching level {level} for {name}")
            samdistill.cache(config, progress=False)

    def measure(model: str, kept: Path) -> None:
        words = [__file__, "--child", model, str(data / "val"), str(kept), str(work)]
        run_python(words, work / "logs" / f"evaluated-{kept.stem}.txt", 1)

    seeds = range(args.first_seed, args.first_seed + args.seeds)
    return Trainings(RECIPE, work, chosen, list(seeds), measure, base, {}, args.jobs, last="student/tokenizer.json")


class KeptLevels:
    """``Signals`` of frames: the teacher's maps of held-out frames, kept in a file once they are known."""

    def __init__(self, source: VideoSource, level: int, size: int, kept: Path) -> None:
        self.source, self.level, self.place, self.kept = source, level, Geometry(size), kept
        self.known: dict[tuple[str, int], Tensor] = torch.load(kept) if kept.is_file() else {}
        self.before = len(self.known)

    def read(self, asked: Sequence[Frame]) -> Maps:
        """Nothing: all is done in ``answer``."""
        return ()

    def answer(self, asked: Sequence[Frame], read: Maps) -> Maps:
        for key in {key for key, frame in asked if (key, frame) not in self.known}:
            config = load_config(RECIPE)
            assert isinstance(config, VideoRunConfig)
            teacher = Sam3Detector(config.teacher)
            record = self.source.record(key)
            pixels = self.source.frames(key, record.annotated)
            for frame, picture in zip(record.annotated, pixels, strict=True):
                canvas = self.place.canvas(Image.fromarray(picture))[0]
                self.known[key, frame] = teacher.pyramid(ImageBatch.full(canvas[None]))[self.level][0]
        return (torch.stack([self.known[frame] for frame in asked]),)

    def save(self) -> None:
        if len(self.known) > self.before:
            partial = self.kept.with_suffix(".partial")
            torch.save(self.known, partial)
            partial.replace(self.kept)


def evaluate_child(model: str, data: Path, kept: Path, work: Path) -> None:
    """A run on the held-out videos, in the three ways."""
    student = load_concept_model(model)
    assert isinstance(student, StudentDetector)
    source, config = open_videos(data, "sav", "held_out", 1.0), student.model.config
    levels = KeptLevels(source, config.memory_level, student.image_size, work / f"val-level{config.memory_level}.pt")
    row: dict[str, object] = {"name": Path(model).name}
    for kind in KINDS:
        found = evaluate_clips(
            student, source, source.keys, context=config.memory_context, memory=kind,
            levels=levels if kind == "teacher" else None, batch_size=9,
        )  # fmt: skip
        row[kind] = {group: found.summary(group) for group in GROUPS}
    levels.save()
    kept.write_text(json.dumps({"models": [row]}))


def milliseconds(config: VideoRunConfig, repeats: int = 30) -> tuple[float, float]:
    """Of one frame with four objects: with a full memory, and without any; the two take turns."""
    memory = config.student.memory
    parts = VideoParts(config)
    model = load_with_memory(parts.start, memory.latents, memory.layers, memory.windows).eval()
    level, side, width = memory.level, config.clips.context, model.config.vision_config.fpn_hidden_size
    pixels = torch.randn(1, 3, parts.view.geometry.image_size, parts.view.geometry.image_size)
    asked = parts.words.inputs(ConceptPrompts.words(["object"] * 4, [0] * 4), "cpu")
    about, took = torch.zeros(4, dtype=torch.int64), {True: list[float](), False: list[float]()}
    with torch.no_grad():
        text = model.get_text_features(asked["input_ids"], asked["attention_mask"], return_dict=True)
        grid = model.get_vision_features(pixels).fpn_hidden_states[level].shape[-2:]
        past = torch.randn(1, side, width, *grid)
        marks = (torch.rand(4, side, *grid) > 0.8).float()
        for turn in range(repeats + 3):
            for told in (True, False):
                start = time.perf_counter()
                vision = model.get_vision_features(pixels)
                model.forward_video(
                    vision_embeds=vision, text_embeds=text, attention_mask=asked["attention_mask"],
                    prompt_images=about, memory_features=past if told else None,
                    memory_masks=marks if told and memory.marks else None,
                )  # fmt: skip
                if turn >= 3:
                    took[told].append(time.perf_counter() - start)
    return tuple(1000 * statistics.median(took[told]) for told in (True, False))


def say(sheet: Sheet, study: Trainings, args: argparse.Namespace) -> None:
    one, config = study.result(BASELINE, study.seeds[0])["models"][0], study.config(BASELINE, study.seeds[0])
    assert isinstance(config, VideoRunConfig)
    counts = ", ".join(f"{group} {figures['count']:.0f}" for group, figures in one["own"].items() if figures)
    steps = study.trained(BASELINE)[0]
    sheet.say()
    sheet.say(
        f"{args.videos} rendered videos, {args.per_video} clips each an epoch, {args.epochs} epochs, {steps} steps of "
        f"{config.train.batch_size} clips; seeds {', '.join(map(str, study.seeds))}; 1 thread per training, "
        f"{study.jobs} at a time"
    )
    sheet.say(f"held out: {args.val} videos, J&F of the query frame; questions: {counts}")
    for kind in KINDS:
        label = {"none": "without memory", "teacher": "the teacher's memory", "own": "the student's own memory"}[kind]
        sheet.say()
        sheet.say(label)
        say_figures(sheet, study, {group: f"{kind}.{group}.jf" for group, f in one[kind].items() if f}, ".3f")
    rows = []
    for name in study.variants:
        plain, theirs, own = (study.values(name, f"{kind}.all.jf") for kind in KINDS)
        gains, lent = ([b - a for a, b in zip(plain, other, strict=True)] for other in (own, theirs))
        kept = spread([g / t for g, t in zip(gains, lent, strict=True)], ".1%") if min(lent) > 0 else "-"
        rows.append([name, spread(gains, "+.3f"), spread(lent, "+.3f"), kept])
    sheet.table("gain over no memory", ["", "own memory", "teacher's memory", "own, share of the teacher's"], rows)
    rows = []
    for name in study.variants:
        full, plain = milliseconds(study.config(name, study.seeds[0]))  # type: ignore[arg-type]
        rows.append([name, f"{full:.1f}", f"{plain:.1f}", f"{full / plain:.2f}"])
    sheet.table(
        "one frame with four objects and a full memory, ms (1 thread, medians of 30 that take turns)",
        ["", "with memory", "without", "ratio"], rows,
    )  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        evaluate_child(sys.argv[2], *map(Path, sys.argv[3:]))
        return
    parser = arguments(__doc__, "video_memory")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all trainings")
    parser.add_argument("--part", choices=["main", "parts", "sizes"], default="main")
    parser.add_argument("--only", help="variants of the part, separated by commas")
    parser.add_argument("--videos", type=int, default=128, help="rendered videos to train on (128)")
    parser.add_argument("--val", type=int, default=48, help="held-out videos (48)")
    parser.add_argument("--per-video", type=int, default=4, help="clips of each in an epoch (4)")
    parser.add_argument("--epochs", type=int, default=4, help="that train the memory (4)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each (1)")
    args = parser.parse_args()
    sheet = Sheet(use_device(args.device))
    torch.set_num_threads(1)
    study = video_study(args)
    study.run()
    say(sheet, study, args)
    sheet.say()
    sheet.say(
        "Not measured: real videos and the published SAM 3, longer trainings, full size. The spread covers the "
        "memory's random part, order and clips; the image student, the teacher and the videos stay the same."
    )
    sheet.save(args.out, {"part": args.part, "videos": args.videos, "held_out": args.val, **study.to_dict()})


if __name__ == "__main__":
    main()
