"""What a step costs on an accelerator: kernels and waits of the host, counted on the pretended one."""

from __future__ import annotations

import queue
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_base

from ptuning.inference.sampling import Sampling, Token
from ptuning.inference.transformers_engine import TransformersEngine
from ptuning.inference.types import End, EngineConfig, Request
from ptuning.model.base import Base
from ptuning.model.prompted_model import PromptedModel
from ptuning.training import loop
from ptuning.training.messages import Event, StartRun
from support.accelerator import DEVICE, counting
from support.training import Run, experiment


def llama(base: Base, layers: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    return tiny_base("llama_tied_gqa", vocab_size=base.config.vocab_size, num_hidden_layers=layers, attention=None).to(dtype)


def training_step(
    base: Base, task: SimpleNamespace, folder: Path, device: Any, *, layers: int, slots: int, rows: int, **changes: Any
) -> Counter[str]:
    """A step in the middle of a run."""
    run = Run(PromptedModel(llama(base, layers).to(device)), base, folder, slots)
    events: list[Event] = []
    for number in range(slots):
        settings = experiment(task, name=f"slot{number}", train__batch_size=rows, **changes)
        run.pack.attach(StartRun(settings, str(folder / f"slot{number}")))
    for _ in range(2):
        loop.step(run.pack, events.append)
    with counting() as counts:
        loop.step(run.pack, events.append)
    assert [event.kind for event in events[-slots:]] == ["step"] * slots
    return counts


def decoding_step(base: Base, device: Any, *, layers: int, requests: int, sampling: Sampling) -> Counter[str]:
    """A step in which all requests generate a token: what generating more tokens costs in addition."""
    found = []
    config = EngineConfig(running=requests, batch_tokens=256, cache_bytes=1 << 20, context=128)
    engine = TransformersEngine(llama(base, layers).to(device), 2, config)
    try:
        for new in (4, 8):
            sinks: list[queue.SimpleQueue[Token | End]] = []
            with engine.paused():
                for row in range(requests):
                    sinks.append(queue.SimpleQueue())
                    engine.submit(Request([5 + row, 6, 7, 8 + new], None, new, sampling, True), sinks[-1].put)
                tally = counting()
                counts = tally.__enter__()
            for sink in sinks:
                while isinstance(event := sink.get(timeout=60), Token):
                    pass
                assert event.reason == "length", event
            with engine.paused():
                tally.__exit__(None, None, None)
            found.append((Counter(counts), Counter(DEVICE.places)))
    finally:
        engine.close()
    whole, places = Counter(found[1][0]), Counter(found[1][1])
    whole.subtract(found[0][0])
    places.subtract(found[0][1])
    DEVICE.places = Counter({key: many / 4 for key, many in places.items()})
    return Counter({kind: many / 4 for kind, many in whole.items()})


WAITING = ("waits", "to host", "to device")


def waits(counts: Counter[str]) -> int:
    return sum(counts[kind] for kind in WAITING)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_step_of_training_costs_the_same_for_any_slots_and_rows(
    optimizer: str, base: Base, toy_task: SimpleNamespace, tmp_path: Path, device: torch.device
) -> None:
    """At most 130 kernels a layer and 150 others, and one wait, for the results. With calls per slot there were 102 + 44 K,
    67 + 21 K and 3 K + 2 waits, and 4 K L + 6 + 2 K copies that waited."""
    found = {}
    for layers, slots, rows in ((2, 1, 8), (3, 1, 8), (2, 3, 16)):
        found[layers, slots] = training_step(
            base,
            toy_task,
            tmp_path / f"{layers} {slots}",
            device,
            layers=layers,
            slots=slots,
            rows=rows,
            train__optimizer=optimizer,
        )
        counts = found[layers, slots]
        assert counts["kernels"] <= 130 * layers + 150, DEVICE.places
        assert waits(counts) == 1 and counts["sent"] == 1, DEVICE.places
    assert found[2, 1] == found[2, 3]


SAMPLINGS = {"greedy": Sampling(), "top_p with log-probabilities": Sampling(1.0, 0.9, seed=0, top=2)}


@pytest.mark.parametrize(
    "sampling",
    [pytest.param(SAMPLINGS[name], id=name, marks=[pytest.mark.nightly] * (name == "greedy")) for name in SAMPLINGS],
)
def test_a_step_of_generation_costs_the_same_for_any_requests(sampling: Sampling, base: Base, device: torch.device) -> None:
    """Three waits: for transformers' mask of packed rows, for the tokens with their log-probabilities, and for the tokens that
    transformers reads again. With calls per request there were 3.5 L R more kernels, and 2 L + 4 waits, or 3 R more with
    log-probabilities."""
    few, many = (decoding_step(base, device, layers=2, requests=requests, sampling=sampling) for requests in (2, 6))
    ours = [key for key in DEVICE.places if key[0] in WAITING and "/" in key[1]]
    assert few["kernels"] == many["kernels"] <= 40 * 2 + 90
    assert few["waits"] + few["to host"] == many["waits"] + many["to host"] == 3, DEVICE.places
    assert len(ours) == 1 and many["sent"] == 1  # transformers itself sends its inputs in 7 copies that wait
