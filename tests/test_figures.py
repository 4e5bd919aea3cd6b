"""Figures: same bytes twice, a sidecar that explains, plots that show what is undefined."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from helpers import figures, store

plt.switch_backend("Agg")


@pytest.fixture(autouse=True)
def clean():
    yield
    plt.close("all")
    plt.rcdefaults()
    figures.style()


def draw() -> plt.Figure:
    fig, ax = plt.subplots()
    for rule in ("linear", "ties"):
        ax.plot([0, 1], [0, 1], **figures.look(rule))
    return fig


def test_the_same_figure_twice_is_the_same_bytes_and_carries_no_date(tmp_path):
    figures.style(tmp_path, "05_statistics", {"SEED": 1})
    first = figures.save(draw(), "one", "A line.", "A rising line.").read_bytes()
    second = figures.save(draw(), "two", "A line.", "A rising line.").read_bytes()
    assert first == second
    assert b"Software" not in first and b"tIME" not in first


def test_the_sidecar_explains_the_figure(tmp_path):
    figures.style(tmp_path / "figures", "05_statistics", {"SEED": 1})
    data = {"profile": "demo", "key": "abcd", "device": "cpu", "date": "2026-11-23"}
    path = figures.save(draw(), "line", "Loss against\n   dose.", "Rising.", data=data)
    told = json.loads(path.with_suffix(".json").read_text())
    assert path == tmp_path / "figures" / "line.png"
    assert told.pop("revision") == store.revision()
    assert told == {
        "caption": "Loss against dose.",
        "alt": "Rising.",
        "notebook": "05_statistics",
        "parameters": {"SEED": 1},
        "data": data,
    }


@pytest.mark.parametrize(("caption", "alt"), [("", "alt"), ("caption", "  ")])
def test_a_figure_without_words_is_refused(tmp_path, caption, alt):
    figures.style(tmp_path)
    with pytest.raises(ValueError, match="caption and an alt text"):
        figures.save(draw(), "line", caption, alt)
    assert not list(tmp_path.iterdir())


def test_no_folder_is_refused():
    figures.style()
    with pytest.raises(ValueError, match="folder"):
        figures.save(draw(), "line", "A line.", "Rising.")


def test_every_rule_has_its_own_look():
    looks = {(look["color"], look["marker"]) for look in figures.LOOKS.values()}
    assert len(looks) == len(figures.LOOKS)
    assert figures.look("unheard_of")["label"] == "unheard_of"


def table_of(values, n):
    tasks = [f"task{i}" for i in range(n)]
    return pd.DataFrame(values, index=tasks, columns=tasks)


def test_heat_map_leaves_out_what_is_undefined_and_frames_what_is_marked():
    nan = np.nan
    table = table_of([[nan, -50.0, nan], [-10.0, nan, 5.0], [0.0, -90.0, nan]], 3)
    fig, ax = plt.subplots()
    figures.heat_map(ax, table, "merging loss (%)", marked=table < -30)
    assert [text.get_text() for text in ax.texts] == ["-50", "-10", "5", "0", "-90"]
    drawn = ax.collections[0].get_array()
    assert (
        np.ma.getmaskarray(drawn).ravel().tolist()
        == table.isna().to_numpy().ravel().tolist()
    )
    assert len(ax.patches) == 2
    corners = {(int(patch.get_x()), int(patch.get_y())) for patch in ax.patches}
    assert corners == {(1, 0), (1, 2)}  # column, row


@pytest.mark.parametrize(("n", "written"), [(5, 20), (14, 1), (96, 0)])
def test_more_tasks_have_fewer_numbers_written(n, written):
    values = np.full((n, n), -10.0)
    values[0, 1] = -80
    fig, ax = plt.subplots()
    figures.heat_map(ax, table_of(values, n), "merging loss (%)")
    assert sum(bool(text.get_text()) for text in ax.texts) == written
    assert figures.task_size(n) <= 16


def test_clustering_puts_like_tasks_together():
    values = np.array([[0, 9, 1, 9], [9, 0, 9, 1], [1, 9, 0, 9], [9, 1, 9, 0]], float)
    order = figures.clustered(table_of(values, 4))
    places = [order.index(f"task{i}") for i in range(4)]
    assert abs(places[0] - places[2]) == 1 and abs(places[1] - places[3]) == 1


def test_scatter_and_dose_curves_draw_each_point_once():
    fig, (left, right) = plt.subplots(1, 2)
    figures.scatter(left, [1, 2], [3, np.nan], [2, np.nan], [4, np.nan], ["p", "q"])
    assert [text.get_text() for text in left.texts] == ["p"]
    doses = pd.DataFrame(
        {"task": ["a", "a", "b"], "dose": [1.0, 0.0, 0.5], "score": [0.9, 0, 0.4]}
    )
    figures.dose_curves(right, doses)
    np.testing.assert_array_equal(right.lines[0].get_xdata(), [0.0, 1.0])
    assert {text.get_text() for text in right.texts} == {"a", "b"}


def test_harm_maps_put_the_loss_of_the_victim_in_its_row():
    rows = [("a", "b", -10.0), ("b", "a", -80.0), ("b", "c", np.nan), ("c", "b", 5.0)]
    cells = pd.DataFrame(rows, columns=["victim", "partner", "loss"])
    fell = pd.array([False, True, pd.NA, False], dtype="boolean")
    fig = figures.harm_maps(
        cells.assign(rule="linear", collapsed=fell), ["a", "b", "c"]
    )
    ax = fig.axes[0]
    numbers = [text for text in ax.texts if text.get_text()]
    texts = {tuple(map(int, text.get_position())): text.get_text() for text in numbers}
    assert texts == {(0, 1): "-80", (1, 0): "-10", (1, 2): "5"}  # (column, row)
    framed = [patch.get_xy() for patch in ax.patches if patch.get_linewidth() == 1.6]
    assert framed == [(0.04, 1.04)]


def test_the_parts_of_a_loss_are_drawn_with_their_sum():
    _, ax = plt.subplots()
    x = pd.Series([0.5, 1.0])
    split = {
        "dilution": [-20.0, 0.0],
        "overlap": [2.0, 0.0],
        "interference": [-5.0, -40.0],
    }
    losses = pd.DataFrame(split).assign(loss=lambda d: d.sum(axis=1))
    figures.parts(ax, x, losses)
    drawn = {line.get_label(): line.get_ydata() for line in ax.lines}
    total = sum(drawn[name] for name in split)
    assert np.allclose(total, drawn["merging loss"])


def test_words_stand_below_the_figure_on_the_page(tmp_path, monkeypatch):
    import IPython

    shown = []
    kernel = type("Shell", (), {"kernel": None})()
    monkeypatch.setattr(IPython, "get_ipython", lambda: kernel)
    monkeypatch.setattr(IPython.display, "display", shown.append)
    figures.style(tmp_path)
    figures.save(draw(), "line", "A line.", "Rising.")
    assert isinstance(shown[0], plt.Figure)
    assert shown[1].data == "**Figure.** A line.\n\n**In words.** Rising."
    assert not plt.get_fignums()
