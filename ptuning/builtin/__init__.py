"""The built-in base: a small language model, its tasks, and the generator of the corpus it was pretrained on."""

from pathlib import Path

BASE_FOLDER = Path(__file__).parent / "base"
TASKS_FOLDER = Path(__file__).parent / "tasks"
