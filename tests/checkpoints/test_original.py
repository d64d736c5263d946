"""The tracker of ``sam3.pt``: its names against a second, independent map, and what is opened against transformers."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from original_names import as_original, to_original
from safetensors.torch import save_file
from transformers import (
    Sam3Config,
    Sam3Model,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    Sam3TrackerVideoConfig,
    Sam3TrackerVideoModel,
)

from samdistill.checkpoints.merge import merge
from samdistill.checkpoints.original import load_original, original_config
from samdistill.checkpoints.promptable import load_model, load_promptable
from samdistill.checkpoints.rename_tracker import to_tracker
from samdistill.inference.geometry import own_geometry
from samdistill.ops.promptable import embed, embedding_grid, image_size, predict
from samdistill.sandbox.scenes import render_scenes
from samdistill.teachers.loading import settings
from samdistill.types import ImageBatch, Prompts, UserError


def full_size(kind: type) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return kind(kind.config_class()).state_dict()


def test_names_and_shapes_of_the_published_tracker():
    original = as_original(full_size(Sam3TrackerVideoModel))
    assert sum(name.startswith("tracker.") for name in original) == 309
    known = {
        "detector.backbone.vision_backbone.sam2_convs.0.dconv_2x2_1.weight": (512, 256, 2, 2),
        "detector.backbone.vision_backbone.sam2_convs.3.conv_3x3.bias": (256,),
        "detector.backbone.vision_backbone.trunk.blocks.31.attn.qkv.weight": (3072, 1024),
        "tracker.maskmem_tpos_enc": (7, 1, 1, 64),
        "tracker.no_mem_embed": (1, 1, 256),
        "tracker.no_obj_embed_spatial": (1, 64),
        "tracker.mask_downsample.weight": (1, 1, 4, 4),
        "tracker.transformer.encoder.layers.3.cross_attn_image.k_proj.weight": (256, 64),
        "tracker.transformer.encoder.layers.3.norm3.weight": (256,),
        "tracker.transformer.encoder.norm.bias": (256,),
        "tracker.maskmem_backbone.mask_downsampler.encoder.9.weight": (256, 64, 3, 3),
        "tracker.maskmem_backbone.mask_downsampler.encoder.10.weight": (256,),
        "tracker.maskmem_backbone.fuser.layers.1.gamma": (256,),
        "tracker.maskmem_backbone.fuser.layers.1.pwconv2.weight": (256, 1024),
        "tracker.maskmem_backbone.out_proj.weight": (64, 256, 1, 1),
        "tracker.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 128),
        "tracker.sam_prompt_encoder.point_embeddings.3.weight": (1, 256),
        "tracker.sam_prompt_encoder.mask_downscaling.6.weight": (256, 16, 1, 1),
        "tracker.sam_mask_decoder.transformer.layers.1.cross_attn_image_to_token.out_proj.weight": (256, 128),
        "tracker.sam_mask_decoder.transformer.layers.0.mlp.lin1.weight": (2048, 256),
        "tracker.sam_mask_decoder.transformer.norm_final_attn.weight": (256,),
        "tracker.sam_mask_decoder.output_upscaling.3.weight": (64, 32, 2, 2),
        "tracker.sam_mask_decoder.output_hypernetworks_mlps.3.layers.2.weight": (32, 256),
        "tracker.sam_mask_decoder.pred_obj_score_head.layers.1.weight": (256, 256),
        "tracker.obj_ptr_proj.layers.2.bias": (256,),
        "tracker.obj_ptr_tpos_proj.weight": (64, 256),
    }
    assert {name: tuple(original[name].shape) for name in known} == known


@pytest.mark.parametrize(("kind", "count"), [(Sam3TrackerModel, 685), (Sam3TrackerVideoModel, 845)])
def test_every_tensor_of_both_trackers_is_produced_with_its_shape(kind, count):
    original = as_original(full_size(Sam3TrackerVideoModel))
    original |= to_original(full_size(Sam3Model))[0]  # the detector's heads, which are left over
    original["detector.backbone.vision_backbone.trunk.blocks.0.attn.freqs_cis"] = torch.empty(576, 32)
    found, left = to_tracker(original)
    wanted = full_size(kind)
    assert len(wanted) == count
    assert {name: found[name].shape for name in wanted} == {name: value.shape for name, value in wanted.items()}
    memory = set(found) - set(wanted)
    assert all(any(re.match(p, n) for p in kind._keys_to_ignore_on_load_unexpected or ()) for n in memory)
    detector = r"detector\.(backbone\.(language_backbone|vision_backbone\.convs)|dot_prod_scoring|geometry_encoder"
    detector += r"|segmentation_head|transformer)\.|.*freqs_cis$"
    assert [name for name in left if not re.match(detector, name)] == []


def test_embeddings_of_points_that_do_not_make_a_table_are_refused():
    begin = "tracker.sam_prompt_encoder.point_embeddings"
    rows = {f"{begin}.{i}.weight": torch.zeros(1, 8) for i in range(4)}
    assert to_tracker(rows)[0]["prompt_encoder.point_embed.weight"].shape == (4, 8)
    with pytest.raises(UserError, match=r"point_embeddings.1.weight: missing, but the file has 3 point embeddings"):
        to_tracker({name: value for name, value in rows.items() if ".1." not in name})
    with pytest.raises(UserError, match="must all have the same shape"):
        to_tracker(rows | {f"{begin}.2.weight": torch.zeros(1, 9)})


# opening one


@pytest.fixture(scope="module")
def file(hosts, tmp_path_factory):
    """(path of a ``sam3.pt`` with a detector and a tracker, the tracker as transformers has it)."""
    video, folder = hosts["video"]
    config = Sam3TrackerConfig.from_dict(
        json.loads((folder / "config.json").read_text())["tracker_config"] | {"model_type": "sam3_tracker"}
    )
    config.vision_config.backbone_config.layer_norm_eps = 1e-5  # the original code's
    config.vision_config.scale_factors = [4.0, 2.0, 1.0]  # with a fourth, "no memory" is added to what no head reads
    model = Sam3TrackerModel(config).eval()
    generator = torch.Generator().manual_seed(3)
    for value in model.state_dict().values():
        value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    model.shared_image_embedding.load_state_dict(model.prompt_encoder.shared_embedding.state_dict())
    memory = {n: v for n, v in video.tracker_model.state_dict().items() if n not in model.state_dict()}
    detector, left = to_original(video.detector_model.state_dict())
    unread = "vision_encoder.neck.fpn_layers.3."
    fourth = {n: v for n, v in video.detector_model.state_dict().items() if n.startswith(unread)}
    tracker = as_original(memory | model.state_dict() | fourth)
    assert not left
    path = tmp_path_factory.mktemp("original") / "sam3.pt"
    torch.save({"model": {name: value.clone() for name, value in (detector | tracker).items()}}, path)
    shutil.copy(folder / "config.json", path.parent)
    return path, model


def asked(size: int = 126) -> tuple[ImageBatch, dict[str, Prompts]]:
    valid = torch.ones(1, 2, dtype=torch.bool)
    points = torch.tensor([[[[30.0, 40.0], [90.0, 20.0]], [[64.0, 64.0], [10.0, 100.0]]]])
    labels = torch.tensor([[[1, 0], [1, 1]]])
    boxes = torch.tensor([[[10.0, 12.0, 50.0, 40.0], [60.0, 30.0, 120.0, 110.0]]])
    masks = torch.randn(1, 2, 36, 36, generator=torch.Generator().manual_seed(1))
    prompts = {
        "points": Prompts(valid, points, labels), "boxes": Prompts(valid, boxes=boxes),
        "both": Prompts(valid, points, labels, boxes), "mask": Prompts(valid, points, labels, masks=masks),
    }  # fmt: skip
    return ImageBatch.full(render_scenes(range(1), size, seed=4).images), prompts


@torch.no_grad()
def test_the_tracker_in_an_original_file_is_transformers_tracker(file):
    path, model = file
    found = load_promptable(path)
    assert type(found) is Sam3TrackerModel and not found.training
    assert (image_size(found), embedding_grid(found), own_geometry(found)) == (126, (9, 9), "square")
    norms = [m for m in found.vision_encoder.backbone.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert norms and {norm.eps for norm in norms} == {1e-5}
    images, prompts = asked()
    pixels = (images.images / 255 - 0.5) / 0.5
    for name, prompt in prompts.items():
        for multimask in (False, True):
            said = predict(found, embed(found, images), prompt, multimask)
            inputs = {"input_points": prompt.points, "input_labels": prompt.labels, "input_boxes": prompt.boxes}
            if prompt.masks is None:
                direct = model(pixel_values=pixels, multimask_output=multimask, **inputs)
                expected = direct.pred_masks, direct.iou_scores
            else:  # a mask belongs to one object, and transformers adds it to the image
                each = [
                    model(
                        pixel_values=pixels, multimask_output=multimask, input_masks=prompt.masks[:, i : i + 1],
                        **{key: None if v is None else v[:, i : i + 1] for key, v in inputs.items()},
                    )
                    for i in range(2)
                ]  # fmt: skip
                expected = (
                    torch.cat([one.pred_masks for one in each], 1),
                    torch.cat([one.iou_scores for one in each], 1),
                )
            for ours, theirs in zip((said.low_res_masks, said.iou_scores), expected, strict=True):
                assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max(), name


@torch.no_grad()
def test_other_sizes_and_a_file_without_a_configuration(file, tmp_path):
    path, _ = file
    larger = load_promptable(path, 168)
    assert (image_size(larger), embedding_grid(larger)) == (168, (12, 12))
    images, prompts = asked(168)
    assert predict(larger, embed(larger, images), prompts["boxes"]).low_res_masks.shape[-2:] == (48, 48)
    with pytest.raises(UserError, match="not a multiple of the patch size 14"):
        load_promptable(path, 100)
    config = original_config(Path(shutil.copy(path, tmp_path)), Sam3TrackerConfig)
    published = Sam3TrackerConfig()
    published.vision_config.backbone_config.layer_norm_eps = 1e-5
    published.vision_config.scale_factors = [4.0, 2.0, 1.0]
    assert settings(config.to_dict()) == settings(published.to_dict())


def test_the_memory_of_an_original_file_is_opened_too(file, hosts):
    path, _ = file
    video = load_original(path, Sam3TrackerVideoModel)
    expected = hosts["video"][0].tracker_model.state_dict()
    memory = [name for name in expected if name.startswith("memory_")]
    assert len(memory) > 40
    assert all(torch.equal(video.state_dict()[name], expected[name]) for name in memory)


@pytest.mark.parametrize("kind", ["sam3", "tracker"])
def test_a_configuration_of_the_other_part_tells_the_image_encoder(file, hosts, tmp_path, kind):
    path, _ = file
    shutil.copy(hosts[kind][1] / "config.json", tmp_path)
    there = shutil.copy(path, tmp_path / "sam3.pt")
    for wanted in (Sam3Config, Sam3TrackerConfig, Sam3TrackerVideoConfig):
        found = original_config(tmp_path / "sam3.pt", wanted)
        assert type(found) is wanted and found.vision_config.backbone_config.num_hidden_layers == 2
        assert found.vision_config.backbone_config.layer_norm_eps == 1e-5
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"config.json: describes a 'bert' model; beside an original sam3.pt it must"):
        load_promptable(there)


@torch.no_grad()
def test_a_merged_file_and_a_merged_folder_are_one_tracker(file, student, tmp_path):
    path, model = file
    model.save_pretrained(tmp_path / "host")
    merge(student[1], tmp_path / "host", tmp_path / "folder")
    merge(student[1], path, tmp_path / "merged.pt")
    shutil.copy(path.parent / "config.json", tmp_path)
    by_file, by_folder = load_promptable(tmp_path / "merged.pt"), load_promptable(tmp_path / "folder")
    images, prompts = asked()
    for prompt in prompts.values():
        first, second = (predict(found, embed(found, images), prompt) for found in (by_file, by_folder))
        torch.testing.assert_close(first.low_res_masks, second.low_res_masks, atol=1e-5, rtol=1e-5)


def test_a_file_without_a_tracker_is_a_detector_and_answers_no_prompts(file, tmp_path):
    path, _ = file
    state = torch.load(path, weights_only=True)["model"]
    torch.save({n: v for n, v in state.items() if not n.startswith("tracker.")}, tmp_path / "sam3.pt")
    shutil.copy(path.parent / "config.json", tmp_path)
    assert isinstance(load_model(tmp_path / "sam3.pt"), Sam3Model)
    with pytest.raises(UserError, match="a Sam3Model has no prompt decoder"):
        load_promptable(tmp_path / "sam3.pt")


def test_a_tracker_that_is_not_whole_is_refused(file, tmp_path):
    path, _ = file
    state = torch.load(path, weights_only=True)["model"]
    shutil.copy(path.parent / "config.json", tmp_path)
    for name in ("tracker.sam_mask_decoder.iou_token.weight", "tracker.no_mem_embed"):
        torch.save({key: value for key, value in state.items() if key != name}, tmp_path / "sam3.pt")
        with pytest.raises(UserError, match="wrong checkpoint: 1 missing keys for a Sam3TrackerModel"):
            load_promptable(tmp_path / "sam3.pt")


@torch.no_grad()
def test_the_tracker_in_a_video_models_folder_opens_as_the_original_does(file, hosts, tmp_path):
    """With the names of the published repository; ``save_pretrained`` writes ``tracker_model.`` twice."""
    path, model = file
    folder = shutil.copytree(hosts["video"][1], tmp_path / "video")
    state = {name: value.clone() for name, value in hosts["video"][0].state_dict().items()}
    for name, value in model.state_dict().items():
        if name.startswith("vision_encoder.neck."):
            state[name.replace("vision_encoder.neck.", "tracker_neck.")] = value
        else:
            part = "detector_model" if name.startswith("vision_encoder.") else "tracker_model"
            state[f"{part}.{name}"] = value
    state = {name: value.contiguous() for name, value in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    for part in ("detector_config", "tracker_config"):
        raw[part]["vision_config"]["backbone_config"]["layer_norm_eps"] = 1e-5
    (folder / "config.json").write_text(json.dumps(raw))
    by_folder, by_file = load_promptable(folder), load_promptable(path)
    images, prompts = asked()
    for prompt in prompts.values():
        first, second = (predict(found, embed(found, images), prompt) for found in (by_folder, by_file))
        assert torch.equal(first.low_res_masks, second.low_res_masks)
    by_folder.save_pretrained(tmp_path / "saved")
    again = load_promptable(tmp_path / "saved")
    assert type(again.config) is Sam3TrackerConfig
    assert torch.equal(predict(again, embed(again, images), prompt).low_res_masks, first.low_res_masks)
