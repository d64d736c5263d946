"""A small trunk that tracks: inside SAM 3's own tracker, beside the 64-token memory of the video job.

    python benchmarks/video_tracker.py --out benchmarks/results/video_tracker.txt

Both are trained on the sandbox with the same trunk, ES-EV-S at 126 px, and follow the same rendered videos from the
true mask of every object's first annotated frame. ``64 tokens`` is a short run of video/sandbox on the bundled student.
``own tracker`` is the trunk of a short run of encoder/sandbox, merged into a ``Sam3TrackerVideoModel``.

The package has no SAM 3 with trained memory weights, and trains none: prompt encoder and mask decoder of the tracker
are those of the bundled image tracker, its memory modules have random weights. Its J&F therefore says nothing about SAM
3's memory. Time and memory do not depend on the weights. ``own decoder, boxes`` is what its trained parts reach without
the memory: every frame is prompted with the box of the object's last mask.

Times, peak memory and bytes are measured in one process per model, on four objects of one video.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Sheet, arguments, open_work, run_stage, setting, train_once, use_device
from safetensors.torch import load_file
from transformers import Sam3TrackerModel, Sam3TrackerVideoConfig, Sam3TrackerVideoModel

import samdistill
from samdistill.checkpoints.files import locate
from samdistill.checkpoints.promptable import load_promptable
from samdistill.checkpoints.trackers import load_tracker
from samdistill.data.sav import SavSource
from samdistill.evaluation import videos as evaluation
from samdistill.evaluation.evaluate_videos import evaluate_videos
from samdistill.inference.points import segment_image
from samdistill.inference.session import Session
from samdistill.inference.tracker import TrackerSession
from samdistill.inference.video import VideoSession
from samdistill.metrics.video_frames import SAV
from samdistill.ops.sights import Sight, Tracked

OBJECTS, TIMED = 4, 24
TRACKER, BOXES, TOKENS = "own tracker", "own decoder, boxes", "64 tokens"
MEASURES = {"jf": "J&F", "j": "J", "f": "F", "reappeared": "J&F reappeared", "occluded": "J&F occluded"}


def build_host(folder: Path) -> None:
    """The bundled tracker as one for videos. Its memory modules are as transformers initialises them."""
    bundled = Sam3TrackerModel.from_pretrained(locate("sandbox", packaged="tracker"), dtype=torch.float32)
    config, width = bundled.config, bundled.config.mask_decoder_config.hidden_size
    heads = {part: getattr(config, part).to_dict() for part in ("prompt_encoder_config", "mask_decoder_config")}
    for settings in heads.values():
        del settings["model_type"]
    side = config.prompt_encoder_config.image_size
    grid = side // config.prompt_encoder_config.patch_size
    torch.manual_seed(0)
    model = Sam3TrackerVideoModel(Sam3TrackerVideoConfig(
        # the video model drops the last level of its neck, which that for images does not have
        vision_config=config.vision_config.to_dict() | {"scale_factors": [4.0, 2.0, 1.0, 0.5]}, **heads,
        image_size=side,
        memory_attention_rope_feat_sizes=[grid, grid], memory_attention_hidden_size=width,
        memory_attention_feed_forward_hidden_size=4 * width, memory_encoder_hidden_size=width,
        mask_downsampler_embed_dim=width, memory_fuser_embed_dim=width, memory_fuser_intermediate_dim=4 * width,
        multimask_output_in_sam=False,  # the bundled decoder has trained the token of a single mask alone
    ))  # fmt: skip
    found = model.load_state_dict(bundled.state_dict(), strict=False)
    assert not found.unexpected_keys
    model.mask_decoder.pred_obj_score_head.proj_out.bias.data.fill_(10.0)  # it is untrained too: always present
    model.save_pretrained(folder)


class BoxSession(Session):
    """Every frame is prompted with the box of the object's last mask: a tracker without memory."""

    def __init__(self, model: Any, geometry: str) -> None:
        from samdistill.inference.geometry import canvas_of

        super().__init__(canvas_of(model, geometry), None, 0.5)
        self.context, self._model, self._last = 0, model, dict[int, Sight]()

    def add_text(self, phrase: str) -> None:
        raise NotImplementedError

    def _taken(self) -> set[int]:
        return set(self._last)

    def push(self, frame: np.ndarray) -> tuple[Tracked, ...]:
        from PIL import Image

        shown = self._next(frame)
        if self._last:
            boxes = [tuple(map(float, sight.box)) for sight in self._last.values()]
            found = segment_image(self._model, Image.fromarray(frame), boxes=boxes)
            for object_id, mask in zip(list(self._last), found.masks.numpy(), strict=True):
                self._last[object_id] = Sight.of(1.0, mask) or self._last[object_id]
        for one in shown:
            assert one.mask is not None
            sight = Sight.of(1.0, one.mask)
            assert sight is not None
            self._last[one.object_id] = sight
        self._number += 1
        return tuple(Tracked(i, None, 1.0, True, s.mask, tuple(map(float, s.box))) for i, s in self._last.items())


