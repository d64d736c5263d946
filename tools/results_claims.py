"""Claims of the results page: for each, the result file, a sentence, how the figure is read, and the goal."""

from __future__ import annotations

from collections.abc import Sequence

from results_export import EXPORT
from results_fullsize import FULL_SIZE
from results_hosted import HOSTED
from results_hosts import HOSTS, SAM2, TRACKERS
from results_names import NAMES
from results_readers import (
    PROMPTS,
    Benchmark,
    Claim,
    Goal,
    Table,
    at,
    cgf1_share,
    clip_gain,
    clip_rows,
    codec_bytes,
    codec_points,
    concept_rows,
    detector_rows,
    followed_gain,
    followed_rows,
    gained,
    head_rows,
    last_against_second,
    latency_ratio,
    loader_ratio,
    loss_difference,
    memory_rows,
    mutation_faults,
    mutations,
    official_difference,
    opening_seconds,
    over_kills,
    part_rows,
    runs,
    sam3_difference,
    sandbox_rows,
    stage_rows,
    steps_ratio,
    store_rows,
    study_rows,
    transformers_rows,
    uncovered,
    worst_relative,
)  # fmt: skip
from results_text import TEXT

MIOU = list(PROMPTS.values())

CONCEPTS = ["cgF1", "pmF1", "IL_MCC", "mask AP"]
CLIPS = ["all", "look-alikes", "unique", "occluded", "reappeared"]
FOUR, FIVE = ["{:.3f}"] * 4, ["{:.3f}"] * 5
STAGES = Table("Stages, each in a process of its own", "stage", ["seconds", "peak GiB"], ["{:.0f}", "{:.2f}"],
               stage_rows)  # fmt: skip
LABELS_HEADLINE = "Prompt: mIoU with a box that the teacher adds to 64 labelled images"
LABELS = [
    Claim(f"mIoU that the four terms add with {count} labelled images, {PROMPTS[kind]}",
          gained(f"{count}: task + all four", f"{count}: task only", kind), "{:+.3f}",
          headline=LABELS_HEADLINE if (count, kind) == (64, "box") else "")
    for count in (16, 64, 256) for kind in ("box", "point", "refine")
]  # fmt: skip

ENCODER = [
    Benchmark(
        "demo", "The demo", "`samdistill demo`: `es_ev_s` from the sandbox's tracker, held-out scenes.",
        [
            Claim("share of the teacher's mIoU, box, distilled student", runs("distilled", "kept", "box"),
                  "{:.1%}", Goal("at least", 0.92),
                  headline="Encoder: the demo's student, share of its teacher's mIoU with a box"),
            Claim("share of the teacher's mIoU, box, untrained student", runs("untrained", "kept", "box"), "{:.1%}",
                  Goal("below", 0.50), headline="Encoder: the same, untrained student"),
            Claim("share of the teacher's mIoU, centre point, distilled student",
                  runs("distilled", "kept", "point"), "{:.1%}"),
            Claim("share of the teacher's mIoU, centre point, untrained student",
                  runs("untrained", "kept", "point"), "{:.1%}"),
            Claim("whole demo without installation, seconds", lambda f: [run["seconds"]["whole"] for run in f["runs"]],
                  "{:.0f}", Goal("at most", 300),
                  headline="The whole demo on two CPU cores, seconds"),
            Claim("teacher's encoder, ms per image", runs("teacher", "latency_ms"), "{:.1f}"),
            Claim("student's encoder, ms per image", runs("distilled", "latency_ms"), "{:.1f}"),
        ],
    ),
    Benchmark(
        "heads", "The two heads",
        "`es_ev_s` at 126 px, same teacher, scenes and steps. No such comparison was made at 1008 px.",
        [Claim("encoder time of `fused` over `published`", latency_ratio, "{:.2f}")],
        [Table("IoU with the teacher's masks", "head", ["box", "centre point", "point + 1 click", "trunk + head, M"],
               ["{:.3f}", "{:.3f}", "{:.3f}", "{:.3f}"], head_rows)],
    ),
    Benchmark(
        "full_size", "Encoder distillation at full size",
        "SAM 3 with 840M random float32 parameters, four photographs at 1008 px, two steps of two images per student.",
        tables=[STAGES],
    ),
]  # fmt: skip

