"""The upload of a job: only the files that its experiment names, and environment variables that are not secret.

The working folder is not uploaded. Only the files named in the experiment are needed, and the folder may be large (runs, data,
environments) or private (`.env`). Everyone with access to the cluster's jobs can read the upload, so it contains neither keys
nor passwords: they belong in the environment of the cluster's nodes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from ptuning.cluster.job_files import JobPackage, Packer
from ptuning.config import Experiment, read_settings, with_texts
from ptuning.errors import UserError
from ptuning.paths import is_path
from ptuning.redaction import redact
from ptuning.settings.fields import HUB_ID
from ptuning.tracking.client import default_uri

Kind = Literal["train", "search", "serve", "doctor"]

BASE = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
SOFT_PROMPT = ("*.json", "*.safetensors")

PLAIN = (
    *("AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "MLFLOW_S3_ENDPOINT_URL"),
    *("HF_DATASETS_OFFLINE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
    *("DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY", "MLFLOW_DISABLE_TELEMETRY"),
    *("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"),
)
"""Variables that are uploaded if they are set."""
PLACES = ("HF_DATASETS_CACHE", "HF_HOME", "HF_HUB_CACHE")
"""Folders: uploaded only as paths, if they are inside a shared folder."""
ALWAYS = {
    "PYTHONSAFEPATH": "1",  # the job's `python -m ptuning` imports nothing from its working directory
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Training stops cleanly on SIGINT; then the last records and the end of the MLflow run must be uploaded.
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
    "TOKENIZERS_PARALLELISM": "false",
}
SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|(^|_)(API)?KEYS?($|_)", re.IGNORECASE)


def build_package(
    kind: Kind,
    file: str | None,
    overrides: Sequence[str],
    *,
    shared: Sequence[str],
    env: Sequence[str],
    here: Mapping[str, str],
) -> JobPackage:
    """Collect what a job needs from this machine.

    Args:
        shared: folders that this machine and all nodes of the cluster see under the same path.
        env: more variables for the job, as NAME (its value here) or NAME=VALUE.
        here: the environment of this process.

    Raises:
        UserError: the experiment is wrong, or names something that cannot be uploaded: too large, secret, or missing.
    """
    folders = [Path(folder).expanduser().resolve() for folder in shared]
    shipment = JobPackage(Path(file) if file else None, list(overrides), _environment(folders, env, here))
    if file is None:
        return shipment
    experiment = read_settings(file, overrides)
    with_texts(experiment)  # an error belongs to this machine
    _check_passwords(experiment)
    packer = Packer(shipment, folders)
    _inputs(experiment, kind, packer)
    packer.storage(experiment.compute.storage)
    _tracking(experiment, shipment, packer, here)
    if kind == "serve":
        _serving(experiment, shipment, packer)
    if experiment.compute.address:
        packer.override("compute.address", "auto")  # a job belongs to the cluster that runs it
    missing = _secrets(experiment, kind, here)
    if missing:
        shipment.notes.append(
            f"secrets are not uploaded; set them in the environment of the cluster's nodes: {', '.join(missing)}"
        )
    return shipment


def _check_passwords(experiment: Experiment) -> None:
    """Pack the unchanged experiment file."""
    for table, settings in experiment.model_dump(mode="json", exclude=_TEXTS).items():
        for key, value in settings.items() if isinstance(settings, dict) else ():
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, str) and _has_password(each):
                    raise UserError(_open(f"{table}.{key}", each))


_TEXTS: dict[str, set[str]] = {
    "data": {"input", "target", "labels", "label_values", "chat_template", "system", "teacher"},
    "prompt": {"init_text"},
}


def _open(key: str, value: str) -> str:
    """The error for an address with a password."""
    fix = {
        "tracking.uri": "give an MLflow server's address, and its password as MLFLOW_TRACKING_PASSWORD",
        "compute.storage": "give s3://bucket/folder, and its keys as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    }.get(key, "give the address without it, and the password as a variable of the service")
    return (
        f"{key}: {redact(value)} contains a password, which everyone who sees the job could read; {fix} in the environment "
        "of the cluster's nodes"
    )


def _has_password(text: str) -> bool:
    return redact(text) != text


_ELSEWHERE = "set it in the environment of the cluster's nodes"


def _inputs(experiment: Experiment, kind: Kind, packer: Packer) -> None:
    """The inputs of a job. A serving job takes its soft prompts from the registry."""
    if kind != "serve":
        for split, source in experiment.data.sources():
            packer.data(f"data.{split}", source)
        for key, text in (("chat_template", experiment.data.chat_template_file), ("teacher", experiment.data.teacher_file)):
            if text and is_path(text):
                packer.data(f"data.{key}", text)
        init_from = experiment.prompt.init_from
        if init_from and "://" not in init_from and ("/" in init_from or Path(init_from).expanduser().is_dir()):
            packer.folder("prompt.init_from", init_from, SOFT_PROMPT)
    path = experiment.model.path
    if path != "builtin" and not _is_hub_id(path):
        packer.folder("model.path", path, BASE + (("*.py",) if experiment.model.trust_remote_code else ()))


def _is_hub_id(path: str) -> bool:
    return path != "builtin" and HUB_ID.fullmatch(path) is not None and not Path(path).is_dir()


def _tracking(experiment: Experiment, shipment: JobPackage, packer: Packer, here: Mapping[str, str]) -> None:
    uri, variable = experiment.tracking.uri, here.get("MLFLOW_TRACKING_URI", "")
    if uri is None and variable.startswith(("http://", "https://")):
        uri = variable
        packer.override("tracking.uri", uri)
    if experiment.tracking.experiment is None and here.get("MLFLOW_EXPERIMENT_NAME", "").strip():
        packer.override("tracking.experiment", here["MLFLOW_EXPERIMENT_NAME"].strip())
    if uri is None:
        default_uri(experiment.compute.storage)  # refuses an object store
        return
    if _has_password(uri):
        raise UserError(_open("tracking.uri", uri))
    local = uri.removeprefix("sqlite:///").removeprefix("file://") if uri.startswith(("sqlite:", "file:")) else uri
    if "://" not in local and not Path(local).is_absolute():
        raise UserError(f"tracking.uri: {uri} is on this machine only; give the address of an MLflow server, http://host:port")
    if re.search(r"//(localhost|127\.)", uri):
        shipment.notes.append(f"tracking.uri: {uri} is, on every node, an address of that node")


def _serving(experiment: Experiment, shipment: JobPackage, packer: Packer) -> None:
    keys = experiment.serve.keys
    if keys and not packer.is_shared("serve.keys", Path(keys).expanduser()):
        if Path(keys).expanduser().exists() or not Path(keys).is_absolute():
            raise UserError(
                f"serve.keys: {keys} is not uploaded, since others could read it; give a file that every node has, or set "
                "PTUNING_API_KEYS in the environment of the cluster's nodes"
            )
        packer.of_the_cluster("serve.keys", keys)


def _environment(shared: Sequence[Path], wanted: Sequence[str], here: Mapping[str, str]) -> dict[str, str]:
    """The variables of the job, on all nodes."""
    env = {name: here[name] for name in PLAIN if here.get(name)}
    for name in PLACES:
        if here.get(name) and any(Path(here[name]).expanduser().resolve().is_relative_to(folder) for folder in shared):
            env[name] = here[name]
    for each in wanted:
        name, given, value = each.partition("=")
        if not given and name not in here:
            raise UserError(f"--env: {name} is not set here; set it, or write --env {name}=VALUE")
        env[name] = value if given else here[name]
        if SECRET.search(name):
            raise UserError(f"--env: {name} looks like a secret, and a job's variables can be read by others; {_ELSEWHERE}")
    for name, value in env.items():
        if _has_password(value):
            raise UserError(
                f"{name}: {redact(value)} contains a password, and a job's variables can be read by others; {_ELSEWHERE}"
            )
    return ALWAYS | env


def _secrets(experiment: Experiment, kind: Kind, here: Mapping[str, str]) -> list[str]:
    """Secrets that are set here and that this experiment probably needs."""
    listed = [source for _, source in experiment.data.sources()] if kind != "serve" else []
    data = [each for source in listed for each in ([source] if isinstance(source, str) else source)]
    hub = any(source.startswith("hub:") for source in data) or _is_hub_id(experiment.model.path)
    s3 = any("s3:" in place for place in (experiment.compute.storage, *data))
    used = {
        ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"): hub,
        ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"): s3,
        ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"): True,
        ("PTUNING_API_KEYS",): kind == "serve" and not experiment.serve.keys,
    }
    return [name for names, needed in used.items() if needed for name in names if here.get(name)]
