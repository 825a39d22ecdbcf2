"""Out of the registry and into it: merged checkpoints that any server can run, and adapters that PEFT made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FRUITS, tiny_base
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from test_registry import put, registry, store  # noqa: F401 (fixtures)
from test_soft_prompt import make
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

from ptuning.data.encoder import Encoder
from ptuning.errors import UserError
from ptuning.model import soft_prompt
from ptuning.model.base import Base, find_base
from ptuning.model.packing import pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.soft_prompt import SoftPrompt
from ptuning.registry.merged_check import ExportError
from ptuning.registry.merged_export import Merged, export_merged, write_merged
from ptuning.registry.peft_import import import_adapter, locate
from ptuning.registry.publish import fetch
from ptuning.registry.registry import Registry
from ptuning.registry.token_suppression import Suppression
from ptuning.settings.data import Template
from ptuning.settings.model import ModelConfig
from ptuning.training.generation import Greedy

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore:TypedStorage")]

TEMPLATE = Template(input="Text: {text}\nKind:", target=" {label}", labels=("fruit", "tool"))


def base_in(folder: Path, tokenizer: PreTrainedTokenizerFast, architecture: str, **changes: Any) -> Base:
    """A random base of an architecture with the tiny tokenizer."""
    tiny_base(architecture, **{"vocab_size": len(tokenizer), **changes}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return find_base(ModelConfig(path=str(folder)))


def prompt_for(base: Base, template: Template | None = TEMPLATE, length: int = 5) -> SoftPrompt:
    vectors = torch.randn(length, base.width, generator=torch.Generator().manual_seed(1)) * 0.3
    fingerprint = base.fingerprint.parts()
    return make(vectors, base=base.name, base_fingerprint=fingerprint, template=template, max_new_tokens=7)


def same_text(merged: Path, loaded: SoftPrompt, base: Base, texts: list[str]) -> None:
    """The merged checkpoint, loaded as anybody would, says what our own pass says."""
    tokenizer, model = AutoTokenizer.from_pretrained(merged), AutoModelForCausalLM.from_pretrained(merged)
    encoder = Encoder(loaded.card.template or TEMPLATE, base.tokenizer, 10**6)
    ours = PromptedModel(base.load(model.dtype))
    for text in texts:
        expected = Greedy(ours, encoder, 12).texts(loaded.vectors, [encoder.input_ids({"text": text})])
        plain = tokenizer(encoder.input_text({"text": text}), return_tensors="pt")
        chat = tokenizer.apply_chat_template(
            [{"role": "system", "content": "ignored"}, {"role": "user", "content": text}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        assert plain["input_ids"].tolist() == chat["input_ids"].tolist()
        out = model.generate(
            input_ids=plain["input_ids"], attention_mask=plain["attention_mask"], max_new_tokens=12, do_sample=False
        )
        assert [tokenizer.decode(out[0, plain["input_ids"].shape[1] :], skip_special_tokens=True).strip()] == expected


def virtual(merged: Path) -> list[int]:
    vocabulary = AutoTokenizer.from_pretrained(merged).get_vocab()
    return sorted(place for token, place in vocabulary.items() if token.startswith("<|toy:"))


def sample(merged: Path, tokens: int, suppress: bool) -> tuple[Tensor, Tensor]:
    """Draw tokens at temperature 2: which of them `[128, n]` are virtual ones, and how probable `[128, n]` they were at every
    place for an engine that knows nothing of suppressing."""
    tokenizer, model = AutoTokenizer.from_pretrained(merged), AutoModelForCausalLM.from_pretrained(merged).float()
    ids = virtual(merged)
    assert model.generation_config.suppress_tokens == ids
    if not suppress:
        model.generation_config.suppress_tokens = None
    start = torch.tensor([tokenizer("Text: one")["input_ids"]] * 128)
    steps = -(-tokens // 128)
    torch.manual_seed(0)
    out = model.generate(
        input_ids=start, attention_mask=torch.ones_like(start), do_sample=True, temperature=2.0, top_k=0, top_p=1.0,
        min_new_tokens=steps, max_new_tokens=steps,
    )  # fmt: skip
    with torch.no_grad():
        logits = model(input_ids=out, use_cache=False, logits_to_keep=steps + 1).logits[:, :-1]
    found = torch.isin(out[:, start.shape[1] :], torch.tensor(ids))
    assert found.numel() >= tokens
    return found, torch.softmax(logits / 2, dim=-1)[:, :, ids].sum(-1)


def drawn(merged: Path, tokens: int, suppress: bool) -> int:
    """How many of the tokens sampled at temperature 2 are virtual ones."""
    return int(sample(merged, tokens, suppress)[0].sum())


@pytest.mark.fast
def test_a_merged_export_says_what_base_and_soft_prompt_say(
    tmp_path: Path,
    tiny_base_folder: Path,
    registry: Registry,  # noqa: F811
) -> None:
    base = find_base(ModelConfig(path=str(tiny_base_folder)))
    loaded = prompt_for(base)
    loaded.save(str(tmp_path / "toy"))
    version = put(registry, "toy", str(tmp_path / "toy"))
    merged = export_merged(registry, version, str(tmp_path / "merged"))
    assert merged.untied and merged.prepends and merged.chat and merged.tokens == 5
    assert merged.vocabulary == len(base.tokenizer) + 5
    same_text(tmp_path / "merged", loaded, base, ["the old saw", f"one {FRUITS[0]} today", "ä {braces} ö"])
    settings = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config
    assert (settings.max_new_tokens, settings.eos_token_id) == (7, base.tokenizer.eos_token_id)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.decode(virtual(tmp_path / "merged"), skip_special_tokens=True) == ""
    with pytest.raises(UserError, match="merged: exists already; choose a new or empty folder"):
        export_merged(registry, version, str(tmp_path / "merged"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama_tied_gqa", {"vocab_size": 400}),  # rows behind the words, which only fill up
        ("gpt2", {}),
        *(
            pytest.param(architecture, {}, marks=pytest.mark.nightly)
            for architecture in ("llama", "gpt_neox", "qwen3", "gemma", "gemma2", "gemma3", "mistral", "cohere", "opt")
        ),
    ],
)
def test_merged_exports_of_every_architecture(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, architecture: str, changes: dict[str, Any]
) -> None:
    base = base_in(tmp_path / "base", tiny_tokenizer, architecture, **changes)
    loaded = prompt_for(base)
    write_merged(loaded, base, "toy", tmp_path / "merged")
    same_text(tmp_path / "merged", loaded, base, ["the old saw", "plum"])
    assert drawn(tmp_path / "merged", 10_000, suppress=True) == 0


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("model", ["stories260K", "tinystories-656k"])
def test_no_virtual_token_is_ever_drawn(tmp_path: Path, assets: Path, model: str) -> None:
    base = find_base(ModelConfig(path=str(assets / "models" / model)))
    merged = write_merged(prompt_for(base, length=20), base, "toy", tmp_path / "merged")
    assert merged.suppression.safe
    assert drawn(tmp_path / "merged", 10_000, suppress=True) == 0
    assert drawn(tmp_path / "merged", 10_000, suppress=False) == 0, "an engine that does not know suppress_tokens"
    same_text(tmp_path / "merged", prompt_for(base, length=20), base, ["Once upon a time"])


@pytest.mark.nightly
@pytest.mark.slow
def test_a_base_whose_states_fill_the_space_is_guarded_by_the_generation_config_and_says_so(tmp_path: Path) -> None:
    base = find_base(ModelConfig())
    merged = write_merged(prompt_for(base, length=20), base, "toy", tmp_path / "merged")
    found, chances = sample(tmp_path / "merged", 10_000, suppress=True)
    assert int(found.sum()) == 0
    assert merged.suppression.safe or any("suppress_tokens" in line for line in merged.lines("toy:1", "here"))
    assert merged.suppression.mean < 3e-4 and float(chances.mean()) < 2 * merged.suppression.mean + 1e-6, (
        "new texts are as was measured"
    )
    assert float(chances.max()) < 0.5, "nowhere on the wrong side for certain"
    same_text(tmp_path / "merged", prompt_for(base, length=20), base, ["a film that I liked"])


@pytest.mark.fast
def test_a_head_with_a_bias_never_says_a_virtual_token(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = PhiConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    PhiForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    base = find_base(ModelConfig(path=str(tmp_path / "base")))
    merged = write_merged(prompt_for(base), base, "toy", tmp_path / "merged")
    assert merged.suppression.exact and merged.suppression.safe
    found, chances = sample(tmp_path / "merged", 1000, suppress=False)
    assert int(found.sum()) == 0 and float(chances.max()) == 0.0


@pytest.mark.fast
def test_several_fields_and_no_template(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    base = base_in(tmp_path / "base", tiny_tokenizer, "llama")
    both = Template(input="{first} {{and}} {second}", target=" {label}")
    assert write_merged(prompt_for(base, both), base, "toy", tmp_path / "both").chat
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "both")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a {and} b"}], tokenize=False)
    assert chat.endswith("<|toy:4|><s>a {and} b")
    merged = write_merged(prompt_for(base, None), base, "toy", tmp_path / "none")
    assert not merged.chat and AutoTokenizer.from_pretrained(tmp_path / "none").chat_template is None
    with pytest.raises(ExportError, match="its base already has a token <|toy:0|>".replace("|", r"\|")):
        again = find_base(ModelConfig(path=str(tmp_path / "none")))
        write_merged(prompt_for(again), again, "toy", tmp_path / "again")


@pytest.mark.fast
def test_another_base_is_refused(tmp_path: Path, tiny_base_folder: Path, tiny_tokenizer: Any, registry: Registry) -> None:  # noqa: F811
    base = find_base(ModelConfig(path=str(tiny_base_folder)))
    prompt_for(base).save(str(tmp_path / "toy"))
    version = put(registry, "toy", str(tmp_path / "toy"))
    base_in(tmp_path / "base", tiny_tokenizer, "llama")
    with pytest.raises(UserError, match=r"toy:1: was made for .*tiny-llama \(config .*weights .*\), but .*base has config"):
        export_merged(registry, version, str(tmp_path / "merged"), str(tmp_path / "base"))
    assert not (tmp_path / "merged").exists()


def train_with_peft(base: Base, folder: Path, length: int = 6) -> None:
    """Prompt tuning by PEFT alone, a few steps."""
    torch.manual_seed(0)
    model = get_peft_model(
        base.load(torch.float32), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=length)
    )
    ids = torch.randint(3, 90, (4, 12))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)
    for _ in range(3):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(str(folder))


def logits_of_ours(model: PromptedModel, loaded: SoftPrompt, ids: list[int]) -> Tensor:
    """Logits `[V]` behind a text, as they leave the base in our own pass."""
    found: list[Tensor] = []
    hook = model.base.register_forward_hook(lambda base, inputs, output: found.append(output.logits[0, 0]))
    try:
        model([loaded.vectors], pack_targets([len(loaded.vectors)], [[(ids, [3])]]))
    finally:
        hook.remove()
    return found[0]


def same_logits(base: Base, theirs: Path, back: Path) -> None:
    """An adapter of PEFT's and what came back from the registry: the same logits by PEFT, and to 1e-5 by our own pass."""
    ours, loaded = PromptedModel(base.load(torch.float32)), soft_prompt.load(str(back))
    peft = [PeftModel.from_pretrained(base.load(torch.float32), str(folder)).eval() for folder in (theirs, back)]
    for text in ("a", "the old saw has one", "Text: ä plum, two  apples\nKind:"):
        ids = torch.tensor([base.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            first, second = (model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1] for model in peft)
            assert torch.equal(first, second)
            assert torch.allclose(logits_of_ours(ours, loaded, ids[0].tolist()), first, rtol=1e-5, atol=1e-5)


def check_round_trip(base: Base, folder: Path, registry: Registry) -> None:  # noqa: F811
    """PEFT -> import -> export -> the same bytes, but for the path of the base -> the same logits."""
    train_with_peft(base, folder / "theirs")
    root = (folder / "artifacts").as_uri()
    version = import_adapter(registry, str(folder / "theirs"), "peft", base.name, TEMPLATE, root)
    assert version.tag("base.weights") == base.fingerprint.weights and version.tag("metric") is None
    loaded = fetch(registry, version, str(folder / "back"))
    assert loaded.card.template == TEMPLATE and loaded.card.experiment is None and loaded.card.metrics == {}
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    assert (folder / "back" / weights).read_bytes() == (folder / "theirs" / weights).read_bytes()
    theirs, back = (json.loads((folder / side / config).read_bytes()) for side in ("theirs", "back"))
    assert theirs["base_model_name_or_path"] == base.name
    assert back == theirs | {"base_model_name_or_path": Path(base.name).name}, "an export names no path of this machine"
    same_logits(base, folder / "theirs", folder / "back")


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", *(pytest.param(each, marks=pytest.mark.nightly) for each in ("qwen3", "gemma2"))]
)
def test_peft_and_back(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    architecture: str,
    registry: Registry,  # noqa: F811
) -> None:
    check_round_trip(base_in(tmp_path / "base", tiny_tokenizer, architecture), tmp_path, registry)


