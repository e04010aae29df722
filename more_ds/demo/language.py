"""The grammar of the demo language: what can be said, and in which words.

Two kinds of statement make up its world. A `State` says how an animal or a thing was; a `Deed` says who did what to which thing where. Both hold concepts, so that the same
statement can be said in several ways (`say`), and two statements can be compared by meaning.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from more_ds.demo.lexicon import ANIMALS, AXES, PARTICIPLES, PEOPLE, PLACES, THINGS, VERBS, Concept

NOUNS = ANIMALS + THINGS
COMMON = 0.75
"""How often a concept is said by the commoner of its words."""


def word(rng: random.Random, concept: Concept) -> str:
    """Say a concept: by its first word mostly, else by another."""
    return concept[0] if rng.random() < COMMON else rng.choice(concept[1:])


@dataclass(frozen=True)
class Quality:
    """One pole of one axis: "big or large", as against "small or little"."""

    axis: int
    pole: int

    @property
    def words(self) -> Concept:
        return AXES[self.axis][self.pole]

    def opposite(self) -> Quality:
        return Quality(self.axis, 1 - self.pole)


@dataclass(frozen=True)
class State:
    """Something had one or more qualities (on different axes)."""

    noun: str
    qualities: tuple[Quality, ...]

    def say(self, rng: random.Random) -> str:
        return f"the {self.noun} was {' and '.join(word(rng, q.words) for q in self.qualities)}"


@dataclass(frozen=True)
class Deed:
    """Somebody did something to a thing of some quality in some place."""

    person: str
    verb: Concept
    quality: Quality
    thing: str
    place: str

    SLOTS = ("person", "verb", "quality", "thing", "place")

    def say(self, rng: random.Random, order: str = "plain") -> str:
        """Say it in one of the orders "plain", "fronted" (place first) or "passive"."""
        verb, quality = word(rng, self.verb), word(rng, self.quality.words)
        article = "an" if quality[0] in "aeiou" else "a"
        thing, place = f"{article} {quality} {self.thing}", f"in the {self.place}"
        if order == "passive":
            return f"{thing} was {participle(verb)} by {self.person} {place}"
        if order == "fronted":
            return f"{place} {self.person} {verb} {thing}"
        return f"{self.person} {verb} {thing} {place}"

    def altered(self, rng: random.Random, slots: tuple[str, ...]) -> Deed:
        """Return the deed with another meaning in each of `slots` (the quality: its opposite)."""
        other: dict[str, object] = {}
        for slot in slots:
            if slot == "quality":
                other[slot] = self.quality.opposite()
            else:
                known = {"person": PEOPLE, "verb": VERBS, "thing": THINGS, "place": PLACES}[slot]
                other[slot] = rng.choice([item for item in known if item != getattr(self, slot)])
        return replace(self, **other)  # type: ignore[arg-type]


ORDERS = ("plain", "fronted", "passive")


def participle(verb: str) -> str:
    """Return the form of a past-tense verb that follows "was"."""
    return PARTICIPLES.get(verb, verb)


def draw_qualities(rng: random.Random, count: int) -> tuple[Quality, ...]:
    """Draw `count` qualities on different axes."""
    return tuple(Quality(axis, rng.randrange(2)) for axis in rng.sample(range(len(AXES)), count))


def draw_state(rng: random.Random, count: int = 2, nouns: tuple[str, ...] = NOUNS) -> State:
    """Draw a state with `count` qualities about one of `nouns`."""
    return State(rng.choice(nouns), draw_qualities(rng, count))


def draw_deed(rng: random.Random) -> Deed:
    """Draw a deed."""
    (quality,) = draw_qualities(rng, 1)
    return Deed(
        rng.choice(PEOPLE), rng.choice(VERBS), quality, rng.choice(THINGS), rng.choice(PLACES)
    )


def outside(rng: random.Random, qualities: tuple[Quality, ...]) -> Quality:
    """Draw a quality on an axis that none of `qualities` speaks of."""
    taken = {quality.axis for quality in qualities}
    axis = rng.choice([axis for axis in range(len(AXES)) if axis not in taken])
    return Quality(axis, rng.randrange(2))
