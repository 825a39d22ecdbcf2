"""The house: which room may know which, and what is forbidden everywhere. Read from the source, nothing is imported."""

from __future__ import annotations

import ast
import gc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

from ptuning.config import read_experiment
from ptuning.importing import quick_imports

pytestmark = pytest.mark.fast

PACKAGE = REPOSITORY / "ptuning"

FLOORS = {
    "redaction": -1,
    "config": 0, "cpu_attention": 0, "import_path": 0, "importing": 0, "label_trie": 0,
    "mailbox": 0, "openai_api": 0, "output_head": 0, "shipped": 0,
    "access": 1, "batches": 1, "edge": 1, "gathering": 1, "gauges": 1, "guard": 1, "hub": 1, "last_layer": 1, "metrics": 1,
    "segments": 1, "sources": 1, "space": 1, "spool": 1, "starts": 1, "storage": 1, "virtual_tokens": 1, "watchdog": 1,
    "workers": 1,
    "checkpoint": 2, "data": 2, "figures": 2, "ledger": 2, "model": 2, "paged_attention": 2, "plan": 2, "sampling": 2,
    "failures": 2, "lease": 2, "orders": 3, "soft_prompt": 2, "tracking": 2, "trial": 2,
    "base": 3, "chooser": 3, "engine": 3, "evaluate": 3, "leaderboard": 3, "registry": 3, "shipment": 3,
    "blueprint": 4, "champion": 4, "publish": 4, "submit": 4, "zero": 4,
    "adopt": 5, "catalogue": 5, "gate": 5, "meaning": 5, "train": 5,
    "answers": 6, "display": 6, "export": 6, "portrait": 6, "prepare": 6, "record": 6, "slots": 6,
    "checkup": 7, "compare": 7, "estimate": 7, "replies": 7, "service": 7, "worker": 7,
    "cli_options": 8, "http_api": 8, "launch": 8,
    "desk": 9, "doctor": 9, "serve": 9, "cli_prompts": 9, "cli_submit": 9,
    "cli_cluster": 10, "cli_serve": 10, "search": 10,
    "cli": 11,
    "__main__": 12,
}  # fmt: skip
"""Imports point downstairs only: a room may import rooms of lower floors."""

OWNERS = {
    "deepspeed": {"zero"},
    "matplotlib": {"figures"},
    "mlflow": {"tracking"},
    "ray": {"chooser", "desk", "doctor", "failures", "hub", "launch", "mailbox", "search", "serve", "submit", "trial"},
    "fastapi": {"http_api", "serve"},
    "prometheus_client": {"gauges"},
    "optuna": {"chooser"},
}
"""The only doors to each framework."""

FORBIDDEN_NAMES = {"utils", "util", "helpers", "common", "misc", "core"}
LONG_JOBS = {"demo", "pretrain_builtin"}

MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
SOURCES = [*PACKAGE.rglob("*.py"), *(REPOSITORY / "jobs").glob("*.py")]


