"""Generated questions with one right answer each: what small models learn, and what scores a text.

Nothing is downloaded and nothing is licensed by others: an item is made by a few lines of code from
a seeded generator. A fixed tenth of all prompts, chosen by the checksum of the prompt, is held out:
no training text contains them, whatever its seed.
"""

import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

WORDS = """
    river stone apple cloud tiger piano candle garden silver window orange pepper button rocket
    island carpet mirror basket planet saddle violin pillow thunder lantern
"""
NAMES = "Ana Ben Cleo Dan Eva Finn Gus Hana Ivo Jun Kim Lea Max Nora Omar Pia"


@dataclass(frozen=True, slots=True)
class Item:
    """A question with one right answer.

    Attributes:
        kind: A key of `KINDS`.
        prompt: The question, one line.
        answer: The right answer, one line.
        choices: For a multiple choice, what can be answered; else empty.
    """

    kind: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()

    def correct(self, text: str) -> bool:
        """Whether the first line of a text is the answer, but for spaces around it."""
        lines = text.strip().splitlines()
        return bool(lines) and lines[0].strip() == self.answer


def _sum(draw: random.Random) -> Item:
    a, b = draw.randrange(100), draw.randrange(100)
    return Item("sum", f"What is {a} + {b}?", str(a + b))


def _difference(draw: random.Random) -> Item:
    b, a = sorted((draw.randrange(100), draw.randrange(100)))
    return Item("difference", f"What is {a} - {b}?", str(a - b))


def _copy(draw: random.Random) -> Item:
    words = " ".join(draw.sample(WORDS.split(), 3))
    return Item("copy", f"Repeat: {words}", words)


def _reverse(draw: random.Random) -> Item:
    words = draw.sample(WORDS.split(), 3)
    return Item("reverse", f"Repeat backwards: {' '.join(words)}", " ".join(reversed(words)))


def _sort(draw: random.Random) -> Item:
    numbers = draw.sample(range(10), 4)
    asked, sorted_ = (" ".join(map(str, x)) for x in (numbers, sorted(numbers)))
    return Item("sort", f"Sort: {asked}", sorted_)


def _capitals(draw: random.Random) -> Item:
    words = " ".join(draw.sample(WORDS.split(), 2))
    return Item("capitals", f"In capitals: {words}", words.upper())


def _json(draw: random.Random) -> Item:
    name, age = draw.choice(NAMES.split()), draw.randrange(1, 100)
    return Item("json", f"As JSON: name {name}, age {age}", json.dumps({"name": name, "age": age}))


def _largest(draw: random.Random) -> Item:
    numbers = draw.sample(range(10, 100), 3)
    said = " ".join(f"{letter}) {number}" for letter, number in zip("ABC", numbers, strict=True))
    answer = "ABC"[numbers.index(max(numbers))]
    return Item("largest", f"Which is largest? {said}", answer, tuple("ABC"))


KINDS: dict[str, Callable[[random.Random], Item]] = {
    "sum": _sum,
    "difference": _difference,
    "copy": _copy,
    "reverse": _reverse,
    "sort": _sort,
    "capitals": _capitals,
    "json": _json,
    "largest": _largest,
}


def is_held_out(prompt: str) -> bool:
    """Whether no training text holds this prompt: a tenth of all, by checksum."""
    return zlib.crc32(prompt.encode()) % 10 == 0


def stream(seed: object, kinds: Sequence[str] = (), *, held_out: bool = False) -> Iterator[Item]:
    """Items without end, of kinds drawn evenly.

    Args:
        seed: Of the items; its text counts, so that (seed, step) pairs may be given.
        kinds: Keys of `KINDS`; none: all of them.
        held_out: Whether only prompts that no training text holds, or only others.

    Raises:
        ValueError: If a kind is unknown.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"kinds must be among {', '.join(KINDS)}; got {unknown}")
    draw = random.Random(str(seed))
    make = [KINDS[kind] for kind in (kinds or KINDS)]
    while True:
        item = draw.choice(make)(draw)
        if is_held_out(item.prompt) == held_out:
            yield item


def items(kind: str | None, count: int, seed: object = 0, *, held_out: bool = True) -> list[Item]:
    """Different items of one kind, or of all kinds evenly if None; held-out ones by default.

    Raises:
        ValueError: If the kind is unknown or has not so many different items.
    """
    if kind is None:
        shares = [count // len(KINDS) + (i < count % len(KINDS)) for i in range(len(KINDS))]
        parts = [
            items(each, share, seed, held_out=held_out)
            for each, share in zip(KINDS, shares, strict=True)
        ]
        return [item for part in parts for item in part]
    found: dict[str, Item] = {}
    tries = 0
    for item in stream(f"{kind}/{seed}", [kind], held_out=held_out):
        if len(found) == count:
            break
        tries = 0 if item.prompt not in found else tries + 1
        if tries > 1_000:
            raise ValueError(
                f"{kind!r} has about {len(found)} different items; {count} were asked for"
            )
        found.setdefault(item.prompt, item)
    return list(found.values())


def question(item: Item, *, hint: str = "") -> str:
    """What a small model reads before its answer; a hint stands before the question."""
    return f"{f'Hint: {hint}' + chr(10) if hint else ''}Q: {item.prompt}\nA:"


def document(item: Item, *, hint: str = "") -> str:
    """Question and answer, as small models learn them."""
    return f"{question(item, hint=hint)} {item.answer}"
