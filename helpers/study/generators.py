"""Generated tasks: `generated:<family>/<name>`, seeded, as many examples as are asked for.

Each generator draws an input and knows its answer: a rule on words (`words`), on notations
(`notations`), on sentences and measures (`sentences`) or, here, on numbers, dates and records, that
a small model can learn from a few hundred examples. A family has at most three tasks, relatives.
Their instructions are in data/tasks.toml.
"""

import random
import sys
from collections.abc import Callable, Iterable
from datetime import date, timedelta
from types import ModuleType

from helpers.study import notations, sentences, words
from helpers.study.notations import record
from helpers.study.words import NAMES, word

EXAMPLES = 2000  # different prompts in the pool of a task
ONES = "zero one two three four five six seven eight nine".split()  # noqa: SIM905
MONTHS = [date(2001, month, 1).strftime("%B") for month in range(1, 13)]
# 1 January 2001 was a Monday
DAYS = [date(2001, 1, day).strftime("%A") for day in range(1, 8)]


# --- numbers ---------------------------------------------------------------------------------


def larger(rng: random.Random) -> tuple[str, str]:
    """The larger of two numbers."""
    a, b = rng.sample(range(100, 1000), 2)
    return f"{a}, {b}", str(max(a, b))


def smaller(rng: random.Random) -> tuple[str, str]:
    """The smaller of two numbers."""
    a, b = rng.sample(range(100, 1000), 2)
    return f"{a}, {b}", str(min(a, b))


def parity(rng: random.Random) -> tuple[str, str]:
    """Whether a number is even or odd."""
    n = rng.randint(100, 99999)
    return str(n), "odd" if n % 2 else "even"


def spelled(rng: random.Random) -> tuple[str, str]:
    """Digits as words."""
    digits = [rng.randint(0, 9) for _ in range(4)]
    return "".join(map(str, digits)), " ".join(ONES[d] for d in digits)


def unspelled(rng: random.Random) -> tuple[str, str]:
    """Words as digits."""
    answer, question = spelled(rng)
    return question, answer


def successor(rng: random.Random) -> tuple[str, str]:
    """The next number."""
    n = rng.randint(100, 9999)
    return str(n), str(n + 1)


def grouped(rng: random.Random) -> tuple[str, str]:
    """A comma before the last three digits."""
    n = rng.randint(1000, 999999)
    return str(n), f"{n:,}"


def padded(rng: random.Random) -> tuple[str, str]:
    """Leading zeros up to six digits."""
    n = rng.randint(1, 99999)
    return str(n), f"{n:06d}"


def priced(rng: random.Random) -> tuple[str, str]:
    """Cents as dollars."""
    n = rng.randint(100, 9999)
    return f"{n} cents", f"${n // 100}.{n % 100:02d}"


# --- dates and times -------------------------------------------------------------------------


def some_day(rng: random.Random) -> date:
    return date(1950, 1, 1) + timedelta(days=rng.randrange(36500))


def written(rng: random.Random) -> tuple[str, str]:
    """2001-03-07 becomes 7 March 2001."""
    day = some_day(rng)
    return day.isoformat(), f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def month_of(rng: random.Random) -> tuple[str, str]:
    """The name of the month of a date."""
    day = some_day(rng)
    return day.isoformat(), MONTHS[day.month - 1]


def quarter_of(rng: random.Random) -> tuple[str, str]:
    """Q1 to Q4 of a date."""
    day = some_day(rng)
    return day.isoformat(), f"Q{(day.month + 2) // 3}"


def next_weekday(rng: random.Random) -> tuple[str, str]:
    """The weekday after that of a meeting."""
    i = rng.randrange(7)
    name, hour = rng.choice(NAMES), rng.randint(1, 12)
    return f"{name} comes on {DAYS[i]} at {hour}", DAYS[(i + 1) % 7]


def clock(rng: random.Random) -> tuple[str, str]:
    """24-hour time to 12-hour time."""
    hour, minute = rng.randrange(24), rng.randrange(60)
    half = "am" if hour < 12 else "pm"
    return f"{hour:02d}:{minute:02d}", f"{(hour + 11) % 12 + 1}:{minute:02d} {half}"


def full_hour(rng: random.Random) -> tuple[str, str]:
    """The time an hour later."""
    hour, minute = rng.randrange(24), rng.randrange(60)
    return f"{hour:02d}:{minute:02d}", f"{(hour + 1) % 24:02d}:{minute:02d}"


# --- records ---------------------------------------------------------------------------------


def initials(rng: random.Random) -> tuple[str, str]:
    """The initials of two names."""
    first, last = rng.choice(NAMES), word(rng).capitalize()
    return f"{first} {last}", f"{first[0]}.{last[0]}."


def surname_first(rng: random.Random) -> tuple[str, str]:
    """`Ada Lovelace` becomes `Lovelace, Ada`."""
    first, last = rng.choice(NAMES), word(rng).capitalize()
    return f"{first} {last}", f"{last}, {first}"


def address(rng: random.Random) -> tuple[str, str]:
    """A mail address of a name."""
    first, last = rng.choice(NAMES), word(rng).capitalize()
    return f"{first} {last}", f"{first.lower()}.{last.lower()}@mail.org"


def age(rng: random.Random) -> tuple[str, str]:
    """The age in a record."""
    name, age, town = record(rng)
    return f"name={name}; age={age}; town={town}", str(age)


def town(rng: random.Random) -> tuple[str, str]:
    """The town in a sentence."""
    name, place, year = (
        rng.choice(NAMES),
        word(rng).capitalize(),
        rng.randint(1950, 2020),
    )
    return f"{name} has lived in {place} since {year}.", place


def called(rng: random.Random) -> tuple[str, str]:
    """A call of two arguments, as in a program."""
    name, a, b = word(rng), rng.randint(1, 99), rng.randint(1, 99)
    return f"{name} of {a} and {b}", f"{name}({a}, {b})"


def _generators(rooms: Iterable[ModuleType]) -> dict[str, Callable]:
    """The functions that give a pair of texts, a question and its answer, by name."""
    functions = [each for room in rooms for each in vars(room).values()]
    return {
        each.__name__: each
        for each in functions
        if getattr(each, "__annotations__", {}).get("return") == tuple[str, str]
    }


GENERATORS = _generators((words, notations, sentences, sys.modules[__name__]))


def examples(name: str, n: int = EXAMPLES, seed: int = 0) -> list[dict]:
    """Rows (prompt, answers, options) of a task: n different prompts, where it has so many.

    More rows begin with the same ones. Raises ValueError for an unknown one.
    """
    if name not in GENERATORS:
        raise ValueError(
            f"no generator is called {name!r}: choose one of {', '.join(GENERATORS)}"
        )
    draw = GENERATORS[name]
    rng = random.Random(f"{seed}|{name}")
    drawn: dict[str, str] = {}
    for _ in range(4 * n):
        question, answer = draw(rng)
        drawn[question] = answer
        if len(drawn) == n:
            break
    return [
        {"prompt": f"Input: {question}\nOutput:", "answers": [answer], "options": []}
        for question, answer in drawn.items()
    ]
