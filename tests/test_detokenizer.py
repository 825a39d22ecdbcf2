"""Tokens as text: the texts of an answer's tokens are the answer, and so are their bytes, for every kind of tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ptuning.inference.sampling import Token
from ptuning.serving.detokenizer import TextStream, TokenText, _own, token_text

pytestmark = pytest.mark.fast


def sentencepiece(scheme: str) -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is a part of the next piece, unknown characters are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab")]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=["bytes", "first", "never"])
def tokenizer(request: pytest.FixtureRequest, tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerBase:
    return tiny_tokenizer if request.param == "bytes" else sentencepiece(request.param)


def answered(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[str, list[TokenText]]:
    """As `Generation.pieces` reads an answer."""
    stream, tokens = TextStream(tokenizer, (), False), []
    for id in ids:
        before = len(stream.text)
        stream.push(id)
        tokens.append(token_text(tokenizer, Token(id, -1.0, ((id, -1.0),)), stream.added, before, stream.rest))
    return stream.text + stream.flush(), tokens


def behind(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text that goes on after another one."""
    front = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"a{text}", add_special_tokens=False)["input_ids"]
    return whole[len(front) :] if whole[: len(front)] == front else []


@given(st.text("ab é世😀", max_size=20))
def test_the_tokens_of_an_answer_are_its_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = behind(tokenizer, text)
    whole, tokens = answered(tokenizer, ids)
    if ids:
        assert whole == text
    assert "".join(token.text for token in tokens) == whole
    assert b"".join(token.content for token in tokens) == whole.encode()
    for token in tokens:
        assert whole[token.offset :].startswith(token.text)
        assert token.top == ((token.text, token.content, -1.0),)


def test_the_first_space_is_kept(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = behind(tokenizer, " a ab")
    whole, tokens = answered(tokenizer, ids)
    assert whole == " a ab" and tokens[0].text.startswith(" ")


def test_a_part_of_a_character_has_its_own_bytes(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("😀", add_special_tokens=False)["input_ids"][-4:]
    whole, tokens = answered(tokenizer, ids)
    assert whole == "😀" and [token.text for token in tokens] == ["", "", "", "😀"]
    assert [list(token.content) for token in tokens] == [[byte] for byte in "😀".encode()]
    other, sampled = token_text(tokenizer, Token(ids[0], -1.0, ((ids[1], -2.0),)), "", 0).top
    assert other == (r"bytes:\x9f", b"\x9f", -2.0) and sampled[1:] == (b"\xf0", -1.0)


@given(st.lists(st.integers(0, 2**16), max_size=12))
def test_the_bytes_of_any_tokens_are_their_own(tokenizer: PreTrainedTokenizerBase, numbers: list[int]) -> None:
    """Also where an incomplete character is followed by something else."""
    special = set(tokenizer.all_special_ids)
    known = [id for id in range(len(tokenizer)) if id not in special]
    ids = [known[number % len(known)] for number in numbers]
    _, tokens = answered(tokenizer, ids)
    whole = b"".join(token.content for token in tokens)
    alone = b"".join(_own(tokenizer, id)[1] for id in ids)
    assert whole == alone


def test_a_character_that_is_not_completed(tokenizer: PreTrainedTokenizerBase) -> None:
    begin = tokenizer("😀", add_special_tokens=False)["input_ids"][-4]
    letter = behind(tokenizer, " b") or behind(tokenizer, "b")
    whole, tokens = answered(tokenizer, [begin, *letter])
    assert whole.endswith("b") and b"".join(token.content for token in tokens) == b"\xf0" + whole.lstrip("\ufffd").encode()


def test_tokens_that_look_alike_are_kept_apart() -> None:
    tokenizer = sentencepiece("first")
    alike = [tokenizer.convert_tokens_to_ids(piece) for piece in ("a", "▁a", "<0x61>")]
    found = token_text(tokenizer, Token(alike[0], -1.0, tuple((id, -1.0) for id in alike)), "a", 0)
    assert [text for text, _, _ in found.top] == ["a", " a", f"token_id:{alike[2]}"]


def test_what_is_left_of_a_character_belongs_to_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [*behind(tokenizer, " b"), *tokenizer("😀", add_special_tokens=False)["input_ids"][-4:-1]]
    whole, tokens = answered(tokenizer, ids)
    assert whole.startswith(" b") and set(whole[2:]) == {"\ufffd"}
    assert b"".join(token.content for token in tokens) == b" b" + "😀".encode()[:3]
