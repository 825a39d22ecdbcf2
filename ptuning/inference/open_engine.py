"""Which engine computes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch

from ptuning.errors import UserError
from ptuning.inference.engine import Engine
from ptuning.inference.transformers_engine import TransformersEngine
from ptuning.inference.types import EngineConfig
from ptuning.model.base import Base
from ptuning.redaction import logger

log = logger(__name__)

Kind = Literal["auto", "transformers", "vllm"]


def open_engine(
    base: Base, dtype: torch.dtype, config: EngineConfig, kind: Kind = "auto", rows: int = 4096, parallel: int = 1
) -> Engine:
    """Load a base and start an engine over it. "auto": vLLM if it is installed, there is a GPU, and vLLM takes the base.

    `rows` and `parallel`: for vLLM (`VllmEngine`).

    Raises:
        UserError: the base cannot be loaded, or not by the engine that was asked for.
    """
    gpu = torch.cuda.is_available()
    reason = None if kind == "transformers" else why_not_vllm(base)
    if kind == "vllm" and reason:
        raise UserError(f"serve.engine: {reason}, or set serve.engine=transformers")
    if kind == "vllm" or (kind == "auto" and gpu and not reason):
        from ptuning.inference.vllm_engine import VllmEngine  # an extra: it is not installed everywhere

        try:
            return VllmEngine(base, dtype, config, rows, parallel)
        except UserError as error:
            if kind == "vllm":
                raise
            log.warning("transformers is used: %s", error)
    elif kind == "auto" and gpu:
        log.info("transformers is used: %s", reason)
    if parallel > 1:
        raise UserError(f"serve.tensor_parallel: {parallel} GPUs share a base in vLLM only; set serve.engine=vllm")
    return TransformersEngine(base.load(dtype, torch.device("cuda" if gpu else "cpu")), base.ends, config)


def why_not_vllm(base: Base) -> str | None:
    """Why vLLM cannot serve a base here, with what to do about it; None if nothing speaks against it before it starts."""
    if find_spec("vllm") is None:
        return "vLLM is not installed; install ptuning[vllm] with the versions of constraints-vllm.txt"
    if base.trust_remote_code:
        return f"vLLM is not used with code of a base, as that of {base.name}; choose a base without"
    if base.stored_in:
        return f"vLLM does not store {base.name} in {base.stored_in} as training does; leave out model.quantization"
    if base.notes:
        notes = ", ".join(base.notes)
        return f"vLLM would load {base.name} differently than training, which uses it as {notes}; choose another base"
    from vllm.model_executor.models import ModelRegistry

    architectures = base.config.architectures or []
    if not set(architectures) & set(ModelRegistry.get_supported_archs()):
        return f"vLLM does not support {base.name} ({', '.join(architectures) or base.config.model_type}); choose another base"
    return None
