"""The layout: which package may import which, and what is forbidden everywhere. Read from the source, nothing is imported."""

from __future__ import annotations

import ast
import gc
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

from ptuning.config import read_experiment
from ptuning.imports import quick_imports

pytestmark = pytest.mark.fast

PACKAGE = REPOSITORY / "ptuning"

FOUNDATION = (
    "redaction",
    "tracing",
    "errors",
    "records",
    "sys_path",
    "environment",
    "imports",
    "settings",
    "paths",
    "row_files",
    "config",
    "storage",
)
"""Every package may import these; they import only those before them."""

DIRECTIONS = {
    "model": set(),
    "data": {"model"},
    "tracking": set(),
    "inference": {"model", "data"},
    "cluster": {"model", "tracking", "planning"},
    "planning": {"model", "data"},
    "registry": {"model", "data", "tracking"},
    "training": {"model", "data", "tracking", "planning", "registry", "cluster"},
    "searching": {"model", "data", "tracking", "planning", "cluster", "training"},
    "tuning": {"model", "data", "tracking", "registry", "inference", "cluster", "training"},
    "prediction": {"model", "data", "registry", "inference", "cluster", "training"},
    "serving": {"model", "data", "tracking", "registry", "inference", "cluster", "searching", "tuning"},
    "display": {"training", "searching", "prediction"},
    "registry_api": {"model", "tracking", "registry", "serving"},
    "api": {
        "registry_api",
        "model",
        "tracking",
        "inference",
        "planning",
        "registry",
        "cluster",
        "training",
        "searching",
        "prediction",
        "serving",
        "display",
    },
    "activity": {"training", "searching", "tuning"},
    "cli": {
        "model",
        "tracking",
        "planning",
        "registry",
        "cluster",
        "training",
        "searching",
        "serving",
        "activity",
        "api",
        "registry_api",
    },
}
"""The packages that each package may import, besides the foundation and the built-in base, which is data."""

WITHOUT_RAY = {"model", "data", "tracking", "planning", "registry", "inference"}

OWNERS = {
    "deepspeed": {"imports", "training.zero"},
    "matplotlib": {"tracking.plots"},
    "mlflow": {"tracking.client"},
    "ray": {
        "cluster.connection",
        "cluster.doctor",
        "cluster.failures",
        "cluster.jobs",
        "cluster.node_memory",
        "cluster.resources",
        "prediction.run",
        "prediction.stream",
        "searching.dispatcher",
        "searching.finals",
        "searching.monitor",
        "searching.run",
        "searching.searcher",
        "searching.trial",
        "searching.tuning",
        "serving.deployment",
        "serving.ray_metrics",
        "serving.server",
        "training.dispatcher",
        "training.event_queue",
        "training.ray_trainer",
        "training.run",
        "training.run_execution",
        "training.run_metrics",
        "tuning.actor",
        "tuning.batch_actor",
        "tuning.group",
        "tuning.remote_jobs",
    },
    "fastapi": {
        "serving.admin_routes",
        "serving.page_routes",
        "serving.api",
        "serving.app",
        "serving.batch_routes",
        "serving.deployment",
        "serving.file_routes",
        "serving.http_request",
        "serving.replies",
        "serving.search_routes",
        "serving.status",
        "serving.tuning_routes",
    },
    "llguidance": {"inference.grammar"},
    "vllm": {
        "inference.open_engine",
        "inference.vllm_engine",
        "inference.vllm_requests",
        "inference.vllm_rows",
        "inference.vllm_sampling",
    },
    "prometheus_client": {"serving.metrics"},
    "opentelemetry": {"tracing"},
    "optuna": {"searching.searcher"},
}
"""The only modules that import each framework."""

FORBIDDEN_NAMES = {"utils", "util", "helpers", "common", "misc", "core"}
LONG_JOBS = {"architectures", "demo", "pretrain_builtin"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py") if path.stem != "__init__"
}
SOURCES = [*PACKAGE.rglob("*.py"), *(REPOSITORY / "jobs").rglob("*.py")]


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


def modules(tree: ast.AST) -> set[str]:
    """The modules of the package that a module imports."""
    names = {name.removeprefix("ptuning.") for name in imported(tree) if name.startswith("ptuning.")}
    return {name if name in MODULES else name.rpartition(".")[0] or name for name in names}


def package(module: str) -> str:
    """The package that a module lies in; of the top level, the module itself."""
    return module.partition(".")[0]


def frameworks(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imported(tree)}


def test_every_module_has_its_place():
    assert {package(module) for module in MODULES} == {*DIRECTIONS, *FOUNDATION, "__main__"}
    assert not FORBIDDEN_NAMES & {path.stem for path in SOURCES}


@pytest.mark.parametrize("module", MODULES)
def test_packages_import_in_the_allowed_directions(module):
    own = package(module)
    if own in FOUNDATION:
        allowed = set(FOUNDATION[: FOUNDATION.index(own) + 1])
    elif own == "__main__":
        allowed = {"cli", "sys_path"}
    else:
        allowed = DIRECTIONS[own] | {own, *FOUNDATION, "builtin"}
    assert {name for name in modules(MODULES[module]) if package(name) not in allowed} == set()


def test_no_circles():
    for packages in (DIRECTIONS, {module: modules(tree) for module, tree in MODULES.items()}):
        list(graphlib.TopologicalSorter(packages).static_order())  # raises a CycleError that names the circle


def test_packages_hold_a_docstring_only():
    """Importing a module runs the `__init__` of its packages: it must cost nothing."""
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent not in (PACKAGE, PACKAGE / "builtin"):
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), path


