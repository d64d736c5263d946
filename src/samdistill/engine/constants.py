"""Parameters that never train. Checkpoints have their digest in their place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ..ops.digest import hash_tensors
from ..types import UserError


@dataclass(frozen=True)
class Constants:
    """Parameters that no epoch of a run trains, and that ``Task.build_student`` makes again.

    Attributes:
        names: Their names. A tied parameter has several.
        digest: Hex SHA-256 digest of names and values; empty without parameters.
    """

    names: frozenset[str] = frozenset()
    digest: str = ""

    @classmethod
    def of(cls, student: nn.Module) -> Constants:
        """Find the parameters without ``requires_grad``. Call it after ``Freezing`` has set it for the whole run."""
        kept = student.state_dict()
        frozen = (name for name, p in student.named_parameters(remove_duplicate=False) if not p.requires_grad)
        names = frozenset(name for name in frozen if name in kept)
        digest = hashlib.sha256()
        hash_tensors(digest, ((name, kept[name]) for name in sorted(names)))
        return cls(names, digest.hexdigest() if names else "")

    def without(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the entries of a state dict that a checkpoint has."""
        return {name: value for name, value in state.items() if name not in self.names}

    def load(self, student: nn.Module, state: Mapping[str, Tensor], digest: str, run: Path) -> None:
        """Load the state of a checkpoint.

        Args:
            student: The student, as it was built.
            state: The state. That of a checkpoint of an earlier version is complete.
            digest: Digest of the parameters that ``state`` leaves out; empty for a complete one.
            run: The run folder, for the error message.

        Raises:
            UserError: The student was built with other values of these parameters.
        """
        if not digest:
            student.load_state_dict(state)
            return
        if digest != self.digest:
            raise UserError(
                f"{run}: trained with other frozen parameters than the student now has, so a model from which it is "
                "built has changed; restore that model, or start again with another output"
            )
        own = student.state_dict()
        student.load_state_dict({**{name: own[name] for name in self.names}, **state})
