"""Whether a device computes what the CPU computes: predictions, gradients, labels, generated ids, a resumed optimiser."""

from __future__ import annotations

import argparse
import queue
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.steps import difference
from ptuning.inference.sampling import Token
from ptuning.inference.transformers_engine import TransformersEngine
from ptuning.inference.types import End, EngineConfig, Request
from ptuning.model.label_trie import LabelTrie
from ptuning.model.packing import Objective, pack_labels, pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.transfer import moved
from ptuning.settings.training import TrainConfig
from ptuning.training import checkpoint
from ptuning.training.optimizer import Together
from ptuning.training.starts import Start

TRIE = LabelTrie(((5, 6, 2), (5, 7, 2), (8, 2)))
SMALL_CONFIG = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
SHAPES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"num_key_value_heads": 2, "intermediate_size": 64},
    "Gemma2Config": {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8, "sliding_window": 4},
    "GPT2Config": {},
}
"""Architectures whose passes are compared: grouped queries, windows and capped scores, learned positions."""


def tiny(name: str, device: str) -> PreTrainedModel:
    """A random base; the same weights on every device."""
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SMALL_CONFIG, **SHAPES[name])
    return AutoModelForCausalLM.from_config(config).eval().to(device)


def right_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """The device against the CPU in float32: predictions and gradients, labels, generated ids, and a resumed optimiser."""
    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, Any] = {}
    rows = [[([5, 6, 7, 9], [5, 6, 2]), ([8] * 11, [8, 2])], [([11, 12], [5, 7, 2])]]
    for name in SHAPES:
        results = []
        for device in ("cpu", arguments.device):
            model = PromptedModel(tiny(name, device))
            generator = torch.Generator().manual_seed(0)
            vectors = [(torch.randn(many, 32, generator=generator) * 0.3).to(device).requires_grad_() for many in (3, 6)]
            nll = model(vectors, pack_targets([3, 6], rows, [Objective(TRIE)] * 2))
            gradients = torch.autograd.grad(nll.sum(), vectors)
            with torch.no_grad():
                labels = model(vectors, pack_labels([3, 6], [[[5, 6, 9], [7]], [[10] * 9]], TRIE))
            results.append([each.detach().cpu() for each in (nll, labels, torch.cat(gradients))])
        apart = [difference(there, here) for here, there in zip(*results, strict=True)]
        answers = [generated(tiny(name, device)) for device in ("cpu", arguments.device)]
        found[name] = {
            "nll": apart[0],
            "labels": apart[1],
            "gradients": apart[2],
            "ids_equal": answers[0] == answers[1],
            "right": max(apart[:2]) < 1e-5 and apart[2] < 1e-4 and answers[0] == answers[1],
        }
    found["resumed"] = {optimizer: resumed(optimizer, arguments.device) for optimizer in ("adamw", "adafactor")}
    return found


def generated(base: PreTrainedModel) -> list[list[int]]:
    """Greedy ids of several requests that run together."""
    engine = TransformersEngine(base, 2, EngineConfig(cache_bytes=1 << 20, context=128))
    try:
        handle = engine.add(torch.full((5, 32), 0.1), "a")
        return run_requests(engine, [Request([5 + row, 6, 7], handle, 6) for row in range(4)])[0]
    finally:
        engine.close()


def run_requests(engine: TransformersEngine, requests: list[Request]) -> tuple[list[list[int]], float]:
    """The ids of all requests, and the seconds until the last one has ended."""
    sinks: list[queue.SimpleQueue[Token | End]] = [queue.SimpleQueue() for _ in requests]
    began = time.perf_counter()
    for request, sink in zip(requests, sinks, strict=True):
        engine.submit(request, sink.put)
    answers = []
    for sink in sinks:
        ids = []
        while isinstance(event := sink.get(timeout=120), Token):
            ids.append(event.id)
        assert event.reason in ("stop", "length"), event
        answers.append(ids)
    return answers, time.perf_counter() - began


def resumed(optimizer: Any, device: str) -> bool:
    """Whether a start that is written after two steps and read again ends as one that was not interrupted."""
    config = TrainConfig(optimizer=optimizer)
    gradients = [torch.randn(4, 32, generator=torch.Generator().manual_seed(step)).to(device) for step in range(4)]
    whole, part, again = (Start(0, torch.ones(4, 32, device=device), config) for _ in range(3))
    _updated(whole, gradients)
    _updated(part, gradients[:2])
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(folder, 2, *part.state())
        saved = checkpoint.newest(folder)
        assert saved is not None
        again.restore(*saved)
    _updated(again, gradients[2:])
    return torch.equal(whole.vectors, again.vectors)


def _updated(start: Start, gradients: Sequence[Tensor]) -> None:
    together = Together([start])
    for gradient in gradients:
        numbers = moved(together.numbers([start.updates + 1], [0.1]), gradient.device)
        together.update([gradient], numbers)
