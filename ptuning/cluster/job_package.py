"""The upload of a job: only the files that its experiment names, and environment variables that are not secret.

The working folder is not uploaded. Only the files named in the experiment are needed, and the folder may be large (runs, data,
environments) or private (`.env`). Everyone with access to the cluster's jobs can read the upload, so it contains neither keys
nor passwords: they belong in the environment of the cluster's nodes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ptuning.config import Experiment, read_experiment
from ptuning.errors import UserError
from ptuning.paths import FOLDER, SCHEME, is_path
from ptuning.redaction import redact
from ptuning.row_files import COMPRESSIONS, local_files
from ptuning.settings.fields import HUB_ID
from ptuning.tracking.client import default_uri

Kind = Literal["train", "search", "serve", "doctor"]

LIMIT = 100_000_000
"""Maximum bytes of an upload. Ray keeps it in the head's memory and on every node's disk."""

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


@dataclass
class JobPackage:
    """The upload of one job."""

    experiment: Path | None
    """The unchanged experiment file; None for `doctor` without one."""
    overrides: list[str]
    """`key=value` for the job: the user's overrides, then those that replace paths of this machine."""
    env: dict[str, str]
    files: dict[str, list[tuple[str, Path]]] = field(default_factory=dict)
    """Name in the folder of uploaded files -> path below it ("" for a file) and its path on this machine."""
    notes: list[str] = field(default_factory=list)
    """Notes about what the cluster must provide for this job."""

    @property
    def experiment_name(self) -> str:
        """Name of the experiment file in the job's working directory. All processes of a job import from that directory, so a
        file with the name of a module would hide the module."""
        assert self.experiment is not None
        return self.experiment.name if self.experiment.suffix == ".toml" else f"{self.experiment.name}.toml"

    @property
    def contents(self) -> dict[str, int]:
        """Path in the job's working directory -> bytes."""
        listed = {self.experiment_name: self.experiment.stat().st_size} if self.experiment else {}
        return listed | {target: source.stat().st_size for target, source in self._shipped()}

    def pack(self, folder: Path) -> None:
        """Copy all files to the folder that is uploaded."""
        if self.experiment:
            shutil.copyfile(self.experiment, folder / self.experiment_name)
        for target, source in self._shipped():
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / target)

    def _shipped(self) -> Iterable[tuple[str, Path]]:
        for name, parts in self.files.items():
            for part, source in parts:
                yield "/".join(filter(None, (FOLDER, name, part))), source


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
    experiment = read_experiment(file, overrides)
    _check_passwords(experiment)
    packer = _Packer(shipment, folders)
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
    "data": {"input", "target", "labels", "label_values", "chat_template", "system"},
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


