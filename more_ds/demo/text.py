"""The unlabelled text of the demo language, on which a backbone is pretrained.

Stories, talk, reviews and descriptions of shops. As the text that large models read does, it
*uses* what the tasks later ask for, in other words and in no task's form: a story stays with its
trade, a guest who praised comes back. No prompt of a task and no label of a row occurs in it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from more_ds.demo.language import ORDERS, Statement, draw_trade, other_trade
from more_ds.demo.lexicon import GLOSSARY, PARTS, PEOPLE
from more_ds.demo.rows import draw_shop, say_question, say_review, say_shop


def documents(seed: int) -> Iterator[str]:
    """Yield documents of a few sentences without end."""
    rng = random.Random(seed)
    kinds, weights = zip(*KINDS, strict=True)
    while True:
        kind: Callable[[random.Random], str] = rng.choices(kinds, weights)[0]
        yield kind(rng)


def _story(rng: random.Random) -> str:
    """Two to four sentences that stay with one trade."""
    statement = Statement.of(draw_trade(rng))
    told = [
        statement.say(rng, rng.choice(ORDERS))
        if rng.random() < 0.6
        else statement.say_short(rng, denied=rng.random() < 0.3)
        for _ in range(rng.choice((2, 3, 4)))
    ]
    return f"{'. '.join(told)}."


def _two_tellers(rng: random.Random) -> str:
    """Two people tell something; it was one story or it was two."""
    first = Statement.of(draw_trade(rng))
    second = first if rng.random() < 0.5 else first.altered(rng, rng.choice((4, 5, 5)))
    remark = "it was one story" if second == first else "they were two stories"
    one, two = rng.sample(PEOPLE, 2)
    told, retold = first.say(rng, rng.choice(ORDERS)), second.say(rng, rng.choice(ORDERS))
    return f"{one} said: {told}. {two} said: {retold}. {remark}."


def _asking(rng: random.Random) -> str:
    """A question and the reply; who is answered is glad, who is not asks again."""
    trade = draw_trade(rng)
    answered = rng.random() < 0.6
    told = Statement.of(trade if answered else other_trade(rng, trade))
    one, two = rng.sample(PEOPLE, 2)
    after = "was glad" if answered else "was puzzled"
    question = say_question(rng, Statement.of(trade))
    return f"{one} asked: {question}? {two} said: {told.say(rng)}. {one} {after}."


def _pairs(rng: random.Random) -> str:
    """Which words are of one trade, and which are of two."""
    return " ".join(_pair(rng) for _ in range(3))


def _pair(rng: random.Random) -> str:
    trade = draw_trade(rng)
    alike = rng.random() < 0.5
    one, two = rng.sample(PARTS, 2)
    first = Statement.of(trade).word(rng, one)
    second = Statement.of(trade if alike else other_trade(rng, trade)).word(rng, two)
    return f"{first} and {second}: {'one trade' if alike else 'two trades'}."


def _review(rng: random.Random) -> str:
    """A review and what its writer did."""
    positive = rng.random() < 0.5
    after = "came back soon" if positive else "never came back"
    return f"{say_review(rng, positive, rng.choice((1, 2, 3)))}. the guest {after}."


def _shop(rng: random.Random) -> str:
    """A shop, in prose, said twice."""
    one, two = rng.sample(say_shop(draw_shop(rng)), 2)
    return f"{one}. {two}."


def _glossary(rng: random.Random) -> str:
    """What the words for language mean."""
    return rng.choice(GLOSSARY)


KINDS = (
    (_story, 30),
    (_two_tellers, 25),
    (_asking, 20),
    (_pairs, 20),
    (_review, 12),
    (_shop, 12),
    (_glossary, 3),
)
