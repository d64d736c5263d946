"""The prompt job at full size: a 10M MobileSAM at 1024 px with a SAM ViT-B and a MobileSAM as teachers, photographs.

    python benchmarks/full_size_prompt.py --out benchmarks/results/full_size_prompt.txt
    python benchmarks/full_size_prompt.py --tiny --device cpu      # the same stages in two minutes, on tiny models

Each stage runs in its own process: build the teachers; three steps of the job's task on photographs of COCO and three
on frames and masks of DAVIS, with a timer for each part; train on COCO with running teachers; cache two photographs;
train on them from the cache; evaluate the student on two photographs; load it and predict on one. Training, caching and
evaluation use the commands of the package. Peak memory is the largest resident set of the process (on CUDA, the memory
that torch allocated). With random weights the benchmark shows that everything fits and runs and what it costs; it shows
nothing about quality. An interrupted call is resumed at the next stage.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
import yaml
from common import Sheet, setting
from full_size_common import DATA, Clock, Row, part_table, run, say_limits, stage_arguments, stage_table
from transformers import SamConfig, SamModel

import samdistill
from samdistill.checkpoints.promptable import load_promptable
from samdistill.data import Geometry, open_source
from samdistill.engine import read_lines
from samdistill.engine.groups import parameter_groups
from samdistill.jobs.loading import load_config
from samdistill.jobs.prompt.config import PromptRunConfig
from samdistill.jobs.prompt.parts import PromptParts
from samdistill.ops.promptable import embed, image_size, predict, to_canvas
from samdistill.students import MobileSamConfig, MobileSamModel
from samdistill.types import ImageBatch, Prompts

HELD_OUT, STEPS, CACHED = 2, 3, 2
TINY = {"image_size": 128, "patch_size": 16}
STEP_STAGES = ("steps on coco", "steps on davis")


def teachers(tiny: bool) -> dict[str, torch.nn.Module]:
    """SAM ViT-B and MobileSAM with random weights, by name."""
    config = SamConfig()  # ViT-B's sizes
    if tiny:
        encoder = {
            **TINY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "window_size": 4,
            "global_attn_indexes": [1],
        }  # fmt: skip
        config = SamConfig(vision_config=encoder, prompt_encoder_config=TINY)
    return {"vit_b": SamModel(config), "mobile_sam": MobileSamModel(MobileSamConfig(**(TINY if tiny else {})))}


class Stages:
    """Stages that run in child processes. Each method is a stage and returns its results."""

    def __init__(self, args: argparse.Namespace, clock: Clock) -> None:
        self.args, self.work, self.device = args, args.work, clock.device
        self.clock, self.recipe = clock, args.work / "recipe.yaml"

    def build(self) -> dict[str, Any]:
        torch.manual_seed(0)
        models = self.clock.around("random weights", teachers)(self.args.tiny)
        for name, model in models.items():
            self.clock.around("save", model.save_pretrained)(self.work / name)
        self.recipe.write_text(yaml.safe_dump(self.settings()))
        return {"parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}}

    def settings(self) -> dict[str, Any]:
        """The config that all stages share."""
        weights = {"vit_b": 0.7, "mobile_sam": 0.3}
        return {
            "job": "prompt", "student": TINY if self.args.tiny else {},
            "teachers": [{"name": n, "checkpoint": str(self.work / n), "weight": w} for n, w in weights.items()],
            "data": {"root": str(DATA / "coco"), "kind": "coco", "held_out": None, "held_out_last": HELD_OUT,
                     "geometry": "longest_side", "workers": 0},
            "distillation": {"sample": 4, "precomputed_root": str(self.work / "features")},
            "cache": {"batch_size": 1}, "evaluate": {"batch_size": 1},
            "train": {"epochs": 1, "batch_size": self.args.batch, "lr": 1e-4, "lr_batch": None, "warmup_epochs": 0,
                      "log_every": 1},
        }  # fmt: skip

    def config(self, *settings: str) -> PromptRunConfig:
        config = load_config(self.recipe, [*settings, *self.args.overrides])
        assert isinstance(config, PromptRunConfig)
        return config

    def on(self, name: str, count: int) -> list[str]:
        """Settings for the first ``count`` training images of a sample, listed, so that no other is read."""
        data = [setting("data.root", DATA / name), f"data.kind={'masks' if name == 'davis' else name}"]
        keys = open_source(self.config(*data).data, "train").keys
        listed = self.work / f"{name}-{count}.txt"
        listed.write_text("\n".join([*keys[:count], *keys[-HELD_OUT:]]) + "\n")  # the last of a list are set aside
        return [*data, setting("data.ids", listed)]

    def steps(self, name: str) -> dict[str, Any]:
        """A few optimiser steps, as the engine does them."""
        output, around = setting("output", self.work / f"steps-{name}"), self.clock.around
        config = self.config(*self.on(name, STEPS * self.args.batch), output)
        task = around("open the teachers, fit their projections", PromptParts(config).task)(self.device)
        torch.manual_seed(config.train.seed)
        student = around("build the student", task.build_student)().to(self.device).train()
        groups = parameter_groups(student, config.train.weight_decay, config.train.rates)
        optimiser = torch.optim.AdamW(groups, lr=config.train.lr)
        task.to(task.collate([task.dataset(0)[0]]), self.device)  # moves the teachers
        for teacher in task.signals.teachers.values():
            teacher.answer = around(f"teacher {teacher.name}", teacher.answer)
        student.forward = around("student, forward", student.forward)
        task._task_values = around("task terms", task._task_values)
        task._value = around("distillation terms", task._value)
        data, told, kinds = task.dataset(0), list[dict[str, float]](), list[list[str]]()
        for start in range(0, STEPS * self.args.batch, self.args.batch):
            rows = range(start, start + self.args.batch)
            batch = around("read photographs and masks", lambda at: task.collate([data[i] for i in at]))(rows)
            batch = around("move to the device", task.to)(batch, self.device)
            terms = task.terms(student, batch)
            around("backward", terms.total.backward)()
            norm = around("clip the gradient", torch.nn.utils.clip_grad_norm_)(student.parameters(), 1.0)
            around("optimiser", optimiser.step)()
            optimiser.zero_grad()
            told.append({name: term.value.item() for name, term in terms.items()} | {"gradient norm": norm.item()})
            kinds.append([asked(group.prompts) for group in batch.groups])
            if bad := terms.nonfinite():
                raise SystemExit(f"not finite: {', '.join(bad)}")
        count = sum(p.numel() for p in student.model.parameters())
        return {"steps": told, "prompts": kinds, "student": count, "objects": config.prompts.objects}

    def train(self) -> dict[str, Any]:
        return self._train("trained", self.on("coco", CACHED))

    def cache(self) -> dict[str, Any]:
        config = self.config(*self.on("coco", CACHED), setting("output", self.work / "trained"))
        report = self.clock.around("cache", samdistill.cache)(config, progress=False)
        return {"records": report.records, "bytes an image": report.bytes_per_record, "codec": config.cache.codec}

    def train_from_cache(self) -> dict[str, Any]:
        start = setting("student.start", self.work / "trained")
        return self._train(
            "from-cache", [*self.on("coco", CACHED), start, "distillation.use_precomputed_features=true"]
        )

    def _train(self, name: str, settings: list[str]) -> dict[str, Any]:
        config = self.config(*settings, setting("output", self.work / name))
        result = self.clock.around("train", samdistill.train)(config)
        lines = [line for line in read_lines(config.output / "metrics.jsonl") if "seconds" in line]
        size = sum(path.stat().st_size for path in (config.output / "student").iterdir())
        return {"steps": result.steps, "in steps": lines[-1]["seconds"], "terms": result.terms, "bytes": size}

    def evaluate(self) -> dict[str, Any]:
        found = self.clock.around("evaluate", samdistill.evaluate)(
            self.work / "from-cache", DATA / "coco", images=2, batch_size=1, geometry="longest_side", progress=False
        )
        return {"images": found.images, "objects": found.objects, "miou": dict(found.rows[0].miou)}

    def predict(self) -> dict[str, Any]:
        """A box around the middle of one photograph."""
        around, source = self.clock.around, open_source(self.config(*self.on("coco", CACHED)).data, "held_out")
        model = around("load", load_promptable)(self.work / "from-cache").to(self.device)
        side = image_size(model)
        canvas, size = Geometry(side, "longest_side").canvas(source.load(source.keys[0]))
        sizes = torch.tensor([size])
        images = ImageBatch(canvas[None], sizes, sizes, ("photograph",), torch.zeros(1, dtype=torch.int64))
        box = torch.tensor([[[size[1] / 4, size[0] / 4, size[1] * 3 / 4, size[0] * 3 / 4]]])
        asked = Prompts(torch.ones(1, 1, dtype=torch.bool), boxes=box).to(self.device)
        with torch.inference_mode():
            embeddings = around("encode the image", embed)(model, images.to(self.device))
            found = around("decode a box", predict)(model, embeddings, asked)
            mask = around("upscale", to_canvas)(found.best()[0], (side, side))
        if not bool(torch.isfinite(found.low_res_masks).all()):
            raise SystemExit("the mask's logits are not finite")
        return {"mask": list(mask.shape), "pixels": int(mask.sum())}


def asked(prompts: Prompts) -> str:
    """The kind of a group's prompts."""
    points = 0 if prompts.points is None else prompts.points.shape[2]
    told = ["box"] * (prompts.boxes is not None) + [f"{points} point(s)"] * (points > 0)
    return f"{' and '.join(told)} for {prompts.valid.shape[1]} objects of {len(prompts.valid)} image(s)"


