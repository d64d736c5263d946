import os
import pickle
import random
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from samdistill.engine import rng, state
from samdistill.engine.state import Checkpoint, Ema
from samdistill.types import UserError

CPU = torch.device("cpu")


def checkpoint(step=1, size=4):
    weights = {"w": torch.arange(size, dtype=torch.float32)}
    return Checkpoint(step, 0, weights, None, {}, None, [rng.capture_rng(CPU)], "a: 1", 10, {"mse": 0.5}, 1.0)


def draw():
    return random.random(), np.random.rand(), np.random.randn(), random.gauss(0, 1), torch.rand(3).tolist()


def test_random_streams_go_on_where_they_were_saved(tmp_path):
    rng.seed_rng(5)
    np.random.randn(), random.gauss(0, 1)  # leave a cached second normal in both generators
    checkpoint().save(tmp_path / "c.pt")
    expected = draw()
    rng.seed_rng(9)
    rng.restore_rng(Checkpoint.load(tmp_path / "c.pt").rng[0], CPU)
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


def same(a, b):
    return a.step == b.step and a.terms == b.terms and a.config == b.config and torch.equal(a.model["w"], b.model["w"])


def test_a_flipped_bit_is_noticed_or_means_nothing(tmp_path):
    """Any bit of the file: what is loaded in the end is what was saved, or it is refused by name."""
    path, saved = tmp_path / "ckpt_epoch_1.pt", checkpoint(size=64)
    saved.save(path)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for place in rng.integers(len(whole) * 8, size=300).tolist():
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            assert same(Checkpoint.load(path), saved)
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 200


def test_every_bit_of_a_weight_counts(tmp_path):
    path, saved = tmp_path / "ckpt_epoch_1.pt", checkpoint(size=64)
    saved.save(path)
    whole = path.read_bytes()
    start = whole.index(saved.model["w"].numpy().tobytes())
    for bit in range(0, 64 * 4 * 8, 61):
        damaged = bytearray(whole)
        damaged[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="does not match its checksum"):
            Checkpoint.load(path)


@pytest.mark.parametrize("name", ["ckpt_epoch_12.pt", "ckpt_interrupt.pt"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_offered(tmp_path, name):
    for epoch in (9, 10):
        checkpoint(step=epoch).save(tmp_path / f"ckpt_epoch_{epoch}.pt")
    (tmp_path / "ckpt_epoch_10.pt").write_bytes(b"damaged too")
    checkpoint(step=12).save(tmp_path / name)
    damage(tmp_path / name)
    with pytest.raises(UserError) as error:
        state.open_run(tmp_path, None, "a: 1")
    said = str(error.value)
    assert said.startswith(f"{tmp_path / name}: damaged") and "\n" not in said
    assert f"ckpt_epoch_9.pt before it is whole: to go on from there, remove {tmp_path / name} and" in said
    assert f"{tmp_path / 'ckpt_epoch_10.pt'} and run the same command again" in said
    (tmp_path / name).unlink()
    (tmp_path / "ckpt_epoch_10.pt").unlink()
    assert state.open_run(tmp_path, None, "a: 1") == tmp_path / "ckpt_epoch_9.pt"
    damage(tmp_path / "ckpt_epoch_9.pt")
    with pytest.raises(UserError, match="no checkpoint before it is whole: start again with another output"):
        state.open_run(tmp_path, None, "a: 1")


def test_what_is_no_checkpoint_is_not_said_to_be_removed(tmp_path):
    """The folder of a model was named as one to remove."""
    (tmp_path / "model.safetensors").write_bytes(b"of a teacher")
    with pytest.raises(UserError) as error:
        state.open_run(tmp_path / "new", tmp_path / "model.safetensors", "a: 1")
    assert str(error.value).startswith(f"{tmp_path / 'model.safetensors'}: damaged") and "remove" not in str(
        error.value
    )
    assert str(error.value).endswith("; give a run folder or one of its checkpoints")


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("\n".join(f"k{n}: 1" for n in range(20)), r"k0 \(was 1, now absent\), .* and 13 more; restore them"),
        ("job: prompt\nb: 1", r"settings: job \(was prompt, now encoder\) and 2 more; restore them"),
    ],
)
def test_many_other_settings_are_counted(tmp_path, before, words):
    replace(checkpoint(), config=before).save(tmp_path / "ckpt_epoch_1.pt")
    with pytest.raises(UserError, match=words):
        state.open_run(tmp_path, None, "job: encoder\na: 1" if "job" in before else "a: 1")


