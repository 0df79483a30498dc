"""Facts in plain words about people who do not exist: what a reader would call a needle, each with its own question."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Final

FIRST_NAMES: Final = (
    "Aldous", "Berit", "Caspian", "Delphine", "Eskil", "Fenna", "Gideon", "Hesper", "Isolde", "Jarek", "Katarin",
    "Lucan", "Mirelle", "Nestor", "Ottilie", "Perrin", "Quilla", "Rasmus", "Sunniva", "Tobias", "Ursel", "Viggo",
    "Wilhelmina", "Ysolt",
)  # fmt: skip
LAST_NAMES: Final = (
    "Abernethy", "Brandvold", "Carrowmore", "Dunmarrow", "Eastlake", "Fairweather", "Greyling", "Hollowell", "Ingleby",
    "Jessop", "Kettlewell", "Larkspur", "Merriweather", "Northcote", "Oakhanger", "Penhaligon", "Quarrington",
    "Ravensworth", "Silverthorne", "Tattersall", "Underhill", "Vandermeer", "Wintergreen", "Yarborough",
)  # fmt: skip


@dataclass(frozen=True)
class Wording:
    """How a fact is told and asked for; {key} is the person, {value} one of `values`."""

    told: str
    asked: str
    values: tuple[str, ...]


WORDINGS: Final = (
    Wording(" {key} was born in {value}.", "In which city was {key} born?",
            ("Lisbon", "Helsinki", "Nairobi", "Toronto", "Lima", "Prague", "Hanoi", "Dublin", "Athens", "Oslo")),
    Wording(" {key} plays the {value} every evening.", "Which instrument does {key} play?",
            ("cello", "trumpet", "harp", "flute", "banjo", "clarinet", "violin", "trombone", "piano", "bassoon")),
    Wording(" {key} painted the front door {value}.", "What colour did {key} paint the front door?",
            ("turquoise", "purple", "orange", "yellow", "pink", "crimson", "green", "violet", "silver", "brown")),
    Wording(" {key} keeps a tame {value} in the garden.", "Which animal does {key} keep in the garden?",
            ("badger", "peacock", "tortoise", "llama", "raven", "hedgehog", "donkey", "pelican", "goose", "zebra")),
    Wording(" The favourite food of {key} is {value}.", "What is the favourite food of {key}?",
            ("lasagna", "porridge", "pancakes", "dumplings", "sushi", "waffles", "gingerbread", "risotto", "marmalade",
             "popcorn")),
    Wording(" {key} works as a {value}.", "What does {key} work as?",
            ("plumber", "dentist", "carpenter", "surgeon", "locksmith", "beekeeper", "baker", "librarian", "barber",
             "geologist")),
)  # fmt: skip


def random_name(random: Random) -> str:
    """One of 576 people."""
    return f"{random.choice(FIRST_NAMES)} {random.choice(LAST_NAMES)}"
