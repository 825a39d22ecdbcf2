"""What lies in cluster/ and the Dockerfile fits the code and itself: read and cross-checked, nothing is started."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml
from conftest import REPOSITORY

from ptuning.cli import app, intervene
from ptuning.config import read_experiment
from ptuning.searching import interventions
from ptuning.serving.auth import VARIABLE
from ptuning.settings.running import ServeConfig

pytestmark = [
    pytest.mark.fast,
    # mlflow.cli and ray.serve are imported for the options and the schema they declare.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:mlflow.*", "ignore:.*type hint:UserWarning"),
]

CLUSTER = REPOSITORY / "cluster"
KUBERAY = CLUSTER / "kuberay"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(
    line.split("==") for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
)
IMAGE = f"ptuning:{PROJECT['version']}"
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
SLURM = (CLUSTER / "slurm.sbatch").read_text(encoding="utf-8")
SECRETS = (CLUSTER / "secrets.sh").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((CLUSTER / "compose.yaml").read_text(encoding="utf-8"))
LAUNCHERS = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(CLUSTER.glob("ray*.yaml"))}
KUSTOMIZATIONS = sorted(path.parent for path in KUBERAY.rglob("kustomization.yaml"))
ON_CPUS = {"autoscaling", "kueue", "volcano"}
OVERLAYS = [folder for folder in KUSTOMIZATIONS if folder.parent.name == "overlays"]
TEXTS = {
    path: path.read_text(encoding="utf-8")
    for path in [*CLUSTER.rglob("*"), REPOSITORY / "Dockerfile", REPOSITORY / "jobs" / "serve.yaml"]
    if path.is_file() and path.name not in (".env", "up-local.sh")
}


def documents(path: Path) -> list[Any]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


MANIFESTS: list[dict[str, Any]] = [
    document
    for path in sorted(KUBERAY.rglob("*.yaml"))
    if path.name != "kustomization.yaml"
    for document in documents(path)
    if isinstance(document, dict)
]
"""Kubernetes objects as they are written, patches of RayServices among them."""


def walk(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value below a node, with the keys that lead to it."""
    yield path, node
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from walk(value, (*path, key))


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [manifest for manifest in MANIFESTS if manifest["kind"] == kind]


def jobs() -> list[dict[str, Any]]:
    """What RayJobs and RayCronJobs run."""
    return [job["spec"] for job in of_kind("RayJob")] + [job["spec"]["jobTemplate"] for job in of_kind("RayCronJob")]


def pods() -> list[dict[str, Any]]:
    """Pod templates, those of Ray's nodes included."""
    return [node for manifest in MANIFESTS for path, node in walk(manifest) if path[-2:] == ("template", "spec")]


def containers() -> list[dict[str, Any]]:
    return [container for pod in pods() for container in [*pod.get("initContainers", []), *pod["containers"]]]


def serve_configs() -> dict[str, dict[str, Any]]:
    """Serve's configurations: that of jobs/, and those of the RayServices."""
    found = {"jobs": yaml.safe_load((REPOSITORY / "jobs" / "serve.yaml").read_text(encoding="utf-8"))}
    for number, service in enumerate(of_kind("RayService")):
        found[f"RayService {number}"] = yaml.safe_load(service["spec"]["serveConfigV2"])
    return found


def shell(text: str) -> list[list[str]]:
    """The programs that a piece of shell starts, with their arguments; what the shell would fill in becomes 1."""
    text = text.replace("\\\n", " ").replace("\n", ";")
    text = re.sub(r"\d?[<>]+ *[^\s;)]+", "", text)  # where output goes
    text = re.sub(r'"?\$(\([^()]*\)|\{[^{}]*\}|[\w@]+)"?', "1", text)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("();<>|&"):
            commands.append([])
        else:
            commands[-1].append(word)
    return [_without_variables(words) for words in commands if words]


def _without_variables(words: list[str]) -> list[str]:
    words = [word for word in words if word not in ("setsid", "nohup")]
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    return words


