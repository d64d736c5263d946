"""A ``sam3.pt`` with a small trunk, or a small trunk and text encoder, in EfficientSAM3's code and in SAM 3's own.

    python benchmarks/merged_equality.py --efficientsam3 DIR --sam3 DIR

DIR: check-outs of SimonZeng7108/efficientsam3 and facebookresearch/sam3, which need ``pip install einops ftfy regex
omegaconf``. Students of this package with random weights are merged by this package with ``--names efficientsam3``,
into a ``sam3.pt`` of a reduced number of layers. EfficientSAM3's builder opens each file, and its model and ours answer
as detector and as tracker. SAM 3's own builder always makes its ViT and its text encoder, so it cannot host a student:
its reader ignores the names of one, and leaves those parts random. The script counts these names, and those of all
other parts that do not meet. Finished models are kept in ``--work``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Sheet, arguments, open_work, use_device
from names_equality import CONTEXTS, GOAL, NAMES, Pair, Tokens, answers, kept, left, normalised, worst
from names_original import TEXTS, TRUNKS, Code, names_left, opened_code, randomise, save_teacher
from sam3_original import CPU, REDUCED, SIZE, copy_code, imported, save_words

import samdistill
from samdistill.checkpoints.files import open_weights
from samdistill.ops.images import SAM3_MEAN, SAM3_STD
from samdistill.students import StudentTrunk, StudentTrunkConfig, TextStudent, TextStudentConfig
from samdistill.students.text import TEXT_SIZES

MERGED = (("repvit_m2_3", None), ("repvit_m2_3", "s0"))
"""Trunks and text encoders. None keeps SAM 3's text encoder."""
REPLACED = ("backbone.vision_backbone.trunk.", "backbone.language_backbone.")
"""Beginnings of the names that a merge replaces."""
ALONE = 32
"""Tokens of a phrase for SAM 3's own text encoder."""


def label(trunk: str, text: str | None) -> str:
    return trunk if text is None else f"{trunk}, {text}"


def save_trunk(run: Path, name: str, seed: int) -> None:
    """A student of the encoder job that was trained on images normalised as SAM 3's."""
    config = StudentTrunkConfig(
        backbone=name, head="published", hidden_size=1024, patch_size=14, image_size=SIZE, host_mean=list(SAM3_MEAN),
        host_std=list(SAM3_STD), input_mean=list(SAM3_MEAN), input_std=list(SAM3_STD),
    )  # fmt: skip
    trunk = randomise(StudentTrunk(config), seed, normalised())
    trunk.save_pretrained(run / "student")  # type: ignore[operator]


def save_text(run: Path, size: str, seed: int) -> None:
    """A student of the text job that was trained with ``student.attend_padding=true``."""
    context, shape = CONTEXTS[size], TEXT_SIZES[size]
    config = TextStudentConfig(
        **shape, projection_dim=shape["hidden_size"], max_position_embeddings=context, attend_padding=True
    )
    noise = torch.randint(0, 49408, (64, context), generator=torch.Generator().manual_seed(seed))
    student = randomise(Tokens(TextStudent(config)), seed + 1, noise).student
    student.save_pretrained(run / "student")  # type: ignore[operator, union-attr]


def merged(teacher: Path, work: Path, name: str, size: str | None, seed: int) -> Path:
    """The file that `samdistill merge` writes."""
    out, trunk, text = work / "merged.pt", work / "trunk", work / "text"
    save_trunk(trunk, name, seed)
    if size is not None:
        save_text(text, size, seed)
    samdistill.merge(trunk, teacher, out, names="efficientsam3", text=None if size is None else text)
    return out


def in_efficientsam3(code: Code, teacher: Path, work: Path, name: str, size: str | None, seed: int) -> dict[str, Any]:
    """Names that do not meet in its model, and differences of all stages."""
    file = merged(teacher, work, name, size, seed)
    trunk, text, context = TRUNKS[name], TEXTS.get(size or ""), CONTEXTS.get(size or "", ALONE)
    with torch.inference_mode():
        names = left(code, file, trunk, text, context)[1]
    gc.collect()
    return {"names": names, "differences": answers(code, file, trunk, text, context)}


