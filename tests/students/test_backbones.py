from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import timm
import timm.models._registry as registry
import torch
from safetensors.torch import save_file
from timm.models import register_model

from samdistill.students import STUDENTS, StudentTrunk, StudentTrunkConfig, build_trunk
from samdistill.students.backbones import (
    build_backbone,
    checkpoint_stages,
    feature_maps,
    levels,
    resolve_backbone,
    statistics,
)
from samdistill.students.timm_models import find_timm
from samdistill.types import UserError


@pytest.mark.parametrize("name", STUDENTS)
def test_levels_describe_the_maps(name: str) -> None:
    net = build_backbone(name, 70).eval()
    wanted = levels(net)
    assert [level.stride for level in wanted] == [4, 8, 16, 32]
    with torch.no_grad():
        maps = feature_maps(net, wanted, torch.randn(1, 3, 70, 70))
    assert [tuple(m.shape) for m in maps] == [(1, w.channels, -(-70 // w.stride), -(-70 // w.stride)) for w in wanted]


def test_a_stem_at_stride_two_is_left_out() -> None:
    assert [level.stride for level in levels(build_backbone("resnet10t", 70))] == [4, 8, 16, 32]


def test_names_resolve_or_are_explained() -> None:
    assert resolve_backbone("es_tv_l") == "tiny_vit_21m_224"
    assert resolve_backbone("resnet18.a1_in1k") == "resnet18.a1_in1k"
    with pytest.raises(UserError, match="did you mean 'es_rv_"):
        resolve_backbone("es_rv_xl")
    with pytest.raises(UserError, match="there is: es_ev_s"):
        resolve_backbone("hf-hub:someone/something")


def trunk(backbone: str = "es_ev_s"):
    return build_trunk(StudentTrunkConfig(backbone=backbone, hidden_size=16, image_size=70))


def weights(path: Path, state: dict, wrap: str | None = None) -> Path:
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state if wrap is None else {wrap: state, "epoch": 3} if wrap != "bare" else state, path)
    return path


@pytest.mark.parametrize("file", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("name", ["es_ev_s", "es_rv_s", "es_tv_s"])
def test_a_classification_checkpoint_fills_the_trunk(name: str, file: str, tmp_path) -> None:
    torch.manual_seed(5)
    classifier = timm.create_model(resolve_backbone(name)).eval()
    path = weights(tmp_path / file, classifier.state_dict(), wrap="state_dict" if file.endswith("pth") else None)
    torch.manual_seed(6)
    config = StudentTrunkConfig(backbone=name, hidden_size=16, image_size=70)
    student = build_trunk(config, pretrained=path).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = classifier.forward_intermediates(pixels, intermediates_only=True) if name == "es_tv_s" else None
        maps = student.backbone(pixels)
        if wanted is None:  # the last map is what the classifier's own trunk computes
            torch.testing.assert_close(maps[-1], classifier.forward_features(pixels))
        else:
            torch.testing.assert_close(maps[-1], wanted[-1])


@pytest.mark.parametrize("wrap", [None, "model"])
def test_a_student_of_an_earlier_run_fills_the_trunk(wrap: str | None, tmp_path) -> None:
    torch.manual_seed(1)
    earlier = trunk()
    path = weights(tmp_path / "student.pth", earlier.state_dict(), wrap)
    torch.manual_seed(2)
    later = build_trunk(earlier.config, pretrained=path)
    for key, tensor in earlier.backbone.state_dict().items():
        assert torch.equal(later.backbone.state_dict()[key], tensor)
    assert not torch.equal(later.head.output[0].weight, earlier.head.output[0].weight)


def test_weights_of_another_backbone_are_refused(tmp_path) -> None:
    other = weights(tmp_path / "b1.safetensors", timm.create_model("efficientvit_b1").state_dict())
    with pytest.raises(UserError, match=r"lacks|is .* but the trunk needs"):
        build_trunk(trunk().config, pretrained=other)
    state = trunk().backbone.state_dict()
    state.pop(next(iter(state)))
    with pytest.raises(UserError, match="lacks 1 of"):
        build_trunk(trunk().config, pretrained=weights(tmp_path / "less.safetensors", state))


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path(__file__).with_name("sprung"),))


def test_files_that_are_not_weights_are_refused(tmp_path) -> None:
    config = trunk().config
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save({"weights": Trap()}, tmp_path / "trap.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "empty.pth").touch()
    for name in ("text.pth", "text.safetensors", "trap.pth", "list.pth", "empty.pth", "missing.pth"):
        with pytest.raises(UserError) as caught:
            build_trunk(config, pretrained=tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not Path(__file__).with_name("sprung").exists()


def test_unreachable_hub_gives_one_line_at_once(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("samdistill.students.backbones.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(UserError) as caught:
        build_trunk(trunk().config, pretrained=True)
    message = str(caught.value)
    assert "\n" not in message
    assert "efficientvit_b0" in message and "hf download timm/" in message and "student.pretrained" in message


@pytest.mark.parametrize("name", ["repvit_m0_9.dist_300e_in1k", "swin_tiny_patch4_window7_224.ms_in22k"])
def test_checkpointed_stages_keep_less_and_give_the_same_gradients(name):
    kept, gradients = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        net = build_backbone(name, 64).train()
        if checkpointed:
            checkpoint_stages(net)
        held: set[int] = set()
        tensors = []

        def pack(tensor, held=held, tensors=tensors):
            if id(tensor) not in held:
                held.add(id(tensor))
                tensors.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            maps = feature_maps(net, levels(net), torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64))
            total = sum(m.square().mean() for m in maps)
        kept.append(sum(t.numel() for t in tensors))
        total.backward()
        gradients.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    assert kept[1] < 0.6 * kept[0]
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, rtol=1e-4, atol=1e-6)


# other people's code in timm's registry

SAVED = ("efficientvit_b0", "repvit_m0_9", "tiny_vit_5m_224")
TAKEN = [*(row.backbone for row in STUDENTS.values()), "resnet10t"]


@pytest.fixture
def overwritten_registry() -> Iterator[None]:
    """As after ``import mobile_sam`` or EfficientSAM3's code: functions of theirs under timm's names, no settings."""
    foreign = ModuleType("foreign_models")
    sys.modules[foreign.__name__] = foreign
    kept = {name: vars(registry)[name].copy() for name in vars(registry) if name.startswith("_model_")}
    kept["_module_to_models"] = {name: set(models) for name, models in registry._module_to_models.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm says that it is being overwritten
        for name in [*TAKEN, "not_in_timm"]:

            def build(pretrained: bool = False, **kwargs: object) -> torch.nn.Module:
                return torch.nn.Linear(1, 1)

            build.__name__, build.__module__ = name, foreign.__name__
            register_model(build)
    yield
    del sys.modules[foreign.__name__]
    for name, content in kept.items():
        vars(registry)[name].clear()
        vars(registry)[name].update(content)
    assert timm.get_pretrained_cfg("tiny_vit_5m_224") is not None


@pytest.mark.parametrize("name", TAKEN)
def test_a_name_of_timm_is_timms_own_whatever_is_registered_under_it(name, overwritten_registry, tmp_path) -> None:
    assert isinstance(timm.create_model(name), torch.nn.Linear)  # what everybody else gets now
    net = build_backbone(name, 70)
    own = getattr(timm.models, name)(features_only=True)
    assert type(net) is type(own)
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in own.state_dict().items()}
    mean, std = statistics(name)
    assert (mean, std) == (own.pretrained_cfg["mean"], own.pretrained_cfg["std"])
    if name in SAVED:
        earlier = build_trunk(StudentTrunkConfig(backbone=name, hidden_size=16, image_size=70))
        earlier.save_pretrained(tmp_path)
        again = StudentTrunk.from_pretrained(tmp_path)
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in earlier.state_dict().items())


def test_a_model_that_is_not_timms_is_the_registered_one_and_needs_settings(overwritten_registry) -> None:
    with pytest.raises(UserError, match=r"'not_in_timm' is registered with timm without settings .*default_cfgs"):
        resolve_backbone("not_in_timm")
    sys.modules["foreign_models"].default_cfgs = {"not_in_timm": {"mean": (0.1, 0.2, 0.3)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        register_model(timm.model_entrypoint("not_in_timm"))
    assert statistics("not_in_timm")[0] == (0.1, 0.2, 0.3)
    assert isinstance(build_backbone("not_in_timm", 70), torch.nn.Linear)


def test_settings_and_functions_are_those_of_an_untouched_registry() -> None:
    for name in ["resnet18", "resnet18.fb_swsl_ig1b_ft_in1k", "repvit_m1_1", "vit_base_patch14_dinov2", *TAKEN]:
        found = find_timm(name)
        assert found is not None and found.settings == timm.get_pretrained_cfg(name)
        assert found.build is timm.model_entrypoint(name)
    assert resolve_backbone("convnext_tiny_in22ft1k") == "convnext_tiny.fb_in22k_ft_in1k"  # timm's name today
    with pytest.raises(UserError, match="timm has no weights 'a1_in2k' of 'resnet18'; it has 'a1_in1k'"):
        resolve_backbone("resnet18.a1_in2k")
