"""Evaluation of a text student: on phrases that were not trained on, and inside the teacher on questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ...checkpoints.files import STUDENT_FOLDER
from ...checkpoints.loading import open_config, parameter_count, pretrained
from ...checkpoints.words import Words
from ...data.phrases import PhraseList, normalised
from ...data.saco import ConceptSet
from ...dist import default_device
from ...evaluation.concept_result import ConceptResult
from ...evaluation.concepts import evaluate_concepts, score_files, some_images
from ...inference.concepts import load_concept_model
from ...ops.phrases import end_token
from ...progress import Progress
from ...students import TextStudent, TextStudentConfig
from ..base import DISTILLED, TEACHER, UNTRAINED
from .config import TextRunConfig
from .losses import phrase_means, token_cosine
from .parts import TextParts
from .result import LENGTHS, RARITIES, Confused, TextResult, TextRow, range_name
from .task import build_student

BATCH = 64
"""Phrases in one forward pass."""
Tokens = tuple[Float[Tensor, "p t c"], Int[Tensor, "p t"]]
Encode = Callable[[Sequence[str]], Tokens]


@dataclass(frozen=True)
class _Encoded:
    """What one encoder makes of the evaluated phrases, on the CPU, compared with the teacher.

    Attributes:
        cosine: Mean cosine of each phrase's tokens.
        mse: Mean squared error of each phrase's tokens, per channel.
        pooled: End token of each phrase.
    """

    cosine: Float[Tensor, " p"]
    mse: Float[Tensor, " p"]
    pooled: Float[Tensor, "p c"]


def evaluate(config: TextRunConfig, merged: str | None) -> TextResult | None:
    """Evaluate teacher, untrained and distilled student. None if no phrase was kept out of training.

    Args:
        config: Configuration of a finished run.
        merged: Folder of the student merged into its teacher, for cgF1.
    """
    parts, device = TextParts(config), default_device()
    if not parts.others:
        return None
    teacher = parts.teacher().to(device)
    torch.manual_seed(config.train.seed)
    untrained = build_student(config.student, parts.teacher_info)  # same seed as in training, without any step
    folder = config.output / STUDENT_FOLDER
    students = {
        UNTRAINED: untrained.to(device).eval(),
        DISTILLED: pretrained(TextStudent, open_config(folder, TextStudentConfig), folder, folder).to(device),
    }
    encoders: dict[str, Encode] = {TEACHER: teacher.tokens}
    encoders |= {name: _encoder(student, parts.words) for name, student in students.items()}
    candidates = (*parts.others, *parts.book.train)
    with Progress("evaluating", len(candidates) + len(encoders) * len(parts.others), "phrases") as bar:
        gallery = _end_tokens(teacher.tokens, candidates, bar.advance)
        found = {name: _encoded(encode, teacher.tokens, parts.others, bar.advance) for name, encode in encoders.items()}
    sizes = {TEACHER: parts.teacher_info.params} | {name: parameter_count(one) for name, one in students.items()}
    rows, confused = [], {}
    for name, own in found.items():
        wrong, share = _nearest(own.pooled, gallery, candidates)
        row = TextRow(name, sizes[name], own.cosine.mean().item(), _pooled_cosine(own.pooled, gallery),
                      own.mse.mean().item(), share, *_split(own.cosine, parts.others, parts.book))  # fmt: skip
        rows.append(row)
        confused |= {} if name == TEACHER else {name: tuple(wrong)}
    result = TextResult(
        tuple(rows), TEACHER, len(parts.others), len(candidates), parts.book.excluded, len(parts.book.train), confused,
        {name: dict(zip(parts.others, own.cosine.tolist(), strict=True)) for name, own in found.items()},
        composed=len(parts.composed), untaught=parts.untaught(),
    )  # fmt: skip
    return _with_concepts(result, config, parts, untrained, merged)


def _encoder(student: TextStudent, words: Words) -> Encode:
    def encode(texts: Sequence[str]) -> Tokens:
        ids, mask = (part.to(student.device) for part in words.encode(texts))
        return student(ids, mask).last_hidden_state, mask

    return encode


@torch.no_grad()
def _end_tokens(encode: Encode, texts: Sequence[str], done: Callable[[int], object]) -> Float[Tensor, "p c"]:
    found = []
    for start in range(0, len(texts), BATCH):
        some = texts[start : start + BATCH]
        found.append(end_token(*encode(some)).cpu())
        done(len(some))
    return torch.cat(found)


@torch.no_grad()
def _encoded(encode: Encode, teacher: Encode, texts: Sequence[str], done: Callable[[int], object]) -> _Encoded:
    found = []
    for start in range(0, len(texts), BATCH):
        some = texts[start : start + BATCH]
        tokens, mask = encode(some)
        target = teacher(some)[0][:, : mask.shape[1]]
        errors = (tokens - target).square().mean(-1)
        means = (phrase_means(values, mask).cpu() for values in (token_cosine(tokens, target), errors))
        found.append((*means, end_token(tokens, mask).cpu()))
        done(len(some))
    return _Encoded(*(torch.cat(part) for part in zip(*found, strict=True)))


def _pooled_cosine(pooled: Float[Tensor, "p c"], gallery: Float[Tensor, "g c"]) -> float:
    return F.cosine_similarity(pooled, gallery[: len(pooled)]).mean().item()


def _nearest(
    pooled: Float[Tensor, "p c"], gallery: Float[Tensor, "g c"], candidates: Sequence[str]
) -> tuple[list[Confused], float]:
    """Return the confused phrases, the worst first, and the share of phrases that are nearest to themselves.

    The first ``p`` candidates are the phrases themselves.
    """
    likeness = F.normalize(pooled) @ F.normalize(gallery).T
    own = likeness.diagonal()
    best, nearest = likeness.max(1)
    wrong = [
        Confused(candidates[number], candidates[int(nearest[number])], best[number].item(), own[number].item())
        for number in (own < best).nonzero()[:, 0].tolist()
    ]
    return sorted(wrong, key=lambda one: one.own - one.cosine), 1 - len(wrong) / len(pooled)


def _split(
    cosine: Float[Tensor, " p"], texts: Sequence[str], book: PhraseList
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Return the mean cosine by number of words, and by number of training phrases with the rarest word."""
    keys = ([len(text.split()) for text in texts], [book.rarity(text) for text in texts])
    return tuple(  # type: ignore[return-value]
        _by_range(cosine, counts, ranges, unit)
        for counts, ranges, unit in zip(keys, (LENGTHS, RARITIES), ("word", "training phrase"), strict=True)
    )


