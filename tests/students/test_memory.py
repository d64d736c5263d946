"""The memory of a video student, alone and between the encoder and the decoders of the detector."""

from __future__ import annotations

import copy

import pytest
import torch
from tensors import assert_same_tensors
from tiny_detector import ANSWERS, tiny
from torch import nn
from transformers.models.sam3_lite_text.configuration_sam3_lite_text import Sam3LiteTextDETREncoderConfig

from samdistill.checkpoints.student import load_with_memory
from samdistill.students import EfficientSam3Model, efficient_sam3_config
from samdistill.students.memory import MemoryCrossAttention, PerceiverResampler, age_embedding, window_of
from samdistill.types import UserError


def described() -> Sam3LiteTextDETREncoderConfig:
    return efficient_sam3_config().detr_encoder_config


def small(width: int = 16, heads: int = 2) -> Sam3LiteTextDETREncoderConfig:
    return Sam3LiteTextDETREncoderConfig(
        hidden_size=width, num_attention_heads=heads, intermediate_size=32, dropout=0.0
    )


def resampler(windows: int = 0, latents: int = 12) -> PerceiverResampler:
    torch.manual_seed(0)
    return PerceiverResampler(small(), latents, 2, windows).eval()


def past(frames: int = 3, side: int = 6, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(batch, frames, 16, side, side, generator=generator)
    return features, torch.arange(frames, 0, -1.0).expand(batch, -1)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_described_sizes() -> None:
    assert 1.3e6 < count(PerceiverResampler(described(), 64, 2)) < 1.6e6
    assert 0.2e6 < count(MemoryCrossAttention(described())) < 0.27e6


@pytest.mark.parametrize("windows", (0, 3))
def test_any_number_of_frames_on_any_grid_becomes_the_same_number_of_tokens(windows) -> None:
    model = resampler(windows)
    for frames, side in ((1, 6), (5, 4), (8, 9)):
        assert model(*past(frames, side)).shape == (2, 12, 16)


@pytest.mark.parametrize("windows", (0, 3))
def test_frames_that_only_pad_change_nothing(windows) -> None:
    model, (features, ages) = resampler(windows), past(4)
    valid = torch.tensor([[True, True, False, False], [True, True, True, True]])
    spoiled = features.clone()
    spoiled[0, 2:] = 1e4
    alone = model(features[:1, :2], ages[:1, :2])
    both = model(spoiled, ages, valid)
    torch.testing.assert_close(both[:1], alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both[1:], model(features[1:], ages[1:]), rtol=1e-5, atol=1e-6)


def test_memory_knows_where_and_when() -> None:
    """Without positions attention is blind to a shuffle of its keys; here moving a thing, or its time, shows."""
    model, (features, ages) = resampler(), past()
    as_it_was = model(features, ages)
    assert (model(features.roll(1, -1), ages) - as_it_was).abs().max() > 1e-3
    assert (model(features.flip(1), ages) - as_it_was).abs().max() > 1e-3
    torch.testing.assert_close(model(features.flip(1), ages.flip(1)), as_it_was, rtol=1e-4, atol=1e-5)


def test_ages_are_told_apart_and_the_near_from_the_far() -> None:
    ages = age_embedding(torch.tensor([[1.0, 2.0, 8.0, 400.0]]), 16)[0]
    apart = torch.cdist(ages, ages)
    assert ages.shape == (4, 16) and ages.abs().max() <= 1
    assert apart[0, 1] < apart[0, 2] and (apart[~torch.eye(4, dtype=torch.bool)] > 0.3).all()
    torch.testing.assert_close(ages[:, 0], torch.tensor([1.0, 2.0, 8.0, 400.0]).sin())


def test_masks_say_which_of_the_things_is_meant() -> None:
    """Two things of one look: the features are the same in both places, and only the masks tell them apart."""
    model, (features, ages) = resampler(), past(batch=1)
    features = features[..., :1].expand(-1, -1, -1, -1, 6).contiguous()
    left = torch.zeros(1, 3, 12, 12)
    left[..., :6] = 1
    here, there = model(features, ages, None, left), model(features, ages, None, left.flip(-1))
    assert (here - there).abs().max() > 1e-4
    torch.testing.assert_close(model(features, ages, None, torch.zeros(1, 3, 4, 4)), model(features, ages))
    coarse = torch.nn.functional.avg_pool2d(left, 2)
    torch.testing.assert_close(model(features, ages, None, coarse), here, rtol=1e-5, atol=1e-6)


def test_windows_share_the_grid_out() -> None:
    whole = window_of((6, 6), 3, torch.device("cpu"))
    assert whole.sum(0).eq(1).all() and whole.sum(1).eq(4).all()
    assert whole.view(3, 3, 6, 6)[1, 2].nonzero().tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]
    uneven = window_of((5, 7), 3, torch.device("cpu"))
    assert uneven.sum(0).eq(1).all() and uneven.sum(1).ge(1).all()
    with pytest.raises(ValueError, match="too small for"):
        window_of((2, 6), 3, torch.device("cpu"))


