"""Signals read from stores against the teachers that said them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import SamConfig, SamModel

from samdistill.config import AugmentConfig, DataConfig, PromptsConfig, TeacherEntry
from samdistill.data import Geometry, ObjectDataset, ViewTransform, collate_objects, open_source, record_key
from samdistill.ops.pca import Projection
from samdistill.store import FeatureStore, FeatureStoreWriter, StoreSpec, make_codec
from samdistill.teachers import Ensemble, PromptTeacher
from samdistill.teachers.base import Prompted
from samdistill.teachers.stored_signals import StoredSignals, from_records, record_seeds, record_shapes, to_records
from samdistill.types import GroupSignals, PromptGroup, Prompts, PromptSignals, UserError

SIDE, OBJECTS, VIEWS = 48, 2, 2
TERMS = ("encoder_patch", "prompt_embed", "decoder_mask_token", "dense_mask_logits")


@pytest.fixture(scope="module")
def data(world):
    """Two views of six images, with points, boxes and both among their prompts."""
    source = open_source(DataConfig(kind="sa1b", root=world), "train")
    prompts = PromptsConfig(objects=OBJECTS, points=(1, 2))
    transform = ViewTransform(Geometry(SIDE), AugmentConfig(hue=0.3))
    return [ObjectDataset(source, transform, prompts, source.keys[:6], seed=3, view=view) for view in range(VIEWS)]


@pytest.fixture(scope="module")
def views(data):
    found = [collate_objects(list(view)) for view in data]
    assert {group.multimask for batch in found for group in batch.groups} == {True, False}
    assert max(len(batch.groups) for batch in found) >= 3
    return found


@pytest.fixture(scope="module")
def ensemble(tracker, tmp_path_factory):
    """A SAM of 64 px and a SAM 3 tracker of 126 px about canvases of 48 px."""
    sizes = {"image_size": 64, "patch_size": 16}
    vision = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
              "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 48, "num_pos_feats": 8}  # fmt: skip
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    torch.manual_seed(0)
    config = SamConfig(
        vision_config=vision | sizes, prompt_encoder_config={"hidden_size": 16, **sizes}, mask_decoder_config=decoder
    )
    sam, place = SamModel(config), tmp_path_factory.mktemp("sam")
    for parameter in sam.parameters():
        parameter.data += torch.randn_like(parameter) * 0.2  # a fresh one answers nothing in particular
    sam.save_pretrained(place)
    teachers = []
    for name, folder, weight in (("sam", place, 3.0), ("tracker", tracker[1], 1.0)):
        teacher = PromptTeacher(TeacherEntry(name=name, checkpoint=str(folder), weight=weight))
        d = teacher.patch_channels
        teacher.projection = Projection(torch.zeros(d), torch.eye(d)[:8])
        teachers.append(teacher)
    return Ensemble(teachers)


def answered(signals, batch):
    asked = Prompted(batch, batch.groups)
    return signals.answer(asked, signals.read(asked))


def stores_of(root, ensemble, views, codec):
    found = {}
    for name, teacher in ensemble.teachers.items():
        shapes = record_shapes(teacher.projected.channels, teacher.width, teacher.grid, OBJECTS, dense=True)
        for feature, shape in shapes.items():
            spec = StoreSpec(feature, shape, SIDE, "aa", "bb", codec)
            with FeatureStoreWriter(root / name / feature, spec, make_codec(codec, shape)) as writer:
                for view, batch in enumerate(views):
                    seeds = record_seeds(batch).tolist()
                    records = to_records(answered(ensemble, batch)[name], batch.groups)
                    for row, key in enumerate(batch.images.keys):
                        writer.write(record_key(key, view), seeds[row], records[feature][row])
            found.setdefault(name, {})[feature] = FeatureStore(root / name / feature)
    return found


@pytest.fixture(scope="module")
def stores(ensemble, views, tmp_path_factory):
    root = tmp_path_factory.mktemp("features")
    return {codec: stores_of(root / codec, ensemble, views, codec) for codec in ("fp16", "fp32")}


def cached(stores, ensemble, terms=TERMS, **settings):
    return StoredSignals(stores, ensemble.weights, terms, **{"seed": 3, "views": VIEWS, **settings})


@pytest.mark.parametrize(("codec", "close"), [("fp32", 0.0), ("fp16", 1e-3)])
def test_what_is_read_is_what_was_said(codec, close, stores, ensemble, views):
    signals = cached(stores[codec], ensemble)
    assert signals.weights == {"sam": 0.75, "tracker": 0.25} == ensemble.weights
    assert signals.patch_channels == ensemble.patch_channels == {"sam": 8, "tracker": 8}
    for batch in views:
        said, read = answered(ensemble, batch), answered(signals, batch)
        assert list(read) == list(said)
        for name in said:
            pairs = [(said[name].encoder_patch, read[name].encoder_patch)]
            for one, two in zip(said[name].groups, read[name].groups, strict=True):
                pairs += [(getattr(one, f), getattr(two, f)) for f in ("prompt_embed", "mask_tokens", "low_res_masks")]
            for one, two in pairs:
                assert one.shape == two.shape and two.dtype == torch.float32
                assert (one - two).norm() <= close * one.norm()


def test_images_may_come_in_another_order_and_company(stores, ensemble, views, data):
    """A training batch is none of the cache's: other images, other groups, both views."""
    signals, (first, second) = cached(stores["fp32"], ensemble), views
    whole = answered(signals, second)["sam"]
    rows = [4, 0]
    batch = collate_objects([data[1][row] for row in rows])
    part = answered(signals, batch)["sam"]
    assert torch.equal(part.encoder_patch, whole.encoder_patch[rows])
    assert not torch.equal(part.encoder_patch, answered(signals, first)["sam"].encoder_patch[rows])
    tokens = {row: said.mask_tokens[at] for g, said in zip(second.groups, whole.groups, strict=True)
              for at, row in enumerate(g.rows.tolist())}  # fmt: skip
    for group, said in zip(batch.groups, part.groups, strict=True):
        assert said.low_res_masks.shape[2] == (3 if group.multimask else 1)
        for at, row in enumerate(group.rows.tolist()):
            assert torch.equal(said.mask_tokens[at], tokens[rows[row]])


