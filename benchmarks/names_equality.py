"""Files in EfficientSAM3's names, read and written, beside EfficientSAM3's code; EdgeSAM's and MobileSAM's files.

    python benchmarks/names_equality.py --efficientsam3 DIR --edge-sam DIR --mobile-sam DIR

DIR: check-outs of SimonZeng7108/efficientsam3, chongzhou96/EdgeSAM and ChaoningZhang/MobileSAM. The first one needs
``pip install einops ftfy regex omegaconf``. Weights are random. Of each of its nine trunks and of each text encoder, a
file of its first stage and a merged file, written by its own script, are opened with this package. A student of this
package is merged with ``--names efficientsam3`` and opened with its builder. Both answer about the same image or
phrases. SAM 3 has a reduced number of layers. Finished models are kept in ``--work``.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from common import Sheet, arguments, note, open_work, use_device
from names_original import TEXTS, TRUNKS, VIT, Code, Student, names_left, opened_code, pixels, randomise, save_teacher
from rename_equality import coverage, original_code
from rename_equality import run as run_prompted
from sam3_equality import BEYOND, QUESTIONS, ask_detector, ask_tracker, compare, frames, prompts
from sam3_original import REDUCED, SIZE, Original, save_words
from torch import Tensor, nn
from transformers import Sam3LiteTextModel, Sam3Model

import samdistill
from samdistill.checkpoints.files import open_weights
from samdistill.checkpoints.original import load_original
from samdistill.checkpoints.promptable import load_promptable
from samdistill.checkpoints.student import Host, read_student
from samdistill.checkpoints.text import read_text
from samdistill.checkpoints.words import Words
from samdistill.ops.images import SAM3_MEAN, SAM3_STD
from samdistill.students import StudentTrunk, TextStudent, TextStudentConfig
from samdistill.students.backbones import statistics
from samdistill.students.text import TEXT_SIZES

GOAL = 1e-4
CONTEXTS = {"s0": 16, "s1": 32, "l": 16, "b": 32}
"""Tokens of a phrase by size."""
PHRASES = ("a red car", "striped cat", "the left front wheel of an old yellow school bus", "visual")
FOLDED = ("efficientvit_b0", "repvit_m0_9", "tiny_vit_5m_224")
"""Trunks that are also written with ImageNet's statistics."""
NAMES = ("missing", "unexpected", "of another shape")
WHOLE = (("repvit_m1_1", "s0"), ("efficientvit_b1", "s1"), ("tiny_vit_11m_224", "l"))
"""Trunks and text encoders that are asked together, as detector and as tracker."""
TRAINING = (
    "mmdet", "mmdet.models", "mmdet.models.dense_heads", "mmdet.models.necks", "mmengine", "projects",
    "projects.EfficientDet", "loralib", "yacs", "yacs.config",
)  # fmt: skip
"""What EdgeSAM's code imports for training and for detectors of boxes."""
Pair = tuple[float, float]
"""Largest absolute difference, and the largest magnitude in the original's."""


def difference(ours: Tensor, theirs: Tensor) -> Pair:
    """Shapes have to be the same."""
    if ours.shape != theirs.shape:
        raise SystemExit(f"{tuple(ours.shape)}, the original has {tuple(theirs.shape)}")
    return float((ours - theirs).abs().max()), float(theirs.abs().max())


