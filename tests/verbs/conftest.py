import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))  # for tiny_detection

from tiny_detection import detection, detector, scenes, tracker  # noqa: F401
