"""Engines over tiny bases, and what they must answer: for the cases of all engines, and for those of one of them."""

from __future__ import annotations

import queue
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from conftest import tiny_base
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptuning.inference.engine import Engine
from ptuning.inference.sampling import SamplerState, Token
from ptuning.inference.transformers_engine import TransformersEngine
from ptuning.inference.types import End, EngineConfig, Request, ResidentPrompt
from ptuning.model.base import find_base
from ptuning.settings.model import ModelConfig

END = 2
SMALL = EngineConfig(running=6, waiting=40, batch_tokens=48, cache_bytes=1 << 20, context=128)
PATIENCE = 60
"""Seconds for an answer on a busy machine."""

RANKS = {"vllm": 1, "vllm-2": 2}
"""Tensor-parallel ranks of vLLM."""
ENGINES = ("paged", "plain", *RANKS)
SHAPES = {"plain": "gpt_neo"}
PIECES = {"vocab_size": 330}
"""More than the tokenizer has, and not as many as vLLM's padded rows."""
WIDE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
"""vLLM's attention on CPUs takes no heads of fewer than 32 numbers."""


@dataclass
class World:
    """An engine, the base that it serves, and the soft prompts of a test."""

    engine: Engine
    base: PreTrainedModel
    handles: list[ResidentPrompt] = field(default_factory=list)

    @property
    def tolerance(self) -> float:
        """Of log-probabilities."""
        return 1e-4 if self.engine.kind == "vllm" else 1e-5

    def prompt(self, length: int, seed: int) -> Tensor:
        return soft_prompt(length, seed, self.base.get_input_embeddings().weight.shape[1])

    def add(self, length: int, seed: int, name: str | None = None) -> ResidentPrompt:
        """Add a soft prompt that is removed after the test."""
        self.handles.append(self.engine.add(self.prompt(length, seed), name or f"{length}-{seed}"))
        return self.handles[-1]


def open_world(kind: str, folder: Path, tokenizer: PreTrainedTokenizerBase, config: EngineConfig = SMALL) -> World:
    """A world of an engine in `ENGINES`. `folder`: an empty one, for vLLM, which loads its base itself."""
    ranks = RANKS.get(kind)
    shape, changes = SHAPES.get(kind, "llama_tied_gqa"), PIECES | (WIDE if ranks else {})
    base = tiny_base(shape, attention=None, **changes)
    if ranks:
        from ptuning.inference.vllm_engine import VllmEngine

        base.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found = find_base(ModelConfig(path=str(folder)))
        engine: Engine = VllmEngine(found, torch.float32, config, rows=256, parallel=ranks)
    else:
        engine = TransformersEngine(tiny_base(shape, attention=None, **changes), END, config)
        assert engine.kind == kind
    return World(engine, base)


def soft_prompt(length: int, seed: int, width: int = 32) -> Tensor:
    return torch.randn(length, width, generator=torch.Generator().manual_seed(seed)) * 0.3


def text(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(3, 100) for _ in range(length)]


def answer(engine: Engine, request: Request) -> list[int]:
    *tokens, end = engine.generate(request)
    assert isinstance(end, End) and end.reason in ("stop", "length"), end
    return [token.id for token in tokens]


def reference(base: PreTrainedModel, vectors: Tensor, ids: list[int], new: int) -> list[int]:
    """Plain `generate`, one request by itself."""
    embeds = torch.cat([vectors, base.get_input_embeddings()(torch.tensor(ids))])[None]
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    out = base.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=END, pad_token_id=END
    )
    return out[0].tolist()


@torch.no_grad()
def changed_reference(base: PreTrainedModel, vectors: Tensor, request: Request) -> list[int]:
    """The likeliest tokens by logits that are changed, one forward pass per token."""
    state = SamplerState(request.sampling, request.ids, request.ends)
    embeds, made = torch.cat([vectors, base.get_input_embeddings()(torch.tensor(request.ids))]), []
    while len(made) < request.max_new_tokens and not (made and made[-1] in request.ends):
        token = int(state.changed(base(inputs_embeds=embeds[None]).logits[0, -1].float()).argmax())
        state.chose(token)
        made.append(token)
        embeds = torch.cat([embeds, base.get_input_embeddings()(torch.tensor([token]))])
    return made


def send(engine: Engine, requests: list[Request], at: int, draw: random.Random) -> tuple[int, list, queue.SimpleQueue]:
    """Submit a request, and now and then cancel it at once, after its first token, or let the next one wait for that."""
    sink: queue.SimpleQueue[Token | End] = queue.SimpleQueue()
    request_id, events, fate = engine.submit(requests[at], sink.put), [], draw.random()
    if 0.2 <= fate < 0.5:
        events.append(sink.get(timeout=PATIENCE))
    if fate < 0.3:
        engine.cancel(request_id)
    return at, events, sink


def collect(event: Token | End, sink: queue.SimpleQueue) -> bool:
    """True for a token; at the end, lets the iteration over the queue end."""
    if isinstance(event, End):
        sink.put(None)
    return isinstance(event, Token)
