import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for toy_task, which is also a script
