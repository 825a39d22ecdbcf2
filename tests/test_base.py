"""What a base may be: folders, multimodal checkpoints, end tokens, tokenizers, dtypes and quantised weights."""

from __future__ import annotations

import copy
import fnmatch
import functools
import json
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import safetensors.torch
import torch
import transformers
from conftest import tiny_base
from support import integer_checkpoints

from ptuning.config import parse_experiment
from ptuning.data.encoder import Encoder
from ptuning.data.task import load_task
from ptuning.errors import BaseError, DataError
from ptuning.model import base as base_module
from ptuning.model import base_folder
from ptuning.model.base import Base, find_base
from ptuning.model.nearest_tokens import nearest_words
from ptuning.planning.meta_model import read_config
from ptuning.settings.data import Template
from ptuning.settings.model import ModelConfig
from ptuning.settings.training import ZeroConfig

pytestmark = pytest.mark.fast

Write = Callable[..., Path]

TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture
def write(tmp_path: Path, tiny_tokenizer: Any) -> Write:
    """Writes a base as `save_pretrained` does, a tiny Llama by default."""

    def write(name: str = "base", model: Any = None, **options: Any) -> Path:
        folder = tmp_path / name
        (model or tiny_base("llama", vocab_size=320)).save_pretrained(folder, **options)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return write


def found(folder: Path) -> Base:
    return find_base(ModelConfig(path=str(folder)))


def refusal(folder: Path | str, load: bool = False) -> str:
    """The sentence by which a base is refused, without its name."""
    with pytest.raises(BaseError) as caught:
        base = find_base(ModelConfig(path=str(folder)))
        assert load, "only loading refuses it"
        base.load(torch.float32)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("model.path: ")
    return message.removeprefix("model.path: ").replace(str(folder), "BASE")


