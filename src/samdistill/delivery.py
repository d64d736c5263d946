"""What a run exports at its end: ``--export``, ``--web`` and ``--vocabulary`` of ``run`` and ``demo``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .checkpoints.report import MergeReport
from .config import Run
from .jobs.base import Job
from .types import UserError

if TYPE_CHECKING:
    from .deployment.record import Exported

console = Console()


@dataclass(frozen=True)
class Delivery:
    """What a run exports at its end.

    Attributes:
        targets: Export targets. Without any, nothing is exported.
        web: Whether the page is added.
        vocabulary: Phrases that become constants of the files.
    """

    targets: tuple[str, ...] = ()
    web: bool = False
    vocabulary: str | Path | tuple[str, ...] = ()

    @classmethod
    def of(cls, job: Job[Any], export: Sequence[str], web: bool, vocabulary: str | Path | Sequence[str]) -> Delivery:
        """Check what is to be exported before anything is spent. ``web`` adds the target ``onnx``.

        Raises:
            UserError: A target is unknown, a library is missing, also the page's, or a detector's page has no words.
        """
        targets = tuple(dict.fromkeys([*export, "onnx"] if web else export))
        if web:
            from .deployment.page import find_runtime

            find_runtime()
        if targets:
            from .deployment.targets import target

            for name in targets:
                target(name)
        words = vocabulary if isinstance(vocabulary, str | Path) else tuple(vocabulary)
        if isinstance(words, str) and not words.strip():
            raise UserError("--vocabulary: no phrase given; give phrases with commas between them, or a file of lines")
        if words and not targets:
            raise UserError("--vocabulary: is for an export; add --export onnx or --web")
        if web and job.phrases and not words:
            from .deployment.vocabulary import NO_WORDS

            raise UserError(NO_WORDS)
        return cls(targets, web, words)

    def check(self, job: Job[Any], config: Run) -> None:
        """Check the vocabulary against the tokenizer of the model that the run will make.

        Raises:
            UserError: The model takes no phrases, or does not know a word.
        """
        if not self.vocabulary:
            return
        words = job.words(config)
        if words is None:
            raise UserError(f"--vocabulary: is for a detector; this {job.name} run makes a model without phrases")
        from .deployment.vocabulary import phrases_of

        phrases_of(self.vocabulary, words)

    def export(self, config: Run, merged: MergeReport | None) -> Exported | None:
        """Export what the run made: the merged model, or the student. Returns None without targets."""
        if not self.targets:
            return None
        from .deployment.folder import export

        console.print(f"[bold]export[/]   to {', '.join(self.targets)}")
        found = export(
            config.output if merged is None else merged.out, config.output / "export", to=self.targets, web=self.web,
            vocabulary=self.vocabulary,
        )  # fmt: skip
        console.print(found.table())
        return found
