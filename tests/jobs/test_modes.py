"""A running teacher and its cache teach the same: each job's terms and gradients, its resume, and what is refused."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_jobs import task_of
from torch import Tensor

from samdistill.cli import main
from samdistill.config import Run
from samdistill.engine import Checkpoint, Interrupted, fit
from samdistill.engine.task import Phase, Task
from samdistill.pipeline import cache, plan

CODEC, RUNS = "cache.codec=fp32", ("cache.mode=online",)
TRUNK = "train.phases=[{name: trunk, epochs: 2, lr: 1e-3, terms: [trunk]}, {name: all, epochs: 1, lr: 1e-3}]"
PYRAMID = "train.phases=[{name: align, epochs: 2, lr: 1e-3, terms: [fpn]}, {name: all, epochs: 1, lr: 1e-3}]"
MEMORY = (
    "student.memory.level=3",
    "train.phases=[{name: align, epochs: 1, lr: 1e-3, terms: [align]}, {name: memory, epochs: 1, lr: 1e-3, terms: "
    "[mask, box_l1, giou, iou, presence, select]}]",
    "clips.own=[0.0, 0.5]",
)
JOBS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "encoder": (("data.views=2", "data.augment.flip=0.5"), (), RUNS),
    "detection": ((PYRAMID, "data.views=2", "data.augment.flip=0.5"), ("cache.mode=stored",), RUNS),
    "hosted": ((TRUNK, "data.views=2", "data.augment.flip=0.5"), ("cache.mode=stored",), RUNS),
    "prompt": (("data.views=2", "data.augment.flip=0.5"), ("distillation.use_precomputed_features=true",), ()),
    "video": (MEMORY, (), RUNS),
    "text": (("data.hard=0.5",), (), RUNS),
}
"""Settings of both runs, of the cached one, and of the one whose teacher runs."""
Pair = Callable[[str], tuple[Run, Run]]


@pytest.fixture(scope="module")
def pair(recipe, detection, hosted, prompted, video, text, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """pair(job): a run with its cache, and the same run online."""
    recipes = {
        "encoder": recipe, "detection": detection, "hosted": hosted, "prompt": prompted, "video": video, "text": text
    }  # fmt: skip
    made: dict[str, tuple[Run, Run]] = {}

    def of(job: str) -> tuple[Run, Run]:
        if job not in made:
            both, stored, online = JOBS[job]
            output = tmp_path_factory.mktemp(job)
            made[job] = (recipes[job](output, *both, *stored, CODEC), recipes[job](output, *both, *online))
            cache(made[job][0], device="cpu", progress=False)
        return made[job]

    return of


def step(task: Task[Any], epoch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values of the terms of four items of an epoch, and the gradients of their sum."""
    torch.manual_seed(0)
    student, data = task.build_student().train(), task.dataset(epoch)
    phase = Phase.of(task.config.train, epoch)
    batch = task.to(task.collate([data[i] for i in range(4)], phase), torch.device("cpu"))
    terms = task.terms(student, batch, phase)
    terms.total.backward()
    grads = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return {name: term.value.detach() for name, term in terms.items()}, grads


@pytest.mark.parametrize("job", JOBS)
def test_terms_and_gradients_are_the_same_from_a_cache_and_from_a_running_teacher(pair: Pair, job: str) -> None:
    """Float32 records. The cache asks the teacher about other batches, which moves last bits."""
    tasks = [task_of(config) for config in pair(job)]
    assert tasks[0].taught_by and (job == "prompt" or tasks[0].taught_by == tasks[1].taught_by)
    for epoch in (0, 1):
        (values, grads), (others, slopes) = (step(task, epoch) for task in tasks)
        assert list(values) == list(others) and list(grads) == list(slopes) and grads
        for name, value in values.items():
            torch.testing.assert_close(value, others[name], rtol=1e-5, atol=1e-6)
        whole = torch.cat([grad.flatten() for grad in grads.values()])
        other = torch.cat([grad.flatten() for grad in slopes.values()])
        assert (whole - other).norm() <= 1e-4 * other.norm() and other.norm() > 0


