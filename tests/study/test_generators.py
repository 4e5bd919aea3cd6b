"""Generated tasks: answers checked by a second implementation, written another way."""

import json
import re
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import PurePosixPath
from urllib.parse import urlunsplit

import pytest

from helpers.study import generators, tasks, words


def items(text):
    return text.split(", ")


def on_vowels(text, change):
    return re.sub("[aeiou]", change, text)


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def day(text):
    return datetime.strptime(text, "%Y-%m-%d")


def time(text):
    return datetime.strptime(text, "%H:%M")


def ending(n):
    return (
        "th"
        if n in (11, 12, 13) or n % 10 not in (1, 2, 3)
        else ("st", "nd", "rd")[n % 10 - 1]
    )


def numeral(n):
    return (
        "X" * (n // 10)
        + ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")[n % 10]
    )


DIGITS = dict(zip("0123456789", generators.ONES, strict=True))
BACK = dict(
    zip(
        ["north", "east", "south", "west"],
        ["south", "west", "north", "east"],
        strict=True,
    )
)
WORDS = {word: digit for digit, word in DIGITS.items()}
SECOND = {
    "doubled_vowels": lambda x: on_vowels(x, r"\g<0>\g<0>"),
    "starred_vowels": lambda x: on_vowels(x, "*"),
    "dropped_vowels": lambda x: on_vowels(x, ""),
    "upper_first": lambda x: re.sub(r"^\w+", lambda m: m[0].upper(), x),
    "upper_last": lambda x: re.sub(r"\w+$", lambda m: m[0].upper(), x),
    "hyphenated": lambda x: re.sub(r"(?<=.)(?=.)", "-", x),
    "bracketed": lambda x: re.sub(r"^(.)", r"(\1)", x),
    "suffixed": lambda x: x + ("-a" if re.search("[aeiou]$", x) else "-o"),
    "first_last": lambda x: re.sub(r"^(\w+),.* (\w+)$", r"\1 \2", x),
    "second_word": lambda x: items(x)[1],
    "rotated": lambda x: re.sub(r"^(\w+), (.*)$", r"\2, \1", x),
    "animal": lambda x: next(w for w in items(x) if w in words.ANIMALS),
    "tool": lambda x: next(w for w in items(x) if w not in words.ANIMALS),
    "repeated": lambda x: max(items(x), key=items(x).count),
    "joined": lambda x: x.replace(",", " and"),
    "larger": lambda x: str(sorted(numbers(x))[1]),
    "smaller": lambda x: str(sorted(numbers(x))[0]),
    "parity": lambda x: "even" if x[-1] in "02468" else "odd",
    "spelled": lambda x: " ".join(DIGITS[c] for c in x),
    "unspelled": lambda x: "".join(WORDS[w] for w in x.split()),
    "successor": lambda x: str(-~int(x)),
    "grouped": lambda x: re.sub(r"(\d)(\d{3})$", r"\1,\2", x),
    "padded": lambda x: x.zfill(6),
    "priced": lambda x: f"${numbers(x)[0] / 100:.2f}",
    "written": lambda x: f"{day(x).day} {day(x):%B} {day(x).year}",
    "month_of": lambda x: f"{day(x):%B}",
    "quarter_of": lambda x: "Q" + "111222333444"[int(x[5:7]) - 1],
    "next_weekday": lambda x: {
        "Monday": "Tuesday",
        "Tuesday": "Wednesday",
        "Wednesday": "Thursday",
        "Thursday": "Friday",
        "Friday": "Saturday",
        "Saturday": "Sunday",
        "Sunday": "Monday",
    }[x.split()[3]],
    "clock": lambda x: f"{time(x):%I:%M %p}".lstrip("0").lower(),
    "full_hour": lambda x: f"{time(x) + timedelta(hours=1):%H:%M}",
    "initials": lambda x: "".join(w[0] + "." for w in x.split()),
    "surname_first": lambda x: ", ".join(reversed(x.split())),
    "address": lambda x: ".".join(x.split()).lower() + "@mail.org",
    "age": lambda x: dict(pair.split("=") for pair in x.split("; "))["age"],
    "town": lambda x: re.search(r"in (\w+) since", x)[1],
    "called": lambda x: re.sub(r"^(\w+) of (\d+) and (\d+)$", r"\1(\2, \3)", x),
    "contained": lambda x: "yes" if re.match(r"(\w+) in .*\b\1\b", x) else "no",
    "earlier": lambda x: sorted(items(x))[0],
    "longer": lambda x: re.search(r"\w{6,}", x)[0],
    "letters": lambda x: str(sum(1 for _ in x)),
    "snake_case": lambda x: re.sub(" ", "_", x),
    "camel_case": lambda x: re.sub(r" (.)", lambda m: m[1].upper(), x),
    "constant_case": lambda x: x.translate(str.maketrans(" ", "_")).upper(),
    "extension": lambda x: PurePosixPath(x).suffix[1:],
    "stem": lambda x: PurePosixPath(x).stem,
    "backup": lambda x: str(PurePosixPath(x).with_stem(PurePosixPath(x).stem + "_old")),
    "domain": lambda x: x.partition("@")[2],
    "slug": lambda x: re.sub(r"\W", "-", x.lower()),
    "link": lambda x: urlunsplit(("https", *x.split("/"), "", "")),
    "tagged": lambda x: re.sub(r" (\w+) ", r" <b>\1</b> ", x),
    "emphasised": lambda x: x.split("*")[1],
    "bulleted": lambda x: re.sub(r"(\w+),?", r"- \1", x),
    "name_and_age": lambda x: json.dumps({"name": x.split()[0], "age": numbers(x)[0]}),
    "semicolons": lambda x: ";".join(field.split()[1] for field in items(x)),
    "town_field": lambda x: json.loads(x)["town"],
    "ordinal": lambda x: (
        f"{numbers(x)[0]}{ending(numbers(x)[0])} {x.split()[0].lower()}"
    ),
    "roman": lambda x: f"{x.split()[0]} {numeral(numbers(x)[0])}",
    "percent": lambda x: f"{Decimal(x) * 100:.1f}%",
    "decimal": lambda x: f"{Decimal(x[:-1]) / 100:.3f}",
    "dashed": lambda x: re.sub(r"^(...)", r"\1-", x),
    "last_four": lambda x: f"{int(x) % 10000:04d}",
    "passive": lambda x: re.sub(r"(\w+) (\w+) (\w+)", r"\3 was \2 by \1", x),
    "whom": lambda x: x.split()[-1],
    "quoted": lambda x: re.sub(r"(\w+) says (.*)", r'"\2", says \1', x),
    "thanked": lambda x: re.sub(
        r"(\w+) brought (\w+) at \d+", r"Thank you for the \2, \1!", x
    ),
    "greeted": lambda x: (
        f"Good {'morning' if time(x[-5:]).hour < 12 else 'evening'}, "
        + x.replace(x[-7:], "!")
    ),
    "way_back": lambda x: " ".join([*x.split()[:2], BACK[x.split()[2]]]),
    "swapped": lambda x: re.sub(r"(\d+), (\d+)", r"\2, \1", x),
    "mirrored": lambda x: x.replace("(", "(-"),
    "flipped": lambda x: x.translate(str.maketrans("01", "10")),
    "opposite": lambda x: f"{-int(x):+d}",
    "absolute": lambda x: str(abs(int(x))),
    "rounded": lambda x: f"${round(float(x[1:]))}",
    "next_term": lambda x: str(2 * numbers(x)[2] - numbers(x)[1]),
    "passed": lambda x: ["fail", "pass"][numbers(x)[0] // 50],
    "weather": lambda x: ["cold", "mild", "warm"][int(float(x.split()[1]) // 10)],
    "pens": lambda x: re.search(r"(\d+) pens", x)[1],
    "most": lambda x: max(items(x), key=lambda item: int(item.split()[0])).split()[1],
    "place": lambda x: re.sub(r"(\w+) \((\w+)\)", r"\1 lives in \2.", x),
}


@pytest.mark.parametrize("name", generators.GENERATORS)
def test_answers_are_those_of_a_second_implementation(name):
    rows = generators.examples(name, 400)
    assert len(rows) == len({row["prompt"] for row in rows}) >= 300
    for row in rows:
        question = re.fullmatch(r"Input: (.*)\nOutput:", row["prompt"])[1]
        assert row["answers"] == [SECOND[name](question)]


def test_draws_are_seeded_and_more_begin_with_the_same():
    few, many, other = (
        generators.examples("rotated", n, seed)
        for n, seed in ((20, 0), (50, 0), (20, 1))
    )
    assert many[:20] == few != other


def test_the_catalogue_names_every_generator_in_a_family_of_at_most_three():
    entries = {n: e for n, e in tasks.catalogue().items() if n.startswith("generated:")}
    assert {tasks.short(name) for name in entries} == set(generators.GENERATORS)
    families = [entry["family"] for entry in entries.values()]
    assert all(families.count(family) <= 3 for family in families)
    assert all(
        name.split(":")[1].split("/")[0] == e["family"] for name, e in entries.items()
    )


def test_a_generated_task_is_loaded_as_any_other():
    task = tasks.load_task("generated:vowels/doubled_vowels", (40, 8, 8, 8))
    assert task.splits.num_rows == {"train": 40, "dev": 8, "probe": 8, "test": 8}
    assert task.splits["test"][0]["prompt"].startswith(f"{task.instruction}\nInput: ")
    with pytest.raises(
        ValueError, match="unknown generated task 'generated:vowels/tripled'"
    ):
        tasks.check_names(["generated:vowels/tripled"])
    with pytest.raises(ValueError, match="no generator is called 'tripled'"):
        generators.examples("tripled")
