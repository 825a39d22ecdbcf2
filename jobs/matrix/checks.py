"""The checks of one base, one function per column of the matrix. Only public functions of the package are used.

A check ends in one of four ways: it is right; it was refused with a sentence (`UserError`); it raised anything else; or its
numbers differ from those of plain transformers without a word, which raises `Wrong`.
"""

from __future__ import annotations

import itertools
import logging
import queue
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AutoTokenizer

from matrix.bases import load_plain
from matrix.reference import TIE, Reference
from matrix.shrink import CONTEXT, VOCABULARY
from matrix.subject import GRADIENT, LABELS, LOGITS, LOSS, NEW, Subject, Wrong, distance, far, first_line, ids, row
from ptuning.data.encoder import Encoder
from ptuning.errors import UserError
from ptuning.inference.transformers_engine import TransformersEngine
from ptuning.inference.types import End, EngineConfig, Request
from ptuning.model.packing import Row, pack_labels, pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.soft_prompt import Card, SoftPrompt, content_hash
from ptuning.planning.meta_model import MetaModel, read_config
from ptuning.planning.workload import Workload
from ptuning.registry.merged_export import write_merged
from ptuning.settings.data import Template
from ptuning.training.generation import Greedy


def accepted(subject: Subject) -> None:
    """`find_base`; what is not causal must not be accepted, and the width is the embedding's."""
    base = subject.base
    if not subject.reference.is_causal():
        subject.trained()  # refused once it is loaded, before its first step
        raise Wrong("accepted, but a token depends on later tokens")
    if base.width != subject.reference.width:
        raise Wrong(f"its width is reported as {base.width}, its embedding has {subject.reference.width}")


def train(subject: Subject) -> None:
    """Losses and gradients of soft prompts in several slots, and label probabilities, against one row at a time."""
    model = subject.trained()
    if not subject.reference.is_causal():
        raise Wrong("a token depends on later tokens")
    rows = [[row(3, 2, 1), row(20, 5, 2), row(30, 4, 3)], [row(9, 1, 4), row(15, 3, 5)]]
    for lengths in ((6, 3), (1, 20), (0, 12)):
        _compare_losses(subject, model, lengths, rows)
    inputs = [[source for source, _ in batch] for batch in rows]
    prompts = [subject.soft_prompt(length) for length in (5, 0)]
    with torch.no_grad():
        edges = model(prompts, pack_labels([5, 0], inputs, LABELS)).view(-1, len(LABELS.edges))
    got = LABELS.label_logprobs(-edges)

    def difference(reference: Reference) -> str:
        pairs = [(prompt, source) for prompt, sources in zip(prompts, inputs, strict=True) for source in sources]
        expected = torch.stack([reference.label_logprobs(prompt, source, LABELS) for prompt, source in pairs])
        return far("labels", got, expected, LOSS)

    subject.against(difference)


def recompute(subject: Subject) -> None:
    """The same gradients with gradient checkpointing."""
    model = subject.trained()
    rows = [[row(9, 2, 1), row(20, 5, 2)]]
    model.checkpoint_gradients()
    _compare_losses(subject, model, (6,), rows)


def long(subject: Subject) -> None:
    """Rows of more than 128 tokens, or as long as the base takes."""
    most = subject.base.context - 6 - 5
    rows = [[row(min(145, most), 5, 1), row(12, 2, 2)], [row(min(190, most), 5, 3)]]
    _compare_losses(subject, subject.trained(), (6, 3), rows)


