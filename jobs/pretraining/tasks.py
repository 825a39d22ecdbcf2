"""The shipped tasks: sentiment, topic, intent, spam and facts, as rows of text and label.

What separates the splits: templates (`lexicon/tasks.txt`) serve one split only, and the words of the lexicons in
`SPLIT_BY_TASK` belong to one split only. Shared are function words, numbers, days and what is spoken about. A row that
contains a word of a later split's lexicons by accident, for example inside a template, is dropped.

    cd jobs && python -m pretraining.tasks       writes tasks/<task>/{train,validation,test}.jsonl again
"""

import json
import math
import random
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

from pretraining.corpus import person_facts, plain_form
from pretraining.grammar import Draw, Grammar, NothingToDraw, tidy
from ptuning.builtin import TASKS_FOLDER

SEED = 20_240
PARTS = ("train", "validation", "test")
SIZES = {"train": 2_000, "validation": 400, "test": 800}
TASKS = ("sentiment", "topic", "intent", "spam", "facts")

_POLAR = (
    *("adj", "staff_adj", "food_adj", "story_adj", "room_adj", "thing_adj", "app_adj", "feeling", "loved", "verdict"),
    *("thing_event", "app_event", "story_event", "place_event", "maker", "maker_verb"),
)
TOPIC_WORDS = {
    "World": ("world_event", "leader", "world_thing"),
    "Sports": ("sport_event", "athlete", "sport_thing"),
    "Business": ("business_event", "company", "business_thing"),
    "Technology": ("tech_event", "tech_maker", "tech_thing"),
}
"""The lexicons of each topic: what happens, who acts, what it is about."""

SPLIT_BY_TASK = {
    "sentiment": frozenset(name + sign for name in _POLAR for sign in "+-"),
    "topic": frozenset(section for sections in TOPIC_WORDS.values() for section in sections),
    "intent": frozenset(f"intent.{name}" for name in ("alarm", "weather", "music", "booking", "navigation", "message"))
    | {"music_kind", "street", "cuisine", "weather_thing", "note", "contact"},
    "spam": frozenset({"spam", "ham", "prize", "act", "junk_goods", "urgent", "nearby", "chore"}),
    "facts": frozenset({"first_name", "job", "city", "animal", "food"}),
}
"""The lexicons whose items are dealt out to the splits of each task."""

INTENT_NAMES = ("Alarm", "Weather", "Music", "Booking", "Navigation", "Message")
SUBJECTS = frozenset({"thing", "story", "app", "place", "place_food", "place_stay", "person"})
LABELS = {
    "sentiment": ("Negative", "Positive"),
    "topic": tuple(TOPIC_WORDS),
    "intent": INTENT_NAMES,
    "spam": ("Normal", "Spam"),
}

Row = dict[str, str]


@cache
def parts_of(task: str) -> dict[str, str]:
    """The part of each item, in lower case, of the task's split lexicons: of each lexicon about 60 % serve train, 15 %
    validation and 25 % test. A word in several lexicons has the same part in all of them."""
    sections = Grammar().sections
    parts: dict[str, str] = {}
    for name in sorted(SPLIT_BY_TASK[task]):
        # In the order of their hashes: a new item changes the part of few others.
        new = sorted({item.lower() for item in sections[name]} - parts.keys(), key=lambda i: sha256(i.encode()).digest())
        test, validation = round(0.25 * len(new)), math.ceil(0.15 * len(new))
        for index, item in enumerate(new):
            parts[item] = "test" if index < test else "validation" if index < test + validation else "train"
    return parts


def plain_words(task: str, part: str) -> frozenset[str]:
    """The plain forms of the items of a part, without those that refer to other lexicons."""
    return frozenset(plain_form(item) for item, its in parts_of(task).items() if its == part and not re.search("[{<]", item))


def held_out_pattern(task: str, part: str) -> re.Pattern[str]:
    """Matches the plain form of a text that contains a word of a later split: train is kept free of the words of
    validation and test, validation of those of test."""
    later = set[str]().union(*(plain_words(task, other) for other in PARTS[PARTS.index(part) + 1 :]))
    words = sorted(later - plain_words(task, part), key=lambda word: (-len(word), word))
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b" if words else r"(?!)")


