"""The Python API, as imported by `import ptuning`. The command line calls the same functions.

    experiment = ptuning.Experiment.load("jobs/sentiment.toml", "train.steps=100")
    result = ptuning.train(experiment, register="sentiment")
    with ptuning.Predictor(result.soft_prompt) as predictor:
        predictor.predict(["This movie was terrible."])

Importing this module imports neither torch, Ray nor MLflow: each function imports what it needs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from ptuning import environment
from ptuning.config import Experiment
from ptuning.errors import RunFailed, UserError
from ptuning.imports import quick_imports
from ptuning.registry_api import Registry

if TYPE_CHECKING:
    from ptuning.inference.predictor import Predictor
    from ptuning.model.soft_prompt import SoftPrompt
    from ptuning.planning.estimate import Estimate
    from ptuning.prediction.result import PredictResult
    from ptuning.searching.result import SearchResult
    from ptuning.serving.server import Server
    from ptuning.training.result import TrainResult

__all__ = [
    "Experiment",
    "PredictResult",
    "Predictor",
    "Registry",
    "RunFailed",
    "SearchResult",
    "Server",
    "SoftPrompt",
    "TrainResult",
    "UserError",
    "load",
    "plan",
    "predict",
    "search",
    "serve",
    "train",
]

_LAZY = {
    "PredictResult": "ptuning.prediction.result",
    "Predictor": "ptuning.inference.predictor",
    "SearchResult": "ptuning.searching.result",
    "Server": "ptuning.serving.server",
    "SoftPrompt": "ptuning.model.soft_prompt",
    "TrainResult": "ptuning.training.result",
}
"""Classes whose modules import torch or Ray: they are imported on first access."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ptuning.api' has no attribute {name!r}")


def prepare(command: Literal["train", "search", "serve"], experiment: Experiment) -> None:
    """Preload the modules of a command, which takes some seconds; otherwise its first call does.

    Raises:
        UserError: there is no cluster at the experiment's address, or none can start here.
    """
    if not ("ray" in sys.modules and sys.modules["ray"].is_initialized()):
        from ptuning.cluster.surroundings import check_cluster

        check_cluster(experiment.compute.address)
    environment.apply_for_cluster(experiment.compute.address)
    with quick_imports():
        if command == "train":
            from ptuning.training import run  # noqa: F401
        elif command == "search":
            from ptuning.searching import run  # type: ignore[no-redef]  # noqa: F401
        else:
            from ptuning.serving import server  # noqa: F401


def train(experiment: Experiment, *, register: str | None = None, resume: bool = False, progress: bool = True) -> TrainResult:
    """Train one soft prompt on a Ray cluster, evaluate it and track it.

    Without `compute.address` and `RAY_ADDRESS` a cluster is started on this machine, and ended afterwards.

    Args:
        register: publish the result as the newest version of this name.
        resume: continue the run of this name from its newest checkpoint.
        progress: show progress on stderr: a bar on a terminal, lines elsewhere.

    Raises:
        UserError: something in the experiment or its surroundings is wrong; nothing was started or written.
        RunFailed: the training did not reach its end, or its result could not be registered.
    """
    _check_register(register)
    prepare("train", experiment)
    from ptuning.training.run import run_training

    if not progress:
        return run_training(experiment, resume=resume, register=register)
    from ptuning.display import Display

    with closing(Display()) as display:
        return run_training(experiment, resume=resume, show=display, say=display.say, register=register)


def search(
    experiment: Experiment, *, register: str | Literal[False] | None = None, resume: bool = False, progress: bool = True
) -> SearchResult:
    """Search over soft prompts that train side by side on one base; test the winner and publish it.

    Args:
        register: the name to publish the winner under; default: the experiment's. False publishes nothing.
        resume: continue the search of this name.
        progress: show progress on stderr: a live table on a terminal, lines elsewhere.

    Raises:
        UserError: something in the experiment or its surroundings is wrong; nothing was started or written.
        RunFailed: no trial could be trained, the workers failed, or the winner could not be registered.
    """
    name = experiment.name if register is None else register or None
    _check_register(name)
    prepare("search", experiment)
    from ptuning.searching.run import run_search

    if not progress:
        return run_search(experiment, resume=resume, register=name)
    from ptuning.display import SearchDisplay

    with closing(SearchDisplay(experiment)) as display:
        return run_search(experiment, resume=resume, show=display, say=display.say, register=name)


