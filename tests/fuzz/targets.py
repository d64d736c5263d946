"""What is damaged and which commands then meet it. Paths are relative to a copy of ``material``."""

from __future__ import annotations

import string
from dataclasses import dataclass
from random import Random

from mutations import NAMES


@dataclass(frozen=True)
class Target:
    """copy: what a command needs of the material. damage: globs of the files of which one or two are damaged, or a
    model folder for ``plant``. commands: one of them is run."""

    kind: str
    copy: tuple[str, ...]
    damage: tuple[str, ...]
    commands: tuple[str, ...]
    plants: bool = False


WORDS, CLICK = "predict photos/a.png {} --text 'red disc' --out out.png", "predict photos/a.png {} --point 20,20 --json"
PHOTOS = ("a.png", "b.jpg", "c.webp", "d.tif", "e.bmp", "f.png", "g.gif")
MODEL = ("/config.json", "/*.safetensors")
JOBS = {
    "encoder": ("configs", "tracker", "sa1b"), "detection": ("configs", "detector", "coco"),
    "prompt": ("configs", "sam", "sa1b", "runs/prompt"), "video": ("configs", "detector", "sav", "images"),
    "text": ("configs", "detector", "phrases"),
}  # fmt: skip


def _model(name: str, *commands: str, copy: tuple[str, ...] = ("photos",), inside: str = "") -> list[Target]:
    place = name + inside
    found = [Target(f"{kind} of {name}", (name, *copy), (place + files,), (*commands, f"inspect {place}"))
             for kind, files in zip(("config.json", "safetensors"), MODEL, strict=True)]  # fmt: skip
    return [*found, Target(f"code in {name}", (name, *copy), (place,), commands, plants=True)]


