"""Data sets, augmented views and batches.

Importing this package registers every kind of data set in ``SOURCES`` (images) and ``VIDEOS`` (videos).
"""

from .clips import ClipBatch, ClipDataset, ClipItem, ClipRules, collate_clips, draw_clip, read_clip
from .coco import CocoSource
from .davis import DavisSource
from .division import split_keys, subset
from .folder import FolderSource
from .images import IMAGE_SUFFIXES, UnreadableImage, read_image, upright_size
from .loader import (
    ImageDataset,
    ImageItem,
    ReadableImages,
    collate_images,
    image_loader,
    record_key,
    worker_count,
)
from .masks import MaskFolderSource
from .objects import ObjectBatch, ObjectDataset, ObjectItem, collate_objects
from .prepare import PrepareReport, prepare_sa1b
from .prompts import box_prompts, check_prompts, pad_masks, point_prompts, prompts_fingerprint
from .questions import PhraseBook, Question, QuestionDataset, QuestionItem, collate_questions
from .sa1b import Sa1bSource
from .saco_source import SacoSource
from .sav import SavSource
from .skipped import BadInput, leave_out, reporting
from .sources import SOURCES, BadImage, Instance, Source, open_source
from .transforms import Geometry, View, ViewTransform, view_seed
from .videos import VIDEOS, BadVideo, VideoRecord, VideoSource, open_videos, read_frames

__all__ = [
    "IMAGE_SUFFIXES", "SOURCES", "VIDEOS", "BadImage", "BadInput", "BadVideo", "ClipBatch", "ClipDataset",
    "ClipItem", "ClipRules", "CocoSource", "DavisSource", "FolderSource", "Geometry", "ImageDataset", "ImageItem",
    "Instance", "MaskFolderSource", "ObjectBatch", "ObjectDataset", "ObjectItem", "PhraseBook", "PrepareReport",
    "Question", "QuestionDataset", "QuestionItem", "ReadableImages", "Sa1bSource", "SacoSource", "SavSource", "Source",
    "UnreadableImage", "VideoRecord", "VideoSource", "View", "ViewTransform", "box_prompts", "check_prompts",
    "collate_clips", "collate_images", "collate_objects", "collate_questions", "draw_clip", "image_loader",
    "leave_out", "open_source", "open_videos", "pad_masks", "point_prompts", "prepare_sa1b", "prompts_fingerprint",
    "read_clip", "read_frames", "read_image", "record_key", "reporting", "split_keys", "subset", "upright_size",
    "view_seed", "worker_count",
]  # fmt: skip
