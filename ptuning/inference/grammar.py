"""JSON of a schema as a restriction of the next token, by llguidance.

llguidance gives at every step the tokens with which the answer can still become JSON of the schema. The sampler excludes all
others. What is drawn is the model's own distribution among the allowed tokens, as in OpenAI's and vLLM's structured outputs.

A tokenizer is prepared once, and a schema is compiled once per request.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ptuning.errors import UserError
from ptuning.redaction import first_line

STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps` writes. Free white space would let a model write nothing else."""


class GrammarError(UserError):
    """A schema cannot restrict this model's answers."""


class Matcher:
    """The restriction of one answer."""

    def __init__(self, found: Any) -> None:
        self._found = found

    def restricted(self, logits: Tensor) -> Tensor:
        """Logits `[V]` -> a copy that is -inf for tokens that are not allowed."""
        bits = torch.frombuffer(bytearray(self._found.compute_bitmask()), dtype=torch.uint8)
        allowed = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten().bool()[: len(logits)]
        allowed = torch.nn.functional.pad(allowed, (0, len(logits) - len(allowed)))
        return logits.masked_fill(~allowed.to(logits.device), -math.inf)

    def accept(self, token: int) -> None:
        """The token that was chosen."""
        self._found.consume_token(token)


@dataclass(frozen=True)
class Grammar:
    """A compiled schema. `schema`: its JSON text."""

    schema: str
    compiled: Any

    def start(self) -> Matcher:
        """For a new answer."""
        return Matcher(self.compiled.deep_copy())


class GrammarCompiler:
    """Compiles schemas for one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._prepared: dict[tuple[int, ...], Any] = {}
        self._lock = threading.Lock()

    def compile(self, schema: dict[str, Any], ends: Sequence[int]) -> Grammar:
        """`ends`: the tokens that end an answer.

        Raises:
            GrammarError: the schema has a part that is not supported, or the tokenizer is of another kind.
        """
        from llguidance import LLMatcher  # not needed by anything else: training on a GPU has torch and transformers only

        text = json.dumps(schema)
        prepared = self._prepare(tuple(dict.fromkeys(ends)))
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, defaults=STYLE)
            wrong = LLMatcher.validate_grammar(grammar, prepared)
        except ValueError as error:
            wrong = first_line(error)
        if wrong:
            reason = " ".join(str(wrong).split()).partition(". ")[0].rstrip(".")[:120]
            raise GrammarError(f"the JSON schema is not supported ({reason}); simplify it")
        return Grammar(text, LLMatcher(prepared, grammar, log_level=0))

    def _prepare(self, ends: tuple[int, ...]) -> Any:
        from llguidance.hf import from_tokenizer

        if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
            raise GrammarError("JSON schemas are not supported with the tokenizer of this base; ask for text")
        with self._lock:
            if ends not in self._prepared:
                size = max(self._vocabulary, len(self._tokenizer))
                self._prepared[ends] = from_tokenizer(self._tokenizer, n_vocab=size, eos_token=list(ends))
            return self._prepared[ends]
