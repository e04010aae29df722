"""The unlabelled text of the demo language, on which a backbone is pretrained.

Like the text that large models read, it *uses* what the tasks later ask for, in other words and
in no task's form: people agree or disagree, thank for an answer or ask again, shops are described.
No prompt of a task and no label of a row occurs in it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from more_ds.demo.language import (
    NOUNS,
    ORDERS,
    Deed,
    Quality,
    State,
    draw_deed,
    draw_state,
    outside,
    participle,
    word,
)
from more_ds.demo.lexicon import AXES, GLOSSARY, MAKERS, PEOPLE, VERBS
from more_ds.demo.rows import draw_shop, say_question, say_review, say_shop


def documents(seed: int) -> Iterator[str]:
    """Yield documents of a few sentences without end."""
    rng = random.Random(seed)
    kinds, weights = zip(*KINDS, strict=True)
    while True:
        yield rng.choices(kinds, weights)[0](rng)


def _words(rng: random.Random) -> str:
    """What words mean."""
    if rng.random() < 0.08:
        return rng.choice(GLOSSARY)
    return " ".join(_meaning(rng) for _ in range(3))


def _meaning(rng: random.Random) -> str:
    if rng.random() < 0.3:
        one, two = rng.sample(rng.choice(VERBS), 2)
        return f"if it was {participle(one)}, it was {participle(two)}."
    axis = rng.sample(rng.choice(AXES), 2)
    one, two = rng.sample(axis[0], 2)
    if rng.random() < 0.5:
        return f"{one} means {two}."
    return f"{one} is not {rng.choice(axis[1])}."


def _scene(rng: random.Random) -> str:
    """A passage that comes back to what it said."""
    states = [draw_state(rng, count=rng.choice((1, 2)))]
    if rng.random() < 0.4:
        states += [draw_state(rng, count=1) for _ in range(2)]
    told = ". ".join(state.say(rng) for state in states)
    state = rng.choice(states)
    recalled = [_recall(rng, state.noun, quality) for quality in state.qualities]
    return f"{told}. {' '.join(recalled)}"


def _recall(rng: random.Random, noun: str, quality: Quality) -> str:
    if rng.random() < 0.25:
        return f"so the {noun} was not {word(rng, quality.opposite().words)}."
    return f"so the {noun} was {word(rng, quality.words)}."


def _talk_of_states(rng: random.Random) -> str:
    """Somebody tells something, and takes what the others say of it one way or another."""
    nouns = rng.sample(NOUNS, rng.choice((1, 1, 2, 3)))
    count = 2 if len(nouns) == 1 else 1
    states = [draw_state(rng, count=count, nouns=(noun,)) for noun in nouns]
    speaker, *others = rng.sample(PEOPLE, 4)
    told = ". ".join(state.say(rng) for state in states)
    replies = [f"{other} said: {_reply(rng, rng.choice(states))}" for other in others]
    return f"{speaker} said: {told}. {' '.join(replies)}"


def _reply(rng: random.Random, state: State) -> str:
    known = rng.choice(state.qualities)
    verdict, said = rng.choice(
        (
            ("agreed", known),
            ("disagreed", known.opposite()),
            ("wondered", outside(rng, state.qualities)),
        )
    )
    claim = word(rng, said.words)
    if rng.random() < 0.1:
        claim = f"not {word(rng, said.opposite().words)}"
    return f"the {state.noun} was {claim}. the first {verdict}."


def _talk_of_deeds(rng: random.Random) -> str:
    """Two people tell a deed, the same or not, and somebody hears the differences."""
    first = draw_deed(rng)
    changed = tuple(rng.sample(Deed.SLOTS, rng.choice((0, 0, 0, 1, 1, 2, 3, 4, 5))))
    second = first.altered(rng, changed)
    one, two = rng.sample(PEOPLE, 2)
    told, retold = first.say(rng), second.say(rng, rng.choice(ORDERS))
    verdict = "they agreed" if not changed else "they disagreed"
    names = {"person": "man", "verb": "deed", "quality": "look", "thing": "thing", "place": "place"}
    heard = [f"same {n}" if s not in changed else f"other {n}" for s, n in names.items()]
    return f"{one} said: {told}. {two} said: {retold}. {verdict}: {', '.join(heard)}."


def _asking(rng: random.Random) -> str:
    """A question and what was said to it; who is answered says thanks, who is not asks again."""
    asked = draw_deed(rng)
    question, slots = say_question(rng, asked)
    one, two = rng.sample(PEOPLE, 2)
    if rng.random() < 0.5:
        return f"{one} asked: {question}? {two} said: {asked.say(rng)}. {one} said thanks."
    other = asked.altered(rng, tuple(rng.sample(slots, rng.choice((1, 2)))))
    return f"{one} asked: {question}? {two} said: {other.say(rng)}. {one} asked again."


def _review(rng: random.Random) -> str:
    """A review and what its writer did."""
    positive = rng.random() < 0.5
    after = "came back soon" if positive else "never came back"
    return f"{say_review(rng, positive, rng.choice((1, 2, 3)))}. the guest {after}."


def _shop(rng: random.Random) -> str:
    """A shop, in prose, said twice."""
    one, two = rng.sample(say_shop(draw_shop(rng)), 2)
    return f"{one}. {two}."


def _craft(rng: random.Random) -> str:
    """Who makes what."""
    makers = rng.sample(tuple(MAKERS.items()), 3)
    return " ".join(
        rng.choice((f"a {maker} makes {made}.", f"{made}: the work of a {maker}."))
        for maker, made in makers
    )


KINDS = (
    (_words, 10),
    (_scene, 14),
    (_talk_of_states, 14),
    (_talk_of_deeds, 12),
    (_asking, 6),
    (_review, 4),
    (_shop, 4),
    (_craft, 5),
)