def in_sam3(builder: Any, words: Path, teacher: Path, work: Path, name: str, size: str | None, seed: int) -> Any:
    """What its own model lacks and does not know, in the parts that were replaced and in all others."""
    file = merged(teacher, work, name, size, seed)
    with contextlib.redirect_stdout(io.StringIO()):  # the names that it misses
        model = builder.build_sam3_image_model(
            bpe_path=str(words), device="cpu", checkpoint_path=str(file), load_from_HF=False,
            enable_inst_interactivity=True,
        )  # fmt: skip
    found: dict[str, int] = {}
    for kind, names in names_left(model, open_weights(file)).items():
        own = [name for name in names if name.startswith(REPLACED)]
        found |= {f"{kind}, replaced parts": len(own), f"{kind}, all others": len(names) - len(own)}
    return found


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Both parts, by merged file."""
    work, seed, found = args.work, args.seed, {"efficientsam3": {}, "sam3": {}}
    with tempfile.TemporaryDirectory() as folder, opened_code(args.efficientsam3, Path(folder)) as code:
        teacher = work / "sam3.pt"
        if not teacher.is_file():
            save_teacher(code, teacher, seed)
        save_words(code.words, work)
        (work / "config.json").write_text(json.dumps(REDUCED.config()))
        for pair in MERGED:
            key = label(*pair)
            found["efficientsam3"][key] = kept(work, key, partial(in_efficientsam3, code, teacher, work, *pair, seed))
    with tempfile.TemporaryDirectory() as folder:
        copy_code(args.sam3, Path(folder), CPU, REDUCED.replaced())
        words = Path(folder) / "sam3" / "assets" / "bpe_simple_vocab_16e6.txt.gz"
        with imported(Path(folder)) as builder:
            for pair in MERGED:
                ask = partial(in_sam3, builder, words, teacher, work, *pair, seed)
                found["sam3"][label(*pair)] = kept(work, f"sam3 {label(*pair)}", ask)
    return found


def say(sheet: Sheet, found: dict[str, dict[str, Any]]) -> None:
    rows = [
        [name, *(str(row["names"][kind]) for kind in NAMES), str(len(row["differences"])),
         f"{worst(row['differences']):.1e}"] for name, row in found["efficientsam3"].items()
    ]  # fmt: skip
    columns = ["", *NAMES, "stages", "worst relative difference"]
    sheet.table("EfficientSAM3's builder: names that do not meet, and answers as detector and tracker", columns, rows)
    kinds: dict[str, list[Pair]] = {}
    for row in found["efficientsam3"].values():
        for name, pair in row["differences"].items():
            kinds.setdefault(name.partition(":")[0], []).append(pair)
    rows = [
        [kind, str(len(pairs)), f"{max(d for d, _ in pairs):.1e}", f"{max(d / size for d, size in pairs):.1e}"]
        for kind, pairs in kinds.items()
    ]
    sheet.table("the same by stage, all files", ["", "tensors", "largest difference", "relative"], rows)
    counts = next(iter(found["sam3"].values()))
    rows = [[name, *map(str, row.values())] for name, row in found["sam3"].items()]
    sheet.table("SAM 3's own builder: names that do not meet", ["", *counts], rows)
    sheet.say()
    sheet.say(
        "SAM 3's own builder makes its ViT and its text encoder whatever the file holds, so it cannot host a student. "
        "EfficientSAM3's code is a copy of it that makes other encoders too."
    )
    sheet.say(f"Goal {GOAL:g} of the largest value at every stage. Not measured: the published weights, full depth.")


def main() -> None:
    parser = arguments(__doc__, "merged")
    parser.add_argument("--efficientsam3", type=Path, required=True, metavar="DIR")
    parser.add_argument("--sam3", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if use_device("cpu" if args.device == "auto" else args.device) != "cpu":
        raise SystemExit("--device: the copies of the original code run on a CPU alone")
    sheet = Sheet("cpu")
    open_work(args.work, "merged", {"seed": args.seed})
    found = measure(args)
    say(sheet, found)
    sheet.save(args.out, {"goal": GOAL, **found})


if __name__ == "__main__":
    main()
