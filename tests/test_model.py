"""The laws of the pass: what K soft prompts over one base compute is what each computes alone, written out in full.

The reference everywhere is transformers' own forward of one row at a time with eager attention.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from benchmarks.steps import padded
from conftest import ARCHITECTURES, CONCATENATED, tiny_base
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ptuning.model.label_trie import LabelTrie
from ptuning.model.packed_batch import PackedBatch
from ptuning.model.packing import Objective, Row, pack_labels, pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.self_check import choose_pass
from ptuning.model.token_tree import TokenTree

pytestmark = pytest.mark.fast

WIDTH, VOCABULARY = 32, 100
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

# Two slots and rows of different lengths, longer than the sliding windows (4) of the architectures that have one.
ROWS: list[list[Row]] = [
    [([1, 2, 3], [7, 2]), ([4, 5, 6, 7, 8, 9, 10, 11], [9, 2]), ([50], [2])],
    [([9, 60, 61], [3, 4, 5, 2])],
]
LABELS = LabelTrie(((7, 2), (8, 9, 2), (8, 2), (3, 2), (8, 9, 10, 2), (8, 9, 10, 4, 2)))
CHOSEN: list[list[Row]] = [
    [([1, 2, 3], [7, 2]), ([4, 5, 6, 7, 8, 9, 10, 11], [8, 9, 2]), ([50], [8, 9, 10, 4, 2])],
    [([9, 60, 61], [8, 2]), ([9, 60], [3, 2])],
]


@cache
def prompted(architecture: str) -> PromptedModel:
    return PromptedModel(tiny_base(architecture))


@cache
def reference(architecture: str) -> PreTrainedModel:
    """The same base, untouched by us."""
    return tiny_base(architecture).requires_grad_(False)


def soft_prompts(lengths: list[int], seed: int = 0, width: int = WIDTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, width, generator=generator).requires_grad_() for length in lengths]


def alone(base: PreTrainedModel, soft_prompt: Tensor, row: Row) -> Tensor:
    """Negative log-likelihood of a row's target tokens, the sequence written out: what the pass must compute."""
    source, target = row
    text = base.get_input_embeddings()(torch.tensor(source + target))
    logits = base(inputs_embeds=torch.cat([soft_prompt, text])[None], use_cache=False).logits[0]
    return cross_entropy(logits[-len(target) - 1 : -1].float(), torch.tensor(target), reduction="none")


def chosen(base: PreTrainedModel, soft_prompt: Tensor, source: list[int], label: tuple[int, ...]) -> Tensor:
    """-log p(label | text) in plain torch: at each token of the label, a softmax over those that any label allows there."""
    text = base.get_input_embeddings()(torch.tensor([*source, *label]))
    logits = base(inputs_embeds=torch.cat([soft_prompt, text])[None], use_cache=False).logits[0].float()
    nll = torch.zeros(())
    for depth, token in enumerate(label):
        allowed = sorted({other[depth] for other in LABELS.labels if other[:depth] == label[:depth]})
        among = torch.log_softmax(logits[len(soft_prompt) + len(source) - 1 + depth, torch.tensor(allowed)], -1)
        nll = nll - among[allowed.index(token)]
    return nll


def every_logit(model: PromptedModel, soft_prompt: Tensor, texts: list[list[int]]) -> Tensor:
    """Logits at every text token, `[sum of T, V]`, packed."""
    segments = TokenTree()
    root = segments.add([len(soft_prompt)]) if len(soft_prompt) else None
    segments.add([len(text) for text in texts], root)
    tokens = torch.tensor(sum(texts, []))
    at = torch.arange(len(soft_prompt), segments.tokens)
    plan = PackedBatch(segments, tokens, at, tokens, [len(tokens)])
    packed = torch.cat([soft_prompt, model.base.get_input_embeddings()(tokens)])
    with torch.no_grad():
        return model._logits(packed, plan, plan.placed(model.base.device))