class TaskRows:
    """Draws the rows of one split of one task."""

    def __init__(self, task: str, part: str):
        self.task, self.part = task, part
        self.grammar = Grammar(parts=parts_of(task))
        # Seeded by a string: random.Random hashes it the same way on every machine.
        self.rng = random.Random(f"{SEED}/{task}/{part}")

    def draw(self, polarity: str = "", **bound: str) -> Draw:
        """A fresh draw for one row."""
        return Draw(self.rng, polarity, self.part, dict(bound), SUBJECTS)

    def row(self, label: str) -> Row:
        """One row; raises NothingToDraw if a template wants a word that this part has not."""
        if self.task == "facts":
            return self.facts_row()
        return {"text": getattr(self, f"{self.task}_text")(label), "label": label}

    def framed(self, polarity: str = "", **bound: str) -> str:
        """A text from the task's own templates of this part."""
        return self.grammar.text(f"{self.task}.{self.part}", self.draw(polarity, **bound))

    def drawn(self, section: str) -> str:
        """An item of a section with everything in it replaced."""
        return self.grammar.expand(self.grammar.choose(section, self.draw()), self.draw())

    def sentiment_text(self, label: str) -> str:
        """A review in one or two sentences."""
        polarity = "+" if label == "Positive" else "-"
        text = self.framed(polarity)
        return f"{text} {self.framed(polarity)}" if self.rng.random() < 0.2 else text

    def topic_text(self, label: str) -> str:
        """A piece of news."""
        event, actor, thing = (self.drawn(section) for section in TOPIC_WORDS[label])
        return self.framed(event=event, actor=actor, thing_of=thing)

    def intent_text(self, label: str) -> str:
        """A request."""
        return self.framed(ask=self.drawn(f"intent.{label.lower()}"))

    def spam_text(self, label: str) -> str:
        """A message."""
        body = self.grammar.text("spam" if label == "Spam" else "ham", self.draw())
        return self.framed(body=body)

    def facts_row(self) -> Row:
        """Facts about somebody, in any order, and the one sentence that says them."""
        values = person_facts(self.grammar, self.draw())
        extra = {"city": " from {city}", "pet": " who has a {pet}", "likes": " and likes {likes}"}
        kept = [key for key in extra if self.rng.random() < 0.75]
        template = "{name} is a {job}" + "".join(extra[key] for key in kept) + "."
        keys = ["name", "job", *kept]
        if self.part == "test":
            self.rng.shuffle(keys)
        sentence = tidy(self.grammar.expand(template, self.draw(**values)))
        return {"facts": " | ".join(f"{key}: {values[key]}" for key in keys), "text": sentence}

    def rows(self) -> Iterator[Row]:
        """Different rows without end, as many of each label, free of the words of the splits after this one."""
        forbidden = held_out_pattern(self.task, self.part)
        seen: set[str] = set()
        labels = LABELS.get(self.task, ("",))
        while True:
            for label in self.rng.sample(labels, len(labels)):
                yield self.new_row(label, seen, forbidden)

    def new_row(self, label: str, seen: set[str], forbidden: re.Pattern[str]) -> Row:
        """A row of a label that is not in `seen` yet."""
        while True:
            with suppress(NothingToDraw):
                row = self.row(label)
                form = plain_form(" ".join(text for key, text in row.items() if key != "label"))
                if form not in seen and not forbidden.search(form):
                    seen.add(form)
                    return row


@cache
def split_rows(task: str, part: str) -> tuple[Row, ...]:
    """The rows of a split, always the same."""
    rows = TaskRows(task, part).rows()
    return tuple(next(rows) for _ in range(SIZES[part]))


def split_text(task: str, part: str) -> str:
    """The content of a split's file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in split_rows(task, part))


def held_out_texts() -> frozenset[str]:
    """The plain forms of all validation and test texts, which the corpus of pretraining must not contain."""
    rows = (row for task in TASKS for part in PARTS[1:] for row in split_rows(task, part))
    return frozenset(plain_form(text) for row in rows for key, text in row.items() if key != "label")


def write_tasks(folder: Path = TASKS_FOLDER) -> None:
    """Write every split of every task."""
    for task in TASKS:
        (folder / task).mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            (folder / task / f"{part}.jsonl").write_text(split_text(task, part), encoding="utf-8")


if __name__ == "__main__":
    write_tasks()
