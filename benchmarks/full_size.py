"""The main job at full size: SAM 3 with 840M random weights, photographs, two students, one merged ``sam3.pt`` each.

    python benchmarks/full_size.py --out benchmarks/results/full_size.txt
    python benchmarks/full_size.py --tiny --device cpu         # the same stages in a minute, on a tiny SAM 3

Stages, each in a process of its own: build the teacher and save it in the original layout; cache embeddings; per
student train two steps, merge into the teacher, load the merged file, predict on a photograph not trained on. Seconds
are of the whole process, imports included. Peak memory is the process's largest resident set; pages of memory-mapped
weights count. Random weights show that everything fits and runs, and what it costs, and nothing about quality. A call
that was cut off goes on with the stages that are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import REPOSITORY, Sheet, arguments, open_work, run_stage, setting, use_device

PHOTOGRAPHS = REPOSITORY.parent / "shared" / "data" / "coco" / "images"
STUDENTS = ("es_ev_s", "es_rv_m")
PROMPT_TOKENS = 6


def tiny_config() -> dict[str, Any]:
    """A SAM 3 of 0.4M parameters at 126 px."""
    heads = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    vit = {
        "model_type": "sam3_vit_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 126, "patch_size": 14, "window_size": 3, "global_attn_indexes": [1],
        "pretrain_image_size": 42,
    }  # fmt: skip
    text = {
        "model_type": "clip_text_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "vocab_size": 1000, "projection_dim": 32, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "model_type": "sam3_vision_model", "backbone_config": vit, "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[36, 36], [18, 18], [9, 9]],
    }  # fmt: skip
    return {
        "vision_config": vision, "text_config": text, "geometry_encoder_config": {**heads, "roi_size": 3,
        "num_layers": 1}, "detr_encoder_config": {**heads, "num_layers": 1}, "mask_decoder_config": heads,
        "detr_decoder_config": {**heads, "num_layers": 1, "num_queries": 10},
    }  # fmt: skip


class Stages:
    """What the child processes do; each method is a stage and returns what its row says."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.tiny, self.images, self.work = args.tiny, args.images, args.work
        self.count, self.batch, self.student = args.count, args.batch, args.student
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


def peak_bytes() -> int:
    """Of this process since it began. The kernel's own mark where there is one: what ``getrusage`` says on Linux begins
    with the parent's peak."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line[:6] == "VmHWM:")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def child(args: argparse.Namespace) -> None:
    """One stage; leaves what it found beside the others."""
    stage: Callable[[], str] = getattr(Stages(args), args.stage)
    found = stage()
    args.result.write_text(json.dumps({"found": found, "peak_bytes": peak_bytes()}))


def stage_row(args: argparse.Namespace, stage: str, student: str) -> dict[str, Any]:
    """What a stage found, for a student where it is about one."""
    name = f"{stage}-{student}" if stage not in ("build", "cache") else stage
    words = [
        "--stage", stage, "--student", student, "--images", str(args.images), "--count", str(args.count), "--batch",
        str(args.batch), *(["--tiny"] if args.tiny else []),
    ]  # fmt: skip
    return run_stage(__file__, args.work, name, words)


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "full_size")
    parser.add_argument("--images", type=Path, default=PHOTOGRAPHS, help="a folder of photographs (shared sample)")
    parser.add_argument("--count", type=int, default=4, help="photographs to cache (4)")
    parser.add_argument("--batch", type=int, default=2, help="of a training step (2); one epoch is trained")
    parser.add_argument("--tiny", action="store_true", help="a tiny SAM 3 at 126 px, to try this script")
    parser.add_argument("--keep", action="store_true", help="keep --work (about 7 GB at full size)")
    parser.add_argument("--stage", choices=["build", "cache", "train", "merge", "predict"], help=argparse.SUPPRESS)
    parser.add_argument("--student", default=STUDENTS[0], help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.stage is not None:
        child(args)
        return
    args.work, args.images = args.work.resolve(), args.images.resolve()
    device = use_device(args.device)
    sheet = Sheet(device)
    open_work(args.work, "full_size", {"tiny": args.tiny, "count": args.count, "batch": args.batch})
    plan = [("build", STUDENTS[0]), ("cache", STUDENTS[0])]
    plan += [(stage, student) for student in STUDENTS for stage in ("train", "merge", "predict")]
    rows = [stage_row(args, stage, student) for stage, student in plan]
    cells = [[r["stage"], f"{r['seconds']:.1f}", f"{r['peak_bytes'] / 2**30:.2f}"] for r in rows]
    size = "a tiny SAM 3 at 126 px" if args.tiny else "SAM 3's default configuration at 1008 px"
    title = f"{size}, random float32 weights, {args.count} photographs; every stage in a process of its own"
    sheet.table(title, ["stage", "seconds", "peak GiB"], cells)
    sheet.say()
    for row in rows:
        sheet.say(f"{row['stage']:<17}{row['found']}")
    sheet.say()
    threads = os.environ.get("OMP_NUM_THREADS", "one per core")
    sheet.say(
        f"{threads} thread(s) in the stages. The trunks of the merged models are the trained students to the bit."
    )
    sheet.say("Not measured: the published weights (they cannot be had here), masks of any use, accelerators, bf16.")
    sheet.save(args.out, {"tiny": args.tiny, "stages": rows})
    if not args.keep:
        shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
