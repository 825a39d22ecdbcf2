"""Renders the results as a Markdown page: what works by family, then every type, then what was said or raised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matrix.checks import COLUMNS
from matrix.runner import counts

Line = Mapping[str, Any]

FAMILIES: dict[str, tuple[str, ...]] = {
    "Llama 1 to 3, Yi, SmolLM, TinyLlama": ("llama", "llama3 rope", "llama yarn"),
    "Llama 4": ("llama4", "llama4_text"),
    "Qwen 2, 2.5": ("qwen2", "qwen2 window"),
    "Qwen 3": ("qwen3", "qwen3 tied"),
    "Qwen 3 MoE": ("qwen3_moe", "qwen3_moe some dense"),
    "Qwen 3 Next": ("qwen3_next",),
    "Qwen 3.5": ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    "Qwen 2 VL to 3 VL": ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
    "Mistral, Ministral": ("mistral", "mistral no window", "ministral", "ministral3"),
    "Mistral 3 (multimodal)": ("mistral3",),
    "Mixtral": ("mixtral",),
    "Gemma 1, 2": ("gemma", "gemma2", "vaultgemma"),
    "Gemma 3": ("gemma3_text", "gemma3 1b"),
    "Gemma 3 (multimodal)": ("gemma3",),
    "Gemma 3n": ("gemma3n", "gemma3n_text"),
    "Gemma 4 E2B, E4B": ("gemma4 e2b", "gemma4_text"),
    "Gemma 4 26B, 31B": ("gemma4 26b", "gemma4 31b", "gemma4_unified_text"),
    "Gemma 4 (multimodal)": ("gemma4", "gemma4_unified"),
    "Phi 1, 2": ("phi",),
    "Phi 3, 4": ("phi3", "phi3 window", "phi4 mini", "phi4_multimodal"),
    "Phi 3 128k": ("phi3 longrope",),
    "Phi 3.5 MoE": ("phimoe",),
    "gpt-oss": ("gpt_oss",),
    "GPT-2": ("gpt2", "gpt2 scaled"),
    "GPT-NeoX, Pythia": ("gpt_neox",),
    "GPT-Neo, GPT-J, CodeGen": ("gpt_neo", "gptj", "codegen"),
    "DeepSeek V2": ("deepseek_v2", "deepseek_v2 lite"),
    "DeepSeek V3, R1": ("deepseek_v3", "deepseek_v3 groups"),
    "DeepSeek V3.2, GLM 5": ("deepseek_v32", "glm_moe_dsa"),
    "DeepSeek V4": ("deepseek_v4",),
    "Kimi Linear": ("kimi_linear",),
    "GLM 4": ("glm", "glm4"),
    "GLM 4.5 to 4.7": ("glm4_moe", "glm4_moe_lite"),
    "GLM 4V": ("glm4v", "glm4v_moe"),
    "OLMo 1 to 3": ("olmo", "olmo clip", "olmo2", "olmo3"),
    "OLMoE": ("olmoe",),
    "SmolLM 3": ("smollm3",),
    "Granite 3": ("granite", "granitemoe", "granitemoeshared"),
    "Granite 4": ("granite4 dense", "granite4 h", "granitemoehybrid"),
    "Command R, Aya": ("cohere", "cohere2", "cohere2 pattern"),
    "Falcon 7B, 40B": ("falcon", "falcon 7b", "falcon 40b", "falcon rw"),
    "Falcon H1": ("falcon_h1",),
    "Mamba, Falcon Mamba": ("mamba", "mamba2", "falcon_mamba"),
    "Jamba, Bamba": ("jamba", "bamba"),
    "Zamba": ("zamba", "zamba2"),
    "Nemotron 4, Minitron": ("nemotron",),
    "Nemotron H": ("nemotron_h",),
    "StarCoder": ("gpt_bigcode", "starcoder multi-head", "starcoder2"),
    "StableLM": ("stablelm", "stablelm2"),
    "InternLM 3": ("internlm3", "internlm3 dynamic"),
    "EXAONE 4": ("exaone4", "exaone4 full"),
    "LFM 2": ("lfm2", "lfm2_moe"),
    "OPT": ("opt", "opt 350m"),
    "Bloom, MPT": ("bloom", "mpt", "mpt no alibi"),
    "MiniMax": ("minimax", "minimax full", "minimax_m2"),
    "Hunyuan": ("hunyuan_v1_dense", "hunyuan_v1_moe"),
    "ERNIE 4.5": ("ernie4_5", "ernie4_5_moe"),
    "Seed-OSS": ("seed_oss",),
    "Apertus, Arcee": ("apertus", "arcee"),
    "dots.llm1": ("dots1",),
    "BitNet": ("bitnet",),
    "RWKV, RecurrentGemma": ("rwkv", "recurrent_gemma"),
}
"""Widely used families, and the types and variants that they are made of."""

_WORDS = {"ok": "yes", "no": "refused", "error": "error", "wrong": "WRONG"}
_RANK = ("wrong", "error", "no", "ok")


def page(lines: Sequence[Line], versions: Mapping[str, str]) -> str:
    """The whole page."""
    columns = [column for column in COLUMNS if any(column in line["cells"] for line in lines)]
    by_name = {line["name"]: line for line in lines}
    said = ", ".join(f"{name} {number}" for name, number in versions.items())
    parts = [
        "# Architectures",
        f"Measured with {said} by `python jobs/architectures.py check`, on tiny bases with random weights: every model type of "
        "transformers' mapping for causal language models, and variants as published models use them. Each cell compares this "
        "project with plain transformers, which computes one row at a time without a cache.",
        _legend(columns),
        "## Counts",
        _counts(lines, columns),
        "## Families",
        _families(by_name, columns),
        "## Types and variants",
        _types(lines, columns),
        "## Details",
        _details(lines, columns),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _legend(columns: Sequence[str]) -> str:
    meanings = {
        "accepted": "`find_base` accepts the folder",
        "train": "losses, gradients and label probabilities; *fast*: a soft prompt is computed once for all its rows, *slow*: "
        "it is concatenated with every row",
        "recompute": "the same with `train.gradient_checkpointing`",
        "long": "rows of more than 128 tokens",
        "text": "greedy text in an evaluation",
        "serve": "greedy text and label choice of a server's engine",
        "export": "the merged checkpoint, loaded by plain transformers",
        "plan": "`ptuning plan`, in float32 and bfloat16",
        "zero": "gradients with ZeRO-3 on two workers",
    }
    lines = [f"* **{column}**: {meanings[column]}" for column in columns]
    lines.append("* *yes*: the same numbers; *refused*: one sentence says why; *error*: an exception; *WRONG*: other numbers")
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _counts(lines: Sequence[Line], columns: Sequence[str]) -> str:
    found = counts(lines)
    kinds = ("ok", "no", "error", "wrong")
    rows = []
    for column in ["built", *columns]:
        results = found.get(column, {})
        ways = f" ({results.get('fast', 0)} fast, {results.get('slow', 0)} slow)" if column == "train" else ""
        cells = [results.get(kind, 0) for kind in kinds]
        rows.append([column, f"{cells[0]}{ways}", *cells[1:]])
    return _table(["", "yes", "refused", "error", "WRONG"], rows)


def _cell(line: Line, column: str) -> str:
    cell = line["cells"].get(column)
    if cell is None:
        return "-"
    if cell["result"] == "ok" and column == "train":
        return str(line["facts"].get("way", "yes"))
    if cell["result"] != "ok" and column == "plan" and line["facts"].get("planned"):
        return str(line["facts"]["planned"])
    return _WORDS[cell["result"]]


def _families(by_name: Mapping[str, Line], columns: Sequence[str]) -> str:
    rows = []
    for family, names in FAMILIES.items():
        known = [by_name[name] for name in names if name in by_name and not by_name[name]["built"]]
        if known:
            rows.append([family, *(_least(known, column) for column in columns)])
    return _table(["family", *columns], rows)


def _least(lines: Sequence[Line], column: str) -> str:
    """The worst result of a family's types; slow before fast."""
    tried = [line for line in lines if column in line["cells"]]
    if not tried:
        return "-"
    worst = min(tried, key=lambda line: (_RANK.index(line["cells"][column]["result"]), _cell(line, column) != "slow"))
    return _cell(worst, column)


def _types(lines: Sequence[Line], columns: Sequence[str]) -> str:
    rows = [[line["name"], *(_cell(line, column) for column in columns)] for line in lines if not line["built"]]
    return _table(["type", *columns], rows)


def _details(lines: Sequence[Line], columns: Sequence[str]) -> str:
    """Every sentence, exception and difference once, with the types it concerns."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for line in lines:
        if line["built"]:
            found.setdefault(("built", "not built", str(line["built"])), []).append(line["name"])
        for column in columns:
            cell = line["cells"].get(column)
            if cell and cell["result"] != "ok":
                detail = str(cell["detail"]).replace(str(line["facts"].get("class", "\0")), "CLASS")
                found.setdefault((column, _WORDS[cell["result"]], detail), []).append(line["name"])
    order = ["built", *columns]
    rows = [
        [column, result, f"`{detail[:240].replace('`', chr(39))}`", ", ".join(names)]
        for (column, result, detail), names in sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1:]))
    ]
    return _table(["column", "result", "detail", "types"], rows) if rows else ""