def test_records_by_hand():
    """Two groups over three images whose rows are not in order; each value tells image, object and mask."""
    groups = tuple(
        PromptGroup(torch.tensor(rows), Prompts(torch.ones(len(rows), 2, dtype=torch.bool)), many)
        for rows, many in (([0, 2], True), ([1], False))
    )

    def masks(rows, m):
        return torch.tensor([[[[[100.0 * r + 10 * n + k]] for k in range(m)] for n in range(2)] for r in rows])

    said = tuple(
        GroupSignals(torch.tensor(rows).float().view(-1, 1, 1, 1, 1), torch.tensor(rows).float().view(-1, 1, 1, 1)
                     .expand(-1, 2, 4, 1), masks(rows, m))
        for rows, m in (([0, 2], 3), ([1], 1))
    )  # fmt: skip
    records = to_records(PromptSignals(torch.arange(3.0).view(3, 1, 1, 1), said), groups)
    assert records["prompt_embed"].flatten().tolist() == [0, 1, 2]
    assert records["mask_token"].shape == (3, 2, 4, 1) and records["mask_token"][:, 1, 3, 0].tolist() == [0, 1, 2]
    assert records["low_res_masks"].shape == (3, 6, 1, 1)
    assert records["low_res_masks"][1].flatten().tolist() == [100, 0, 0, 110, 0, 0]
    assert records["low_res_masks"][2].flatten().tolist() == [200, 201, 202, 210, 211, 212]
    back = from_records(records, groups)
    for one, two in zip(said, back.groups, strict=True):
        assert torch.equal(one.low_res_masks, two.low_res_masks) and torch.equal(one.mask_tokens, two.mask_tokens)
    with_masks = replace(groups[0], prompts=replace(groups[0].prompts, masks=torch.zeros(2, 2, 4, 4)))
    with pytest.raises(ValueError, match="first prompts"):
        to_records(PromptSignals(torch.zeros(3, 1, 1, 1), said), (with_masks, groups[1]))