def commands() -> dict[str, list[list[str]]]:
    """Everything that is started anywhere: file -> commands."""
    found: dict[str, list[list[str]]] = {"compose.yaml": [], "kuberay": []}
    for service in COMPOSE["services"].values():
        command = service.get("command", [])
        found["compose.yaml"].append(shlex.split(command) if isinstance(command, str) else command)
    for container in containers():
        found["kuberay"].append([*container.get("command", []), *container.get("args", [])])
    found["kuberay"] += [command for job in jobs() for command in shell(job["entrypoint"])]
    for name, launcher in LAUNCHERS.items():
        lines = [line for key in ("head", "worker") for line in launcher[f"{key}_start_ray_commands"]]
        found[name] = [command for line in lines for command in shell(line)]
    script = re.sub(r"<< 'PYTHON'.*?\nPYTHON\n", "\n", SLURM, flags=re.DOTALL)
    script = "\n".join(line for line in script.splitlines() if not line.lstrip().startswith("#"))
    # srun's options come before the command it starts on the nodes.
    starts = re.findall(r"(?:ray start|ray health-check|ptuning) [^\n]*?(?=&| 2>|\n)", script.replace("\\\n", " "))
    found["slurm.sbatch"] = [command for start in starts for command in shell(start)]
    return found


def check_command(words: list[str], folder: Path = REPOSITORY) -> None:
    """Parse a command line as its program would, in a folder, without running it."""
    import mlflow.cli
    from ray.scripts.scripts import cli as ray_cli

    programs: dict[str, Any] = {"ray": ray_cli, "mlflow": mlflow.cli.cli, "ptuning": typer.main.get_command(app.app)}
    program = programs.get(words[0])
    if words[0] == "python" and words[1] == "jobs/retune.py":
        read_experiment(folder / words[3], words[4:])
    if program is None:
        assert words[0] in ("python", "pg_isready", "server", "mkdir", "cd", "ulimit"), f"{words[0]} is not in the image"
        return
    command: Any = program
    name, *arguments = words
    while hasattr(command, "commands"):  # typer's groups are not click's
        name = arguments.pop(0)
        command = command.commands.get(name)
    assert command is not None, f"{words[0]} has no command {name}"
    with contextlib.redirect_stderr(io.StringIO()):
        context = command.make_context(name, arguments)
    experiment, overrides = context.params.get("experiment"), context.params.get("overrides") or []
    if words[0] == "ptuning" and name == "search" and overrides[:1] and overrides[0] in intervene.WORDS:
        interventions.parse(overrides[0], overrides[1:], warm=context.params["warm"])
    elif words[0] == "ptuning" and experiment:
        read_experiment(folder / experiment, overrides)


@pytest.mark.parametrize(("file", "words"), [(file, words) for file, found in commands().items() for words in found if words])
def test_every_command_is_one_that_its_program_understands(file, words):
    if file == "slurm.sbatch" and words[0] == "ptuning":
        assert words == ["ptuning", "1"] and 'ptuning "$@"' in SLURM  # what sbatch was given
        return
    check_command(words)


def test_commands_were_found():
    found = {file: {" ".join(words[:2]) for words in words_of} for file, words_of in commands().items()}
    assert {"ray start", "mlflow server"} <= found["compose.yaml"]
    assert {"mlflow server", "ptuning train", "ptuning search", "ptuning predict", "python jobs/retune.py"} <= found["kuberay"]
    assert all({"ray start", "ray stop", "mlflow server"} <= found[name] for name in LAUNCHERS)
    assert {"ray start", "ray health-check", "ptuning 1"} <= found["slurm.sbatch"]


def test_files_that_are_named_exist():
    for path, text in TEXTS.items():
        for name in re.findall(r"(?<![\w/])(?:jobs|cluster)/[\w./-]*\w", text):
            if name not in ("cluster/.env", "cluster/up-local.sh"):
                assert (REPOSITORY / name).exists(), f"{path}: {name}"


def test_one_image():
    ours = [COMPOSE["services"][name]["image"] for name in ("head", "worker", "mlflow", "bucket")]
    ours += [launcher["docker"]["image"] for launcher in LAUNCHERS.values()]
    ours += re.findall(r"ptuning:\d+\.[\w.-]*", "\n".join(TEXTS.values()))
    assert set(ours) == {IMAGE}
    images = yaml.safe_load((KUBERAY / "base" / "kustomization.yaml").read_text(encoding="utf-8"))["images"]
    assert images == [{"name": "ptuning", "newName": "ptuning", "newTag": PROJECT["version"]}]
    foreign = {image for _, image in _images() if image != "ptuning"}
    assert foreign == {service["image"] for service in COMPOSE["services"].values()} - {IMAGE}
    assert all(re.search(r":.*\d", image) for image in foreign), "a tag that stays what it is"


