"""Configurations: inheritance, overrides, numbers as people write them, and errors that say where and what instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from samdistill.config import PhaseConfig, TrainConfig, packaged
from samdistill.jobs.detection.config import DetectionRunConfig
from samdistill.jobs.encoder.config import EncoderRunConfig
from samdistill.jobs.loading import load_config
from samdistill.jobs.prompt.config import PromptRunConfig
from samdistill.jobs.text.config import TextRunConfig
from samdistill.jobs.video.config import VideoRunConfig
from samdistill.students import STUDENTS
from samdistill.types import UserError

MINIMAL = "teacher: {path: sandbox}\nstudent: {backbone: es_ev_s}\ndata: {root: images}\n"
DETECTION = "job: detection\nteacher: {path: sandbox}\ndata: {root: images}\n"
DETECTORS = {"efficient_sam3": "es_rv_l", "efficient_sam3_504": "es_rv_l", "es_ev_m": "es_ev_m", "mps": "es_rv_l",
             "sandbox": "es_ev_s", "hosted": "es_rv_l", "hosted_sandbox": "es_ev_s", "hosted_joint": "es_rv_l",
             "hosted_joint_sandbox": "es_ev_s", "hosted_labels_sandbox": "es_ev_s"}  # fmt: skip
BACKBONES = {f"encoder/{name}": name for name in STUDENTS} | {"encoder/sandbox": "es_ev_s"}
BACKBONES |= {f"detection/{name}": backbone for name, backbone in DETECTORS.items()}
PROMPTED = ("everything", "mobile_sam", "published", "sam3_tracker", "sandbox")
BACKBONES |= {f"prompt/{name}": "tiny_vit_5m_224" for name in PROMPTED}  # all of them start from a checkpoint
VIDEOS, TEXTS = ("described", "efficient_sam3", "sandbox"), ("s0", "s1", "sandbox")
KINDS = {
    "encoder": EncoderRunConfig,
    "detection": DetectionRunConfig,
    "prompt": PromptRunConfig,
    "video": VideoRunConfig,
    "text": TextRunConfig,
}


@pytest.fixture
def write(tmp_path: Path):
    def make(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return make


def test_what_is_packaged() -> None:
    others = [*(f"video/{name}" for name in VIDEOS), *(f"text/{name}" for name in TEXTS)]
    assert packaged() == sorted([*BACKBONES, *others])


@pytest.mark.parametrize("name", packaged())
def test_every_packaged_recipe_loads_and_its_resolved_form_is_the_same_run(name: str, write) -> None:
    config = load_config(name)
    if not isinstance(config, VideoRunConfig | TextRunConfig):  # their students have no backbone in the config
        assert config.student.backbone == BACKBONES[name]
    assert isinstance(config, KINDS[name.partition("/")[0]])
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
    assert isinstance(config, EncoderRunConfig) and config.job == "encoder" and config.cache.codec == "fp16"
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
    with pytest.raises(UserError, match="'extends' is circular"):
        load_config(write("extends: a.yaml\n"))


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "+1e-4", "0.1e-3", "1.0e-4"])
def test_exponents_are_numbers(text: str, write) -> None:
    assert yaml.safe_load("1e-4") == "1e-4"  # what PyYAML does
    assert load_config(write(MINIMAL + f"train: {{lr: {text}}}\n")).train.lr == pytest.approx(1e-4, rel=1e-12)
    assert load_config("encoder/sandbox", [f"train.lr={text}"]).train.lr == pytest.approx(1e-4, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + "train: {epochs: 3}\ntrain: {lr: 1}\n", "key 'train' is given twice, in line 4 and in line 5"),
        (MINIMAL + "train:\n  lr: 1e-4\n  epochs: 3\n  lr: 1e-3\n", "key 'lr' is given twice, in line 5 and in line 7"),
        (MINIMAL + 'train: {lr: 1e-4, "lr": 1e-3}\n', "key 'lr' is given twice, in line 4 and in line 4"),
    ],
)
def test_a_key_given_twice_is_named_with_its_lines(text: str, words: str, write) -> None:
    path = write(text)
    with pytest.raises(UserError, match=re.escape(f"{path}: not readable as YAML: {words}")):
        load_config(path)


def test_a_merged_mapping_may_be_overridden(write) -> None:
    """YAML's own ``<<``: what it brings is a default, as in every other reader."""
    text = "teacher: &one {path: sandbox, precision: bf16}\nstudent: {backbone: es_ev_s}\ndata: {root: images}\n"
    with pytest.raises(UserError, match="unknown key 'again'"):
        load_config(write(text + "again: {<<: *one, precision: fp32}\n"))


