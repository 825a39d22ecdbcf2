import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from server import KEY, TOKENIZER, URL, report

with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "result.json"
    options = {
        "backend": f"kind=openai_http,target={URL.removesuffix('/v1')},model=raw,api_key={KEY}",
        "profile": "kind=concurrent,streams=4",
        "constraint": f"kind=max_duration,seconds={os.environ.get('CLIENT_SECONDS', '30')}",
        "data": "kind=synthetic_text,prompt_tokens=32,output_tokens=16",
        "tokenizer": f"kind=huggingface_auto,model={TOKENIZER}",
        "output": f"kind=json,path={out}",
    }
    command = [str(Path(sys.executable).parent / "guidellm"), "run", "--disable-console"]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (benchmark,) = json.loads(out.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
assert totals["errored"] == 0 and totals["successful"] > 10, totals
report("guidellm", f"{totals['successful']} requests, 0 errors")
