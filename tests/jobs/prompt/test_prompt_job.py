"""Plan, check, train and evaluate of the prompt job as a user calls them, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, SamProcessor

from samdistill.checkpoints.promptable import load_promptable
from samdistill.cli import main
from samdistill.engine import read_lines
from samdistill.jobs.loading import load_config
from samdistill.jobs.prompt.config import PromptRunConfig
from samdistill.jobs.prompt.losses import DISTILLED_TERMS
from samdistill.jobs.prompt.plan import PromptPlan
from samdistill.pipeline import cache, plan, train
from samdistill.students import MobileSamModel

CACHED = "distillation.use_precomputed_features=true"
DISTILLED = tuple(DISTILLED_TERMS.weights)


def own_channels(model: torch.nn.Module) -> int:
    """Channels that the neck of a SAM reads."""
    return model.vision_encoder.neck.conv1.in_channels


def argv(verb: str, config: PromptRunConfig, folder: Path, *more: str) -> list[str]:
    """The same run as a command."""
    path = folder / "run.yaml"
    path.write_text(config.to_yaml())
    return [verb, str(path), *more]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line of a command that must end as a user's error."""
    capsys.readouterr()
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith(f"samdistill {arguments[0]}: "), text
    return text


def test_the_plan_says_what_the_run_then_needs(prompted, sams, tmp_path, capsys) -> None:
    rounds = "prompts.rounds=1", "distillation.rounds=first"
    config = prompted(tmp_path, CACHED, "data.views=2", "train.ema=0.9", *rounds)
    found = plan(config)
    assert isinstance(found, PromptPlan)
    models = {name: load_promptable(folder) for name, folder in sams.items()}
    params = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert found.student_params == params["student"] == sum(found.parts.values())
    assert [(t.name, t.share, t.params, t.grid) for t in found.teachers] == [
        ("large", 0.75, params["large"], (4, 4)), ("small", 0.25, params["small"], (4, 4)),
    ]  # fmt: skip
    assert (found.images, found.held_out_images, found.steps_per_epoch, found.steps) == (14, 8, 3, 6)
    own = models["student"]
    channels = {name: own_channels(model) for name, model in models.items()}
    adapters = sum((channels["student"] + 1) * channels[name] for name in ("large", "small"))
    table = own.shared_image_embedding.positional_embedding.numel()  # never trains
    whole = params["student"] + adapters
    assert found.weights_and_optimiser_bytes == 4 * (5 * (whole - table) + table) and found.teacher_bytes == 0
    held = plan(
        prompted(tmp_path, CACHED, "train.ema=0.9", *rounds, "train.freeze=[{match: [model.vision_encoder.*]}]")
    )
    encoder = sum(p.numel() for p in own.vision_encoder.parameters())
    assert found.weights_and_optimiser_bytes - held.weights_and_optimiser_bytes == 4 * 4 * encoder
    report = cache(config, device="cpu", progress=False)
    assert (found.bytes_per_image, found.cache_bytes) == (report.bytes_per_record, report.bytes)
    assert main(argv("plan", config, tmp_path, "distillation.use_precomputed_features=false")) == 0
    said = capsys.readouterr().out
    for line in (
        "teacher large",
        "75%",
        "1 corrective click(s)",
        "not used: the teachers run during training",
        "prompts: mixed",
    ):
        assert line in said
    assert main(argv("plan", config, tmp_path, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["terms"] == list(DISTILLED)


def test_a_student_without_a_start_is_planned_without_weights(prompted, sams, tmp_path) -> None:
    """Also where it starts from ImageNet's, which nobody can download here."""
    small = "student={backbone: efficientvit_b0, image_size: 64, width: 16, heads: 2, pretrained: true}"
    found = plan(prompted(tmp_path, "student.start=null", small))
    started = plan(prompted(tmp_path, f"student.start={sams['mobile']}"))
    assert isinstance(found, PromptPlan) and isinstance(started, PromptPlan)
    assert (found.student, found.grid, found.parts) == ("efficientvit_b0", (4, 4), started.parts)


def test_check_shows_every_term_of_every_teacher(prompted, tmp_path, capsys) -> None:
    config = prompted(tmp_path, "distillation.lambda_coef={0: 1.0, 1: 0.0}")
    assert main(argv("check", config, tmp_path, "--json")) == 0
    terms = json.loads(capsys.readouterr().out)["terms"]
    task = ["focal", "dice", "iou"]
    both = [f"{name}/{teacher}" for teacher in ("large", "small") for name in DISTILLED]
    stages = list(dict.fromkeys(term["phase"] for term in terms))
    assert [term["name"] for term in terms if term["phase"] == stages[0]] == task + both
    assert [term["name"] for term in terms if term["phase"] == stages[1]] == task  # the teachers' weight has ended
    assert all(term["grad_norm"] > 0 for term in terms)
    assert {path.name for path in (tmp_path / "projections").iterdir()} == {"large.safetensors", "small.safetensors"}


@pytest.fixture(scope="module")
def trained(prompted, sams, tmp_path_factory) -> PromptRunConfig:
    """A run of a MobileSAM, finished through the command line."""
    folder = tmp_path_factory.mktemp("trained")
    config = prompted(folder / "run", f"student.start={sams['mobile']}", "prompts.rounds=1", "train.epochs=1")
    assert main(argv("train", config, folder)) == 0
    return config


def test_training_leaves_a_model_that_opens_and_has_learnt(trained, sams) -> None:
    student, start = load_promptable(trained.output), load_promptable(sams["mobile"])
    assert isinstance(student, MobileSamModel) and student.config.image_size == 64
    moved = {
        name.split(".")[0]
        for (name, one), two in zip(student.named_parameters(), start.parameters(), strict=True)
        if not torch.equal(one, two)
    }
    assert moved >= {"vision_encoder", "prompt_encoder", "mask_decoder"}
    (tensors,) = (trained.output / "student").glob("*.safetensors")
    assert tensors.stat().st_size < 4.2 * sum(p.numel() for p in start.parameters())  # no adapter, no teacher
    first = read_lines(trained.output / "metrics.jsonl")[0]["terms"]
    assert {f"{name}/large" for name in DISTILLED} <= set(first) and "dice" in first  # each on its own


def test_evaluate_takes_the_run(trained, world, sams, capsys) -> None:
    common = ["evaluate", str(trained.output), str(world), "--geometry", "longest_side", "--images", "2"]
    assert main([*common, "--teacher", str(sams["large"]), "--json"]) == 0
    teacher, student = json.loads(capsys.readouterr().out)["models"]
    assert teacher["name"] == "teacher" and student["name"] == "student"
    assert set(student["miou"]) == {"box", "point", "refine"} and all(0 <= v <= 1 for v in student["miou"].values())


def test_a_cached_run_ends_as_an_online_one_does(prompted, tmp_path) -> None:
    """One epoch, which sees the same views: the same steps but for rounding."""
    settings = ("train.epochs=1", "data.fraction=0.3", "cache.codec=fp32", "train.lr=1e-4")
    last = {}
    for name, more in (("online", ()), ("cached", (CACHED,))):
        config = prompted(tmp_path / name, *settings, *more)
        if more:
            cache(config, device="cpu", progress=False)
        last[name] = train(config).terms
    assert set(last["online"]) == set(last["cached"])
    for term, value in last["online"].items():
        assert last["cached"][term] == pytest.approx(value, rel=1e-3, abs=1e-6), term


PUBLISHED = {
    "teachers": [
        {"name": "SAM-H", "checkpoint": "LARGE", "cfg": "vit_h", "weight": 0.7},
        {"name": "MobileSAM_orig", "checkpoint": "SMALL", "cfg": "vit_t", "weight": 0.3},
    ],
    "distillation": {
        "enable": True, "use_precomputed_features": False, "precomputed_root": None, "lambda_coef": 1.0,
        "encoder_patch": {"enable": True, "w_l2": 1.0, "w_cos": 1.0},
        "prompt_embed": {"enable": True, "w_mse": 0.7, "w_cos": 0.3},
        "decoder_mask_token": {"enable": True, "w_kl": 1.0, "temperature": 0.5},
        "dense_mask_logits": {"enable": True, "w_kl": 0.6, "w_focal": 0.4, "gamma": 2.0},
    },
}  # fmt: skip
"""The block as it is published, as JSON."""


def test_the_published_block_works_pasted_into_json(sams, world, tmp_path, capsys) -> None:
    rest = {
        "job": "prompt", "output": str(tmp_path / "run"), "student": {"start": str(sams["student"])},
        "data": {"kind": "sa1b", "root": str(world), "workers": 0}, "prompts": {"objects": 1},
        "train": {"batch_size": 2, "epochs": 1},
    }  # fmt: skip
    text = json.dumps({**rest, **PUBLISHED}, indent=2)
    text = text.replace("LARGE", str(sams["large"])).replace("SMALL", str(sams["small"]))
    (tmp_path / "run.json").write_text(text)
    config = load_config(tmp_path / "run.json")
    assert isinstance(config, PromptRunConfig)
    recipe = load_config("prompt/published")
    assert isinstance(recipe, PromptRunConfig) and config.distillation == recipe.distillation
    assert main(["check", str(tmp_path / "run.json"), "distillation.sample=2", "--json"]) == 0
    weights = {term["name"]: term["weight"] for term in json.loads(capsys.readouterr().out)["terms"]}
    assert weights["encoder_patch/SAM-H"] == pytest.approx(0.7)
    assert weights["prompt_embed/MobileSAM_orig"] == pytest.approx(0.3)


BAD = {
    "no such teacher": ("teachers=[{name: a, checkpoint: MISSING}]", "no such file or folder"),
    "a detector as teacher": ("teachers=[{name: a, checkpoint: DETECTOR}]", "has no prompt decoder"),
    "unknown term": ("distillation.decoder_token.enable=true", "unknown key 'distillation.decoder_token'"),
    "unknown task term": ("loss.focol=1", "unknown key 'loss.focol'; did you mean 'focal'"),
    "weights of zero": ("teachers=[{name: a, checkpoint: x, weight: 0}]", "weights sum to zero"),
    "one name twice": ("teachers=[{name: a, checkpoint: x}, {name: a, checkpoint: y}]", "the same name: a, a"),
    "no teacher": ("teachers=[]", "distillation is on without a teacher"),
    "a name with a slash": ("teachers=[{name: a/b, checkpoint: x}]", "names a folder, so it cannot hold a slash"),
    "dense not kept": ("cache.dense=false", "dense_mask_logits needs cache.dense: true"),
    "hard prompts": ("prompts.candidates=2", "cannot be cached"),
    "all rounds": ("prompts.rounds=1", "set distillation.rounds: first, or prompts.rounds: 0"),
    "widths": ("student={start: null, image_size: 64, width: 32, heads: 2, backbone: efficientvit_b0}",
               "teacher 'large' has a decoder of width 16 and the student one of 32"),
    "grids": ("student={start: null, image_size: 192, width: 16, heads: 2, backbone: efficientvit_b0}",
              "more than a factor of 2 apart"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named_in_one_line(case, prompted, detector, tmp_path, capsys) -> None:
    setting, complaint = BAD[case]
    more = [CACHED] if case in ("dense not kept", "hard prompts", "all rounds") else []
    setting = setting.replace("MISSING", str(tmp_path / "nowhere")).replace("DETECTOR", str(detector[1]))
    config = prompted(tmp_path / "run")
    assert complaint in refused(capsys, argv("check", config, tmp_path, setting, *more))


def test_data_without_masks_goes_with_everything_alone(prompted, world, tmp_path, capsys) -> None:
    folder = next(path.parent for path in world.rglob("*.jpg"))
    config = prompted(tmp_path / "run", "data.kind=folder", f"data.root={folder}", "data.held_out_fraction=0.2")
    assert "prompts.mode: mixed needs masks" in refused(capsys, argv("check", config, tmp_path))
    config = prompted(
        tmp_path / "run", "data.kind=folder", f"data.root={folder}", "data.held_out_fraction=0.2",
        "prompts.mode=everything", "prompts.grid_points=3", "loss={focal: 0, dice: 0, iou: 0}", "train.epochs=1",
    )  # fmt: skip
    result = train(config)
    assert type(AutoProcessor.from_pretrained(result.student)) is SamProcessor
    assert {name.partition("/")[0] for name in result.terms} >= set(DISTILLED)