class _Packer:
    """Decides for each path whether it is shared, uploaded, or a path of the cluster."""

    def __init__(self, shipment: JobPackage, shared: Sequence[Path]) -> None:
        self._shipment = shipment
        self._shared = shared
        self._bytes = 0

    def data(self, key: str, sources: str | Sequence[str]) -> None:
        """The files, folders and patterns of a split."""
        found = [self._data(key, source) for source in ([sources] if isinstance(sources, str) else sources)]
        replaced = [new or old for new, old in found]
        if any(new for new, _ in found):
            self.override(key, replaced[0] if isinstance(sources, str) else json.dumps(replaced, ensure_ascii=False))

    def _data(self, key: str, source: str) -> tuple[str | None, str]:
        """The source in the job, or None if it is the same there; and the source."""
        path = Path(source).expanduser()
        if not is_path(source):
            return None, source
        if not path.exists() and not glob.glob(str(path), recursive=True):
            self._theirs(key, source)
            return None, source
        fixed = path if path.exists() else next(parent for parent in path.parents if parent.exists())
        shared = self._shared_path(fixed)
        if shared is not None:
            return str(shared / path.relative_to(fixed)), source
        if path.is_file():
            suffix = "".join(path.suffixes[-2:]) if path.suffix in COMPRESSIONS else path.suffix
            return self._ship(key, path, [("", path)], suffix), source
        # The files of a folder or of a pattern become those of one folder, in the same order.
        parts = [(f"{number:05}-{file.name}", file) for number, file in enumerate(local_files(source))]
        return self._ship(key, fixed, parts), source

    def folder(self, key: str, source: str, patterns: Sequence[str]) -> None:
        path = Path(source).expanduser()
        if not path.is_dir():
            self._theirs(key, source)
        elif not self._is_shared(key, path):
            names = {found.name for pattern in patterns for found in path.glob(pattern) if found.is_file()}
            parts = [(name, path / name) for name in sorted(names) if not name.startswith(".")]
            if not parts:
                raise UserError(f"{key}: {source} contains none of {', '.join(patterns)}; correct the path")
            self.override(key, self._ship(key, path, parts))

    def storage(self, storage: str) -> None:
        """Results must be in a place that every node, and every later command, can read."""
        if "://" in storage or self._is_shared("compute.storage", Path(storage).expanduser()):
            return
        if not Path(storage).is_absolute():
            raise UserError(
                f"compute.storage: {storage} is a folder of this machine; give one that every node of the cluster can access, "
                "such as compute.storage=/mnt/shared/runs or s3://bucket/runs, or add --shared FOLDER if the nodes mount "
                "FOLDER, too"
            )
        self._theirs("compute.storage", storage)

    def override(self, key: str, value: str) -> None:
        self._shipment.overrides.append(f"{key}={value}")

    def _is_shared(self, key: str, path: Path) -> bool:
        whole = self._shared_path(path)
        if whole is None:
            return False
        self.override(key, str(whole))
        return True

    def _shared_path(self, path: Path) -> Path | None:
        """The path that this machine and the nodes see, or None."""
        whole = path.resolve()
        return whole if any(whole.is_relative_to(folder) for folder in self._shared) else None

    def _theirs(self, key: str, source: str) -> None:
        if not Path(source).is_absolute():
            raise UserError(f"{key}: {source} is not in {Path.cwd()}; correct the path, or give an absolute one of the cluster")
        self._shipment.notes.append(f"{key}: every node must have {source}")

    def _ship(self, key: str, path: Path, parts: list[tuple[str, Path]], suffix: str = "") -> str:
        """Add files to the upload; returns their name there."""
        size = sum(part.stat().st_size for _, part in parts)
        self._bytes += size
        if self._bytes > LIMIT:
            among = "" if self._bytes == size else f", with the other files {self._bytes / 1e6:.0f} MB,"
            raise UserError(
                f"{key}: {path} ({size / 1e6:.0f} MB){among} is too large to upload with a job (at most {LIMIT / 1e6:.0f} MB); "
                f"put it on shared storage and give that path, or add --shared {path.absolute().parent} if the nodes mount it"
            )
        digest = hashlib.sha256()
        for name, part in parts:
            with part.open("rb") as content:
                digest.update(f"{name}\0{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", path.absolute().name.removesuffix(suffix) if suffix else path.absolute().name)
        name = f"{stem}-{digest.hexdigest()[:12]}{suffix}"
        self._shipment.files[name] = parts
        return SCHEME + name


def _inputs(experiment: Experiment, kind: Kind, packer: _Packer) -> None:
    """The inputs of a job. A serving job takes its soft prompts from the registry."""
    if kind != "serve":
        for split, source in experiment.data.sources():
            packer.data(f"data.{split}", source)
        chat_template = experiment.data.chat_template_file
        if chat_template and is_path(chat_template):
            packer.data("data.chat_template", chat_template)
        init_from = experiment.prompt.init_from
        if init_from and "://" not in init_from and ("/" in init_from or Path(init_from).expanduser().is_dir()):
            packer.folder("prompt.init_from", init_from, SOFT_PROMPT)
    path = experiment.model.path
    if path != "builtin" and not _is_hub_id(path):
        packer.folder("model.path", path, BASE + (("*.py",) if experiment.model.trust_remote_code else ()))


def _is_hub_id(path: str) -> bool:
    return path != "builtin" and HUB_ID.fullmatch(path) is not None and not Path(path).is_dir()


def _tracking(experiment: Experiment, shipment: JobPackage, packer: _Packer, here: Mapping[str, str]) -> None:
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


def _serving(experiment: Experiment, shipment: JobPackage, packer: _Packer) -> None:
    keys = experiment.serve.keys
    if keys and not packer._is_shared("serve.keys", Path(keys).expanduser()):
        if Path(keys).expanduser().exists() or not Path(keys).is_absolute():
            raise UserError(
                f"serve.keys: {keys} is not uploaded, since others could read it; give a file that every node has, or set "
                "PTUNING_API_KEYS in the environment of the cluster's nodes"
            )
        packer._theirs("serve.keys", keys)


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
