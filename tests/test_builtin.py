"""The built-in base: its corpus is reproducible, its tasks hold out what they promise, its weights know English."""

import hashlib
import json
import math
import random
import re
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
from pretraining.corpus import Corpus, plain_form
from pretraining.grammar import Draw, Grammar, read_sections, tidy
from pretraining.tasks import LABELS, PARTS, SIZES, SPLIT_BY_TASK, TASKS, held_out_texts, parts_of, plain_words, split_text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ptuning.builtin import BASE_FOLDER, TASKS_FOLDER

pytestmark = pytest.mark.fast

EVERYDAY = Path(__file__).parent / "data" / "everyday_reviews.jsonl"
BOUND = {"text", "label", "tcue", "lcue", "key", "value", "name", "pet", "likes", "area", "price"} | {
    *("event", "actor", "thing_of", "ask", "body")
}
"""References that the generator binds to values instead of drawing them from a section."""
HELD_OUT_SENTENCES = (
    "The waiter was friendly and the soup was delicious.",
    "We stayed two nights and the bed was very comfortable.",
    "I bought this lamp last week and it does not work.",
    "Can you set an alarm for seven tomorrow?",
    "The striker scored two goals in the final on Sunday.",
)


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def task_file(task: str, part: str) -> Path:
    """The file of a split of a task."""
    return TASKS_FOLDER / task / f"{part}.jsonl"


