"""Teachers against the transformers models whose weights they read."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Sam3Config, SamImageProcessor

from samdistill.checkpoints.original import original_config
from samdistill.config import TeacherConfig
from samdistill.ops.images import IMAGENET_MEAN, IMAGENET_STD, normalise
from samdistill.teachers import TEACHERS, build_teacher, describe_teacher
from samdistill.teachers.base import DTYPES
from samdistill.teachers.sam3 import set_image_size
from samdistill.types import ImageBatch, UserError


def images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def config(folder, kind="sam3", **settings) -> TeacherConfig:
    return TeacherConfig(kind=kind, path=str(folder), **settings)


@pytest.fixture(params=sorted(TEACHERS))
def any_teacher(request):
    """(config, transformers model) of every registered kind."""
    model, folder = request.getfixturevalue(request.param)
    return config(folder, request.param), model


def test_every_kind_keeps_the_promises_of_the_interface(any_teacher):
    given, _ = any_teacher
    teacher = build_teacher(given)
    batch = ImageBatch.full(images(2, teacher.image_size))
    features = teacher.extract(batch, ["image_embedding"])
    embedding = features["image_embedding"]
    assert list(features) == ["image_embedding"] and "image_embedding" in teacher.taps
    assert embedding.shape == (2, *teacher.embedding_shape)
    assert embedding.dtype == torch.float32 and embedding.isfinite().all() and embedding.std() > 0
    assert not embedding.requires_grad and not embedding.is_inference()
    again = teacher.extract(batch, ["image_embedding"])["image_embedding"]
    assert torch.equal(embedding, again)
    alone = teacher.extract(ImageBatch.full(batch.images[1:]), ["image_embedding"])["image_embedding"]
    torch.testing.assert_close(alone[0], embedding[1], atol=1e-4, rtol=1e-4)


def test_features_can_be_the_target_of_a_loss(any_teacher):
    given, _ = any_teacher
    teacher = build_teacher(given)
    student = torch.zeros(1, *teacher.embedding_shape, requires_grad=True)
    target = teacher.extract(ImageBatch.full(images(1, teacher.image_size)))["image_embedding"]
    (student * target).sum().backward()
    assert torch.equal(student.grad, target)


def test_describe_agrees_with_the_loaded_teacher_and_needs_no_weights(any_teacher, tmp_path):
    given, _ = any_teacher
    teacher = build_teacher(given)
    shutil.copy(f"{given.path}/config.json", tmp_path)
    info = describe_teacher(given.model_copy(update={"path": str(tmp_path)}))
    assert (info.image_size, info.embedding_shape) == (teacher.image_size, teacher.embedding_shape)
    assert (info.mean, info.std, info.kind) == (teacher.mean, teacher.std, given.kind)
    module = getattr(teacher, "_trunk", None) or teacher._encoder
    assert info.params == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_in_float32_and_another_teacher(any_teacher, precision):
    given, _ = any_teacher
    full, half = build_teacher(given), build_teacher(given.model_copy(update={"precision": precision}))
    batch = ImageBatch.full(images(1, full.image_size))
    first, second = (t.extract(batch)["image_embedding"] for t in (full, half))
    assert second.dtype == torch.float32 and not torch.equal(first, second)
    error = (first - second).norm() / first.norm()
    assert error < (0.06 if precision == "bf16" else 0.01)
    assert full.fingerprint != half.fingerprint


def test_an_unknown_tap_and_another_image_size_are_refused(any_teacher):
    given, _ = any_teacher
    teacher = build_teacher(given)
    batch = ImageBatch.full(images(1, teacher.image_size))
    with pytest.raises(UserError, match="did you mean 'image_embedding'"):
        teacher.extract(batch, ["image_embeding"])
    with pytest.raises(UserError, match=r"but the images are 28 x 28"):
        teacher.extract(ImageBatch.full(images(1, 28)))


def test_autocast_around_a_teacher_changes_nothing(any_teacher):
    given, _ = any_teacher
    teacher = build_teacher(given)
    batch = ImageBatch.full(images(1, teacher.image_size))
    plain = teacher.extract(batch)["image_embedding"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.extract(batch)["image_embedding"], plain)


# SAM 3


def trunk_output(model, batch: ImageBatch) -> torch.Tensor:
    """What the host's own trunk gives, normalised by hand: 0.5 and 0.5."""
    with torch.no_grad():
        tokens = model.vision_encoder.backbone((batch.images / 255 - 0.5) / 0.5).last_hidden_state
    side = round(tokens.shape[1] ** 0.5)
    return torch.stack([token.T.reshape(-1, side, side) for token in tokens])


