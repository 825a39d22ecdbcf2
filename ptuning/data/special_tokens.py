"""Special tokens in a text: those of a template's own words are tokens, those that occur in a field or a message are text.

A tokenizer turns the text "</s>" into the end token, regardless of its author. So a row could end its own input, and a user
could write the turns of a conversation. `split_special_tokens` of transformers (5.23) reads every special token of a text as
text, those of a template included; and it is a state of the tokenizer, which threads share. So the special tokens that stay
tokens are replaced by stand-ins that no text can contain, and a copy of the tokenizer maps these to the same ids.
"""

from __future__ import annotations

import re
import secrets
import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase

from ptuning.settings.template import TemplateField, parse_template


class TextTokenizer:
    """The tokenizer of a base, for texts that others write."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TextTokenizer:
        """The same object for the same tokenizer: the copy that some texts need can be large."""
        if tokenizer not in _known:
            _known[tokenizer] = cls(tokenizer)
        return _known[tokenizer]

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._call: Any = weakref.proxy(tokenizer)  # `_known` must not keep it alive
        secret = secrets.token_hex(8)
        self._stand_in, self._hidden = f"ptuning{secret}t", f"ptuning{secret}h"
        added = dict(tokenizer.added_tokens_decoder)
        listed = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        listed |= {id: str(token) for id, token in added.items() if token.special}
        self._special = {id: str(added.get(id, text)) for id, text in listed.items()}
        self._flags = {id: added.get(id, AddedToken(text, normalized=False)) for id, text in listed.items()}
        unknown = tokenizer.unk_token_id  # the id of unknown characters, too, unless it is another token's: GPT-2's end token
        others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        self._unknown = tokenizer.unk_token if unknown not in others else None
        self.special_ids = frozenset(self._special) - ({unknown} - others)
        """Ids that only a template's own words may have."""
        self._marked: dict[str, tuple[str | TemplateField, ...]] = {}

    def template(self, template: str) -> tuple[str | TemplateField, ...]:
        """The parts of a template whose own special tokens stay tokens in `ids`."""
        if template not in self._marked:
            parts = parse_template(template)
            self._marked[template] = tuple(self._mark(part) if isinstance(part, str) else part for part in parts)
        return self._marked[template]

    def hide(self, text: str) -> str:
        """A message for a chat template, which renders it with words of its own: its special tokens are text in `rendered`."""
        return self._pattern.sub(lambda found: f"{self._hidden}{self._numbers[found[0]]}.", text)

    def rendered(self, text: str) -> str:
        """What a chat template made of messages that were hidden: only the template's own special tokens are tokens in
        `ids`."""
        return re.sub(f"{self._hidden}(\\d+)\\.", lambda found: self._special[int(found[1])], self._mark(text))

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of texts, without what the tokenizer puts in front and behind. Special tokens in them are text, except
        those of `template` and `rendered`."""
        whole = [text for text in texts if self._stand_in not in text]
        usual = iter(self._ordinary(whole))
        found: list[list[int] | None] = []
        for text in texts:
            row = next(usual) if self._stand_in not in text else None
            found.append(row if row is not None and self._is_plain(text, row) else None)
        late = iter(self._exact([text for text, row in zip(texts, found, strict=True) if row is None]))
        return [next(late) if row is None else row for row in found]

    def _is_plain(self, text: str, row: list[int]) -> bool:
        return self.special_ids.isdisjoint(row) and not (self._unknown and self._unknown in text)

    def _ordinary(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: no warning about texts longer than the base's context; they are truncated or refused later.
        return list(self._call(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])

    def _exact(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._copy is None:
            return [self._in_parts(text) for text in texts]
        rows = [encoding.ids for encoding in self._copy.encode_batch(texts, add_special_tokens=False)]
        return [[id for token in row for id in self._real(token)] for row in rows]

    def _real(self, token: int) -> list[int]:
        """A stand-in's token; for a special token that the model of the tokenizer finds in plain text (Unigram: every entry of
        the vocabulary), the tokens of its characters."""
        if token in self._ids:
            return [self._ids[token]]
        if token not in self.special_ids or self._copy is None:
            return [token]
        text = self._special[token]
        pieces = [piece.id for part in (text[:1], text[1:]) if part for piece in self._copy.model.tokenize(part)]
        if self.special_ids.isdisjoint(pieces):
            return pieces
        return [piece.id for character in text for piece in self._copy.model.tokenize(character)]

    @cached_property
    def _copy(self) -> Tokenizer | None:
        """The tokenizer with stand-ins, in which special tokens are text; None: it is written in Python."""
        backend = getattr(self._call, "backend_tokenizer", None)
        if backend is None:
            return None
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.encode_special_tokens = True
        flags = ("lstrip", "rstrip", "single_word", "normalized")
        for id, token in self._flags.items():
            same = {name: getattr(token, name) for name in flags}
            copy.add_tokens([AddedToken(f"{self._stand_in}{id}.", special=False, **same)])
        return copy

    @cached_property
    def _ids(self) -> dict[int, int]:
        """Stand-ins' ids -> the ids of the tokens that they stand for."""
        assert self._copy is not None
        found = ((self._copy.token_to_id(f"{self._stand_in}{id}."), id) for id in self._special)
        return {stand_in: id for stand_in, id in found if stand_in is not None}

    def _in_parts(self, text: str) -> list[int]:
        options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
        if isinstance(self._call, PreTrainedTokenizer):  # mistral-common reads special tokens as text, and has no such option
            options["split_special_tokens"] = True
        parts = re.split(f"{self._stand_in}(\\d+)\\.", text)
        for place in range(1, len(parts), 2):
            flags = self._flags[int(parts[place])]
            parts[place - 1] = parts[place - 1].rstrip() if flags.lstrip else parts[place - 1]
            parts[place + 1] = parts[place + 1].lstrip() if flags.rstrip else parts[place + 1]
        ids: list[int] = []
        for place, part in enumerate(parts):
            if place % 2:
                ids.append(int(part))
            elif part:
                ids += self._call(part, **options)["input_ids"]
        return ids

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {text: id for id, text in self._special.items()}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        texts = sorted(filter(None, self._numbers), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def _mark(self, text: str) -> str:
        return self._pattern.sub(lambda found: f"{self._stand_in}{self._numbers[found[0]]}.", text)


_known: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, TextTokenizer] = weakref.WeakKeyDictionary()