def imported(tree: ast.AST) -> set[str]:
    """Everything a module imports anywhere, as dotted names; `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms(tree: ast.AST) -> set[str]:
    """The modules of the package that a module imports."""
    return {name.split(".")[1] for name in imported(tree) if name.startswith("ptuning.")}


def frameworks(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imported(tree)}


def test_every_room_has_a_floor():
    assert set(MODULES) - set(FLOORS) == set()
    assert not FORBIDDEN_NAMES & {path.stem for path in SOURCES}


@pytest.mark.parametrize("room", MODULES)
def test_imports_point_downstairs(room):
    # Strictly lower floors, so there can be no cycle either. The builtin base is data: whoever needs it may have it.
    upstairs = {name for name in rooms(MODULES[room]) - {"builtin"} if FLOORS[name] >= FLOORS[room]}
    assert upstairs == set(), f"{room} (floor {FLOORS[room]}) imports upstairs"


def test_the_builtin_base_knows_the_experiment_only():
    for path in (PACKAGE / "builtin").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert rooms(tree) <= {"builtin", "config"}, path


@pytest.mark.parametrize("room", MODULES)
def test_each_framework_has_one_owner(room):
    trespassed = {name for name in frameworks(MODULES[room]) & set(OWNERS) if room not in OWNERS[name]}
    assert trespassed == set(), f"{room} opens a door that is not its own"


def test_transformers_own_door_to_deepspeed_is_used_in_zero_only():
    through = {room for room, tree in MODULES.items() if any("integrations.deepspeed" in name for name in imported(tree))}
    assert through <= {"zero"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_pickle_anywhere(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not frameworks(tree) & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    calls = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not calls & {"torch.load", "torch.save", "np.load", "numpy.load", "pd.read_pickle"}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "jobs").glob("*.py")), ids=lambda path: path.name)
def test_jobs_hold_no_logic(path):
    # Ray pickles what a script defines by value and imports what the package defines by name.
    if path.stem not in LONG_JOBS:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40


def test_the_command_line_holds_no_logic():
    functions = [node for node in ast.walk(MODULES.get("cli", ast.Module([], []))) if isinstance(node, ast.FunctionDef)]
    assert all(node.end_lineno - node.lineno < 40 for node in functions)
    assert not frameworks(MODULES.get("cli", ast.Module([], []))) & {"torch", "transformers", "datasets", *OWNERS}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "jobs").rglob("*.toml")), ids=lambda path: path.name)
def test_every_experiment_of_the_project_is_valid(path):
    assert read_experiment(path).name == path.stem


@pytest.mark.parametrize("room", ["config", "cli"])
def test_parsing_comes_before_heavy_imports(room):
    if not Path(PACKAGE / f"{room}.py").exists():
        pytest.skip(f"ptuning.{room} does not exist yet")
    heavy = {"torch", "ray", "transformers", "mlflow", "datasets", "deepspeed", "numpy", "sklearn"}
    code = f"import sys, ptuning.{room}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.split() == []


DESTROYING = re.compile(r"\b(delet|remov|eras|overwrit|purg|wip(e|ing)|discard|unlink|throw|drop|clear|rm -)\w*", re.IGNORECASE)
ALLOWED = {
    # Told to who has asked for the deletion itself.
    "is the champion; promote another version first, then delete this one": "why it was not done",
    ":N to delete version N": "how to ask for it",
    "was deleted; choose another version": "what was done",
    " is deleted; its run ": "what was done",
    "Delete ": "a question",
    ": deleting asks for confirmation": "a question",
    "\nserve.delete(": "the program that ends what is served",
    " dropped": "rows that a data set's own setting leaves out",
    "is the champion, but was removed from MLflow": "what others have done",
    "the run was deleted there; it is sent again": "what others have done",
    # About a line of an experiment, a request or a table of rows: what is to go stands in front of who reads it.
    "set data.validation or remove it": "a setting",
    "whose memory it could spare; remove it": "a setting",
    '" or remove it': "a setting",
    "leave no room in the ": "a setting",
    "or remove the value": "a setting",
    "which is code from elsewhere; remove it": "a line of a config.json that is there",
    "fill the row or remove it": "a row that is there",
    "fill it or remove the row": "a row that is there",
    "(a lone surrogate); remove it": "a character that is there",
    "is not supported; remove it": "a parameter of a request",
    "is not supported at this value; remove it": "a parameter of a request",
    "has no labels; remove it": "a parameter of a request",
}
"""Parts of texts that speak of deleting, and why they may."""


def texts(tree: ast.AST) -> Iterator[str]:
    """Every string of a module, those with values in them as a whole; no docstrings."""
    docs, parts = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs.add(node.value)
        if isinstance(node, ast.JoinedStr):
            parts |= set(node.values)
            yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs | parts:
            yield node.value


def test_nobody_is_told_to_delete_what_was_only_not_found():
    found = {text for tree in MODULES.values() for text in texts(tree) if " " in text and DESTROYING.search(text)}
    assert {text for text in found if not any(part in text for part in ALLOWED)} == set()
    assert {part for part in ALLOWED if not any(part in text for text in found)} == set(), "these are no longer said"


def test_drivers_import_no_code_of_models():
    """It would import scipy and torch's compiler, too: 2 s of every command's start."""
    script = (
        "import sys, ptuning.search, ptuning.launch; print(sorted({'transformers.modeling_utils', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_workers_import_no_mlflow():
    """DeepSpeed would, for a part of it that nobody uses. Whoever wants it afterwards has it."""
    script = "import sys, ptuning.worker; print('mlflow' in sys.modules); import mlflow.version"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"


def test_garbage_is_collected_again_after_imports():
    threshold = gc.get_threshold()
    with pytest.raises(ImportError), quick_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and gc.get_threshold() == threshold
    gc.unfreeze()  # what this process has imported is nobody's business
