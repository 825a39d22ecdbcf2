"""Shared by all tests: a quiet and offline environment, tiny bases of every architecture, a toy task.

Toys instead of mocks: everything here is a real model, a real tokenizer, a real file, only small.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import gc
import hashlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

# Before anything imports ray, transformers or mlflow: they read these once. Worker processes inherit them.
os.environ |= {
    "DO_NOT_TRACK": "true",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": tempfile.mkdtemp(prefix="ptuning-hf-"),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Four processes of a server whose queues nobody uses, and which stay in /dev/shm when it is killed (3.17).
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "OMP_NUM_THREADS": "1",
    # Explicit either way, or ray.init() switches it on half-way through a session and writes ~/.ray/auth_token.
    # The token in the environment needs no file, and reaches every process of the cluster.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    # Under "uv run" Ray would build a new environment for every worker.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # An actor that asks whether a cloud will take the machine away: 3 s of a core at every start of workers.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # The default of 2 s is the resolution of every start, report and failure of Ray Train.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's workers let everybody else go first (15): on a busy machine the time of its neighbours would be measured.
    "RAY_worker_niceness": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}

import hypothesis
import psutil
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from ptuning.model.base import Base
    from ptuning.model.prompted_model import PromptedModel

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# A script that starts the suite in the background has it, and all that it starts, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    # DeepSpeed would look for a driver, and warn.
    os.environ["DS_ACCELERATOR"] = "cpu"

# The same examples on every run, and as much time for each as a busy machine takes.
hypothesis.settings.register_profile("ptuning", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ptuning")

# Tiny models are faster on one thread than on several, and two workers share two cores.
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = _SPECIAL | {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED = _LLAMA | {"num_key_value_heads": 2}
_NEOX = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "llama_tied_gqa": ("LlamaConfig", _GROUPED | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", _SPECIAL | {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neo": (
        "GPTNeoConfig",
        _SPECIAL
        | {
            "vocab_size": 100,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 128,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", _NEOX),
    "opt": (
        "OPTConfig",
        _SPECIAL
        | {
            "vocab_size": 100,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen2_window": (
        "Qwen2Config",
        _GROUPED
        | {
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3Config", _GROUPED | {"head_dim": 8}),
    "gemma": ("GemmaConfig", _GROUPED | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", _GROUPED | {"head_dim": 8, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", _GROUPED | {"head_dim": 8, "sliding_window": 4}),
    "mistral": ("MistralConfig", _GROUPED | {"sliding_window": 4}),
    "cohere": ("CohereConfig", _GROUPED),
    "falcon": ("FalconConfig", _NEOX),
}
"""Name -> transformers' config class and its arguments. Vocabulary 100, width 32, 2 layers, 128 positions."""

CONCATENATED = {"gpt_neo", "falcon"}
"""Architectures whose attention transformers does not let us replace: they compute by plain concatenation."""


def tiny_config(architecture: str, **changes: Any) -> PretrainedConfig:
    name, arguments = ARCHITECTURES[architecture]
    # The wide spread makes a random model's logits differ visibly; with 0.02 most mistakes would hide below 1e-5.
    config: PretrainedConfig = getattr(transformers, name)(**arguments | {"initializer_range": 0.3} | changes)
    return config


