import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from server import KEY, TOKENIZER, URL, report

with tempfile.TemporaryDirectory() as folder:
    command = [str(Path(sys.executable).parent / "aiperf"), "profile", "--model", "raw", "--url", URL.removesuffix("/v1")]
    command += [
        "--endpoint-type",
        "completions",
        "--streaming",
        "--tokenizer",
        TOKENIZER,
        "--api-key",
        KEY,
        "--concurrency",
        "4",
    ]
    command += ["--benchmark-duration", os.environ.get("CLIENT_SECONDS", "30"), "--synthetic-input-tokens-mean", "32"]
    command += [
        "--output-tokens-mean",
        "16",
        "--extra-inputs",
        "ignore_eos:true",
        "--ui-type",
        "none",
        "--artifact-dir",
        folder,
    ]
    # Offline, it takes a folder for a name on the Hub (0.13).
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(command, env=online, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(next(Path(folder).rglob("profile_export_aiperf.json")).read_text())
errors, many = found.get("error_request_count"), found["request_count"]["avg"]
assert not errors or not errors["avg"], errors
assert many > 10, many
report("aiperf", f"{many:.0f} requests, 0 errors")
