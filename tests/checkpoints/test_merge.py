"""Merging keeps the teacher's heads bit for bit, puts the student's trunk in, and fails on whatever would not fit."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Sam3Model

from samdistill.checkpoints.files import open_weights
from samdistill.checkpoints.merge import merge
from samdistill.checkpoints.original import load_original, merged_state
from samdistill.checkpoints.student import original_student_name, student_name
from samdistill.students import StudentTrunk, StudentTrunkConfig
from samdistill.types import UserError

TRUNK = "detector.backbone.vision_backbone.trunk."


def build_student(**settings) -> StudentTrunk:
    torch.manual_seed(2)
    config = {"backbone": "es_ev_s", "head": "published", "hidden_size": 64, "image_size": 126} | settings
    return StudentTrunk(StudentTrunkConfig(**config)).eval()


def load(folder, cls):
    return getattr(transformers, cls).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)


def trunk_of(model):
    return getattr(model, "detector_model", model).vision_encoder.backbone


PIXELS = torch.randn(1, 3, 126, 126, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["sam3", "tracker", "video"])
def test_a_folder_loads_with_nothing_missing_and_every_kept_tensor_equal(name, hosts, student, tmp_path, near):
    host, folder = hosts[name]
    model, run = student
    out = tmp_path / "merged"
    report = merge(run, folder, out)

    merged, found = load(out, type(host).__name__)
    assert not any(found.values()), found
    assert isinstance(trunk_of(merged), StudentTrunk)
    before, after = host.state_dict(), merged.state_dict()
    own = {n for n in before if "vision_encoder.backbone." in n}
    assert all(torch.equal(after[n], before[n]) for n in before if n not in own)
    theirs = trunk_of(merged).state_dict()
    assert all(torch.equal(theirs[n], tensor) for n, tensor in model.state_dict().items())
    with torch.no_grad():
        near(trunk_of(merged).eval()(PIXELS).last_hidden_state, model(PIXELS).last_hidden_state)

    in_file, was = load_file(out / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(report.kept) | set(report.added) == set(in_file)
    assert set(report.kept) | set(report.removed) == set(was)
    assert not set(report.added) & set(report.removed)
    assert all(torch.equal(in_file[n], was[n]) for n in report.kept)
    assert len(report.removed) == len(own) and len(report.added) == len(theirs)


def test_totals_are_the_parameters_counted_on_the_models(hosts, student, tmp_path):
    host, folder = hosts["sam3"]
    model, run = student
    report = merge(run, folder, tmp_path / "merged")
    vit = sum(p.numel() for p in host.vision_encoder.backbone.parameters())
    everything = sum(p.numel() for p in host.parameters())
    assert report.totals["removed"]["elements"] == vit
    assert report.totals["kept"]["elements"] == everything - vit
    assert report.totals["kept"]["bytes"] == 4 * (everything - vit)
    assert report.totals["added"]["elements"] == sum(t.numel() for t in model.state_dict().values())
    saved = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert saved == report.to_dict() and saved["totals"] == report.totals
    name = "detr_decoder.query_embed.weight"
    assert saved["kept"][name] == {"shape": [10, 32], "dtype": "float32", "bytes": 1280}
    lines = str(report).splitlines()
    assert any(line.startswith("removed") and f"{vit / 1e6:.3f} M" in line for line in lines)
    groups = {line.split(":")[0].strip() for line in lines if line.startswith("  ")}
    assert groups >= {"vision_encoder.backbone", "vision_encoder.neck", "text_encoder", "detr_decoder"}


def test_a_video_folder_serves_the_image_model_and_the_tracker_too(hosts, student, tmp_path):
    """As on the hub: one folder for three classes. (transformers itself saves the tracker's prefix twice.)"""
    folder = shutil.copytree(hosts["video"][1], tmp_path / "hub")
    state = {
        n.replace("tracker_model.tracker_model.", "tracker_model."): t
        for n, t in load_file(folder / "model.safetensors").items()
    }
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    merge(student[1], folder, tmp_path / "merged")
    for cls in ("Sam3VideoModel", "Sam3Model", "Sam3TrackerModel"):
        merged, found = load(tmp_path / "merged", cls)
        assert not found["missing_keys"] and not found["mismatched_keys"]
        assert isinstance(trunk_of(merged), StudentTrunk)


def test_companions_travel_but_not_the_teachers_card_or_weights(hosts, student, tmp_path):
    _, folder = hosts["sam3"]
    merge(student[1], folder, tmp_path / "merged")
    names = {p.name for p in (tmp_path / "merged").iterdir()}
    assert names == {"config.json", "model.safetensors", "merge.json", "preprocessor_config.json", "tokenizer.json"}
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_another_input_size_reaches_every_setting_and_the_model_runs(hosts, tmp_path):
    _, folder = hosts["tracker"]
    build_student(image_size=168).save_pretrained(tmp_path / "student")
    report = merge(tmp_path / "student", folder, tmp_path / "merged")
    assert report.notes == ("input size changed from 126 to the student's 168 pixels",)
    merged, found = load(tmp_path / "merged", "Sam3TrackerModel")
    assert not any(found.values())
    assert merged.config.vision_config.backbone_feature_sizes == [[48, 48], [24, 24], [12, 12]]
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert processor.target_size == 168 and processor.image_processor.size.height == 168
    with torch.no_grad():
        out = merged.eval()(
            pixel_values=torch.zeros(1, 3, 168, 168), input_points=torch.tensor([[[[80.0, 80.0]]]]),
            input_labels=torch.ones(1, 1, 1, dtype=torch.int64),
        )  # fmt: skip
    assert out.pred_masks.shape[-2:] == (48, 48)


@pytest.mark.parametrize("head", ["published", "fused"])
def test_sam3_pt_gets_the_published_names(head, original, original_state, tmp_path):
    student = build_student(head=head)
    student.save_pretrained(tmp_path / "student")
    out = tmp_path / "merged.pt"
    report = merge(tmp_path / "student", original, out)
    saved = torch.load(out, weights_only=True)
    assert set(saved) == {"model"}
    state = saved["model"]
    kept = {n for n in original_state if not n.startswith(TRUNK)}
    assert all(torch.equal(state[n], original_state[n]) for n in kept)
    assert {n for n in state if not n.startswith(f"{TRUNK}model.")} == kept == set(report.kept)
    assert "tracker.no_mem_embed" in kept and any(".convs." in n for n in kept)
    for name, tensor in student.state_dict().items():
        there = name.replace("backbone.", "backbone.model.", 1) if name.startswith("backbone.") else name
        assert torch.equal(state[f"{TRUNK}model.{there}"], tensor)
    if head == "published":
        heads = {n.removeprefix(f"{TRUNK}model.").split(".")[1] for n in state if f"{TRUNK}model.head." in n}
        assert heads == {"0", "1", "3"}
    assert (
        out.stat().st_size < 1.3 * sum(t.nbytes for t in state.values()) + 200_000
    )  # nothing of the teacher's drags along


def test_a_merged_sam3_pt_predicts_as_the_merged_folder_does(hosts, student, original, tmp_path):
    """Two roads to one model: through the rename table, and through transformers' own files."""
    host, folder = hosts["sam3"]
    merge(student[1], folder, tmp_path / "folder")
    merge(student[1], original, tmp_path / "merged.pt")
    by_folder, _ = load(tmp_path / "folder", "Sam3Model")
    by_file = load_original(tmp_path / "merged.pt", Sam3Model, host.config)
    assert not by_file.training and isinstance(by_file.vision_encoder.backbone, StudentTrunk)
    assert type(host.config.vision_config.backbone_config).__name__ == "Sam3ViTConfig"  # the caller's is left alone
    inputs = {"pixel_values": PIXELS, "input_ids": torch.tensor([[5, 6, 2]]), "attention_mask": torch.ones(1, 3)}
    with torch.no_grad():
        first, second = by_folder.eval()(**inputs), by_file(**inputs)
    for name in ("pred_masks", "pred_logits", "pred_boxes"):  # memory-mapped weights may be aligned otherwise
        torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=1e-5)
    weights = open_weights(tmp_path / "merged.pt")
    translated = merged_state(weights, student[0].config)
    state = by_folder.state_dict()
    assert translated.keys() == state.keys() and all(torch.equal(translated[n], state[n]) for n in state)


