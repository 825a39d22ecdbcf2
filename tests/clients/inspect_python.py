import tempfile

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import get_model
from inspect_ai.scorer import includes
from server import KEY, LABELS, TEXT, URL, report

model = get_model("openai-api/ptuning/fruits", base_url=URL, api_key=KEY)
task = Task(dataset=[Sample(input=TEXT, target=label) for label in LABELS], scorer=includes())
(log,) = eval(task, model=model, display="none", log_dir=tempfile.mkdtemp())
assert log.status == "success", log.error
assert log.results.scores[0].metrics["accuracy"].value == 0.5  # one of the two is right
report("inspect-ai", "eval")
