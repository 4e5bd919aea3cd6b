"""Generated tasks on notations: names in code, files, addresses, markup, records, numbers.

Each function draws an input and says its answer: the same content, written another way.
"""

import random

from helpers.study.words import NAMES, word, words

EXTENSIONS = "txt csv png pdf doc xml zip mp3".split()  # noqa: SIM905
ROMAN = ((10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))


# --- names in code ---------------------------------------------------------------------------


def snake_case(rng: random.Random) -> tuple[str, str]:
    """`mora bento` becomes `mora_bento`."""
    first, second = words(rng, 2)
    return f"{first} {second}", f"{first}_{second}"


def camel_case(rng: random.Random) -> tuple[str, str]:
    """`mora bento` becomes `moraBento`."""
    first, second = words(rng, 2)
    return f"{first} {second}", f"{first}{second.capitalize()}"


def constant_case(rng: random.Random) -> tuple[str, str]:
    """`mora bento` becomes `MORA_BENTO`."""
    first, second = words(rng, 2)
    return f"{first} {second}", f"{first}_{second}".upper()


# --- files -----------------------------------------------------------------------------------


def file(rng: random.Random) -> tuple[str, str, str]:
    """Folder, name and extension."""
    folder, name = words(rng, 2)
    return folder, name, rng.choice(EXTENSIONS)


def extension(rng: random.Random) -> tuple[str, str]:
    """The extension of a file."""
    folder, name, ending = file(rng)
    return f"{folder}/{name}.{ending}", ending


def stem(rng: random.Random) -> tuple[str, str]:
    """The name of a file, without folder and extension."""
    folder, name, ending = file(rng)
    return f"{folder}/{name}.{ending}", name


def backup(rng: random.Random) -> tuple[str, str]:
    """`docs/mora.txt` becomes `docs/mora_old.txt`."""
    folder, name, ending = file(rng)
    return f"{folder}/{name}.{ending}", f"{folder}/{name}_old.{ending}"


# --- addresses -------------------------------------------------------------------------------


def domain(rng: random.Random) -> tuple[str, str]:
    """The domain of a mail address."""
    user, site = words(rng, 2)
    ending = rng.choice(["org", "com", "net"])
    return f"{user}@{site}.{ending}", f"{site}.{ending}"


def slug(rng: random.Random) -> tuple[str, str]:
    """A title as the end of a web address."""
    title = words(rng, 3)
    return " ".join(title).capitalize(), "-".join(title)


def link(rng: random.Random) -> tuple[str, str]:
    """A web address in full."""
    site, page = words(rng, 2)
    return f"{site}.org/{page}", f"https://{site}.org/{page}"


# --- markup ----------------------------------------------------------------------------------


def tagged(rng: random.Random) -> tuple[str, str]:
    """The second of three words between tags for bold."""
    first, second, third = words(rng, 3)
    return f"{first} {second} {third}", f"{first} <b>{second}</b> {third}"


def emphasised(rng: random.Random) -> tuple[str, str]:
    """The one word between stars."""
    items = words(rng, 4)
    chosen = rng.randrange(4)
    shown = [f"*{w}*" if i == chosen else w for i, w in enumerate(items)]
    return " ".join(shown), items[chosen]


def bulleted(rng: random.Random) -> tuple[str, str]:
    """`a, b` becomes `- a - b`."""
    items = words(rng, 3)
    return ", ".join(items), "- " + " - ".join(items)


# --- records ---------------------------------------------------------------------------------


def record(rng: random.Random) -> tuple[str, int, str]:
    """Name, age and town."""
    return rng.choice(NAMES), rng.randint(18, 90), word(rng).capitalize()


def name_and_age(rng: random.Random) -> tuple[str, str]:
    """`Ada, 34` becomes `{"name": "Ada", "age": 34}`."""
    name, age, town = record(rng)
    return f"{name} from {town}, {age}", f'{{"name": "{name}", "age": {age}}}'


def semicolons(rng: random.Random) -> tuple[str, str]:
    """Three fields become a line of a table."""
    name, age, town = record(rng)
    return f"name {name}, age {age}, town {town}", f"{name};{age};{town}"


def town_field(rng: random.Random) -> tuple[str, str]:
    """The town in an object of three fields."""
    name, age, town = record(rng)
    return f'{{"name": "{name}", "town": "{town}", "age": {age}}}', town


# --- numbers, as written ---------------------------------------------------------------------


def ordinal(rng: random.Random) -> tuple[str, str]:
    """`Floor 23` becomes `23rd floor`."""
    n, thing = rng.randint(1, 99), rng.choice(["Floor", "Row", "Day", "Week", "Page"])
    ending = "th" if n // 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{thing} {n}", f"{n}{ending} {thing.lower()}"


def roman(rng: random.Random) -> tuple[str, str]:
    """`Mora 14` becomes `Mora XIV`."""
    name, n = word(rng).capitalize(), rng.randint(1, 29)
    rest, numeral = n, ""
    for value, letters in ROMAN:
        numeral += letters * (rest // value)
        rest %= value
    return f"{name} {n}", f"{name} {numeral}"


def percent(rng: random.Random) -> tuple[str, str]:
    """`0.375` becomes `37.5%`."""
    n = rng.randint(100, 999)
    return f"0.{n}", f"{n // 10}.{n % 10}%"


def decimal(rng: random.Random) -> tuple[str, str]:
    """`37.5%` becomes `0.375`."""
    answer, question = percent(rng)
    return question, answer


def dashed(rng: random.Random) -> tuple[str, str]:
    """`5551234` becomes `555-1234`."""
    n = str(rng.randint(1_000_000, 9_999_999))
    return n, f"{n[:3]}-{n[3:]}"


def last_four(rng: random.Random) -> tuple[str, str]:
    """The last four digits of a telephone number."""
    question, _ = dashed(rng)
    return question, question[-4:]
