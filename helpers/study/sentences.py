"""Generated tasks on sentences and measures: each function draws an input and says its answer."""

import random

from helpers.study.words import NAMES, word, words

VERBS = "called helped followed thanked asked visited watched pushed".split()  # noqa: SIM905
GIFTS = "tea cake soup bread milk lamp book coat bike map".split()  # noqa: SIM905
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


# --- sentences -------------------------------------------------------------------------------


def passive(rng: random.Random) -> tuple[str, str]:
    """`Ada called Ben` becomes `Ben was called by Ada`."""
    subject, other = rng.sample(NAMES, 2)
    verb = rng.choice(VERBS)
    return f"{subject} {verb} {other}", f"{other} was {verb} by {subject}"


def whom(rng: random.Random) -> tuple[str, str]:
    """The object of a sentence."""
    subject, other = rng.sample(NAMES, 2)
    return f"{subject} {rng.choice(VERBS)} {other}", other


def quoted(rng: random.Random) -> tuple[str, str]:
    """`Ada says mora bento` becomes `"mora bento", says Ada`."""
    name, speech = rng.choice(NAMES), " ".join(words(rng, 2))
    return f"{name} says {speech}", f'"{speech}", says {name}'


def thanked(rng: random.Random) -> tuple[str, str]:
    """`Ada brought tea on Monday` becomes `Thank you for the tea, Ada!`."""
    name, gift, hour = rng.choice(NAMES), rng.choice(GIFTS), rng.randint(1, 12)
    return f"{name} brought {gift} at {hour}", f"Thank you for the {gift}, {name}!"


def greeted(rng: random.Random) -> tuple[str, str]:
    """Good morning before 12, good evening from 12 on."""
    name, hour, minute = rng.choice(NAMES), rng.randrange(24), rng.randrange(60)
    day = "morning" if hour < 12 else "evening"
    return f"{name}, {hour:02d}:{minute:02d}", f"Good {day}, {name}!"


# --- measures --------------------------------------------------------------------------------


def way_back(rng: random.Random) -> tuple[str, str]:
    """As many steps in the opposite direction."""
    n, way = rng.randint(2, 999), rng.choice([*OPPOSITE])
    return f"{n} steps {way}", f"{n} steps {OPPOSITE[way]}"


def swapped(rng: random.Random) -> tuple[str, str]:
    """`(3, 8)` becomes `(8, 3)`."""
    x, y = rng.sample(range(10, 100), 2)
    return f"({x}, {y})", f"({y}, {x})"


def mirrored(rng: random.Random) -> tuple[str, str]:
    """`(3, 8)` becomes `(-3, 8)`."""
    x, y = rng.sample(range(10, 100), 2)
    return f"({x}, {y})", f"({-x}, {y})"


def flipped(rng: random.Random) -> tuple[str, str]:
    """`0110` becomes `1001`."""
    bits = [rng.randint(0, 1) for _ in range(10)]
    return " ".join(map(str, bits)), " ".join(str(1 - b) for b in bits)


def opposite(rng: random.Random) -> tuple[str, str]:
    """Minus becomes plus, plus becomes minus."""
    n, sign = rng.randint(10, 999), rng.choice("+-")
    return f"{sign}{n}", f"{'-' if sign == '+' else '+'}{n}"


def absolute(rng: random.Random) -> tuple[str, str]:
    """A number without its sign."""
    n, sign = rng.randint(10, 999), rng.choice("+-")
    return f"{sign}{n}", str(n)


def rounded(rng: random.Random) -> tuple[str, str]:
    """Dollars and cents, rounded to dollars."""
    dollars, cents = (
        rng.randint(1, 98),
        rng.choice([c for c in range(1, 100) if c != 50]),
    )
    return f"${dollars}.{cents:02d}", f"${dollars + (cents > 50)}"


def next_term(rng: random.Random) -> tuple[str, str]:
    """The next term of an arithmetic progression."""
    start, step = rng.randint(1, 80), rng.randint(1, 5)
    terms = [start + i * step for i in range(4)]
    return ", ".join(map(str, terms[:3])), str(terms[3])


def passed(rng: random.Random) -> tuple[str, str]:
    """Pass from 50 points on."""
    name, points = rng.choice(NAMES), rng.randint(1, 99)
    return f"{name}: {points}", "pass" if points >= 50 else "fail"


def weather(rng: random.Random) -> tuple[str, str]:
    """Cold below 10 degrees, mild below 20, warm from 20 on."""
    town, tenths = word(rng).capitalize(), rng.randint(10, 299)
    answer = "cold" if tenths < 100 else "mild" if tenths < 200 else "warm"
    return f"{town}: {tenths // 10}.{tenths % 10} degrees", answer


def pens(rng: random.Random) -> tuple[str, str]:
    """How many pens are in a list of things."""
    cups, pens, keys = (rng.randint(2, 99) for _ in range(3))
    items = [f"{cups} cups", f"{pens} pens", f"{keys} keys"]
    rng.shuffle(items)
    return ", ".join(items), str(pens)


def most(rng: random.Random) -> tuple[str, str]:
    """What there is most of."""
    counts = dict(
        zip(["cups", "pens", "keys"], rng.sample(range(2, 100), 3), strict=True)
    )
    return ", ".join(f"{n} {thing}" for thing, n in counts.items()), max(
        counts, key=counts.get
    )


def place(rng: random.Random) -> tuple[str, str]:
    """`Ada (Mora)` becomes `Ada lives in Mora.`"""
    name, town = rng.choice(NAMES), word(rng).capitalize()
    return f"{name} ({town})", f"{name} lives in {town}."
