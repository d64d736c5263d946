"""Configurations: inheritance, overrides, numbers as people write them, and errors that say where and what instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from samdistill.config import RunConfig, load_config, packaged
from samdistill.students import STUDENTS
from samdistill.types import UserError

MINIMAL = "teacher: {path: sandbox}\nstudent: {backbone: es_ev_s}\ndata: {root: images}\n"


@pytest.fixture
def write(tmp_path: Path):
    def make(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return make


def test_what_is_packaged() -> None:
    assert packaged() == sorted(["encoder/sandbox", *(f"encoder/{name}" for name in STUDENTS)])


@pytest.mark.parametrize("name", packaged())
def test_every_packaged_recipe_loads_and_its_resolved_form_is_the_same_run(name: str, write) -> None:
    config = load_config(name)
    assert config.student.backbone == ("es_ev_s" if name == "encoder/sandbox" else name.removeprefix("encoder/"))
    assert load_config(write(config.to_yaml())) == config


def test_the_recipes_of_the_nine_students_are_the_published_one() -> None:
    config = load_config("encoder/es_rv_m")
    train, loss = config.train, config.loss
    assert (config.teacher.image_size, config.data.fraction, loss.mse, loss.cosine) == (1008, 0.01, 1.0, 1.0)
    assert (train.epochs, train.batch_size, train.lr, train.warmup_lr, train.min_lr) == (50, 64, 1e-3, 1e-6, 1e-5)
    assert (train.lr_batch, train.warmup_epochs, train.weight_decay, train.clip_norm) == (512, 5, 0.01, 5.0)
    others = (load_config(f"encoder/{name}") for name in STUDENTS)
    assert all(
        other.model_copy(update={"output": config.output, "student": config.student}) == config for other in others
    )


def test_a_config_without_extends_has_the_defaults(write) -> None:
    config = load_config(write(MINIMAL))
    assert isinstance(config, RunConfig) and config.job == "encoder" and config.cache.codec == "fp16"
    assert config.store_root == config.output / "embeddings"
    assert load_config(write(MINIMAL), ["cache.root=elsewhere"]).store_root == Path("elsewhere")


def test_extends_merges_key_by_key_through_several_files(write) -> None:
    write(MINIMAL + "train: {lr: 1e-4, epochs: 7}\n", "grand.yaml")
    write("extends: grand\ntrain: {epochs: 9}\noutput: here\n", "parent.yaml")
    config = load_config(write("extends: parent.yaml\ndata: {views: 3}\n"))
    assert (config.train.lr, config.train.epochs, config.output) == (1e-4, 9, Path("here"))
    assert (config.data.views, config.data.root) == (3, Path("images"))  # a mapping is merged, not replaced


def test_a_file_can_extend_a_packaged_recipe(write) -> None:
    config = load_config(write("extends: encoder/es_tv_l\ntrain: {epochs: 2}\n"))
    assert config.student.backbone == "es_tv_l" and config.train.epochs == 2 and config.train.lr == 1e-3


def test_a_circle_is_named(write) -> None:
    write("extends: b.yaml\n", "a.yaml")
    write("extends: a.yaml\n", "b.yaml")
    with pytest.raises(UserError, match="goes round in a circle"):
        load_config(write("extends: a.yaml\n"))


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "+1e-4", "0.1e-3", "1.0e-4"])
def test_exponents_are_numbers(text: str, write) -> None:
    assert yaml.safe_load("1e-4") == "1e-4"  # what PyYAML does
    assert load_config(write(MINIMAL + f"train: {{lr: {text}}}\n")).train.lr == pytest.approx(1e-4, rel=1e-12)
    assert load_config("encoder/sandbox", [f"train.lr={text}"]).train.lr == pytest.approx(1e-4, rel=1e-12)


def test_overrides_reach_any_depth_and_the_last_one_counts() -> None:
    given = ["data.augment.flip=0.25", "data.augment.crop_scale=[0.5, 1]", "train.epochs=3", "train.epochs=4",
             "data.root=/some where/1e5 images", "train.lr_batch=null", "train.clip_norm=null"]  # fmt: skip
    config = load_config("encoder/sandbox", given)
    assert (config.data.augment.flip, config.data.augment.crop_scale, config.train.epochs) == (0.25, (0.5, 1.0), 4)
    assert (config.data.root, config.train.lr_batch, config.train.clip_norm) == (
        Path("/some where/1e5 images"),
        None,
        None,
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batchsize=4", ["unknown key 'train.batchsize'", "did you mean 'batch_size'?"]),
        ("data.augment.flop=1", ["unknown key 'data.augment.flop'", "did you mean 'flip'?"]),
        ("techer.path=x", ["unknown key 'techer'", "did you mean 'teacher'?"]),
        ("loss.qqq=1", ["unknown key 'loss.qqq'", "there is: cosine, mse"]),
        ("train.epochs=many", ["train.epochs", "'many'"]),
        ("train.epochs=0", ["train.epochs", "greater than 0"]),
        ("data.fraction=1.5", ["data.fraction", "1.5"]),
        ("data.geometry=round", ["data.geometry", "'round'"]),
        ("cache.codec=pca0-int8", ["cache.codec", "'pca0-int8'"]),
        ("train=5", ["train", "5"]),
        ("train.lr", ["write key=value"]),
        ("=5", ["write key=value"]),
        ("train.lr=[1", ["train.lr=[1", "not readable as YAML"]),
    ],
)
def test_a_wrong_setting_names_origin_key_and_what_would_work(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config("encoder/sandbox", [override])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert "encoder/sandbox" in message or message.startswith("override")


def test_unknown_keys_of_a_file_name_the_file_each_on_a_line(write) -> None:
    path = write(MINIMAL + "train: {epoch: 3}\nevalute: {}\n")
    with pytest.raises(UserError) as error:
        load_config(path)
    lines = sorted(str(error.value).splitlines())
    assert len(lines) == 2 and all(line.startswith(f"{path}: unknown key") for line in lines)
    assert "did you mean 'evaluate'?" in lines[0] and "did you mean 'epochs'?" in lines[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not readable as YAML"),
        ("- a\n- b\n", "a config is a mapping"),
        ("student: {backbone: x}\ndata: {root: y}\n", "teacher: Field required"),
        ("extends: nowhere\n", "no config 'nowhere'"),
        (MINIMAL.replace("images", "images, ids: a.txt, fraction: 0.5"), "give 'ids' or 'fraction', not both"),
    ],
)
def test_files_that_are_no_config_are_explained(text: str, words: str, write) -> None:
    with pytest.raises(UserError) as error:
        load_config(write(text))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_name_is_answered_with_the_nearest_recipe() -> None:
    with pytest.raises(UserError, match=r"no config 'encoder/es_rv_n'.*did you mean 'encoder/es_rv_"):
        load_config("encoder/es_rv_n")


def test_a_config_cannot_be_changed_once_it_is_checked() -> None:
    config = load_config("encoder/sandbox")
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 3