def train_trunk(args: argparse.Namespace) -> dict[str, Any]:
    """The trunk, distilled from the bundled tracker and merged into the tracker for videos."""
    work = args.work
    scenes = work / "scenes"
    samdistill.render_sandbox(scenes, train=args.scenes, val=32, progress=False)
    build_host(work / "host")
    settings = ["data.workers=0", f"train.epochs={args.epochs}", setting("output", work / "encoder"),
                setting("data.root", scenes), setting("cache.root", work / "embeddings")]  # fmt: skip
    samdistill.cache(samdistill.load_config("encoder/sandbox", settings), progress=False)
    train_once("encoder/sandbox", settings, work / "encoder.txt", 1)
    samdistill.merge(work / "encoder", work / "host", work / "merged")
    image = load_file(locate("sandbox", packaged="tracker") / "model.safetensors")
    kept = load_file(work / "merged" / "model.safetensors")
    samdistill.merge(work / "encoder", "sandbox", work / "image")
    shared = [name for name in image if name in kept and not any(p in name for p in (".backbone.", "obj_score_head"))]
    assert shared and all(torch.equal(kept[name], image[name].float()) for name in shared)
    return {"scenes": args.scenes, "epochs": args.epochs}


def train_memory(args: argparse.Namespace) -> dict[str, Any]:
    """The 64-token memory of the bundled student."""
    videos = args.work / "videos"
    settings = ["data.workers=0", f"clips.per_video={args.per_video}", setting("data.root", videos),
                setting("output", args.work / "video"), setting("cache.root", args.work / "maps")]  # fmt: skip
    samdistill.cache(samdistill.load_config("video/sandbox", settings), progress=False)
    train_once("video/sandbox", settings, args.work / "video.txt", 1, "student/tokenizer.json")
    return {"videos": args.videos, "clips per video": args.per_video}


