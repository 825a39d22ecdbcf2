"""What `import ptuning` offers. The command line calls the same functions.

    experiment = ptuning.Experiment.load("jobs/sentiment.toml", "train.steps=100")
    result = ptuning.train(experiment, register="sentiment")
    with ptuning.Predictor(result.soft_prompt) as predictor:
        predictor.predict(["This movie was terrible."])

Importing this module imports neither torch nor ray nor MLflow: each function imports what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal, overload

from ptuning import environment
from ptuning.config import MARGIN, Experiment, Template
from ptuning.errors import RunFailed, UserError
from ptuning.imports import quick_imports

if TYPE_CHECKING:
    from ptuning.inference.predictor import Predictor
    from ptuning.model.soft_prompt import SoftPrompt
    from ptuning.planning.estimate import Estimate
    from ptuning.registry.gate import Promotion
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
"""Classes whose modules import torch or ray: they are imported when they are first asked for."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ptuning.api' has no attribute {name!r}")


def prepare(command: Literal["train", "search", "serve"], experiment: Experiment) -> None:
    """Import what a command needs, some seconds before it is called: the first call does it otherwise."""
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

    Without `compute.address` and `RAY_ADDRESS` a cluster of this machine is started and ended again.

    Args:
        register: publish the result as the newest version of this name.
        resume: go on with the run of this name from its newest checkpoint.
        progress: show on stderr how it goes: a bar on a terminal, lines elsewhere.

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
        resume: go on with the search of this name.
        progress: show on stderr how it goes: a live table on a terminal, lines elsewhere.

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


def load(source: str, *, storage: str = "runs", tracking: str | None = None) -> SoftPrompt:
    """A soft prompt: `.vectors` [P, H] in fp32 and `.card`.

    Args:
        source: a folder, a registered name ("sentiment", "sentiment:2", "sentiment@champion"), or the Hugging Face id of a PEFT
            prompt-tuning adapter.
        storage: the storage folder whose registry knows the name.
        tracking: MLflow server or database to use instead.

    Raises:
        UserError: nothing is there, or it is damaged.
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
        insecure: listen where others can reach it without API keys.
        say: takes lines for people; default: print them to stderr if `block`.

    Raises:
        UserError: the keys or the base are wrong, the address is open without keys, or the cluster lacks resources.
    """
    from ptuning.serving.auth import check_address, check_token, read_keys

    check_address(experiment.serve.host, read_keys(experiment.serve.keys), insecure)  # before seconds of imports
    check_token(insecure)
    prepare("serve", experiment)
    from ptuning.serving.server import Server, run_server

    if not block:
        return Server(experiment, insecure=insecure, say=say or _ignore)
    run_server(experiment, insecure=insecure, say=say or _tell)
    return None


def plan(
    experiment: Experiment,
    *,
    gpus: int = 0,
    memory_gb: float | None = None,
    per_node: int = 8,
    bandwidth_gb: float | None = None,
    tflops: float | None = None,
    config: str | None = None,
    tokens: int | None = None,
) -> Estimate:
    """What training and serving would take, from the base's config and the rows alone: memory, soft prompts that fit side by
    side, bytes and least time of a step. Print it to read it.

    Args:
        gpus: one for each worker; 0: `compute.workers` CPU workers of this machine.
        memory_gb: of a GPU (80), or of a CPU worker (its share of this machine).
        per_node: GPUs of a node.
        bandwidth_gb: GB/s that a worker receives (300 in a node, 50 across, CPU 1).
        tflops: tera-operations/s that a worker reaches (400 with GPUs, else 0.1).
        config: config.json of the base, instead of model.path.
        tokens: tokens of a row; default: data.max_tokens or the rows.

    Raises:
        UserError: no such base, rows that cannot be counted, or a batch that is too small for so many workers.
    """
    from ptuning.planning.planner import make_plan

    return make_plan(
        experiment,
        gpus=gpus,
        memory_gb=memory_gb,
        per_node=per_node,
        bandwidth_gb=bandwidth_gb,
        tflops=tflops,
        config=config,
        tokens=tokens,
    )