def load(source: str, *, storage: str | None = None, tracking: str | None = None) -> SoftPrompt:
    """A soft prompt: `.vectors` [P, H] in fp32 and `.card`.

    Args:
        source: a folder, a registered name ("sentiment", "sentiment:2", "sentiment@champion"), or the Hugging Face id of a PEFT
            prompt-tuning adapter.
        storage: the storage folder whose registry contains the name; default: as for `Registry`.
        tracking: MLflow server or database to use instead.

    Raises:
        UserError: the soft prompt does not exist or is damaged.
    """
    if _is_reference(source):
        return Registry(storage, tracking).load(source)
    from ptuning.model import soft_prompt
    from ptuning.registry.peft_import import locate

    return soft_prompt.load(locate(source))


def predict(
    name: str,
    rows: str | Sequence[str],
    output: str,
    *,
    model_column: str | None = None,
    probabilities: bool = False,
    prefix: str = "",
    workers: int | None = None,
    cpus: float | None = None,
    resume: bool = False,
    address: str | None = None,
    storage: str | None = None,
    tracking: str | None = None,
    base: str | None = None,
    progress: bool = True,
) -> PredictResult:
    """Answer the rows of a table on a Ray cluster, and write them with their answers.

    Every column is kept, in the order of the rows. Columns are added: `prediction`; with labels `probability`, without labels
    `finish_reason`; `version`; `error`, which says why a row has no answer.

    Args:
        name: the soft prompt, as for `load`.
        rows: a source of rows as in `data.train`: a file, a folder, "hub:org/name:split", "s3://...", or a list of these.
        output: a new .parquet, .csv or .jsonl file, also "s3://...".
        model_column: column with the soft prompt of each row; `name` answers where it is empty. All have the same base.
        probabilities: add the probability of every label, as `probability_<label>`.
        prefix: in front of the names of the added columns.
        workers: processes, each with a copy of the base; default: one per GPU, else 1.
        cpus: per worker; default: those of this machine, shared; on a cluster 1.
        resume: continue an output that was begun: rows that were answered are not answered again.
        address: Ray cluster to connect to; default: RAY_ADDRESS, else a cluster on this machine that ends afterwards.
        storage: as for `load`.
        tracking: as for `load`.
        base: the location of the base, if it differs from the card.
        progress: show progress on stderr.

    Raises:
        UserError: the table, a soft prompt or the output cannot be used; nothing was started or written.
        RunFailed: a process failed; `resume` goes on.
    """
    from ptuning.cluster.surroundings import check_cluster

    if not ("ray" in sys.modules and sys.modules["ray"].is_initialized()):
        check_cluster(address, "--address")
    environment.apply_for_cluster(address)
    with quick_imports():
        from ptuning.display import RowsDisplay
        from ptuning.prediction.run import Wanted, run_prediction

    def named(reference: str) -> tuple[str, SoftPrompt]:
        if _is_reference(reference):
            version = str(registry.get(reference))
            return version, registry.load(version)
        found = load(reference)
        return found.card.content_hash[:12], found

    registry = Registry(storage, tracking)
    wanted = Wanted(name, rows, output, model_column, probabilities, prefix, base, workers, cpus, address, resume)
    if not progress:
        return run_prediction(wanted, named)
    with closing(RowsDisplay()) as display:
        return run_prediction(wanted, named, display, display.say)