@pytest.mark.slow
@pytest.mark.parametrize("model", [pytest.param("stories260K", marks=pytest.mark.nightly), "tinystories-656k"])
def test_peft_and_back_on_the_assets(tmp_path: Path, assets: Path, model: str, registry: Registry) -> None:  # noqa: F811
    check_round_trip(find_base(ModelConfig(path=str(assets / "models" / model))), tmp_path, registry)


@pytest.mark.fast
def test_imports_that_cannot_be(
    tmp_path: Path,
    tiny_base_folder: Path,
    tiny_tokenizer: Any,
    registry: Registry,  # noqa: F811
) -> None:
    with pytest.raises(UserError, match="nowhere: is neither an existing folder nor a Hugging Face id; correct the path"):
        locate(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nobody/nothing: was not found on the Hugging Face Hub or in its cache"):
        locate("nobody/nothing")
    make(torch.randn(3, 64), base="unknown").save(str(tmp_path / "wide"))
    for name in ("card.json", "manifest.json"):
        (tmp_path / "wide" / name).unlink()
    with pytest.raises(UserError, match="wide: does not say which base it was made for; name it with --base"):
        import_adapter(registry, str(tmp_path / "wide"), "wide", None, None, None)
    with pytest.raises(UserError, match="wide: was made for width 64 .*, but .*tiny-llama has width 32; use its base"):
        import_adapter(registry, str(tmp_path / "wide"), "wide", str(tiny_base_folder), None, None)
    with pytest.raises(UserError, match="is not a valid name"):
        import_adapter(registry, str(tmp_path / "wide"), "../wide", str(tiny_base_folder), None, None)
    assert registry.versions() == []


@pytest.mark.fast
def test_what_a_person_is_told() -> None:
    merged = Merged(5, 325, True, suppression=Suppression(exact=False, mean=9e-5, worst=0.01), prepends=False, chat=False)
    lines = merged.lines("toy:1", "here")
    assert len(lines) == 5 and "9e-05 of the tokens sampled at temperature 2 would be virtual tokens" in lines[2]
