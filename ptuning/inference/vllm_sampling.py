"""What vLLM's workers do with logits beyond vLLM's own: penalties that do not count virtual tokens, texts that are given, JSON
of a schema, and log-probabilities of single tokens beside those of the likeliest.

vLLM (0.29) counts the ids of a prompt among its logits to penalise them. The ids of a soft prompt lie beyond the logits, which
ends the engine. So its own penalties are never used, for any request.

Shapes: B requests of a step, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.sampler import Sampler

from ptuning.inference.grammar import GrammarCompiler, Matcher
from ptuning.inference.vllm_requests import ENDS, FREQUENCY, GIVEN, PRESENCE, REPETITION, SCHEMA, TOKENIZER


@dataclass
class _Row:
    """What changes the logits of a request. `made` grows with its answer."""

    arguments: dict[str, Any]
    text: Sequence[int]
    made: list[int]
    matcher: Matcher | None = None
    """What restricts the answer, and how many tokens of it it has seen."""
    seen: int = 0

    def change(self, logits: Tensor) -> None:
        """Logits `[V]`, in place."""
        given = self.arguments.get(GIVEN)
        if given is not None:
            token = given[min(len(self.made), len(given) - 1)]
            logits.fill_(-math.inf)
            logits[token] = 0.0
            return

        def at(ids: Sequence[int]) -> Tensor:
            return torch.tensor(ids, dtype=torch.long, device=logits.device)

        counts = Counter(token for token in self.made if token >= 0)
        repetition = self.arguments.get(REPETITION, 1.0)
        if repetition != 1:
            seen = at(sorted({*(token for token in self.text if token < len(logits)), *counts}))
            found = logits[seen]
            logits[seen] = torch.where(found > 0, found / repetition, found * repetition)
        if counts:
            times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
            logits[at(list(counts))] -= self.arguments.get(FREQUENCY, 0.0) * times + self.arguments.get(PRESENCE, 0.0)
        if self.matcher:
            for token in self.made[self.seen :]:
                self.matcher.accept(token)
            self.seen = len(self.made)
            logits.copy_(self.matcher.restricted(logits))


class ChangedLogits(LogitsProcessor):
    """Changes the logits of the requests that ask for it in their `extra_args`."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Row] = {}
        self._tokenizer = str((vllm_config.additional_config or {}).get(TOKENIZER))
        self._vocabulary = int(vllm_config.model_config.get_vocab_size())
        self._grammars: GrammarCompiler | None = None

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        def row(params: SamplingParams, text: list[int] | None, made: list[int]) -> _Row | None:
            if not params.extra_args:
                return None
            return _Row(params.extra_args, text or (), made, self._matcher(params.extra_args))

        process_dict_updates(self._rows, batch_update, row)

    def _matcher(self, arguments: dict[str, Any]) -> Matcher | None:
        if SCHEMA not in arguments:
            return None
        if self._grammars is None:
            tokenizer = AutoTokenizer.from_pretrained(self._tokenizer, local_files_only=True)
            self._grammars = GrammarCompiler(tokenizer, self._vocabulary)
        return self._grammars.compile(json.loads(arguments[SCHEMA]), arguments[ENDS]).start()

    def apply(self, logits: Tensor) -> Tensor:
        for place, row in self._rows.items():
            row.change(logits[place])
        return logits


class _Rewindable(torch.Generator):
    """A generator on the CPU that can take back its last draw. vLLM (0.29) asks for that, by the offset that generators on GPUs
    have, for every request whose prompt is computed in several steps; without an offset, this ends the engine."""

    before: Tensor

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        return self.set_state(self.before)


class PerRequestSampler(Sampler):
    """vLLM's sampler, with the log-probabilities that each request asks for.

    vLLM (0.29) reports for all requests of a step either the likeliest tokens or the tokens that are named: beside a request
    that names tokens, all others would get no likely ones.
    """

    def forward(self, logits: Tensor, sampling_metadata: Any, *arguments: Any, **options: Any) -> Any:
        self.most = sampling_metadata.max_num_logprobs
        if logits.device.type == "cpu":
            for row, generator in sampling_metadata.generators.items():
                if not isinstance(generator, _Rewindable):
                    sampling_metadata.generators[row] = _Rewindable().set_state(generator.get_state())
                sampling_metadata.generators[row].before = sampling_metadata.generators[row].get_state()
        return super().forward(logits, sampling_metadata, *arguments, **options)

    def gather_specific_token_logprobs(self, logprobs: Tensor, named: dict[int, list[int]], sampled: Tensor) -> Any:
        """Log-probabilities `[B, V]` -> for each row its named tokens, or else its likeliest ones."""
        special = super().gather_specific_token_logprobs(logprobs, named, sampled)
        if special is None or not self.most:
            return special
        likely = self.gather_logprobs(logprobs, self.most, token_ids=sampled)
        width = max(special.logprobs.shape[1], likely.logprobs.shape[1])
        rows = torch.zeros(len(logprobs), 1, dtype=torch.bool)
        rows[list(named)] = True
        rows = rows.to(logprobs.device)

        def either(name: str, filler: float) -> Tensor:
            ours, theirs = (
                nn.functional.pad(getattr(each, name), (0, width - each.logprobs.shape[1]), value=filler)
                for each in (special, likely)
            )
            return torch.where(rows, ours, theirs)

        return LogprobsTensors(
            logprob_token_ids=either("logprob_token_ids", 0),
            logprobs=either("logprobs", -math.inf),
            selected_token_ranks=special.selected_token_ranks,
        )