def _by_range(
    values: Float[Tensor, " p"], counts: Sequence[int], ranges: Sequence[tuple[int, int | None]], unit: str
) -> dict[str, float]:
    where = torch.tensor(counts)
    found = {}
    for low, high in ranges:
        inside = (where >= low) & (where <= (high if high is not None else where.max()))
        if inside.any():
            found[range_name((low, high), unit)] = values[inside].mean().item()
    return found


def _with_concepts(
    result: TextResult, config: TextRunConfig, parts: TextParts, untrained: TextStudent, merged: str | None
) -> TextResult:
    """Add cgF1 with the teacher's vision encoder and heads, if there are questions and a merged model."""
    settings, device = config.evaluate, default_device()
    if settings.concepts is None or merged is None:
        return result
    concepts = some_images(ConceptSet.load(settings.concepts), settings.images)
    start = load_concept_model(merged, device=device)
    start.model.load_state_dict(untrained.state_dict(), strict=False)
    models = {
        TEACHER: load_concept_model(config.teacher.path, config.teacher.image_size, device),
        UNTRAINED: start,
        DISTILLED: load_concept_model(merged, device=device),
    }
    with Progress("evaluating", len(concepts.pairs), "questions") as bar:
        found = evaluate_concepts(
            models, concepts, teacher=TEACHER, threshold=settings.threshold, batch_size=settings.batch_size,
            progress=bar.advance,
        )  # fmt: skip
    trained = {normalised(phrase) for phrase in parts.book.train}
    new = [pair for pair in concepts.pairs if normalised(pair.text) not in trained]
    fresh = _scores_of(found, replace(concepts, pairs=tuple(new), problems=()), settings.threshold)
    rows = []
    for row in result.rows:
        whole, part = found.row(row.name), fresh.get(row.name, (None, None))
        rows.append(replace(row, cgf1=whole.cgf1, kept=whole.kept, cgf1_new=part[0], kept_new=part[1]))
    return replace(
        result, rows=tuple(rows), concepts=found, new_questions=len(new), skipped=found.skipped, pictures=found.pictures
    )


def _scores_of(found: ConceptResult, concepts: ConceptSet, threshold: float) -> dict[str, tuple[float, float | None]]:
    """Return cgF1 and the share of the teacher's on some of the answered questions, by model."""
    answered = {pair.id for pair in concepts.pairs} & set(next(iter(found.predictions.values())))
    if not answered:
        return {}
    some = replace(concepts, pairs=tuple(pair for pair in concepts.pairs if pair.id in answered))
    predictions = {
        name: {key: value for key, value in each.items() if key in answered} for name, each in found.predictions.items()
    }
    scored = score_files(predictions, some, teacher=found.teacher, threshold=threshold)
    return {row.name: (row.cgf1, row.kept) for row in scored.rows}