@pytest.mark.parametrize("source", ["sam3", "tracker"])
def test_sam3_gives_the_hosts_raw_trunk_output(source, request):
    model, folder = request.getfixturevalue(source)
    teacher = build_teacher(config(folder))
    batch = ImageBatch.full(images(2, 126))
    torch.testing.assert_close(
        teacher.extract(batch)["image_embedding"], trunk_output(model, batch), atol=1e-4, rtol=1e-4
    )


def test_sam3_video_layout_is_read_from_its_detector(sam3, tmp_path):
    _, folder = sam3
    state = {f"detector_model.{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(state | {"tracker_neck.fpn_layers.0.proj1.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam3_video", "detector_config": raw}))
    assert build_teacher(config(tmp_path)).fingerprint == build_teacher(config(folder)).fingerprint


def test_only_the_trunk_is_built_and_read(sam3, monkeypatch):
    """The text encoder, four tenths of the real checkpoint, is neither built nor read."""
    import transformers

    _, folder = sam3

    def refuse(*args, **kwargs):
        raise AssertionError("the text encoder was built")

    monkeypatch.setattr(transformers.CLIPTextModelWithProjection, "__init__", refuse)
    monkeypatch.setattr(transformers.Sam3Model, "__init__", refuse)
    read: list[str] = []
    real = safe_open

    class Watched:
        def __init__(self, *args):
            self.file = real(*args)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return None

    monkeypatch.setattr("samdistill.checkpoints.files.safe_open", Watched)
    build_teacher(config(folder))
    assert read and all(name.startswith("vision_encoder.backbone.") for name in read)


def test_the_original_file_is_the_same_teacher_as_a_folder_with_its_layer_norms(sam3, original, tmp_path, near):
    _, folder = sam3
    same = shutil.copytree(folder, tmp_path / "same")
    raw = json.loads((folder / "config.json").read_text())
    assert raw["vision_config"]["backbone_config"]["layer_norm_eps"] == 1e-6  # and so it is beside the original file
    raw["vision_config"]["backbone_config"]["layer_norm_eps"] = 1e-5
    (same / "config.json").write_text(json.dumps(raw))
    plain, first, second = (build_teacher(config(place)) for place in (folder, same, original))
    assert {m.eps for m in second._trunk.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
    batch = ImageBatch.full(images(1, 126))
    assert first.fingerprint == second.fingerprint != plain.fingerprint  # so that no cache of the one serves the other
    near(first.extract(batch)["image_embedding"], second.extract(batch)["image_embedding"])


def test_without_a_configuration_sam3_pt_is_the_published_architecture(tmp_path):
    torch.save({"detector.transformer.decoder.norm.bias": torch.zeros(256)}, tmp_path / "sam3.pt")
    info = describe_teacher(config(tmp_path / "sam3.pt"))
    assert (info.image_size, info.embedding_shape) == (1008, (1024, 72, 72))
    assert info.params == pytest.approx(446.237e6, rel=1e-5)  # measured on transformers' Sam3Model
    assert original_config(tmp_path / "sam3.pt", Sam3Config).vision_config.backbone_config.layer_norm_eps == 1e-5


def test_the_fingerprint_sees_weights_size_and_heads(sam3, tmp_path):
    _, folder = sam3
    prints = [build_teacher(config(folder)).fingerprint, build_teacher(config(folder, image_size=140)).fingerprint]
    changed = shutil.copytree(folder, tmp_path / "changed")
    state = load_file(changed / "model.safetensors")
    name = "vision_encoder.backbone.layers.1.mlp.fc1.bias"
    state[name] = torch.nextafter(state[name], torch.tensor(9.0))  # one bit
    save_file(state, changed / "model.safetensors", {"format": "pt"})
    prints.append(build_teacher(config(changed)).fingerprint)
    heads = shutil.copytree(folder, tmp_path / "heads")
    raw = json.loads((heads / "config.json").read_text())
    raw["vision_config"]["backbone_config"]["num_attention_heads"] = 2  # no tensor shows it
    (heads / "config.json").write_text(json.dumps(raw))
    prints.append(build_teacher(config(heads)).fingerprint)
    assert len(set(prints)) == 4
    assert build_teacher(config(folder)).fingerprint == prints[0]


@pytest.mark.parametrize("size", [70, 126, 140, 252])
def test_another_image_size_is_what_building_the_model_with_it_gives(sam3, size):
    model, folder = sam3
    backbone = json.loads((folder / "config.json").read_text())["vision_config"]["backbone_config"]
    from transformers import Sam3ViTConfig

    rebuilt = AutoModel.from_config(Sam3ViTConfig.from_dict(backbone | {"image_size": size})).eval()
    rebuilt.load_state_dict(model.vision_encoder.backbone.state_dict())
    teacher = build_teacher(config(folder, image_size=size))
    assert teacher.embedding_shape == (64, size // 14, size // 14)
    batch = ImageBatch.full(images(1, size))
    with torch.no_grad():
        expected = rebuilt((batch.images / 255 - 0.5) / 0.5).last_hidden_state
    found = teacher.extract(batch)["image_embedding"].flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    # and resizing a model in place is the same again, where its old positions are not
    resized = AutoModel.from_config(Sam3ViTConfig.from_dict(backbone)).eval()
    resized.load_state_dict(rebuilt.state_dict())
    set_image_size(resized, size)
    with torch.no_grad():
        torch.testing.assert_close(resized((batch.images / 255 - 0.5) / 0.5).last_hidden_state, expected)


@pytest.mark.parametrize(("size", "near"), [(130, "126 or 140"), (13, "14"), (1000, "994 or 1008")])
def test_a_size_that_is_no_multiple_of_the_patch_lists_the_nearest(sam3, size, near):
    with pytest.raises(UserError, match=f"image_size={size}.*nearest that work: {near}$"):
        build_teacher(config(sam3[1], image_size=size))


def test_buffers_stay_in_float32_when_weights_are_halved(sam3):
    teacher = build_teacher(config(sam3[1], precision="bf16"))
    assert {p.dtype for p in teacher._trunk.parameters()} == {DTYPES["bf16"]}
    assert {b.dtype for b in teacher._trunk.buffers() if b.is_floating_point()} == {torch.float32}


def test_the_packaged_sandbox_teacher():
    """Its weights are float16 on disk; the teacher runs them as asked."""
    info = describe_teacher(config("sandbox"))
    teacher = build_teacher(config("sandbox"))
    embedding = teacher.extract(ImageBatch.full(images(1, info.image_size)))["image_embedding"]
    assert embedding.shape[1:] == info.embedding_shape and embedding.std() > 0
    assert {p.dtype for p in teacher._trunk.parameters()} == {torch.float32}


# SAM and SAM 2


def test_sam_matches_transformers_with_padding(sam):
    """A wide image, processed by transformers (longest side, zero padding after normalisation), and by the teacher."""
    model, folder = sam
    photo = images(1, 64, seed=3)[0, :, :40]
    processor = SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    pixels = processor(photo, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model.get_image_embeddings(pixels)
    canvas = torch.full(
        (1, 3, 64, 64), 77, dtype=torch.uint8
    )  # whatever the padding holds, the teacher sees none of it
    canvas[0, :, :40] = photo
    batch = ImageBatch(
        canvas, torch.tensor([[40, 64]]), torch.tensor([[40, 64]]), ("a",), torch.zeros(1, dtype=torch.int64)
    )
    found = build_teacher(config(folder, "sam")).extract(batch)["image_embedding"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_sam2_matches_transformers_before_the_no_memory_embedding(sam2):
    model, folder = sam2
    batch = ImageBatch.full(images(2, 128, seed=4))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = model.get_image_embeddings((batch.images / 255 - mean) / std)[-1]
    found = build_teacher(config(folder, "sam2")).extract(batch)["image_embedding"]
    torch.testing.assert_close(found + model.no_memory_embedding.view(1, -1, 1, 1), expected, atol=1e-4, rtol=1e-4)


def test_sam2s_fine_levels_are_those_that_its_mask_decoder_reads(sam2):
    model, folder = sam2
    batch = ImageBatch.full(images(2, 128, seed=4))
    teacher = build_teacher(config(folder, "sam2"))
    *fine, embedding = teacher.maps(batch)
    with torch.no_grad():
        wanted = model.get_image_embeddings(normalise(batch.images, IMAGENET_MEAN, IMAGENET_STD))
    for own, level in zip(fine, wanted[:2], strict=True):
        torch.testing.assert_close(own, level)
    torch.testing.assert_close(embedding + model.no_memory_embedding.view(1, -1, 1, 1), wanted[2])
    info = describe_teacher(config(folder, "sam2"))
    assert list(info.shapes) == list(teacher.taps) == ["high_resolution_0", "high_resolution_1", "image_embedding"]
    assert list(info.shapes.values()) == [tuple(level.shape[1:]) for level in (*fine, embedding)]


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_sam_and_sam2_take_their_own_size_only(kind, request):
    _, folder = request.getfixturevalue(kind)
    own = describe_teacher(config(folder, kind)).image_size
    assert build_teacher(config(folder, kind, image_size=own)).image_size == own
    with pytest.raises(UserError, match=f"learned positions for {own} pixels only"):
        describe_teacher(config(folder, kind, image_size=own * 2))


# Wrong input


def test_wrong_checkpoints_are_named(sam3, sam, original, tmp_path):
    _, folder = sam3
    with pytest.raises(UserError, match="trunk is a 'sam_vision_model', not SAM 3's ViT"):
        build_teacher(config(sam[1]))
    with pytest.raises(UserError, match="a 'sam3' model, not one of kind 'sam'"):
        build_teacher(config(folder, "sam"))
    cases = {
        "lacks 1 tensors": lambda s: s.pop("vision_encoder.backbone.layer_norm.bias"),
        "has unknown 1 tensors": lambda s: s.update(
            {"vision_encoder.backbone.layers.7.layer_norm1.bias": torch.ones(64)}
        ),
        r"shape \(65,\)": lambda s: s.update({"vision_encoder.backbone.layer_norm.bias": torch.ones(65)}),
        "no tensors of SAM 3's image trunk": lambda s: [s.pop(k) for k in list(s) if "backbone" in k],
    }
    for number, (message, damage) in enumerate(cases.items()):
        broken = shutil.copytree(folder, tmp_path / str(number))
        state = load_file(broken / "model.safetensors")
        damage(state)
        save_file(state, broken / "model.safetensors")
        with pytest.raises(UserError, match=message):
            build_teacher(config(broken))
    foreign = tmp_path / "other.pt"
    torch.save({"model": {"encoder.weight": torch.ones(3)}}, foreign)
    with pytest.raises(UserError, match=r"other\.pt: wrong checkpoint"):
        build_teacher(config(foreign))


@pytest.mark.parametrize("path", ["nowhere/at/all", "./nothing", "missing.pt", "folder/missing.safetensors"])
def test_a_path_that_is_not_there_is_said_at_once(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="no such file or folder"):
        describe_teacher(config(path))


def test_an_unreachable_hub_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        build_teacher(config("facebook/sam3-not-in-any-cache"))
    assert "facebook/sam3-not-in-any-cache" in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_kind_gets_a_suggestion(sam3):
    with pytest.raises(UserError, match="no teacher is called 'sam33'; did you mean 'sam3'"):
        build_teacher(config(sam3[1], "sam33"))


def test_a_merged_model_is_no_teacher(sam3, tmp_path):
    raw = json.loads((sam3[1] / "config.json").read_text())
    raw["vision_config"]["backbone_config"] = {"model_type": "samdistill_student_trunk", "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="trunk is a 'samdistill_student_trunk', not SAM 3's ViT"):
        describe_teacher(config(tmp_path))
