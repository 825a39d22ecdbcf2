"""Tokens -> text: whole characters, stop strings, tokens with their log-probabilities."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ptuning.inference.sampling import Token


@dataclass(frozen=True)
class TokenText:
    """A token as text, with its offset in the answer. The texts of all tokens are the text of the answer: of a character that
    has several tokens, the last one has it."""

    text: str
    content: bytes
    """The bytes of the text; of a token that is a part of a character, its own."""
    offset: int
    logprob: float | None
    """None: of the first token of a prompt, before which there is nothing."""
    top: tuple[tuple[str, bytes, float], ...]
    """Text, bytes and log-probability of the likeliest tokens; no text occurs twice."""


class TextStream:
    """Tokens -> text that can be sent: whole characters, without a suffix that may become a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], strip: bool) -> None:
        self.text = ""
        """All text so far, up to a stop string."""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = stops
        self._strip = strip
        # Behind a known token: decoders strip the space of the first one, as SentencePiece's do.
        self._ids = list(_known_token(tokenizer))
        self._context = 0  # tokens before this one no longer affect how the next ones are decoded
        self._read = len(self._ids)  # number of tokens in the text
        self._sent = 0
        self.added = ""
        """What the last token has added, white space included."""
        self.rest = False
        """The last token came after a part of a character."""

    def push(self, token: int, stop: bool = True) -> str:
        """Add a token; returns the text that can be sent now. `stop`: stop strings end the text from this token on."""
        self._ids.append(token)
        self.rest = bool(self._read < len(self._ids) - 1)
        known = self._decode(self._ids[self._context : self._read])
        whole = self._decode(self._ids[self._context :])
        if whole.endswith("\ufffd"):  # a character of several tokens, not yet complete
            self.added = ""
            return ""
        self._context, self._read = self._read, len(self._ids)
        self.added = whole[len(known) :]
        return self._take(self.added, stop)

    def flush(self) -> str:
        """The remaining text at the end."""
        known = self._decode(self._ids[self._context : self._read])
        self.added = self._decode(self._ids[self._context :])[len(known) :]
        new = self._take(self.added)
        if not self.stopped:
            new += self.text[self._sent :]
            self._sent = len(self.text)
        return new

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _take(self, new: str, stop: bool = True) -> str:
        before = len(self.text)
        self.text += new
        if self._strip and not before:
            self.text = self.text.lstrip()
        if not stop:
            before = len(self.text)
        longest = max(map(len, self._stops), default=1)
        places = ((word, max(0, before - len(word) + 1)) for word in self._stops)
        found = [at for word, start in places if (at := self.text.find(word, start)) >= 0]
        safe = len(self.text)
        if found:
            self.stopped = True
            safe = min(found)
            self.text = self.text[:safe]
        else:
            tails = (self.text[-size:] for size in range(min(longest - 1, len(self.text)), 0, -1))
            held = next((tail for tail in tails if any(stop.startswith(tail) for stop in self._stops)), "")
            safe -= len(held)
        start, self._sent = self._sent, max(self._sent, safe)
        return self.text[start : self._sent]


def token_text(
    tokenizer: PreTrainedTokenizerBase, token: Token, text: str, offset: int, behind_part: bool = False
) -> TokenText:
    """A token with its log-probabilities; `text`: what it has added to the answer; `behind_part`: it came after a part of a
    character. The token itself is always among the likeliest ones, if any are reported."""
    _, part, is_part = _own(tokenizer, token.id)
    own = is_part or (behind_part and token.id not in tokenizer.all_special_ids)
    content = part if own else text.encode()
    logprob, top = token.logprob, token.top
    if top and logprob is not None and token.id not in (id for id, _ in top):
        top = (*top, (token.id, logprob))
    shown: dict[str, tuple[bytes, float]] = {}
    for id, its_logprob in top:
        other, its = (text, content) if id == token.id else _own(tokenizer, id)[:2]
        shown[other if other not in shown else f"token_id:{id}"] = its, its_logprob
    return TokenText(text, content, offset, logprob, tuple((each, its, number) for each, (its, number) in shown.items()))


def _own(tokenizer: PreTrainedTokenizerBase, id: int) -> tuple[str, bytes, bool]:
    """A token alone as text and bytes, and whether it is a part of a character. Such a part is written as in OpenAI's API:
    "bytes:\\xf0\\x9f"."""
    front = list(_known_token(tokenizer))
    decode = tokenizer.decode
    whole = str(decode([*front, id], clean_up_tokenization_spaces=False))
    text = whole[len(str(decode(front, clean_up_tokenization_spaces=False))) :] if front else whole
    if "\ufffd" not in text:
        return text, text.encode(), False
    content = _bytes(str(tokenizer.convert_ids_to_tokens(id)))
    if content is None or content == text.encode():
        return text, text.encode(), False
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content), content, True


def _bytes(piece: str) -> bytes | None:
    """The bytes of an entry of a vocabulary that is a part of a character: of SentencePiece, or of GPT-2's kind."""
    if found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes.fromhex(found[1])
    letters = _letters()
    return bytes(letters[letter] for letter in piece) if all(letter in letters for letter in piece) else None


@lru_cache(maxsize=1)
def _letters() -> dict[str, int]:
    return {letter: byte for byte, letter in bytes_to_unicode().items()}


@lru_cache(maxsize=8)
def _known_token(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """A token whose text is known; none if the tokenizer has no such token."""
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    return tuple(ids) if str(tokenizer.decode(ids, skip_special_tokens=True)).endswith("a") else ()
