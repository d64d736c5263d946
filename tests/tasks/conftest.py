import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for tiny_detection, which the verbs' tests share

from tiny_detection import detection, detector, scenes, tracker  # noqa: F401
from tiny_jobs import tiny_job  # noqa: F401
from tiny_prompt import prompted, sams  # noqa: F401
from tiny_video import films, image_student, video  # noqa: F401
