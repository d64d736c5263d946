"""A small job for the engine's tests; as a script, a command that tests can interrupt and kill.

python toy_task.py RUN [--nproc N] [key=value ...] [--then RUN [key=value ...]]
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from samdistill.config import TrainConfig
from samdistill.engine import fit, is_worker, launch, leave
from samdistill.engine.task import Phase, Task
from samdistill.processes import end_with_parent
from samdistill.types import ImageBatch, Term, Terms, UserError

SIZE, SCALE = 8, 255.0


class Noise(Dataset):
    def __init__(self, items: int, view: int, delay: float) -> None:
        self.items, self.view, self.delay, self.read = items, view, delay, []

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor]:
        self.read.append(index)
        time.sleep(self.delay)
        generator = torch.Generator().manual_seed(index * 10 + self.view)
        return str(index), torch.randint(0, 256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)


class Seldom(nn.Module):
    """``main``, and ``extra`` for the images it is told of: a batch without any leaves its parameters out."""

    def __init__(self, main: nn.Module) -> None:
        super().__init__()
        self.main, self.extra = main, nn.Conv2d(3, 4, 1)

    def forward(self, images: torch.Tensor, some: Sequence[int] = ()) -> torch.Tensor:
        out = self.main(images)
        return out.index_add(0, torch.tensor(some), self.extra(images[list(some)])) if some else out


@dataclass
class ToyTask(Task[ImageBatch]):
    """Match a fixed convolution. ``broken``: a fault to be caught; ``at``: the batch at which it shows.

    ``leaves_unused``: one image in six needs a branch of its own.
    """

    items: int = 22
    norm: str = "batch"
    dropout: float = 0.3
    delay: float = 0.0
    broken: str = ""
    at: int = 3
    leaves_unused: bool = False

    def build_student(self) -> nn.Module:
        norm = nn.BatchNorm2d(8) if self.norm == "batch" else nn.GroupNorm(2, 8)
        first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        main = nn.Sequential(first, norm, nn.ReLU(), nn.Dropout(self.dropout), nn.Conv2d(8, 4, 1))
        return Seldom(main) if self.leaves_unused else main

    def dataset(self, epoch: int) -> Noise:
        self.data = Noise(self.items, epoch % 2, self.delay)
        return self.data

    def collate(self, items, phase: Phase = Phase()):
        return ImageBatch.full(torch.stack([image for _, image in items]), tuple(key for key, _ in items))

    def to(self, batch: ImageBatch, device: torch.device) -> ImageBatch:
        return batch.to(device)

    def terms(self, student: nn.Module, batch: ImageBatch, phase: Phase = Phase()) -> Terms:
        self.seen = getattr(self, "seen", 0) + 1
        self.on_batch()
        images = batch.images.float() / SCALE
        weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(5)).to(images.device)
        some = ([number for number, key in enumerate(batch.keys) if int(key) % 6 == 0],) if self.leaves_unused else ()
        target, out = F.conv2d(images, weight, padding=1), student(images, *some)
        if self.broken == "detached":
            out = out.detach()
        mse, cosine = F.mse_loss(out, target), (1 - F.cosine_similarity(out, target)).mean()
        if self.broken == "nan" and self.seen > self.at:
            cosine = cosine * float("nan")
        if self.broken == "gradient" and self.seen > self.at:  # finite value, infinite slope
            mse = mse + (out - out.detach()).abs().sum().sqrt()
        return Terms({"mse": Term(mse, 1.0), "cosine": Term(cosine, 0.0 if self.broken == "weight" else 0.5)})

    def on_batch(self) -> None:
        if self.broken == "rank1" and int(os.environ.get("RANK", 0)) == 1 and self.seen > self.at:
            raise UserError("image 7 cannot be read")

    def validate(self, student: nn.Module, phase: Phase = Phase()) -> dict[str, float]:
        assert not student.training
        torch.rand(3)  # draws that must not disturb the training
        images = torch.stack([self.data[i][1] for i in range(2)]).float() / SCALE
        with torch.no_grad():
            return {"mean": student(images.to(next(student.parameters()).device)).mean().item()}


class StopAt(ToyTask):
    """Sends itself a signal while computing the given batch."""

    def on_batch(self):
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def toy_config(**changes: object) -> TrainConfig:
    defaults: dict[str, object] = {"batch_size": 4, "lr_batch": None, "log_every": 1}
    if changes.get("phases") is None:
        defaults |= {"epochs": 3, "lr": 1e-2, "warmup_epochs": 0.4}
    return TrainConfig.model_validate(defaults | changes)


def toy_yaml(config: TrainConfig) -> str:
    return yaml.safe_dump({"output": "anywhere", "data": {"workers": 0}, "train": config.model_dump(mode="json")})


def main(argv: list[str]) -> int:
    run, nproc = Path(argv[0]), int(argv[argv.index("--nproc") + 1]) if "--nproc" in argv else 1
    if nproc > 1 and not is_worker():
        return launch(nproc, argv, program=(str(Path(__file__).resolve()),))
    if "--then" in argv:  # one start for several runs
        at = argv.index("--then")
        return main(argv[:at]) or main(argv[at + 1 :])
    given = {key: yaml.safe_load(value) for key, _, value in (a.partition("=") for a in argv) if value}
    names = {f.name for f in fields(ToyTask)}
    config = toy_config(**{k: v for k, v in given.items() if k not in names | {"workers"}})
    task = ToyTask(**{k: v for k, v in given.items() if k in names})
    fit(task, config, run, None, given.get("workers", 0), toy_yaml(config))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    end_with_parent()  # ranks with their launcher, and the launcher with the tests
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        leave()