DETECTION = [
    Benchmark(
        "sandbox_student", "The bundled detection student", "`sandbox-student` beside the bundled detector.",
        [Claim("share of the teacher's cgF1", cgf1_share, "{:.1%}", Goal("at least", 0.90),
               headline="Detection: the bundled student, share of its teacher's cgF1")],
        [Table("Held-out questions in words", "model", CONCEPTS, FOUR, concept_rows)],
    ),
    Benchmark(
        "detection_student", "A longer training of a described student",
        "Against an earlier version of the bundled detector.",
        [Claim("share of the teacher's cgF1", cgf1_share, "{:.1%}", Goal("at least", 0.90))],
        [Table("Held-out questions in words", "model", CONCEPTS, FOUR, concept_rows)],
    ),
    Benchmark(
        "detection_terms", "Detection terms",
        "Short trainings, all from one aligned student. `no X` is a training without the term or part X. The spread "
        "over seeds is as large as most differences.",
        tables=[Table("Figures on held-out questions", "variant", CONCEPTS, FOUR,
                      study_rows("", ("cgf1", "pmf1", "il_mcc", "mask_ap")))],
    ),
    Benchmark(
        "matching_cost", "Cost of matching and terms", "EfficientSam3 at 1008 px, one image per step.",
        [Claim("share of matching and of the eight terms in the student's step",
               at("shares", "of the student's step"), "{:.1%}", Goal("at most", 0.10))],
    ),
    Benchmark(
        "full_size_detection", "Detection distillation at full size",
        "SAM 3 (840M) and EfficientSam3 (100.9M), random float32 weights, one photograph at 1008 px. With "
        "`student.checkpointing=true` see "
        "[its own file](../benchmarks/results/full_size_detection_checkpointing.txt).",
        [Claim("peak memory of a step of phase 1 without checkpointing, GB",
               lambda f: [f["stages"]["step of phase 1"]["peak_bytes"] / 1e9], "{:.2f}", Goal("below", 10.0))],
        [STAGES, Table("Parts of one step of phase 1", "part", ["seconds"], ["{:.2f}"], part_rows("step of phase 1"))],
    ),
]  # fmt: skip

PROMPT = [
    Benchmark(
        "prompt_terms", "Prompt terms",
        "The sandbox's MobileSAM fine-tuned on scenes unlike its own. `published` has the published weights of the "
        "terms; `two teachers` adds the untuned student at 0.3; `in the loop` trains with two corrective clicks and "
        "asks the teacher for the first answer (`all four`) or in every round (`all rounds`).",
        tables=[Table("mIoU on held-out scenes", "variant", MIOU, FOUR, study_rows("miou", tuple(PROMPTS)))],
    ),
    Benchmark(
        "prompt_labels", "Few labels", "The same student, plain and with all four terms.", LABELS,
        [Table("mIoU on held-out scenes", "labelled images", MIOU, FOUR, study_rows("miou", tuple(PROMPTS)))],
    ),
    Benchmark(
        "prompt_cache", "Cached teachers", "The sandbox's recipe, one teacher.",
        [
            Claim("largest relative difference of a loss from running teachers, fp32 cache",
                  loss_difference("cache, fp32"), "{:.1e}"),
            Claim("the same, fp16 cache", loss_difference("cache, fp16"), "{:.1e}"),
            Claim("steps per second over running teachers, fp16 cache", steps_ratio("cache, fp16"), "{:.2f}"),
            Claim("bytes of one view of an image, fp16",
                  lambda f: [sum(f["caches"]["cache, fp16"]["bytes"].values())], "{:,.0f}"),
        ],
    ),
    Benchmark(
        "full_size_prompt", "Prompt distillation at full size",
        "MobileSAM at 1024 px with SAM ViT-B and MobileSAM as teachers, random weights, one image with four objects.",
        [Claim("cache, bytes per image for both teachers", at("stages", "cache", "found", "bytes an image"),
               "{:,.0f}")],
        [STAGES, Table("Parts of three steps on COCO together", "part", ["seconds"], ["{:.2f}"],
                       part_rows("steps on coco"))],
    ),
]  # fmt: skip

