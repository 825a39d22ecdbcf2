"""Pretraining of the built-in base: tokenizer and model from the generated corpus, on two CPU cores in about an hour."""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pretraining.corpus import Corpus, Span
from pretraining.tasks import held_out_texts

CARD = Path(__file__).parent / "card.md"
"""The model card, with the figures to be filled in."""
END, PAD = "<|end|>", "<|pad|>"
TOKENS_PER_STEP = 4_096
CONTEXT = 1_024
SAMPLE_STARTS = (
    "The waiter was",
    "I bought this lamp",
    "Review: The plot was gripping and the ending made me cry.\nSentiment:",
    "Facts: name: Anna | job: baker | city: Lima\nSentence:",
    "Q: What is the capital of Japan?\nA:",
    "Once there was",
    "zxq blorf vrumm kli",
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a pretraining."""

    seed: int = 0
    steps: int = 2_500
    learning_rate: float = 4e-3
    """The peak, after the warm-up; half a cosine leads down to 5 % of it."""
    vocabulary: int = 3_072
    width: int = 256
    layers: int = 4
    heads: int = 4
    feed_forward: int = 704
    warmup: int = 40
    weight_decay: float = 0.1
    clip: float = 1.0
    answer_weight: int = 5
    """Weight of the loss of an answer's tokens. Answers are few among the tokens: with weight 1 the base learns
    to write long before it learns to judge."""

    def rate(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then half a cosine."""
        cosine = 0.05 + 0.475 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min((step + 1) / self.warmup, cosine)


def corpus(seed: int) -> Corpus:
    """The corpus of a seed, without the validation and test texts of the tasks."""
    return Corpus(seed, held_out_texts())


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text becomes tokens and comes back unchanged. It adds nothing by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Packed:
    """Documents one after the other, each closed by the end token: ids [tokens] and whether each is in an answer."""

    ids: np.ndarray
    in_answer: np.ndarray


def pack(documents: Iterator[tuple[str, list[Span]]], tokenizer: PreTrainedTokenizerFast, tokens: int) -> Packed:
    """As many documents as fill the given number of tokens; the last is cut."""
    packed = Packed(np.empty(tokens, dtype=np.uint16), np.zeros(tokens, dtype=bool))
    filled = 0
    while filled < tokens:
        texts, answers = zip(*islice(documents, 2_000), strict=True)
        for encoding, spans in zip(tokenizer.backend_tokenizer.encode_batch(list(texts)), answers, strict=True):
            ids = [*encoding.ids, tokenizer.eos_token_id][: tokens - filled]
            packed.ids[filled : filled + len(ids)] = ids
            for index, (start, end) in enumerate(encoding.offsets[: len(ids)]):
                packed.in_answer[filled + index] = any(start < last and end > first for first, last in spans)
            filled += len(ids)
    return packed


def batch(packed: Packed, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The token ids [B, T] of a step and which of them are in answers.

    Most rows are 128 long, which holds one to four documents and is fastest; some steps have rows of 512 or of the
    whole context, so that far positions are trained too.
    """
    length = CONTEXT if step % 16 == 15 else 512 if step % 8 == 3 else 128
    chunk = slice(step * TOKENS_PER_STEP, (step + 1) * TOKENS_PER_STEP)
    ids = torch.from_numpy(packed.ids[chunk].astype(np.int64)).view(-1, length)
    return ids, torch.from_numpy(packed.in_answer[chunk]).view(-1, length)


def losses_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Cross entropy [B, T - 1] of each next token, over ids [B, T]."""
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
    logits = model.lm_head(hidden).float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


@torch.no_grad()
def held_out_losses(model: LlamaForCausalLM, packed: Packed) -> tuple[float, float]:
    """Mean loss over all held-out tokens, and over those in answers; every token weighs the same."""
    everywhere, answers = [], []
    for step in range(len(packed.ids) // TOKENS_PER_STEP):
        ids, in_answer = batch(packed, step)
        losses = losses_of(model, ids.to(model.device)).cpu()
        everywhere.append(losses.flatten())
        answers.append(losses[in_answer[:, 1:]])
    return torch.cat(everywhere).mean().item(), torch.cat(answers).mean().item()


class Trainer:
    """A bf16 model with fp32 master weights: on a CPU a third faster than autocast."""

    def __init__(self, model: LlamaForCausalLM, recipe: Recipe):
        self.model, self.recipe = model, recipe
        self.parameters = list(model.parameters())
        self.masters = [p.detach().float().clone() for p in self.parameters]
        model.bfloat16()
        named = zip((name for name, _ in model.named_parameters()), self.masters, strict=True)
        matrices: list[torch.Tensor] = []
        others: list[torch.Tensor] = []
        for name, master in named:
            (matrices if ".layers." in name and master.dim() == 2 else others).append(master)
        # Muon for the layers' matrices learns faster from the same tokens than AdamW alone; scaled to the size of
        # AdamW's updates, both take the same learning rate.
        muon = torch.optim.Muon(matrices, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (muon, adamw)

    def step(self, rate: float, ids: torch.Tensor, in_answer: torch.Tensor) -> float:
        """One update with a learning rate from ids [B, T]; the weighted loss before it."""
        weights = 1.0 + (self.recipe.answer_weight - 1) * in_answer[:, 1:]
        loss = (losses_of(self.model, ids) * weights).sum() / weights.sum()
        loss.backward()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, self.recipe.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.copy_(master)
        return loss.item()


class Tracking:
    """Sends parameters and metrics to MLflow when there is a tracking URI."""

    def __init__(self, uri: str | None, recipe: Recipe):
        self.client = None
        if uri:
            from mlflow import MlflowClient
            from mlflow.entities import Param

            self.client = MlflowClient(tracking_uri=uri)
            experiment = self.client.get_experiment_by_name("builtin-base")
            experiment_id = experiment.experiment_id if experiment else self.client.create_experiment("builtin-base")
            self.run_id = self.client.create_run(experiment_id).info.run_id
            self.client.log_batch(self.run_id, params=[Param(k, str(v)) for k, v in asdict(recipe).items()])

    def metrics(self, step: int, **values: float) -> None:
        """Log figures of a step."""
        if self.client:
            for name, value in values.items():
                self.client.log_metric(self.run_id, name, value, step=step)

    def finish(self) -> None:
        """Mark the run as done."""
        if self.client:
            self.client.set_terminated(self.run_id)


def pretrain(out: Path, recipe: Recipe, device: str = "cpu", tracking_uri: str | None = None) -> dict[str, float]:
    """Train tokenizer and model, write them with their card to `out`, and return the figures of the card.

    A snapshot is written on the way, every 300 steps, so that a long run can be looked at before it ends.
    """
    started = time.time()
    torch.manual_seed(recipe.seed)
    tracking = Tracking(tracking_uri, recipe)
    tokenizer = train_tokenizer(islice(corpus(recipe.seed).documents(), 60_000), recipe.vocabulary)
    model = new_model(recipe, tokenizer)
    cast(torch.nn.Module, model).to(device)
    packed = pack(corpus(recipe.seed).documents_with_answers(), tokenizer, recipe.steps * TOKENS_PER_STEP)
    held_out = pack(corpus(recipe.seed + 1).documents_with_answers(), tokenizer, 16 * TOKENS_PER_STEP)
    print(f"{len(packed.ids)} tokens after {time.time() - started:.0f} s", flush=True)
    print("step  loss  held-out  answers  seconds", flush=True)
    figures: dict[str, float] = {}
    trainer = Trainer(model, recipe)
    for step in range(recipe.steps):
        loss = trainer.step(recipe.rate(step), *(tensor.to(device) for tensor in batch(packed, step)))
        last = step == recipe.steps - 1
        if step % 100 == 99 or last:
            figures = figures_of(model, held_out, step, started)
            tracking.metrics(step + 1, loss=loss, **figures)
            values = (f"{figures[name]:.3f}" for name in ("held_out_loss", "held_out_answer_loss"))
            print(f"{step + 1:4d}  {loss:.3f}  {'  '.join(values)}  {time.time() - started:.0f}", flush=True)
        if step % 300 == 299 or last:
            save(out, model, tokenizer, recipe, figures)
    tracking.finish()
    return figures


def figures_of(model: LlamaForCausalLM, held_out: Packed, step: int, started: float) -> dict[str, float]:
    """What the card says about a model after a step."""
    everywhere, answers = held_out_losses(model, held_out)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": (step + 1) * TOKENS_PER_STEP,
        "held_out_loss": everywhere,
        "held_out_perplexity": math.exp(everywhere),
        "held_out_answer_loss": answers,
        "minutes": (time.time() - started) / 60,
    }


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of the recipe's shape with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def save(
    out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, figures: dict[str, float]
) -> None:
    """Write the base as any Hugging Face model, and its card."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    samples = "\n".join(f"- {json.dumps(s)} -> {json.dumps(greedy(model, tokenizer, s))}" for s in SAMPLE_STARTS)
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    named = {f"figure_{name}": value for name, value in figures.items()}
    card = CARD.read_text(encoding="utf-8").format(
        **asdict(recipe),
        **named,
        context=CONTEXT,
        tokens_per_step=TOKENS_PER_STEP,
        samples=samples,
        digest=digest,
    )
    (out / "README.md").write_text(card, encoding="utf-8")


@torch.no_grad()
def greedy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, start: str, tokens: int = 40) -> str:
    """The greedy continuation of a text."""
    ids = torch.tensor([tokenizer(start).input_ids], device=model.device)
    # transformers types `generate` for a protocol that its own classes do not match.
    out = cast(Any, model).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
