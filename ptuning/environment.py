"""All environment variables that this package sets for the libraries it uses: one table, applied in parts.

A library reads its variables at import, when it starts processes, or at the first call, so each part is applied just before
that. Values set by the user stay, unless a variable is marked as fixed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

Part = Literal["command", "torch", "deepspeed", "mlflow", "ray", "own cluster", "loopback", "token", "search", "proxy"]


@dataclass(frozen=True)
class Variable:
    part: Part
    name: str
    value: str
    why: str
    fixed: bool = False
    """Override the user's value."""


TABLE = (
    Variable("command", "RAY_DEDUP_LOGS_SKIP_REGEX", ".",
             "Ray's nodes would put a line about it onto our stdout (2.60); a search of eight trials has eight processes"),
    # Rows are packed without padding, so shapes hardly ever repeat between steps. By default the last 1,024 products are cached
    # twice: by oneDNN and by torch (https://github.com/pytorch/pytorch/issues/98688). A worker with eight slots grew from 0.8
    # to 2.6 GB within 400 steps, and further, because the cached products fragment the heap; and a lookup takes longer than it
    # saves. The layers of a step still share products.
    Variable("torch", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64", "oneDNN multiplies in bf16 on CPUs; read at the first product"),
    Variable("torch", "LRU_CACHE_CAPACITY", "16", "torch's own cache of the same"),
    # Every step has other shapes. Without it, blocks that the allocator keeps for one shape are too small for the next.
    Variable("torch", "PYTORCH_ALLOC_CONF", "expandable_segments:True", "less fragmented GPU memory; read at the first use"),
    Variable("deepspeed", "DS_ACCELERATOR", "cpu", "without a GPU; detection may find mps on a Mac, which ZeRO cannot use"),
    # Set before threads exist, not in the thread that imports MLflow: setenv beside the threads of Ray's C++ core is not safe.
    Variable("mlflow", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0",
             "the default sleeps 244 s in one call (utils/request_utils.py); the uploader retries"),
    Variable("mlflow", "MLFLOW_HTTP_REQUEST_TIMEOUT", "10", "for connecting and for each read; whole seconds only"),
    Variable("mlflow", "MLFLOW_DISABLE_TELEMETRY", "true", "nothing is sent anywhere"),
    Variable("mlflow", "MLFLOW_LOGGING_LEVEL", "CRITICAL", "below it a locked database prints a traceback (store/db/utils.py)"),
    Variable("mlflow", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true", "set_terminated prints two lines"),
    Variable("mlflow", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false", "bars beside ours"),
    Variable("mlflow", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false", "no pickle is opened", fixed=True),
    Variable("ray", "RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0",
             "uv's hook would start every worker through `uv run` and upload the working directory"),
    Variable("ray", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5",
             "poll interval of the controller; every run waits for it at its end, and the default is 2 s"),
    Variable("ray", "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "120",
             "seconds after which an unresponsive process counts as dead; the default is 600"),
    Variable("ray", "RAY_USAGE_STATS_ENABLED", "0", "nothing is sent anywhere"),
    Variable("ray", "TOKENIZERS_PARALLELISM", "false", "tokenizers warn of threads before a fork"),
    Variable("own cluster", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0",
             "an actor that checks whether the cloud will preempt the machine; it costs a second per start"),
    # Meant for other systems, where firewalls ask about open ports; it works everywhere.
    Variable("loopback", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0",
             "a cluster that is started here listens on loopback with all its ports, and not on every interface (2.60)"),
    Variable("token", "RAY_AUTH_MODE", "token", "a token that is set is sent; read when ray is imported"),
    Variable("search", "RAY_AIR_NEW_OUTPUT", "0", "the new output prints a box even at verbose=0", fixed=True),
    Variable("search", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1", "Tune's own CSV, JSON and TensorBoard files", fixed=True),
    Variable("search", "TUNE_DISABLE_SIGINT_HANDLER", "1",
             "Ctrl-C ends the search, it does not wait for the trials", fixed=True),
    Variable("search", "TUNE_FORCE_TRIAL_CLEANUP_S", "10", "a process that does not end by itself", fixed=True),
    Variable("search", "TUNE_GLOBAL_CHECKPOINT_S", "1000000", "the trial store is what a search is resumed from", fixed=True),
    Variable("proxy", "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "ptuning.serving.proxy:middlewares",
             "what the proxy lets in (2.60, serve/_private/constants.py)"),
    Variable("proxy", "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "1",
             "a dead proxy is detected after three checks: with the default of 10 s there are no answers for half a minute"),
)  # fmt: skip
"""`sys_path` has its own: PYTHONPATH and PYTHONSAFEPATH are needed before anything else is imported."""


def apply(*parts: Part) -> None:
    """Set the variables of these parts."""
    _spare_loopback()
    for variable in TABLE:
        if variable.part in parts and (variable.fixed or variable.name not in os.environ):
            os.environ[variable.name] = variable.value


LOOPBACK = ("localhost", "127.0.0.1", "::1")


def _spare_loopback() -> None:
    """Loopback is never asked through a proxy, by no library of this process and its children: a proxy would answer with its
    own loopback, or with an error page."""
    if not any(name.lower() in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy") for name in os.environ):
        return
    for name in ("no_proxy", "NO_PROXY"):  # some libraries read only one of them
        given = [each for each in os.environ.get(name, "").split(",") if each.strip()]
        if "*" not in given:
            os.environ[name] = ",".join([*given, *(host for host in LOOPBACK if host not in given)])


def apply_for_cluster(address: str | None) -> None:
    """Set the variables that Ray reads at import, in a process that joins the cluster at `address` or starts its own."""
    if not address and not os.environ.get("RAY_ADDRESS"):
        apply("loopback")