VIDEO = [
    Benchmark(
        "video_memory", "The memory, frame by frame",
        "The bundled student with 64 latents, rendered videos, true masks of up to eight annotated frames as the past. "
        "`memory` is the recipe, `described` the design as it was described.",
        [Claim("share of the teacher's gain that the student keeps with its own features", clip_gain, "{:.0%}",
               Goal("at least", 0.95),
               headline="Video: share of what the teacher's features add that the student keeps, single frames")],
        [Table("J&F of a frame, by group of questions and by whose features are remembered", "variant", CLIPS, FIVE,
               memory_rows)],
    ),
    Benchmark(
        "video_memory_parts", "Parts of the memory", "One part changed at a time, the student's own features.",
        tables=[Table("J&F of a frame", "variant", CLIPS, FIVE, clip_rows("own"))],
    ),
    Benchmark(
        "video_memory_sizes", "Frames and latents",
        "T is the number of remembered frames; `memory` has 8 frames and 64 latents.",
        tables=[Table("J&F of a frame", "variant", CLIPS, FIVE, clip_rows("own"))],
    ),
    Benchmark(
        "video_follow", "Videos followed from one mask",
        "Held-out rendered videos from end to end, SA-V's rules. The masks of the past are the student's own answers.",
        [Claim("share of the teacher's gain that the student keeps with its own features", followed_gain, "{:.0%}",
               Goal("at least", 0.95),
               headline="Video: the same, followed through whole videos")],
        [Table("Figures over all objects", "memory", ["J&F", "J", "F", "J&F reappeared", "J&F occluded"], FIVE,
               followed_rows)],
    ),
    Benchmark(
        "video_stream", "A long stream", "1000 frames with four objects.",
        [
            Claim("time per frame, last hundred over second hundred", last_against_second("ms"), "{:.2f}"),
            Claim("bytes held by the session, last over second hundred", last_against_second("session"), "{:.3f}"),
        ],
    ),
    Benchmark(
        "export_stream", "A long stream through an export",
        "The same video followed by `predict.py` from ONNX files.",
        [
            Claim("time per frame, last hundred over second hundred", last_against_second("ms"), "{:.2f}"),
            Claim("bytes held by the session, last over second hundred", last_against_second("session"), "{:.3f}"),
            Claim("frames in which an id or its visibility differs from `VideoSession`",
                  at("compared", "frames with other ids"), "{:.0f}", Goal("at most", 0)),
            Claim("least IoU of a mask with that of `VideoSession`", at("compared", "least IoU"), "{:.4f}"),
        ],
    ),
    Benchmark(
        "full_size_video", "Video distillation at full size",
        "SAM 3 (840M) and EfficientSam3 with a memory, random float32 weights, 504 px, a real SA-V video. Only `parts` "
        "and `predict` had a core of their own.",
        [
            Claim("decoding, seconds per frame", at("stages", "parts", "found", "decode"), "{:.3f}"),
            Claim("teacher's vision encoder, seconds per frame", at("stages", "parts", "found", "teacher"), "{:.1f}"),
            Claim("student with a full memory and one object, seconds per frame",
                  at("stages", "predict", "found", "student", "with memory"), "{:.2f}"),
            Claim("cache, bytes per frame", at("stages", "cache", "found", "bytes_per_record"), "{:,.0f}"),
            Claim("checkpoint of the memory and its optimiser, bytes",
                  at("stages", "train", "found", "checkpoint_bytes"), "{:,.0f}"),
        ],
        [STAGES],
    ),
]  # fmt: skip

