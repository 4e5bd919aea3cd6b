"""Effects of rows and columns by least squares, without the package's own code."""

from typing import NamedTuple

import numpy as np


class Effects(NamedTuple):
    """Of rows and of columns by name, and what is left by (row, column)."""

    rows: dict
    columns: dict
    left: dict


def least_squares(values: dict) -> Effects:
    """{(row, column): value} as level + row + column + what is left."""
    names = sorted({name for pair in values for name in pair})
    place = {name: i for i, name in enumerate(names)}
    design = np.zeros((len(values), 1 + 2 * len(names)))
    design[:, 0] = 1
    for i, (row, column) in enumerate(values):
        design[i, 1 + place[row]] = 1
        design[i, 1 + len(names) + place[column]] = 1
    y = np.array(list(values.values()))
    found = np.linalg.lstsq(design, y, rcond=None)[0]
    of_rows, of_columns = found[1 : 1 + len(names)], found[1 + len(names) :]
    left = dict(zip(values, y - design @ found, strict=True))
    return Effects(
        dict(zip(names, of_rows, strict=True)),
        dict(zip(names, of_columns, strict=True)),
        left,
    )