def test_a_windowed_latent_reads_its_window_and_a_global_one_all() -> None:
    model = resampler(windows=3)
    features, ages = past(batch=1)
    features.requires_grad_()
    tokens = model(features, ages)
    tokens[0, 3 + 5].square().sum().backward()  # window (1, 2): rows 2 and 3, columns 4 and 5
    seen = features.grad.abs().sum((0, 1, 2)) > 0
    assert seen.nonzero().tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]
    features.grad = None
    model(features, ages)[0, 0].square().sum().backward()
    assert (features.grad.abs().sum((0, 1, 2)) > 0).all()


def test_some_latents_look_at_marked_cells_alone_and_the_others_at_all() -> None:
    model = resampler(windows=2)  # 12 latents: four for windows, four of the global ones follow the marks
    features, ages = past(batch=1)
    masks = torch.zeros(1, 3, 6, 6)
    masks[0, 1, 2, 4] = 0.5

    def seen(latent: int, marks: torch.Tensor | None) -> torch.Tensor:
        given = features.clone().requires_grad_()
        model(given, ages, None, marks)[0, latent].square().sum().backward()
        return given.grad[0].abs().sum(1) > 0

    for latent in range(4):
        assert seen(latent, masks).nonzero().tolist() == [[1, 2, 4]]
    assert seen(4, masks).all() and seen(0, None).all()
    assert seen(0, torch.zeros(1, 3, 6, 6)).all()  # nothing is marked: nothing to follow


def test_the_first_head_looks_at_the_latest_frames_and_the_last_at_all() -> None:
    """With equal logits the weights of ages 1 and 3 are as exp(-slope) and exp(-3 slope): slopes 1 and 1/2."""
    model = resampler()
    bias = model._bias((1, 2, 1, 1), torch.tensor([[3.0, 1.0]]), None, None, torch.zeros(1))
    assert bias.shape == (1, 2, 12, 2)
    torch.testing.assert_close(bias[0, :, 0].softmax(-1)[:, 1], torch.tensor([2.0, 1.0]).sigmoid())


def test_a_warm_start_hands_on_what_is_there(image_student) -> None:
    """A latent begins as the mean of what it sees, weighted by age; reading prefers what is alike."""
    model = load_with_memory(image_student[1], latents=5, layers=2, windows=2)
    made = model.memory_resampler
    width = model.config.vision_config.fpn_hidden_size
    features = torch.randn(1, 1, width, 4, 4)
    with torch.no_grad():
        tokens = made(features, torch.ones(1, 1))[0, 1:]  # of the four windows
        place = made._sines((4, 4), features).permute(1, 2, 0)
        cells = made.input_norm(features[0, 0].permute(1, 2, 0)) + place + age_embedding(torch.ones(1, 1), width)[0]
        cells = made.layers[0].memory_norm(cells).view(2, 2, 2, 2, width).mean((1, 3)).flatten(0, 1)
        wanted = nn.functional.layer_norm(cells + made._sines((2, 2), features).flatten(1).T, (width,))
    assert nn.functional.cosine_similarity(tokens, wanted, dim=-1).min() > 0.9
    for linear in (model.memory_attention.attention.q_proj, model.memory_attention.attention.k_proj):
        assert (linear.weight.diagonal() - 1).abs().mean() < 0.05


def test_windows_have_to_leave_a_global_latent() -> None:
    with pytest.raises(ValueError, match="3 x 3 windows need more than 9 latents"):
        resampler(windows=3, latents=9)


def test_both_modules_export() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.past, self.now = PerceiverResampler(small(), 12, 2, 3), MemoryCrossAttention(small())

        def forward(self, features, ages, valid, tokens, positions):
            return self.now(tokens, positions, self.past(features, ages, valid))

    features, ages = past()
    given = (features, ages, torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 9, 16), torch.randn(2, 9, 16))
    model = Both().eval()
    torch.testing.assert_close(torch.export.export(model, given).module()(*given), model(*given))


def questions(batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "pixel_values": torch.randn(batch, 3, 126, 126, generator=generator),
        "input_ids": torch.randint(1, 900, (batch, 6), generator=generator),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]] * batch),
    }


@pytest.fixture(scope="module")
def image_student(tmp_path_factory):
    model, folder = tiny(), tmp_path_factory.mktemp("image")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def video_student(image_student) -> EfficientSam3Model:
    torch.manual_seed(0)
    return load_with_memory(image_student[1], latents=12, layers=1, windows=2).eval()


def remembered(batch: int = 2, frames: int = 3) -> torch.Tensor:
    return torch.randn(batch, frames, 32, 4, 4, generator=torch.Generator().manual_seed(4))