def text(subject: Subject) -> None:
    """Greedy text of an evaluation: rows of one length, and rows of several lengths in one batch."""
    model, vectors = subject.trained(), subject.soft_prompt(6)
    encoder = Encoder(Template(input="{text}", target="{text}"), subject.base.tokenizer, CONTEXT)
    for name, lengths in (("", (9,)), ("padded rows: ", (4, 11, 23))):
        inputs = [ids(length, length) for length in lengths]
        got = Greedy(model, encoder, NEW).texts(vectors, inputs)

        def difference(reference: Reference, inputs: list[list[int]] = inputs, got: list[str] = got, name: str = name) -> str:
            for source, found in zip(inputs, got, strict=True):
                tokens, lead = reference.greedy(vectors, source, NEW)
                expected = str(encoder.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
                if found != expected and lead > TIE:
                    return f"{name}{len(source)} tokens: {found!r} instead of {expected!r}"
            return ""

        subject.against(difference)


def serve(subject: Subject) -> None:
    """Greedy tokens of an engine, alone and in one batch, and label choice."""
    base = subject.base.load(torch.float32)
    prompts = {length: subject.soft_prompt(length) for length in (1, 20, 33)}
    with _errors() as errors, _engine(base, subject.base.tokenizer.eos_token_id) as engine:
        subject.facts["engine"] = engine.kind
        handles = {length: engine.add(vectors, content_hash(vectors)) for length, vectors in prompts.items()}
        alone: list[list[int]] = []
        requests = [(length, ids(size, size)) for length, size in itertools.product(prompts, (5, 26))]
        for length, source in requests:
            alone.append(_alone(engine, Request(source, handles[length], NEW), errors))
            _answers(subject, prompts[length], source, alone[-1], "alone")
        together = _together(engine, [Request(source, handles[length], NEW) for length, source in requests], errors)
        for (length, source), got, before in zip(requests, together, alone, strict=True):
            if got != before:
                _answers(subject, prompts[length], source, got, "in a batch")
        sources = [ids(7, 1), ids(21, 2)]
        scores = torch.tensor(engine.choose(handles[20], sources, LABELS).result(60))

        def difference(reference: Reference) -> str:
            expected = [reference.label_logprobs(prompts[20], source, LABELS) for source in sources]
            return far("labels", scores, torch.stack(expected), LOSS)

        subject.against(difference)


def export(subject: Subject) -> None:
    """A merged checkpoint, loaded again by plain transformers: ids of the virtual tokens in place of the soft prompt."""
    vectors = subject.soft_prompt(5)
    card = Card(
        name="matrix", base=str(subject.folder), length=len(vectors), width=vectors.shape[1], content_hash=content_hash(vectors)
    )
    folder = subject.work / "merged"
    write_merged(SoftPrompt(vectors, card), subject.base, "matrix", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    virtual = [int(tokenizer.get_vocab()[f"<|matrix:{place}|>"]) for place in range(len(vectors))]
    try:
        merged = Reference(load_plain(folder))
    except Exception as error:
        raise Wrong(f"the export cannot be loaded ({first_line(error)})") from error
    nothing = torch.zeros(0, vectors.shape[1])
    for source in (ids(9, 1), ids(30, 2)):
        with torch.no_grad():
            logits = merged.logits(nothing, [*virtual, *source])[len(vectors) :]
        got = logits[:, :VOCABULARY]

        def difference(reference: Reference, source: list[int] = source, got: Tensor = got) -> str:
            with torch.no_grad():
                expected = reference.logits(vectors, source)[len(vectors) :, :VOCABULARY]
            return far("logits", got, expected, LOGITS * float(expected.std()), relative=False)

        subject.against(difference)
        if int(logits[-1].argmax()) in virtual:
            raise Wrong("the most likely token of the export is a virtual token")


def plan(subject: Subject) -> None:
    """The passes on the meta device, in both dtypes, and the number of parameters."""
    config = read_config(subject.folder)
    failures: list[tuple[str, Exception]] = []
    for dtype in (torch.float32, torch.bfloat16):
        try:
            _plan(subject, MetaModel(config, dtype))
        except Wrong:
            raise
        except Exception as error:
            failures.append((str(dtype).removeprefix("torch."), error))
    if len(failures) == 1:
        subject.facts["planned"] = "bfloat16 only" if failures[0][0] == "float32" else "float32 only"
    if failures:
        raise failures[0][1]


def _plan(subject: Subject, model: MetaModel) -> None:
    for timeline in (model.training(Workload(2, 5, 4, 12, 3)), model.evaluation(Workload(2, 5, 4, 12, 3, 4))):
        if not timeline.moments:
            raise Wrong("the plan has no moments")
    whole = sum(parameter.numel() for parameter in subject.reference.model.parameters())
    parameters = subject.base.numbers if subject.base.notes else whole
    if model.shape.numbers != parameters:
        raise Wrong(f"planned with {model.shape.numbers:,} parameters instead of {parameters:,}")


def sharded(subject: Subject) -> None:
    """ZeRO-3 with two processes: the gradients of one."""
    from matrix.sharded import gradients_of_two

    prompts = [subject.soft_prompt(length) for length in (5, 3)]
    rows = [[row(9, 2, 1), row(4, 5, 2), row(17, 3, 3), row(6, 1, 4)], [row(8, 2, 5), row(12, 4, 6)]]
    got = gradients_of_two(subject.folder, prompts, rows, subject.work)

    def difference(reference: Reference) -> str:
        for k, (prompt, batch) in enumerate(zip(prompts, rows, strict=True)):
            vectors = prompt.clone().requires_grad_()
            (expected,) = torch.autograd.grad(
                torch.cat([reference.nll(vectors, example) for example in batch]).sum(), [vectors]
            )
            error = distance(got[k], expected)
            if not error <= GRADIENT:
                return f"gradient of slot {k} differs by {error:.1e}"
        return ""

    subject.against(difference)


COLUMNS: dict[str, Callable[[Subject], None]] = {
    "accepted": accepted,
    "train": train,
    "recompute": recompute,
    "long": long,
    "text": text,
    "serve": serve,
    "export": export,
    "plan": plan,
    "zero": sharded,
}
"""The checks by the name of their column. Without `accepted` nothing else is tried."""

SECONDS = {
    "accepted": 60,
    "train": 120,
    "recompute": 60,
    "long": 60,
    "text": 60,
    "serve": 120,
    "export": 180,
    "plan": 90,
    "zero": 120,
}
"""Time limit of each check."""


# Helpers -------------------------------------------------------------------------------------------------------------


def _compare_losses(subject: Subject, model: PromptedModel, lengths: Sequence[int], rows: Sequence[Sequence[Row]]) -> None:
    prompts = [subject.soft_prompt(length, seed).requires_grad_() for seed, length in enumerate(lengths)]
    trained = [prompt for prompt in prompts if len(prompt)]
    got = model(prompts, pack_targets(lengths, rows))
    gradients = torch.autograd.grad(got.sum(), trained)

    def difference(reference: Reference) -> str:
        pairs = [(prompt, example) for prompt, batch in zip(prompts, rows, strict=True) for example in batch]
        expected = torch.cat([reference.nll(prompt, example) for prompt, example in pairs])
        apart = far("loss", got.detach(), expected.detach(), LOSS)
        if apart:
            return f"{apart}, soft prompts of {tuple(lengths)}"
        for mine, theirs in zip(gradients, torch.autograd.grad(expected.sum(), trained), strict=True):
            error = distance(mine, theirs)
            subject.facts["gradient"] = max(error, float(str(subject.facts.get("gradient", 0.0))))
            if not error <= GRADIENT:
                return f"gradient differs by {error:.1e}"
        return ""

    subject.against(difference)


@contextmanager
def _engine(base: object, end: int) -> Iterator[TransformersEngine]:
    config = EngineConfig(running=6, waiting=40, batch_tokens=48, cache_bytes=1 << 22, context=CONTEXT)
    engine = TransformersEngine(base, end, config)  # type: ignore[arg-type]
    try:
        yield engine
    finally:
        engine.close()


class _Kept(logging.Handler):
    """Keeps the errors that the package logs: an engine's answer names only the log."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def _errors() -> Iterator[list[str]]:
    handler, logger = _Kept(), logging.getLogger("ptuning")
    logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)


def _alone(engine: TransformersEngine, request: Request, errors: Sequence[str]) -> list[int]:
    events = list(engine.generate(request))
    return _tokens(events, errors)


def _together(engine: TransformersEngine, requests: Sequence[Request], errors: Sequence[str]) -> list[list[int]]:
    sinks: list[queue.SimpleQueue[object]] = [queue.SimpleQueue() for _ in requests]
    for request, sink in zip(requests, sinks, strict=True):
        engine.submit(request, sink.put)
    found = []
    for sink in sinks:
        events = [sink.get(timeout=60)]
        while not isinstance(events[-1], End):
            events.append(sink.get(timeout=60))
        found.append(_tokens(events, errors))
    return found


def _tokens(events: Sequence[object], errors: Sequence[str]) -> list[int]:
    end = events[-1]
    if not isinstance(end, End) or end.reason not in ("stop", "length"):
        raise RuntimeError(re.sub(r"^request \w+ failed: ", "", errors[0]) if errors else str(end))
    return [int(getattr(event, "id")) for event in events[:-1]]  # noqa: B009  # a `Token`


def _answers(subject: Subject, vectors: Tensor, source: list[int], got: list[int], how: str) -> None:
    def difference(reference: Reference) -> str:
        found = reference.disagreement(vectors, source, got, NEW)
        return found and f"{how}, {len(vectors)} + {len(source)} tokens: {found}"

    subject.against(difference)


def judged(check: Callable[[Subject], None], subject: Subject) -> dict[str, str]:
    """The result of a check: `ok`, `no` with its sentence, `error` with type and first line, or `wrong` with the difference."""
    try:
        check(subject)
    except UserError as error:
        return {"result": "no", "detail": str(error).replace(str(subject.folder), "BASE")}
    except Wrong as error:
        return {"result": "wrong", "detail": str(error)}
    except Exception as error:
        return {"result": "error", "detail": first_line(error).replace(str(subject.folder), "BASE")}
    return {"result": "ok", "detail": ""}
