"""Metrics: by hand, against the libraries' own entry points, and as properties."""

import math
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu

from ptuning.training.metrics import classification, generation, token_f1

pytestmark = pytest.mark.fast

METRICS = ("exact_match", "token_f1", "rouge_l", "bleu")

words = st.lists(st.sampled_from(["the", "a", "cat", "sat", "on", "mat", "big", ".", "Red's", "7"]), max_size=8).map(" ".join)
answers = st.lists(words, min_size=1, max_size=3)
tasks = st.lists(st.tuples(words, answers), min_size=1, max_size=5)


def test_classification_by_hand():
    scores = np.log([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]])
    result = classification(scores, np.array([0, 1, 1, 1]))
    assert result["accuracy"] == 0.75
    assert result["confusion"] == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    # Label 0: precision 1/2, recall 1; label 1: precision 1, recall 2/3; label 2 never appears and counts as 0.
    assert result["macro_f1"] == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)


@given(st.integers(2, 5), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_classification_is_consistent(labels, n, seed):
    random = np.random.default_rng(seed)
    scores, truth = random.integers(-9, 1, (n, labels)).astype(float), random.integers(0, labels, n)
    result = classification(scores, truth)
    confusion = np.array(result["confusion"])
    assert confusion.shape == (labels, labels)
    assert confusion.sum(1).tolist() == np.bincount(truth, minlength=labels).tolist()
    assert result["accuracy"] == pytest.approx(np.trace(confusion) / n)
    f1 = [2 * confusion[k, k] / max(1, confusion[k].sum() + confusion[:, k].sum()) for k in range(labels)]
    assert result["macro_f1"] == pytest.approx(np.mean(f1))
    # The order of the rows and a constant added to all of a row's scores do not matter.
    order = random.permutation(n)
    assert classification(scores[order] - 4 * np.arange(n)[:, None], truth[order])["confusion"] == result["confusion"]


def test_minus_infinity_is_a_score():
    assert classification(np.array([[-np.inf, -3.0]]), np.array([1]))["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classification(np.zeros((0, 2)), np.array([], int)), "no rows to measure"),
        (lambda: classification(np.array([[0.0, 1.0], [np.nan, 0.0]]), np.array([0, 1])), "scores of row 1 are NaN"),
        (lambda: generation([], []), "no rows to measure"),
        (lambda: generation(["a", "b"], [["a"], []]), "row 1 has no reference"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        call()


def test_generation_by_hand():
    result = generation([" the cat sat ", "a dog"], [["A cat stood.", "the cat sat"], ["The big red dog!"]])
    assert result["exact_match"] == 0.5
    assert result["token_f1"] == pytest.approx((1 + 2 * 1 / (1 + 3)) / 2)
    # ROUGE-L keeps articles: of "a dog" and "the big red dog" one word of 2 and of 4 is common.
    assert result["rouge_l"] == pytest.approx((1 + 2 * 1 / (2 + 4)) / 2)


def test_bleu_by_hand():
    # One swap: 6 of 6 words are right, "cd", "de", "ef" of 5 pairs, 2 of 4 triples, 1 of 3 quadruples.
    result = generation(["b a c d e f"], [["a b c d e f"]])
    precisions = [6 / 6, 3 / 5, 2 / 4, 1 / 3]
    assert result["bleu"] == pytest.approx(math.prod(precisions) ** 0.25)


def test_perfect_is_one_and_nothing_is_zero():
    texts = ["a cat sat on the mat", "le chat noir est assis là"]
    assert generation(texts, [[text] for text in texts]) == pytest.approx(dict.fromkeys(METRICS, 1.0))
    assert generation(["", ""], [[text] for text in texts]) == dict.fromkeys(METRICS, 0.0)


@pytest.mark.parametrize(
    "text",
    ["кошка сидит на большом красном ковре", "Ünïcödé straße ist schön, nicht wahr?", "猫 は マット の 上 に 座る"],
)
def test_other_scripts_count(text):
    result = generation([text], [["nothing alike", text]])
    assert result == pytest.approx(dict.fromkeys(METRICS, 1.0))


@pytest.mark.parametrize(
    ("prediction", "reference", "f1"),
    [
        ("The U.S. Army", "US army", 1.0),
        ("«Paris»", "paris", 1.0),
        ("", "", 1.0),
        ("the", "", 1.0),
        ("cat", "", 0.0),
        ("", "cat", 0.0),
        ("cat cat", "cat", 2 / 3),
        ("theatre", "atre", 0.0),
    ],
)
def test_token_f1_as_squad_counts_it(prediction, reference, f1):
    assert token_f1(prediction, reference) == pytest.approx(f1)


@given(tasks)
def test_generation_agrees_with_the_libraries(task):
    predictions, references = [text for text, _ in task], [answers for _, answers in task]
    result = generation(predictions, references)
    assert all(0 <= result[name] <= 1 + 1e-9 for name in METRICS)
    rouge = RougeScorer(["rougeL"])
    best = [max(rouge.score(answer, text)["rougeL"].fmeasure for answer in answers) for text, answers in task]
    assert result["rouge_l"] == pytest.approx(np.mean(best))
    most = max(map(len, references))
    streams = [[row[n] if n < len(row) else None for row in references] for n in range(most)]
    assert result["bleu"] == pytest.approx(corpus_bleu(predictions, streams).score / 100)


@given(tasks, words)
def test_one_more_reference_never_hurts_a_row(task, extra):
    predictions, references = [text for text, _ in task], [answers for _, answers in task]
    before = generation(predictions, references)
    after = generation(predictions, [[*answers, extra] for answers in references])
    assert all(after[name] >= before[name] - 1e-12 for name in ("exact_match", "token_f1", "rouge_l"))


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_text_can_be_measured(prediction, reference):
    result = generation([prediction], [[reference]])
    assert all(0 <= result[name] <= 1 + 1e-9 for name in METRICS)
    assert token_f1(prediction, reference) == token_f1(reference, prediction)


@given(st.text(string.ascii_letters + string.digits + string.punctuation + " \n", max_size=30))
def test_words_of_ascii_text_are_the_librarys_words(text):
    reference = "a1 B_c the D"
    ours = generation([text], [[reference]])["rouge_l"]
    assert ours == pytest.approx(RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure)
