"""The corpus of the built-in base: an endless, seeded stream of short English documents.

Reviews, news, requests, messages, stories, facts, questions: bare, or put together with a label in one of many formats,
alone or several in a row. No document contains a validation or test text of the tasks.
"""

import random
import re
from collections.abc import Callable, Iterator
from functools import partial

from pretraining.grammar import Draw, Grammar, tidy

TOPICS = ("world", "sports", "business", "technology", "health", "entertainment")
INTENTS = ("alarm", "weather", "music", "booking", "navigation", "message", "shopping", "home")
REVIEWS = ("thing", "story", "place", "app")
LABELS = {
    "sentiment": ("-", "+"),
    "topic": TOPICS,
    "intent": INTENTS,
    "spam": ("ham", "spam"),
    "domain": REVIEWS,
    "kind": ("review", "news", "request", "message"),
}
"""The kinds of labels, each with its classes in the order of the label sets in `lexicon/formats.txt`."""

POLAR_SECTIONS = (
    *("adj", "staff_adj", "food_adj", "story_adj", "room_adj", "thing_adj", "app_adj", "feeling", "loved", "love"),
    *("thing_event", "app_event", "story_event", "place_event", "maker", "maker_verb", "verdict", "exclaim", "noun"),
    *("adj", "thing_event", "verdict", "story_event", "place_event", "life", "life", "it_got"),
)
ENTRIES: dict[str, tuple[str, ...] | dict[str, tuple[str, ...]]] = {
    "sentiment": POLAR_SECTIONS,
    "topic": {
        "world": ("world_event", "leader", "world_thing", "news.world"),
        "sports": ("sport_event", "athlete", "sport_thing", "sport", "news.sports"),
        "business": ("business_event", "company", "business_thing", "news.business"),
        "technology": ("tech_event", "tech_maker", "tech_thing", "news.technology"),
        "health": ("health_event",),
        "entertainment": ("culture_event",),
    },
    "intent": {intent: (f"intent.{intent}",) for intent in INTENTS},
    "spam": {
        "spam": ("spam", "spam", "act", "junk_goods", "urgent", "prize"),
        "ham": ("ham", "ham", "chore", "nearby"),
    },
}
"""Where the entries of a glossary come from."""

SYLLABLE = ("bcdfghjklmnprstvwz", "aeiou", ("", "", "n", "r", "s", "l", "m", "t", "ng", "ck"))
Span = tuple[int, int]
"""Start and end of a piece of a document, in characters."""
ANSWER_START, ANSWER_END = "\x02", "\x03"

QUESTION_FORMS = (("Q: ", "\nA: "), ("Question: ", "\nAnswer: "), ("", " "), ("Q: ", " A: "), ("", "\n"))
"""What stands before a question, and between it and its answer."""

REVIEW_SUBJECTS = frozenset({"thing", "story", "place", "place_food", "place_stay", "app"})


