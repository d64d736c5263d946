"""Images per second of samdistill's loader and of a plain PIL and torchvision pipeline on the same JPEGs.

    python benchmarks/loader.py [--images DIR] [--size 1008] [--workers 2] [--out benchmarks/results/loader.txt]

Both decode with Pillow, crop, flip, jitter colours and resize to the same square. The plain pipeline is the one of most
training scripts: RandomResizedCrop, RandomHorizontalFlip, ColorJitter, ToTensor, Normalize. It is also measured with
PILToTensor in place of ToTensor and Normalize, which shows the gain of transferring uint8 separately. The pipelines
take turns. The order is reversed in every other repeat, and the first round is not counted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from common import Sheet, arguments, use_device
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from samdistill.config import AugmentConfig
from samdistill.data import FolderSource, Geometry, ImageDataset, ViewTransform, image_loader
from samdistill.sandbox.write import write_sa1b

JITTER, SCALE = 0.4, (0.5, 1.0)
COLUMNS = ["pipeline", "images/s, median", "min", "max", "samdistill is"]


class PlainDataset(Dataset[torch.Tensor]):
    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


def plain(size: int, augment: bool, floats: bool) -> Callable[[Image.Image], torch.Tensor]:
    steps: list[Callable] = [transforms.Resize((size, size))]
    if augment:
        steps = [
            transforms.RandomResizedCrop(size, scale=SCALE),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(JITTER, JITTER, JITTER, 0.1),
        ]
    to_tensor = [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    return transforms.Compose([*steps, *(to_tensor if floats else [transforms.PILToTensor()])])


def loaders(source: FolderSource, keys: list[str], size: int, augment: bool, batch: int, workers: int) -> dict:
    on = {"flip": 0.5, "crop_scale": SCALE, "brightness": JITTER, "contrast": JITTER, "saturation": JITTER, "hue": 0.1}
    config = AugmentConfig.model_validate(on if augment else {})
    ours = ImageDataset(source, ViewTransform(Geometry(size), config), keys)
    paths = [source.path(key) for key in keys]
    plain_loaders = {
        name: DataLoader(PlainDataset(paths, plain(size, augment, floats)), batch, num_workers=workers,
                         persistent_workers=workers > 0)
        for name, floats in (("plain, uint8", False), ("plain, float32", True))
    }  # fmt: skip
    return {"samdistill": image_loader(ours, batch, workers), **plain_loaders}


def drain(loader: Iterable[object], images: int) -> float:
    """Images a second of one pass."""
    start = time.perf_counter()
    for _ in loader:
        pass
    return images / (time.perf_counter() - start)


def measure(contenders: dict[str, Iterable[object]], images: int, repeats: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        names = list(contenders) if turn % 2 else list(reversed(contenders))
        for name in names:
            rate = drain(contenders[name], images)
            if turn > 0:  # the first round starts the workers and fills the disk cache
                rates[name].append(rate)
    return rates


def rows(rates: dict[str, list[float]]) -> list[list[str]]:
    ours = rates["samdistill"]
    found = []
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(ours, values, strict=True))
        found.append(
            [name, *(f"{v:.1f}" for v in (statistics.median(values), min(values), max(values))), f"{ratio:.2f}x"]
        )
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=Path, help="a folder of JPEGs; default: rendered ones of 512 px")
    parser.add_argument("--size", type=int, default=1008, help="side of the canvas in pixels")
    parser.add_argument("--count", type=int, default=256, help="images a pass; a smaller folder is gone through again")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    sheet = Sheet(use_device(args.device))
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = args.images
        if root is None:
            write_sa1b(Path(temporary), min(args.count, 64), 512, seed=1)
            root = Path(temporary) / "images/train"
        source = FolderSource(root)
        if not source.keys:
            parser.error(f"{root}: no images")
        keys = [source.keys[i % len(source.keys)] for i in range(args.count)]
        for augment, name in ((False, "decode + resize"), (True, "decode + crop + flip + colour jitter + resize")):
            contenders = loaders(source, keys, args.size, augment, args.batch, args.workers)
            what = "rendered JPEGs of 512 px" if args.images is None else f"{len(source.keys)} files of {root.name}"
            title = (
                f"{name} to {args.size} px: {args.count} images a pass ({what}), {args.workers} workers, batch "
                f"{args.batch}, {args.repeats} repeats"
            )
            figures[name] = measure(contenders, args.count, args.repeats)
            sheet.table(title, COLUMNS, rows(figures[name]))
    sheet.save(args.out, {"images_per_second": figures})


if __name__ == "__main__":
    main()
