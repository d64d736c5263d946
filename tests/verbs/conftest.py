import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))  # for tiny_detection
sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))  # for original_names
sys.path.insert(0, str(Path(__file__).parent))  # for tiny_prompt

from tiny_detection import detection, detector, scenes, tracker  # noqa: F401
from tiny_prompt import prompted, sams  # noqa: F401
from tiny_video import films, image_student, video  # noqa: F401
