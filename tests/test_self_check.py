"""Law 10: a pass is the base's own function, or another one is taken, or the base is refused. On architectures that differ."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_base
from test_model import alone, soft_prompts
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel

from ptuning.data.encoder import Encoder
from ptuning.errors import BaseError
from ptuning.inference import paged_attention, plain_generator, sampling
from ptuning.inference.paged_attention import stored_sizes
from ptuning.inference.paged_generator import page_numbers
from ptuning.inference.transformers_engine import TransformersEngine
from ptuning.inference.types import EngineConfig, Request, RequestError
from ptuning.model import label_cache, packed_layers, tree_attention
from ptuning.model.attention_sizes import paged_numbers
from ptuning.model.compatibility import next_logits
from ptuning.model.label_trie import LabelTrie
from ptuning.model.packing import Objective, pack_labels, pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.self_check import choose_pass, find_input
from ptuning.model.token_tree import TokenTree
from ptuning.settings.data import Template
from ptuning.training.generation import Greedy

pytestmark = pytest.mark.fast

COMMON = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
KINDS: dict[str, tuple[dict[str, Any], str, str]] = {
    # transformers' config: its arguments, the pass, the generator
    "LlamaConfig": ({}, "shared", "paged"),
    "GptOssConfig": (  # attention sinks
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
        "shared",
        "paged",
    ),
    "Gemma4TextConfig": (  # embeddings per layer, looked up by id
        {
            "head_dim": 8,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 160,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 4,
        },
        "shared ids",
        "paged",
    ),
    "NemotronConfig": ({}, "shared", "paged"),  # its layers pass nothing but a mask on to their attention
    "DogeConfig": ({}, "concatenated", "plain"),  # a mask of its own
    "DiffLlamaConfig": ({}, "shared", "plain"),  # attends twice per layer
    "MiniCPM3Config": (LATENT | {"num_key_value_heads": 4}, "shared", "paged"),  # values narrower than keys
    "GPTBigCodeConfig": ({"num_key_value_heads": 1}, "shared", "paged"),  # one head of keys, which the config does not count
    "MambaConfig": ({"state_size": 4}, "concatenated", "plain"),
    "FalconH1Config": (
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1},
        "concatenated",
        "plain",
    ),
    "RwkvConfig": ({"attention_hidden_size": 32}, "concatenated", "single"),
    "TrOCRConfig": ({"decoder_ffn_dim": 64}, "concatenated", "plain"),  # computes logits at all positions
    "XLMConfig": ({"causal": True}, "concatenated", "none"),  # its preparation for `generate` fails
    "RobertaConfig": ({"is_decoder": True, "pad_token_id": 1}, "concatenated", "none"),  # positions begin behind the padding
}
CASES = [
    pytest.param(
        name,
        marks=()
        if name in {"LlamaConfig", "GptOssConfig", "Gemma4TextConfig", "DogeConfig", "TrOCRConfig"}
        else pytest.mark.nightly,
    )
    for name in KINDS
    if KINDS[name][2] != "none"
]


def tiny(name: str) -> PreTrainedModel:
    config = getattr(transformers, name)(**COMMON | KINDS[name][0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


ROWS = [[([5, 9, 40], [33, 2]), ([8] * 9, [44, 45, 2])], [([7, 6], [50, 2])]]


@pytest.mark.parametrize("name", CASES)
def test_the_pass_is_the_base(name: str) -> None:
    model = PromptedModel(tiny(name))
    choose_pass(model, name)
    found = ("shared" if model.shared_prefix else "concatenated") + " ids" * model.needs_ids
    assert found == KINDS[name][1]

    prompts, plan = soft_prompts([5, 3]), pack_targets([5, 3], ROWS)
    nll = model(prompts, plan)
    gradients = torch.autograd.grad(nll.sum(), prompts)
    reference = tiny(name).requires_grad_(False)
    if model.needs_ids:
        expected = torch.cat([by_ids(reference, prompts[slot], *row) for slot, rows in enumerate(ROWS) for row in rows])
    else:
        expected = torch.cat([alone(reference, prompts[slot], row) for slot, rows in enumerate(ROWS) for row in rows])
    torch.testing.assert_close(nll, expected, atol=2e-4, rtol=2e-4)
    for got, wanted in zip(gradients, torch.autograd.grad(expected.sum(), prompts), strict=True):
        assert (got - wanted).norm() <= 1e-3 * wanted.norm()


CONTINUED = {"DogeConfig", "MambaConfig", "FalconH1Config"}
"""Bases whose soft prompts are concatenated, and whose labels continue a copy of their text's states."""
TRIE = LabelTrie(((9, 20, 30), (9, 21, 30), (11, 20, 31), (11, 20, 32), (12, 9), *((13, 40 + at, 2) for at in range(11))))