def test_a_term_that_is_on_and_in_no_cache_is_an_error_and_one_that_is_off_is_not_read(stores, ensemble, views):
    part = {name: {f: s for f, s in own.items() if f != "low_res_masks"} for name, own in stores["fp32"].items()}
    with pytest.raises(UserError, match=r"dense_mask_logits is on, but low_res_masks of teacher 'sam' is in no cache"):
        cached(part, ensemble)
    with pytest.raises(UserError, match=r"encoder_patch of teacher 'tracker' is in no cache: run `samdistill cache`"):
        cached({"sam": part["sam"], "tracker": {}}, ensemble, ("encoder_patch",))
    signals = cached(part, ensemble, ("decoder_mask_token",))
    read = answered(signals, views[0])["tracker"]
    assert read.encoder_patch.numel() == 0 and read.groups[0].prompt_embed.numel() == 0
    assert read.groups[0].low_res_masks is None and read.groups[0].mask_tokens.shape[1:] == (OBJECTS, 4, 32)


def test_a_batch_of_another_seed_view_or_image_is_refused(stores, ensemble, views):
    batch = views[1]
    with pytest.raises(UserError, match=r"none of the 2 cached views is in the batch: set data\.seed as it was"):
        answered(cached(stores["fp32"], ensemble, seed=4), batch)
    with pytest.raises(UserError, match="none of the 1 cached views"):
        answered(cached(stores["fp32"], ensemble, views=1), batch)
    source = ("x", *batch.images.keys[1:])
    with pytest.raises(UserError, match="x: none of the 2 cached views"):
        answered(cached(stores["fp32"], ensemble), replace(batch, images=replace(batch.images, keys=source)))


def test_a_record_that_is_gone_or_of_another_seed_is_named(ensemble, views, tmp_path):
    batch = views[0]
    kept = replace(batch, images=replace(batch.images, keys=("other", *batch.images.keys[1:])))
    stores = stores_of(tmp_path / "a", ensemble, [kept], "fp32")
    with pytest.raises(UserError, match=f"no record of '{batch.images.keys[0]}' among 6; cache it first"):
        answered(cached(stores, ensemble), batch)
    shifted = replace(batch, images=replace(batch.images, seeds=batch.images.seeds + 1))
    stores = stores_of(tmp_path / "b", ensemble, [shifted], "fp32")
    with pytest.raises(UserError, match="6 records show another view or answer other prompts"):
        answered(cached(stores, ensemble), batch)


def test_a_record_of_other_prompts_is_named(stores, ensemble, views):
    """As when the masks that a box was drawn around have changed since; less than an eighth of a pixel is rounding."""
    batch, signals = views[0], cached(stores["fp32"], ensemble)
    number = next(i for i, group in enumerate(batch.groups) if group.prompts.boxes is not None)
    group = batch.groups[number]

    def shifted(by: float):
        boxes = group.prompts.boxes.clone()
        boxes[0, 1, 2] += by
        groups = list(batch.groups)
        groups[number] = replace(group, prompts=replace(group.prompts, boxes=boxes))
        return replace(batch, draws=(tuple(groups),))

    key = batch.images.keys[group.rows[0]]
    with pytest.raises(UserError, match=f"1 records .* other prompts .*'{key}.*have its masks changed"):
        answered(signals, shifted(1.0))
    boxes = group.prompts.boxes
    assert torch.equal(record_seeds(shifted(((boxes[0, 1, 2] * 8).round() / 8 - boxes[0, 1, 2]).item())),
                       record_seeds(batch))  # fmt: skip


def test_it_knows_whom_it_can_teach(stores, ensemble):
    signals = cached(stores["fp32"], ensemble)
    signals.meets((5, 5), 16, ("encoder_patch",))
    with pytest.raises(UserError, match="teacher 'tracker' has a decoder of width 32 and the student one of 16"):
        signals.meets((5, 5), 16, TERMS)
    with pytest.raises(UserError, match="teacher 'sam' has an image embedding of 4 x 4 cells"):
        signals.meets((18, 18), 16, ("encoder_patch",))