def change(folder: Path, **settings: Any) -> Path:
    """Change a config.json."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | settings), encoding="utf-8")
    return folder


def add_tokens(folder: Path, tokenizer: Any, *tokens: str) -> None:
    """Save a copy of a tokenizer with further tokens into a base."""
    again = copy.deepcopy(tokenizer)
    again.add_tokens(list(tokens))
    again.save_pretrained(folder)


# Folders.


def test_only_the_files_of_the_index_are_the_base(write: Write) -> None:
    clean, other = found(write("clean", max_shard_size="20KB")), write("other", max_shard_size="20KB")
    strange = tiny_base("llama", seed=1, vocab_size=320).state_dict()
    for name in ("model", "consolidated", "consolidated.00", "checkpoint-5/model", "original/model"):
        file = other / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        safetensors.torch.save_file(strange, file, {"format": "pt"})
    base = found(other)
    assert base.fingerprint == clean.fingerprint and base.numbers == clean.numbers
    loaded = base.load(torch.float32).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in clean.load(torch.float32).state_dict().items())


def test_one_file_of_any_name_is_the_base(write: Write) -> None:
    folder = write()
    expected = found(folder)
    (folder / "model.safetensors").rename(folder / "weights.fp32.safetensors")
    shutil.copy(folder / "weights.fp32.safetensors", folder / "consolidated.safetensors")
    base = found(folder)
    assert base.fingerprint == expected.fingerprint
    assert base.load(torch.float32).config.hidden_size == 32
    shutil.copy(folder / "weights.fp32.safetensors", folder / "more.safetensors")
    assert refusal(folder) == (
        "BASE has 2 .safetensors files but no model.safetensors.index.json, which lists those of the model; download the index"
    )


def test_an_incomplete_or_damaged_folder_is_refused_before_anything_is_loaded(write: Write) -> None:
    folder = write(max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    last = shards[-1].read_bytes()
    shards[-1].write_bytes(last[:-4])
    assert refusal(folder) == f"{shards[-1]}: is incomplete ({len(last) - 4} of {len(last)} bytes); download it again".replace(
        str(folder), "BASE"
    )
    shards[-1].write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "is not a safetensors file (header of " in refusal(folder)
    shards[-1].write_bytes(b"\x02\0\0\0\0\0\0\0[]")
    assert "is not a safetensors file (its header is not valid JSON); use another copy" in refusal(folder)
    shards[-1].unlink()
    assert refusal(folder) == (f"BASE lacks 1 of the {len(shards)} files of its index ({shards[-1].name}); download them")
    for content in (
        "[]",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../../secret.safetensors"}}',
        '{"weight_map": {"a": 1}}',
    ):
        (folder / "model.safetensors.index.json").write_text(content)
        assert "model.safetensors.index.json is not a valid index of safetensors files; use another copy" in refusal(folder)


def test_an_adapter_in_the_folder_of_a_base_is_refused(write: Write) -> None:
    folder = write()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert refusal(folder).startswith("BASE contains a PEFT adapter (adapter_config.json), which transformers would apply")


def test_weights_of_another_config_are_refused_before_they_are_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = change(write("wide"), intermediate_size=96)
    deep = change(write("deep"), num_hidden_layers=3)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", None)
    assert refusal(wide, load=True) == (
        "BASE stores model.layers.0.mlp.down_proj.weight as [32, 64], but its config.json describes [32, 96]; "
        "use the config.json that belongs to the weights"
    )
    assert refusal(deep, load=True) == (
        "BASE has no weights for model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, "
        "model.layers.2.mlp.gate_proj.weight, ...; use a complete checkpoint"
    )


class Hub:
    """One repository, and what was fetched from it."""

    def __init__(self, repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.repository, self.snapshot = repository, cache / ("0" * 40)
        self.snapshot.mkdir(parents=True)
        self.asked: set[tuple[str, str | None]] = set()
        monkeypatch.setattr(base_folder, "snapshot_download", self)

    def __call__(
        self, name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None = None
    ) -> str:
        self.asked.add((name, revision))
        for file in self.repository.rglob("*.*"):
            path = str(file.relative_to(self.repository))
            allowed = any(fnmatch.fnmatch(path, pattern) for pattern in allow_patterns)
            if file.is_file() and allowed and not any(fnmatch.fnmatch(path, pattern) for pattern in ignore_patterns or ()):
                (self.snapshot / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, self.snapshot / path)
        return str(self.snapshot)

    @property
    def fetched(self) -> set[str]:
        return {str(file.relative_to(self.snapshot)) for file in self.snapshot.rglob("*.*")}


@pytest.mark.parametrize("shards", [True, False])
def test_only_what_is_read_is_fetched(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: bool) -> None:
    repository = write(max_shard_size="20KB" if shards else "1GB")
    expected = {file.name for file in repository.iterdir()}
    for name in ("consolidated", "model.fp16", "checkpoint-5/model", "original/model"):
        file = repository / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"")
    for name in ("original/params.json", "pytorch_model.bin", "code.py"):
        (repository / name).write_bytes(b"{}")
    hub = Hub(repository, tmp_path / "cache", monkeypatch)
    assert find_base(ModelConfig(path="tiny")).name == "tiny"
    assert hub.fetched == expected
    assert hub.asked == {("tiny", None), ("tiny", "0" * 40)}, "one commit, whatever happens to the branch"


def test_a_name_without_an_organisation_is_a_hub_id_unless_it_is_misspelt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_folder, "snapshot_download", lambda *given, **options: 1 / 0)
    assert refusal("gpt2").startswith("BASE was not found on the Hugging Face Hub or in its cache (division by zero); ")
    assert refusal("buildin") == 'BASE is neither an existing folder nor a Hugging Face id; did you mean "builtin"?'
    for name in ("./base", "a/b/c", "~/base", "some base"):
        assert refusal(name) == "BASE is neither an existing folder nor a Hugging Face id; correct the path"


# Multimodal checkpoints.


def multimodal(kind: str, text: dict[str, Any], vision: dict[str, Any], **settings: Any) -> tuple[str, dict[str, Any]]:
    return f"{kind}Config", {"text_config": TEXT | text, "vision_config": vision, **settings}


QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
LINEAR = {f"linear_{name}": size for name, size in (("num_value_heads", 4), ("num_key_heads", 2), ("key_head_dim", 8))}
MULTIMODAL = {
    "gemma3": multimodal("Gemma3", {"sliding_window": 4}, VISION, mm_tokens_per_image=4),
    "llama4": multimodal(
        "Llama4",
        {"intermediate_size_mlp": 64, "num_local_experts": 2},
        VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "intermediate_size": 128},
    ),
    "qwen3_5": multimodal("Qwen3_5", LINEAR | {"linear_value_head_dim": 8, "num_hidden_layers": 4}, QWEN_VISION),
    "mistral3": multimodal(
        "Mistral3", {"model_type": "ministral3"}, VISION | {"model_type": "pixtral", "head_dim": 8}, tie_word_embeddings=False
    ),
    "mistral3_tied": multimodal(
        "Mistral3",
        {"model_type": "ministral3", "tie_word_embeddings": False},
        VISION | {"model_type": "pixtral", "head_dim": 8},
        tie_word_embeddings=True,
    ),
    "llava": multimodal("Llava", {"model_type": "llama"}, VISION | {"model_type": "clip_vision_model"}),
    "idefics3": multimodal("Idefics3", {"model_type": "llama"}, VISION),
}


@pytest.fixture(params=MULTIMODAL)
def whole(request: pytest.FixtureRequest) -> Any:
    """A multimodal model with random weights."""
    name, settings = MULTIMODAL[request.param]
    config = getattr(transformers, name)(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForImageTextToText.from_config(config).eval()


def test_the_text_part_of_a_multimodal_checkpoint_is_what_the_whole_model_computes(whole: Any, write: Write) -> None:
    from ptuning.training import base_loader

    base = found(write(model=whole))
    assert base.multimodal and base.notes == ["the text part of a multimodal checkpoint"]
    assert (base.width, base.vocabulary, base.ends) == (32, 320, (2,))
    model = base_loader.load(base, ZeroConfig(stage=0), torch.float32).base  # compares the weights with the files
    ids = torch.randint(3, 320, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = base.load(torch.float32)(input_ids=ids).logits
    assert torch.equal(logits, whole(input_ids=ids).logits)
    assert base.numbers == sum(parameter.numel() for parameter in model.parameters())
    virtual = model.get_input_embeddings().weight[7:8].float()
    assert nearest_words(virtual, base, 1)[0][0][1] == pytest.approx(1.0, abs=1e-3), "its embedding is found in the files"
    # What is written from it is a base of its own.
    again = write("again", model=base.load(torch.float32))
    assert torch.equal(found(again).load(torch.float32)(input_ids=ids).logits, logits)
    with torch.device("meta"):
        assert (
            transformers.AutoModelForCausalLM.from_config(read_config(base.folder)).config.get_text_config().hidden_size == 32
        )


def test_a_multimodal_checkpoint_whose_text_part_is_incomplete_is_refused(write: Write) -> None:
    name, settings = MULTIMODAL["llava"]
    model = transformers.AutoModelForImageTextToText.from_config(getattr(transformers, name)(**settings))
    folder = write(model=model)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["language_model.model.norm.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert refusal(folder, load=True) == "BASE has no weights for model.norm.weight; use a complete checkpoint"


ELSE = "; choose a causal LM"
NOT_CAUSAL = {
    "bert": ("bert", {}, " (is_decoder is not set, so its attention is not causal); set is_decoder in its config.json if it "
             "was trained as a decoder, or choose a causal LM"),
    "roberta": ("roberta", {"architectures": ["RobertaForCausalLM"]}, " (is_decoder is not set, so its attention is"),
    "xlnet": ("xlnet", {"architectures": ["XLNetLMHeadModel"]}, f" (its attention is not causal){ELSE}"),
    "xlm": ("xlm", {"architectures": ["XLMWithLMHeadModel"]}, f" (its attention is not causal){ELSE}"),
    "reformer": ("reformer", {"is_decoder": True}, " (its attention hashes tokens at random, so no number is repeatable)"),
    "t5": ("t5", {"architectures": ["T5ForConditionalGeneration"]}, f" (it has an encoder){ELSE}"),
    "clip": ("clip", {}, ELSE),
    "classifier": ("llama", {"architectures": ["LlamaForSequenceClassification"]}, ELSE),
    "headless": ("llama", {"architectures": ["LlamaModel"]}, ELSE),
    "blip": ("blip", {}, f", and transformers has no layers for its text part alone{ELSE}"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_what_is_not_a_causal_language_model_is_refused(name: str, tmp_path: Path) -> None:
    kind, settings, end = NOT_CAUSAL[name]
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **settings}))
    message = refusal(tmp_path)
    assert message.startswith("BASE is a ") and f", not a decoder-only language model{end}" in message
    with pytest.raises(BaseError, match="not a decoder-only language model"):
        read_config(tmp_path)


def test_bert_as_a_decoder_is_accepted(write: Write) -> None:
    config = transformers.BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, is_decoder=True
    )
    assert found(write(model=transformers.BertLMHeadModel(config))).width == 32
    assert found(write("neox", model=tiny_base("gpt_neox", vocab_size=320))).width == 32  # its is_decoder has no effect


# Tokens.


@pytest.mark.parametrize(("kind", "context"), [("dynamic", 32), ("longrope", 32), ("linear", 128)])
def test_rows_stay_where_rotary_frequencies_do_not_depend_on_their_neighbours(write: Write, kind: str, context: int) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    folder = change(write(), rope_parameters=rope, max_position_embeddings=128)
    assert found(folder).context == context


def test_the_end_tokens_are_those_of_all_files(write: Write) -> None:
    folder = write()
    assert found(folder).ends == (2,)
    generation = {"eos_token_id": [134, 2, 7, 400, None]}  # 400 has no row
    (folder / "generation_config.json").write_text(json.dumps(generation))
    assert found(change(folder, eos_token_id=[2, 5])).ends == (2, 5, 7, 134)
    (folder / "generation_config.json").write_text("[")
    assert found(change(folder, eos_token_id=None)).ends == (2,)


def test_a_tokenizer_without_end_token_takes_that_of_the_config(write: Write, tiny_tokenizer: Any, tmp_path: Path) -> None:
    folder = write()
    bare = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="<pad>", bos_token="<s>")
    bare.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    base = found(change(folder, eos_token_id=2))
    assert base.ends == (5, 2) and base.tokenizer.eos_token_id == 5 and len(base.tokenizer) == len(bare)
    encoder = Encoder(Template(input="{text}", target="{label}"), base.tokenizer, 20)
    assert encoder.target_ids({"label": "x"})[-1] == 5
    assert base.tokenizer.decode([40, 5], skip_special_tokens=True) == base.tokenizer.decode([40])
    (folder / "generation_config.json").unlink()
    assert found(folder).ends == (2,)
    assert refusal(change(folder, eos_token_id=None)) == "the tokenizer of BASE has no end token; set eos_token in its files"


def test_tokens_beyond_the_rows_are_accepted_where_they_do_not_occur(
    write: Write, tiny_tokenizer: Any, toy_task: SimpleNamespace
) -> None:
    folder = write()
    add_tokens(folder, tiny_tokenizer, "<image>")
    base = found(folder)
    assert (len(base.tokenizer), base.vocabulary) == (321, 320)
    tables = toy_task.experiment | {"model": {"path": str(folder)}}
    assert len(load_task(parse_experiment(tables), base).train) == 64

    def refused(**changes: dict[str, Any]) -> str:
        with pytest.raises(DataError) as caught:
            load_task(parse_experiment({name: table | changes.get(name, {}) for name, table in tables.items() if name != "name"}
                                       | {"name": "toy"}), base)  # fmt: skip
        return str(caught.value)

    end = (
        f" contains the token '<image>' (320), for which the 320 rows of {folder} have no vector; correct the text, or use the "
        "tokenizer that belongs to the model"
    )
    assert refused(prompt={"init": "text", "init_text": "see <image>"}) == f"prompt.init_text{end}"
    assert refused(data={"labels": ["fruit", "tool", "<image>"]}) == f"data.labels: '<image>'{end}"
    toy_task.train.write_text('{"text": "an apple", "label": "fruit"}\n{"text": "a <image> here", "label": "tool"}\n')
    assert refused() == f"{toy_task.train}: 'Text: a <image> here\nKind:'{end}"


def test_an_end_token_beyond_the_rows_is_refused(write: Write, tiny_tokenizer: Any) -> None:
    folder = write()
    again = copy.deepcopy(tiny_tokenizer)
    again.add_special_tokens({"eos_token": "<end>"})
    again.save_pretrained(folder)
    assert refusal(folder) == (
        "the end token 320 of the tokenizer of BASE has no row in its embedding of 320 rows; use the tokenizer that belongs to "
        "the model"
    )


# Dtypes and quantised weights.


def test_auto_weighs_dtypes_by_bytes(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_module, "computes_in_bfloat16", lambda: True)
    folder = write(model=tiny_base("llama", vocab_size=320).to(torch.bfloat16))
    assert found(folder).dtype("auto") == torch.bfloat16
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert found(folder).dtype("auto") == torch.bfloat16, "one tensor of 32 numbers"
    safetensors.torch.save_file({name: tensor.float() for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert found(folder).dtype("auto") == torch.float32
    assert found(folder).dtype("bfloat16") == torch.bfloat16


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
STATIC = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def fp8(weight: torch.Tensor, block: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight in fp8, its scales (one per block, or one in all), and the weight that they mean in fp32."""
    rows, columns = weight.shape
    high, wide = (block or rows), (block or columns)
    blocks = weight.float().view(rows // high, high, columns // wide, wide)
    scales = blocks.abs().amax((1, 3), keepdim=True) / 448
    small = (blocks / scales).to(torch.float8_e4m3fn)
    meant = (small.float() * scales).view(rows, columns)
    return small.view(rows, columns), scales.view(rows // high, columns // wide) if block else scales.view(()), meant


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Experts `[E, in, out]` in mxfp4, their exponents, and the weight that they mean in fp32."""
    rows = weight.float().transpose(1, 2)
    blocks = rows.reshape(*rows.shape[:2], -1, 32)
    exponents = blocks.abs().amax(-1, keepdim=True).log2().floor() - 2
    codes = (blocks / 2**exponents).unsqueeze(-1).sub(E2M1).abs().argmin(-1)
    meant = (E2M1[codes] * 2**exponents).view(rows.shape).transpose(1, 2)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return packed.to(torch.uint8), (exponents.squeeze(-1) + 127).to(torch.uint8), meant.contiguous()


def quantised(folder: Path, settings: dict[str, Any]) -> Path:
    """Quantise a checkpoint in place; the result is a folder with the weights that it then means."""
    plain = folder.with_name("plain")
    shutil.copytree(folder, plain)
    stored, meant = {}, {}
    for name, weight in safetensors.torch.load_file(folder / "model.safetensors").items():
        stored[name] = meant[name] = weight
        if settings["quant_method"] == "mxfp4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[f"{name}_blocks"], stored[f"{name}_scales"], meant[name] = mxfp4(stored.pop(name))
        elif settings["quant_method"] == "fp8" and name.endswith("proj.weight"):
            block = settings["weight_block_size"] and settings["weight_block_size"][0]
            stored[name], stored[f"{name}_scale_inv"], meant[name] = fp8(weight, block)
            if not block:
                stored[name.replace("weight", "activation_scale")] = torch.tensor(1.0)
        elif settings["quant_method"] in ("gptq", "awq") and name.endswith(("proj.weight", "c_attn.weight", "c_fc.weight")):
            turned = name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))  # GPT-2's linear layers
            parts, meant[name] = integer_checkpoints.packed(stored.pop(name).t() if turned else stored.pop(name), settings)
            meant[name] = meant[name].t() if turned else meant[name]
            stored |= {name.replace("weight", part): each for part, each in parts.items()}
    safetensors.torch.save_file({name: each.contiguous() for name, each in stored.items()}, folder / "model.safetensors")
    safetensors.torch.save_file({name: each.float().contiguous() for name, each in meant.items()}, plain / "model.safetensors")
    change(folder, quantization_config=settings)
    return plain


QUANTISED = {
    "fp8": ("LlamaConfig", {}, FP8),
    "fp8 in a mixture": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, FP8),
    "fp8 with one scale": ("Ministral3Config", {}, STATIC),
    "fp8 in a multimodal file": ("Mistral3Config", MULTIMODAL["mistral3"][1], STATIC),
    "gptq": ("LlamaConfig", {}, GPTQ),
    "gptq, 3 bits, no groups": ("LlamaConfig", {"num_key_value_heads": 4}, GPTQ | {"bits": 3, "group_size": -1}),
    "gptq, 8 bits, any order of inputs": (
        "LlamaConfig",
        {},
        GPTQ | {"bits": 8, "desc_act": True, "checkpoint_format": "gptq_v2"},
    ),
    "gptq, 2 bits, a short last group": ("LlamaConfig", {}, GPTQ | {"bits": 2, "group_size": 24}),
    "gptq in a mixture": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, GPTQ),
    "gptq, GPT-2": ("GPT2Config", {"n_embd": 32, "n_head": 4, "n_layer": 2}, GPTQ),
    "awq": ("LlamaConfig", {}, AWQ),
    "awq in a multimodal file": ("Mistral3Config", MULTIMODAL["mistral3"][1], AWQ),
    "mxfp4": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}, {"quant_method": "mxfp4"}),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_dequantised_into_the_dtype_of_the_base(kind: str, write: Write) -> None:
    from ptuning.training import base_loader

    name, settings, method = QUANTISED[kind]
    config = getattr(transformers, name)(**settings if "text_config" in settings else TEXT | settings)
    auto = transformers.AutoModelForImageTextToText if "text_config" in settings else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config).to(torch.bfloat16)
    folder = write(model=model)
    plain = quantised(folder, method)
    base, ids = found(folder), torch.arange(3, 12)[None]
    assert base.notes[-1] == f"dequantised from {method['quant_method']}"
    for dtype in (torch.float32, torch.bfloat16):
        expected = found(plain).load(dtype)
        loaded = base.load(dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert torch.equal(loaded(input_ids=ids).logits, expected(input_ids=ids).logits)
        assert base.numbers == sum(parameter.numel() for parameter in loaded.parameters())
        again = write(f"again-{dtype}", model=loaded)  # plain weights and a plain config
        assert torch.equal(found(again).load(dtype)(input_ids=ids).logits, expected(input_ids=ids).logits)
    base_loader.load(base, ZeroConfig(stage=0), torch.float32)  # compares what is stored unchanged


def by_bitsandbytes(folder: Path, **settings: Any) -> None:
    quantizing = transformers.BitsAndBytesConfig(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantizing, device_map="cpu")
    model.save_pretrained(folder)


def by_compressed_tensors(folder: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=8, strategy="channel"))
    groups: Any = {"group_0": scheme}
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], format="pack-quantized", quantization_status="frozen")
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(module.weight.abs().amax(1, keepdim=True) / 127)
    compressor: Any = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


LIBRARIES: dict[str, Callable[[Path], Any]] = {
    "bitsandbytes, 4 bits": functools.partial(by_bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes, 8 bits": functools.partial(by_bitsandbytes, load_in_8bit=True),
    "compressed-tensors": by_compressed_tensors,
    "gptq": functools.partial(quantised, settings=GPTQ | {"bits": 8}),
    "awq": functools.partial(quantised, settings=AWQ),
}


@pytest.mark.parametrize("kind", LIBRARIES)
def test_weights_that_a_library_quantised_are_dequantised_by_it(kind: str, write: Write, tmp_path: Path) -> None:
    from matrix.sharded import gradients_of_two

    from ptuning.model.packing import pack_targets
    from ptuning.training import base_loader

    # Rows of whole blocks of 64: with narrower ones bitsandbytes (0.50.2) takes other blocks' scales on CPUs with AVX-512.
    folder = write(model=tiny_base("llama", vocab_size=320, hidden_size=64, intermediate_size=128))
    before = dict(found(folder).load(torch.float32).named_parameters())
    LIBRARIES[kind](folder)
    base = found(folder)
    assert base.notes == [f"dequantised from {kind.partition(',')[0]}"]
    model = base_loader.load(base, ZeroConfig(stage=0), torch.float32)
    assert {parameter.dtype for parameter in model.base.parameters()} == {torch.float32}
    assert base.numbers == sum(parameter.numel() for parameter in model.base.parameters())
    for name, weight in model.base.named_parameters():
        error = float((weight - before[name]).detach().norm() / before[name].detach().norm())
        assert 1e-4 < error < 0.15 if name.endswith("proj.weight") else error == 0, name
    soft_prompt, rows = torch.randn(4, base.width, requires_grad=True), [([5, 6, 7], [8, 2]), ([9, 4], [3, 2])]
    (expected,) = torch.autograd.grad(model([soft_prompt], pack_targets([4], [rows])).sum(), [soft_prompt])
    torch.set_num_threads(1)  # the two processes are forked, and threads do not survive that
    (found_by_two,) = gradients_of_two(folder, [soft_prompt.detach()], [rows], tmp_path)
    torch.testing.assert_close(found_by_two, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["bitnet", "new"])
def test_other_quantised_weights_are_refused_before_they_are_read(method: str, write: Write) -> None:
    folder = change(write(), quantization_config={"quant_method": method})
    assert refusal(folder) == (
        f"BASE is quantised with {method}, which is not supported; choose the checkpoint that it was made from, or save it "
        "dequantised"
    )


def test_integers_packed_in_another_way_are_refused_before_they_are_read(write: Write) -> None:
    def stored(change_tensors: Callable[[dict[str, torch.Tensor]], Any], settings: dict[str, Any] = GPTQ) -> str:
        folder = quantised_again(write, settings)
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        change_tensors(tensors)
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        return refusal(folder)

    for settings, what in (
        (GPTQ | {"checkpoint_format": "marlin"}, "gptq in a way that is not known (format 'marlin')"),
        (AWQ | {"version": "gemv"}, "awq in a way that is not known (format 'gemv')"),
    ):
        folder = change(write(f"base-{settings['quant_method']}"), quantization_config=settings)
        assert refusal(folder).replace(str(folder), "BASE") == (
            f"BASE is quantised with {what}; choose the checkpoint that it was made from, or save it dequantised"
        )
    name = "model.layers.0.self_attn.q_proj"
    assert f"({name} has qweight [4, 32], scales [2, 32])" in stored(lambda tensors: tensors.pop(f"{name}.qzeros"))
    assert f"({name} has qweight [4, 24], qzeros [2, 4], scales [2, 32])" in stored(
        lambda tensors: tensors.update({f"{name}.qweight": tensors[f"{name}.qweight"][:, :24].clone()})
    )
    assert "(model.layers.0.mlp.act_fn.scales scales activations)" in stored(
        lambda tensors: tensors.update({"model.layers.0.mlp.act_fn.scales": torch.ones(64)}), AWQ
    )


def quantised_again(write: Write, settings: dict[str, Any]) -> Path:
    """A tiny Llama in a folder of its own."""
    folder = write(f"base{len(list(write().parent.iterdir()))}")
    quantised(folder, settings)
    shutil.rmtree(folder.with_name("plain"))
    return folder


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"quant_method": "bitsandbytes"}])
def test_a_missing_package_is_named(settings: dict[str, Any], write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptuning.model.quantization.find_spec", lambda name: None)
    assert refusal(change(write(), quantization_config=settings)) == (
        "BASE is quantised with bitsandbytes; pip install bitsandbytes, on every node"
    )


# Errors of the base's code.


def test_errors_that_no_restart_cures_end_a_run_at_once(monkeypatch: pytest.MonkeyPatch, toy_task: SimpleNamespace) -> None:
    from ray.cloudpickle import dumps, loads
    from ray.train import FailureConfig
    from ray.train.v2._internal.execution.failure_handling import FailureDecision, create_failure_policy
    from ray.train.v2.api.exceptions import WorkerGroupError

    from ptuning.cluster.failures import cause
    from ptuning.training import ray_trainer, worker

    failures: Any = FailureConfig
    policy: Any = create_failure_policy(failures(max_failures=3))
    given: list[Any] = []
    monkeypatch.setattr(ray_trainer.TorchTrainer, "_initialize_and_run_controller", lambda self, **each: given.append(each))
    ray_trainer._Trainer._initialize_and_run_controller(object.__new__(ray_trainer._Trainer), failure_policy=policy)
    policy = loads(dumps(given[0]["failure_policy"]))  # as it reaches Train's controller

    class Silent:
        def __getattr__(self, name: str) -> Any:
            return lambda *given, **options: None

    monkeypatch.setattr(worker, "_watchdog", lambda *given: Silent())
    config = {"experiment": toy_task.experiment, "events": None, "threads": 1}

    def decided(error: Exception) -> tuple[str, str]:
        monkeypatch.setattr(worker.base_loader, "load", lambda *given, **options: (_ for _ in ()).throw(error))
        try:
            worker.run_worker(config, cast(Any, Silent()), cast(Any, None))
        except Exception as raised:
            failure: Any = RuntimeError("".join(traceback.format_exception(raised)))
            decision = policy.make_decision(WorkerGroupError("failed", {0: failure}))
            return decision.name, cause([str(failure)])
        raise AssertionError("nothing was raised")

    name = toy_task.experiment["model"]["path"]
    assert decided(ImportError("gptq requires optimum\nmore")) == (
        FailureDecision.RAISE.name,
        f"model.path: {name} needs a package that is not installed on every node (ImportError: gptq requires optimum); "
        "install it",
    )
    for error in (
        NotImplementedError("attention with s_aux."),
        AttributeError("'NoneType' object has no attribute 'reshape'"),
        RuntimeError("expected m1 and m2 to have the same dtype, but got: c10::BFloat16 != float"),
    ):
        decision, message = decided(error)
        assert decision == FailureDecision.RAISE.name and "; choose another base, or report this" in message
        assert message.startswith(f"model.path: {name} cannot be trained ({type(error).__name__}: ")
    for error in (RuntimeError("Connection reset by peer"), OSError("Input/output error"), MemoryError()):
        assert decided(error)[0] == FailureDecision.RETRY.name