@pytest.mark.parametrize("name", [*CASES, "FalconH1Config", "gpt_neo"])
def test_labels_have_the_scores_of_rows_of_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of different lengths, and a trie whose branches are after the text, and after one and two tokens."""
    make = (lambda: tiny(name)) if name in KINDS else (lambda: tiny_base(name))
    model = PromptedModel(make())
    choose_pass(model, name)
    assert model.continues_texts == (name in CONTINUED or name == "gpt_neo")
    if model.needs_ids:
        pytest.skip("its ids are looked up by another test")
    prompts = [prompt.detach() for prompt in soft_prompts([5, 3])]
    texts = [[[5, 9, 40], [8] * 9], [[7]]]
    calls: list[int] = []
    monkeypatch.setattr(label_cache, "AT_ONCE", 2)
    model.base.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        nll = model(prompts, pack_labels([5, 3], texts, TRIE))
    assert len(calls) == (4 if model.continues_texts else 1)  # the texts; 9 and 11, 20 after 11; 13
    reference, expected = make(), []
    embedding: Any = reference.get_input_embeddings()
    for prompt, rows in zip(prompts, texts, strict=True):
        for text in rows:
            for node in TRIE.nodes:
                ids = torch.tensor([*text, *TRIE.beginning(node)])
                with torch.no_grad():
                    logits = reference(inputs_embeds=torch.cat([prompt, embedding(ids)])[None], use_cache=False).logits[0, -1]
                expected.append(-torch.log_softmax(logits[list(node.children)], -1))
    torch.testing.assert_close(nll, torch.cat(expected), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["falcon", "gpt_neo", pytest.param("FalconH1Config", marks=pytest.mark.nightly)])
def test_a_concatenated_pass_computes_a_token_once(name: str, checkpointed: bool) -> None:
    """What processes single tokens is given the packed tokens; a choice adds no label but the row's own to them."""
    make = (lambda: tiny(name)) if name in KINDS else (lambda: tiny_base(name))
    model = PromptedModel(make())
    choose_pass(model, name)
    rows = [([5, 9, 40], [9, 20, 30]), ([8] * 9, [13, 45, 2]), ([7, 6], [12, 9])]
    plan = pack_targets([5], [rows], [Objective(TRIE, text=False)])
    assert plan.positions == 5 + (3 + 1) + (9 + 1) + 2
    prompts = soft_prompts([5])
    model.packed_layers.active = False
    expected = torch.autograd.grad(model(prompts, plan).sum(), prompts)[0]
    model.packed_layers.active = True
    if checkpointed:
        model.checkpoint_gradients()
    seen: set[tuple[int, ...]] = set()
    for module in model.base.modules():
        if "MLP" in type(module).__name__:
            module.register_forward_pre_hook(lambda _, arguments: seen.add(tuple(arguments[0].shape[:2])))
    (found,) = torch.autograd.grad(model(prompts, plan).sum(), prompts)
    assert seen == {(1, plan.positions)}
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    with torch.no_grad():  # what follows is not computed by its layout
        model.base(inputs_embeds=torch.zeros(3, plan.segments.sequences()[0].shape[1], found.shape[1]), use_cache=False)


def test_state_spaces_scan_in_short_chunks() -> None:
    model = PromptedModel(tiny("FalconH1Config"))
    assert {getattr(module, "chunk_size", 16) for module in model.base.modules() if hasattr(module, "A_log")} == {16}


def test_parts_that_mix_tokens_unexpectedly_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_layers, "TOKENWISE", ("norm", "attention"))
    model = PromptedModel(tiny_base("gpt_neo"))
    choose_pass(model, "it")
    assert not model.shared_prefix and not model.packed_layers.active


def by_ids(base: PreTrainedModel, soft_prompt: torch.Tensor, source: list[int], target: list[int]) -> torch.Tensor:
    """A row with its ids, and id 0 where the embedding is a soft prompt's."""
    ids = torch.tensor([[0] * len(soft_prompt) + source + target])
    embedding: Any = base.get_input_embeddings()
    rows = torch.cat([soft_prompt, embedding(ids[0, len(soft_prompt) :])])[None]
    hook = embedding.register_forward_hook(lambda *_: rows)
    try:
        logits = base(input_ids=ids, use_cache=False).logits[0, -len(target) - 1 : -1]
    finally:
        hook.remove()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="none")


