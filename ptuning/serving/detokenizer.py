"""Tokens -> text: whole characters, stop strings, tokens with their log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ptuning.inference.sampling import Token


@dataclass(frozen=True)
class TokenText:
    """A token as text, with its offset in the answer."""

    text: str
    offset: int
    logprob: float
    top: tuple[tuple[str, float], ...]


class TextStream:
    """Tokens -> text that can be sent: whole characters, without a suffix that may become a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], strip: bool) -> None:
        self.text = ""
        """All text so far, up to a stop string."""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = stops
        self._strip = strip
        self._ids: list[int] = []
        self._context = 0  # tokens before this one no longer affect how the next ones are decoded
        self._read = 0  # number of tokens in the text
        self._sent = 0

    def push(self, token: int) -> str:
        """Add a token; returns the text that can be sent now."""
        self._ids.append(token)
        known = self._decode(self._ids[self._context : self._read])
        whole = self._decode(self._ids[self._context :])
        if whole.endswith("\ufffd"):  # a character of several tokens, not yet complete
            return ""
        self._context, self._read = self._read, len(self._ids)
        return self._take(whole[len(known) :])

    def flush(self) -> str:
        """The remaining text at the end."""
        known = self._decode(self._ids[self._context : self._read])
        new = self._take(self._decode(self._ids[self._context :])[len(known) :])
        if not self.stopped:
            new += self.text[self._sent :]
            self._sent = len(self.text)
        return new

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _take(self, new: str) -> str:
        before = len(self.text)
        self.text += new
        if self._strip and not before:
            self.text = self.text.lstrip()
        longest = max(map(len, self._stops), default=1)
        found = [at for stop in self._stops if (at := self.text.find(stop, max(0, before - longest + 1))) >= 0]
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


def token_text(tokenizer: PreTrainedTokenizerBase, token: Token, offset: int) -> TokenText:
    read: Callable[[int], str] = lambda id: str(tokenizer.decode([id], clean_up_tokenization_spaces=False))  # noqa: E731
    top = tuple((read(id), logprob) for id, logprob in token.top)
    return TokenText(read(token.id), offset, token.logprob or 0.0, top)
