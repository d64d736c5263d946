"""The command line as a contract: exit codes, one clear line for a user's error, and what --json prints."""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from samdistill.cli import main, message
from samdistill.jobs.encoder.config import EncoderRunConfig
from samdistill.students import STUDENTS, StudentTrunk, StudentTrunkConfig
from samdistill.types import UserError


def call(argv: list[str]) -> int:
    """Exit code; argparse's own errors leave by SystemExit."""
    try:
        return main(argv)
    except SystemExit as leave:
        assert isinstance(leave.code, int)
        return leave.code


@pytest.fixture
def failed(capsys: pytest.CaptureFixture[str]):
    """failed(argv): stderr of a command that must end as a user's error."""

    def run(argv: list[str]) -> str:
        capsys.readouterr()
        assert call(argv) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and "Traceback" not in text, text
        assert text.startswith("samdistill"), text
        return text

    return run


ERRORS = {
    "no verb": ([], "VERB"),
    "unknown verb": (["distill"], "'distill'"),
    "demo: out is a file": (["demo", "--out", "FILE"], "FILE"),
    "demo: option": (["demo", "--speed", "9"], "--speed"),
    "run: no folder": (["run", "MISSING", "--teacher", "sandbox", "--student", "es_ev_s", "--out", "OUT"], "MISSING"),
    "run: student": (["run", "WORLD", "--teacher", "sandbox", "--student", "es_ev_z", "--out", "OUT"], "'es_ev_s'"),
    "run: teacher": (["run", "WORLD", "--teacher", "MISSING", "--student", "es_ev_s", "--out", "OUT"], "MISSING"),
    "run: key": (["run", "WORLD", "--teacher", "sandbox", "--student", "es_ev_s", "--out", "OUT", "train.epoch=1"],
                 "did you mean 'epochs'?"),
    "run: no teacher": (["run", "WORLD", "--student", "es_ev_s", "--out", "OUT"], "--teacher"),
    "models: name": (["models", "es_ev_z"], "'es_ev_s'"),
    "models: option": (["models", "--yaml"], "--yaml"),
    "merge: no run": (["merge", "MISSING", "--into", "sandbox", "--out", "OUT"], "MISSING"),
    "merge: into nothing": (["merge", "STUDENT", "--into", "MISSING", "--out", "OUT"], "MISSING"),
    "merge: wrong checkpoint": (["merge", "STUDENT", "--into", "sandbox", "--out", "OUT"], "16"),
    "merge: a teacher is no student": (["merge", "TEACHER", "--into", "sandbox", "--out", "OUT"], "not a student"),
    "merge: names": (
        ["merge", "STUDENT", "--into", "sandbox", "--out", "OUT", "--names", "efficientsam3"], "not for a Hugging Face"
    ),
    "merge: two trunks": (
        ["merge", "STUDENT", "--text", "STUDENT", "--into", "sandbox", "--out", "OUT"], "no text encoder"
    ),
    "merge: option": (["merge", "STUDENT", "--into", "sandbox", "--out", "OUT", "--force"], "--force"),
    "inspect: nothing": (["inspect", "MISSING"], "MISSING"),
    "inspect: option": (["inspect", "STUDENT", "--deep"], "--deep"),
    "evaluate: no model": (["evaluate", "MISSING", "WORLD"], "MISSING"),
    "evaluate: no data": (["evaluate", "sandbox", "MISSING"], "MISSING"),
    "evaluate: prompt": (["evaluate", "sandbox", "WORLD", "--prompts", "bax"], "did you mean 'box'?"),
    "evaluate: number": (["evaluate", "sandbox", "WORLD", "--images", "few"], "'few'"),
    "prepare: no source": (["prepare", "sa1b", "MISSING", "OUT"], "MISSING"),
    "prepare: data set": (["prepare", "sa2b", "WORLD", "OUT"], "'sa2b'"),
    "render: onto a file": (["sandbox", "render", "FILE"], "FILE"),
    "render: nothing": (["sandbox", "render", "OUT", "--train", "0"], "count 0"),
    "render: format": (["sandbox", "render", "OUT", "--format", "voc"], "'voc'"),
}  # fmt: skip
for verb in ("plan", "check", "cache", "train"):
    sandbox = [verb, "encoder/sandbox", "data.root=WORLD", "output=OUT", "data.workers=0"]
    ERRORS |= {
        f"{verb}: no config": ([verb, "MISSING.yaml"], "MISSING.yaml"),
        f"{verb}: recipe": ([verb, "encoder/sandbax"], "did you mean 'encoder/sandbox'?"),
        f"{verb}: key": ([verb, "encoder/sandbox", "train.epoch=1"], "encoder/sandbox: unknown key 'train.epoch'"),
        f"{verb}: not key=value": ([verb, "encoder/sandbox", "train.epochs"], "key=value"),
        f"{verb}: option": ([*sandbox, "--quickly"], "--quickly"),
        f"{verb}: image size": ([*sandbox, "teacher.image_size=130"], "nearest that work: 126 or 140"),
        f"{verb}: teacher": ([*sandbox, "teacher.path=MISSING"], "MISSING"),
    }
    if verb != "train":  # which first of all misses its cache
        ERRORS |= {
            f"{verb}: no data": ([verb, "encoder/sandbox", "data.root=MISSING"], "MISSING"),
            f"{verb}: empty folder": ([*sandbox, "data.root=EMPTY", "data.kind=folder"], "EMPTY: no image"),
        }
    if verb in ("plan", "check"):
        ERRORS[f"{verb}: student"] = ([*sandbox, "student.backbone=es_ev_z"], "did you mean 'es_ev_s'")
