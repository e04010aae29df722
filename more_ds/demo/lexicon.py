"""The words of the demo language: a few hundred, each with one meaning.

A *concept* is a tuple of synonyms, the commonest first; an *axis* is a pair of opposite concepts. Everything that the
tasks ask for (same meaning, opposite, unrelated, counted in common) is decided on concepts, never
on surface words, so that a label cannot be read off by comparing strings.
"""

from __future__ import annotations

Concept = tuple[str, ...]

PEOPLE = ("tom", "anna", "ben", "lucy", "sam", "mary", "jack", "emma")
ANIMALS = ("dog", "cat", "horse", "cow", "bear", "bird")
THINGS = ("ball", "chair", "lamp", "cup", "book", "coat", "car", "boat")
PLACES = ("garden", "kitchen", "market", "school", "park", "forest")

AXES: tuple[tuple[Concept, Concept], ...] = (
    (("big", "large"), ("small", "little")),
    (("fast", "quick"), ("slow", "sluggish")),
    (("old", "ancient"), ("young", "new")),
    (("hot", "warm"), ("cold", "cool")),
    (("clean", "tidy"), ("dirty", "messy")),
    (("strong", "powerful"), ("weak", "feeble")),
)

VERBS: tuple[Concept, ...] = (
    ("bought", "purchased"),
    ("found", "discovered"),
    ("cleaned", "washed"),
    ("broke", "smashed"),
    ("sold", "traded"),
    ("lost", "misplaced"),
)
# The forms after "was": only those that differ from the past tense.
PARTICIPLES = {"broke": "broken"}

REVIEWED = ("film", "meal", "song", "story", "room", "show", "play", "hotel")
PRAISE = ("wonderful", "great", "lovely", "charming", "delightful", "brilliant", "funny", "superb")
BLAME = ("awful", "terrible", "boring", "dull", "ugly", "horrible", "bland", "poor")
LIKED = ("loved", "liked", "enjoyed", "admired")
DISLIKED = ("hated", "disliked", "regretted", "endured")

MAKERS: dict[str, str] = {
    "baker": "bread",
    "farmer": "corn",
    "tailor": "dresses",
    "carpenter": "furniture",
    "writer": "novels",
    "painter": "pictures",
    "brewer": "beer",
    "potter": "bowls",
    "cobbler": "shoes",
    "smith": "swords",
    "builder": "walls",
    "weaver": "carpets",
    "poet": "poems",
    "jeweller": "rings",
    "cook": "soup",
    "singer": "music",
}

SHOP_COLOURS = ("golden", "silver", "red", "blue", "green", "black")
SHOP_SIGNS = ("fork", "lion", "crown", "door", "star", "rose", "swan", "bell")
SHOP_KINDS = ("pub", "cafe", "restaurant", "bar")
FOODS = ("french", "indian", "italian", "chinese", "english", "greek")
PRICES = ("cheap", "moderate", "expensive")
AREAS = ("river", "station", "bridge", "harbour", "square", "church")

# Words of the prompts and the answers, spoken of in the unlabelled text so that a backbone has
# met them before it is asked with them.
GLOSSARY: tuple[str, ...] = (
    "the grammar of a sentence is acceptable or unacceptable.",
    "the sentiment of a review is positive or negative.",
    "a paraphrase is equivalent; other pairs are different.",
    "a premise and a hypothesis: the relation is entailment, neutral or contradiction.",
    "a question has an answer, and a reply to it may be relevant or irrelevant.",
    "the similarity of sentence1 and sentence2 is a score: "
    "0.0, 1.0, 2.0, 3.0, 4.0 or 5.0.",
    "the boolean question comes after a passage, and the answer is yes or no.",
    "a question with options: choice1, choice2, choice3.",
    "the data have a name, a kind, a food, a price and an area; the text tells them.",
)
