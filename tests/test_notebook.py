"""Each exported name used as in a notebook: paths as strings and as ``Path``, points without labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import samdistill as sd
from samdistill.checkpoints.student import load_with_memory
from samdistill.inference.concepts import load_concept_model
from samdistill.jobs.encoder import job as encoder_job
from samdistill.jobs.encoder.config import EncoderRunConfig
from samdistill.sandbox.concepts import VOCABULARY, sandbox_words
from samdistill.sandbox.videos import VideoStyle
from samdistill.sandbox.write import write_coco, write_concept_set
from samdistill.sandbox.write_videos import write_sav
from samdistill.students import EfficientSam3Model, efficient_sam3_config

As = Callable[[Path], str | Path]
TEXT = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "projection_dim": 32}  # fmt: skip


class Notebook:
    """What the cells work on. ``as_`` makes a path of the kind that is tried."""

    def __init__(
        self, as_: As, tmp: Path, world: Path, cached: EncoderRunConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.as_, self.tmp, self.world, self.cached, self.monkeypatch = as_, tmp, world, cached, monkeypatch

    @property
    def photo(self) -> str | Path:
        return self.as_(next((self.world / "images" / "val").glob("*.jpg")))

    def out(self, name: str) -> str | Path:
        return self.as_(self.tmp / name)

    def config(self, *overrides: str) -> Any:
        path = self.tmp / "run.yaml"
        path.write_text(self.cached.to_yaml())
        return sd.load_config(self.as_(path), [f"output={self.tmp / 'run'}", *overrides])

    def detector(self, memory: bool = False) -> str | Path:
        """A random one; what it finds does not matter here."""
        torch.manual_seed(0)
        folder = self.tmp / "detector"
        EfficientSam3Model(efficient_sam3_config("efficientvit_b0", 126, 32, 2, 64, 1, 1, 5, TEXT)).save_pretrained(
            folder
        )
        sandbox_words().save(folder)
        if memory:
            load_with_memory(folder, latents=8, layers=1).save_pretrained(self.tmp / "memory")
            sandbox_words().save(self.as_(self.tmp / "memory"))
            folder = self.tmp / "memory"
        return self.as_(folder)

    def videos(self) -> Path:
        write_sav(self.tmp / "videos", 1, (40, 56), seed=2, split="val", style=VideoStyle(frames=9))
        return self.tmp / "videos"


def prepare(n: Notebook) -> None:
    assert sd.prepare_sa1b(n.as_(n.world), n.out("tree"), 0.5).train > 0


def predict(n: Notebook) -> None:
    for points in ([(40, 40)], [(40, 40, 1)], np.array([[40.0, 40.0]]), [[40, 40], (1, 1, 0)]):
        found = sd.predict(n.photo, "sandbox-sam", points=points, out=n.out("seen.png"))
        assert (found.points[0], len(found)) == ((40.0, 40.0, 1), 1)
    assert (n.tmp / "seen.png").read_bytes()[:4] == b"\x89PNG"
    for wrong in ([(1,)], [(1, 2, 3, 4)], (1, 2), ["ab"]):
        with pytest.raises(sd.UserError, match="points: "):
            sd.predict(n.photo, "sandbox-sam", points=wrong)
    sd.predict(n.photo, n.detector(), text="circle", boxes=np.array([[1, 1, 30, 30]]), out=n.out("b.jpg"))


def predict_video(n: Notebook) -> None:
    film = next((n.videos() / "val").glob("*.mp4"))
    sd.predict_video(n.as_(film), n.detector(memory=True), "circle", frames=2, out=n.out("a.mp4"), progress=False)
    assert (n.tmp / "a.mp4").stat().st_size > 0


def export(n: Notebook) -> None:
    """Without its files, whose conversion takes a minute; see ``tests/deployment``."""
    from samdistill.deployment import folder

    n.monkeypatch.setattr(folder, "parts_of", lambda *_: [])
    found = sd.export(n.detector(), n.out("device"), vocabulary=["circle"], progress=False)
    assert found.folder == n.tmp / "device" and (n.tmp / "device" / "vocabulary.json").is_file()


def evaluate_concepts(n: Notebook) -> None:
    write_coco(n.tmp / "scenes", 2, (60, 90), 3, "val")
    write_concept_set(n.tmp / "scenes", 2, (60, 90), 3)
    data = n.as_(n.tmp / "scenes")
    sd.evaluate_concepts(n.detector(), data, images=1, out=n.out("said.json"), progress=False)
    assert sd.evaluate_concepts(n.out("said.json"), data, teacher=n.out("said.json"), progress=False).rows


def evaluate_masks(n: Notebook) -> None:
    for place in (n.tmp / "found" / "a", n.tmp / "truth" / "Annotations" / "a"):
        place.mkdir(parents=True)
        for frame in range(3):
            Image.fromarray(np.pad(np.ones((4, 4), np.uint8), 4)).save(place / f"{frame:05}.png")
    assert sd.evaluate_masks(n.out("found"), n.out("truth"), progress=False).rows[0].jf == 1


def evaluate_videos(n: Notebook) -> None:
    assert sd.evaluate_videos(n.detector(memory=True), n.as_(n.videos()), videos=1, progress=False).rows


def train(n: Notebook) -> None:
    config = n.config("train.epochs=1", f"cache.root={n.cached.store_root}")
    assert sd.train(config).steps == sd.train(config, resume=n.out("run")).steps == 3


def merge(n: Notebook) -> None:
    sd.StudentTrunk(sd.StudentTrunkConfig(backbone="es_ev_s", hidden_size=192, image_size=126)).save_pretrained(
        n.tmp / "student"
    )
    assert sd.merge(n.out("student"), "sandbox", n.out("merged")).out == str(n.tmp / "merged")
    assert sd.inspect(n.out("merged")).trunk == "student"


def user_error(n: Notebook) -> None:
    with pytest.raises(sd.UserError, match="nowhere"):
        sd.inspect(n.out("nowhere"))


SMALL = ["train.epochs=1", "evaluate.images=2", "data.workers=0", "train.batch_size=8"]


def run(n: Notebook) -> None:
    found = sd.run(n.as_(n.world), "sandbox", "es_ev_s", n.out("run"), overrides=SMALL)
    assert found.report == n.tmp / "run" / "report.html" and found.report.is_file()


def demo(n: Notebook) -> None:
    n.monkeypatch.setattr(
        encoder_job, "render_sandbox", lambda data: sd.render_sandbox(data, train=8, val=2, size=126, progress=False)
    )
    assert sd.demo(n.out("demo"), overrides=SMALL).report == n.tmp / "demo" / "run" / "report.html"


def distill(n: Notebook) -> None:
    found = sd.distill("encoder", n.as_(n.world), teacher="sandbox", student="es_ev_s", out=n.out("d"), overrides=SMALL)
    assert found.report == n.tmp / "d" / "report.html" and "mIoU" in found.summary()


CELLS: dict[str, Callable[[Notebook], Any]] = {
    "EfficientSam3Config": lambda n: sd.EfficientSam3Config().save_pretrained(n.out("config")),
    "EfficientSam3Model": lambda n: sd.EfficientSam3Model.from_pretrained(n.detector()),
    "MobileSamConfig": lambda n: sd.MobileSamConfig().save_pretrained(n.out("config")),
    "MobileSamModel": lambda n: sd.MobileSamModel(sd.MobileSamConfig(image_size=64)).save_pretrained(n.out("mobile")),
    "Model": lambda n: isinstance(sd.load(n.detector()), sd.Model),
    "Result": lambda n: sd.load(n.detector())(n.photo, text="circle", threshold=0.0).save(n.out("r.png")),
    "label_images": lambda n: sd.label_images(n.photo, n.detector(), "circle", n.out("labels"), progress=False),
    "load": lambda n: sd.load(n.detector())(n.photo, text="circle"),
    "distill": distill,
    "StudentTrunk": lambda n: sd.StudentTrunk(sd.StudentTrunkConfig(backbone="es_ev_s", hidden_size=8, image_size=56)),
    "StudentTrunkConfig": lambda n: sd.StudentTrunkConfig(backbone="es_ev_s").save_pretrained(n.out("config")),
    "UserError": user_error,
    "VideoSession": lambda n: sd.VideoSession(load_concept_model(n.detector(memory=True))).add_text("circle"),
    "__version__": lambda n: sd.__version__.split("."),
    "cache": lambda n: sd.cache(n.config(f"cache.root={n.out('store')}"), device="cpu", progress=False),
    "check": lambda n: sd.check(n.config(f"cache.root={n.cached.store_root}"), device="cpu"),
    "demo": demo,
    "export": export,
    "evaluate": lambda n: sd.evaluate("sandbox", n.as_(n.world), images=1, prompts=["box"], progress=False),
    "evaluate_concepts": evaluate_concepts,
    "evaluate_masks": evaluate_masks,
    "evaluate_videos": evaluate_videos,
    "inspect": lambda n: sd.inspect(n.as_(n.cached.store_root)),
    "load_config": lambda n: n.config(),
    "merge": merge,
    "list_models": lambda n: sd.list_models("es_*"),
    "plan": lambda n: sd.plan(n.config()),
    "predict": predict,
    "predict_video": predict_video,
    "prepare_sa1b": prepare,
    "render_sandbox": lambda n: sd.render_sandbox(n.out("scenes"), train=1, val=1, size=40, progress=False),
    "run": run,
    "train": train,
}


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("name", sd.__all__)
def test_a_cell_runs(
    name: str, kind: As, tmp_path: Path, world: Path, cached: EncoderRunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert name in CELLS, f"give {name}, which is exported, a cell"
    if name in ("list_models", "__version__", "StudentTrunk", "Model") and kind is Path:
        return  # takes no path
    CELLS[name](Notebook(kind, tmp_path, world, cached, monkeypatch))


def test_there_is_a_cell_for_what_is_exported_alone() -> None:
    assert set(CELLS) == set(sd.__all__)


@pytest.mark.parametrize("name", [n for n in sd.__all__ if inspect.isfunction(getattr(sd, n))])
def test_no_function_takes_a_path_alone(name: str) -> None:
    """Whatever is annotated with ``Path`` takes a string too."""
    for parameter in inspect.signature(getattr(sd, name)).parameters.values():
        kinds = {part.strip() for part in str(parameter.annotation).split("|")}
        assert "Path" not in kinds or "str" in kinds, f"{name}({parameter.name})"
