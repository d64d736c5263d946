import os
import pickle
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from samdistill.engine import state
from samdistill.engine.state import Checkpoint, Ema
from samdistill.types import UserError

CPU = torch.device("cpu")


def checkpoint(step=1, size=4):
    weights = {"w": torch.arange(size, dtype=torch.float32)}
    return Checkpoint(step, 0, weights, None, {}, None, [state.capture_rng(CPU)], "a: 1", 10, {"mse": 0.5}, 1.0)


def draw():
    return random.random(), np.random.rand(), np.random.randn(), random.gauss(0, 1), torch.rand(3).tolist()


def test_random_streams_go_on_where_they_were_saved(tmp_path):
    state.seed_rng(5)
    np.random.randn(), random.gauss(0, 1)  # leave a cached second normal in both generators
    checkpoint().save(tmp_path / "c.pt")
    expected = draw()
    state.seed_rng(9)
    state.restore_rng(Checkpoint.load(tmp_path / "c.pt").rng[0], CPU)
    assert draw() == expected


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"step": Bomb()}, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    for name in ("zip.pt", "bare.pt"):
        with pytest.raises(UserError, match=name):
            Checkpoint.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_torn_or_foreign_or_missing_file_is_named(tmp_path):
    checkpoint().save(tmp_path / "a.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:-300])
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    for name in ("torn.pt", "foreign.pt", "missing.pt"):
        with pytest.raises(UserError, match=name):
            Checkpoint.load(tmp_path / name)


@pytest.mark.parametrize("size", [4, 4_000_000])
def test_full_disk_keeps_the_last_good_checkpoint(tmp_path, size):
    checkpoint(step=1).save(tmp_path / "ckpt_epoch_1.pt")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if size == 4 else 1_000_000, before[1]))
    try:
        with pytest.raises(UserError) as error:
            checkpoint(step=2, size=size).save(tmp_path / "ckpt_epoch_2.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "ckpt_epoch_2.pt" in str(error.value) and "ckpt_epoch_1.pt" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt_epoch_1.pt"]
    assert Checkpoint.load(tmp_path / "ckpt_epoch_1.pt").step == 1


def test_newest_counts_steps_and_prune_keeps_the_last(tmp_path):
    assert state.newest(tmp_path) is None
    for epoch in (2, 9, 10):
        checkpoint(step=epoch * 5).save(tmp_path / f"ckpt_epoch_{epoch}.pt")
    assert state.newest(tmp_path).name == "ckpt_epoch_10.pt", "ten is after nine"
    checkpoint(step=49).save(tmp_path / state.INTERRUPT)
    assert state.newest(tmp_path).name == "ckpt_epoch_10.pt"
    checkpoint(step=51).save(tmp_path / state.INTERRUPT)
    assert state.newest(tmp_path).name == state.INTERRUPT
    state.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt_epoch_10.pt", "ckpt_epoch_9.pt"]


def test_changed_keys_names_what_matters_and_ignores_what_does_not():
    old = "output: a\ndata: {root: x, workers: 2}\ntrain: {seed: 0, keep: 3}\nevaluate: {images: 4}"
    new = "output: b\ndata: {root: x, workers: 9}\ntrain: {seed: 1, keep: 1, lr: 2}\nevaluate: {images: 5}"
    assert state.changed_keys(old, new) == ["train.lr (was absent, now 2)", "train.seed (was 0, now 1)"]
    assert state.changed_keys(old, old) == []


def test_harmless_keys_exist_in_the_config():
    from samdistill.config import RunConfig

    for key in state.HARMLESS:
        model = RunConfig
        for part in key.split("."):
            assert part in model.model_fields
            model = model.model_fields[part].annotation


def test_ema_follows_its_formula_skips_frozen_and_gives_the_weights_back():
    student = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    student[0].bias.requires_grad_(False)
    ema = Ema(student, 0.5)
    expected = student[0].weight.detach().double().clone()
    for step in range(20):
        with torch.no_grad():
            student[0].weight.add_(1.0)
        student(torch.randn(4, 2))
        ema.update(student, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * student[0].weight.detach().double()
    assert torch.allclose(ema.shadow["0.weight"].double(), expected, atol=1e-5)
    assert "0.bias" not in ema.shadow and ema.shadow["1.num_batches_tracked"] == 20
    raw = {name: value.clone() for name, value in student.state_dict().items()}
    with ema.applied(student):
        assert torch.equal(student[0].weight, ema.shadow["0.weight"])
        assert torch.equal(student[1].running_mean, ema.shadow["1.running_mean"])
    assert all(torch.equal(value, raw[name]) for name, value in student.state_dict().items())


def test_on_main_and_gather_work_alone():
    assert state.on_main(lambda: 3) == 3 and state.gather(Path("a")) == [Path("a")]

    def fail():
        raise UserError("no")

    with pytest.raises(UserError, match=r"^no$"):
        state.on_main(fail)
