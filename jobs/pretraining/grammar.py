r"""A small text grammar: sections of items, drawn at random.

A file in `lexicon/` holds sections, `[name]`, and under each its items, one per line or separated by `; `. In an item

    {name}      draws from a section, or takes the value bound to that name
    {name2}     draws from section `name` a second, separately remembered value
    {name*}     draws with the polarity of the text: from sections name, name* and name+ (or name-)
    {name!}     the same with the polarity turned around
    <a|b>       chooses one of the alternatives
    \n \_ \;    a line break, a space at an edge, a semicolon that does not separate
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

LEXICON_FOLDER = Path(__file__).parent / "lexicon"
PLURAL_VERBS = {"am": "are", "is": "are", "was": "were", "has": "have"}
FLIPPED = {"+": "-", "-": "+", "": ""}

Node = str | tuple[str, tuple[str, ...]]
"""A literal text, or ("{", names) for a reference, or ("<", items) for a choice."""


class NothingToDraw(LookupError):
    """A section has no item in the wanted part; the caller draws another template."""


@lru_cache(maxsize=200_000)
def parse_item(item: str) -> tuple[Node, ...]:
    """Split an item into literals, references and choices."""
    nodes: list[Node] = []
    for piece in re.split(r"(\{[\w.]+[*!+-]?\}|<[^<>]*>)", item):
        if piece.startswith("{") and piece.endswith("}"):
            nodes.append(("{", (piece[1:-1],)))
        elif piece.startswith("<") and piece.endswith(">"):
            nodes.append(("<", tuple(piece[1:-1].split("|"))))
        elif piece:
            nodes.append(piece)
    return tuple(nodes)


def read_sections(folder: Path = LEXICON_FOLDER) -> dict[str, tuple[str, ...]]:
    """All sections of all lexicon files, in the order of their names.

    Raises:
        ValueError: a line has a brace without its partner.
    """
    sections: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*.txt")):
        current: list[str] = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(r"[{}]", re.sub(r"{[^{}]*}", "", line)):
                raise ValueError(f"{file}:{number}: a brace without its partner in {line!r}; complete the reference")
            header = re.fullmatch(r"\[([\w.]+[*+-]?)\]", line.strip())
            if header:
                current = sections.setdefault(header[1], [])
            elif line.strip() and not line.startswith("# "):
                items = (item.strip() for item in re.split(r"(?<!\\);\s+", line))
                current += [item.replace(r"\n", "\n").replace(r"\_", " ").replace(r"\;", ";") for item in items if item]
    return {name: tuple(items) for name, items in sections.items()}


@dataclass
class Draw:
    """What one text is drawn with: its randomness, polarity, part and the values bound so far."""

    rng: random.Random
    polarity: str = ""
    part: str = ""
    bound: dict[str, str] = field(default_factory=dict)
    sticky: frozenset[str] = frozenset()
    """Sections that keep their first value for the rest of the text; "*" in it means all."""


class Grammar:
    """The sections, and texts drawn from them."""

    def __init__(self, sections: Mapping[str, tuple[str, ...]] | None = None, parts: Mapping[str, str] | None = None):
        """`parts` gives the part of each item that serves one part only, in lower case; the others serve all."""
        self.sections = dict(sections if sections is not None else read_sections())
        self.parts = dict(parts or {})
        self._options: dict[tuple[str, str, str], tuple[str, ...]] = {}

    def options(self, name: str, polarity: str = "", part: str = "") -> tuple[str, ...]:
        """The items that a reference to `name` may draw."""
        key = (name, polarity, part)
        if key not in self._options:
            found: list[str] = []
            for section in dict.fromkeys((name, f"{name}*", f"{name}{polarity}")):
                items = self.sections.get(section, ())
                found += [item for item in items if not part or self.parts.get(item.lower(), part) == part]
            self._options[key] = tuple(found)
        return self._options[key]

    def choose(self, name: str, draw: Draw) -> str:
        """One item of a section, not yet expanded."""
        options = self.options(name, draw.polarity, draw.part)
        if not options:
            raise NothingToDraw(f"section {name!r}, polarity {draw.polarity!r}, part {draw.part!r}")
        return options[int(draw.rng.random() * len(options))]

    def expand(self, item: str, draw: Draw) -> str:
        """The item with every reference and choice in it replaced."""
        pieces: list[str] = []
        for node in parse_item(item):
            if isinstance(node, str):
                pieces.append(node)
            elif node[0] == "<":
                pieces.append(self.expand(node[1][int(draw.rng.random() * len(node[1]))], draw))
            else:
                pieces.append(self._refer(node[1][0], draw))
        return "".join(pieces)

    def _refer(self, name: str, draw: Draw) -> str:
        if name in draw.bound:
            return draw.bound[name]
        if name[-1] == "!":
            flipped = replace(draw, polarity=FLIPPED[draw.polarity])
            return self.expand(self.choose(name[:-1], flipped), flipped)
        section = name.rstrip("*")
        if section not in self.sections and section[-1] == "2":
            section = section[:-1]
        value = self.expand(self.choose(section, draw), draw)
        if name in draw.sticky or "*" in draw.sticky:
            draw.bound[name] = value
        return value

    def text(self, section: str, draw: Draw) -> str:
        """A tidy text drawn from a section."""
        return tidy(self.expand(self.choose(section, draw), draw))


def _article(match: re.Match[str]) -> str:
    """ "a" or "an" as the next word sounds."""
    article, word = match[1], match[2]
    sounds_like_vowel = re.match(r"(?i)hour|honest|[aeiou](?!niv|niq|niform|se|ser|uro|nce)|unim|unin", word)
    return f"{article[0]}{'n' if sounds_like_vowel and not word.lower().startswith('one') else ''} {word}"


def _plural_verb(match: re.Match[str]) -> str:
    """The form of the verb that "we" and "they" want."""
    verb = match[2].lower()
    return f"{match[1]} {PLURAL_VERBS.get(verb, verb[:-1])}"


def tidy(text: str) -> str:
    """Sentences that start with a capital, "a" or "an" as the next word wants it, "I" as a capital, "we are"."""
    text = re.sub(r"\b[Aa]n? (?=an? )", "", text)
    text = re.sub(r"\b([Aa]n?) ([A-Za-z]\w*)", _article, text)
    text = re.sub(r"\b(we|they) (am|is|was|has|needs|deserves|serves)\b", _plural_verb, text, flags=re.IGNORECASE)
    text = re.sub(r"\bi\b(?!\.)", "I", text)
    text = re.sub(r"(^|[.!?]\"? |: \")([a-z])", lambda m: m[1] + m[2].upper(), text)
    return text.replace("?.", "?").replace("!.", "!").replace("..", ".")