@pytest.mark.parametrize("module", [module for module in MODULES if package(module) in WITHOUT_RAY])
def test_these_packages_run_without_ray(module):
    assert "ray" not in frameworks(MODULES[module])


def test_the_builtin_base_knows_the_experiment_only():
    for path in [*(PACKAGE / "builtin").rglob("*.py"), *(REPOSITORY / "jobs" / "pretraining").rglob("*.py")]:
        names = {name.removeprefix("ptuning.") for name in imported(ast.parse(path.read_text(encoding="utf-8")))}
        known = {package(name) for name in names if (PACKAGE / package(name)).exists() or name in MODULES}
        assert known <= {"builtin", "config"}, path


@pytest.mark.parametrize("module", MODULES)
def test_each_framework_has_one_owner(module):
    foreign = {name for name in frameworks(MODULES[module]) & set(OWNERS) if module not in OWNERS[name]}
    assert foreign == set(), f"{module} imports what another module owns"


def test_transformers_integration_of_deepspeed_is_used_in_zero_only():
    users = {module for module, tree in MODULES.items() if any("integrations.deepspeed" in name for name in imported(tree))}
    assert users <= {"training.zero"}


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
    functions = [node for node in ast.walk(MODULES["cli.app"]) if isinstance(node, ast.FunctionDef)]
    assert all(node.end_lineno - node.lineno < 40 for node in functions)
    assert not frameworks(MODULES["cli.app"]) & {"torch", "transformers", "datasets", *OWNERS}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "jobs").rglob("*.toml")), ids=lambda path: path.name)
def test_every_experiment_of_the_project_is_valid(path):
    assert read_experiment(path).name == path.stem


@pytest.mark.parametrize("module", ["ptuning", "ptuning.config", "ptuning.cli.app"])
def test_parsing_comes_before_heavy_imports(module):
    heavy = {"torch", "ray", "transformers", "mlflow", "datasets", "deepspeed", "numpy", "sklearn"}
    code = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.split() == []


DESTROYING = re.compile(r"\b(delet|remov|eras|overwrit|purg|wip(e|ing)|discard|unlink|throw|drop|clear|rm -)\w*", re.IGNORECASE)
ALLOWED = {
    # Told to who has asked for the deletion itself.
    "is the champion; promote another version first, then delete this one": "why it was not done",
    ":N to delete version N": "how to ask for it",
    "are used); delete some of them first": "how to make room for what was just sent",
    "was deleted; choose another version": "what was done",
    "was deleted; restore it with: ": "what others have done",
    "the input file was deleted, or has expired": "what its client has done",
    " is deleted; its run ": "what was done",
    "Delete ": "a question",
    ": deleting asks for confirmation": "a question",
    "\nserve.delete(": "the program that ends what is served",
    " dropped": "rows that a data set's own setting leaves out",
    "is the champion, but was removed from MLflow": "what others have done",
    "was removed from the engine; use its successor": "what the server has done",
    "the run was deleted there; it is sent again": "what others have done",
    # About a line of an experiment, a request or a table of rows: what is to go stands in front of who reads it.
    "set data.validation or remove train.patience": "a setting",
    "has no effect on workers without GPUs; remove it": "a setting",
    '" or remove it': "a setting",
    "leave no space in the ": "a setting",
    "or remove the value": "a setting",
    "which is code from elsewhere; remove it": "a line of a config.json that is there",
    "fill the row or remove it": "a row that is there",
    "fill it or remove the row": "a row that is there",
    "contains a lone surrogate (half a character); remove it": "a character that is there",
    "is not supported; remove it": "a parameter of a request",
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


def test_drivers_import_no_code_of_models_and_workers_no_mlflow():
    """Drivers would import scipy and torch's compiler, too: 2 s of every command's start. DeepSpeed would import MLflow, for a
    part of it that nobody uses; whoever wants it afterwards has it."""
    script = """
import sys, ptuning.searching.run, ptuning.training.run
print({"transformers.modeling_utils", "scipy", "mlflow"} & set(sys.modules))
import ptuning.training.worker
print("deepspeed" in sys.modules)
import ptuning.training.zero
print("deepspeed" in sys.modules, "mlflow" in sys.modules)
import mlflow.version
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\nFalse\nTrue False\n"


def test_garbage_is_collected_again_after_imports():
    threshold = gc.get_threshold()
    with pytest.raises(ImportError), quick_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and gc.get_threshold() == threshold
    gc.unfreeze()  # what this process has imported is nobody's business


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    """A resolver may drop what another package happens to bring."""
    names = {"huggingface-hub": "huggingface_hub", "prometheus-client": "prometheus_client", "pydantic-core": "pydantic_core",
             "python-multipart": "python_multipart", "rouge-score": "rouge_score", "scikit-learn": "sklearn",
             "opentelemetry-exporter-otlp-proto-http": "opentelemetry"}  # fmt: skip
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra in ("vllm", "tracing") for line in project["optional-dependencies"][extra]]
    declared = {re.match(r"[\w-]+", line)[0] for line in [*project["dependencies"], *extras]}
    modules = {names.get(name, name) for name in declared}
    used = {name for path in PACKAGE.rglob("*.py") for name in frameworks(ast.parse(path.read_text(encoding="utf-8")))}
    assert used - sys.stdlib_module_names - {"ptuning"} <= modules
    assert modules - used == {"accelerate"}, "transformers needs it under ZeRO-3"