for verb in ("plan", "check", "train", "cache"):
    ERRORS |= {
        f"{verb}: detection: key": ([verb, "detection/sandbox", "match.maks=1"], "did you mean 'mask'?"),
        f"{verb}: job": ([verb, "encoder/sandbox", "job=detect"], "did you mean 'detection'?"),
        f"{verb}: phases": ([verb, "encoder/sandbox", "train.phases=[]"], "train.phases is empty"),
    }
EMPTY = "is empty; give a path or a name"
"""What an argument that would else be the current folder gets, such as that of an unset shell variable."""
ERRORS |= {
    "merge: into an empty path": (["merge", "STUDENT", "--into", "", "--out", "OUT"], f"--into: {EMPTY}"),
    "merge: an empty path": (["merge", " ", "--into", "sandbox", "--out", "OUT"], f"RUN_OR_CHECKPOINT: {EMPTY}"),
    "export: to an empty path": (["export", "sandbox", "--out", ""], f"--out: {EMPTY}"),
    "predict: an empty path": (["predict", "", "sandbox", "--text", "star"], f"image: {EMPTY}"),
    "plan: an empty name": (["plan", ""], f"config: {EMPTY}"),
}
ERRORS["cache: detection"] = (["cache", "detection/sandbox", "output=OUT"], "nothing to cache; set cache.mode=stored")
ERRORS["demo: job"] = (["demo", "--job", "videos"], "'videos'")
ERRORS["train: no cache"] = (["train", "encoder/sandbox", "data.root=WORLD", "output=OUT"], "run `samdistill cache`")


