"""The grammar of the demo language: what can be said, and in which words."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from more_ds.demo.lexicon import DENIALS, PARTICIPLES, PARTS, TRADES

ORDERS = ("plain", "fronted", "passive")


@dataclass(frozen=True)
class Statement:
    """What somebody did: for each of `PARTS`, the trade that it is of."""

    trades: tuple[int, ...]

    @classmethod
    def of(cls, trade: int) -> Statement:
        """Return the statement all of whose parts are of one trade."""
        return cls((trade,) * len(PARTS))

    def word(self, rng: random.Random, part: str) -> str:
        """Say one part, in one of its words."""
        return rng.choice(TRADES[self.trades[PARTS.index(part)]][part])

    def say(self, rng: random.Random, order: str = "plain") -> str:
        """Say all of it in one of the orders "plain", "fronted" (place first) or "passive"."""
        role, deed = f"the {self.word(rng, 'role')}", self.word(rng, "deed")
        thing = f"the {self.word(rng, 'look')} {self.word(rng, 'object')}"
        place = f"in the {self.word(rng, 'place')}"
        if order == "passive":
            return f"{thing} was {participle(deed)} by {role} {place}"
        if order == "fronted":
            return f"{place} {role} {deed} {thing}"
        return f"{role} {deed} {thing} {place}"

    def say_short(self, rng: random.Random, denied: bool = False) -> str:
        """Say its role, deed and object; denied, with "never" or the like."""
        denial = f"{rng.choice(DENIALS)} " if denied else ""
        role, deed = self.word(rng, "role"), self.word(rng, "deed")
        return f"the {role} {denial}{deed} the {self.word(rng, 'object')}"

    def altered(self, rng: random.Random, count: int) -> Statement:
        """Return the statement with `count` of its parts, at random, of another trade."""
        other = other_trade(rng, *self.trades)
        parts = set(rng.sample(range(len(PARTS)), count))
        return replace(self, trades=tuple(other if i in parts else t for i, t in enumerate(self.trades)))


def participle(deed: str) -> str:
    """Return the form of a past-tense verb that follows "was"."""
    return PARTICIPLES.get(deed, deed)


def draw_trade(rng: random.Random) -> int:
    """Draw a trade."""
    return rng.randrange(len(TRADES))


def other_trade(rng: random.Random, *taken: int) -> int:
    """Draw a trade that is none of `taken`."""
    return rng.choice([trade for trade in range(len(TRADES)) if trade not in taken])