class Registry:
    """The registered soft prompts of a storage folder, or of an MLflow server.

    A name answers with its champion, or with its newest version while it has none; "name:3" is a version, "name@champion" what
    an alias points to.

    Args:
        storage: the storage folder whose tracking store to use.
        tracking: MLflow server or database to use instead.
    """

    def __init__(self, storage: str = "runs", tracking: str | None = None) -> None:
        from ptuning.registry import registry
        from ptuning.tracking.client import default_uri

        self._registry = registry.Registry(tracking or default_uri(storage))

    def __repr__(self) -> str:
        from ptuning.redaction import redact

        return f"Registry({redact(self._registry.uri)!r})"

    def list(self, name: str | None = None) -> Sequence[Version]:
        """All versions, or those of one name: by name, the newest first."""
        return self._registry.versions(name)

    def get(self, reference: str) -> Version:
        """What a reference points to.

        Raises:
            UserError: nothing.
        """
        return self._registry.find(reference)

    def load(self, reference: str) -> SoftPrompt:
        """The soft prompt, every hash checked.

        Raises:
            UserError: nothing is there, or it is damaged.
        """
        from ptuning.registry.publish import retrieve

        return retrieve(self._registry, self.get(reference))[0]

    def promote(
        self, name: str, version: int | None = None, *, margin: float = MARGIN, force: bool = False, base: str | None = None
    ) -> Promotion:
        """Make a version champion, if it passes the gate. The champion is what is served under the name.

        Args:
            version: its number, if `name` does not say it.
            margin: how much worse than the present champion it may be.
            force: promote it though it does not pass; a tag says so.
            base: where its base lies, if not where its card says.

        Raises:
            UserError: it does not pass, is not there, or somebody moved the champion meanwhile.
        """
        from ptuning.registry import gate

        return gate.promote(self._registry, single_version(name, version), base=base, margin=margin, force=force)

    def rollback(self, name: str) -> int:
        """Make the previous champion champion again; returns its version.

        Raises:
            UserError: there is none, or somebody moved the champion meanwhile.
        """
        from ptuning.registry.promotions import PromotionLog

        champion = PromotionLog(self._registry, name).rollback().champion
        assert champion is not None
        return champion

    def delete(self, reference: str) -> Version:
        """Delete a version ("name:3") that is not champion. Its run stays in MLflow.

        Raises:
            UserError: it is not there, or is the champion.
        """
        from ptuning.registry import promotions

        return promotions.delete(self._registry, single_version(reference))

    def add(self, source: str, name: str, *, base: str | None = None, template: Template | None = None) -> Version:
        """Publish a soft prompt that was made elsewhere, as with PEFT.

        Args:
            source: the folder of a PEFT prompt-tuning adapter, or its Hugging Face id.
            base: the base it was made for; default: what the adapter says.
            template: how a row becomes text; a soft prompt of ours brings its own.

        Raises:
            UserError: no such adapter, or not one for this base.
        """
        from ptuning.registry.peft_import import import_adapter
        from ptuning.tracking.client import database, default_artifact_root

        local = database(self._registry.uri)  # a server decides itself where artifacts lie
        root = default_artifact_root(local.parent) if local else None
        return import_adapter(self._registry, source, name, base, template, root)

    def export(self, reference: str, folder: str) -> Version:
        """Write a soft prompt to a new folder that PEFT loads, with the public part of its card.

        Raises:
            UserError: it is damaged, or the folder is in use.
        """
        from ptuning.registry.publish import fetch

        version = self.get(reference)
        fetch(self._registry, version, folder)
        return version

    def export_merged(self, reference: str, folder: str, *, base: str | None = None) -> tuple[Version, Merged]:
        """Write base and soft prompt as one plain checkpoint to a new folder.

        Raises:
            UserError: it is damaged, not for this base, or this architecture cannot be merged.
        """
        from ptuning.registry import merged_export

        version = self.get(reference)
        return version, merged_export.export_merged(self._registry, version, folder, base)

    def inspect(self, reference: str, *, base: str | None = None) -> dict[str, Any]:
        """Card, lineage, promotions, and the words nearest to every virtual token, as plain data.

        Raises:
            UserError: it is not there, or damaged.
        """
        from ptuning.registry.inspection import inspect_version

        return inspect_version(self._registry, reference, base)

    def similar(self, reference: str) -> Sequence[tuple[Version, float]]:
        """Other soft prompts of the same base with their cosine, the most similar first: candidates for prompt.init_from.

        Raises:
            UserError: it is not there, or its base is unknown.
        """
        from ptuning.registry import inspection
        from ptuning.registry.registry import parse_reference

        return inspection.similar(self._registry, parse_reference(reference))

    def compare(self, name: str, text: str, *, base: str | None = None) -> Sequence[Opinion]:
        """Ask the base, the hand-written text and every version the same thing."""
        from ptuning.serving.compare import compare

        return compare(self._registry, name, text, base)


def single_version(name: str, number: int | None = None) -> Reference:
    """The reference to one version: a name and its number, or "name:3" or "name@alias".

    Raises:
        UserError: it names no single version.
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
