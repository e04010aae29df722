"""One row of each of the nine tasks: a function `draw_*(rng) -> row`.

The kinds are those of the real benchmarks (the GLUE, BoolQ, OpenBookQA and E2E tasks); column
names and label orders follow them too (entailment 0, neutral 1, contradiction 2, for one).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from more_ds.demo.language import ORDERS, Statement, draw_trade, other_trade, participle
from more_ds.demo.lexicon import (
    AREAS,
    BLAME,
    DISLIKED,
    FOODS,
    LIKED,
    PARTS,
    PEOPLE,
    PRAISE,
    PRICES,
    REVIEWED,
    SHOP_COLOURS,
    SHOP_KINDS,
    SHOP_SIGNS,
    TRADES,
)

Row = dict[str, Any]


def draw_acceptability(rng: random.Random) -> Row:
    """A sentence, as it should be or with one fault of grammar."""
    words = Statement.of(draw_trade(rng)).say(rng, rng.choice(ORDERS)).split()
    label = int(rng.random() < 0.55)
    if not label:
        words = _spoil(rng, words)
    return {"sentence": " ".join(words), "label": label}


def _spoil(rng: random.Random, words: list[str]) -> list[str]:
    """Swap two neighbours, drop a function word, or say a word twice."""
    fault = rng.choice(("swap", "drop", "twice"))
    if fault == "drop":
        small = [i for i, said in enumerate(words) if said in ("the", "a", "an", "was", "in")]
        at = rng.choice(small)
        return words[:at] + words[at + 1 :]
    at = rng.randrange(len(words) - 1)
    if fault == "twice":
        return words[: at + 1] + words[at:]
    return [*words[:at], words[at + 1], words[at], *words[at + 2 :]]


def draw_sentiment(rng: random.Random) -> Row:
    """A review of one or two clauses, now and then turned by "not"."""
    label = int(rng.random() < 0.54)
    return {"sentence": say_review(rng, bool(label), rng.choice((1, 2))), "label": label}


def say_review(rng: random.Random, positive: bool, clauses: int) -> str:
    """Say `clauses` clauses of one opinion, joined by "and"."""
    return " and ".join(_opinion(rng, positive) for _ in range(clauses))


def _opinion(rng: random.Random, positive: bool) -> str:
    what, who = rng.choice(REVIEWED), rng.choice(PEOPLE)
    if rng.random() < 0.3:
        return f"{who} {rng.choice(LIKED if positive else DISLIKED)} the {what}"
    if rng.random() < 0.15:
        return f"the {what} was not {rng.choice(BLAME if positive else PRAISE)}"
    return f"the {what} was {rng.choice(PRAISE if positive else BLAME)}"


def draw_paraphrase(rng: random.Random) -> Row:
    """Two sayings of one statement, or of two that differ in four parts or all."""
    first = Statement.of(draw_trade(rng))
    label = int(rng.random() < 0.54)
    second = first if label else first.altered(rng, rng.choice((4, 5, 5)))
    return {
        "sentence1": first.say(rng, rng.choice(ORDERS)),
        "sentence2": second.say(rng, rng.choice(ORDERS)),
        "label": label,
    }


def draw_entailment(rng: random.Random) -> Row:
    """A premise and a hypothesis: 0 follows, 1 speaks of something else, 2 is denied."""
    trade = draw_trade(rng)
    label = rng.choice((0, 0, 0, 1, 1, 1, 1, 2, 2, 2))
    said = Statement.of(other_trade(rng, trade) if label == 1 else trade)
    denied = label == 2 or (label == 1 and rng.random() < 0.2)
    return {
        "premise": Statement.of(trade).say(rng, rng.choice(ORDERS)),
        "hypothesis": said.say_short(rng, denied),
        "label": label,
    }


def draw_qa_sentence(rng: random.Random) -> Row:
    """A question and a sentence: 0 the sentence answers it, 1 it speaks of something else."""
    trade = draw_trade(rng)
    label = int(rng.random() < 0.53)
    told = Statement.of(other_trade(rng, trade) if label else trade)
    return {
        "question": say_question(rng, Statement.of(trade)),
        "sentence": told.say(rng, rng.choice(ORDERS)),
        "label": label,
    }


def say_question(rng: random.Random, asked: Statement) -> str:
    """Ask for one part of a statement."""
    deed, thing = asked.word(rng, "deed"), asked.word(rng, "object")
    kind = rng.choice(("who", "what", "where"))
    if kind == "who":
        return f"who {deed} the {asked.word(rng, 'look')} {thing}"
    if kind == "what":
        return f"what was {participle(deed)} by the {asked.word(rng, 'role')}"
    return f"where was the {thing} {participle(deed)}"


def draw_similarity(rng: random.Random) -> Row:
    """Two statements and the number of their five parts that mean the same, 0.0 to 5.0."""
    shared = rng.randrange(len(PARTS) + 1)
    first = Statement.of(draw_trade(rng))
    second = first.altered(rng, len(PARTS) - shared)
    return {"sentence1": first.say(rng), "sentence2": second.say(rng), "label": float(shared)}


def draw_boolean(rng: random.Random) -> Row:
    """A passage, and a question whether something happened that it tells, or does not tell."""
    trade = draw_trade(rng)
    told = [Statement.of(trade).say(rng, order) for order in rng.sample(ORDERS, 2)]
    answer = rng.random() < 0.54
    asked = Statement.of(trade if answer else other_trade(rng, trade))
    thing, deed = asked.word(rng, "object"), participle(asked.word(rng, "deed"))
    return {
        "passage": ". ".join(told),
        "question": f"was the {thing} {deed} in the {asked.word(rng, 'place')}",
        "answer": answer,
    }


def draw_choice(rng: random.Random) -> Row:
    """A question on one trade, and three answers, of which one is of that trade."""
    trade = draw_trade(rng)
    known, asked = rng.choice((("role", "object"), ("role", "place"), ("object", "role")))
    second = other_trade(rng, trade)
    offered = [trade, second, other_trade(rng, trade, second)]
    rng.shuffle(offered)
    choices = [rng.choice(TRADES[offer][asked]) for offer in offered]
    question = f"which {asked} belongs to the {rng.choice(TRADES[trade][known])}"
    return {
        "question": question,
        "choice1": choices[0],
        "choice2": choices[1],
        "choice3": choices[2],
        "label": offered.index(trade),
    }


def draw_shop(rng: random.Random) -> dict[str, str]:
    """Draw a shop: a name, and three or four of kind, food, price and area."""
    facts = {
        "kind": rng.choice(SHOP_KINDS),
        "food": rng.choice(FOODS),
        "price": rng.choice(PRICES),
        "area": rng.choice(AREAS),
    }
    for gone in rng.sample(("food", "price", "area"), rng.randrange(2)):
        del facts[gone]
    return {"name": f"the {rng.choice(SHOP_COLOURS)} {rng.choice(SHOP_SIGNS)}", **facts}


def say_shop(shop: dict[str, str]) -> tuple[str, ...]:
    """Say a shop in three ways."""
    name, kind = shop["name"], shop["kind"]
    food = f" with {shop['food']} food" if "food" in shop else ""
    area = f" near the {shop['area']}" if "area" in shop else ""
    a_price = f"{_article(shop['price'])} {shop['price']}" if "price" in shop else "a"
    price = f". its price is {shop['price']}" if "price" in shop else ""
    return (
        f"{name} is {a_price} {kind}{food}{area}",
        f"{name} is a {kind}{area}{food}{price}",
        f"there is {a_price} {kind}{area}{food} called {name}",
    )


def _article(following: str) -> str:
    return "an" if following[0] in "aeiou" else "a"


def draw_data_to_text(rng: random.Random) -> Row:
    """A meaning representation and its references."""
    shop = draw_shop(rng)
    data = ", ".join(f"{key}: {value}" for key, value in shop.items())
    return {"meaning_representation": data, "references": list(say_shop(shop))}


DRAWS: dict[str, Callable[[random.Random], Row]] = {
    "acceptability": draw_acceptability,
    "sentiment": draw_sentiment,
    "paraphrase": draw_paraphrase,
    "entailment": draw_entailment,
    "qa_sentence": draw_qa_sentence,
    "similarity": draw_similarity,
    "boolean": draw_boolean,
    "multiple_choice": draw_choice,
    "data_to_text": draw_data_to_text,
}