BUNDLED = [
    Benchmark(
        "teacher", "The bundled tracker", "Held-out scenes. The targets were set for a training on a GPU.",
        [
            Claim("mIoU with a box", at("miou", "box"), goal=Goal("at least", 0.85)),
            Claim("mIoU with one point", at("miou", "point"), goal=Goal("at least", 0.70)),
            Claim("mIoU with a point and a corrective click", at("miou", "refine")),
        ],
    ),
    Benchmark(
        "sam_teachers", "The bundled SAM and MobileSAM", "Held-out scenes.",
        [
            Claim("`sandbox-sam`, mIoU with a box", at("models", "sandbox-sam", "miou", "box"),
                  goal=Goal("at least", 0.80)),
            Claim("`sandbox-mobile`, mIoU with a box: must be good enough",
                  at("models", "sandbox-mobile", "miou", "box"), goal=Goal("at least", 0.60)),
            Claim("`sandbox-mobile`, mIoU with a box: must be improvable",
                  at("models", "sandbox-mobile", "miou", "box"), goal=Goal("at most", 0.70)),
        ],
        [Table("mIoU by kind of prompt", "model", [*MIOU, "multimask"], FIVE, sandbox_rows)],
    ),
    Benchmark(
        "detector_teacher", "The bundled detector", "Three worlds of held-out scenes, questions in words and by box.",
        [Claim("cgF1 over all worlds", at("all", "cgf1"), goal=Goal("at least", 0.6))],
        [Table("By world, and by kind of question over all worlds", "", CONCEPTS, FOUR, detector_rows)],
    ),
]  # fmt: skip

STORAGE = [
    Benchmark(
        "cache_codecs", "Codecs of the cache",
        "Students trained from caches of three codecs on the sandbox; `pca48-int8` keeps a quarter of the channels "
        "there, as `pca256-int8` does of SAM 3's.",
        [
            Claim(f"`{name}` minus `fp16`: IoU with the teacher's masks, {PROMPTS[kind]}, points",
                  codec_points(name, kind), "{:+.2f}", Goal("at least", -0.5))
            for name in ("int8", "pca48-int8") for kind in ("box", "point", "refine")
        ],
        [Table("SAM 3 at 1008 px, computed", "codec", ["bytes per image", "share of fp16"], ["{:,.0f}", "{:.1%}"],
               codec_bytes)],
    ),
    Benchmark(
        "store_io", "Reading and writing the store", "Records of 1024 x 72 x 72, MiB/s of bytes on disk.",
        [Claim("opening a store of a million records, seconds", opening_seconds, "{:.2f}", Goal("below", 1.0))],
        [Table("Medians", "what", ["write MiB/s", "random read, warm", "random read, cold", "ms per record, warm"],
               ["{:,.0f}", "{:,.0f}", "{:,.0f}", "{:.2f}"], store_rows)],
    ),
    Benchmark(
        "loader", "Loading images", "Rendered JPEGs of 512 px to 1008 px, two workers, against PIL and torchvision.",
        [
            Claim(f"images per second over the plain pipeline (uint8): {views}", loader_ratio(views), "{:.2f}")
            for views in ("decode + resize", "decode + crop + flip + colour jitter + resize")
        ],
    ),
    Benchmark(
        "training_speed", "Training from the cache", "`es_ev_s` at 126 px; the loader shares two cores with training.",
        [Claim("steps per second over tensors in memory, two workers",
               at("contenders", "cache, 2 worker(s)", "of_memory"), "{:.2f}", Goal("at least", 0.9), repeats=True)],
    ),
    Benchmark(
        "two_ranks", "Two processes against one", "`encoder/sandbox`, same global batch.",
        [
            Claim(f"{name}: largest relative difference {when}", at(key, name), "{:.1e}",
                  Goal("at most", 1e-4) if key == "largest_relative" else None)
            for key, when in (("largest_relative", "over the whole epoch"),) for name in ("mse", "cosine")
        ] + [Claim("cosine: difference at step 1", at("at_step_1", "cosine"), "{:.1e}", Goal("at most", 1e-4))],
    ),
]  # fmt: skip