TARGETS = [
    *_model("detector", WORDS.format("detector"), "plan configs/detection.yaml",
            "merge trunk --into detector --out merged", copy=("photos", "coco", "configs", "trunk")),
    *_model("tracker", CLICK.format("tracker"), "plan configs/encoder.yaml", "evaluate tracker sa1b --images 1 --json",
            "merge trunk --into tracker --out merged", copy=("photos", "sa1b", "configs", "trunk")),
    *_model("sam", CLICK.format("sam"), "plan configs/encoder.yaml teacher.kind=sam teacher.path=sam",
            "plan configs/prompt.yaml", "merge trunk_sam --into sam --out merged",
            copy=("photos", "sa1b", "configs", "trunk_sam")),
    *_model("sam2", CLICK.format("sam2"), "plan configs/encoder.yaml teacher.kind=sam2 teacher.path=sam2",
            "check configs/encoder.yaml teacher.kind=sam2 teacher.path=sam2",
            "merge trunk_sam2 --into sam2 --out merged", copy=("photos", "sa1b", "configs", "trunk_sam2")),
    *_model("trunk_sam2", "merge trunk_sam2 --into sam2 --out merged", copy=("sam2",), inside="/student"),
    *_model("mobile", CLICK.format("mobile")),
    *_model("trunk", "merge trunk --into detector --out merged", copy=("detector",), inside="/student"),
    *_model("speech", "merge speech --into detector --out merged", copy=("detector",), inside="/student"),
    *_model("images", WORDS.format("images"), "plan configs/video.yaml", copy=("photos", "detector", "sav", "configs"),
            inside="/student"),
    *_model("memory", "predict {mp4} memory --text disc --out out.mp4", "evaluate memory sav --json",
            "predict davis/JPEGImages/one memory --text disc --json", copy=("sav", "davis"), inside="/student"),
    Target("original sam3.pt", ("originals", "photos", "trunk"), ("originals/sam3/*",),
           (WORDS.format("originals/sam3/sam3.pt"), "merge trunk --into originals/sam3/sam3.pt --out merged.pt",
            "inspect originals/sam3/sam3.pt")),
    Target("students of EfficientSAM3", ("originals", "detector"), ("originals/efficientsam3/*",),
           tuple(f"merge originals/efficientsam3/{name} --into {into}" for name in ("trunk.pth", "text.pth")
                 for into in ("detector --out merged", "originals/sam3/sam3.pt --out merged.pt"))),
    Target("original sam", ("originals", "photos", "trunk_sam"), ("originals/sam_vit/*",),
           (CLICK.format("originals/sam_vit/sam_vit.pth"), "inspect originals/sam_vit/sam_vit.pth",
            "merge trunk_sam --into originals/sam_vit/sam_vit.pth --out merged")),
    Target("tokenizer", ("detector", "images", "photos"), ("detector/token*", "images/student/token*"),
           (WORDS.format("detector"), WORDS.format("images"))),
    Target("images", ("tracker", "photos"), ("photos/*",),
           tuple(CLICK.format("tracker").replace("a.png", name) for name in PHOTOS)),
    Target("SA-1B", JOBS["encoder"] + JOBS["prompt"], ("sa1b/annotations/*/*.json", "sa1b/images/*/*.jpg"),
           ("evaluate tracker sa1b --json", "cache configs/prompt.yaml output=new --layout npy",
            "check configs/prompt.yaml", "prepare sa1b sa1b prepared")),
    Target("COCO", JOBS["detection"] + ("tracker", "sam"), ("coco/annotations/*.json",),
           ("evaluate tracker coco --json", "plan configs/detection.yaml", "check configs/detection.yaml",
            "cache configs/prompt.yaml output=new data.kind=coco data.root=coco --layout npy")),
    Target("words", JOBS["detection"], ("coco/phrases.jsonl", "coco/ids.txt"),
           ("plan configs/detection.yaml questions.source=jsonl questions.file=coco/phrases.jsonl",
            "plan configs/detection.yaml data.ids=coco/ids.txt")),
    Target("phrases", JOBS["text"], ("phrases/*",),
           ("check configs/text.yaml", "plan configs/text.yaml data.phrases=[phrases/words.jsonl,phrases/names.json]",
            "plan configs/text.yaml data.exclude=[phrases/asked.json]")),
    Target("tokens", (*JOBS["text"], "runs/text"), ("runs/text/features/*", "runs/text/*.*"),
           ("cache configs/text.yaml --verify", "train configs/text.yaml", "inspect runs/text")),
    Target("SA-Co", ("images", "coco"), ("coco/concepts_val.json", "coco/predictions.json"),
           ("evaluate coco/predictions.json coco/concepts_val.json --concepts --json",
            "evaluate images coco/concepts_val.json --concepts --json --out found.json")),
    Target("SA-V", JOBS["video"] + ("memory",), ("sav/*/*_manual.json", "sav/*/*.mp4", "sav/*.json"),
           ("plan configs/video.yaml", "evaluate memory sav --json", "check configs/video.yaml")),
    Target("DAVIS", ("memory", "davis"), ("davis/*/one/*",), ("evaluate memory davis --json",)),
    Target("predicted masks", ("davis", "results"), ("davis/Annotations/one/*", "davis/ImageSets/*/*", "results/*/*/*",
           "results/*/*/*/*"),
           ("evaluate results/davis davis --masks --json", "evaluate results/sav results/true --masks --json")),
    Target("masks", ("tracker", "masks"), ("masks/*/*",), ("evaluate tracker masks --json",)),
    Target("video", ("memory", "sav"), ("sav/val/*.mp4",), ("predict {mp4} memory --text disc --out out.mp4",)),
    Target("store", (*JOBS["encoder"], "runs/encoder"), ("runs/encoder/embeddings/*",),
           ("cache configs/encoder.yaml", "cache configs/encoder.yaml --verify", "inspect runs/encoder",
            "train configs/encoder.yaml output=new cache.root=runs/encoder/embeddings")),
    Target("cached signals", JOBS["prompt"], ("runs/prompt/features/**/*.*",),
           ("cache configs/prompt.yaml", "cache configs/prompt.yaml --verify", "check configs/prompt.yaml")),
    Target("run", (*JOBS["encoder"], "runs/encoder"), ("runs/encoder/*.*",),
           ("train configs/encoder.yaml --resume runs/encoder", "inspect runs/encoder",
            "merge runs/encoder/ckpt_epoch_1.pt --into tracker --out merged")),
    Target("prompt run", JOBS["prompt"], ("runs/prompt/*.*", "runs/prompt/student/*"),
           ("evaluate runs/prompt sa1b --json", "train configs/prompt.yaml --resume runs/prompt", "inspect runs/prompt",
            "predict sa1b/images/val/sa_3000000.jpg runs/prompt --point 20,20 --json")),
    *(Target(f"YAML of {job}", copy, (f"configs/{job}.yaml",),
             (f"plan configs/{job}.yaml", f"check configs/{job}.yaml")) for job, copy in JOBS.items()),
]  # fmt: skip
"""Each is met about equally often."""