@cache
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base and its tokenizer, as anybody would load them."""
    model = AutoModelForCausalLM.from_pretrained(BASE_FOLDER, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(BASE_FOLDER)


def corpus_hash(seed: int, documents: int = 500) -> str:
    """A hash of the first documents of a corpus."""
    return hashlib.sha256("\0".join(islice(Corpus(seed).documents(), documents)).encode()).hexdigest()


# --- grammar and corpus ---


def test_same_seed_same_corpus_and_another_seed_another_one() -> None:
    assert corpus_hash(3) == corpus_hash(3)
    assert corpus_hash(3) != corpus_hash(4)


def test_every_reference_in_the_lexicons_names_a_section_or_a_bound_value() -> None:
    sections = Grammar().sections
    known = {name.rstrip("*+-") for name in sections} | BOUND
    references = {name for items in sections.values() for item in items for name in re.findall(r"\{([^{}]+?)[*!]?\}", item)}
    assert {name for name in references if name.rstrip("2+-") not in known} == set()


def test_a_brace_without_its_partner_is_refused(tmp_path: Path) -> None:
    (tmp_path / "reviews.txt").write_text("[review]\n{denied*}{end*}\n*}{end*}\n")
    with pytest.raises(ValueError, match=r"reviews.txt:3: a brace without its partner in '\*}{end\*}'"):
        read_sections(tmp_path)


def test_polarity_follows_the_star_and_turns_at_the_exclamation_mark() -> None:
    grammar = Grammar({"adj+": ("good",), "adj-": ("bad",), "both*": ("{adj*} not {adj!}",)})
    assert grammar.expand("{both*}", Draw(random.Random(0), "+")) == "good not bad"
    assert grammar.expand("{both!}", Draw(random.Random(0), "+")) == "bad not good"


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a old hat and an new one", "An old hat and a new one"),
        ("we am happy. i was, too", "We are happy. I was, too"),
        ("a honest user of an university", "An honest user of a university"),
    ],
)
def test_tidy(raw: str, clean: str) -> None:
    assert tidy(raw) == clean


# --- tasks ---


@pytest.mark.parametrize("task", TASKS)
def test_regenerating_a_task_gives_the_committed_files(task: str) -> None:
    for part in PARTS:
        assert task_file(task, part).read_text(encoding="utf-8") == split_text(task, part), part


@pytest.mark.parametrize("task", TASKS)
def test_no_text_is_in_two_splits_or_twice_in_one(task: str) -> None:
    texts = {part: [plain_form(next(iter(row.values()))) for row in rows_of(task_file(task, part))] for part in PARTS}
    assert {part: len(found) for part, found in texts.items()} == SIZES
    everything = [text for found in texts.values() for text in found]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("task", TASKS)
def test_held_out_words_do_not_occur_in_train(task: str) -> None:
    rows = rows_of(task_file(task, "train"))
    train = "\n".join(f" {plain_form(' '.join(text for key, text in row.items() if key != 'label'))} " for row in rows)
    words = {part: plain_words(task, part) for part in PARTS}
    # Two items that differ only in punctuation can fall into two parts; such a word is not held out.
    held_out = (words["validation"] | words["test"]) - words["train"]
    assert len(held_out) > 15
    assert [word for word in held_out if f" {word} " in train] == []


@pytest.mark.parametrize("task", LABELS)
def test_labels_are_the_known_ones_and_balanced(task: str) -> None:
    for part in PARTS:
        labels = [row["label"] for row in rows_of(task_file(task, part))]
        assert set(labels) == set(LABELS[task])
        counts = [labels.count(label) for label in LABELS[task]]
        assert max(counts) - min(counts) <= 1


def test_templates_serve_one_split_and_not_the_corpus() -> None:
    sections = Grammar().sections
    tasks = {name: set(items) for name, items in sections.items() if name.rpartition(".")[2] in PARTS}
    others = {item for name, items in sections.items() if name not in tasks for item in items}
    assert len(tasks) == 12
    for task in LABELS:
        train, validation, test = (tasks[f"{task}.{part}"] for part in PARTS)
        assert not train & validation and not train & test and not validation & test
    assert not set.union(*tasks.values()) & others


@pytest.mark.parametrize("task", TASKS)
def test_every_split_lexicon_has_items_for_every_part(task: str) -> None:
    sections, parts = Grammar().sections, parts_of(task)
    for name in SPLIT_BY_TASK[task]:
        assert {parts[item.lower()] for item in sections[name]} == set(PARTS), name


def test_the_corpus_of_pretraining_contains_no_held_out_text() -> None:
    held_out = held_out_texts()
    corpus = Corpus(0, held_out)
    assert plain_form("The waffles? Fresh.") == "the waffles fresh"
    drawn = (("sentiment", "+"), ("sentiment", "-"), ("topic", "world"), ("intent", "music"), ("spam", "spam"))
    assert not held_out & {plain_form(corpus.text_of(task, label)) for _ in range(60) for task, label in drawn}
    refused = plain_form("Love it.")
    strict = Corpus(1, frozenset({refused}))
    assert refused not in {plain_form(strict.text_of("sentiment", "+")) for _ in range(2_000)}


# --- everyday reviews ---


def test_everyday_reviews_are_well_formed_and_in_no_training_text() -> None:
    rows = rows_of(EVERYDAY)
    assert [set(row) for row in rows] == [{"text", "label"}] * 50
    assert [row["label"] for row in rows].count("Positive") == 25
    assert len({row["text"] for row in rows}) == 50
    sentences = [plain_form(row["text"]) for row in rows]
    corpus = " | ".join(plain_form(document) for document in islice(Corpus(0).documents(), 5_000))
    trained = " | ".join(plain_form(split_text(task, part)) for task in TASKS for part in PARTS)
    assert [sentence for sentence in sentences if sentence in corpus or sentence in trained] == []


# --- the base ---


def test_the_base_loads_is_small_and_has_its_special_tokens() -> None:
    model, tokenizer = loaded()
    assert sum(file.stat().st_size for file in BASE_FOLDER.iterdir()) <= 12 * 2**20
    assert 3_000_000 <= model.num_parameters() <= 6_000_000
    assert model.config.max_position_embeddings >= 512
    assert model.config.vocab_size == len(tokenizer) == model.get_output_embeddings().weight.shape[0]
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


@pytest.mark.parametrize("text", ["Grüße, 你好! 🙂", "a  b\n\tc", " leading and trailing ", "<tag> {brace} 'n' \"q\""])
def test_any_text_survives_the_tokenizer_and_nothing_is_added(text: str) -> None:
    _, tokenizer = loaded()
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {tokenizer.eos_token_id, tokenizer.pad_token_id}


def test_the_card_names_the_weights() -> None:
    digest = hashlib.sha256((BASE_FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (BASE_FOLDER / "README.md").read_text(encoding="utf-8")


def perplexity(text: str) -> float:
    """Perplexity of a text under the base, per token."""
    model, tokenizer = loaded()
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids]])
    with torch.no_grad():
        return math.exp(model(input_ids=ids, labels=ids).loss.item())


@pytest.mark.parametrize("sentence", HELD_OUT_SENTENCES)
def test_a_sentence_is_far_more_likely_than_its_words_shuffled(sentence: str) -> None:
    words = sentence.rstrip(".?").split()
    random.Random(0).shuffle(words)
    assert 4 * perplexity(sentence) < perplexity(" ".join(words) + ".")
