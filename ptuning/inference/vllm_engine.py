"""The engine for GPUs: vLLM computes (0.29, the release that Ray 2.60 names).

A soft prompt is a run of ids above the vocabulary, whose rows are written into the running model (`vllm_rows`). A request is a
list of ids, as in the other engine. What vLLM does not say, and this module takes care of:

* Its cache finds pages by ids. Every request has the content hash of its soft prompt as salt, so rows can be written again for
  another one. A soft prompt is held until vLLM has let go of its last request: an abort is sent before rows are written.
* An id without a row ends the whole engine. `Engine.check_ids` refuses them before they get here.
* For logits that are not numbers it answers token 0. Every request asks for the log-probability of its tokens.
* Penalties and log-probabilities of a prompt look up its ids among the logits, which ends the engine (`vllm_sampling`).
* Without a tokenizer it knows no end of an answer: the tokens that end it are given with every request.
* Its CPU attention reads what others left in a page, and of a soft prompt that was not a number this spoils answers. So vectors
  are checked before they are written.
* If this process is killed with SIGKILL outside Ray, vLLM's processes live on.

Choosing a label takes a request for every node of the labels' trie, all at once; the cache holds what they share.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, Literal, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from ptuning.errors import UserError
from ptuning.inference.engine import STOPPED, Engine, Running, prompt_ids
from ptuning.inference.event_loop import EventLoop
from ptuning.inference.jobs import Job, LabelJob, TextJob
from ptuning.inference.reserved_rows import ReservedRows
from ptuning.inference.sampling import Sampling, Token
from ptuning.inference.types import AnswerFailed, EngineConfig, EngineStopped, Load, Request, RequestError, ResidentPrompt
from ptuning.inference.vllm_requests import (
    GIVEN,
    NAMED,
    ROWS,
    TOKENIZER,
    VECTORS,
    began_at,
    changes_of,
    params_of,
    tokens_of,
)
from ptuning.model.base import Base
from ptuning.redaction import first_line, logger

log = logger(__name__)

Result = TypeVar("Result")

HOTTEST = 2.0
"""Highest temperature that vLLM (0.29) accepts."""
CPU_PAGE = 32
"""Tokens per page of the cache. Only whole pages are shared, and of vLLM's default on CPUs (128) no soft prompt fills one."""
CLOSE_S = 10.0
"""Seconds that vLLM's processes get to end."""
LOOK_S = 1.0
"""Seconds between looks at whether vLLM's core still runs, while it is asked."""
WRITE_S = 300
"""Seconds after which a soft prompt that was not written counts as failed: a step of a large base on a CPU takes some."""
FAILED = "the generation failed; the server's log says why"
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # it would send them
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the other one has no place for `vllm_sampling`
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads
    "VLLM_CONFIGURE_LOGGING": "0",
    # On a CPU it would bind the ranks of every replica to the same cores, and refuse more ranks than there are memory nodes.
    # Without, a rank has the threads that OMP_NUM_THREADS says; Ray sets it to the CPUs of a replica.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class VllmEngine(Engine):
    """vLLM's asynchronous engine, in a thread with its own event loop. It loads the base itself, in processes of its own.

    `rows`: virtual tokens of all resident soft prompts together; `parallel`: number of tensor-parallel ranks.

    Raises:
        UserError: vLLM does not run this base, or not with these settings.
    """

    def __init__(
        self, base: Base, dtype: torch.dtype, config: EngineConfig | None = None, rows: int = 4096, parallel: int = 1
    ) -> None:
        config = config or EngineConfig()
        bank = ReservedRows(base.vocabulary, rows, base.width, dtype, self._write)
        super().__init__(config, base.vocabulary, base.ends, bank)
        self._cache_used = 0.0
        self._closed = False
        self._loop = EventLoop("ptuning-vllm")
        try:
            self._llm = self._loop.ask(self._open(base, dtype, rows, parallel))
            problems = {each for found in self._loop.ask(self._llm.collective_rpc("open_soft_prompts")) for each in found}
            if problems:
                self._llm.shutdown()
                raise ValueError(sorted(problems)[0])
        except Exception as error:
            self._loop.close(CLOSE_S)
            log.debug("vLLM did not start", exc_info=True)
            raise UserError(
                f"model.path: vLLM does not run {config.name} with these settings ({_reason(error)}); "
                "set serve.engine=transformers"
            ) from error

    async def _open(self, base: Base, dtype: torch.dtype, rows: int, parallel: int) -> Any:
        os.environ |= {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        gpu = torch.cuda.is_available()
        arguments = AsyncEngineArgs(
            model=str(base.folder),
            skip_tokenizer_init=True,
            load_format="safetensors",
            generation_config="vllm",
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=-1,  # as much as fits
            kv_cache_memory_bytes=self.config.cache_bytes,
            enable_prefix_caching=self.config.share,
            max_num_seqs=self.config.running,
            max_num_batched_tokens=self.config.batch_tokens,
            max_logprobs=-1,
            tensor_parallel_size=parallel,
            distributed_executor_backend="mp" if parallel > 1 else None,
            enforce_eager=not gpu,
            block_size=None if gpu else CPU_PAGE,
            seed=int.from_bytes(os.urandom(4)),  # for requests without a seed
            disable_log_stats=True,
            worker_extension_cls="ptuning.inference.vllm_rows.SoftPromptRows",
            additional_config={ROWS: rows, TOKENIZER: str(base.folder)},
            logits_processors=["ptuning.inference.vllm_sampling:ChangedLogits"],
        )
        llm = AsyncLLM.from_engine_args(arguments, stat_loggers=[self._logger()])
        await llm.get_supported_tasks()  # or the first requests would ask the core, and wait for ever if it ends just then
        return llm

    def _logger(self) -> Any:
        from vllm.v1.metrics.loggers import StatLoggerBase

        engine = self

        class Counted(StatLoggerBase):
            """Receives the counters of every step."""

            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(self, scheduler_stats: Any, iteration_stats: Any, *further: Any, **options: Any) -> None:
                if scheduler_stats is not None and iteration_stats is not None:
                    engine.stats.steps += 1
                    engine.stats.batched += scheduler_stats.num_running_reqs
                    engine._cache_used = scheduler_stats.kv_cache_usage

            def log_engine_initialized(self) -> None:
                pass

        return Counted

    async def _answer(self, question: Coroutine[Any, Any, Result], most_s: float) -> Result:
        """What vLLM's core answers. vLLM itself would wait for the answer of a core that has ended.

        Raises:
            EngineStopped: it has ended.
            TimeoutError: it does not answer.
        """
        task, until = asyncio.ensure_future(question), time.monotonic() + most_s
        while not task.done():
            await asyncio.wait({task}, timeout=LOOK_S)
            if not task.done() and (self._llm.errored or time.monotonic() > until):
                task.cancel()
                raise EngineStopped(STOPPED) if self._llm.errored else TimeoutError(f"vLLM has not answered in {most_s:g} s")
        return task.result()

    def _write(self, vectors: Tensor, first: int) -> bool:
        if not self.alive:
            raise EngineStopped(STOPPED)
        data = save({VECTORS: vectors.detach().float().cpu().contiguous()})
        writing = self._llm.collective_rpc("write_soft_prompt", args=(data, first))
        try:
            return all(self._loop.ask(self._answer(writing, WRITE_S)))
        except Exception as error:  # it has no place for errors of ours
            log.error("a soft prompt could not be written: %r", error)
            raise EngineStopped(STOPPED) from error

    # -- the engine itself -------------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        return "vllm"

    @property
    def longest(self) -> int:
        return min(self.config.context, int(self._llm.model_config.max_model_len))

    @property
    def alive(self) -> bool:
        return not self._closed and not self._llm.errored

    @property
    def load(self) -> Load:
        began = [running.began > 0 for running in self._running.copy().values()]
        return Load(sum(began), len(began) - sum(began), self._waiting_rows, self._cache_used if self.busy else 0.0)

    def _stop(self) -> None:
        self._closed = True
        self._loop.cancel_all(CLOSE_S)
        self._llm.shutdown(CLOSE_S)
        self._loop.close(CLOSE_S)

    def check(self, request: Request) -> None:
        super().check(request)
        if request.sampling.temperature > HOTTEST:
            raise RequestError(f"temperature is {request.sampling.temperature:g}, and vLLM takes at most {HOTTEST:g}; lower it")

    # -- generation --------------------------------------------------------------------------------------------------

    def _start(self, request_id: str, running: Running) -> None:
        # `_finish` gives back what the request holds when it is cancelled; vLLM lets go of it a little later.
        self._residents.hold(running.request.handle)

        def ended(task: asyncio.Task[Literal["stop", "length"]]) -> None:
            self._residents.release(running.request.handle)
            if task.cancelled():
                return
            error = task.exception()
            if error is None:
                self._finish(request_id, task.result())
            else:
                log.error("request %s failed: %r", request_id, error)
                self._finish(request_id, "failed", FAILED)

        self._loop.begin(request_id, self._generate(request_id, running), ended)

    def _left(self, request_id: str, running: Running, cancel: bool) -> None:
        if cancel:
            self._loop.cancel(request_id)

    async def _generate(self, request_id: str, running: Running) -> Literal["stop", "length"]:
        request = running.request
        params = params_of(request.sampling, request.max_new_tokens, running.ends, changes_of(running))
        reason: Literal["stop", "length"] = "length"
        async for output in self._outputs(request.handle, running.ids, params):
            running.began = running.began or began_at(output)
            for token in tokens_of(output, request.sampling.top):
                self._told(request_id, running, token, output.num_cached_tokens or 0)
            if output.outputs[0].finish_reason == "stop":
                reason = "stop"
        return reason

    def _outputs(self, handle: ResidentPrompt | None, ids: Sequence[int], params: Any) -> AsyncIterator[Any]:
        prompt = {"type": "token", "prompt_token_ids": list(ids)}
        if handle:
            prompt["cache_salt"] = handle.content_hash
        outputs: AsyncIterator[Any] = self._llm.generate(prompt, params, os.urandom(8).hex())
        return outputs

    # -- labels and given text -----------------------------------------------------------------------------------------

    def _compute(self, job: Job) -> None:
        def ended(task: asyncio.Task[Any]) -> None:
            self._scored([job])  # before the caller is notified, who may send the next job immediately
            if not job.future.set_running_or_notify_cancel():
                return
            error = AnswerFailed("the engine was stopped") if task.cancelled() else task.exception()
            if error is None:
                job.future.set_result(task.result())
                return
            log.error("a job failed: %r", error)
            job.future.set_exception(error if isinstance(error, AnswerFailed) else AnswerFailed(FAILED))

        def cancelled(future: Any) -> None:
            if future.cancelled():
                self._loop.cancel(job.future)

        self._loop.begin(job.future, self._labels(job) if isinstance(job, LabelJob) else self._text(job), ended)
        job.future.add_done_callback(cancelled)

    async def _labels(self, job: LabelJob) -> list[list[float]]:
        job.future.began = time.monotonic()
        trie = job.trie
        questions = [
            ([*row, *trie.beginning(node)], node.children[start : start + NAMED])
            for row in job.rows
            for node in trie.nodes
            for start in range(0, len(node.children), NAMED)
        ]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._named(job.handle, ids, children)) for ids, children in questions]
        values = [value for task in tasks for value in task.result()]
        edges = torch.tensor(values, dtype=torch.float64).view(len(job.rows), len(trie.edges))
        parts = edges.split([len(node.children) for node in trie.nodes], dim=1)
        scores: list[list[float]] = trie.label_logprobs(torch.cat([part.log_softmax(1) for part in parts], 1)).tolist()
        return scores

    async def _named(self, handle: ResidentPrompt | None, ids: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """Log-probabilities of tokens after a text."""
        params = params_of(Sampling(), 1, (), named=tokens)
        found: dict[int, float] = {}
        async for output in self._outputs(handle, prompt_ids(handle, ids), params):
            for each in output.outputs[0].logprobs or ():
                found = {token: entry.logprob for token, entry in each.items()}
        return [found[token] for token in tokens]

    async def _text(self, job: TextJob) -> list[Token]:
        """Generation that has to choose the text's own tokens: log-probabilities are those from before it had to."""
        first, *given = job.ids
        tokens: list[Token] = []
        if given:
            params = params_of(Sampling(top=job.top), len(given), (), {GIVEN: given})
            async for output in self._outputs(job.handle, prompt_ids(job.handle, [first]), params):
                tokens += [token or Token(0, math.nan) for token in tokens_of(output, job.top)]
        return tokens


def _reason(error: Exception) -> str:
    """What vLLM says of itself; of an error in a process of its own it says nothing."""
    reason = first_line(error)
    return "its process failed; its log says why" if "root cause above" in reason else reason
