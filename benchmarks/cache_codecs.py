"""Accuracy of students trained from ``fp16``, ``int8`` and PCA caches, with the same teacher, steps and seeds.

    python benchmarks/cache_codecs.py --jobs 2 --out benchmarks/results/cache_codecs.txt

The goal is an eighth of the bytes at a loss of at most 0.5 points of agreement with the teacher's masks. The bundled
teacher has fewer channels than SAM 3 (192 instead of 1024). In place of ``pca256-int8``, the PCA that keeps the same
quarter of the channels (48) is measured. Finished trainings in --work are not repeated.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from common import Sheet, Study, say_study, study, study_arguments, use_device

from samdistill import load_config
from samdistill.config import TeacherConfig
from samdistill.data import ImageDataset, image_loader
from samdistill.jobs.encoder.parts import EncoderParts
from samdistill.metrics.features import feature_cosine
from samdistill.store import record_bytes, stored_codec
from samdistill.teachers import describe_teacher

BASELINE, FULL_SIZE, FULL_PCA, GOAL_POINTS = "fp16", (1024, 72, 72), 256, 0.5
AGREEMENTS = ("agreement.box", "agreement.point", "agreement.refine")


def codec_names(teacher: TeacherConfig) -> list[str]:
    """fp16, int8, and the PCA that keeps the share of channels that pca256 keeps of SAM 3's."""
    channels = describe_teacher(teacher).embedding_shape[0]
    return [BASELINE, "int8", f"pca{channels * FULL_PCA // FULL_SIZE[0]}-int8"]


def reconstruction(found: Study, device: str) -> dict[str, dict[str, float]]:
    """Each store's codec on the teacher's features of the held-out scenes: relative L2 error, mean cosine per cell."""
    configs = {name: found.config(name, found.seeds[0]) for name in found.variants}
    parts = EncoderParts(next(iter(configs.values())))
    teacher, source = parts.running(), parts.held_out_source()
    teacher.to(device)
    errors: dict[str, list[float]] = {name: [] for name in configs}
    cosines: dict[str, list[float]] = {name: [] for name in configs}
    for batch, _ in image_loader(ImageDataset(source, parts.transform, source.keys), 8):
        if batch is None:
            continue
        features = teacher.answer(batch, ())[0].cpu()
        valid = batch.valid((features.shape[-2], features.shape[-1]))
        for name, config in configs.items():
            codec = stored_codec(config.store_root)
            assert codec is not None  # the study has just cached it
            again = torch.stack([codec.decode(codec.encode(feature)) for feature in features])
            gap, norm = (again - features).flatten(1).norm(dim=1), features.flatten(1).norm(dim=1)
            errors[name] += (gap / norm).tolist()
            cosines[name] += feature_cosine(again, features, valid).tolist()
    return {
        name: {"relative_l2": statistics.fmean(errors[name]), "cosine": statistics.fmean(cosines[name])}
        for name in configs
    }


def say_bytes(sheet: Sheet, found: Study, shape: tuple[int, int, int], errors: dict[str, dict[str, float]]) -> None:
    """Bytes of a record here and at full size, and what decoding gives back."""
    base, full = record_bytes(BASELINE, shape), record_bytes(BASELINE, FULL_SIZE)
    rows = []
    for name in found.variants:
        size = record_bytes(name, shape)
        error = errors[name]
        rows.append([name, f"{size:,}", f"{size / base:.4f}", f"{error['relative_l2']:.5f}", f"{error['cosine']:.6f}"])
    told = "x".join(map(str, shape))
    columns = ["", "bytes an image", f"x {BASELINE}", "relative L2 error", "cosine"]
    sheet.table(f"the bundled teacher's {told}; decoded against the teacher, held-out scenes", columns, rows)
    rows = []
    for name in (BASELINE, "int8", f"pca{FULL_PCA}-int8"):
        size = record_bytes(name, FULL_SIZE)
        rows.append([name, f"{size:,}", f"{size / full:.4f}"])
    sheet.table("SAM 3 at 1008 px, 1024x72x72 (computed)", ["", "bytes an image", f"x {BASELINE}"], rows)


def say_goal(sheet: Sheet, found: Study) -> dict[str, dict[str, Any]]:
    """Points of agreement lost against fp16, beside how much fp16 itself moves with the seed."""
    verdicts: dict[str, dict[str, Any]] = {}
    sheet.say()
    for measure in AGREEMENTS:
        kind = measure.partition(".")[2]
        own = [100 * value for value in found.values(BASELINE, measure)]
        noise = f"{BASELINE} alone moves by {max(own) - min(own):.2f} points over seeds"
        for name in found.variants:
            if name == BASELINE:
                continue
            gaps = [100 * gap for gap in found.differences(name, BASELINE, measure)]
            mean = statistics.fmean(gaps)
            verdict = "within" if -mean <= GOAL_POINTS else "beyond"
            sheet.say(
                f"{kind:<7}{name}: {mean:+.2f} points ({min(gaps):+.2f} to {max(gaps):+.2f}), {verdict} the goal of "
                f"-{GOAL_POINTS}; {noise}"
            )
            verdicts.setdefault(name, {})[kind] = {"points": gaps, "mean": mean, "reached": verdict == "within"}
    return verdicts


def parse() -> argparse.Namespace:
    parser = study_arguments(__doc__, "cache_codecs")
    parser.add_argument("--codecs", help="which, separated by commas, fp16 among them (fp16, int8 and the PCA)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    device = use_device(args.device)
    teacher = load_config("encoder/sandbox", args.overrides).teacher
    names = args.codecs.split(",") if args.codecs else codec_names(teacher)
    if BASELINE not in names:
        raise SystemExit(f"--codecs: {BASELINE} is what the others are compared with; name it too")
    sheet = Sheet(device)
    found = study(args, {name: [f"cache.codec={name}"] for name in names})
    found.run()
    found.evaluate(device, repeats=0)
    say_study(sheet, found, BASELINE)
    shape = describe_teacher(teacher).embedding_shape
    errors = reconstruction(found, device)
    say_bytes(sheet, found, shape, errors)
    verdicts = say_goal(sheet, found)
    sheet.say()
    sheet.say(
        f"Not measured: the real SAM 3's features. A quarter of its {FULL_SIZE[0]} channels may carry more or less of "
        f"them than a quarter of {shape[0]} does here, and 8 bytes of scale per channel weigh more on a grid of "
        f"{shape[1]} x {shape[2]} than on {FULL_SIZE[1]} x {FULL_SIZE[2]}. Nor longer trainings, other students, or "
        "speed (benchmarks/store_io.py)."
    )
    sizes = {"here": {n: record_bytes(n, shape) for n in names}}
    sizes["full_size"] = {n: record_bytes(n, FULL_SIZE) for n in (BASELINE, "int8", f"pca{FULL_PCA}-int8")}
    sheet.save(args.out, {**found.to_dict(), "bytes": sizes, "reconstruction": errors, "against_fp16": verdicts})


if __name__ == "__main__":
    main()
