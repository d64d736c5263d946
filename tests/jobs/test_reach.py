"""``check`` proves what it says: cut the student off behind one term, and that term fails, of every job.

The tables below say where the student's tensors enter each loss term of each job. A term that is in none fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from tiny_jobs import task_of
from torch import Tensor

from samdistill.engine import check_terms
from samdistill.engine.task import Task
from samdistill.jobs import JOBS
from samdistill.jobs.detection import task as detection_task
from samdistill.jobs.detection.label_terms import LABEL_TERMS, Labelled
from samdistill.jobs.detection.losses import FEATURE_TERMS, OUTPUT_TERMS, Compared
from samdistill.jobs.encoder.losses import FEATURE_LOSSES
from samdistill.jobs.prompt import losses as prompt_losses
from samdistill.jobs.text.losses import TEXT_TERMS
from samdistill.jobs.video.losses import ALIGN_TERMS, MEMORY_TERMS, Annotated

TABLES = {
    "encoder": (FEATURE_LOSSES,), "detection": (OUTPUT_TERMS, FEATURE_TERMS, LABEL_TERMS), "prompt": (),
    "video": (MEMORY_TERMS, ALIGN_TERMS), "text": (TEXT_TERMS,), "hosted": (FEATURE_TERMS,),
}  # fmt: skip
"""Where the terms of a job are declared, as functions whose first argument is, or has, the student's tensors."""
FUNCTIONS = {
    "detection": {"fpn": (detection_task, "fpn_term")},  # of a phase that asks no question
    "hosted": {"trunk": (detection_task, "fpn_term")},
    "prompt": {
        **{name: (prompt_losses, "task_terms") for name in prompt_losses.TASK_TERMS.weights},
        "prompt_embed": (prompt_losses, "prompt_embed"), "decoder_mask_token": (prompt_losses, "mask_token"),
        "dense_mask_logits": (prompt_losses, "dense_masks"),
    },
}  # fmt: skip
"""Functions that tasks call by name: one value, or values by name, from the student's tensors, which come first."""
OPTIONAL = ("loss.presence_bce=1.0", *(f"loss.{name}={weight}" for name, weight in LABEL_TERMS.published.items()))
NAMED = {job: OPTIONAL for job in ("detection", "hosted")}
"""Weights of terms that no run has by default."""
ADAPTED = {("prompt", "encoder_patch")}
"""Terms of tensors that go through a layer which is not exported: they are cut before it."""
WHOLE = {job: set(run.config.term_names()) for job, run in JOBS.items()}
WHOLE["hosted"] = set(WHOLE["detection"])
WHOLE["detection"].remove("trunk")  # only a hosted student has it
TERMS = [*((job, term) for job in JOBS for term in sorted(WHOLE[job])), ("hosted", "trunk")]


def cut(value: Any) -> Any:
    """The same without a graph, however deep."""
    if value is None or isinstance(value, Tensor):
        return None if value is None else value.detach()
    if isinstance(value, tuple | list):
        return type(value)(map(cut, value))
    if isinstance(value, Compared | Annotated | Labelled):
        return replace(value, student=cut(value.student))
    return replace(value, **{f.name: cut(getattr(value, f.name)) for f in fields(value)})


def cut_off(loss: Callable[..., Any], term: str) -> Callable[..., Any]:
    """``loss`` with the student detached behind ``term`` alone. Of ``task_terms`` the student gives two arguments."""
    ours = 2 if loss is prompt_losses.task_terms else 1

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        without = loss(*map(cut, args[:ours]), *args[ours:], **kwargs)
        return without if isinstance(without, Tensor) else loss(*args, **kwargs) | {term: without[term]}

    return wrapped


@pytest.fixture(scope="module")
def tasks(tiny_job, tmp_path_factory) -> Callable[[str], Task[Any]]:
    made: dict[str, Task[Any]] = {}

    def get(job: str) -> Task[Any]:
        if job not in made:
            made[job] = task_of(tiny_job(job, tmp_path_factory.mktemp(job), *NAMED.get(job, ())))
        return made[job]

    return get


def report_of(task: Task[Any]):
    return check_terms(task, "cpu", 2, train=task.config.train)


@pytest.mark.parametrize("job", WHOLE)
def test_every_term_of_the_job_reaches_what_is_exported(tasks, job) -> None:
    report = report_of(tasks(job))
    assert report.ok, report.problems
    assert {term.name.partition("/")[0] for term in report.terms} == WHOLE[job]


@pytest.mark.parametrize(("job", "term"), TERMS)
def test_a_term_whose_student_is_detached_fails_and_no_other_does(tasks, job, term, monkeypatch) -> None:
    task = tasks(job)
    if (job, term) in ADAPTED:
        build = type(task).build_student

        def detached(self):
            student = build(self)
            for adapter in student.adapters:
                adapter.register_forward_pre_hook(lambda module, args: cut(args))
            return student

        monkeypatch.setattr(type(task), "build_student", detached)
    else:
        for table in TABLES[job]:
            if term in table:
                monkeypatch.setitem(table._entries, term, cut_off(table.get(term), term))
        if term in FUNCTIONS.get(job, {}):
            module, name = FUNCTIONS[job][term]
            monkeypatch.setattr(module, name, cut_off(getattr(module, name), term))
    report = report_of(task)
    failed = [row for row in report.terms if row.problem is not None]
    assert failed == [row for row in report.terms if row.name.partition("/")[0] == term]
    assert all("detached from the exported model" in str(row.problem) and row.value > 0 for row in failed)
