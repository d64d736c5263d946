"""Draw the picture of the README: rendered scenes with the instances found by the bundled teacher and student.

``python tools/readme_picture.py`` writes ``docs/images/teacher_student.png``; ``--out`` names another file. Both models
get every colour of a scene as a phrase. Neither model was trained on the scenes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from samdistill.inference.concepts import ConceptModel, ask_image, load_concept_model
from samdistill.inference.drawing import draw_instances
from samdistill.sandbox.scenes import COLOURS, render_scenes

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "teacher_student.png"
WORLD, SCENES, SIDE = 12, (4, 5), 300
"""The bundled teacher was trained on world 1 and the bundled student on world 10."""
GAP, HEADER, THRESHOLD = 8, 26, 0.5


def scenes() -> list[tuple[Image.Image, list[str]]]:
    """Return the images, and the colours of the visible objects of each."""
    rendered = render_scenes(SCENES, SIDE, WORLD)
    found = []
    for image, names, valid in zip(rendered.images, rendered.concepts, rendered.valid, strict=True):
        pixels = image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)
        there = {word for slot, shown in zip(names, valid.tolist(), strict=True) if shown for word in slot}
        colours = [colour for colour in COLOURS if colour in there]
        found.append((Image.fromarray(pixels.permute(1, 2, 0).numpy()), colours))
    return found


def answers(model: ConceptModel, image: Image.Image, phrases: Sequence[str]) -> Image.Image:
    """Draw every instance that ``model`` finds for the phrases, with its phrase and score."""
    masks, boxes, labels = [], [], []
    for phrase in phrases:
        found = ask_image(model, image, phrase, threshold=THRESHOLD)
        masks.append(found.masks)
        boxes.append(found.boxes)
        labels += [f"{phrase} {score:.2f}" for score in found.scores.tolist()]
    return Image.fromarray(draw_instances(np.asarray(image), torch.cat(masks), torch.cat(boxes), labels))


def draw() -> Image.Image:
    """Compose a row per scene: image, teacher, student."""
    models = {"teacher": load_concept_model("sandbox"), "student": load_concept_model("sandbox-student")}
    sizes = {name: sum(p.numel() for p in model.model.parameters()) / 1e6 for name, model in models.items()}
    titles = ["image", *(f"{name}, {size:.1f}M parameters" for name, size in sizes.items())]
    width = len(titles) * SIDE + (len(titles) - 1) * GAP
    sheet = Image.new("RGB", (width, HEADER + len(SCENES) * SIDE + (len(SCENES) - 1) * GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, title in enumerate(titles):
        pen.text((column * (SIDE + GAP) + SIDE / 2, HEADER / 2), title, fill="black", font=font, anchor="mm")
    for row, (image, phrases) in enumerate(scenes()):
        panels = [image, *(answers(model, image, phrases) for model in models.values())]
        for column, panel in enumerate(panels):
            sheet.paste(panel, (column * (SIDE + GAP), HEADER + row * (SIDE + GAP)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PICTURE)
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    draw().quantize(192, dither=Image.Dither.NONE).save(out, optimize=True)
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
