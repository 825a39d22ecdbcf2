import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from server import KEY, TOKENIZER, URL, report

with tempfile.TemporaryDirectory() as folder:
    target = URL.removesuffix("/v1")
    out = Path(folder) / "result.json"
    command = [str(Path(sys.executable).parent / "guidellm"), "benchmark", "run", "--target", target, "--model", "raw"]
    command += [
        "--processor",
        TOKENIZER,
        "--data",
        "prompt_tokens=32,output_tokens=16",
        "--profile",
        "concurrent",
        "--rate",
        "4",
    ]
    command += ["--max-seconds", os.environ.get("CLIENT_SECONDS", "30"), "--output-path", str(out)]
    command += ["--backend-kwargs", json.dumps({"api_key": KEY})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (benchmark,) = json.loads(out.read_text())["benchmarks"]
    totals = benchmark.get("metrics", benchmark)["request_totals"]
assert totals["errored"] == 0 and totals["successful"] > 10, totals
report("guidellm", f"{totals['successful']} requests, 0 errors")
