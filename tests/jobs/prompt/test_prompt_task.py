"""The prompt task on tiny models: what is asked, what reaches whom, and what a term is worth."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SamConfig, SamModel

from samdistill.config import TeacherEntry
from samdistill.data import Geometry, MaskFolderSource, ObjectDataset, ViewTransform, collate_objects
from samdistill.engine import check_terms
from samdistill.jobs.loading import validate
from samdistill.jobs.prompt.config import PromptRunConfig, at_epoch
from samdistill.jobs.prompt.student import PromptStudent, best_mask, click_draws
from samdistill.jobs.prompt.task import PromptTask, mean_over_images, term_weights
from samdistill.ops.masks import mask_iou
from samdistill.ops.pca import Projection
from samdistill.ops.promptable import answer_group, embed, to_canvas
from samdistill.teachers import Ensemble, PromptTeacher
from samdistill.teachers.base import Prompted
from samdistill.types import PromptGroup, Prompts, UserError

SIDE = 64
TERMS = ("encoder_patch", "prompt_embed", "decoder_mask_token", "dense_mask_logits")


def tiny_sam(seed: int, width: int = 16) -> SamModel:
    sizes = {"image_size": SIDE, "patch_size": 8}
    config = SamConfig(
        vision_config={
            **sizes, "hidden_size": 32, "output_channels": width, "num_hidden_layers": 3, "num_attention_heads": 4,
            "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 48, "num_pos_feats": width // 2,
        },
        prompt_encoder_config={"hidden_size": width, **sizes},
        mask_decoder_config={"hidden_size": width, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )  # fmt: skip
    torch.manual_seed(seed)
    model = SamModel(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(f"teacher{seed}") for seed in (1, 2)]
    for seed, folder in enumerate(folders, 1):
        tiny_sam(seed).save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (root / kind).mkdir()
    for number in range(6):
        ids = np.zeros((48, 64), np.uint8)
        ids[4:20, 6:30], ids[24:44, 34:60] = 1, 2
        Image.fromarray(np.roll(ids, 2 * number, 1)).save(root / f"masks/{number}.png")
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(root / f"images/{number}.png")
    return MaskFolderSource(root, None)


def config(**blocks: object) -> PromptRunConfig:
    student = {"backbone": "es_ev_s", "image_size": SIDE, "patch_size": 8, "width": 16, "heads": 2}
    raw = {"job": "prompt", "data": {"root": "x"}, "student": student, "evaluate": {"batch_size": 2},
           "train": {"epochs": 4, "batch_size": 2}, "prompts": {"objects": 2}} | blocks  # fmt: skip
    found = validate(raw, "test")
    assert isinstance(found, PromptRunConfig)
    return found


class Running:
    """What the verbs make of an ensemble."""

    def __init__(self, folders, weights=(1.0,)) -> None:
        entries = [TeacherEntry(name=f"t{i}", checkpoint=str(f), weight=w)
                   for i, (f, w) in enumerate(zip(folders, weights, strict=False))]  # fmt: skip
        self.ensemble = Ensemble([PromptTeacher(entry) for entry in entries])
        for teacher in self.ensemble.teachers.values():
            generator = torch.Generator().manual_seed(0)
            samples = [torch.randn(200, teacher.patch_channels, generator=generator)]
            teacher.projection = Projection.fit(samples, 16, False)
        self.weights, self.patch_channels = self.ensemble.weights, self.ensemble.patch_channels
        self.meets = self.ensemble.meets

        self.read, self.answer, self.fingerprint = self.ensemble.read, self.ensemble.answer, self.ensemble.fingerprint

    def to(self, device) -> None:
        pass


ENTRIES = [{"name": "t0", "checkpoint": "x"}, {"name": "t1", "checkpoint": "y"}]


def task(pictures, signals=None, teachers=1, **blocks: object) -> PromptTask:
    entries = ENTRIES[:teachers] if signals is not None else []
    blocks.setdefault("distillation", {"enable": signals is not None})
    settings = config(teachers=entries, **blocks)

    def objects(epoch: int) -> ObjectDataset:
        transform = ViewTransform(Geometry(SIDE, "longest_side"))
        return ObjectDataset(pictures, transform, settings.prompts, pictures.keys, 0, epoch)

    return PromptTask(settings, signals, objects, objects(99))


def batch_of(found: PromptTask, count: int = 2, epoch: int = 0):
    data = found.dataset(epoch)
    return found.collate([data[i] for i in range(count)])


@pytest.mark.parametrize("mode", ["point", "box", "mixed"])
def test_every_term_reaches_the_student(pictures, teachers, mode):
    found = task(pictures, Running(teachers), prompts={"objects": 2, "mode": mode, "rounds": 1})
    report = check_terms(found, "cpu", 2)
    assert [term.name for term in report.terms] == ["focal", "dice", "iou", *TERMS]
    assert report.problems == []


def test_two_teachers_share_each_term_by_their_weights(pictures, teachers):
    both = task(pictures, Running(teachers, (3.0, 1.0)), 2, distillation={"lambda_coef": 2.0})
    torch.manual_seed(0)
    student = both.build_student()
    terms = both.terms(student, batch_of(both))
    shares = {name: terms[name].weight for name in terms if "/" in name}
    assert shares == {f"{term}/{t}": w for t, w in (("t0", 1.5), ("t1", 0.5)) for term in TERMS}
    assert len(terms.only(["encoder_patch"])) == 2

    alone = task(pictures, Running(teachers[1:]))
    values = alone.terms(PromptStudent(student.model, 16, [16]), batch_of(alone))
    for name in TERMS[1:]:  # the first has a convolution of its own
        assert values[name].value.item() == pytest.approx(terms[f"{name}/t1"].value.item(), rel=1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(pictures, teachers):
    found = task(pictures, Running(teachers), student={"start": str(teachers[0])})
    student = found.build_student().eval()
    terms = found.terms(student, batch_of(found))
    for name in TERMS[1:]:
        assert terms[name].value.item() == pytest.approx(0, abs=1e-5), name
    assert terms["encoder_patch"].value.item() > 0.01  # its convolution is new


def test_signals_reach_what_they_should_and_nothing_behind_it(pictures, teachers):
    found = task(pictures, Running(teachers), prompts={"mode": "box", "objects": 2})
    student = found.build_student()
    terms = found.terms(student, batch_of(found))
    part = dict(student.model.named_parameters())
    encoder, decoder = (
        part["vision_encoder.neck.conv1.weight"],
        part["mask_decoder.transformer.layers.0.mlp.lin1.weight"],
    )
    tail = part["mask_decoder.upscale_conv1.weight"]
    reaches = {
        name: [torch.autograd.grad(terms[name].value, p, retain_graph=True, allow_unused=True)[0] is not None
               for p in (encoder, decoder, tail)]
        for name in TERMS
    }  # fmt: skip
    assert reaches == {
        "encoder_patch": [False, False, False],  # tapped before the neck
        "prompt_embed": [True, False, False],
        "decoder_mask_token": [True, True, False],
        "dense_mask_logits": [True, True, True],
    }
    trunk = student.model.vision_encoder.backbone
    assert torch.autograd.grad(terms["encoder_patch"].value, next(trunk.parameters()))[0].abs().sum() > 0


def test_weights_follow_the_epochs():
    block = {"lambda_coef": {0: 1.0, 4: 0.0}, "prompt_embed": {"weight": {2: 0.5}}, "encoder_patch": {"enable": False}}
    settings = config(teachers=ENTRIES[:1], distillation=block, loss={"focal": {0: 0, 2: 20}, "bce": 0})
    assert term_weights(settings, 0) == {
        "dice": 1, "iou": 1, "prompt_embed": 0.5, "decoder_mask_token": 1, "dense_mask_logits": 1,
    }  # fmt: skip
    assert term_weights(settings, 1)["focal"] == 10
    assert term_weights(settings, 3)["prompt_embed"] == 0.25 * 0.5
    assert set(term_weights(settings, 4)) == {"focal", "dice", "iou"}
    assert [at_epoch({1: 2.0, 3: 4.0}, epoch) for epoch in range(5)] == [2, 2, 3, 4, 4]
    assert at_epoch(0.3, 7) == 0.3


def test_stages_are_where_terms_come_and_go(pictures, teachers):
    found = task(
        pictures, Running(teachers), distillation={"lambda_coef": {0: 1.0, 2: 0.0}}, loss={"focal": {0: 0, 1: 0, 2: 5}}
    )
    assert found.stages(found.config.train) == [("epoch 0", 0), ("epoch 2", 2)]
    report = check_terms(found, "cpu", 2, train=found.config.train)
    by_stage = {phase: {t.name for t in report.terms if t.phase == phase} for phase in ("epoch 0", "epoch 2")}
    assert by_stage == {"epoch 0": {"dice", "iou", *TERMS}, "epoch 2": {"focal", "dice", "iou"}}


def test_means_are_over_objects_then_images():
    groups = [PromptGroup(torch.tensor([0, 2]), Prompts(torch.ones(2, 2, dtype=torch.bool)), False),
              PromptGroup(torch.tensor([1]), Prompts(torch.ones(1, 2, dtype=torch.bool)), False)]  # fmt: skip
    values = [torch.tensor([[1.0, 3.0], [5.0, 100.0]]), torch.tensor([[7.0, 7.0]])]
    counted = torch.tensor([[True, True], [False, False], [True, False]])
    assert mean_over_images(values, groups, counted).item() == pytest.approx((2 + 5) / 2)
    assert mean_over_images(values, groups, torch.zeros(3, 2, dtype=torch.bool)).item() == 0
    nan = [values[0], torch.tensor([[float("nan"), 1.0]])]
    assert mean_over_images(nan, groups, counted).isfinite()  # what does not count may be anything


@pytest.mark.parametrize("click", ["centre", "random"])
def test_rounds_add_a_click_in_the_error_and_the_last_answer(pictures, click):
    found = task(pictures, prompts={"mode": "mixed", "objects": 2, "rounds": 2, "click": click})
    student, batch = found.build_student().eval(), batch_of(found, 4)
    with torch.no_grad():
        answers, again = student(batch, found.config.prompts), student(batch, found.config.prompts)
    assert len(answers.rounds) == len(answers.asked) == 3
    for before, said, after in zip(answers.asked[:-1], answers.rounds[:-1], answers.asked[1:], strict=True):
        for group, answer, asked in zip(before, said, after, strict=True):
            clicks = 0 if group.prompts.points is None else group.prompts.points.shape[2]
            assert asked.prompts.points.shape[2] == clicks + 1
            assert not asked.multimask and torch.equal(asked.prompts.masks, best_mask(answer))
            predicted, wanted = to_canvas(best_mask(answer), (SIDE, SIDE)), batch.masks[group.rows]
            predicted[..., 48:, :] = False  # padding
            for g in range(len(group.rows)):
                for n in range(2):
                    x, y = asked.prompts.points[g, n, -1].int().tolist()
                    label = asked.prompts.labels[g, n, -1].item()
                    assert bool(wanted[g, n, y, x]) == bool(label)
                    assert bool(predicted[g, n, y, x]) != bool(label)
    for first, second in zip(answers.asked[-1], again.asked[-1], strict=True):
        assert torch.equal(first.prompts.points, second.prompts.points)  # a resumed run clicks alike


def test_random_clicks_follow_from_seed_epoch_round_and_slot_and_not_from_the_batch(pictures):
    """However the images are divided, each is asked the same; another epoch clicks elsewhere."""
    found = task(pictures, prompts={"mode": "mixed", "objects": 2, "rounds": 2, "click": "random"})
    student, data = found.build_student().eval(), found.dataset(0)

    def clicks(rows, epoch=0):
        batch = found.collate([data[row] for row in rows])
        with torch.no_grad():
            asked = student(batch, found.config.prompts, epoch).asked[1:]
        return {
            (rows[row], number): group.prompts.points[place, :, -1].tolist()
            for number, groups in enumerate(asked)
            for group in groups
            for place, row in enumerate(group.rows.tolist())
        }

    whole = clicks([0, 1, 2, 3])
    assert whole == clicks([0, 1]) | clicks([2, 3]) == clicks([3, 1, 0, 2])
    assert len(whole) == 8 and whole != clicks([0, 1, 2, 3], epoch=1)
    draws = click_draws(found.collate([data[0], data[1]]), 0, 0)
    assert len(set(draws.flatten().tolist())) == 4 and draws.min() >= 0 and draws.max() < 1


def test_teachers_are_asked_about_the_first_answer_or_about_all(pictures, teachers):
    """The terms of all rounds are the mean of each round's, by hand; an image is encoded once whatever is asked."""
    prompts = {"mode": "mixed", "objects": 2, "rounds": 2}
    first = task(pictures, Running(teachers), prompts=prompts, distillation={"rounds": "first"})
    every = task(pictures, Running(teachers), prompts=prompts)
    student, batch = first.build_student().eval(), batch_of(first, 4)
    answers = student(batch, first.config.prompts)
    told = [first.signals.answer(Prompted(batch, asked), {})["t0"] for asked in answers.asked]
    teacher, encoded = every.signals.ensemble.teachers["t0"], []
    teacher.model.vision_encoder.register_forward_hook(lambda *_: encoded.append(1))
    values = {name: term.value for name, term in every.terms(student, batch).items()}
    assert len(encoded) == 1
    for name in TERMS:
        patch = answers.patches[0]
        by_round = [first._value(name, patch, said, say, asked, batch).item()
                    for said, say, asked in zip(answers.rounds, told, answers.asked, strict=True)]  # fmt: skip
        assert values[name].item() == pytest.approx(sum(by_round) / 3, rel=1e-4), name
        assert first.terms(student, batch)[name].value.item() == pytest.approx(by_round[0], rel=1e-4), name
        if name != "encoder_patch":  # which is of the image and not of a prompt
            assert len(set(by_round)) == 3, name