class Corpus:
    """Draws documents; two corpora with the same seed draw the same ones."""

    def __init__(self, seed: int, forbidden: frozenset[str] = frozenset()):
        """`forbidden` holds texts in the form of `plain_form` that no document may contain as its text."""
        self.rng = random.Random(seed)
        self.grammar = Grammar()
        self.forbidden = forbidden
        makers: list[tuple[int, Callable[[], str]]] = [
            (12, self.bare_text),
            (24, lambda: self.labelled("sentiment")),
            (18, lambda: self.several("sentiment")),
            (16, lambda: self.glossary("sentiment")),
            (5, self.words_alike),
            (14, self.natural_sentiment),
            (2, self.mixed_review),
            *((8, partial(self.labelled, task)) for task in ("topic", "intent", "spam")),
            *((5, partial(self.several, task)) for task in ("topic", "intent", "spam")),
            *((4, partial(self.glossary, task)) for task in ("topic", "intent", "spam")),
            (2, lambda: self.labelled("domain")),
            (2, lambda: self.labelled("kind")),
            (9, self.facts),
            (5, self.question),
            (4, self.story),
            (3, self.plain_sentences),
        ]
        self.makers = [maker for _, maker in makers]
        self.weights = [weight for weight, _ in makers]

    def documents(self) -> Iterator[str]:
        """Documents without end."""
        for document, _ in self.documents_with_answers():
            yield document

    def documents_with_answers(self) -> Iterator[tuple[str, list[Span]]]:
        """Documents without end, each with the places of its answers: labels, and sentences that follow from facts."""
        while True:
            yield unmarked(self.rng.choices(self.makers, self.weights)[0]())

    # --- texts, each with its class ---

    def draw(self, polarity: str = "", *sticky: str, **bound: str) -> Draw:
        """A fresh draw for one text."""
        return Draw(self.rng, polarity, bound=dict(bound), sticky=frozenset(sticky))

    def review(self, polarity: str, about: str = "") -> str:
        """One review; some people write without capitals or a full stop, some shout, some use words nobody knows."""
        about = about or self.rng.choice(REVIEWS)
        text = self.grammar.text(f"review_of_{about}", self.draw(polarity, *REVIEW_SUBJECTS))
        if self.rng.random() < 0.08:
            text = f"{self.grammar.text('plain', self.draw())} {text}"
        if self.rng.random() < 0.05:
            words = text.split(" ")
            words[self.rng.randrange(len(words))] = self.unknown_word()
            text = " ".join(words)
        roll = self.rng.random()
        if roll < 0.06:
            text = text.lower()
        elif roll < 0.10:
            text = text.rstrip(".!")
        elif roll < 0.11:
            text = text.upper()
        return text

    def unknown_word(self) -> str:
        """A word that no lexicon has, so that the base learns to read on over words it does not know."""
        syllables = ("".join(self.rng.choice(letters) for letters in SYLLABLE) for _ in range(self.rng.randint(1, 4)))
        return "".join(syllables)

    def request(self, intent: str) -> str:
        """One request to an assistant."""
        text = self.grammar.expand(self.grammar.choose(f"intent.{intent}", self.draw()), self.draw())
        text = self.grammar.expand(self.grammar.choose("request_frame", self.draw()), self.draw(text=text))
        return tidy(text) if self.rng.random() < 0.4 else text

    def message(self, kind: str) -> str:
        """One wanted or unwanted message, sometimes of two sentences."""
        texts = {key: self.grammar.text(kind, self.draw()) for key in ("text", "text2")}
        return self.grammar.expand(self.grammar.choose("msg_text", self.draw()), self.draw(**texts))

    def text_of(self, task: str, label: str) -> str:
        """A text of the given class that is not forbidden."""
        while True:
            if task == "sentiment":
                text = self.review(label)
            elif task == "domain":
                text = self.review(self.rng.choice("+-"), label)
            elif task == "topic":
                text = self.grammar.text(f"news.{label}", self.draw())
            elif task == "intent":
                text = self.request(label)
            elif task == "spam":
                text = self.message(label)
            else:
                text = self.text_of_kind(label)
            if plain_form(text) not in self.forbidden:
                return text

    def text_of_kind(self, kind: str) -> str:
        """A review, news, a request or a message."""
        task = {"review": "sentiment", "news": "topic", "request": "intent", "message": "spam"}[kind]
        return self.text_of(task, self.rng.choice(LABELS[task]))

    # --- documents ---

    def bare_text(self) -> str:
        """One to four texts without any label; reviews in a row share their polarity."""
        task = self.rng.choices(("sentiment", "topic", "intent", "spam"), (8, 3, 2, 2))[0]
        label = self.rng.choice(LABELS[task])
        texts = [self.text_of(task, label) for _ in range(self.rng.randint(1, 4))]
        return self.rng.choice(("\n", "\n\n", " ")).join(texts)

    def form(self, task: str, instructed: bool) -> tuple[str, dict[str, str], list[str]]:
        """A shape, its cue words, and the words for the classes of a task."""
        shape = self.grammar.choose("shape" if self.rng.random() < 0.92 else "shape_first", self.draw())
        general = 0.5 if instructed else 0.25
        text_cue = "any" if self.rng.random() < general else task
        label_cue = "any" if self.rng.random() < general else task
        cues = {
            "tcue": self.grammar.choose(f"text_cue.{text_cue}", self.draw()),
            "lcue": self.grammar.choose(f"cue.{label_cue}", self.draw()),
        }
        if f"labels.{task}" in self.grammar.sections:
            words = self.grammar.choose(f"labels.{task}", self.draw()).split(" / ")
        else:
            words = list(LABELS[task])
        return shape, cues, words

    def instruction(self, task: str) -> str:
        """Words before the examples that say what is asked, with or without the possible answers."""
        return self.grammar.choose(f"instruction.{task}", self.draw()) + self.rng.choice((" ", "\n", "\n", "\n\n"))

    def labelled(self, task: str) -> str:
        """One text with its label."""
        instructed = self.rng.random() < 0.3
        shape, cues, words = self.form(task, instructed)
        start = self.instruction(task) if instructed else ""
        return start + self.example(task, shape, cues, words)

    def several(self, task: str) -> str:
        """Two to six texts with their labels, all in one format."""
        instructed = self.rng.random() < 0.3
        shape, cues, words = self.form(task, instructed)
        separator = self.rng.choice(("\n", "\n\n", "\n###\n", "\n---\n"))
        examples = [self.example(task, shape, cues, words) for _ in range(self.rng.randint(2, 6))]
        return (self.instruction(task) if instructed else "") + separator.join(examples)

    def example(self, task: str, shape: str, cues: dict[str, str], words: list[str]) -> str:
        """A text and its label in a shape."""
        index = self.rng.randrange(len(words))
        text = self.text_of(task, LABELS[task][index])
        return self.grammar.expand(shape, self.draw(text=text, label=marked(words[index]), **cues))

    def glossary(self, task: str) -> str:
        """Four to ten short entries, each with its class: what single words and phrases mean."""
        shape = self.rng.choice(("{text}: {label}", "{text} = {label}", "{text} - {label}", "{text} -> {label}"))
        _, cues, words = self.form(task, False)
        indexes = [self.rng.randrange(len(words)) for _ in range(self.rng.randint(4, 10))]
        entries = [(self.entry(task, LABELS[task][index]), words[index]) for index in indexes]
        lines = [self.grammar.expand(shape, self.draw(text=text, label=marked(word), **cues)) for text, word in entries]
        return self.rng.choice(("\n", "\n", ", ")).join(lines)

    def entry(self, task: str, label: str) -> str:
        """A word or phrase of a class; for spam, a whole message."""
        sections = ENTRIES[task]
        if isinstance(sections, dict):
            sections = sections[label]
        while True:
            draw = self.draw(label if task == "sentiment" else "")
            section = self.rng.choice(sections)
            text = self.grammar.expand(self.grammar.choose(section, draw), draw)
            if plain_form(text) not in self.forbidden:
                return text

    def words_alike(self) -> str:
        """Words of praise, or of complaint, in a row."""
        polarity = self.rng.choice("+-")
        words = [self.entry("sentiment", polarity) for _ in range(self.rng.randint(3, 9))]
        sets = self.grammar.choose("labels.sentiment", self.draw()).split(" / ")
        start = self.rng.choice(("", f"{sets[polarity == '+']}: "))
        return start + self.rng.choice((", ", "; ", "\n", " and ")).join(words)

    def natural_sentiment(self) -> str:
        """A review and, in plain words, what its writer feels."""
        polarity = self.rng.choice("+-")
        text = self.text_of("sentiment", polarity)
        if text[-1].isalnum():
            text += "."
        draw = self.draw(polarity, text=text)
        return self.grammar.expand(self.grammar.choose("natural.sentiment", draw), draw)

    def mixed_review(self) -> str:
        """Praise and complaint side by side, labelled as mixed."""
        about = self.rng.choice(REVIEWS)
        text = " ".join(self.review(polarity, about) for polarity in self.rng.sample("+-", 2))
        shape, cues, _ = self.form("sentiment", False)
        label = self.grammar.choose("mixed_labels", self.draw())
        return self.grammar.expand(shape, self.draw(text=text, label=marked(label), **cues))

    def facts(self) -> str:
        """A few facts as pairs, and a sentence that says the same."""
        kind = self.rng.choice(("person", "person", "place"))
        values = person_facts(self.grammar, self.draw()) if kind == "person" else place_facts(self.grammar, self.draw())
        pieces = self.grammar.choose(f"facts.{kind}", self.draw()).split("|")
        # The first two facts (who, and what) are always there; the others come and go with their piece of the sentence.
        kept = [self.rng.random() < 0.7 for _ in pieces[1:]]
        sentence = pieces[0] + "".join(piece for piece, keep in zip(pieces[1:], kept, strict=True) if keep)
        sentence = self.grammar.expand(sentence.rstrip(".") + ".", self.draw(**values))
        keys = [*list(values)[:2], *(key for key, keep in zip(list(values)[2:], kept, strict=True) if keep)]
        pair = self.grammar.choose("facts.pair", self.draw())
        pairs = [self.grammar.expand(pair, self.draw(key=key, value=values[key])) for key in keys]
        start = self.rng.choice(("", "Facts: ", "Data: ", "Facts:\n", "Input: "))
        end = self.rng.choice(("\n", "\nText: ", "\nSentence: ", " => ", "\nOutput: ", " -> ", "\nSummary: "))
        return start + self.grammar.choose("facts.join", self.draw()).join(pairs) + end + marked(tidy(sentence))

    def question(self) -> str:
        """A question with its answer, from a sentence or from common knowledge."""
        before, between = self.rng.choice(QUESTION_FORMS)
        if self.rng.random() < 0.35:
            asked, answer = self.grammar.choose("knowledge", self.draw()).split("|")
            return before + asked + between + marked(answer)
        draw = self.draw("", "*")
        # Every reference keeps its value, so that the question, the sentence and the answer speak of the same things.
        parts = self.grammar.choose("qa", self.draw()).replace("<a|an>", "a").split("|")
        asked, sentence, answer = (tidy(self.grammar.expand(part, draw)) for part in parts)
        return self.rng.choice(("", "Text: ", "Context: ")) + sentence + "\n" + before + asked + between + marked(answer)

    def story(self) -> str:
        """A small story; a name keeps its bearer to the end."""
        return self.grammar.text("story_text", self.draw("", "*"))

    def plain_sentences(self) -> str:
        """One to four unrelated plain sentences."""
        return " ".join(self.grammar.text("plain", self.draw()) for _ in range(self.rng.randint(1, 4)))


