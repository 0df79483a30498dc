"""Plain English made from templates: the diary of a harbour station, entry after entry.

It serves where no third-party text may be used (the demo model's prompts and part of its training, tests) and where the
user gives none. Every call with the same seed gives the same text.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Iterator

FIRST_DAY = datetime.date(1911, 3, 6)

SLOTS: dict[str, tuple[str, ...]] = {
    "person": (
        "Anders", "Brita", "Cornelius", "Dagny", "Edda", "Felix", "Gudrun", "Henrik", "Ingrid", "Jonas", "Karin",
        "Lars", "Marta", "Nils", "Olga", "Peder", "Ragna", "Simon", "Tilda", "Ulrik", "Vera", "old Walter", "the pilot",
        "the schoolmaster", "the doctor", "the postmistress", "my brother", "the keeper's wife", "the younger clerk",
    ),
    "quarter": ("north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west"),
    "strength": ("a light air", "a steady breeze", "a fresh wind", "half a gale", "a hard wind", "hardly a breath"),
    "sky": (
        "the sky stayed clear", "low cloud hid the hills", "rain came and went", "a thin sun showed at times",
        "fog lay on the water", "snow fell for an hour", "the light was yellow and strange", "stars were out early",
    ),
    "ship": (
        "the Aurora", "the Good Hope", "the Marigold", "the Petrel", "the Northern Star", "the Patience", "the Heron",
        "the Swift", "a schooner from the islands", "a coal barge", "the mail steamer", "a boat nobody knew",
    ),
    "cargo": (
        "barrels of herring", "sacks of flour", "crates of lamp glass", "coils of rope", "bundles of hides",
        "casks of oil", "planks of pine", "boxes of nails", "bags of salt", "cheeses packed in straw", "sheets of tin",
    ),
    "place": (
        "the long pier", "the lamp room", "the lower store", "the chapel", "the fish market", "the slipway",
        "the customs house", "the east steps", "the boat shed", "the schoolroom", "the bakery", "the signal hill",
    ),
    "thing": (
        "the storm lantern", "the big bell", "a broken oar", "the spare anchor", "the tide gauge", "an iron kettle",
        "the weather glass", "a length of chain", "the second ladder", "a crate of tools", "the flag locker",
    ),
    "work": (
        "tarred the roof of", "swept out", "painted the door of", "mended a window in", "carried coal to",
        "laid new boards in", "took stock of", "cleared the snow from", "locked up", "measured the walls of",
    ),
    "animal": (
        "a grey seal", "two herons", "a stray dog", "a flock of terns", "a white owl", "some thirty geese", "a fox",
    ),
    "mood": (
        "in good spirits", "tired but content", "rather silent", "out of temper", "full of news", "anxious to leave",
    ),
    "time": (
        "before breakfast", "towards noon", "in the afternoon", "at dusk", "shortly after four", "late in the evening",
        "while the tide was out", "at first light", "during the night watch", "as the bell rang for dinner",
    ),
    "saying": (
        "that the winter would be long", "that the new lamp burned too much oil", "that the channel had moved again",
        "that prices in town had doubled", "that no letter had come", "that the ice would not hold",
        "that the children should learn to swim", "that we ought to build a second store",
    ),
    "feeling": (
        "Nobody spoke of it afterwards", "We laughed about it at supper", "It cost us the whole morning",
        "I do not expect to hear more of it", "I wrote to the office the same day", "That settled the matter",
        "It is the third time this year", "We shall see what comes of it",
    ),
}  # fmt: skip

SENTENCES: tuple[str, ...] = (
    "The wind was {quarter} with {strength}, and {sky}.",
    "We had {strength} from the {quarter} all day; {sky}.",
    "{ship} came in {time} with {count} {cargo} and left again {time2}.",
    "{ship} lay off the point and could not enter until the wind went round to the {quarter}.",
    "{person} {work} {place}, and {person2} helped {time}.",
    "{person} {work} {place} alone, which took {small} hours.",
    "{time}, {person} found {thing} behind {place} and brought it up to {place2}.",
    "We counted {count} {cargo} in {place}, {small} fewer than the list says.",
    "{person} says {saying}, but {person2} does not believe it.",
    "{person} was {mood} and said {saying}.",
    "There was {animal} near {place} {time}.",
    "{person} saw {animal} from {place} and called {person2} to look.",
    "{thing} has gone missing from {place}. {feeling}.",
    "{feeling}.",
    "I paid {person} {small} shillings for carrying {thing} to {place}.",
    "The glass stood at {glass} inches {time} and fell a little after that.",
    "Soundings along {place} gave {small} fathoms, as in the spring.",
    "A letter from {person} came with {ship}; it says {saying}.",
    "{time} we rowed out to {ship} and took off {count} {cargo} before the sea got up.",
    "{person} asked me whether {thing} could be sold. I said it belonged to the station.",
    "In {place} the talk was all of {ship}, which is {small} days late.",
    "{person} and {person2} quarrelled over {thing}. {feeling}.",
)


def _sentence(rng: random.Random) -> str:
    """One sentence with every slot filled; a slot's second mention is never its first one again."""
    values = {"count": str(rng.randint(12, 480)), "small": str(rng.randint(2, 11))}
    values["glass"] = f"{rng.randint(28, 30)}.{rng.randint(0, 9)}"
    for name, choices in SLOTS.items():
        values[name], values[name + "2"] = rng.sample(choices, 2)
    text = rng.choice(SENTENCES).format_map(values)
    return text[0].upper() + text[1:]


def diary_entries(seed: int) -> Iterator[str]:
    """Entries without end, one paragraph each, a day or a few days apart."""
    rng = random.Random(f"diary {seed}")
    day = FIRST_DAY + datetime.timedelta(days=rng.randrange(20_000))
    while True:
        sentences = " ".join(_sentence(rng) for _ in range(rng.randint(4, 11)))
        yield f"{day:%A}, {day.day} {day:%B} {day.year}. {sentences}\n\n"
        day += datetime.timedelta(days=rng.randint(1, 3))


def generate_text(seed: int, min_chars: int) -> str:
    """Whole diary entries, together at least `min_chars` characters."""
    parts: list[str] = []
    length = 0
    for entry in diary_entries(seed):
        parts.append(entry)
        length += len(entry)
        if length >= min_chars:
            return "".join(parts)
    raise AssertionError("diary_entries never ends")
