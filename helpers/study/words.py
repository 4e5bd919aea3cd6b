"""Generated tasks on words: each function draws an input and says its answer.

A task here is a rule on one string, or on a list of words, that a small model can learn from a few
hundred examples.
"""

import random
import string

# fmt: off
ANIMALS = "cat dog cow pig hen fox owl bee ant rat bat elk emu yak ape eel cod jay".split()  # noqa: SIM905
TOOLS = "saw axe awl hoe rake file drill clamp lathe wrench chisel hammer pliers".split()  # noqa: SIM905
NAMES = "Ada Ben Cleo Dan Eva Finn Gus Hana Ida Jon Kim Leo Mia Ned Ona Pia Raj Sam Tess".split()  # noqa: SIM905
# fmt: on
VOWELS = "aeiou"


def word(rng: random.Random, least: int = 4, most: int = 6) -> str:
    """A pronounceable string of consonants and vowels in turn."""
    consonants = [c for c in string.ascii_lowercase if c not in VOWELS]
    kinds = [consonants, VOWELS] * most
    return "".join(rng.choice(kinds[i]) for i in range(rng.randint(least, most)))


def words(rng: random.Random, n: int) -> list[str]:
    return [word(rng, 3, 4) for _ in range(n)]


# --- strings ---------------------------------------------------------------------------------


def doubled_vowels(rng: random.Random) -> tuple[str, str]:
    """Every vowel is written twice."""
    text = word(rng)
    return text, "".join(2 * c if c in VOWELS else c for c in text)


def starred_vowels(rng: random.Random) -> tuple[str, str]:
    """Every vowel becomes a star."""
    text = word(rng)
    return text, "".join("*" if c in VOWELS else c for c in text)


def dropped_vowels(rng: random.Random) -> tuple[str, str]:
    """The vowels go."""
    text = word(rng)
    return text, "".join(c for c in text if c not in VOWELS)


def upper_first(rng: random.Random) -> tuple[str, str]:
    """The first word in capitals, the other as it is."""
    first, second = words(rng, 2)
    return f"{first} {second}", f"{first.upper()} {second}"


def upper_last(rng: random.Random) -> tuple[str, str]:
    """The last word in capitals, the other as it is."""
    first, second = words(rng, 2)
    return f"{first} {second}", f"{first} {second.upper()}"


def hyphenated(rng: random.Random) -> tuple[str, str]:
    """The letters, joined by hyphens."""
    text = word(rng)
    return text, "-".join(text)


def bracketed(rng: random.Random) -> tuple[str, str]:
    """The first letter in brackets."""
    text = word(rng)
    return text, f"({text[0]}){text[1:]}"


def suffixed(rng: random.Random) -> tuple[str, str]:
    """`-a` after a last vowel, `-o` after a last consonant."""
    text = word(rng)
    return text, text + ("-a" if text[-1] in VOWELS else "-o")


# --- lists -----------------------------------------------------------------------------------


def first_last(rng: random.Random) -> tuple[str, str]:
    """The first and the last of four words."""
    items = words(rng, 4)
    return ", ".join(items), f"{items[0]} {items[-1]}"


def second_word(rng: random.Random) -> tuple[str, str]:
    """The second of four words."""
    items = words(rng, 4)
    return ", ".join(items), items[1]


def rotated(rng: random.Random) -> tuple[str, str]:
    """The first of four words goes to the end."""
    items = words(rng, 4)
    return ", ".join(items), ", ".join([*items[1:], items[0]])


def animal(rng: random.Random) -> tuple[str, str]:
    """The one animal among tools."""
    animal = rng.choice(ANIMALS)
    items = [animal, *rng.sample(TOOLS, 3)]
    rng.shuffle(items)
    return ", ".join(items), animal


def tool(rng: random.Random) -> tuple[str, str]:
    """The one tool among animals."""
    tool = rng.choice(TOOLS)
    items = [tool, *rng.sample(ANIMALS, 3)]
    rng.shuffle(items)
    return ", ".join(items), tool


def repeated(rng: random.Random) -> tuple[str, str]:
    """The word that stands twice."""
    items = words(rng, 3)
    twice = rng.choice(items)
    shown = [*items, twice]
    rng.shuffle(shown)
    return ", ".join(shown), twice


def joined(rng: random.Random) -> tuple[str, str]:
    """`a, b, c` becomes `a and b and c`."""
    items = words(rng, 3)
    return ", ".join(items), " and ".join(items)


def contained(rng: random.Random) -> tuple[str, str]:
    """Whether a word is among four."""
    items = words(rng, 5)
    asked = rng.choice([items[0], items[4]])
    shown = items[:4]
    rng.shuffle(shown)
    return f"{asked} in {', '.join(shown)}", "yes" if asked in shown else "no"


# --- comparisons of words --------------------------------------------------------------------


def earlier(rng: random.Random) -> tuple[str, str]:
    """The first of two words in the alphabet."""
    first, second = words(rng, 2)
    return f"{first}, {second}", min(first, second)


def longer(rng: random.Random) -> tuple[str, str]:
    """The longer of two words."""
    items = [word(rng, 3, 3), word(rng, 6, 8)]
    rng.shuffle(items)
    return ", ".join(items), max(items, key=len)


def letters(rng: random.Random) -> tuple[str, str]:
    """How many letters a word has."""
    text = word(rng, 3, 8)
    return text, str(len(text))