@pytest.mark.parametrize("name", CASES)
def test_the_engine_generates_what_the_base_computes(name: str) -> None:
    """Greedy tokens of soft prompts side by side, each the most likely one in a pass over what stands before it."""
    engine = TransformersEngine(tiny(name), 2, EngineConfig(cache_bytes=1 << 20, context=120))
    try:
        assert engine.kind == KINDS[name][2]
        vectors = [prompt.detach() for prompt in soft_prompts([4, 7])]
        handles = [engine.add(each, str(at)) for at, each in enumerate(vectors)]
        answers = [
            [token.id for token in list(engine.generate(Request(text, handle, 6, ignore_end=True)))[:-1]]
            for handle in handles
            for text in ([9, 8, 7], [21] * 12)
        ]
    finally:
        engine.close()
    model = PromptedModel(tiny(name))
    choose_pass(model, name)
    for answer, (slot, text) in zip(answers, [(slot, text) for slot in (0, 1) for text in ([9, 8, 7], [21] * 12)], strict=True):
        assert len(answer) == 6
        for place, token in enumerate(answer):
            rows = [(text + answer[:place], [candidate]) for candidate in range(160)]
            with torch.no_grad():
                nll = model([vectors[slot]], pack_targets([len(vectors[slot])], [rows]))
            assert nll[token] <= nll.min() + 1e-4


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name][2] == "paged"])
def test_a_plan_counts_what_the_pages_take(name: str) -> None:
    model = PromptedModel(tiny(name))
    choose_pass(model, name, gradients=False)
    assert paged_numbers(model.base, model.base.config.num_hidden_layers) == page_numbers(model.base, stored_sizes(model))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("LlamaConfig", "padded"),
        pytest.param("FalconH1Config", "padded", marks=pytest.mark.nightly),
        ("RwkvConfig", "alone"),
        ("RobertaConfig", "recomputed"),
        ("XLMConfig", "recomputed"),
    ],
)
def test_evaluation_generates_what_the_base_computes(name: str, how: str) -> None:
    """Texts of different lengths after one soft prompt; transformers' own generation is not right for all of these."""
    model = PromptedModel(tiny(name))
    choose_pass(model, name)
    words = Tokenizer(WordLevel({str(token): token for token in range(160)}, unk_token="0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2")
    (vectors,) = (prompt.detach() for prompt in soft_prompts([4]))
    inputs = [[9, 8, 7], [21] * 9]
    encoder = Encoder(Template(input="{text}", target="{text}"), tokenizer, 100)
    texts = Greedy(model, encoder, 5).texts(vectors, inputs)
    assert model.generates == how
    reference = tiny(name)
    embedding: Any = reference.get_input_embeddings()
    for ids, text in zip(inputs, texts, strict=True):
        for token in map(int, text.split()):
            rows = torch.cat([vectors, embedding(torch.tensor(ids))])[None]
            with torch.no_grad():
                logits = reference(inputs_embeds=rows, use_cache=False).logits[0, -1]
            assert logits[token] >= logits.max() - 1e-4
            ids = [*ids, token]
        assert text


def test_a_model_that_is_not_causal_is_refused() -> None:
    base = transformers.BertLMHeadModel(transformers.BertConfig(**COMMON)).eval()
    with pytest.raises(BaseError, match=r"model.path: it \(BertLMHeadModel\) is not causal: .*; choose a decoder"):
        choose_pass(PromptedModel(base), "it")


def test_another_pass_is_taken_if_one_is_wrong(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Attention that forgets the soft prompt, as one of an architecture that nobody has tried."""
    original = tree_attention._inherited
    monkeypatch.setattr(tree_attention, "_inherited", lambda above, rows: original(above, rows) * (rows is None))
    model = PromptedModel(tiny_base("llama"))
    with caplog.at_level(logging.WARNING):
        choose_pass(model, "it")
    assert not model.shared_prefix and "soft prompts are concatenated row by row" in caplog.text
    monkeypatch.setattr(PromptedModel, "_concatenated", PromptedModel._shared)
    with pytest.raises(BaseError, match=r"model.path: a soft prompt in front of it .* choose another base"):
        choose_pass(PromptedModel(tiny_base("gpt_neo")), "it")


def test_rows_of_one_slot_are_not_confused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that gives every row of a slot the keys of the first one. Rows of slots of their own would not show it."""
    original = tree_attention._attend

    def confused(group: Any, queries: Any, keys: Any, *rest: Any) -> torch.Tensor:
        own = keys[id(group)]
        return original(group, queries, keys | {id(group): own[:1].expand_as(own)}, *rest)

    monkeypatch.setattr(tree_attention, "_attend", confused)
    model = PromptedModel(tiny_base("llama"))
    choose_pass(model, "it")
    assert not model.shared_prefix


def test_padding_of_shorter_rows_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written-out rows whose padding is taken for their end: equally long rows would not show it."""
    original = TokenTree.sequences

    def moved(tree: TokenTree, trees: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        index, lengths = original(tree, trees)
        shift = index.shape[1] - lengths
        columns = torch.arange(index.shape[1])[None] - shift[:, None]
        return index.gather(1, columns.clamp(min=0)), torch.full_like(lengths, index.shape[1])

    monkeypatch.setattr(TokenTree, "sequences", moved)
    with pytest.raises(BaseError, match="is not computed as its own tokens are"):
        choose_pass(PromptedModel(tiny_base("gpt_neo")), "it")


def test_hidden_states_may_be_changed_in_place() -> None:
    """As in GIT's embeddings: neither a view of a custom function, nor packed tokens that are known no longer."""
    layout = packed_layers.Layout(torch.tensor([[0, 1, 2], [0, 3, 3]]), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(), 4)
    packed = torch.arange(8.0).view(1, 4, 2).requires_grad_()
    rows = layout.written_out(packed)
    assert layout.packed_again(rows) is packed
    rows *= 2
    found = layout.packed_again(rows)
    assert torch.equal(found, 2 * packed)
    found += 1
    found.sum().backward()
    assert torch.equal(packed.grad, torch.full_like(packed, 2))


def test_what_an_architecture_raises_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PromptedModel(tiny_base("llama"))

    def fail(message: str) -> Any:
        def forward(*_: Any, **__: Any) -> Any:
            raise RuntimeError(message)

        return forward

    monkeypatch.setattr(model.base, "forward", fail("no such kernel\nand more"))
    with pytest.raises(
        BaseError, match=r"^model.path: it \(LlamaForCausalLM\) cannot .* gradients .*\(no such kernel\); choose"
    ) as said:
        choose_pass(model, "it")
    assert "\n" not in str(said.value)
    monkeypatch.setattr(model.base, "forward", fail("[gloo/transport/tcp/pair.cc:537] Connection reset by peer"))
    with pytest.raises(RuntimeError, match="Connection reset") as lost:  # a lost worker is not the architecture's fault
        choose_pass(model, "it")
    assert not isinstance(lost.value, BaseError)


def test_a_plain_model_is_given_ids_where_its_layers_look_them_up() -> None:
    base = tiny("Gemma4TextConfig")
    vectors, text = soft_prompts([4])[0].detach(), torch.tensor([[9, 8, 7]])
    with pytest.raises(RuntimeError, match="reverse the embedding"):
        next_logits(base, vectors, text)
    feeding = find_input(base)
    assert feeding.needs_ids and not find_input(tiny_base("llama", attention=None)).needs_ids
    found = next_logits(base, vectors, text, feeding)
    for token in (3, 50):
        nll = by_ids(tiny("Gemma4TextConfig"), vectors, text[0].tolist(), [token])
        assert torch.allclose(-torch.log_softmax(found, -1)[token], nll[0], atol=1e-4)


def test_another_generator_is_taken_if_one_is_wrong(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(paged_attention, "_causal", lambda length, seen, *_: torch.eye(length, seen, dtype=torch.bool))
    with caplog.at_level(logging.WARNING):
        engine = TransformersEngine(tiny_base("llama", attention=None), 2, EngineConfig(cache_bytes=1 << 20))
    engine.close()
    assert engine.kind == "plain" and caplog.messages == [
        "LlamaForCausalLM: no paged cache, requests run in batches of equal length"
    ]
    wrong = sampling.choose_tokens  # of other logits
    monkeypatch.setattr(plain_generator, "choose_tokens", lambda logits, states: wrong(torch.zeros_like(logits), states))
    with pytest.raises(RequestError, match="it .* does not generate with its cache what it computes without"):
        TransformersEngine(tiny_base("llama", attention=None), 2, EngineConfig(cache_bytes=1 << 20, name="it"))


def test_attention_without_its_tree_raises() -> None:
    model = PromptedModel(tiny_base("llama"))
    with pytest.raises(NotImplementedError, match="attention without a segment tree"):
        model.base(input_ids=torch.tensor([[5, 6]]))
