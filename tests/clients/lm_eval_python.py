"""A loglikelihood and a generation task of the harness's own kind, over rows that are written here: no download. The same tasks
with the model type hf, over the same base, must give the same accuracy."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from server import KEY, TOKENIZER, URL, report

RUN = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
model, arguments, folder = sys.argv[1:]
found = simple_evaluate(model=model, model_args=json.loads(arguments), tasks=["sorted_choice", "sorted_text"], batch_size=4,
                        task_manager=TaskManager(include_path=folder, include_defaults=False), bootstrap_iters=0)
found = found["results"].items()
numbers = {name: {key: each for key, each in values.items() if isinstance(each, float)} for name, values in found}
print(json.dumps(numbers))
"""
CHOICE = """
task: sorted_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Text: {{text}}\\nKind:"
doc_to_choice: [" fruit", " tool"]
doc_to_target: answer
metric_list: [{metric: acc}]
"""
TEXT = """
task: sorted_text
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "Text: {{text}}\\nKind:"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, ignore_case: true}]
"""


def evaluated(python: str, model: str, arguments: dict, folder: Path, **environment: str) -> dict:
    command = [python, "-c", RUN, model, json.dumps(arguments), str(folder)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    things = ["the old hammer", "a red apple", "the saw", "a plum", "one drill and more", "the pear", "a nail", "an old lemon"]
    rows = [{"text": text, "answer": number % 2} for number, text in enumerate(things * 3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task, text in (("choice", CHOICE), ("text", TEXT)):
        (folder / f"{task}.yaml").write_text(text.replace("FOLDER", name).lstrip())
    served = {
        "model": Path(TOKENIZER).name,
        "base_url": f"{URL}/completions",
        "tokenizer": TOKENIZER,
        "num_concurrent": 4,
        "max_retries": 1,
    }
    ours = evaluated(sys.executable, "local-completions", served, folder, OPENAI_API_KEY=KEY)
    # torch is large: the interpreter of the tests has it, and borrows the harness.
    site = next(path for path in sys.path if path.endswith("site-packages"))
    borrowed = f"import sys; sys.path.append({site!r})\n"
    RUN = borrowed + RUN
    theirs = evaluated(os.environ["CLIENT_TORCH"], "hf", {"pretrained": TOKENIZER, "dtype": "float32", "device": "cpu"}, folder)
assert ours == theirs, (ours, theirs)
report("lm-eval", "local-completions: loglikelihood and generation, as hf", f"accuracy {ours['sorted_choice']['acc,none']:.3f}")