def damage(path):
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(4, dtype=torch.float32).numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("step", -1, "step"), ("step", "many", "step"), ("model", [1], "model"), ("model", {"w": 1}, "model.w"),
        ("rng", [], "rng"), ("rng", [{"torch": 3}], "rng.0"), ("terms", {"mse": "x"}, "terms.mse"),
        ("config", None, "config"), ("seconds", {}, "seconds"),
    ],
)  # fmt: skip
def test_a_checkpoint_with_a_field_of_another_kind_is_refused_by_its_name(tmp_path, field, value, words):
    checkpoint().save(tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save(content | {field: value}, tmp_path / "b.pt")
    with pytest.raises(UserError, match=rf"b\.pt: not a checkpoint of this program: {words}"):
        Checkpoint.load(tmp_path / "b.pt")
    del content[field]
    torch.save(content, tmp_path / "b.pt")
    with pytest.raises(UserError, match=rf"{field}: Field required"):
        Checkpoint.load(tmp_path / "b.pt")


def test_data_are_known_by_what_they_hold_not_by_where_they_lie():
    class Keys:
        def __init__(self, *keys):
            self.identity = keys

    digest = state.data_digest(Keys("a", "b"))
    assert len(digest) == 64 and digest == state.data_digest(Keys("a", "b"))
    others = [Keys("b", "a"), Keys("ab"), Keys("a", "c"), Keys("a\0b"), Keys("a", "b", "")]
    assert digest not in {state.data_digest(other) for other in others}
    assert state.data_digest(object()) == state.data_digest(Keys()) == ""
    saved = checkpoint()
    for known, now in (("", digest), (digest, ""), (digest, digest)):
        replace(saved, data=known).require_data(Path("c.pt"), 10, now)
    with pytest.raises(UserError, match=r"c\.pt: trained on other images"):
        replace(saved, data=digest).require_data(Path("c.pt"), 10, state.data_digest(others[0]))
    with pytest.raises(UserError, match=r"of 10 image\(s\), it now has 9"):
        replace(saved, data=digest).require_data(Path("c.pt"), 9, digest)


def test_data_may_move_and_nothing_else_may():
    before = (
        "data: {root: /a, ids: /a/ids.txt, kind: sa1b}\nquestions: {file: /a/q.jsonl, per_image: 1}\n"
        "distillation: {precomputed_root: /a/features}"
    )
    assert state.changed_keys(before, before.replace("/a", "/b")) == []
    assert len(state.changed_keys(before, before.replace("sa1b", "coco").replace("per_image: 1", "per_image: 2"))) == 2


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


def test_the_mode_of_a_cache_stays_and_is_unknown_of_earlier_versions():
    stored, online = (f"cache: {{mode: {mode}, codec: fp16}}\n" for mode in ("stored", "online"))
    assert state.changed_keys(stored, online) == ["cache.mode (was stored, now online)"]
    assert state.changed_keys("cache: {codec: int8}\n", online) == state.changed_keys("x: 1\n", "x: 1\n" + online) == []


def test_changed_keys_names_what_matters_and_ignores_what_does_not():
    old = "output: a\ndata: {root: x, workers: 2}\ntrain: {seed: 0, keep: 3}\nevaluate: {images: 4}"
    new = "output: b\ndata: {root: x, workers: 9}\ntrain: {seed: 1, keep: 1, lr: 2}\nevaluate: {images: 5}"
    assert state.changed_keys(old, new) == ["train.lr (was absent, now 2)", "train.seed (was 0, now 1)"]
    assert state.changed_keys(old, old) == []


def test_harmless_keys_exist_in_the_config():
    from samdistill.jobs import JOBS

    def known(model, parts):
        field = getattr(model, "model_fields", {}).get(parts[0])
        return field is not None and (len(parts) == 1 or known(field.annotation, parts[1:]))

    for key in state.HARMLESS:
        assert any(known(model, key.split(".")) for model in (job.config for job in JOBS.values())), key


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