def test_a_file_without_a_wrapper_gets_one_and_the_report_says_so(student, original_state, tmp_path):
    torch.save(original_state, tmp_path / "bare.pt")
    report = merge(student[1], tmp_path / "bare.pt", tmp_path / "out.pt")
    assert any('no "model" wrapper' in note for note in report.notes)
    assert set(torch.load(tmp_path / "out.pt", weights_only=True)) == {"model"}


def test_student_names_map_both_ways(student):
    names = list(student[0].state_dict())
    originals = [original_student_name(n) for n in names]
    assert len(set(originals)) == len(names) and [student_name(n) for n in originals] == names
    assert original_student_name("backbone.stem.conv1.weight") == "backbone.model.stem.conv1.weight"
    assert original_student_name("head.3.bias") == "head.3.bias"


@pytest.mark.parametrize("ema", [True, False])
def test_a_training_checkpoint_merges_with_its_average(ema, hosts, student, tmp_path):
    model, _ = student
    average = {n: t + 1 if t.is_floating_point() else t for n, t in model.state_dict().items()}
    text = "teacher: {path: x, image_size: null}\nstudent: {backbone: es_ev_s, head: published}\n"
    content = {"model": model.state_dict(), "ema": average if ema else None, "config": text, "step": 7}
    torch.save(content, tmp_path / "ckpt_epoch_2.pt")
    report = merge(tmp_path / "ckpt_epoch_2.pt", hosts["sam3"][1], tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    wanted = average if ema else model.state_dict()
    for name, tensor in wanted.items():
        assert torch.equal(written[f"vision_encoder.backbone.{name}"], tensor)
    assert len(report.added) == len(wanted)


def test_a_checkpoint_of_a_student_that_reads_the_hosts_statistics(hosts, student, tmp_path):
    text = (
        "teacher: {path: x, image_size: null}\nstudent: {backbone: es_ev_s, head: published, host_statistics: true}\n"
    )
    torch.save({"model": student[0].state_dict(), "config": text}, tmp_path / "ckpt_epoch_2.pt")
    report = merge(tmp_path / "ckpt_epoch_2.pt", hosts["sam3"][1], tmp_path / "out")
    assert report.student["input_mean"] == report.student["host_mean"] == [0.5] * 3


def test_a_large_model_is_written_in_shards(hosts, student, tmp_path, monkeypatch):
    monkeypatch.setattr("samdistill.checkpoints.hosting.SHARD_BYTES", 500_000)
    host, folder = hosts["sam3"]
    merge(student[1], folder, tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and all(p.stat().st_size < 700_000 for p in shards)
    merged, found = load(tmp_path / "out", "Sam3Model")
    assert not any(found.values())
    assert torch.equal(merged.detr_decoder.query_embed.weight, host.detr_decoder.query_embed.weight)


# What must fail, and leave nothing


def broken(folder, to, change):
    shutil.copytree(folder, to)
    state = load_file(to / "model.safetensors")
    change(state)
    save_file(state, to / "model.safetensors", {"format": "pt"})
    return to


def refused(tmp_path, match, source, into, **prefixes):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=match) as caught:
        merge(source, into, tmp_path / f"out{into.suffix}", **prefixes)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_to_replace(hosts, student, original, tmp_path):
    def without(state):
        for name in [n for n in state if "vision_encoder.backbone." in n]:
            state.pop(name)

    headless = broken(hosts["sam3"][1], tmp_path / "headless", without)
    refused(tmp_path, "nothing to replace", student[1], headless)
    refused(
        tmp_path,
        "nothing to replace: no tensor starts with 'wrong.'",
        student[1],
        hosts["sam3"][1],
        replace_prefix="wrong.",
    )
    refused(
        tmp_path, "nothing to replace: no tensor starts with 'wrong.'", student[1], original, replace_prefix="wrong."
    )
    torch.save({"model": {"image_encoder.weight": torch.ones(2)}}, tmp_path / "sam.pt")
    refused(tmp_path, "is it a sam3.pt", student[1], tmp_path / "sam.pt")


@pytest.mark.parametrize("layout", ["folder", "file"])
def test_teacher_residue(layout, hosts, student, original, tmp_path):
    into = hosts["tracker"][1] if layout == "folder" else original
    part = "tracker_model.detector_model.vision_encoder.backbone.layers." if layout == "folder" else f"{TRUNK}blocks."
    # outside the layers: position embedding, patch projection, and weight and bias of the first norm
    refused(tmp_path, "teacher residue: 4 tensors of its ViT", student[1], into, replace_prefix=part)


def test_a_tensor_that_no_name_matches(hosts, student, tmp_path):
    into = hosts["sam3"][1]
    refused(
        tmp_path, "would not load as Sam3Model.*check --target-prefix", student[1], into, target_prefix="elsewhere."
    )
    stray = broken(into, tmp_path / "stray", lambda s: s.update({"detr_encoder.stray.weight": torch.ones(3)}))
    refused(
        tmp_path, "would not load as Sam3Model: 1 unexpected keys, such as detr_encoder.stray.weight", student[1], stray
    )
    lost = broken(into, tmp_path / "lost", lambda s: s.pop("detr_decoder.query_embed.weight"))
    refused(tmp_path, "would not load as Sam3Model: 1 missing keys, such as detr_decoder.query_embed", student[1], lost)


def test_a_clash_of_names(original, student, tmp_path):
    state = torch.load(original, weights_only=True)["model"]
    state["detector.new.head.3.bias"] = torch.ones(1)
    torch.save({"model": state}, tmp_path / "clash.pt")
    refused(
        tmp_path,
        "is a kept tensor and one of the student",
        student[1],
        tmp_path / "clash.pt",
        target_prefix="detector.new.",
    )


@pytest.mark.parametrize("layout", ["folder", "file"])
def test_shape_conflicts(layout, hosts, original, tmp_path):
    into = hosts["tracker"][1] if layout == "folder" else original
    build_student(hidden_size=96).save_pretrained(tmp_path / "wide")
    build_student(patch_size=18).save_pretrained(tmp_path / "coarse")
    refused(tmp_path, "shape conflict: the student gives 96 channels, but .* reads 64", tmp_path / "wide", into)
    refused(tmp_path, "shape conflict: the student's patch size is 18", tmp_path / "coarse", into)


def test_a_neck_that_disagrees_with_its_configuration(hosts, student, tmp_path):
    def narrow(state):
        name = "vision_encoder.neck.fpn_layers.2.proj1.weight"
        state[name] = state[name][:, :48].contiguous()

    into = broken(hosts["sam3"][1], tmp_path / "narrow", narrow)
    refused(tmp_path, r"shape conflict: .*fpn_layers\.2\..* reads 48", student[1], into)


def test_a_source_that_is_no_student(hosts, student, tmp_path):
    into = hosts["sam3"][1]
    refused(tmp_path, "not a student but a 'sam3_tracker' model", hosts["tracker"][1], into)
    refused(tmp_path, "absent: no such file or folder", tmp_path / "absent", into)
    (tmp_path / "run").mkdir()
    refused(tmp_path, "not a run with a student", tmp_path / "run", into)
    (tmp_path / "run" / "ckpt_epoch_1.pt").write_bytes(b"")
    refused(tmp_path, r"has not finished.*or merge .*ckpt_epoch_1\.pt", tmp_path / "run", into)
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "foreign.pt")
    refused(tmp_path, "not a checkpoint of a training run", tmp_path / "foreign.pt", into)
    incomplete = broken(student[1] / "student", tmp_path / "incomplete", lambda s: s.pop("head.3.bias"))
    refused(tmp_path, r"the student efficientvit_b0 lacks 1 tensors.*head\.3\.bias", incomplete, into)


