"""Which engine computes, and the settings that decide it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from test_http_api import settings

from ptuning.config import parse_experiment
from ptuning.errors import UserError
from ptuning.inference.open_engine import open_engine
from ptuning.inference.types import EngineConfig
from ptuning.model.base import find_base
from ptuning.settings.model import ModelConfig


@pytest.mark.fast
@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_a_sentence_says_what_to_install(tiny_base_folder):
    with pytest.raises(UserError, match=r"serve.engine: vLLM is not installed; install ptuning\[vllm\] with .*=transformers"):
        open_engine(find_base(ModelConfig(path=str(tiny_base_folder))), torch.float32, EngineConfig(), "vllm")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("serve", "words"),
    [
        (
            {"engine": "transformers", "tensor_parallel": 2},
            "tensor_parallel: 2 GPUs share a base in vllm only",
        ),
        ({"tensor_parallel": 2, "gpus_per_replica": 1}, "gpus_per_replica: is 1, and tensor_parallel 2; leave the first out"),
        ({"engine": "tensorrt"}, "'auto', 'transformers' or 'vllm'"),
    ],
)
def test_settings_that_do_not_fit_together(tiny_base_folder, tmp_path, serve, words):
    with pytest.raises(UserError, match=words):
        parse_experiment(settings(tmp_path, tiny_base_folder, **serve))