EQUALITY = [
    Benchmark(
        "sam3_equality", "`sam3.pt`", "Opened as detector, as tracker and with its memory, beside the original code, "
        "with random weights. The figure is the worst stage of every random model.",
        [
            Claim(f"difference relative to the largest value, {depth} depth", sam3_difference(depth), "{:.1e}",
                  Goal("at most", 1e-4),
                  headline=f"`sam3.pt` ({depth} depth) against the original code, relative difference")
            for depth in ("reduced", "full")
        ] + [
            Claim(f"tensors of `{name}` missing or of another shape",
                  uncovered(name), "{:.0f}", Goal("at most", 0))
            for name in ("Sam3Model", "Sam3TrackerModel", "Sam3TrackerVideoModel")
        ],
        [Table("Where transformers itself differs from the original code, relative to the largest value", "stage",
               ["reduced depth", "full depth"], ["{:.1e}", "{:.1e}"], transformers_rows)],
    ),
    Benchmark(
        "rename_equality", "`sam_vit_*.pth` and `mobile_sam.pt`", "Beside the original code, with random weights.",
        [
            Claim(f"{title}: worst difference relative to the largest value",
                  lambda f, name=name: [worst_relative(f["differences"][name])], "{:.1e}",
                  headline="SAM ViT-B against the original code, relative difference" if name == "vit_b" else "")
            for name, title in (("vit_b", "SAM ViT-B"), ("vit_t", "MobileSAM"))
        ] + [
            Claim(f"{title}: tensors whose name or shape does not fit", at("coverage", name, "faults"), "{:.0f}",
                  Goal("at most", 0))
            for name, title in (("vit_b", "SAM ViT-B"), ("vit_l", "SAM ViT-L"), ("vit_h", "SAM ViT-H"),
                                ("vit_t", "MobileSAM"))
        ],
    ),
    SAM2,
    *NAMES,
    Benchmark(
        "metric_equality", "Official evaluators", "On random files and folders that cover the rules.",
        [
            Claim(f"{title}: largest difference of any figure", official_difference(*names), "{:.1e}",
                  Goal("at most", 1e-6),
                  headline="" if title == "SA-V" else f"{title} against the official evaluator, difference")
            for title, names in (("cgF1", ("cgF1, masks", "cgF1, boxes")), ("DAVIS 2017", ("DAVIS 2017",)),
                                 ("SA-V", ("SA-V, ids", "SA-V, folders")))
        ],
    ),
]  # fmt: skip

RELIABILITY = [
    Benchmark(
        "reliability", "Kills and damaged inputs",
        "Caching and training of all jobs are killed at random moments and resumed; inputs are damaged at random.",
        [
            Claim("kills", over_kills(lambda work: work["kills"]), "{:.0f}"),
            Claim("killed runs that did not end as an undisturbed run does",
                  over_kills(lambda work: work["finished"] - work["equal"] + len(work["faults"])), "{:.0f}",
                  Goal("at most", 0), headline="Killed runs that did not end as an undisturbed run does"),
            Claim("damaged inputs", mutations, "{:,.0f}"),
            Claim("damaged inputs that end in neither success nor a one-line error",
                  mutation_faults, "{:.0f}", Goal("at most", 0),
                  headline="Damaged inputs that end in neither success nor a one-line error"),
        ],
    ),
]  # fmt: skip

PAGES: dict[str, Sequence[Benchmark]] = {
    "Encoder job": [*ENCODER, *HOSTS],
    "Detection job": [*HOSTED, *FULL_SIZE, *DETECTION],
    "Prompt job": PROMPT,
    "Video job": [*VIDEO, *TRACKERS],
    "Text job": TEXT,
    "Export": EXPORT,
    "Bundled models": BUNDLED,
    "Cache, loading and processes": STORAGE,
    "Equality with the original code": EQUALITY,
    "Reliability": RELIABILITY,
}
UNUSED = {
    "teacher_training.jsonl": "training log of the bundled tracker",
    "detector_training.jsonl": "training log of the bundled detector",
    "detector_token_training.jsonl": "training log of the bundled detector's last 2000 steps",
    "sam_training.jsonl": "training log of the bundled SAM",
    "mobile_training.jsonl": "training log of the bundled MobileSAM",
    "full_size_detection_checkpointing.txt": "put together by hand from single stages; it has no figures file",
}
"""Files without a claim, with the reason."""
