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
from typing import TYPE_CHECKING, Any, Literal, overload

from ptuning import environment
from ptuning.config import Experiment
from ptuning.errors import RunFailed, UserError
from ptuning.imports import quick_imports
from ptuning.settings.data import Template
from ptuning.settings.fields import MARGIN

if TYPE_CHECKING:
    from ptuning.inference.predictor import Predictor
    from ptuning.model.soft_prompt import SoftPrompt
    from ptuning.planning.estimate import Estimate
    from ptuning.registry.gate import Promotion
    from ptuning.registry.inspection import Inspection
    from ptuning.registry.merged_export import Merged
    from ptuning.registry.registry import Reference, Version
    from ptuning.searching.result import SearchResult
    from ptuning.serving.compare import Opinion
    from ptuning.serving.server import Server
    from ptuning.training.result import TrainResult

__all__ = [
    "Experiment",
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
    "search",
    "serve",
    "train",
]

_LAZY = {
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
    from pathlib import Path

    from ptuning.model import soft_prompt

    if "/" in source or "://" in source or Path(source).expanduser().is_dir():
        from ptuning.registry.peft_import import locate

        return soft_prompt.load(locate(source))
    return Registry(storage, tracking).load(source)


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


class Registry:
    """The registered soft prompts of a storage folder, or of an MLflow server.

    A name refers to its champion, or to its newest version if it has none; "name:3" is a version, "name@champion" the version
    of an alias.

    Args:
        storage: the storage folder whose tracking store to use; default: the store that MLFLOW_TRACKING_URI names, else the
            folder "runs".
        tracking: MLflow server or database to use instead.
    """

    def __init__(self, storage: str | None = None, tracking: str | None = None) -> None:
        from ptuning.registry import registry
        from ptuning.tracking.client import default_uri, named_uri

        named = named_uri(tracking, "--tracking") if tracking or storage is None else None
        self._registry = registry.Registry(named or default_uri(storage or "runs"))

    def __repr__(self) -> str:
        from ptuning.redaction import redact

        return f"Registry({redact(self._registry.uri)!r})"

    def list(self, name: str | None = None) -> Sequence[Version]:
        """All versions, or those of one name: by name, the newest first."""
        return self._registry.versions(name)

    def get(self, reference: str) -> Version:
        """The version that a reference points to.

        Raises:
            UserError: there is none.
        """
        return self._registry.find(reference)

    def load(self, reference: str) -> SoftPrompt:
        """The soft prompt, after a check of every hash.

        Raises:
            UserError: the soft prompt does not exist or is damaged.
        """
        from ptuning.registry.publish import retrieve

        return retrieve(self._registry, self.get(reference))[0]

    def promote(
        self, name: str, version: int | None = None, *, margin: float = MARGIN, force: bool = False, base: str | None = None
    ) -> Promotion:
        """Make a version champion if it passes the checks. The champion is served under the name.

        Args:
            version: its number, if `name` does not contain it.
            margin: how much worse than the current champion it may be.
            force: promote it even if it does not pass; a tag records this.
            base: the location of its base, if it differs from the card.

        Raises:
            UserError: it does not pass or does not exist, or the champion was changed by another process.
        """
        from ptuning.registry import gate

        return gate.promote(self._registry, single_version(name, version), base=base, margin=margin, force=force)

    def rollback(self, name: str) -> int:
        """Make the previous champion champion again; returns its version.

        Raises:
            UserError: there is none, or the champion was changed by another process.
        """
        from ptuning.registry.promotions import PromotionLog

        champion = PromotionLog(self._registry, name).rollback().champion
        assert champion is not None
        return champion

    def delete(self, reference: str) -> Version:
        """Delete a version ("name:3") that is not champion. Its run stays in MLflow.

        Raises:
            UserError: it does not exist, or is the champion.
        """
        from ptuning.registry import promotions

        return promotions.delete(self._registry, single_version(reference))

    def add(self, source: str, name: str, *, base: str | None = None, template: Template | None = None) -> Version:
        """Publish a soft prompt of another tool, such as PEFT.

        Args:
            source: the folder of a PEFT prompt-tuning adapter, or its Hugging Face id.
            base: the base it was made for; default: the base that the adapter names.
            template: how a row becomes text; default: the template of the adapter's card, if it has one.

        Raises:
            UserError: no such adapter, or not one for this base.
        """
        from ptuning.registry.peft_import import import_adapter
        from ptuning.tracking.client import database, default_artifact_root

        local = database(self._registry.uri)  # a server decides where artifacts are stored
        root = default_artifact_root(local.parent) if local else None
        return import_adapter(self._registry, source, name, base, template, root)

    def export(self, reference: str, folder: str) -> Version:
        """Write a soft prompt to a new folder that PEFT loads, with the public part of its card.

        Raises:
            UserError: it is damaged, or the folder is not empty.
        """
        from ptuning.registry.publish import fetch

        version = self.get(reference)
        fetch(self._registry, version, folder)
        return version

    def export_merged(self, reference: str, folder: str, *, base: str | None = None) -> tuple[Version, Merged]:
        """Write base and soft prompt as one plain checkpoint to a new folder.

        Raises:
            UserError: it is damaged or for another base, or the architecture cannot be merged.
        """
        from ptuning.registry import merged_export

        version = self.get(reference)
        return version, merged_export.export_merged(self._registry, version, folder, base)

    def inspect(self, reference: str, *, base: str | None = None) -> Inspection:
        """Card, lineage, promotions, and the words nearest to every virtual token. Print it to read it.

        Raises:
            UserError: it does not exist or is damaged.
        """
        from ptuning.registry.inspection import inspect_version

        return inspect_version(self._registry, reference, base)

    def similar(self, reference: str) -> Sequence[tuple[Version, float]]:
        """Other soft prompts of the same base with their cosine, the most similar first: candidates for prompt.init_from.

        Raises:
            UserError: it does not exist, or its base is unknown.
        """
        from ptuning.registry import inspection
        from ptuning.registry.registry import parse_reference

        return inspection.similar(self._registry, parse_reference(reference))

    def compare(self, name: str, text: str, *, base: str | None = None) -> Sequence[Opinion]:
        """The answers of the base, of the initial text and of every version to the same input."""
        from ptuning.serving.compare import compare

        return compare(self._registry, name, text, base)


def single_version(name: str, number: int | None = None) -> Reference:
    """The reference to one version: a name and its number, or "name:3" or "name@alias".

    Raises:
        UserError: it is not a single version.
    """
    from ptuning.registry.registry import Reference, check_name, parse_reference

    if number is not None:
        return Reference(check_name(name), number)
    reference = parse_reference(name)
    if reference.version is None and reference.alias is None:
        raise UserError(f"{name}: which version? write {name}:N; see ptuning prompts list")
    return reference


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