def marked(answer: str) -> str:
    """An answer between marks."""
    return ANSWER_START + answer + ANSWER_END


def unmarked(document: str) -> tuple[str, list[Span]]:
    """The document without the marks, and where its answers are."""
    pieces, spans, length = [], [], 0
    for index, piece in enumerate(re.split(f"[{ANSWER_START}{ANSWER_END}]", document)):
        # Marks come in pairs, so every second piece is an answer.
        if index % 2:
            spans.append((length, length + len(piece)))
        pieces.append(piece)
        length += len(piece)
    return "".join(pieces), spans


def person_facts(grammar: Grammar, draw: Draw) -> dict[str, str]:
    """Facts about somebody, under the names that the sentence patterns use."""
    return {
        "name": grammar.choose("first_name", draw),
        "job": grammar.choose("job", draw),
        "city": grammar.choose("city", draw),
        "pet": f"{grammar.choose('color', draw)} {grammar.choose('animal', draw)}",
        "likes": grammar.choose("food", draw),
    }


def place_facts(grammar: Grammar, draw: Draw) -> dict[str, str]:
    """Facts about a restaurant."""
    return {
        "name": grammar.expand(grammar.choose("facts.place_name", draw), draw),
        "cuisine": grammar.choose("cuisine", draw),
        "area": grammar.choose("facts.area", draw),
        "price": grammar.choose("facts.price", draw),
        "clock": grammar.choose("clock", draw),
    }


def plain_form(text: str) -> str:
    """A text without case, punctuation and spacing, to tell whether two are the same."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