def test_a_model_that_hosts_no_student(student, tmp_path):
    (tmp_path / "bert").mkdir()
    save_file({"vision_encoder.backbone.x": torch.ones(1)}, tmp_path / "bert" / "model.safetensors")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    refused(
        tmp_path,
        "a 'bert' model cannot host a student; supported: sam3, sam3_lite_text, sam3_tracker, "
        "sam3_tracker_video, sam3_video",
        student[1],
        tmp_path / "bert",
    )


# What is already there


@pytest.mark.parametrize("layout", ["folder", "file"])
def test_an_earlier_merge_is_replaced_and_a_strangers_files_are_not(layout, hosts, student, original, tmp_path):
    into = hosts["sam3"][1] if layout == "folder" else original
    out = tmp_path / ("out" if layout == "folder" else "out.pt")
    first = merge(student[1], into, out)
    again = merge(student[1], into, out)
    assert again.totals == first.totals
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    side = tmp_path / "out" / "merge.json" if layout == "folder" else tmp_path / "out.pt.merge.json"
    side.unlink()
    with pytest.raises(UserError, match="exists and is not the result of a merge"):
        merge(student[1], into, out)
    with pytest.raises(UserError, match="are the same"):
        merge(student[1], into, into)


def test_a_student_can_be_exchanged_for_another(hosts, student, tmp_path):
    merge(student[1], hosts["sam3"][1], tmp_path / "first")
    second = build_student(head="fused")
    second.save_pretrained(tmp_path / "student")
    report = merge(tmp_path / "student", tmp_path / "first", tmp_path / "second")
    assert all(name.startswith("vision_encoder.backbone.") for name in report.removed)
    merged, found = load(tmp_path / "second", "Sam3Model")
    assert not any(found.values())
    assert all(torch.equal(merged.vision_encoder.backbone.state_dict()[n], t) for n, t in second.state_dict().items())


def test_a_disk_that_fails_is_said_and_leaves_nothing(hosts, student, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("samdistill.checkpoints.hosting.save_file", full)
    refused(
        tmp_path, r"out/model.safetensors: cannot be written: No space left on device", student[1], hosts["sam3"][1]
    )


def test_loading_a_merged_file_without_its_record_or_with_residue(hosts, student, original, tmp_path):
    merge(student[1], original, tmp_path / "m.pt")
    config = hosts["sam3"][0].config
    state = torch.load(tmp_path / "m.pt", weights_only=True)["model"]
    with pytest.raises(UserError, match=r"teacher's ViT remain, such as .*blocks"):
        merged_state(state | {f"{TRUNK}blocks.0.norm1.weight": torch.ones(64)}, student[0].config)
    state.pop(f"{TRUNK}model.head.3.bias")
    with pytest.raises(UserError, match=r"lacks 1 tensors.*head\.3\.bias"):
        merged_state(state, student[0].config)
    (tmp_path / "m.pt.merge.json").unlink()
    with pytest.raises(UserError, match=r"m\.pt\.merge\.json: missing"):
        load_original(tmp_path / "m.pt", Sam3Model, config)
    assert load_original(tmp_path / "m.pt", Sam3Model, config, student[0].config) is not None
