"""One row of each of the nine tasks: a function `draw_*(rng) -> row`.

The kinds are those of the real benchmarks (the GLUE, BoolQ, OpenBookQA and E2E tasks); column
names and label orders follow them too (entailment 0, neutral 1, contradiction 2, for one).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from more_ds.demo.language import (
    NOUNS,
    ORDERS,
    Deed,
    Quality,
    draw_deed,
    draw_qualities,
    draw_state,
    outside,
    participle,
    word,
)
from more_ds.demo.lexicon import (
    AREAS,
    BLAME,
    DISLIKED,
    FOODS,
    LIKED,
    MAKERS,
    PEOPLE,
    PLACES,
    PRAISE,
    PRICES,
    REVIEWED,
    SHOP_COLOURS,
    SHOP_KINDS,
    SHOP_SIGNS,
)

Row = dict[str, Any]


def draw_acceptability(rng: random.Random) -> Row:
    """A sentence, as it should be or with one fault of grammar."""
    if rng.random() < 0.5:
        words = draw_state(rng).say(rng).split()
    else:
        words = draw_deed(rng).say(rng, rng.choice(ORDERS)).split()
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
    return words[:at] + [words[at + 1], words[at]] + words[at + 2 :]


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
    """Two sayings of one deed, or of two deeds that differ in one or two places."""
    first = draw_deed(rng)
    label = int(rng.random() < 0.54)
    second = first
    if not label:
        second = first.altered(rng, tuple(rng.sample(Deed.SLOTS, rng.choice((1, 2)))))
    return {
        "sentence1": first.say(rng),
        "sentence2": second.say(rng, rng.choice(ORDERS)),
        "label": label,
    }


def draw_entailment(rng: random.Random) -> Row:
    """A premise and a hypothesis on one noun: 0 follows, 1 is open, 2 contradicts."""
    premise = draw_state(rng, count=2)
    label = rng.choice((0, 0, 0, 1, 1, 1, 1, 2, 2, 2))
    known = rng.choice(premise.qualities)
    said = {0: known, 1: outside(rng, premise.qualities), 2: known.opposite()}[label]
    hypothesis = f"the {premise.noun} was {_claim(rng, said)}"
    return {"premise": premise.say(rng), "hypothesis": hypothesis, "label": label}


def _claim(rng: random.Random, quality: Quality) -> str:
    """Say a quality, now and then as "not" its opposite."""
    if rng.random() < 0.1:
        return f"not {word(rng, quality.opposite().words)}"
    return word(rng, quality.words)


def draw_qa_sentence(rng: random.Random) -> Row:
    """A question and a sentence: 0 the sentence answers it, 1 it speaks of something else."""
    asked = draw_deed(rng)
    question, slots = say_question(rng, asked)
    label = int(rng.random() < 0.53)
    told = asked.altered(rng, tuple(rng.sample(slots, rng.choice((1, 2))))) if label else asked
    return {"question": question, "sentence": told.say(rng), "label": label}


def say_question(rng: random.Random, asked: Deed) -> tuple[str, tuple[str, ...]]:
    """Ask for one slot of a deed; return the question and the slots that it names."""
    verb = word(rng, asked.verb)
    kind = rng.choice(("who", "what", "where"))
    if kind == "who":
        return f"who {verb} the {asked.thing}", ("verb", "thing")
    if kind == "what":
        return f"what was {participle(verb)} by {asked.person}", ("person", "verb")
    return f"where was the {asked.thing} {participle(verb)}", ("verb", "thing")


def draw_similarity(rng: random.Random) -> Row:
    """Two deeds and the number of their five places that mean the same, 0.0 to 5.0."""
    shared = rng.randrange(len(Deed.SLOTS) + 1)
    first = draw_deed(rng)
    second = first.altered(rng, tuple(rng.sample(Deed.SLOTS, len(Deed.SLOTS) - shared)))
    return {"sentence1": first.say(rng), "sentence2": second.say(rng), "label": float(shared)}


def draw_boolean(rng: random.Random) -> Row:
    """A passage on three nouns and a question on one of them."""
    nouns = rng.sample(NOUNS, 3)
    states = [draw_state(rng, count=1, nouns=(noun,)) for noun in nouns]
    passage = ". ".join(state.say(rng) for state in states)
    asked = rng.choice(states)
    answer = rng.random() < 0.54
    (quality,) = asked.qualities
    said = quality if answer else quality.opposite()
    question = f"was the {asked.noun} {word(rng, said.words)}"
    return {"passage": passage, "question": question, "answer": answer}


def draw_choice(rng: random.Random) -> Row:
    """What does a craftsman make? Three products to choose from, in three wordings."""
    maker = rng.choice(tuple(MAKERS))
    answer = MAKERS[maker]
    choices = [answer, *rng.sample([made for made in MAKERS.values() if made != answer], 2)]
    rng.shuffle(choices)
    question = rng.choice(("what does a {} make", "a {} is somebody who makes", "{}s make"))
    return {
        "question": question.format(maker),
        "choice1": choices[0],
        "choice2": choices[1],
        "choice3": choices[2],
        "label": choices.index(answer),
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
