"""The package speaks plain English: texts and docstrings avoid the phrases of CONTRIBUTING.md's word list."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.fast

PHRASES = {
    r"(?<!there )\b(?:is|are) no (?!longer\b)": "is not a valid ..., is not a ...",
    r"\bsigns? of life\b": "does not respond; a heartbeat",
    r"\b(?:has|have) gone\b(?! down)": "no longer exists, was lost, has ended",
    r"\bis gone\b": "no longer exists, was lost, has ended",
    r"\b(?:whoever|whatever|whomever)\b": "everyone who; all; regardless of",
    r"\b(?:nobody|anybody|somebody)\b": "name who: no client, another process",
    r"\bstrangers?\b": "untrusted input, an unauthorised client",
    r"\bin the mean\b": "the highest mean",
    r"\bso many\b": "this many; the number of",
    r"\b(?:ends?|stops?|ended|stopped)\b[^.;,]* in order\b": "cleanly",
    r"\blies? open\b": "is readable by others",
    r"\b(?:has|have) a password in\b": "contains a password",
    r"\bover already\b": "had already ended",
    r"\btakes? another copy\b": "use another copy",
    r"\blets? us in\b": "accepts the connection",
}
"""Phrases, as patterns, and what to write instead."""

EXEMPT = {"builtin"}
"""Sub-packages whose strings are data: the sentences of the corpus that the built-in base is trained on."""


def wording(source: str) -> list[tuple[int, str, str]]:
    """Line, phrase and advice for every listed phrase in a string or docstring."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = re.sub(r"\s+", " ", node.value)
            for pattern, advice in PHRASES.items():
                found += [(node.lineno, match[0], advice) for match in re.finditer(pattern, text, re.IGNORECASE)]
    return found


@pytest.mark.parametrize("path", sorted((REPOSITORY / "ptuning").rglob("*.py")), ids=lambda path: path.stem)
def test_texts_are_plain_english(path):
    if path.parent.name not in EXEMPT:
        assert wording(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "'a/b' is no name; use letters",
        "worker 1 gives no sign of life",
        "the registry has gone; put it back",
        "the node of worker 1 is gone",
        "whoever reaches this address may ask",
        "nobody answers at HOST",
        "what strangers can do",
        "the winner is the best in the mean",
        "so many slots do not fit",
        "End a job in order: its run can be resumed",
        "a password, which would lie open in the job",
        "the address has a password in it",
        "the job was over already",
        "take another copy",
    ],
)
def test_a_listed_phrase_is_found(text):
    assert wording(f"raise ValueError(f{text!r})") and wording(f'def f():\n    """{text}"""')


def test_plain_sentences_pass():
    for text in ("there is no such job; see ptuning jobs list", "the file no longer exists", "fields in order of appearance"):
        assert wording(repr(text)) == []
