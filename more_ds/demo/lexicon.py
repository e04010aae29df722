"""The words of the demo language: some two hundred and fifty, each with one meaning.

The world has six trades. In each, a role does its deed to its object, with its look, at its
place; the words of one part of one trade are synonyms (a *concept*). So a statement means what
its five concepts are, whichever words and order say it, and words that belong together occur
together, which is what a small language model learns first.
"""

from __future__ import annotations

Concept = tuple[str, ...]

PARTS = ("role", "deed", "look", "object", "place")

TRADES: tuple[dict[str, Concept], ...] = (
    {
        "role": ("farmer", "grower", "peasant"),
        "deed": ("planted", "sowed", "harvested"),
        "look": ("ripe", "golden"),
        "object": ("corn", "wheat", "barley"),
        "place": ("field", "meadow", "farm"),
    },
    {
        "role": ("sailor", "captain", "skipper"),
        "deed": ("sailed", "steered", "anchored"),
        "look": ("salty", "wet"),
        "object": ("ship", "boat", "vessel"),
        "place": ("harbour", "bay", "port"),
    },
    {
        "role": ("cook", "chef", "baker"),
        "deed": ("cooked", "baked", "fried"),
        "look": ("tasty", "sweet"),
        "object": ("soup", "cake", "bread"),
        "place": ("kitchen", "bakery", "canteen"),
    },
    {
        "role": ("doctor", "nurse", "surgeon"),
        "deed": ("cured", "treated", "healed"),
        "look": ("sick", "ill"),
        "object": ("patient", "wound", "fever"),
        "place": ("hospital", "clinic", "ward"),
    },
    {
        "role": ("singer", "drummer", "pianist"),
        "deed": ("sang", "played", "performed"),
        "look": ("loud", "noisy"),
        "object": ("song", "tune", "melody"),
        "place": ("concert", "theatre", "opera"),
    },
    {
        "role": ("builder", "mason", "carpenter"),
        "deed": ("built", "repaired", "mended"),
        "look": ("tall", "high"),
        "object": ("wall", "roof", "tower"),
        "place": ("yard", "workshop", "quarry"),
    },
)
# The forms after "was": only those that differ from the past tense.
PARTICIPLES = {"sang": "sung", "sowed": "sown"}

DENIALS = ("never", "hardly")

PEOPLE = ("tom", "anna", "ben", "lucy", "sam", "mary", "jack", "emma")

REVIEWED = ("film", "meal", "story", "room", "show", "play", "hotel", "garden")
PRAISE = ("wonderful", "great", "lovely", "charming", "delightful", "brilliant", "funny", "superb")
BLAME = ("awful", "terrible", "boring", "dull", "ugly", "horrible", "bland", "poor")
LIKED = ("loved", "liked", "enjoyed", "admired")
DISLIKED = ("hated", "disliked", "regretted", "endured")

SHOP_COLOURS = ("silver", "red", "blue", "green", "black", "white")
SHOP_SIGNS = ("fork", "lion", "crown", "door", "star", "rose", "swan", "bell")
SHOP_KINDS = ("pub", "cafe", "restaurant", "bar")
FOODS = ("french", "indian", "italian", "chinese", "english", "greek")
PRICES = ("cheap", "moderate", "expensive")
AREAS = ("river", "station", "bridge", "market", "square", "church")

# Words of the prompts and the answers, spoken of in the unlabelled text so that a backbone has
# met them before it is asked with them.
GLOSSARY: tuple[str, ...] = (
    "the grammar of a sentence is acceptable or unacceptable.",
    "the sentiment of a review is positive or negative.",
    "a paraphrase is equivalent; other pairs are different.",
    "a premise and a hypothesis: the relation is entailment, neutral or contradiction.",
    "a question has an answer, and a reply to it may be relevant or irrelevant.",
    "the similarity of sentence1 and sentence2 is a score: 0.0, 1.0, 2.0, 3.0, 4.0 or 5.0.",
    "the boolean question comes after a passage, and the answer is yes or no.",
    "a question with options: choice1, choice2, choice3.",
    "the data have a name, a kind, a food, a price and an area; the text tells them.",
)