def test_the_home_folder_is_expanded_in_every_path(write, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(MINIMAL, "base.yaml")
    mine = write("extends: ~/base\nteacher: {path: ~/sam3.pt, tokenizer: ~/words}\noutput: ~/run\n", "mine.yaml")
    assert mine.parent == tmp_path
    config = load_config("~/mine.yaml", ["data.root=~/images", "student.pretrained=~/trunk.pt", "cache.root=~"])
    assert (config.teacher.path, config.output) == (str(tmp_path / "sam3.pt"), tmp_path / "run")
    assert (config.teacher.tokenizer, config.data.root) == (tmp_path / "words", tmp_path / "images")
    assert config.student.pretrained == tmp_path / "trunk.pt" and config.cache.root is None  # a bare ~ is YAML's null
    several = load_config("prompt/sandbox", ["teachers=[{name: a, checkpoint: ~/a, weight: 1}]"])
    assert several.teachers[0].checkpoint == str(tmp_path / "a")


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
        ("train=5", ["train: must be a mapping of keys to values", "5"]),
        ("train.freeze=vision", ["train.freeze: must be a list, such as [a, b]", "'vision'"]),
        ("train.betas=[0.9]", ["train.betas.1: too few entries in the list"]),
        ("data.augment.crop_scale=[0, 0, 1]", ["crop_scale: too many entries in the list; give at most 2"]),
        ("student.pretrained=7", ["student.pretrained: Input should be a valid boolean", "or must be a path", "7"]),
        ("data.root=''", ["data.root: is empty; give a value, or leave the key out"]),
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
    assert "\n" not in message and "tuple" not in message.lower() and "pathlib" not in message
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
        ("- a\n- b\n", "a config must be a mapping"),
        ("student: {backbone: x}\ndata: {root: y}\n", "teacher: Field required"),
        ("extends: nowhere\n", "no config 'nowhere'"),
        (MINIMAL.replace("images", "images, ids: a.txt, fraction: 0.5"), "data: give 'ids' or 'fraction', not both"),
    ],
)
def test_files_that_are_no_config_are_explained(text: str, words: str, write) -> None:
    with pytest.raises(UserError) as error:
        load_config(write(text))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_name_is_answered_with_the_nearest_recipe() -> None:
    with pytest.raises(UserError, match=r"no config 'encoder/es_rv_n'.*did you mean 'encoder/es_rv_"):
        load_config("encoder/es_rv_n")


PHASES = "[{name: one, epochs: 2, lr: 1e-3, terms: [mask, fpn]}, {name: two, epochs: 3, lr: 1e-4}]"


def test_the_recipe_of_detection_is_the_described_one() -> None:
    config = load_config("detection/efficient_sam3")
    assert isinstance(config, DetectionRunConfig)
    assert config.loss.model_dump() == {
        "mask": 5, "box_l1": 5, "giou": 2, "logit": 2, "presence": 1, "semantic": 2, "fpn": 1, "encoder": 1,
        "unmatched": True, "standardise": False,
    }  # fmt: skip
    assert (config.match.mask, config.match.box, config.match.logit) == (2, 5, 2) and config.match.resolution == 72
    first, second = config.train.phases or ()
    assert (first.epochs, first.lr, first.warmup_steps, first.terms) == (5, 1e-4, 500, None)
    assert (second.epochs, second.lr, second.terms) == (10, 5e-5, config.term_names()[:6])
    assert (config.train.batch_size, config.train.lr_batch, config.train.weight_decay) == (8, None, 0.01)
    assert (config.student.queries, config.student.encoder_layers, config.student.decoder_layers) == (100, 3, 3)


def test_an_epoch_finds_its_phase() -> None:
    train = load_config("detection/sandbox", [f"train.phases={PHASES}"]).train
    found = [train.phase_at(epoch) for epoch in range(6)]
    assert [phase.name for phase in found if phase] == ["one", "one", "two", "two", "two", "two"]
    assert train.total_epochs == 5 and train.phase_starts() == [("one", 0), ("two", 2)]
    plain = TrainConfig(epochs=7)
    assert (plain.phase_at(0), plain.phase_starts(), plain.total_epochs) == (None, [("", 0)], 7)


ONE = "[{name: one, epochs: 2, lr: 1e-3}]"