def memory_of(session: Any) -> int:
    """Bytes that a session keeps for later frames, of all objects."""
    if isinstance(session, TrackerSession):
        return session.memory_bytes
    if isinstance(session, BoxSession):
        return 0
    frames = session._ring._frames
    tensors = [tensor for frame in frames for tensor in (frame.features, *frame.marks.values())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(args: argparse.Namespace, start: Callable[[], Session], model: Any, evaluated: Any) -> dict[str, Any]:
    """J&F on all held-out videos; time, peak memory and bytes of a memory with ``OBJECTS`` objects of one video."""
    videos = SavSource(args.work / "videos" / "val")
    key = max(videos.keys, key=lambda name: int(videos.record(name).visible[0].sum()))
    masks, record = videos.masks(key, 0), videos.record(key)
    shown = [mask for mask in masks if mask.any()][:OBJECTS]
    frames = videos.frames(key, range(min(TIMED, record.frames)))
    before, session, took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, start(), list[float]()
    for mask in shown:
        session.add_mask(mask)
    for frame in frames:
        begun = time.process_time()  # of the processor, as other programs may run
        session.push(frame)
        took.append(time.process_time() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "objects": len(shown), "ms": 1e3 * statistics.median(took[len(took) // 2 :]),
        "bytes": memory_of(session), "peak MiB": peak / 1024, "peak MiB added": (peak - before) / 1024,
        "parameters": sum(p.numel() for p in model.parameters()), "evaluation": evaluated().to_dict()["models"],
    }  # fmt: skip


def measure_tracker(args: argparse.Namespace) -> dict[str, Any]:
    model = load_tracker(args.work / "merged")
    return measure(args, lambda: TrackerSession(model), model, lambda: evaluate_videos(
        args.work / "merged", args.work / "videos", progress=False))  # fmt: skip


def measure_boxes(args: argparse.Namespace) -> dict[str, Any]:
    model = load_promptable(args.work / "image")

    @evaluation.entrant.register(Sam3TrackerModel)
    def _(own: Any, contexts: Any, geometry: str) -> evaluation.Entrant:
        rows = {evaluation.STUDENT: lambda _: BoxSession(own, geometry)}
        return evaluation.Entrant(own, 126, None, 1, 0, rows)

    source = SavSource(args.work / "videos" / "val")
    return measure(args, lambda: BoxSession(model, "square"), model, lambda: evaluation.evaluate_videos_with(
        model, source, source.keys, convention=SAV))  # fmt: skip


def measure_tokens(args: argparse.Namespace) -> dict[str, Any]:
    found = samdistill.load(args.work / "video", device="cpu").network
    return measure(args, lambda: VideoSession(found), found.model, lambda: evaluate_videos(
        args.work / "video", args.work / "videos", progress=False))  # fmt: skip


STAGES = {"trunk": train_trunk, "memory": train_memory, TRACKER: measure_tracker, BOXES: measure_boxes,
          TOKENS: measure_tokens}  # fmt: skip


def say(sheet: Sheet, args: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
    rows = {
        TRACKER: (found[TRACKER], found[TRACKER]["evaluation"][0]),
        BOXES: (found[BOXES], found[BOXES]["evaluation"][0]),
        TOKENS: (found[TOKENS], next(r for r in found[TOKENS]["evaluation"] if r["name"] == "student")),
        "64 tokens, memory off": (None, next(r for r in found[TOKENS]["evaluation"] if r["name"] == "without memory")),
    }  # fmt: skip
    one = found[TOKENS]["evaluation"][0]
    sheet.say()
    sheet.say(
        f"trunk: {args.scenes} scenes, {args.epochs} epochs, {found['trunk']['seconds']:.0f} s; memory: {args.videos} "
        f"videos, {args.per_video} clips each an epoch, {found['memory']['seconds']:.0f} s; "
        f"{one['objects']} objects in {one['frames']} counted frames of {args.val} held-out videos, SA-V's rules"
    )
    cells = [
        [name, *("-" if row[key] is None else f"{row[key]:.3f}" for key in MEASURES)] for name, (_, row) in rows.items()
    ]
    sheet.table("followed through whole videos", ["", *MEASURES.values()], cells)
    cells = [
        [name, f"{cost['parameters'] / 1e6:.2f} M", f"{cost['ms']:.1f}", f"{cost['peak MiB']:.0f}",
         f"{cost['peak MiB added']:.0f}", f"{cost['bytes'] / 1024:.0f}",
         f"{cost['bytes'] / cost['objects'] / 1024:.1f}"]
        for name, (cost, _) in rows.items() if cost is not None
    ]  # fmt: skip
    heads = ["", "parameters", "CPU ms per frame", "peak MiB", "added by tracking", "memory KiB", "KiB per object"]
    sheet.table(f"{found[TRACKER]['objects']} objects of one video, 126 px, a full memory", heads, cells)
    sheet.say()
    sheet.say(
        "The memory of the own tracker has random weights: its J&F says nothing about SAM 3's memory, and no code here "
        "trains it. Not measured: real videos, full size, the published weights."
    )


def main() -> None:
    parser = arguments(__doc__, "video_tracker")
    parser.add_argument("--scenes", type=int, default=1500, help="rendered scenes for the trunk (1500)")
    parser.add_argument("--epochs", type=int, default=6, help="of the trunk (6)")
    parser.add_argument("--videos", type=int, default=64, help="rendered videos for the memory (64)")
    parser.add_argument("--val", type=int, default=16, help="held-out videos (16)")
    parser.add_argument("--per-video", type=int, default=3, help="clips of each in an epoch (3)")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work = args.work.resolve()
    torch.set_num_threads(1)
    if args.stage is not None:
        args.result.write_text(json.dumps(STAGES[args.stage](args)))
        return
    sheet = Sheet(use_device(args.device))
    sizes = {name: getattr(args, name) for name in ("scenes", "epochs", "videos", "val", "per_video")}
    open_work(args.work, "video_tracker", sizes)
    samdistill.render_sandbox(
        args.work / "videos", train=args.videos, val=args.val, size=126, format="sav", progress=False
    )
    given = [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    found = {stage: run_stage(__file__, args.work, stage, ["--stage", stage, *given]) for stage in STAGES}
    say(sheet, args, found)
    sheet.save(args.out, {"sizes": sizes, "stages": found})


if __name__ == "__main__":
    main()