def _images() -> Iterator[tuple[str, str]]:
    yield from ((container["name"], container["image"]) for container in containers())


def test_one_version_of_ray():
    base = re.search(r"^ARG BASE=rayproject/ray:(.+)-py(\d)(\d+)-cpu$", DOCKERFILE, re.MULTILINE)
    assert base is not None and base[1] == PINS["ray"]
    assert f">={base[2]}.{base[3]}" == PROJECT["requires-python"]
    assert set(re.findall(r"rayproject/ray:([\d.]+)", "\n".join(TEXTS.values()))) == {PINS["ray"]}
    versions = [node for manifest in MANIFESTS for path, node in walk(manifest) if path and path[-1] == "rayVersion"]
    assert versions == [PINS["ray"]]


def test_ports_are_those_of_the_code():
    import mlflow.cli
    import ray._private.ray_constants as ray

    server = mlflow.cli.cli.get_command(click.Context(mlflow.cli.cli), "server")
    tracker = next(option.default for option in server.params if option.name == "port")
    ports = {"gcs": ray.DEFAULT_PORT, "dashboard": ray.DEFAULT_DASHBOARD_PORT, "api": ServeConfig().port, "tracker": tracker}
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert published == [f"127.0.0.1:{ports[name]}:{ports[name]}" for name in ("dashboard", "api", "tracker")]
    exposed = re.findall(r"^EXPOSE (.+)$", DOCKERFILE, re.MULTILINE)
    assert exposed == [f"{ports['gcs']} {ports['dashboard']} {ports['api']}"]
    assert f"127.0.0.1:{ray.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT}/api/local_raylet_healthz" in DOCKERFILE
    named = {port["name"]: port["containerPort"] for container in containers() for port in container.get("ports", [])}
    assert named == {"gcs-server": ports["gcs"], "dashboard": ports["dashboard"], "client": 10001, "serve": ports["api"],
                     "http": ports["tracker"], "postgres": 5432, "s3": 9000}  # fmt: skip
    for service in of_kind("Service"):
        assert all(named[port["targetPort"]] == port["port"] for port in service["spec"]["ports"])
    allowed = {
        port["port"]
        for policy in of_kind("NetworkPolicy")
        for rule in policy["spec"].get("ingress", [])
        for port in rule.get("ports", [])
    }
    assert allowed == {ports["dashboard"], ports["api"], ports["tracker"], 5432, 9000}


def test_every_url_names_a_service_and_its_port():
    services = {"kuberay": {(one["metadata"]["name"], one["spec"]["ports"][0]["port"]) for one in of_kind("Service")}}
    services["compose.yaml"] = {("head", 6379), ("mlflow", 5000), ("postgres", 5432), ("minio", 9000)}
    assert {name for name, _ in services["compose.yaml"]} <= set(COMPOSE["services"])
    for path, text in TEXTS.items():
        known = services["compose.yaml" if path.name == "compose.yaml" else "kuberay"]
        if KUBERAY not in path.parents and path.name != "compose.yaml":
            continue
        for host, port in re.findall(r"(?:http|postgresql)://(?:\w+@)?([a-z][\w-]*):(\d+)", text):
            assert (host, int(port)) in known, f"{path}: {host}:{port}"


def test_mlflow_answers_under_the_name_that_is_used_and_under_no_other():
    for words in [words for found in commands().values() for words in found if words[:2] == ["mlflow", "server"]]:
        line = " ".join(words)
        hosts = re.search(r"--allowed-hosts[ =](\S+)", line)
        assert hosts is not None and "*" not in hosts[1].split(","), line
        assert {"localhost:5000", "127.0.0.1:5000"} <= set(hosts[1].split(","))
        if "postgres" in line:
            assert "mlflow:5000" in hosts[1].split(",")


def created() -> set[tuple[str, str]]:
    """Secrets and their keys that secrets.sh makes."""
    lines = re.findall(r"^    secret ([\w-]+) (.+)$", SECRETS, re.MULTILINE)
    return {(name, key) for name, pairs in lines for key in re.findall(r"([\w-]+)=", pairs)}