def test_the_hardest_draw_of_each_image_is_trained_on(pictures):
    found = task(pictures, prompts={"mode": "box", "objects": 2, "candidates": 3, "box_jitter": 0.4})
    student, batch = found.build_student().eval(), batch_of(found, 4)
    with torch.no_grad():
        embeddings = embed(student.model, batch.images)
        chosen = student(batch, found.config.prompts).asked[0]
        expected = {}
        for image in range(4):
            worst = None
            for groups in batch.draws:
                (group,) = [g for g in groups if image in g.rows.tolist()]
                row = group.rows.tolist().index(image)
                logits = best_mask(answer_group(student.model, embeddings, group))[row]
                iou = mask_iou(to_canvas(logits[None], (SIDE, SIDE))[0], batch.masks[image]).mean().item()
                if worst is None or iou < worst[0]:
                    worst = iou, group.prompts.boxes[row]
            expected[image] = worst[1]
    seen = {row: group.prompts.boxes[i] for group in chosen for i, row in enumerate(group.rows.tolist())}
    assert sorted(seen) == [0, 1, 2, 3]
    for image, boxes in expected.items():
        assert torch.equal(seen[image], boxes)


def test_points_of_the_grid_without_an_object_are_distilled_but_not_trained_on(pictures, teachers):
    found = task(pictures, Running(teachers), prompts={"mode": "everything", "objects": 2, "grid_points": 4})
    batch = batch_of(found)
    nothing = replace(batch, masks=torch.zeros_like(batch.masks), labelled=torch.zeros_like(batch.labelled))
    terms = found.terms(found.build_student(), nothing)
    assert all(terms[name].value.item() == 0 for name in ("focal", "dice", "iou"))
    assert all(terms[name].value.item() > 0 for name in TERMS)


