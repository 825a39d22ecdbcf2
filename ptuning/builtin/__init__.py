"""The built-in base, a small language model, and its tasks. `jobs/pretraining` generates both."""

from pathlib import Path

BASE_FOLDER = Path(__file__).parent / "base"
TASKS_FOLDER = Path(__file__).parent / "tasks"
