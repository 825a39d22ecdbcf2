"""What the serving benchmarks have in common: the requests, and everybody who answers them."""

from __future__ import annotations

import queue
import random
from collections.abc import Sequence
from typing import Any

import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from ptuning.inference.sampling import Token
from ptuning.inference.transformers_engine import TransformersEngine
from ptuning.inference.types import EngineConfig, Request
from ptuning.model.base import Base, find_base
from ptuning.settings.model import ModelConfig

CLIENTS, REQUESTS, ROUNDS, LENGTH = 16, 64, 5, 20
Answers = list[list[int]]
Asked = tuple[int, list[int], int]
"""The number of the soft prompt, the text's ids, and how many tokens to answer."""


class Bench:
    """The builtin base or another one, four soft prompts on rows of its vocabulary, and requests of mixed lengths."""

    def __init__(self, length: int = LENGTH, path: str = "builtin") -> None:
        self.base: Base = find_base(ModelConfig(path=path))
        embed = self.load().get_input_embeddings()
        draw = random.Random(0)

        def rows(count: int) -> Tensor:
            ids = torch.tensor([draw.randrange(10, self.base.vocabulary) for _ in range(count)])
            return embed(ids).detach()

        self.soft_prompts = [rows(length) for _ in range(4)]
        self.rows = rows
        self.requests: list[Asked] = [
            (at % 4, [draw.randrange(10, self.base.vocabulary) for _ in range(draw.randint(10, 40))], draw.randint(4, 32))
            for at in range(REQUESTS)
        ]

    def load(self) -> PreTrainedModel:
        return self.base.load(torch.float32)

    def engine(self, **config: Any) -> TransformersEngine:
        end = int(self.base.tokenizer.eos_token_id)
        return TransformersEngine(self.load(), end, EngineConfig(context=self.base.context, running=32, **config))


def drive(engine: TransformersEngine, requests: list[Request], clients: int) -> Answers:
    """Answers of all requests, `clients` at a time."""
    done: queue.SimpleQueue[None] = queue.SimpleQueue()
    answers: Answers = [[] for _ in requests]
    waiting = iter(enumerate(requests))

    def ask() -> None:
        for at, request in waiting:

            def deliver(event: Token | Any, at: int = at) -> None:
                if isinstance(event, Token):
                    answers[at].append(event.id)
                else:
                    done.put(None)

            engine.submit(request, deliver)
            return

    for _ in range(clients):
        ask()
    for _ in requests:
        done.get()
        ask()
    return answers


class Peft:
    """PEFT's `generate`, which answers with one soft prompt at a time: request by request."""

    def __init__(self, bench: Bench) -> None:
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, token_dim=bench.base.width, num_layers=1)
        self._model: Any = None
        for at, vectors in enumerate(bench.soft_prompts):
            if self._model is None:
                self._model = get_peft_model(bench.load(), config, adapter_name=str(at))
            else:
                self._model.add_adapter(str(at), config)
            with torch.no_grad():
                self._model.prompt_encoder[str(at)].embedding.weight.copy_(vectors)
        self._model.eval()
        self._model.base_model.generation_config.eos_token_id = None

    @torch.no_grad()
    def __call__(self, requests: Sequence[Asked]) -> Answers:
        answers = []
        for who, ids, new in requests:
            self._model.set_adapter(str(who))
            row = torch.tensor([ids])
            out = self._model.generate(
                input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=new, do_sample=False, pad_token_id=0
            )
            answers.append(out[0, len(ids) :].tolist())
        return answers


class Static:
    """Left-padded batches of embedded soft prompts and texts, each generated to the longest answer in it."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._model: Any = bench.load()
        self._model.generation_config.eos_token_id = None

    @torch.no_grad()
    def __call__(self, requests: Sequence[Asked]) -> Answers:
        answers: Answers = []
        embed = self._model.get_input_embeddings()
        for start in range(0, len(requests), CLIENTS):
            batch = requests[start : start + CLIENTS]
            rows = [torch.cat([self._bench.soft_prompts[who], embed(torch.tensor(ids))]) for who, ids, _ in batch]
            longest = max(map(len, rows))
            padded = torch.stack([torch.cat([row.new_zeros(longest - len(row), row.shape[1]), row]) for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            most = max(new for _, _, new in batch)
            out = self._model.generate(
                inputs_embeds=padded, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=0
            )
            answers += [row[:new].tolist() for row, (_, _, new) in zip(out, batch, strict=True)]
        return answers