@overload
def serve(
    experiment: Experiment, *, block: Literal[False], insecure: bool = False, say: Callable[[str], None] | None = None
) -> Server: ...
@overload
def serve(
    experiment: Experiment, *, block: Literal[True] = True, insecure: bool = False, say: Callable[[str], None] | None = None
) -> None: ...
def serve(
    experiment: Experiment, *, block: bool = True, insecure: bool = False, say: Callable[[str], None] | None = None
) -> Server | None:
    """Serve the registered soft prompts of a base behind OpenAI's API, on a Ray cluster.

    Args:
        block: serve until SIGINT or SIGTERM. If False, return a `Server` as soon as it answers; leave its `with` block, or call
            its `stop`, to end it.
        insecure: allow an address that other machines can reach without API keys.
        say: receives status lines; default: print them to stderr if `block`.

    Raises:
        UserError: the keys or the base are wrong, the address requires keys, or the cluster lacks resources.
    """
    check_serving(experiment, insecure)
    prepare("serve", experiment)
    from ptuning.serving.server import Server, run_server

    if not block:
        return Server(experiment, insecure=insecure, say=say or _ignore)
    run_server(experiment, insecure=insecure, say=say or _tell)
    return None


def check_serving(experiment: Experiment, insecure: bool) -> None:
    """What can be checked of a server before seconds of imports.

    Raises:
        UserError: the keys are wrong, the address requires keys, or the port is taken.
    """
    from ptuning.cluster.surroundings import check_port
    from ptuning.serving.auth import check_address, check_origins, check_token, read_keys

    keys = read_keys(experiment.serve.keys)
    check_address(experiment.serve.host, keys, insecure)
    check_origins(experiment.serve.cors_origins, keys)
    check_token(insecure)
    ray = sys.modules.get("ray")
    if not (experiment.compute.address or os.environ.get("RAY_ADDRESS") or (ray and ray.is_initialized())):
        check_port(experiment.serve.host, experiment.serve.port)  # on another cluster, Serve may be the one that listens


def plan(
    experiment: Experiment,
    *,
    gpus: int = 0,
    memory_gb: float | None = None,
    per_node: int = 8,
    network_gb: float | None = None,
    bandwidth_gb: float | None = None,
    tflops: float | None = None,
    config: str | None = None,
    tokens: int | None = None,
) -> Estimate:
    """Plan the memory and time of training and serving, from the base's config and the rows: memory, soft prompts that fit side
    by side, bytes and minimum time of a step. Print the result to read it.

    Args:
        gpus: one per worker; 0: `compute.workers` CPU workers of this machine.
        memory_gb: GB per GPU (80), or per CPU worker (its part of this machine).
        per_node: GPUs per node.
        network_gb: GB/s of a node's whole network (50 per GPU).
        bandwidth_gb: GB/s that a worker receives (with GPUs 300, or `network_gb` if that is less; 1 on CPU).
        tflops: tera-operations/s of a worker (400 with GPUs, else 0.1).
        config: config.json of the base, instead of model.path.
        tokens: tokens per row; default: data.max_tokens, else counted.

    Raises:
        UserError: no such base, rows that cannot be counted, or a batch that is too small for the number of workers.
    """
    from ptuning.planning.planner import make_plan

    return make_plan(
        experiment,
        gpus=gpus,
        memory_gb=memory_gb,
        per_node=per_node,
        network_gb=network_gb,
        bandwidth_gb=bandwidth_gb,
        tflops=tflops,
        config=config,
        tokens=tokens,
    )


def _is_reference(source: str) -> bool:
    """Whether a soft prompt is named as in the registry, not by a folder or the id of an adapter."""
    return not ("/" in source or Path(source).expanduser().is_dir())


def _check_register(name: str | None) -> None:
    from ptuning.registry.registry import check_name

    try:
        if name is not None:
            check_name(name)
    except UserError as error:
        raise UserError(f"register: {error}") from None


def _ignore(line: str) -> None:
    pass


def _tell(line: str) -> None:
    import sys

    from ptuning.redaction import redact

    print(redact(line), file=sys.stderr)