# Law 1 ---------------------------------------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("texts", [[[3, 4, 5, 6, 7]], [[3, 4, 5, 6, 7], [8, 9]]], ids=["unpadded", "padded"])
def test_golden_law_a_soft_prompt_made_of_a_text_is_that_text(architecture, texts):
    model, base = prompted(architecture), reference(architecture)
    front = [11, 12, 13, 14, 15, 16]
    soft_prompt = base.get_input_embeddings()(torch.tensor(front))
    logits = every_logit(model, soft_prompt, texts).split([len(text) for text in texts])
    for text, got in zip(texts, logits, strict=True):
        with torch.no_grad():
            expected = base(input_ids=torch.tensor([front + text]), use_cache=False).logits[0, len(front) :]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@every_architecture
def test_golden_law_is_bit_exact_for_plain_concatenation(architecture):
    base = tiny_base(architecture, attention=None)
    front, text = [11, 12, 13, 14], [3, 4, 5, 6, 7]
    with torch.no_grad():
        expected = base(input_ids=torch.tensor([front + text]), use_cache=False).logits[0, len(front) :]
    model = PromptedModel(base)
    model.shared_prefix = False
    soft_prompt = base.get_input_embeddings()(torch.tensor(front))
    assert torch.equal(every_logit(model, soft_prompt, [text]), expected)


