"""Small whole files of every kind that the package reads, to be damaged: models, data sets, videos, runs."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))  # for original_names and small_sams

import numpy as np
import torch
import transformers
from original_names import sam_to_original, to_original
from PIL import Image
from small_sams import sam2_settings
from transformers import (
    Sam2Config,
    Sam2Model,
    Sam3Config,
    Sam3Model,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    SamConfig,
    SamModel,
)

from samdistill.checkpoints.rename_efficientsam3 import TRUNKS, text_to_theirs
from samdistill.checkpoints.student import load_with_memory
from samdistill.cli import main
from samdistill.ops.images import IMAGENET_MEAN, IMAGENET_STD
from samdistill.sandbox.concepts import CONTEXT, VOCABULARY, build_tokenizer
from samdistill.sandbox.videos import VideoStyle
from samdistill.sandbox.write import write_coco, write_concept_set, write_sa1b
from samdistill.sandbox.write_videos import write_sav
from samdistill.students import (
    EfficientSam3Model,
    MobileSamConfig,
    MobileSamModel,
    StudentTrunk,
    StudentTrunkConfig,
    TextStudent,
    TextStudentConfig,
    efficient_sam3_config,
)

SIDE, GRID = 126, 9
VIT = {
    "model_type": "sam3_vit_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": SIDE, "patch_size": 14, "window_size": 3, "global_attn_indexes": [0],
    "pretrain_image_size": 42,
}  # fmt: skip
VISION = {
    "model_type": "sam3_vision_model", "backbone_config": VIT, "fpn_hidden_size": 32,
    "backbone_feature_sizes": [[4 * GRID] * 2, [2 * GRID] * 2, [GRID] * 2],
}  # fmt: skip
HEADS = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}
SMALL = {"image_size": 64, "patch_size": 16}
DECODER = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
TEXT = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2, "projection_dim": 32}  # fmt: skip


def _detector() -> Sam3Model:
    text = {"model_type": "clip_text_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 4, "vocab_size": len(VOCABULARY), "max_position_embeddings": CONTEXT,
            "projection_dim": 32, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    return Sam3Model(Sam3Config(
        vision_config=VISION, text_config=text, geometry_encoder_config={**HEADS, "roi_size": 3, "num_layers": 1},
        detr_encoder_config={**HEADS, "num_layers": 1}, mask_decoder_config=HEADS,
        detr_decoder_config={**HEADS, "num_layers": 1, "num_queries": 4},
    ))  # fmt: skip


def _tracker() -> Sam3TrackerModel:
    return Sam3TrackerModel(Sam3TrackerConfig(
        vision_config=VISION | {"scale_factors": [4.0, 2.0, 1.0]},
        prompt_encoder_config={"hidden_size": 32, "image_size": SIDE, "patch_size": 14},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
    ))  # fmt: skip


TRUNK = {"backbone": "es_ev_s", "host_mean": IMAGENET_MEAN, "host_std": IMAGENET_STD}


def _sam() -> SamModel:
    vision = {"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "window_size": 2, "global_attn_indexes": [0], "mlp_dim": 16, "num_pos_feats": 8, **SMALL}  # fmt: skip
    return SamModel(SamConfig(
        vision_config=vision, prompt_encoder_config={"hidden_size": 16, **SMALL}, mask_decoder_config=DECODER
    ))  # fmt: skip


def _sam2() -> Sam2Model:
    return Sam2Model(Sam2Config(**sam2_settings(16, 128)))


def models(root: Path) -> None:
    """Models ``detector``, ``tracker``, ``sam``, ``sam2``, ``mobile``; runs ``trunk``, ``trunk_sam``, ``trunk_sam2``,
    ``speech``, ``images``, ``memory``.
    """
    torch.manual_seed(0)
    built = {
        "detector": _detector(), "tracker": _tracker(), "sam": _sam(), "sam2": _sam2(),
        "mobile": MobileSamModel(MobileSamConfig(backbone="efficientvit_b0", neck="fused", width=16, heads=2, **SMALL)),
        "trunk/student": StudentTrunk(StudentTrunkConfig(backbone="es_ev_s", hidden_size=16, image_size=SIDE)),
        "trunk_sam/student": StudentTrunk(StudentTrunkConfig(**TRUNK, hidden_size=16, **SMALL)),
        "trunk_sam2/student": StudentTrunk(StudentTrunkConfig(
            **TRUNK, hidden_size=16, patch_size=16, image_size=128, fine_channels=(2, 4)
        )),
        "speech/student": TextStudent(TextStudentConfig(**TEXT, max_position_embeddings=CONTEXT, width=32)),
        "images/student": EfficientSam3Model(efficient_sam3_config("efficientvit_b0", SIDE, 32, 2, 32, 1, 1, 4, TEXT)),
    }  # fmt: skip
    for name, model in built.items():
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        model.save_pretrained(root / name)
    load_with_memory(root / "images" / "student", 4, 1).save_pretrained(root / "memory" / "student")
    for name in ("detector", "speech/student", "images/student", "memory/student"):
        build_tokenizer().save_pretrained(root / name)
    (root / "trunk" / "config.yaml").write_text("job: encoder\n")
    for name, state in (("sam3.pt", to_original(built["detector"].state_dict())[0]),
                        ("sam_vit.pth", sam_to_original(built["sam"].state_dict())[0])):  # fmt: skip
        (root / "originals" / name.split(".")[0]).mkdir(parents=True)
        whole = {key: tensor.clone() for key, tensor in state.items()}
        torch.save({"model": whole} if name == "sam3.pt" else whole, root / "originals" / name.split(".")[0] / name)
    published = StudentTrunk(StudentTrunkConfig(backbone="es_ev_s", head="published", hidden_size=16, image_size=SIDE))
    theirs = {TRUNKS["efficientvit_b0"].their_name(key): tensor for key, tensor in published.state_dict().items()}
    (root / "originals" / "efficientsam3").mkdir()
    for name, state in (("trunk.pth", theirs), ("text.pth", text_to_theirs(built["speech/student"].state_dict()))):
        torch.save({"model": state, "epoch": 1}, root / "originals" / "efficientsam3" / name)
    for path in (path for path in (root / "detector").iterdir() if path.suffix == ".json"):
        shutil.copyfile(path, root / "originals" / "sam3" / path.name)


def data(root: Path) -> None:
    """Folders ``sa1b``, ``coco`` (with questions), ``sav``, ``davis``, ``masks``, ``photos``; predictions of others."""
    for split, count in (("train", 3), ("val", 2)):
        write_sa1b(root / "sa1b", count, 60, 3, split)
        write_coco(root / "coco", count, 60, 3, split)
        write_sav(root / "sav", 1, (40, 56), 3, split, VideoStyle(frames=16))
    write_concept_set(root / "coco", 2, 60, 3, "val")
    grid = np.zeros((40, 60), np.uint8)
    grid[5:25, 5:25], grid[28:36, 30:50] = 1, 2
    places = [root / "davis" / "JPEGImages" / "one", root / "davis" / "Annotations" / "one", root / "masks" / "images",
              root / "masks" / "masks", root / "photos"]  # fmt: skip
    for place in places:
        place.mkdir(parents=True)
    for number in range(3):
        picture = Image.new("RGB", (60, 40), (60 * number, 90, 30))
        picture.save(places[0] / f"{number:05}.jpg")
        picture.save(places[2] / f"{number}.jpg")
        Image.fromarray(grid).save(places[1] / f"{number:05}.png")
        Image.fromarray(grid).save(places[3] / f"{number}.png")
        for place in ("davis/one", "sav/one/001", "sav/one/002", "true/one/001", "true/one/002"):
            predicted = root / "results" / place / f"{number:05}.png"
            predicted.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grid if place == "davis/one" else (grid == int(place[-1])).astype(np.uint8)).save(predicted)
    (root / "davis" / "ImageSets" / "2017").mkdir(parents=True)
    (root / "davis" / "ImageSets" / "2017" / "val.txt").write_text("one\n")
    for name in ("a.png", "b.jpg", "c.webp", "d.tif", "e.bmp"):
        picture.save(root / "photos" / name)
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 20).save(root / "photos" / "f.png")
    Image.fromarray(grid).convert("P").save(root / "photos" / "g.gif")
    pairs = json.loads((root / "coco" / "concepts_val.json").read_text())
    found = [{"image_id": a["image_id"], "score": 0.5, "category_id": 1, "segmentation": a["segmentation"]}
             for a in pairs["annotations"][:4]]  # fmt: skip
    (root / "coco" / "predictions.json").write_text(json.dumps(found))
    keys = [path.stem for path in sorted((root / "coco" / "images" / "train").iterdir())]
    lines = [json.dumps({"key": keys[0], "phrases": ["red disc"]}), json.dumps({"key": keys[1], "caption": "a disc"})]
    (root / "coco" / "phrases.jsonl").write_text("\n".join(lines) + "\n")
    (root / "coco" / "ids.txt").write_text("\n".join(keys) + "\n")
    (root / "phrases").mkdir()
    words = ["red circle", "blue star", "ring", "green heart", "Red Circle", "pink cross", "white blob", "black pill"]
    (root / "phrases" / "words.txt").write_text("\n".join(words) + "\n")
    (root / "phrases" / "words.jsonl").write_text("\n".join(json.dumps({"phrases": words[i:]}) for i in (0, 4)) + "\n")
    categories = [{"id": i, "name": word, "synonyms": ["star"]} for i, word in enumerate(words)]
    (root / "phrases" / "names.json").write_text(json.dumps({"images": [], "categories": categories}))
    (root / "phrases" / "asked.json").write_text(
        json.dumps({"images": [{"id": 1, "text_input": w} for w in words[:3]]})
    )


def configs(root: Path) -> None:
    """``configs/JOB.yaml`` of every job, on the models and data here; small enough to be run."""
    text = {"hidden": 32, "layers": 3, "heads": 2, "ffn": 32, "context": 6}
    once = {"epochs": 1, "batch_size": 2, "lr": 1e-3, "lr_batch": None, "warmup_epochs": 0, "log_every": 1, "keep": 2}
    phase = {"batch_size": 2, "log_every": 1, "keep": 2}
    jobs = {
        "encoder": {
            "teacher": {"path": "tracker"}, "student": {"backbone": "es_ev_s"}, "data": {"root": "sa1b"},
            "train": once, "cache": {"batch_size": 2, "verify_records": 2},
        },
        "detection": {
            "teacher": {"path": "detector"}, "data": {"kind": "coco", "root": "coco"}, "questions": {"source": "names"},
            "student": {"backbone": "es_ev_s", "queries": 4, "encoder_layers": 1, "decoder_layers": 1, "heads": 4,
                        "ffn": 32, "text": text},
            "train": phase | {"phases": [{"name": "all", "epochs": 1, "lr": 1e-3}]}, "evaluate": {"batch_size": 2},
        },
        "prompt": {
            "teachers": [{"name": "one", "checkpoint": "sam", "weight": 1.0}], "student": {"start": "sam"},
            "data": {"root": "sa1b"}, "prompts": {"objects": 2, "mode": "box"}, "cache": {"batch_size": 2},
            "distillation": {"use_precomputed_features": True, "sample": 4}, "train": once,
        },
        "video": {
            "teacher": {"path": "detector"}, "data": {"kind": "sav", "root": "sav"},
            "clips": {"context": 2, "per_video": 2}, "cache": {"batch_size": 2},
            "student": {"start": "images", "memory": {"latents": 4, "layers": 1}},
            "train": phase | {"phases": [{"name": "memory", "epochs": 1, "lr": 1e-3}]},
        },
        "text": {
            "teacher": {"path": "detector"}, "data": {"phrases": ["phrases/words.txt"], "held_out_fraction": 0.3},
            "student": {"size": {"hidden": 32, "layers": 3, "heads": 2, "ffn": 32}, "context": 6}, "train": once,
        },
    }  # fmt: skip
    (root / "configs").mkdir()
    for job, config in jobs.items():
        config |= {"job": job, "output": f"runs/{job}"}
        config["data"] |= {"workers": 0} | ({} if job == "text" else {"held_out": "val"})
        (root / "configs" / f"{job}.yaml").write_text(json.dumps(config, indent=1))


def runs(root: Path) -> None:
    """A cache and a finished run of each job in ``runs/JOB``, made by the commands themselves."""
    with contextlib.chdir(root), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for job in ("encoder", "detection", "prompt", "video", "text"):
            if job != "detection":
                assert main(["cache", f"configs/{job}.yaml"]) == 0
            assert main(["train", f"configs/{job}.yaml"]) == 0


def make(root: Path) -> None:
    """Everything. Takes seconds."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for part in (models, data, configs, runs):
        part(root)
