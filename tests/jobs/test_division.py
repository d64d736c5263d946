"""How a global batch is divided, over ranks and over micro-batches, changes no result, of any job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_runs import SHARES, norm_batch, norm_layer, norm_step
from tiny_jobs import task_of

from samdistill.engine import Checkpoint, fit, read_lines
from samdistill.engine.schedule import GlobalBatches, Shard
from samdistill.engine.task import Phase, Task
from samdistill.jobs import JOBS

EXACT = ("train.eps=1e-3", "train.clip_norm=1.0", "train.precision=fp32")
"""Adam divides by the size of a gradient: with a small eps it would make steps of rounding errors."""


def run(task: Task[Any], output: Path, **changes: object) -> None:
    train = task.config.train.model_copy(update=changes)
    fit(task, train, output, workers=0, resolved=task.config.to_yaml())


def assert_same_runs(task: Task[Any], first: Path, second: Path) -> None:
    """Terms and gradient norm of each step; statistics at the end, and the weights as far as they have moved."""
    one, two = ([line for line in read_lines(run / "metrics.jsonl") if "terms" in line] for run in (first, second))
    assert len(one) == len(two) >= 2
    for a, b in zip(one, two, strict=True):
        assert a["terms"] == pytest.approx(b["terms"], rel=1e-3, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    name = max(path.name for path in first.glob("ckpt_epoch_*.pt"))
    one, two = (Checkpoint.load(run / name).model for run in (first, second))
    torch.manual_seed(task.config.train.seed)
    student = task.build_student()
    weights = [key for key, parameter in student.named_parameters() if parameter.requires_grad]
    before, one_end, two_end = (torch.cat([state[key].flatten() for key in weights])
                                for state in (student.state_dict(), one, two))  # fmt: skip
    moved = (one_end - before).norm()
    assert moved > 0 and (one_end - two_end).norm() < 0.02 * moved
    for key in one.keys() - set(weights):
        assert torch.allclose(one[key].float(), two[key].float(), rtol=1e-2, atol=1e-3), key


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


UNEQUAL = {"video": "mask", "detection": "label_dice"}
"""A term of each job whose parts have different numbers of units."""


def counts_of(task: Task[Any], name: str, accumulate: int, world: int) -> list[list[int]]:
    """Units of a term in each part of each step of the last epoch."""
    train = task.config.train
    phase = Phase.of(train, train.total_epochs - 1)
    data, found = task.dataset(phase.epoch), []
    shards = [Shard(train.batch_size, accumulate, rank, world) for rank in range(world)]
    parts = [list(GlobalBatches(len(data), shard, 0, phase.epoch)) for shard in shards]
    for first in range(0, len(parts[0]), accumulate):
        rows = [own[first + micro] for own in parts for micro in range(accumulate)]
        found.append([task.counts(task.collate([data[i] for i in row], phase))[name] for row in rows])
    return found


@pytest.mark.parametrize(
    ("job", "overrides"),
    [*((job, ()) for job in JOBS),
     ("prompt", ("prompts.mode=everything", "prompts.grid_points=1", "prompts.objects=1", "prompts.rounds=0"))],
    ids=[*JOBS, "prompt-everything"],
)  # fmt: skip
def test_micro_batches_give_what_one_batch_gives_with_frozen_statistics(tiny_job, tmp_path, job, overrides) -> None:
    task = task_of(tiny_job(job, tmp_path, *EXACT, "train.batch_norm=frozen", *overrides))
    for parts in (1, 4):
        run(task, tmp_path / str(parts), accumulate=parts)
    assert_same_runs(task, tmp_path / "1", tmp_path / "4")
    name = next(iter(task.counts(task.collate([task.dataset(0)[0]])))) if overrides else UNEQUAL.get(job)
    if name is not None:
        unequal = any(len(set(step)) > 1 for step in counts_of(task, name, 4, 1))
        assert unequal, "every part weighs the same, and the test proves nothing"


@pytest.fixture(scope="module")
def ranks(tiny_job, tmp_path_factory) -> Path:
    """One process and two ranks of every job, batch norm on the statistics of the batch."""
    folder = tmp_path_factory.mktemp("ranks")
    for job in JOBS:
        config = tiny_job(job, folder / f"{job}-two", *EXACT)
        (folder / f"{job}.yaml").write_text(config.to_yaml())
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("rank_runs.py")
    ran = subprocess.run([sys.executable, script, folder], env=env, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.mark.parametrize("job", JOBS)
def test_two_ranks_train_like_one_process(ranks, tiny_job, job) -> None:
    task = task_of(tiny_job(job, ranks / f"{job}-one", *EXACT))
    run(task, ranks / f"{job}-one")
    assert_same_runs(task, ranks / f"{job}-one", ranks / f"{job}-two")
    if job in UNEQUAL:
        unequal = any(len(set(step)) > 1 for step in counts_of(task, UNEQUAL[job], 1, 2))
        assert unequal, "every rank weighs the same, and the test proves nothing"


@pytest.mark.parametrize("kind", SHARES)
def test_batch_norm_over_ranks_of_unequal_shares_is_that_of_the_whole_batch(ranks, kind) -> None:
    """Against torch's and timm's layer on one process: output, gradients and running statistics."""
    whole = norm_step(norm_layer(kind).train(), norm_batch(kind))
    one, two = (torch.load(ranks / f"norm{rank}.pt")[kind] for rank in range(2))
    for name in ("out", "dx"):
        assert torch.allclose(torch.cat([one[name], two[name]]), whole[name], atol=1e-5), name
    for name in ("d weight", "d bias"):
        assert torch.allclose(one[name] + two[name], whole[name], atol=1e-4), name
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(one[name], two[name]) and torch.allclose(one[name], whole[name], atol=1e-5), name