def test_an_image_checkpoint_gains_the_memory_and_keeps_everything_else(image_student, video_student) -> None:
    model = image_student[0]
    ours, theirs = video_student.state_dict(), model.state_dict()
    new = set(ours) - set(theirs)
    assert new and all(name.startswith(("memory_resampler.", "memory_attention.")) for name in new)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    latents = video_student.memory_resampler.latents
    assert 0.015 < latents.std() < 0.025 and 0.7 < video_student.memory_resampler.target.std() < 1.3
    assert all(torch.isfinite(ours[name]).all() for name in new)
    assert model.memory_resampler is None


@torch.no_grad()
def test_without_memory_it_is_the_image_model(image_student, video_student, near) -> None:
    asked, opened = questions(), EfficientSam3Model.from_pretrained(image_student[1]).eval()
    image, video = opened(**asked), video_student.forward_video(**asked)
    for name in (*ANSWERS, "encoder_grid"):
        near(video[name], image[name])


@torch.no_grad()
def test_memory_reaches_every_answer_and_only_its_own_image(video_student) -> None:
    asked, memory, model = questions(), remembered(), copy.deepcopy(video_student)
    model.memory_attention.attention.o_proj.weight *= 1000  # random decoders hardly answer to anything
    plain, told = model(**asked), model.forward_video(**asked, memory_features=memory)
    assert all((plain[name] - told[name]).abs().max() > 1e-6 for name in (*ANSWERS, "encoder_grid"))
    other = memory.clone()
    other[1] = other[1].flip(0)
    changed = model.forward_video(**asked, memory_features=other)
    for name in ANSWERS:
        assert torch.equal(changed[name][0], told[name][0]) and not torch.equal(changed[name][1], told[name][1])


@torch.no_grad()
def test_many_questions_about_an_image_share_its_memory(video_student) -> None:
    asked, memory = questions(), remembered()
    images = {"pixel_values": asked["pixel_values"], "memory_features": memory}
    words = {name: asked[name][[0, 1, 0]] for name in ("input_ids", "attention_mask")}
    found = video_student.forward_video(**images, **words, prompt_images=torch.tensor([0, 0, 1]))
    for row, (image, phrase) in enumerate(((0, 0), (0, 1), (1, 0))):
        one = {name: value[image : image + 1] for name, value in images.items()}
        own = {name: asked[name][phrase : phrase + 1] for name in words}
        alone = video_student.forward_video(**one, **own)
        torch.testing.assert_close(found.pred_masks[row], alone.pred_masks[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_questions_about_different_things_in_one_image_have_different_pasts(video_student) -> None:
    asked, memory = questions(), remembered()
    masks = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    images = {"pixel_values": asked["pixel_values"], "memory_features": memory,
              "memory_valid": torch.tensor([[False, True, True], [True] * 3])}  # fmt: skip
    words = {name: asked[name][[0, 0, 1]] for name in ("input_ids", "attention_mask")}
    about = torch.tensor([0, 0, 1])
    found = video_student.forward_video(**images, **words, memory_masks=masks, prompt_images=about)
    assert not torch.equal(found.pred_masks[0], found.pred_masks[1])
    for row, image in enumerate(about.tolist()):
        one = {name: value[image : image + 1] for name, value in images.items()}
        own = {name: value[row : row + 1] for name, value in words.items()}
        alone = video_student.forward_video(**one, **own, memory_masks=masks[row : row + 1])
        torch.testing.assert_close(found.pred_masks[row], alone.pred_masks[0], rtol=1e-4, atol=1e-4)


def test_with_everything_else_frozen_gradients_reach_the_memory_and_nothing_else(video_student) -> None:
    model = copy.deepcopy(video_student)
    new = {n for n, _ in model.named_parameters() if n.startswith(("memory_resampler.", "memory_attention."))}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in new)
    out = model.forward_video(**questions(), memory_features=remembered(), memory_masks=torch.ones(2, 3, 4, 4) / 2)
    sum(out[name].square().mean() for name in ANSWERS).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    blind = {n for n in new if n.endswith("k_proj.bias")}  # softmax does not see a shift of all its keys
    assert new - blind <= reached <= new


def test_a_video_student_is_saved_and_loaded(video_student, tmp_path) -> None:
    video_student.save_pretrained(tmp_path)
    again, report = EfficientSam3Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_tensors(video_student, again)
    with pytest.raises(UserError, match="already has a memory"):
        load_with_memory(tmp_path)


def test_what_cannot_be_remembered_is_refused(image_student, video_student) -> None:
    with pytest.raises(ValueError, match="no memory"):
        image_student[0].forward_video(**questions(), memory_features=remembered())
    with pytest.raises(ValueError, match="memory has 16 channels, but the student has 32"):
        video_student.remember(remembered()[:, :, :16])
    with pytest.raises(ValueError, match="no valid memory frame"):
        video_student.remember(remembered(), valid=torch.tensor([[True] * 3, [False] * 3]))