def test_padding_does_not_count(pictures, teachers):
    """Whatever the teacher says about padding, which is below row 48 of 64."""
    found = task(pictures, Running(teachers))
    student, batch = found.build_student(), batch_of(found)
    answers = student(batch, found.config.prompts)
    told = found.signals.answer(Prompted(batch, answers.asked[0]), {})["t0"]
    changed = copy.deepcopy(told)
    changed.encoder_patch[:, :, 6:] += 5
    for group in changed.groups:
        group.low_res_masks[..., 24:, :] += 5
    for name in ("encoder_patch", "dense_mask_logits"):
        values = [found._value(name, answers.patches[0], answers.rounds[0], say, answers.asked[0], batch).item()
                  for say in (told, changed)]  # fmt: skip
        assert values[0] == pytest.approx(values[1], rel=1e-6), name


def test_what_is_logged_of_held_out_images(pictures):
    found = task(pictures)
    student = found.build_student().eval()
    batch_of(found)
    figures = found.validate(student)
    assert set(figures) == {"focal", "dice", "iou", "miou"}
    assert 0 <= figures["miou"] <= 1
    for size in (1, 4, 100):  # six images: whole batches, a smaller last one, less than one batch
        blocks = {"evaluate": {"batch_size": size}}
        assert task(pictures, **blocks).validate(student) == pytest.approx(figures, rel=1e-4), size
    assert found.export(student) is student.model


def test_decoders_of_other_widths_are_refused_before_anything_is_trained(pictures, teachers):
    narrow = {"backbone": "es_ev_s", "image_size": SIDE, "patch_size": 8, "width": 32, "heads": 2}
    found = task(pictures, Running(teachers), student=narrow)
    with pytest.raises(UserError, match=r"'t0' has a decoder of width 16 and the student one of 32"):
        found.build_student()
    far = {"backbone": "es_ev_s", "image_size": 256, "patch_size": 8, "width": 16, "heads": 2}
    with pytest.raises(UserError, match="more than a factor of 2 apart"):
        task(pictures, Running(teachers), student=far).build_student()


def test_the_table_of_fourier_features_stays_as_it_is(pictures):
    student = task(pictures).build_student()
    fixed = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert fixed == {"model.shared_image_embedding.positional_embedding"}
    assert not student.model.prompt_encoder.shared_embedding.positional_embedding.requires_grad  # it is the same


def test_a_collated_batch_reaches_the_task_whole(pictures):
    found = task(pictures)
    data = found.dataset(0)
    assert len(collate_objects([data[0], data[1]]).images) == 2