@pytest.fixture(scope="module")
def places(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("places")
    (root / "empty").mkdir()
    (root / "file").write_text("x")
    StudentTrunk(StudentTrunkConfig(backbone="es_ev_s", hidden_size=16, image_size=126)).save_pretrained(root / "small")
    import samdistill.sandbox as sandbox

    teacher = Path(sandbox.__path__[0]) / "weights" / "tracker"
    return {"WORLD": str(world), "EMPTY": str(root / "empty"), "FILE": str(root / "file"), "OUT": str(root / "out"),
            "STUDENT": str(root / "small"), "MISSING": str(root / "nowhere"), "TEACHER": str(teacher)}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_a_users_error_is_exit_code_2_and_one_line(name: str, failed, places: dict[str, str]) -> None:
    argv, words = ERRORS[name]
    for short, path in places.items():
        argv, words = [text.replace(short, path) for text in argv], words.replace(short, path)
    assert words in failed(argv)
    assert not Path(places["OUT"]).exists()  # nothing is left behind


def test_an_unknown_key_in_a_file_names_file_key_and_suggestion(failed, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: encoder/sandbox\ntrain: {warmup_epoch: 1}\n")
    text = failed(["train", str(path)])
    assert f"{path}: unknown key 'train.warmup_epoch'; did you mean 'warmup_epochs'?" in text


def test_a_pickle_that_runs_code_is_refused_by_merge_and_never_runs(failed, tmp_path: Path, places) -> None:
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    for protocol in ("ckpt_epoch_1.pt", "teacher.pt"):
        (tmp_path / protocol).write_bytes(pickle.dumps({"model": Bomb()}, protocol=2))
    out = str(tmp_path / "out")
    assert "needs to run code" in failed(
        ["merge", str(tmp_path / "ckpt_epoch_1.pt"), "--into", "sandbox", "--out", out]
    )
    into = ["merge", places["STUDENT"], "--into", str(tmp_path / "teacher.pt"), "--out", str(tmp_path / "out.pt")]
    assert "needs to run code" in failed(into)
    assert not (tmp_path / "ran").exists() and not Path(out).exists()
    pickle.loads((tmp_path / "teacher.pt").read_bytes())
    assert (tmp_path / "ran").exists()  # the bomb is a real one


def test_check_json_is_the_contract(
    cached: EncoderRunConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(cached.to_yaml())
    assert main(["check", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["terms", "trainable"]
    assert [term["name"] for term in found["terms"]] == ["mse", "cosine"]
    assert all(list(term) == ["name", "value", "weight", "grad_norm", "phase"] for term in found["terms"])
    assert all(isinstance(term[k], float) and term[k] > 0 for term in found["terms"] for k in ("value", "grad_norm"))
    student = StudentTrunk(StudentTrunkConfig(backbone="es_ev_s", hidden_size=192, image_size=126))
    assert found["trainable"] == [name for name, _ in student.named_parameters()]


def test_check_fails_with_1_when_a_term_is_dead(cached: EncoderRunConfig, capsys, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(cached.to_yaml())
    assert main(["check", str(path), "loss.cosine=0"]) == 1
    said = capsys.readouterr()
    assert "term 'cosine' does not reach the student: its weight is 0" in said.err and "mse" in said.out


def test_completion_is_asked_only_by_a_shell_and_offers_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """argcomplete is an extra that the environment of the tests has not: a module with its function stands for it."""
    asked: list[argparse.ArgumentParser] = []
    monkeypatch.setitem(sys.modules, "argcomplete", SimpleNamespace(autocomplete=asked.append))
    assert call(["--version"]) == 0 and not asked
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    assert call(["--version"]) == 0
    (verbs,) = (action for action in asked[0]._actions if action.dest == "verb")
    assert isinstance(verbs.choices, dict) and {"plan", "predict"} <= set(verbs.choices)
    (config,) = (action for action in verbs.choices["train"]._actions if action.dest == "config")
    assert "encoder/sandbox" in config.completer(prefix="enc")


def test_the_version_is_that_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert call(["--version"]) == 0
    assert capsys.readouterr().out == f"samdistill {project['version']}\n"


def test_models_json_is_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    keys = ["name", "backbone", "config", "trunk_params", "head_params", "teacher_share"]
    assert all(list(row) == keys for row in rows)
    assert [row["name"] for row in rows] == list(STUDENTS) and len(rows) == 9
    # FACTS: trunk in millions of the nine, S M L of EfficientViT, RepViT and TinyViT
    published = [0.683, 4.644, 14.977, 4.718, 7.775, 22.404, 5.071, 10.547, 20.620]
    assert [round(row["trunk_params"] / 1e6, 3) for row in rows] == published
    assert all(row["teacher_share"] == pytest.approx(row["trunk_params"] / 446.237e6, rel=1e-5) for row in rows)


def test_tables_name_every_student_and_every_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in STUDENTS) and "446.237" in text and "106.875" in text
    assert main(["models", "es_ev_s"]) == 0
    assert "efficientvit_b0" in (text := capsys.readouterr().out) and "head." in text
    assert main(["models", "es_ev_s", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert sum(m["params"] for m in one["modules"]) == one["trunk_params"] + one["head_params"]


def test_plan_prints_and_gives_json(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "encoder/sandbox", f"data.root={world}", "train.batch_size=8"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["held_out_images"], found["steps"]) == (24, 8, 36)
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "192 x 9 x 9 from 126 px" in text and "36 (3 an epoch)" in text and "24 to train on, 8 held out" in text
    assert main([*argv, "train.batch_size=25"]) == 2
    assert "24 images are less than one batch" in capsys.readouterr().err


def test_overrides_may_stand_before_and_after_options(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "encoder/sandbox", "train.batch_size=8", "--json", f"data.root={world}", "train.epochs=5"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 15


def test_inspect_json_of_a_store(cached: EncoderRunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(cached.store_root), "--json"]) == 0
    assert "24" in capsys.readouterr().out


def test_an_interrupt_is_130_and_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("samdistill.display.load_config", interrupted)
    assert main(["cache", "encoder/sandbox"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_a_programming_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a fault of this package")

    monkeypatch.setattr("samdistill.display.load_config", broken)
    with pytest.raises(RuntimeError, match="a fault of this package"):
        main(["cache", "encoder/sandbox"])


def test_an_error_of_a_loaders_worker_is_told_in_its_own_words() -> None:
    class Broken(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> int:
            raise UserError("record 'a' is damaged")

    with pytest.raises(UserError) as error:
        next(iter(torch.utils.data.DataLoader(Broken(), num_workers=1)))
    assert "Traceback" in str(error.value)
    assert message(error.value) == "record 'a' is damaged"
    assert message(UserError("plain")) == "plain"


def test_the_home_folder_is_expanded_on_the_command_line(failed, places, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for argv, name in (
        (["inspect", "~/run"], "run"), (["plan", "~/c.yaml"], "c.yaml"),
        (["evaluate", "~/model", places["WORLD"]], "model"),
        (["merge", "~/student", "--into", "sandbox", "--out=~/merged"], "student"),
        (["predict", "~/photo.jpg", "~/model", "--text", "star"], "photo.jpg"),
        (["prepare", "sa1b", "~/shards", "~/out"], "shards"),
    ):  # fmt: skip
        assert str(tmp_path / name) in failed(argv)