def normalised(mean: Any = SAM3_MEAN, std: Any = SAM3_STD) -> Tensor:
    """The picture, normalised."""
    return (pixels() - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def left(code: Code, file: Path, trunk: tuple[str, str], text: str | None, context: int) -> tuple[Any, dict[str, int]]:
    """The model that EfficientSAM3's builder makes of a file, and the counts of names that do not meet."""
    model = code.build(trunk, text, context, file)
    return model, {kind: len(names) for kind, names in names_left(model, open_weights(file)).items()}


@torch.inference_mode()
def trunk_both_ways(code: Code, teacher: Path, work: Path, name: str, seed: int) -> dict[str, Any]:
    """One trunk: its files opened here, and ours opened there."""
    alone, merged, own = work / "student.pth", work / "merged.pth", work / "own.pt"
    pixels, imagenet = normalised(), normalised(*statistics(name))
    with torch.inference_mode(False):
        theirs = randomise(code.trunk(TRUNKS[name]), seed, pixels)
    torch.save({"model": theirs.state_dict(), "epoch": 1}, alone)
    code.convert("convert_image_encoder_weights_stage1.py", student_ckpt=alone, sam3_ckpt=teacher, output=merged)
    opened = read_student(alone, Host(1024, 14, SIZE))
    ours = StudentTrunk(opened.config).eval()
    ours.load_state_dict(dict(opened.weights))
    said = theirs(pixels * ours.input_scale + ours.input_shift)
    found: dict[str, Any] = {
        "stage 1 opened": difference(ours.image_embedding(pixels), said),
        "normalisation of stage 1": difference(pixels * ours.input_scale + ours.input_shift, imagenet),
    }
    ours, said = load_original(merged, Sam3Model).vision_encoder.backbone, theirs(pixels)
    found["merged opened"] = difference(ours.image_embedding(pixels), said)
    ours.save_pretrained(work / "run" / "student")
    samdistill.merge(work / "run", teacher, own, names="efficientsam3")
    model, found["names"] = left(code, own, TRUNKS[name], None, 32)
    found["written"] = difference(model.backbone.vision_backbone.trunk.model(pixels), said)
    if name not in FOLDED:
        return found
    ours.config.input_mean, ours.config.input_std = map(list, statistics(name))
    ours.read_as(ours.config)
    ours.save_pretrained(work / "run" / "student")
    samdistill.merge(work / "run", teacher, own, names="efficientsam3")
    begin = "detector.backbone.vision_backbone.trunk.model."
    theirs.load_state_dict({k.removeprefix(begin): v for k, v in open_weights(own).items() if k.startswith(begin)})
    here, there = ours.image_embedding(pixels), theirs(pixels)
    found["folded"] = difference(here, there)
    found["folded, root mean square"] = float((here - there).square().mean().sqrt()), float(there.std())
    return found


class Tokens(nn.Module):
    """A text student that returns its tokens, of phrases without padding."""

    def __init__(self, student: TextStudent) -> None:
        super().__init__()
        self.student = student

    def forward(self, ids: Tensor) -> Tensor:
        return self.student(ids, torch.ones_like(ids)).last_hidden_state


@torch.inference_mode()
def text_both_ways(code: Code, teacher: Path, work: Path, size: str, seed: int) -> dict[str, Any]:
    """One text encoder: its files opened here, and ours opened there. All tokens but padding are compared."""
    context = CONTEXTS[size]
    words = Words.load(work, 49408, context)
    ids, mask = words.encode(PHRASES)
    shown, noise = mask.bool(), torch.randint(0, 49408, (64, context), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode(False):
        student = code.builder._create_student_text_encoder(str(code.words), TEXTS[size], context).eval()
        student = randomise(Student(student), seed, noise).student

    def said(encoder: Any) -> Tensor:
        return encoder(list(PHRASES), device="cpu")[1].transpose(0, 1)[shown]

    alone, own = work / "text.pth", work / "own.pt"
    torch.save({"model": student.state_dict(), "epoch": 1}, alone)
    opened = read_text(alone)
    assert opened is not None
    found: dict[str, Any] = {}
    for kind, attend in (("stage 1 opened", True), ("the same, padding masked as by transformers", False)):
        opened.config.attend_padding = attend
        ours = TextStudent(opened.config).eval()
        ours.load_state_dict(dict(opened.weights))
        found[kind] = difference(ours(ids, mask).last_hidden_state[shown], said(student))
    samdistill.merge(alone, teacher, own)
    merged = load_original(own, Sam3LiteTextModel)
    found["merged opened"] = difference(merged.get_text_features(ids, mask).pooler_output[shown], said(student))
    del merged, ours
    config = TextStudentConfig(
        **TEXT_SIZES[size], projection_dim=TEXT_SIZES[size]["hidden_size"], max_position_embeddings=context,
        attend_padding=True,
    )  # fmt: skip
    with torch.inference_mode(False):
        ours = randomise(Tokens(TextStudent(config)), seed + 1, noise).student
    ours.save_pretrained(work / "words" / "student")
    samdistill.merge(work / "words", teacher, own, names="efficientsam3")
    model, found["names"] = left(code, own, VIT, TEXTS[size], context)
    found["written"] = difference(ours(ids, mask).last_hidden_state[shown], said(model.backbone.language_backbone))
    return found


def whole(code: Code, teacher: Path, work: Path, name: str, size: str, seed: int) -> dict[str, Pair]:
    """A model with a small trunk and a small text encoder, merged by its script, as detector and as tracker."""
    context = CONTEXTS[size]
    with torch.inference_mode(False):
        model = randomise(code.build(TRUNKS[name], TEXTS[size], context), seed)
        trunk, text = model.backbone.vision_backbone.trunk.model, model.backbone.language_backbone
        randomise(trunk, seed, normalised())
        noise = torch.randint(0, 49408, (64, context), generator=torch.Generator().manual_seed(seed))
        randomise(Student(text), seed, noise)
    image, words, merged = work / "image.pth", work / "text.pth", work / "both.pth"
    torch.save({"model": trunk.state_dict()}, image)
    torch.save({"model": text.state_dict()}, words)
    code.convert(
        "convert_both_encoders_weights_stage1.py", image_student_ckpt=image, text_student_ckpt=words,
        sam3_ckpt=teacher, output=merged, image_model_name=Path(name), text_model_name=Path(size),
    )  # fmt: skip
    del model, trunk, text
    return answers(code, merged, TRUNKS[name], TEXTS[size], context)


def answers(code: Code, merged: Path, trunk: tuple[str, str], text: str | None, context: int) -> dict[str, Pair]:
    """A merged file as detector and as tracker: what EfficientSAM3's model of it and ours answer, stage by stage."""
    with torch.inference_mode():
        original = Original(code.build(trunk, text, context, merged), frames())
        for key, question in QUESTIONS.items():
            original.ask(key, question)
        for key, prompt in prompts().items():
            original.prompt(key, prompt)
    theirs = original.found
    del original
    gc.collect()
    ours = {key: value for key, value in ask_detector(merged).items() if not key.startswith(BEYOND)}
    ours |= ask_tracker(load_promptable(merged))
    if unseen := theirs.keys() - ours.keys():
        raise SystemExit(f"not compared: {sorted(unseen)}")
    return compare(theirs, ours)


def edge_sam(folder: Path) -> Callable[[], nn.Module]:
    """EdgeSAM's builder. Its mask decoder takes the number of masks; here it takes what SAM's takes."""
    for name in TRAINING:
        sys.modules.setdefault(name, MagicMock())
    package = original_code(folder, "edge_sam")

    def build() -> nn.Module:
        model = package.sam_model_registry["edge_sam"]()
        decode = model.mask_decoder.forward

        def forward(multimask_output: bool, **given: Any) -> Any:
            return decode(num_multimask_outputs=3 if multimask_output else 1, **given)

        model.mask_decoder.forward = forward
        return model

    return build


def relative(pair: Pair) -> float:
    """A difference as a share of the largest value."""
    return pair[0] / pair[1]


def say(sheet: Sheet, title: str, found: dict[str, dict[str, Any]]) -> None:
    """Relative differences, and counts of names that do not meet, by model."""
    kinds = [kind for kind in next(iter(found.values())) if kind != "names"]
    rows = [
        [name, *(f"{relative(row[kind]):.1e}" if kind in row else "" for kind in kinds),
         *(str(row["names"][kind]) for kind in NAMES)] for name, row in found.items()
    ]  # fmt: skip
    sheet.table(title, ["", *kinds, *NAMES], rows)


def worst(found: dict[str, Pair]) -> float:
    """The largest relative difference."""
    return max(map(relative, found.values()))


def kept(work: Path, key: str, measure: Callable[[], Any]) -> Any:
    """The result of ``measure``, or the one that an earlier call of the script left in ``work``."""
    place = work / "stages" / f"{key}.json"
    if not place.is_file():
        note(key)
        place.write_text(json.dumps(measure()))
        gc.collect()
    return json.loads(place.read_text())


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "names")
    parser.add_argument("--efficientsam3", type=Path, required=True, metavar="DIR")
    parser.add_argument("--edge-sam", type=Path, required=True, metavar="DIR")
    parser.add_argument("--mobile-sam", type=Path, required=True, metavar="DIR")
    parser.add_argument("--whole", type=int, default=len(WHOLE), help="models that are asked as a whole (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if use_device("cpu" if args.device == "auto" else args.device) != "cpu":
        raise SystemExit("--device: the copy of the original runs on a CPU alone")
    sheet, work, seed = Sheet("cpu"), args.work, args.seed
    open_work(work, "names", {"seed": seed})
    figures: dict[str, Any] = {"goal": GOAL, "trunks": {}, "texts": {}, "whole": {}, "coverage": {}, "prompted": {}}
    with tempfile.TemporaryDirectory() as folder, opened_code(args.efficientsam3, Path(folder)) as code:
        teacher = work / "sam3.pt"
        if not teacher.is_file():
            save_teacher(code, teacher, seed)
        save_words(code.words, work)
        (work / "config.json").write_text(json.dumps(REDUCED.config()))
        given = (code, teacher, work)
        for name in TRUNKS:
            figures["trunks"][name] = kept(work, name, partial(trunk_both_ways, *given, name, seed))
        for size in TEXTS:
            figures["texts"][size] = kept(work, size, partial(text_both_ways, *given, size, seed))
        for name, size in WHOLE[: args.whole]:
            figures["whole"][f"{name}, {size}"] = kept(work, f"{name}_{size}", partial(whole, *given, name, size, seed))
    builders = {"EdgeSAM": edge_sam(args.edge_sam)}
    builders["MobileSAM"] = original_code(args.mobile_sam, "mobile_sam").sam_model_registry["vit_t"]
    for name, build in builders.items():
        figures["coverage"][name] = coverage(build())[0]
        figures["prompted"][name] = kept(work, name, partial(run_prompted, build, "cpu"))
    say(sheet, "trunks: relative difference of the embedding, and names in the written file", figures["trunks"])
    say(sheet, "text encoders: relative difference of the tokens, and names in the written file", figures["texts"])
    rows = [[name, str(len(found)), f"{worst(found):.1e}"] for name, found in figures["whole"].items()]
    sheet.table("merged files as detector and tracker", ["", "stages", "worst relative difference"], rows)
    rows = [
        [name, *map(str, figures["coverage"][name].values()), str(len(found)), f"{worst(found):.1e}"]
        for name, found in figures["prompted"].items()
    ]
    sheet.table("promptable models", ["", *figures["coverage"]["EdgeSAM"], "outputs", "worst relative"], rows)
    sheet.say()
    sheet.say(f"{SIZE} px, float32, random weights, SAM 3 with {REDUCED.text} text and {REDUCED.detr} + {REDUCED.detr} "
              "DETR layers. MobileCLIP-B (b) has a causal mask, which its tensors do not show and transformers' class "
              "does not have: it is opened as S1. Not measured: the published weights.")  # fmt: skip
    sheet.save(args.out, figures)


if __name__ == "__main__":
    main()