def tiny_base(architecture: str, *, seed: int = 0, attention: str | None = "eager", **changes: Any) -> PreTrainedModel:
    """A random base in fp32 and evaluation mode, the same for the same arguments.

    `attention` None: transformers' choice.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), attn_implementation=attention)
    return base.eval()


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 over every base tensor as this rank holds it, its share or the whole: equal before and after training (law 2)."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        held = getattr(parameter, "ds_tensor", parameter).detach()
        digest.update(name.encode() + held.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real small models and data sets, which are not part of the project."""
    folder = Path(os.environ.get("PTUNING_ASSETS", REPOSITORY.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"no assets at {folder}; set PTUNING_ASSETS")
    return folder


FRUITS = ("apple", "pear", "plum", "grape")
TOOLS = ("hammer", "saw", "drill", "wrench")
FILLERS = ("the", "old", "man", "has", "one", "more", "of", "them", "here", "today")


def toy_rows(n: int, seed: int) -> list[dict[str, str]]:
    """Rows whose label is decided by one keyword among fillers; both labels equally often."""
    draw = random.Random(seed)
    rows = []
    for row in range(n):
        words = draw.choices(FILLERS, k=draw.randint(2, 6))
        words.insert(draw.randrange(len(words) + 1), draw.choice(TOOLS if row % 2 else FRUITS))
        rows.append({"text": " ".join(words), "label": "tool" if row % 2 else "fruit"})
    draw.shuffle(rows)
    return rows


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 pieces: any text has tokens, and texts begin with BOS as Llama's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [f"Text: {row['text']}\nKind: {row['label']}" for row in toy_rows(200, seed=9)]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama (width 32, 2 layers, 128 positions) with its tokenizer, as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    base = tiny_base("llama_tied_gqa", vocab_size=len(tiny_tokenizer), initializer_range=0.1)
    _teach_toy(base, tiny_tokenizer)
    base.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path, request: pytest.FixtureRequest) -> Base:
    """The tiny base; a parameter is how it is stored (`model.quantization`)."""
    from ptuning.model.base import find_base
    from ptuning.settings.model import ModelConfig

    return find_base(ModelConfig(path=str(tiny_base_folder), quantization=getattr(request, "param", None)))


@pytest.fixture(scope="module")
def model(base: Base) -> PromptedModel:
    """The base as a process trains with it, unsharded."""
    from ptuning.settings.training import ZeroConfig
    from ptuning.training import base_loader

    return base_loader.load(base, ZeroConfig(stage=0), torch.float32)