def say(args: argparse.Namespace, sheet: Sheet, rows: dict[str, Row]) -> None:
    """Print stages, parts of the steps, and the output of the commands."""
    sizes = ", ".join(f"{name} {count:,}" for name, count in rows["build"]["found"]["parameters"].items())
    size = TINY["image_size"] if args.tiny else 1024
    student = rows["steps on coco"]["found"]["student"]
    told = f"parameters of the teachers: {sizes}, of the student: {student:,}; random float32 weights"
    stage_table(sheet, f"{size} px; {told}; batch {args.batch}", rows)
    for stage in STEP_STAGES:
        found = rows[stage]["found"]
        told = "; ".join(kind for kinds in found["prompts"] for kind in kinds)
        part_table(sheet, f"{stage}, {STEPS} together: {told}", rows[stage]["parts"])
        first, last = found["steps"][0], found["steps"][-1]
        sheet.table(
            f"{stage}: terms", ["", "first step", "last step"],
            [[name, f"{first[name]:.4g}", f"{last[name]:.4g}"] for name in first],
        )  # fmt: skip
    sheet.say()
    for stage in [name for name in rows if name not in ("build", *STEP_STAGES)]:
        parts = ", ".join(f"{name} {part['seconds']:.2f} s" for name, part in rows[stage]["parts"].items())
        found = {name: value for name, value in rows[stage]["found"].items() if name != "terms"}
        told = ", ".join(f"{name} {plain(value)}" for name, value in found.items())
        sheet.say(f"{stage}: {parts}; {told}")
    missing = "answers of any use, half precision, ViT-H, prompts in the loop, larger batches"
    say_limits(sheet, "Seconds of parts are sums over the steps, the first of them cold.", missing)


def plain(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name} {plain(inner)}" for name, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    parser = stage_arguments(__doc__, "full_size_prompt", f"tiny models at {TINY['image_size']} px", "1 GB")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the job")
    parser.add_argument("--batch", type=int, choices=[1, 2], default=1, help="photographs of a step (1)")
    args = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"{DATA}: the photographs are not here")
    stages = {
        "build": lambda clock: Stages(args, clock).build(),
        "steps on coco": lambda clock: Stages(args, clock).steps("coco"),
        "steps on davis": lambda clock: Stages(args, clock).steps("davis"),
        "train": lambda clock: Stages(args, clock).train(),
        "cache": lambda clock: Stages(args, clock).cache(),
        "train from the cache": lambda clock: Stages(args, clock).train_from_cache(),
        "evaluate": lambda clock: Stages(args, clock).evaluate(),
        "predict": lambda clock: Stages(args, clock).predict(),
    }
    run(__file__, args, stages, [*args.overrides, "--batch", str(args.batch)], partial(say, args))


if __name__ == "__main__":
    main()
