"""Training engine: one loop for all jobs, the gradient check (``check_terms``) and the launcher."""

from ..dist import default_device
from .check import CheckReport, TermReport, check_terms
from .launch import is_worker, launch, leave
from .loop import FitResult, fit
from .schedule import Schedule
from .signals import Interrupted
from .state import Checkpoint, newest
from .tracking import read_lines

__all__ = [
    "CheckReport",
    "Checkpoint",
    "FitResult",
    "Interrupted",
    "Schedule",
    "TermReport",
    "check_terms",
    "default_device",
    "fit",
    "is_worker",
    "launch",
    "leave",
    "newest",
    "read_lines",
]