def _teach_toy(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, steps: int = 250) -> None:
    """About 3 s of pretraining, so that prompt tuning has something to find: texts that begin with "sort" carry the
    right label, all others a random one. The base knows how to do the task but not that it is asked for: 20 steps of
    prompt tuning at 0.05 tell it, and the accuracy is 1.0."""
    draw = random.Random(0)
    documents = []
    for row in toy_rows(1000, seed=7):
        sort = draw.random() < 0.5
        text = f"Text: {'sort ' if sort else ''}{row['text']}\nKind:"
        label = row["label"] if sort else draw.choice(["fruit", "tool"])
        source = tokenizer(text).input_ids
        target = [*tokenizer(f" {label}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        documents.append((source, target))
    optimizer = torch.optim.AdamW(base.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        rows = draw.choices(documents, k=32)
        longest = max(len(source) + len(target) for source, target in rows)
        ids, labels = torch.zeros(32, longest, dtype=torch.long), torch.full((32, longest), -100)
        for row, (source, target) in enumerate(rows):
            end = len(source) + len(target)
            ids[row, :end] = torch.tensor(source + target)
            labels[row, len(source) : end] = torch.tensor(target)
        loss = base(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@pytest.fixture
def row_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of rows."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "ptuning"


@pytest.fixture
def data_folder(row_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for rows, as the current one, and an empty cache of rows."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def toy_task(tmp_path: Path, tiny_base_folder: Path) -> SimpleNamespace:
    """A task that a soft prompt can learn: `train`, `validation` and `test` files (64, 32 and 32 rows) in `folder`, and
    `experiment`, the plain tables of an experiment on them that a test may change before it parses or writes them."""
    return _make_toy_task(tmp_path, tiny_base_folder)


def _make_toy_task(above: Path, base: Path) -> SimpleNamespace:
    folder = above / "toy"
    folder.mkdir()
    files = {}
    for seed, (split, n) in enumerate({"train": 64, "validation": 32, "test": 32}.items()):
        files[split] = folder / f"{split}.jsonl"
        lines = [json.dumps(row) + "\n" for row in toy_rows(n, seed)]
        files[split].write_text("".join(lines), encoding="utf-8")
    experiment = {
        "name": "toy",
        "model": {"path": str(base)},
        "prompt": {"length": 4},
        "data": {
            **{split: str(file) for split, file in files.items()},
            "input": "Text: {text}\nKind:",
            "target": " {label}",
            "labels": ["fruit", "tool"],
        },
        "train": {"learning_rate": 0.05, "steps": 20, "evaluate_every": 10, "batch_size": 8},
        "compute": {"storage": str(above / "runs")},
    }
    return SimpleNamespace(folder=folder, experiment=experiment, **files)


@pytest.fixture
def write_toml(tmp_path: Path) -> Callable[..., Path]:
    """Writes plain tables as an experiment file."""

    def write(tables: dict[str, Any], name: str = "experiment.toml") -> Path:
        path = tmp_path / name
        path.write_text(toml(tables), encoding="utf-8")
        return path

    return write


def toml(tables: dict[str, Any]) -> str:
    """An experiment file."""
    # Strings, numbers and lists of them are the same in JSON and TOML; booleans too.
    plain = [f"{key} = {json.dumps(value)}" for key, value in tables.items() if not isinstance(value, dict)]
    nested = [f"\n[{key}]\n{toml(value)}" for key, value in tables.items() if isinstance(value, dict)]
    return "\n".join([*plain, *nested]) + "\n"


def set_traps(folder: Path) -> None:
    """Files in a folder that are called as the modules of Python and of all that is installed are: importing one tells
    (`sprung`) and fails. Left out is what `python -m` imports from the working folder before its first line is reached."""
    probe = folder / "probe_of_python"
    probe.mkdir(parents=True)
    (probe / "__main__.py").write_text("import sys; print(*sys.modules)")
    started = subprocess.run([sys.executable, "-m", probe.name], cwd=folder, capture_output=True, text=True, check=True)
    shutil.rmtree(probe)
    installed = {name for name in metadata.packages_distributions() if name.isidentifier()} - {"ptuning"}
    for name in (sys.stdlib_module_names | installed) - set(started.stdout.split()):
        (folder / f"{name}.py").write_text('open(__file__ + ".run", "w").close()\nraise ImportError("a trap")\n')


def sprung(*folders: Path) -> list[str]:
    """The traps that were imported."""
    return sorted(path.name for folder in folders for path in folder.glob("*.run"))


@pytest.fixture(scope="session")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cluster of this process, with two CPUs, for all tests: starting one and ending it takes ten seconds. Its processes
    do what is planned in the folder that it yields (`instants/sitecustomize.py`); without a plan, nothing."""
    import ray  # a second, which tests without a cluster need not take

    folder = tmp_path_factory.mktemp("instants")
    with pytest.MonkeyPatch.context() as patched:  # only for the processes of the cluster: they have it from their raylet
        patched.setenv("PTUNING_INSTANTS", str(folder))
        patched.setenv("PYTHONPATH", str(REPOSITORY / "tests" / "instants"), prepend=os.pathsep)
        ray.init(num_cpus=2, log_to_driver=False)  # with the dashboard: Ray Train's own cleaner asks it
    yield folder
    ray.shutdown()


@pytest.fixture(scope="session")
def _finished_run(local_ray: Path, tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> SimpleNamespace:
    from ptuning.config import parse_experiment
    from ptuning.training.run import run_training

    folder = tmp_path_factory.mktemp("finished")
    tables = _make_toy_task(folder, tiny_base_folder).experiment
    tables["compute"]["workers"] = 2
    tables["prompt"]["length"] = 10
    tables["train"] |= {"steps": 60, "learning_rate": 0.3, "checkpoint_every": 5}
    tables["zero"] = {"stage": 3}
    events: list[Any] = []
    lines: list[str] = []
    summary = run_training(parse_experiment(tables), resume=False, show=events.append, say=lines.append).as_json()
    return SimpleNamespace(folder=folder, tables=tables, summary=summary, events=events, lines=lines)


@pytest.fixture
def finished_run(_finished_run: SimpleNamespace) -> SimpleNamespace:
    """One run with two workers, ZeRO-3 and checkpoints, called "toy", for all tests that only look at what has come of it:
    its `summary`, `events` and `lines`, and a copy of the `tables` of its experiment, with storage in `folder`/runs."""
    return SimpleNamespace(**vars(_finished_run) | {"tables": copy.deepcopy(_finished_run.tables)})


@pytest.fixture
def in_cluster(local_ray: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that a test starts join the tests' cluster and start none of their own."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)


def save_endless_base(folder: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Path:
    """A base that never ends an answer by itself, with room for long ones: what is in flight stays in flight."""
    model = tiny_base("llama", vocab_size=len(tokenizer), max_position_embeddings=2048, **changes)
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    roomy = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    roomy.model_max_length = 2048
    roomy.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def endless_base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_endless_base(tmp_path_factory.mktemp("endless") / "endless", tiny_tokenizer)


@pytest.fixture(scope="session")
def served_world(tmp_path_factory: pytest.TempPathFactory, endless_base: Path) -> Iterator[SimpleNamespace]:
    """One `ptuning serve` with two replicas, for all who leave it whole. The last test of `test_faults_serving` ends it."""
    from serving_world import serving

    with serving(tmp_path_factory.mktemp("served"), endless_base) as world:
        yield world


gc.disable()  # until everything is imported: `ptuning.imports.quick_imports` says why


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


CLUSTER = re.compile(r"local_ray|served_world|finished_run|in_cluster|mark\.cluster")
"""What a file with tests on a cluster says somewhere."""
ONLY = re.compile(r"^pytestmark = (\[$.*?^\]|[^\n]*)", re.MULTILINE | re.DOTALL)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files without a test that is asked for are not imported: Ray, MLflow and the others take a core half a minute."""
    marks = config.option.markexpr
    if not collection_path.stem.startswith("test_") or not re.match(r"(not )?cluster and ", marks):
        return None
    text = collection_path.read_text(encoding="utf-8")
    if marks.startswith("cluster"):
        return not CLUSTER.search(text) or None
    return any(CLUSTER.search(found) for found in ONLY.findall(text)) or None


LONGEST = ("test_train", "test_registry", "test_engine", "test_model", "test_zero", "test_disclosure", "test_http_api")
"""Files without a cluster, by their seconds in build/tests.xml."""


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that ask the one server come last, so that it runs no longer than needed; the file that ends it is the very last.
    The files that take longest come first: processes that run tests side by side then end at about the same time."""
    asks = {item: set(getattr(item, "fixturenames", ())) for item in items}

    def order(item: pytest.Item) -> tuple[int, int]:
        file = item.path.stem
        served = ("served_world" in asks[item]) * (2 if file == "test_faults_serving" else 1)
        return served, LONGEST.index(file) if file in LONGEST else len(LONGEST)

    items.sort(key=order)
    for item in items:
        if {"local_ray", "served_world"} & asks[item]:
            item.add_marker("cluster")
        if item.get_closest_marker("cluster") and not CLUSTER.search(item.path.read_text(encoding="utf-8")):
            raise pytest.UsageError(f"{item.nodeid} needs a cluster: name its fixture in `CLUSTER` in conftest.py")


@contextlib.contextmanager
def worker_killed(when: Callable[[], bool]) -> Iterator[None]:
    """Kill one of Ray Train's workers, in the cluster that this process has started, as soon as `when` says so."""
    killed: list[int] = []

    def kill() -> None:
        while not when():
            time.sleep(0.02)
        workers = [each for each in psutil.Process().children(recursive=True) if "RayTrainWorker" in title(each)]
        workers[-1].kill()
        killed.append(workers[-1].pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    yield
    killer.join(10)
    assert killed


def shared_memory() -> set[str]:
    """What is in shared memory, but for that of Python's multiprocessing: neither Ray nor a run uses it, tests beside do."""
    return {path.name for path in Path("/dev/shm").iterdir() if not path.name.startswith(("sem.mp-", "psm_"))}


def title(process: psutil.Process) -> str:
    """What a process calls itself; nothing if it has gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
