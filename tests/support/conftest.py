"""Fixtures of the cases and budgets on the pretended device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import tiny_base
from transformers import PreTrainedTokenizerFast

from support.accelerator import pretended


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[torch.device]:
    with pretended() as device:
        yield device


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Nothing has to be learned here: a base that has not learned anything is there at once."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_base("llama_tied_gqa", vocab_size=len(tiny_tokenizer), initializer_range=0.1).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
