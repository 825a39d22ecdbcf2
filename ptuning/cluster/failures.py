"""The error message of a failed run: one sentence that names the cause. Details go to a file in the run's folder."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import ray

from ptuning import storage
from ptuning.redaction import redact

# Ray's memory monitor kills the newest processes of a node when 95 % of its memory is in use (2.60).
_MONITOR = re.compile(r"Memory on the node \(IP: ([^,]+),.*?\) was ([\d.]+)GB used / ([\d.]+)GB limit")

_LARGEST = re.compile(r"^(\d+)\t([\d.]+)\t(.{1,40})", re.MULTILINE)

_ALLOCATORS = re.compile(
    r"(?:CUDA|HIP|XPU) out of memory\. Tried to allocate [\d.]+ \w+|can't allocate memory: you tried to allocate \d+ bytes|"
    r"Unable to allocate [\d.]+ \w+|^MemoryError\b.*",
    re.MULTILINE,
)

_WHO = re.compile(r"hostname='(.*?)'.*?pid=(\d+).*?world_rank=(\d+)", re.DOTALL)

_HELPER = re.compile(r"class_name: (\w+).*?pid: (\d+).*?ip: (\S+)", re.DOTALL)

_GONE = re.compile(r"worker process has died|died unexpectedly|Worker unexpectedly exits")

_PERMANENT = re.compile(r"ptuning\.errors\.CannotRun: (.*)")

# Errors of the other workers after one has died: gloo and NCCL (torch's ProcessGroupNCCL.cpp).
_ECHOES = re.compile(
    r"gloo/transport|ncclRemoteError|NCCL communicator was aborted|Connection (?:reset|closed) by peer|"
    r"Watchdog caught collective operation timeout|Process group watchdog thread terminated|ncclInProgress|"
    r"NCCL remote error|Socket Timeout|NCCL timeout"
)

# The driver's and torch's words for a broken GPU or its links.
_HARDWARE = re.compile(
    r"(?:uncorrectable (?:ECC|NVLink) error|CUDA error: (?:hardware|unspecified launch failure)|"
    r"GPU has fallen off the bus)[^\n]*",
    re.IGNORECASE,
)

LESS = (
    "free memory and continue with --resume, or use less under another name: a smaller train.batch_size, model.dtype=bfloat16, "
    "train.gradient_checkpointing=true (ptuning plan shows what fits)"
)


def explain(error: Exception, folder: str, hang: str | None = None) -> str:
    """One sentence; the tracebacks of all workers go to a file in the run's folder. `hang`: the last report of the
    watchdogs."""
    workers = [str(each) for each in (getattr(error, "worker_failures", None) or {}).values()]
    text = "\n".join([str(error), *workers])
    if os.strerror(errno.ENOSPC) in text:
        return disk_full(folder)
    storage.write_file(folder, "error.log", redact(str(error)).encode())
    see = f"see {storage.join(folder, 'error.log')}, and Ray's own logs in {ray_logs()}"
    if found := _PERMANENT.search(text):
        return f"{found[1].strip()}; {see}"
    if wanting := memory(text):
        return f"{wanting}; {LESS}; {see}"
    if hang:
        return f"a worker failed: {hang.partition(';')[0]}; {see}"
    if not workers and (helper := _HELPER.search(text)):
        return "a process of the run failed: {} (pid {} on {}) was killed or crashed; {}".format(*helper.groups(), see)
    return f"a worker failed: {cause(workers or [text.strip()])}; {see}"


def is_permanent(error: Exception) -> bool:
    """Whether workers have failed with an error that occurs again at every attempt (`CannotRun`)."""
    failures = getattr(error, "worker_failures", None) or {}
    return bool(_PERMANENT.search("\n".join([str(error), *map(str, failures.values())])))


def cause(workers: list[str]) -> str:
    """The cause of a failure: the worker that died or reported an error, not those that only lost the connection to it.

    `workers`: Ray Train's report about each worker.
    """
    if found := _PERMANENT.search("\n".join(workers)):
        return found[1].strip()
    if wanting := memory("\n".join(workers)):
        return wanting
    failure = min(workers, key=lambda each: bool(_ECHOES.search(each)))
    who = _WHO.search(failure)
    worker = "worker {2} (pid {1} on {0})".format(*who.groups()) if who else "its process"
    if broken := next((found for each in workers if (found := _HARDWARE.search(each))), None):
        owner = next((found for each in workers if broken[0] in each and (found := _WHO.search(each))), None)
        place = "worker {2} (pid {1} on {0})".format(*owner.groups()) if owner else "a worker"
        return f"the GPU of {place} failed ({broken[0].strip()}); if it happens again on this node, take the node out"
    if "node has died" in failure:
        return f"the node of {worker} was lost"
    if _GONE.search(failure):
        return f"{worker} was killed or crashed (the system log shows whether it ran out of memory)"
    if who and "health check" in failure:
        return f"{worker} does not respond"
    if _ECHOES.search(failure):
        return "a worker has lost its connection to another one, whose process or node has died"
    return (failure.strip().splitlines() or ["no message"])[-1]


def memory(text: str) -> str | None:
    """The process that ran out of memory, if this is the error."""
    if found := _MONITOR.search(text):
        host, used, whole = found.groups()
        largest = ", ".join(f"{name.strip()} {size} GB" for _, size, name in _LARGEST.findall(text)[:3])
        return f"{host} ran out of memory ({used} of {whole} GB in use; the largest: {largest})"
    found = _ALLOCATORS.search(text)
    return f"a worker ran out of memory ({found[0]})" if found else None


def disk_full(folder: str) -> str:
    return f"{folder}: the disk is full; free space, then continue with --resume"


def ray_logs() -> str:
    """The log folder of Ray and of its processes (DeepSpeed, torch, transformers) on each node."""
    context = ray.get_runtime_context()
    return str(Path(context.get_temp_dir(), context.get_session_name(), "logs"))
