"""The engine for CPUs and for every architecture: transformers computes.

A soft prompt is a range of virtual token ids (`virtual_tokens`), so a request is a list of ids. transformers' continuous
batching provides paged keys and values, shared prefixes, joining and leaving at every step, and cancellation. It finds cached
pages by their ids, and ids are never reused. So the keys and values of a soft prompt are computed once and never confused with
another's, regardless of the names they are served under.

The engine extends continuous batching: `sampling` for settings per request, `paged_attention` to separate requests, and an
output router that delivers results without a queue. Labels are scored by the pass of training and evaluation (`PromptedModel`)
between two steps of generation: one pass for all labels of all waiting rows. Generation would need a request per label and a
step per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

from transformers import PreTrainedModel

from ptuning.errors import BaseError
from ptuning.inference.engine import Engine, Running
from ptuning.inference.engine_check import choose_generator, generates_right
from ptuning.inference.generator import Events, Generator
from ptuning.inference.jobs import Job
from ptuning.inference.label_scorer import LabelScorer
from ptuning.inference.sampling import SamplerState, Token
from ptuning.inference.types import EngineConfig, Load, Stats
from ptuning.inference.virtual_tokens import VirtualTokens
from ptuning.model.kv_prefix import KVShape, kv_shape
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.self_check import choose_pass
from ptuning.redaction import logger

log = logger(__name__)


class TransformersEngine(Engine):
    """Modifies the base: it replaces the input embedding and the attention.

    Raises:
        BaseError: no pass is right for this base (`model.self_check`).
        RequestError: the base does not generate with a cache what it computes without, or the cache does not fit into memory.
    """

    def __init__(self, base: PreTrainedModel, ends: int | Sequence[int], config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        vocabulary = int(base.config.get_text_config().vocab_size)
        model = PromptedModel(base)
        choose_pass(model, config.name, gradients=False)
        shape = _kv_shape(model)  # before anything of the engine is installed: the check uses transformers' own attention
        bank = VirtualTokens.install(base, vocabulary, model.needs_ids)
        super().__init__(config, vocabulary, ends, bank)
        self._states: dict[str, SamplerState] = {}
        events = Events(self._states.get, self._stepped, self._finish)
        self._generator = choose_generator(model, config, events, lambda generator: self._right(generator, model))
        if self.kind == "paged":
            bank.kv_shape = shape
        self.stats = Stats()
        self._scorer = LabelScorer(model, bank, self._generator.pause, self._scored)

    @property
    def kind(self) -> str:
        """ "paged", "plain", "single" or "recomputing"."""
        return self._generator.kind

    @property
    def longest(self) -> int:
        return self._generator.longest

    @property
    def alive(self) -> bool:
        return self._generator.alive

    @property
    def load(self) -> Load:
        states = list(self._states.copy().values())
        running = sum(state.began > 0 for state in states)
        return Load(running, len(states) - running, self._waiting_rows, self._generator.cache_used)

    def paused(self) -> AbstractContextManager[object]:
        """No step of generation runs inside, so another pass may use the base."""
        return self._generator.pause()

    def _start(self, request_id: str, running: Running) -> None:
        request = running.request
        matcher = request.grammar.start() if request.grammar else None
        state = SamplerState(request.sampling, request.ids, running.ends, matcher)
        state.on_token = partial(self._chose, request_id, running, state)
        self._states[request_id] = state
        self._generator.start(request_id, running.ids, request.max_new_tokens, running.ends)

    def _chose(self, request_id: str, running: Running, state: SamplerState, token: Token | None) -> None:
        self._told(request_id, running, token, max(0, running.length - state.computed))

    def _left(self, request_id: str, running: Running, cancel: bool) -> None:
        state = self._states.pop(request_id, None)
        running.began = state.began if state else 0.0
        if cancel:
            self._generator.cancel(request_id)

    def _compute(self, job: Job) -> None:
        self._scorer.submit(job)

    def _stop(self) -> None:
        self._scorer.close()
        self._generator.close()

    def _right(self, generator: Generator, model: PromptedModel) -> bool:
        self._generator = generator
        return generates_right(self, model)

    def _stepped(self, requests: int) -> None:
        self.stats.steps += 1
        self.stats.batched += requests


def _kv_shape(model: PromptedModel) -> KVShape | None:
    """The shape of the base's key-value prefixes; None: it cannot take any."""
    try:
        return kv_shape(model)
    except BaseError as error:
        log.debug("no key-value prefixes: %s", error)
        return None