def killed(task: Task[Any], number: int) -> Task[Any]:
    """The task, which sends its process a signal while computing that batch."""
    terms, seen = task.terms, [0]

    def counted(*args: Any) -> Any:
        seen[0] += 1
        if seen[0] == number:
            os.kill(os.getpid(), signal.SIGINT)
        return terms(*args)

    task.terms = counted  # type: ignore[method-assign]
    return task


@pytest.mark.parametrize("job", ["encoder", "video", "text"])
def test_a_run_with_its_teacher_goes_on_bit_for_bit_and_with_no_other(pair: Pair, job: str, tmp_path: Path) -> None:
    config = pair(job)[1]
    train = config.train.model_copy(update={"batch_size": 4} | ({"epochs": 1} if job == "encoder" else {}))
    whole, run, text = tmp_path / "whole", tmp_path / "run", config.to_yaml()
    steps = fit(task_of(config), train, whole, workers=0, resolved=text).steps
    with pytest.raises(Interrupted) as stop:
        fit(killed(task_of(config), 3), train, run, workers=0, resolved=text)
    assert 3 == Checkpoint.load(stop.value.checkpoint).step < steps
    good = Checkpoint.load(stop.value.checkpoint)
    task = task_of(config)
    assert good.teacher == task.taught_by
    task.taught_by = "f" * 64
    with pytest.raises(Exception, match=r"ckpt_\w+\.pt: trained with the teacher .*, but this is ffffffffffff"):
        fit(task, train, run, workers=0, resolved=text)
    fit(task_of(config), train, run, workers=0, resolved=text)
    one, other = (sorted(folder.glob("ckpt_epoch_*.pt"))[-1] for folder in (whole, run))
    ends = [Checkpoint.load(path) for path in (one, other)]
    assert ends[0].terms == ends[1].terms and ends[0].step == ends[1].step == steps
    assert all(torch.equal(value, ends[1].model[name]) for name, value in ends[0].model.items())
    teacher = getattr(task_of(config), "signals", None)
    assert teacher is None or not any("teacher" in name for name in ends[0].model)


@pytest.mark.parametrize("job", ["encoder", "detection", "hosted", "video", "text"])
def test_online_nothing_is_cached_and_every_verb_says_so(
    pair: Pair, job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored, online = pair(job)
    assert plan(online).cache_bytes == 0 < plan(stored).cache_bytes  # type: ignore[attr-defined]
    assert "0 B: the teacher runs while the student trains" in plan(online).facts()["cache"]
    assert plan(stored).to_dict()["online"] is False
    path = tmp_path / "run.yaml"
    path.write_text(online.to_yaml())
    assert main(["cache", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cache.mode=online: the teacher runs" in said and "set cache.mode=stored" in said
    assert main(["train", str(path), "cache.mode=stored", f"cache.root={tmp_path / 'none'}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "here; run `samdistill cache` with this config first" in said


def test_a_cache_of_a_pyramid_is_held_against_teacher_data_and_phases(
    pair: Pair, detection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored, _ = pair("detection")
    path = tmp_path / "run.yaml"
    path.write_text(stored.to_yaml())
    words = ["train", str(path), f"output={tmp_path}", f"cache.root={stored.store_root}"]  # type: ignore[attr-defined]
    for change, problem in (
        ("data.views=3", "16 of 48 views are not cached"),
        ("cache.codec=fp16", "codec: stored fp32, wanted fp16"),
        ("teacher.precision=bf16", "teacher: stored"),
        ("data.geometry=longest_side", "transform: stored"),
        ("train.phases=null", "only a phase of fpn or of trunk alone learns from a cache, and train.phases has none"),
    ):
        assert main([*words, change]) == 2
        said = capsys.readouterr().err
        assert problem in said and said.count("\n") == 1, said


def test_the_prompt_jobs_switch_is_the_published_one(prompted, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"cache.*distillation\.use_precomputed_features says whether"):
        prompted(tmp_path, "cache.mode=online")