@pytest.mark.parametrize(
    ("recipe", "overrides", "keys"),
    [
        ("detection/sandbox", ["train.epochs=3"], "train.epochs"),
        ("detection/sandbox", ["train.lr=1e-4", "train.min_lr=0"], "train.lr, train.min_lr"),
        ("encoder/sandbox", ["train.warmup_epochs=1", f"train.phases={ONE}"], "train.warmup_epochs"),
        ("encoder/sandbox", [f"train.phases={ONE}", "train.warmup_lr=0"], "train.warmup_lr"),
    ],
)
def test_phases_beside_keys_of_one_schedule_are_refused(recipe: str, overrides: list[str], keys: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(recipe, overrides)
    message = str(error.value)
    assert f"train.phases and {keys} contradict" in message and "train.phases: null" in message
    assert "\n" not in message


def test_phases_over_a_recipe_take_the_place_of_its_schedule_and_can_be_taken_back(write) -> None:
    train = load_config("encoder/sandbox", [f"train.phases={ONE}"]).train
    assert (train.total_epochs, train.lr_batch) == (2, None), "what phases do not replace stays"
    child = load_config(write(f"extends: encoder/es_rv_m\ntrain: {{phases: {ONE}}}\noutput: here\n"))
    assert child.train.total_epochs == 2 and load_config(write(child.to_yaml(), "again.yaml")) == child
    back = load_config("detection/sandbox", ["train.phases=null", "train.epochs=3"]).train
    assert (back.phases, back.total_epochs) == (None, 3)


def test_phases_given_anew_replace_those_of_the_parent(write) -> None:
    path = write("extends: detection/efficient_sam3\ntrain: {phases: [{name: all, epochs: 1, lr: 1e-3}]}\n")
    assert load_config(path).train.phases == (PhaseConfig(name="all", epochs=1, lr=1e-3),)


def test_the_job_decides_what_a_config_may_say(write) -> None:
    config = load_config(write(DETECTION))
    assert isinstance(config, DetectionRunConfig) and config.train.phases is None
    for text, words in (
        (DETECTION + "clips: {context: 2}\n", "unknown key 'clips'"),
        (MINIMAL + "questions: {per_image: 2}\n", "unknown key 'questions'"),
        (MINIMAL.replace("teacher", "job: detect\nteacher"), "no job is called 'detect'; did you mean 'detection'?"),
    ):
        with pytest.raises(UserError) as error:
            load_config(write(text))
        assert words in str(error.value) and "\n" not in str(error.value)


def phase(text: str) -> str:
    return f"train.phases=[{{name: one, epochs: 1, lr: 1e-3}}, {{name: two, {text}}}]"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.phases=[]", ["train.phases is empty", "leave the key out"]),
        (phase("lr: 1e-3"), ["train.phases.1.epochs", "Field required"]),
        (phase("epochs: 0, lr: 1e-3"), ["train.phases.1.epochs", "greater than 0"]),
        (phase("epochs: 1"), ["train.phases.1.lr", "Field required"]),
        (phase("epochs: 1, lr: 0"), ["train.phases.1.lr", "greater than 0"]),
        (phase("epochs: 1, lr: 1, terms: [mask, giuo]"), ["phase 'two'", "'giuo'", "did you mean 'giou'?"]),
        (phase("epochs: 1, lr: 1, terms: []"), ["train.phases.1.terms"]),
        ("train.phases=[{name: one, lr: 1e-3}]", ["train.phases.0.epochs", "Field required"]),
        ("train.freeze=[{match: [5]}]", ["train.freeze.0.match.0", "5"]),
        ("train.freeze=[{match: []}]", ["train.freeze.0.match: too few entries in the list; give at least 1"]),
        ("train.freeze=[{match: [a], until: 0}]", ["train.freeze.0.until", "greater than 0"]),
        ("train.rates=[{match: [a], scale: 0}]", ["train.rates.0.scale", "greater than 0"]),
        ("train.rates=[{mach: [a], match: [a], scale: 1}]", ["'train.rates.0.mach'", "did you mean 'match'?"]),
        (phase("epochs: 1, lr: 1, warmup_step: 3"), ["'train.phases.1.warmup_step'", "did you mean 'warmup_steps'?"]),
        ("match.resolutoin=9", ["unknown key 'match.resolutoin'", "did you mean 'resolution'?"]),
        ("student.text.layer=2", ["unknown key 'student.text.layer'", "did you mean 'layers'?"]),
        ("match.method=hungrian", ["match.method", "'hungrian'"]),
        ("questions.source=jsonl", ["'file' is required with source: jsonl"]),
        ("questions.source=generic", ["negatives must be 0"]),
        ("questions.jitter=0.5", ["questions.jitter", "less than 0.5"]),
        ("student={trunk: a, pretrained: b}", ["student: ", "'trunk'", "'pretrained'"]),
        ("loss.mask=-1", ["loss.mask", "-1"]),
    ],
)
def test_a_wrong_setting_of_detection_names_key_and_what_would_work(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config("detection/sandbox", [override])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert message.startswith("detection/sandbox: ") and "\n" not in message


def test_a_config_cannot_be_changed_once_it_is_checked() -> None:
    config = load_config("encoder/sandbox")
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 3


def test_the_described_video_recipe_is_the_described_one() -> None:
    config = load_config("video/described")
    assert isinstance(config, VideoRunConfig)
    memory, clips, loss, train = config.student.memory, config.clips, config.loss, config.train
    assert (memory.latents, memory.layers, memory.windows, memory.level, memory.marks) == (64, 2, 0, 3, False)
    assert (clips.context, clips.objects, clips.own) == (8, 20, (0.0, 0.0)) and config.teacher.image_size == 504
    assert (loss.mask, loss.box_l1, loss.giou, loss.iou, loss.presence) == (5, 5, 2, 2, 1)
    (phase,) = train.phases
    assert (phase.epochs, phase.lr, phase.warmup_steps, train.batch_size, train.accumulate) == (5, 1e-4, 200, 4, 4)
    assert phase.terms == ("mask", "box_l1", "giou", "iou", "presence")
    assert (config.cache.codec, config.cache.batch_size) == ("fp16", 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("data: {root: v, views: 2}", "data.views: a video is cached once"),
        ("data: {root: v}\nclips: {context: 2, shortest: 3}", "shortest=3 is more than context=2"),
        ("data: {root: v}\nstudent: {memory: {level: 1}}", "student.memory.level"),
        ("data: {root: v}\nstudent: {memory: {latent: 64}}", "did you mean 'latents'"),
        ("data: {root: v}\nclips: {own: [0, 2]}", "clips.own.1"),
        ("data: {root: v, held_out_last: 3}", "data.held_out_last: videos are divided by folder"),
        ("data: {root: v}\nstudent: {memory: {latents: 16, windows: 4}}", "16 windows leave none of 16 latents"),
    ],
)
def test_mistakes_in_a_video_config_are_named(given: str, message: str, write) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(write(f"job: video\nteacher: {{path: sandbox}}\n{given}\n"))


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("job=[encoder]", "no job is called ['encoder']"), ("job=2020-01-01", "no job is called datetime.date"),
        ("train.lr=.nan", "train.lr: Input should be a finite number"), ("train.eps=.inf", "train.eps: Input"),
        ("loss.mse=.nan", "loss.mse: Input should be"), ("train.betas=[1, 0.9]", "train.betas.0: Input should be"),
        ("train.epochs=1" + "0" * 300, "train.epochs: Input should be less than"),
        ("train.epochs=1" + "0" * 5000, "not readable as YAML"), ("train.lr=-1", "train.lr: Input should be greater"),
        ("data.split=../../elsewhere", "data.split: names a folder, so"), ("data.held_out=a/b", "cannot hold a slash"),
        ("data.root=2020-99-99", "not readable as YAML: month"), ("data.kind=[sa1b]", "data.kind: Input should be"),
        ('data.root="\\uD800"', "data.root: contains"), ('teacher.path="a\\0"', "teacher.path: contains characters"),
        ("data=" + "[" * 3000, "not readable as YAML"), ("a." * 200 + "b=1", "nests deeper than 100"),
        ("data={a: &x [*x]}", "a value that contains it"), ("teacher.image_size=16385", "less than or equal to 16384"),
    ],
)  # fmt: skip
def test_what_is_no_setting_is_one_line(override: str, complaint: str) -> None:
    with pytest.raises(UserError) as error:
        load_config("encoder/sandbox", [override])
    assert complaint in str(error.value)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 600


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"- a", b"1: 2\n", b"extends: [a]\n", b"a: !!python/name:os.system x\n", b"a: " + b"{b: " * 2000],
)
def test_a_file_that_is_no_config_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: [^\n]+$"):
        load_config(path)