def test_secrets_that_are_referenced_are_made_and_the_other_way_round():
    wanted, optional = set(), set()
    for manifest in MANIFESTS:
        for path, node in walk(manifest):
            if path and path[-1] == "secretKeyRef":
                (optional if node.get("optional") else wanted).add((node["name"], node["key"]))
            elif path and path[-1] == "authOptions":
                assert node["mode"] == "token"
                wanted.add((node["secretName"], "auth_token"))
    assert wanted == created()
    everything = "\n".join(TEXTS.values())
    assert all(f"create secret generic {name} --from-file={key}=" in everything for name, key in optional)
    assert not of_kind("Secret")


def test_secrets_are_made_once_for_their_owner_only_and_not_shown(tmp_path):
    made = tmp_path / "env"
    environment = os.environ | {"HOME": str(tmp_path), "PTUNING_ENV_FILE": str(made)}
    for name in ("RAY_AUTH_TOKEN_PATH", "PTUNING_API_KEYS_FILE"):
        environment.pop(name, None)
    for _ in range(2):
        before = made.read_bytes() if made.exists() else b""
        done = subprocess.run(
            ["bash", CLUSTER / "secrets.sh", "env"], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == done.stderr == ""
    assert made.read_bytes() == before
    variables = dict(line.split("=", 1) for line in made.read_text(encoding="utf-8").splitlines())
    assert set(variables) == set(re.findall(r"\$\{(\w+):\?", (CLUSTER / "compose.yaml").read_text(encoding="utf-8")))
    assert all(len(value) == 64 for name, value in variables.items() if name != "S3_ACCESS_KEY")
    assert len(set(variables.values())) == len(variables)
    files = [made, tmp_path / ".ray" / "auth_token", tmp_path / ".ray" / "ptuning_api_keys"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert variables["RAY_AUTH_TOKEN"] == files[1].read_text(encoding="utf-8")
    for launcher in LAUNCHERS.values():
        assert set(launcher["file_mounts"]) == {f"~/.ray/{file.name}" for file in files[1:]}


def test_nothing_secret_is_written_down():
    for path, text in TEXTS.items():
        assert not re.search(r"://[^/\s:@\"']+:[^/\s@\"'$]+@", text), f"{path}: a password in a URL"
        assert "runtimeEnvYAML" not in text and "runtime_env" not in text, (
            f"{path}: a runtime environment is shown to everybody"
        )
    secret = re.compile(r"PASSWORD|SECRET|TOKEN$|_KEYS?$|KEY_ID$|^password$", re.IGNORECASE)
    environments = [service.get("environment", {}) for service in COMPOSE["services"].values()]
    for name, value in [pair for environment in environments for pair in environment.items()]:
        assert not secret.search(name) or re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), name
    for variable in [variable for container in containers() for variable in container.get("env", [])]:
        assert not secret.search(variable["name"]) or "valueFrom" in variable, variable["name"]
    assert not re.search(r"^(ENV|ARG) .*(PASSWORD|SECRET|TOKEN|KEY)", DOCKERFILE, re.MULTILINE)
    assert "cluster/.env" in (REPOSITORY / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_a_token_is_asked_for_everywhere():
    assert "RAY_AUTH_MODE=token" in DOCKERFILE
    ray = [COMPOSE["services"][name]["environment"] for name in ("head", "worker")]
    ray += [
        {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}
        for container in containers()
        if container["name"].startswith("ray-")
    ]
    assert len(ray) == 4
    for environment in ray:
        assert environment["RAY_AUTH_MODE"] == "token" and environment["RAY_AUTH_TOKEN"]
        assert environment[VARIABLE], "the keys of the API"
    for launcher in LAUNCHERS.values():
        starts = [line for key in ("head", "worker") for line in launcher[f"{key}_start_ray_commands"] if "ray start" in line]
        assert len(starts) == 2 and all("RAY_AUTH_MODE=token ray start" in line for line in starts)
        assert all(f"{VARIABLE}=$(cat ~/.ray/ptuning_api_keys) " in line for line in starts)
        assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=" in SLURM and "--dashboard-host=127.0.0.1" in SLURM
    assert [cluster["spec"]["authOptions"]["mode"] for cluster in of_kind("RayCluster")] == ["token"]


def test_kubernetes_lets_nobody_in_from_outside():
    assert all(service["spec"].get("type", "ClusterIP") == "ClusterIP" for service in of_kind("Service"))
    assert all(cluster["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP" for cluster in of_kind("RayCluster"))
    closed = [policy for policy in of_kind("NetworkPolicy") if "ingress" not in policy["spec"]]
    assert [policy["spec"] for policy in closed] == [{"podSelector": {}, "policyTypes": ["Ingress"]}]
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False, "MLFLOW_PORT and the like would be read as settings"
    for container in containers():
        confined = container["securityContext"]
        assert confined["allowPrivilegeEscalation"] is False and confined["capabilities"] == {"drop": ["ALL"]}
        assert "limits" in container.get("resources", {}) or container["name"] == "bucket"


@pytest.mark.parametrize(("name", "resource"), [("rdma", "rdma~1rdma_shared_device_a"), ("efa", "vpc.amazonaws.com~1efa")])
def test_several_gpu_nodes_may_use_rdma(name, resource):
    """Without any of this, NCCL uses TCP without a word."""
    folder = KUBERAY / "overlays" / f"multi-gpu-{name}"
    assert _kustomization(folder)["resources"] == ["../multi-gpu"]
    changes = {
        change["path"].rpartition("/spec/containers/0/")[2]: change["value"] for change in documents(folder / "network.yaml")[0]
    }
    assert changes["securityContext"] == {
        "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    }  # fmt: skip
    assert changes[f"resources/requests/{resource}"] == changes[f"resources/limits/{resource}"]
    installed = re.search(r"apt-get install -y --no-install-recommends (.*libibverbs1.*); ", DOCKERFILE)
    assert installed is not None and {"libibverbs1", "ibverbs-providers", "librdmacm1"} <= set(installed[1].split())
    assert "efa_installer.sh" in DOCKERFILE and "\nulimit -l unlimited" in SLURM
    for launcher in LAUNCHERS.values():
        assert {"--ulimit memlock=-1:-1", "--cap-drop ALL", "--cap-add IPC_LOCK"} <= set(launcher["docker"]["run_options"])


def test_a_stopped_job_has_the_time_to_save():
    from ray.dashboard.modules.job.job_supervisor import JobSupervisor

    texts = [DOCKERFILE, *(TEXTS[path] for path in (CLUSTER / "compose.yaml", KUBERAY / "base" / "raycluster.yaml"))]
    found = [re.findall(r"RAY_JOB_STOP_(?:SIGNAL|WAIT_TIME_S)\W+(?:value: \"?)?(\w+)", text) for text in texts]
    assert found == 3 * [["SIGINT", "60"]] and "SIGINT" in JobSupervisor.VALID_STOP_SIGNALS
    graces = [int(COMPOSE["services"][name]["stop_grace_period"].removesuffix("s")) for name in ("head", "worker")]
    graces += [pod["terminationGracePeriodSeconds"] for pod in pods() if pod["containers"][0]["name"].startswith("ray-")]
    assert len(graces) == 4 and min(graces) > 60


@pytest.mark.parametrize("name", serve_configs())
def test_what_serve_is_configured_with_is_what_the_code_takes(name, monkeypatch):
    from ray.serve.schema import ServeDeploySchema

    from ptuning.serving.deployment import build
    from ptuning.serving.server import APPLICATION

    monkeypatch.setenv(VARIABLE, "a-key-of-this-test-only")
    monkeypatch.chdir(REPOSITORY)
    config = serve_configs()[name]
    [application] = ServeDeploySchema.model_validate(config).applications
    assert application.name == APPLICATION and application.import_path == f"{build.__module__}:{build.__name__}"
    assert set(application.args) <= set(re.findall(r"args(?:\.get\(|\[)\"(\w+)\"", inspect.getsource(build)))
    build(application.args)  # the experiment and its overrides
    assert config["http_options"]["port"] == ServeConfig().port
    assert config["http_options"]["request_timeout_s"] == ServeConfig().deadline_s + 30
    same = dict(config["applications"][0]["args"], overrides=None)
    other = serve_configs()["jobs"]
    assert dict(config, applications=None) == dict(other, applications=None)
    assert dict(config["applications"][0], args=same) == dict(
        other["applications"][0], args=dict(other["applications"][0]["args"], overrides=None)
    )


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_launcher_takes_its_configuration(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(LAUNCHERS[name])
    validate_config(config)
    assert config["provider"]["type"] in {"aws", "gcp", "local"}
    for kind in config["available_node_types"].values():
        # An experiment is refused if the cluster does not have what it needs: nobody would wait for the autoscaler.
        assert kind["min_workers"] == kind["max_workers"]


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda folder: str(folder.relative_to(KUBERAY)))
def test_kustomizations_name_what_exists(folder):
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    known = {"apiVersion", "kind", "namespace", "resources", "components", "images", "patches", "replacements"}
    assert set(kustomization) <= known
    resources = gather(folder)
    if kustomization["kind"] == "Component":
        resources |= gather(KUBERAY / "base")
    patches = kustomization.get("patches", [])
    wanted = [one["source"] for one in kustomization.get("replacements", [])]
    wanted += [target["select"] for one in kustomization.get("replacements", []) for target in one["targets"]]
    wanted += [patch["target"] for patch in patches if "target" in patch]
    wanted += [{"kind": one["kind"], "name": one["metadata"]["name"]} for one in _merged(folder, patches)]
    assert all((one["kind"], one["name"]) in resources for one in wanted)
    for patch in patches:
        for operation in documents(folder / patch["path"])[0] if "target" in patch and "path" in patch else []:
            target = resources[patch["target"]["kind"], patch["target"]["name"]]
            assert _has(target, operation["path"].split("/")[1:], operation["op"] == "add"), operation["path"]


def _merged(folder: Path, patches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [document for patch in patches if "target" not in patch for document in documents(folder / patch["path"])]


def _has(node: Any, keys: list[str], parent_is_enough: bool) -> bool:
    for key in keys[:-1] if parent_is_enough else keys:
        node = node[int(key)] if isinstance(node, list) else node.get(key)
        if node is None:
            return False
    return True


def gather(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The resources of a kustomization, those of the folders it names included."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    for name in [*kustomization.get("resources", []), *kustomization.get("components", [])]:
        path = (folder / name).resolve()
        assert path.exists(), f"{folder}: {name}"
        if path.is_dir():
            found |= gather(path)
        else:
            found |= {(one["kind"], one["metadata"]["name"]): one for one in documents(path)}
    return found


def test_every_manifest_is_used():
    named = {one["path"] for folder in KUSTOMIZATIONS for one in _kustomization(folder).get("patches", []) if "path" in one}
    named |= {name for folder in KUSTOMIZATIONS for name in _kustomization(folder).get("resources", [])}
    alone = {path.name for path in KUBERAY.rglob("*.yaml")} - named - {"kustomization.yaml"}
    by_hand = {"rayjob-train.yaml", "rayjob-search.yaml", "raycronjob-retune.yaml", "raycronjob-predict.yaml"}
    assert alone == by_hand | {"queues.yaml", "queue.yaml"}
    assert {folder.name for folder in OVERLAYS} - {"multi-gpu-rdma", "multi-gpu-efa", *ON_CPUS} == {
        f"{size}{what}" for size in ("cpu", "gpu", "multi-gpu") for what in ("", "-serve")
    }
    assert {cluster["metadata"]["name"] for cluster in of_kind("RayCluster")} == {
        job["clusterSelector"]["ray.io/cluster"] for job in jobs()
    }


def _kustomization(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    return loaded


BUILDER = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
builder = pytest.mark.skipif(not shutil.which(BUILDER[0]), reason="neither kustomize nor kubectl is here")


@builder
@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_overlays_build(folder):
    built = subprocess.run([*BUILDER, folder], capture_output=True, text=True, check=True).stdout
    found = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(built)}
    size, serving = folder.name.removesuffix("-serve"), folder.name.endswith("-serve")
    assert (("RayService", "ptuning-api") in found, ("RayCluster", "ptuning") in found) == (serving, not serving)
    assert all(one["metadata"].get("namespace") == "ptuning" for (kind, _), one in found.items() if kind != "Namespace")
    kind, key = ("RayService", "rayClusterConfig") if serving else ("RayCluster", None)
    name = "ptuning-api" if serving else "ptuning"
    spec = found[kind, name]["spec"]
    spec = spec[key] if key else spec
    assert spec["rayVersion"] == PINS["ray"] and spec["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    [workers] = spec["workerGroupSpecs"]
    grows = folder.name == "autoscaling"
    assert workers["replicas"] == workers["minReplicas"] == (0 if grows else workers["maxReplicas"])
    images = {node["image"] for one in found.values() for _, node in walk(one) if isinstance(node, dict) and "image" in node}
    assert images == {IMAGE} | {image for _, image in _images() if image != "ptuning"}
    resources = workers["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"] == resources["requests"]
    gpus = int(resources["limits"].get("nvidia.com/gpu", 0))
    assert (gpus > 0) == (size not in ("cpu", *ON_CPUS)) and (workers["replicas"] * gpus > 8) == size.startswith("multi-gpu")
    if serving:
        config = yaml.safe_load(found[kind, name]["spec"]["serveConfigV2"])
        overrides = config["applications"][0]["args"]["overrides"]
        serve = read_experiment(REPOSITORY / "jobs" / "sentiment.toml", overrides).serve
        assert serve.replicas * serve.gpus_per_replica == workers["replicas"] * gpus


def test_the_image_is_built_from_what_is_there():
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied = {
        source
        for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE)
        for source in [word for word in line.split() if not word.startswith("--")][:-1]
    }
    assert copied == sent and all((REPOSITORY / source).exists() for source in copied)
    files = [path for source in sent for path in [REPOSITORY / source, *(REPOSITORY / source).rglob("*")] if path.is_file()]
    assert sum(path.stat().st_size for path in files if "__pycache__" not in path.parts) < 30e6, "the built-in base is 8 MB"
    assert not [tool for tool in ("gcc", "g++", "build-essential", "cmake", "sudo ") if tool in DOCKERFILE]
    users = re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE)
    assert users[-1] == "1000:100"
    assert {(pod["securityContext"]["runAsUser"]) for pod in pods() if pod["containers"][0]["image"] == "ptuning"} == {1000}
    for wanted in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["server"]]:
        name = re.match(r"[\w.-]+", wanted)
        assert name and name[0].lower() in {pin.lower().replace("_", "-") for pin in PINS}, f"{wanted} is not pinned"


def test_slurm_passes_the_signal_on(tmp_path):
    # The end of the script as it is, with a command that waits for SIGINT in the place of ptuning.
    (tmp_path / "ptuning").write_text("#!/usr/bin/env python3\n" + _WAITS, encoding="utf-8")
    (tmp_path / "ptuning").chmod(0o755)
    script = (
        f"export PATH={tmp_path}:$PATH address=- port=-\nset -euo pipefail\n" + SLURM[SLURM.index("# Only the batch shell") :]
    )
    shell = subprocess.Popen(["bash", "-c", script, "slurm", "train"], stdout=subprocess.PIPE, text=True)
    assert shell.stdout is not None and shell.stdout.readline() == "train\n"
    shell.send_signal(signal.SIGINT)
    assert shell.communicate(timeout=20)[0] == "saved\n" and shell.returncode == 7


_WAITS = """
import sys, time

try:
    print(*sys.argv[1:], flush=True)
    time.sleep(20)
except KeyboardInterrupt:
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(7)
"""


@pytest.mark.parametrize("script", ["slurm.sbatch", "secrets.sh"])
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", CLUSTER / script], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", CLUSTER / script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_every_toml_of_the_repository_loads():
    here = [path for path in REPOSITORY.rglob("*.toml") if not {".venv", "node_modules", "runs"} & set(path.parts)]
    assert len(here) > 5
    for path in here:
        tomllib.loads(path.read_text(encoding="utf-8"))


def test_postgresql_is_reached_with_the_driver_that_the_image_has():
    # A bare postgresql:// means psycopg 3 since SQLAlchemy 2.1; the extra `server` brings psycopg2.
    assert any(each.startswith("psycopg2") for each in PROJECT["optional-dependencies"]["server"])
    assert not [path for path, text in TEXTS.items() if "postgresql://" in text]


@pytest.mark.fast
def test_what_grows_from_nothing():
    """The autoscaler's pod may ask the API server, and no worker may; the limits include none."""
    patches = yaml.safe_load((KUBERAY / "overlays" / "autoscaling" / "workers.yaml").read_text(encoding="utf-8"))
    changed = {patch["path"].partition("/spec/")[2]: patch["value"] for patch in patches}
    assert changed["enableInTreeAutoscaling"] is True and changed["autoscalerOptions"]["version"] == "v2"
    assert [changed[f"workerGroupSpecs/0/{name}"] for name in ("replicas", "minReplicas", "maxReplicas")] == [0, 0, 4]
    assert [path for path in changed if path.endswith("automountServiceAccountToken")] == [
        "headGroupSpec/template/spec/automountServiceAccountToken"
    ]