@every_architecture
def test_without_soft_prompt_it_is_the_bare_base(architecture):
    model, base = prompted(architecture), reference(architecture)
    text = [3, 4, 5, 6, 7, 8]
    with torch.no_grad():
        expected = base(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    got = every_logit(model, torch.zeros(0, WIDTH), [text])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


# Values and gradients ------------------------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("lengths", [[5, 3], [1, 9], [0, 4]], ids=str)
def test_losses_and_gradients_equal_the_rows_written_out(architecture, lengths):
    model, base = prompted(architecture), reference(architecture)
    prompts = soft_prompts(lengths)
    plan = pack_targets(lengths, ROWS)
    got = model(prompts, plan)
    expected = torch.cat([alone(base, prompts[k], row) for k in range(2) for row in ROWS[k]])
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
    assert got.dtype == torch.float32
    assert plan.per_slot == [sum(len(target) for _, target in rows) for rows in ROWS]
    trained = [prompt for prompt in prompts if len(prompt)]
    for mine, theirs in zip(torch.autograd.grad(got.sum(), trained), torch.autograd.grad(expected.sum(), trained), strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


@every_architecture
def test_labels_are_scored_as_if_each_stood_alone(architecture):
    model, base = prompted(architecture), reference(architecture)
    prompts = soft_prompts([5, 0])
    inputs = [[source for source, _ in rows] for rows in ROWS]
    with torch.no_grad():
        edges = model(prompts, pack_labels([5, 0], inputs, LABELS)).view(-1, len(LABELS.edges))
        got = -LABELS.label_logprobs(-edges).float()
        expected = [
            torch.stack([chosen(base, prompts[k], source, label) for label in LABELS.labels])
            for k in range(2)
            for source in inputs[k]
        ]
    torch.testing.assert_close(got, torch.stack(expected), atol=2e-5, rtol=1e-5)


@every_architecture
@pytest.mark.parametrize("text", [False, True], ids=["choice", "choice and text"])
def test_choices_and_their_gradients_equal_the_rows_written_out(architecture, text):
    model, base = prompted(architecture), reference(architecture)
    lengths = [5, 3]
    prompts = soft_prompts(lengths)
    plan = pack_targets(lengths, CHOSEN, [Objective(LABELS, text), Objective(LABELS, text=False)])
    found = plan.split(model(prompts, plan))
    for k, (tokens, choices) in enumerate(found):
        rows = CHOSEN[k]
        expected = sum(chosen(base, prompts[k], source, tuple(label)) for source, label in rows)
        torch.testing.assert_close(choices.sum(), expected, atol=2e-5, rtol=1e-5)
        whole = choices.sum()
        if text and k == 0:
            written = torch.cat([alone(base, prompts[k], row) for row in rows])
            torch.testing.assert_close(tokens, written, atol=2e-5, rtol=1e-5)
            whole, expected = whole + tokens.sum(), expected + written.sum()
        else:
            assert not len(tokens)
        (mine,) = torch.autograd.grad(whole, prompts[k : k + 1], retain_graph=True)
        (theirs,) = torch.autograd.grad(expected, prompts[k : k + 1])
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_labels_that_part_at_once_need_no_further_segment():
    plan = pack_labels([3], [[[1, 2], [3]]], LabelTrie(((7, 2), (8, 9, 2))))
    assert plan.positions == 3 + 3 and not len(plan.at)
    assert plan.choices.at.tolist() == [4, 5]
    assert plan.choices.ids.tolist() == [7, 8] and plan.choices.child.tolist() == [0, 1, 0, 1]


def test_a_choice_computes_only_the_rows_of_the_head_that_it_reads():
    model, shapes = prompted("llama"), []
    hook = model.base.get_output_embeddings().register_forward_hook(lambda module, inputs, out: shapes.append(tuple(out.shape)))
    try:
        plan = pack_targets([5, 3], CHOSEN, [Objective(LABELS, text=False)] * 2)
        assert len(model(soft_prompts([5, 3]), plan)) == len(plan.choices.at)
        assert shapes == [(1, len(plan.choices.at), len(LABELS.ids))]
        # And no token behind the last choice of a row.
        fed = sum(len(source) + LABELS.fed_length(tuple(label)) for rows in CHOSEN for source, label in rows)
        assert plan.positions == 5 + 3 + fed
    finally:
        hook.remove()


def test_the_last_target_token_is_never_fed():
    plan = pack_targets([3], [[([1, 2], [7, 8, 9])]])
    assert plan.tokens.tolist() == [1, 2, 7, 8]
    assert plan.at.tolist() == [4, 5, 6]
    assert plan.targets.tolist() == [7, 8, 9]


@pytest.mark.parametrize("row", [([], [7, 8]), ([1, 2], [])], ids=["no input", "no target"])
def test_a_row_without_input_or_target_is_refused(row):
    with pytest.raises(ValueError, match="a row needs at least one input and one target token"):
        pack_targets([3], [[([1], [2]), row]])


@every_architecture
def test_a_slot_without_rows_has_a_zero_gradient(architecture):
    """A worker may get no row of a small batch; under ZeRO-3 it must still take part in the pass."""
    prompts = soft_prompts([3, 4])
    plan = pack_targets([3, 4], [[], []])
    loss = prompted(architecture)(prompts, plan)
    assert loss.shape == (0,) and plan.per_slot == [0, 0]
    for gradient in torch.autograd.grad(loss.sum(), prompts):
        assert not gradient.any()


def test_architectures_without_shared_attention_say_so(caplog):
    shared = set()
    with caplog.at_level(logging.WARNING):
        for name in ARCHITECTURES:
            model = PromptedModel(tiny_base(name))
            choose_pass(model, name)
            shared |= {name} if model.shared_prefix else set()
    assert shared == set(ARCHITECTURES) - CONCATENATED
    assert len(caplog.messages) == len(CONCATENATED)
    assert all("soft prompts are concatenated row by row" in message for message in caplog.messages)


# Law 2 ---------------------------------------------------------------------------------------------------------------


@every_architecture
def test_only_the_soft_prompt_moves(architecture):
    model = PromptedModel(tiny_base(architecture))
    before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    prompts = soft_prompts([5, 3])
    start = [prompt.detach().clone() for prompt in prompts]
    optimizer = torch.optim.AdamW(prompts, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(prompts, pack_targets([5, 3], ROWS)).sum().backward()
        optimizer.step()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.base.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base.state_dict().items())
    assert not any(torch.equal(prompt, old) for prompt, old in zip(prompts, start, strict=True))


# Law 4 ---------------------------------------------------------------------------------------------------------------

token = st.integers(3, VOCABULARY - 1)
rows = st.lists(st.tuples(st.lists(token, min_size=1, max_size=9), st.lists(token, min_size=1, max_size=4)), max_size=4)
packs = st.lists(st.tuples(st.integers(1, 12), rows), min_size=1, max_size=4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mistral", "gpt_neo"])
@settings(max_examples=15)
@given(pack=packs)
def test_packing_changes_nothing(architecture, pack):
    model = prompted(architecture)
    lengths, batches = [length for length, _ in pack], [batch for _, batch in pack]
    prompts = soft_prompts(lengths)
    plan = pack_targets(lengths, batches)
    losses = model(prompts, plan).split(plan.per_slot)
    together = torch.autograd.grad(sum(loss.sum() for loss in losses), prompts)
    for k in range(len(pack)):
        if not batches[k]:
            assert not together[k].any()
            continue
        loss = model(prompts[k : k + 1], pack_targets(lengths[k : k + 1], batches[k : k + 1]))
        (gradient,) = torch.autograd.grad(loss.sum(), prompts[k : k + 1])
        assert (losses[k] - loss).norm() <= 1e-6 * loss.norm() + 1e-6
        rounding = 2e-5 if architecture in CONCATENATED else 5e-6  # those are padded to the longest sequence of the pack
        assert (together[k] - gradient).norm() <= rounding * gradient.norm() + 1e-6


@every_architecture
def test_a_nan_neighbour_leaves_the_others_untouched(architecture):
    model = prompted(architecture)
    plan = pack_targets([5, 3], ROWS)
    prompts = soft_prompts([5, 3])
    healthy = model(prompts, plan).split(plan.per_slot)[0]
    (healthy_gradient,) = torch.autograd.grad(healthy.sum(), prompts[:1])
    sick = [prompts[0], torch.full((3, WIDTH), torch.nan, requires_grad=True)]
    losses = model(sick, plan).split(plan.per_slot)
    assert losses[1].isnan().all()
    assert losses[0].isfinite().all()
    # Both losses go backward together, as they do in training.
    gradient, sick_gradient = torch.autograd.grad(losses[0].sum() + losses[1].sum(), sick)
    assert torch.equal(losses[0], healthy)
    assert torch.equal(gradient, healthy_gradient)
    assert sick_gradient.isnan().all()


# Memory, precision, dropout ------------------------------------------------------------------------------------------


def _saved(compute) -> tuple[Tensor, int]:
    """A loss, and the numbers that its graph keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compute()
    return loss, sum(kept.values())


@every_architecture
def test_gradient_checkpointing_changes_memory_only(architecture):
    plan, prompts = pack_targets([5, 3], ROWS), soft_prompts([5, 3])
    model = PromptedModel(tiny_base(architecture, **_layers(architecture, 4)))
    loss, plain = _saved(lambda: model(prompts, plan).sum())
    expected = torch.autograd.grad(loss, prompts)
    model.checkpoint_gradients()
    loss, checkpointed = _saved(lambda: model(prompts, plan).sum())
    got = torch.autograd.grad(loss, prompts)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert checkpointed < plain


def _layers(architecture: str, n: int) -> dict[str, object]:
    if architecture == "gpt_neo":
        return {"num_layers": n, "attention_types": [[["global", "local"], n // 2]]}
    return {"n_layer": n} if architecture == "gpt2" else {"num_hidden_layers": n}


@every_architecture
def test_bfloat16_base_gives_fp32_losses_and_gradients(architecture):
    plan, prompts = pack_targets([5, 3], ROWS), soft_prompts([5, 3])
    exact = prompted(architecture)(prompts, plan)
    model = PromptedModel(tiny_base(architecture).to(torch.bfloat16))
    loss = model(prompts, plan)
    assert loss.dtype == torch.float32
    # bf16 keeps 8 bits; through two wide random layers the loss of a token is good to some tenths.
    assert (loss - exact).abs().mean() < 0.1 * exact.abs().mean()
    for gradient in torch.autograd.grad(loss.sum(), prompts):
        assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neo", "opt", "falcon", "llama"])
def test_dropout_is_off_even_in_training_mode(architecture):
    dropout = (
        {"attention_dropout": 0.5} if architecture != "gpt2" else {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
    )
    if architecture in ("gpt_neo", "opt", "falcon"):
        name = {"gpt_neo": "resid_dropout", "opt": "dropout", "falcon": "hidden_dropout"}[architecture]
        dropout[name] = 0.5
    model = PromptedModel(tiny_base(architecture, **dropout))
    plan, prompts = pack_targets([5, 3], ROWS), soft_prompts([5, 3])
    expected = model(prompts, plan)
    model.train()
    assert torch.equal(model(prompts, plan), expected)
    torch.testing.assert_close(expected, prompted(architecture)(prompts, plan))


# Cost ----------------------------------------------------------------------------------------------------------------


def first_projections(base):
    projections = ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj")
    return sum(parameter.numel() for name, parameter in base.named_parameters() if any(each in name for each in projections))


def test_a_step_computes_no_more_than_it_must():
    """FLOPs of a step: 4 N (sum of P + T) for the layers, 4 V H targets for the head, and attention. Forward 2 and
    backward 2 per weight and token, for frozen weights have no gradient; T: the last target token is not fed. The last
    layer's queries, output and MLP are computed for targets only, and the backward pass of the first layer's queries, keys
    and values for soft prompts only.

    Attention: two products (scores, values) forward and four backward, each 2 R T S H per layer, for R rows of at most
    T tokens that look at S = ancestors + T; causal halves are computed and thrown away. That is what the mathematical
    SDPA does; fused kernels compute the scores a second time in the backward pass.
    """
    layers, width, vocabulary, lengths, longest = 3, 128, 500, [20, 7], 12
    base = tiny_base(
        "llama_tied_gqa", hidden_size=width, intermediate_size=256, num_hidden_layers=layers, vocab_size=vocabulary
    )
    model = PromptedModel(base)
    batches = [[([5] * (longest - 2), [6, 7, 2])] * 4, [([5] * (longest - 2), [6, 7, 2]), ([5] * 4, [6, 2])]]
    plan, prompts = pack_targets(lengths, batches), soft_prompts(lengths, width=width)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(prompts, plan).sum().backward()
    n = sum(parameter.numel() for name, parameter in base.named_parameters() if "embed_tokens" not in name)
    fed = sum(len(source) + len(target) - 1 for rows in batches for source, target in rows)
    targets = sum(len(target) for rows in batches for _, target in rows)
    looked = sum(p * p + len(rows) * longest * (p + longest) for p, rows in zip(lengths, batches, strict=True))
    last = sum(
        parameter.numel()
        for name, parameter in base.named_parameters()
        if f"layers.{layers - 1}." in name and any(part in name for part in ("q_proj", "o_proj", "mlp."))
    )
    expected = (
        4 * (n - last) * (sum(lengths) + fed)
        - 2 * first_projections(base) * fed
        + 4 * last * targets
        + 6 * 2 * layers * width * looked
        + 4 * vocabulary * width * targets
    )
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_a_step_of_choices_computes_what_it_reads():
    """`4 N (P + B T) + attention + 4 U H choices`: T without the tokens behind the last choice, U ids that are compared."""
    base, length, rows = tiny_base("llama"), 6, [([5] * 9, [8, 9, 10, 2]), ([5] * 9, [8, 9, 2])]
    model, plan = PromptedModel(base), pack_targets([length], [rows], [Objective(LABELS, text=False)])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(soft_prompts([length]), plan).sum().backward()
    n = sum(parameter.numel() for name, parameter in base.named_parameters() if "embed" not in name and "lm_head" not in name)
    layers = base.config.num_hidden_layers
    last = sum(
        parameter.numel()
        for name, parameter in base.named_parameters()
        if f"layers.{layers - 1}." in name and any(part in name for part in ("q_proj", "o_proj", "mlp."))
    )
    texts = [9 + 3, 9 + 2]
    looked = length**2 + len(rows) * max(texts) * (length + max(texts))
    reads = len(plan.kept)
    expected = 4 * (n - last) * (length + sum(texts)) - 2 * first_projections(base) * sum(texts) + 4 * last * reads
    expected += 6 * 2 * layers * WIDTH * looked
    expected += 4 * len(LABELS.ids) * WIDTH * reads
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


# PEFT ----------------------------------------------------------------------------------------------------------------


def _peft(architecture: str, soft_prompt: Tensor):
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=len(soft_prompt),
        token_dim=WIDTH,
        num_layers=2,
        num_attention_heads=4,
        num_transformer_submodules=1,
    )
    model = get_peft_model(tiny_base(architecture), config)
    model.prompt_encoder["default"].embedding.weight.data.copy_(soft_prompt)
    return model


PEFT_ARCHITECTURES = ["llama_tied_gqa", "gpt2", "gpt_neo", "qwen3", "gemma2", "mistral"]


@pytest.mark.parametrize("architecture", PEFT_ARCHITECTURES)
def test_logits_and_loss_equal_pefts(architecture):
    (soft_prompt,) = soft_prompts([6])
    theirs, ours = _peft(architecture, soft_prompt), prompted(architecture)
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([[3, 4, 5, 6, 7]])).logits[0, -5:]
        torch.testing.assert_close(every_logit(ours, soft_prompt.detach(), [[3, 4, 5, 6, 7]]), logits, atol=1e-5, rtol=1e-5)
        loss = ours([soft_prompt], pack_targets([6], ROWS[:1])).mean()
        assert loss.item() == pytest.approx(theirs(**padded(ROWS[0])).loss.item(), rel=1e-5)


@pytest.mark.parametrize("architecture", PEFT_ARCHITECTURES)
def test_twenty_steps_follow_pefts_curve(architecture):
    (soft_prompt,) = soft_prompts([6])
    theirs, ours = _peft(architecture, soft_prompt), prompted(architecture)
    generator = torch.Generator().manual_seed(1)
    batches: list[list[Row]] = []
    for _ in range(20):
        sizes = torch.randint(1, 9, (4,), generator=generator).tolist()
        batches.append([(torch.randint(3, 100, (size,), generator=generator).tolist(), [size, 2]) for size in sizes])
    their_optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.02)
    our_optimizer = torch.optim.AdamW([soft_prompt], lr=0.02)
    for batch in batches:
        their_loss = theirs(**padded(batch)).loss
        our_loss = ours([soft_prompt], pack_targets([6], [batch])).mean()
        assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-4)
        for optimizer, loss in ((their_optimizer, their_loss), (our_optimizer, our_loss)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_shapes_that_come_once_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: the limits are read once. Without them every shape adds 0.7 to 0.9 MiB, all 200."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    script = """
import psutil, torch
from conftest import tiny_base
from ptuning.model.prompted_model import PromptedModel
PromptedModel(tiny_base("llama"))
weight, process = torch.randn(256, 256, dtype=torch.bfloat16), psutil.Process()
before = process.memory_info().rss
for rows in range(1, 300):
    torch.nn.functional.linear(torch.ones(rows, 256, dtype=torch.bfloat16), weight)
print((process.memory_info().rss - before) >> 20)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
    assert int(done.stdout) < 100