COMMAND_LINES = """
predict photos/a.png detector --text {}
predict photos/a.png {} --text x
predict {} detector --text x
predict photos/a.png tracker --point {}
predict photos/a.png tracker --box {}
predict photos/a.png detector --text x --threshold {}
predict photos/a.png tracker --point 1,1 --out {}
predict photos/a.png tracker --geometry {}
predict sav/val detector --text x --frames {}
evaluate {} davis --masks
evaluate results/davis {} --masks
evaluate results/davis davis --masks --convention {}
evaluate tracker sa1b --images {}
evaluate tracker sa1b --prompts {}
evaluate {} sa1b
evaluate tracker {}
evaluate tracker sa1b --teacher {}
inspect {}
merge {} --into tracker --out m
merge trunk --into {} --out m
merge trunk --into tracker --out {}
merge trunk --into tracker --out m --target-prefix {}
merge trunk --into tracker --out m --replace-prefix {}
models {}
plan {}
plan configs/encoder.yaml {}
plan configs/encoder.yaml train.lr={}
plan configs/encoder.yaml data.split={}
plan configs/prompt.yaml student.image_size={}
plan configs/detection.yaml questions.per_image={}
plan configs/encoder.yaml student.backbone={}
plan configs/encoder.yaml output={}
prepare sa1b {} new
prepare sa1b sa1b {}
prepare sa1b sa1b new --val-fraction {}
sandbox render {} --train 1 --val 1 --size 64
sandbox render new --train 1 --val {} --size 64
sandbox render new --train 1 --val 1 --size {}
run photos --teacher tracker --student {} --out new
{}
plan --{}
""".strip().splitlines()
"""Commands with a hole, for ``COMMAND_VALUES`` and what a generator writes."""
_PLACES = ("../../../outside/escaped", "/etc/passwd", "~")  # who runs a command may write there
COMMAND_VALUES = [
    *(name for name in NAMES if name not in _PLACES),
    "1,2", "1,2,3", "1,2,3,4", "4,3,2,1", ",", "nan,nan", "1e400,2", "inf,1", "-1,-1", "10,10,5,5",
    "99999,99999", "1,2,3,4,5", "0", "1", "1e9", "99999999999999999999", "=", "a=b", "a.b.c=1", "train={}",
    "sam/../detector", "/dev/null", "/dev/zero", "/proc/self/mem", ".", "[", "{a: b}", "!!python/name:os.system",
    "&a [*a]", "-", "--", "--help", "photos", "tracker", "configs/encoder.yaml", "😀 disc", "disc " * 200, "\udcff",
    "%s%n", "$(touch x)", "`touch x`",
]  # fmt: skip


def command_line(rng: Random) -> list[str]:
    """A command with a value that is seldom what it wants."""
    made = "".join(rng.choice(string.printable + "äß漢\u202e\udc80") for _ in range(rng.randrange(12)))
    value = rng.choice([*COMMAND_VALUES, made])
    return [part.replace("{}", value) if "{}" in part else part for part in rng.choice(COMMAND_LINES).split(" ")]
