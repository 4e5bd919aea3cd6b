"""Every metric against its definition on whole vectors; additivity, constructed cases, refusals."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.merge import Row, open_base, open_specialist, stream, views
from helpers.states import sums
from helpers.states.conflict import (
    METRICS,
    PRIMARY,
    group_variance,
    metrics,
    pair_metrics,
    pair_sums,
)

# ragged on purpose: less than a block, several, a vector, a scalar-sized tensor
NAMES = {
    "model.layers.0.self_attn.q_proj.weight": (7, 5),
    "model.layers.0.input_layernorm.weight": (11,),
    "model.layers.10.self_attn.q_proj.weight": (13, 9),
    "model.norm.weight": (1,),
}
LABELS = ["add", "plural", "past"]


def some_rows(n=3, zeros=0.3, seed=0):
    """Rows of random task vectors with exact zeros, as a bf16 checkpoint has."""
    generator = torch.Generator().manual_seed(seed)

    def tau(shape):
        values = torch.randn(shape, generator=generator)
        return values * (torch.rand(shape, generator=generator) >= zeros)

    return [
        Row(name, torch.zeros(s), [tau(s) for _ in range(n)])
        for name, s in NAMES.items()
    ]


def one_row(*vectors):
    taus = [torch.as_tensor(v, dtype=torch.float32) for v in vectors]
    return [Row("w", torch.zeros_like(taus[0]), taus)]


def by_definition(vectors_a, vectors_b):
    """The metrics that need no matrix, on whole flattened vectors (lists: one array per tensor)."""
    a, b = np.concatenate(vectors_a), np.concatenate(vectors_b)
    size_a, size_b = abs(a), abs(b)
    opposite = a * b < 0
    gap, largest = abs(size_a - size_b), np.maximum(size_a, size_b)
    cosines = [
        x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        for x, y in zip(vectors_a, vectors_b, strict=True)
        if x.any() and y.any()
    ]
    norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
    return {
        "sign_change": opposite.mean(),
        "magnitude_change": abs(a - b).sum() / (size_a + size_b).sum(),
        "conflict_magnitude": (size_a + size_b)[opposite].sum()
        / (size_a + size_b).sum(),
        "cosine": a @ b / (norm_a * norm_b),
        "cosine_tensors": np.mean(cosines),
        "magnitude_gap": gap.sum() / largest.sum(),
        "relative_gap": np.divide(
            gap, largest, where=largest > 0, out=np.zeros_like(gap)
        ).mean(),
        "conflict_min": np.minimum(size_a, size_b)[opposite].sum()
        / np.minimum(size_a, size_b).sum(),
        "norm_ratio": min(norm_a, norm_b) / max(norm_a, norm_b),
        "variance": np.var([a, b], axis=0).mean(),
        "variance_share": np.var([a, b], axis=0).mean() / np.mean([a**2, b**2]),
        "norm_a": norm_a,
        "norm_b": norm_b,
    }


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("block", [1 << 15, 8])
def test_streamed_sums_equal_the_definitions_on_whole_vectors(
    monkeypatch, zeros, block
):
    monkeypatch.setattr(sums, "BLOCK", block)
    rows = some_rows(zeros=zeros)
    table = pair_metrics(iter(rows), LABELS).set_index(["task_a", "task_b"])
    assert len(table) == 3
    for i, j in combinations(range(3), 2):
        vectors = (
            [row.taus[k].double().flatten().numpy() for row in rows] for k in (i, j)
        )
        expected = by_definition(*vectors)
        got = table.loc[(LABELS[i], LABELS[j])]
        for name, value in expected.items():
            # relative_gap is summed in fp32, which is enough for a mean of ratios
            assert got[name] == pytest.approx(
                value, rel=1e-6 if name == "relative_gap" else 1e-12
            )


def test_order_of_tensors_and_models_does_not_matter():
    rows = some_rows()
    table = pair_metrics(rows, LABELS)
    pd.testing.assert_frame_equal(pair_metrics(rows[::-1], LABELS), table, rtol=1e-12)
    turned = [Row(r.name, r.base, r.taus[::-1]) for r in rows]
    other = pair_metrics(turned, LABELS[::-1]).iloc[::-1].reset_index(drop=True)
    swapped = other.rename(
        columns={
            "task_a": "task_b",
            "task_b": "task_a",
            "norm_a": "norm_b",
            "norm_b": "norm_a",
        }
    )[table.columns]
    pd.testing.assert_frame_equal(swapped, table, rtol=1e-12)


def test_breakdown_by_layer_and_kind():
    sums = pair_sums(some_rows(), LABELS)
    assert set(zip(sums.layer, sums.kind, strict=True)) == {
        (0, "self_attn.q_proj"),
        (0, "input_layernorm"),
        (10, "self_attn.q_proj"),
        (-1, "model.norm"),
    }
    layer = metrics(sums, by=["layer"])
    alone = pair_metrics(some_rows()[:2], LABELS)
    pd.testing.assert_frame_equal(
        layer[layer.layer == 0].drop(columns="layer").reset_index(drop=True), alone
    )
    assert len(metrics(sums, by=["kind"])) == 3 * 3


# --- constructed cases ------------------------------------------------------------------------


def test_sign_change_example_of_the_paper():
    table = pair_metrics(one_row([1.0, 0.0], [-1.0, 1.0]), ["a", "b"])
    assert table.sign_change[0] == 0.5


def test_primary_metrics_by_hand():
    table = pair_metrics(
        one_row([3.0, -1.0, 0.0, 2.0], [1.0, 2.0, 1.0, 2.0]), ["a", "b"]
    )
    expected = [1 / 4, 6 / 12, 3 / 12, 5 / np.sqrt(14 * 10)]
    assert table.loc[0, list(PRIMARY)].tolist() == pytest.approx(expected)


CASES = {  # second vector made from the first -> sign, magnitude, conflict mass, cosine
    "identical": (lambda t: t, [0, 0, 0, 1]),
    "scaled": (lambda t: 4 * t, [0, 0.6, 0, 1]),
    "opposite": (lambda t: -t, [1, 1, 1, -1]),
    "disjoint": (lambda t: t.flip(0), [0, 1, 0, 0]),
    "zero": (lambda t: 0 * t, [0, 1, 0, np.nan]),
}


@pytest.mark.parametrize("case", CASES)
def test_constructed_pair(case):
    other, expected = CASES[case]
    tau = torch.randn(40, generator=torch.Generator().manual_seed(1))
    if case == "disjoint":
        tau[20:] = 0
    table = pair_metrics([Row("w", torch.zeros(40), [tau, other(tau)])], ["a", "b"])
    assert table.loc[0, list(PRIMARY)].tolist() == pytest.approx(
        expected, abs=1e-12, nan_ok=True
    )


RNG = np.random.default_rng(5)
ORDER, ROTATION = RNG.permutation(40), np.linalg.qr(RNG.normal(size=(40, 40)))[0]
PAIR = RNG.normal(size=(2, 40)) * [[1.0], [1.5]] + 0.3

TRANSFORMATIONS = {  # of the two task vectors
    "permuted": lambda a, b: (a[ORDER], b[ORDER]),
    "rotated": lambda a, b: (a @ ROTATION, b @ ROTATION),
    "scaled alike": lambda a, b: (3 * a, 3 * b),
    "one scaled": lambda a, b: (a, 3 * b),
    "shifted alike": lambda a, b: (a + 1, b + 1),
    "duplicated": lambda a, b: (np.tile(a, 2), np.tile(b, 2)),
}
# 1: the value stays; 0: it changes. Columns in the order of TRANSFORMATIONS.
INVARIANCE = {
    #                     perm rot scale one shift dupl
    "sign_change":        (1,  0,  1,    1,  0,    1),
    "magnitude_change":   (1,  0,  1,    0,  0,    1),
    "conflict_magnitude": (1,  0,  1,    0,  0,    1),
    "cosine":             (1,  1,  1,    1,  0,    1),
    "cosine_tensors":     (1,  1,  1,    1,  0,    1),
    "magnitude_gap":      (1,  0,  1,    0,  0,    1),
    "relative_gap":       (1,  0,  1,    0,  0,    1),
    "conflict_min":       (1,  0,  1,    0,  0,    1),
    "norm_ratio":         (1,  1,  1,    0,  0,    1),
    "top_overlap":        (1,  0,  1,    1,  0,    1),
    "top_chance":         (1,  1,  1,    1,  1,    1),
    "variance":           (1,  1,  0,    0,  1,    1),
    "variance_share":     (1,  1,  1,    0,  0,    1),
    "norm_a":             (1,  1,  0,    1,  0,    0),
    "norm_b":             (1,  1,  0,    0,  0,    0),
}  # fmt: skip


def test_every_metric_of_coordinates_has_a_row_of_the_invariance_table():
    of_matrices = {
        f"{side}_{what}" for side in ("left", "right") for what in ("overlap", "chance")
    }
    assert set(INVARIANCE) == set(METRICS) - of_matrices


@pytest.mark.parametrize("column, transformation", list(enumerate(TRANSFORMATIONS)))
def test_invariance(column, transformation):
    before = pair_metrics(one_row(*PAIR), ["a", "b"]).loc[0]
    change = TRANSFORMATIONS[transformation]
    after = pair_metrics(one_row(*change(*PAIR)), ["a", "b"]).loc[0]
    stays = {
        name: int(after[name] == pytest.approx(before[name], rel=1e-5))
        for name in INVARIANCE
    }
    assert stays == {name: row[column] for name, row in INVARIANCE.items()}


# --- largest coordinates, subspaces, groups ---------------------------------------------------


def test_top_overlap_counts_the_largest_coordinates_of_each_tensor():
    a, b = [9.0, 8, 1, 1, 1, 1, 1, 1, 1, 1], [9.0, 1, -8, 1, 1, 1, 1, 1, 1, 1]
    table = pair_metrics(one_row(a, b), ["a", "b"])
    assert table.top_overlap[0] == 0.5 and table.top_chance[0] == pytest.approx(0.2)
    sparse = pair_sums(one_row([1.0, *[0.0] * 9], [2.0, *[0.0] * 9]), ["a", "b"])
    assert sparse.top_a[0] == 1  # zeros are never among the largest


def test_top_overlap_of_independent_vectors_is_at_chance():
    generator = torch.Generator().manual_seed(3)
    taus = [torch.randn(100_000, generator=generator) for _ in range(2)]
    table = pair_metrics([Row("w", torch.zeros(100_000), taus)], ["a", "b"])
    assert table.top_overlap[0] == pytest.approx(table.top_chance[0], abs=0.01)


def test_subspace_overlap_of_adapters_equals_a_dense_svd(tiny_base, tiny_adapters):
    base = open_base(tiny_base)
    specialists = [open_specialist(folder) for folder in tiny_adapters]
    labels = [s.label for s in specialists]
    sums = pair_sums(views(base, specialists), labels, directions=3).set_index(
        ["tensor", "task_a", "task_b"]
    )
    for row in stream(base, specialists):
        vectors = [
            torch.linalg.svd(tau.double(), full_matrices=False) for tau in row.taus
        ]
        for i, j in combinations(range(3), 2):
            got = sums.loc[(row.name, labels[i], labels[j])]
            left = (vectors[i].U[:, :3].T @ vectors[j].U[:, :3]).square().sum().item()
            right = (vectors[i].Vh[:3] @ vectors[j].Vh[:3].T).square().sum().item()
            assert got.left_shared == pytest.approx(left, rel=1e-4)
            assert got.right_shared == pytest.approx(right, rel=1e-4)
            assert got.left_expected == pytest.approx(9 / row.base.shape[0])
            assert got.directions == 3


def test_adapters_streamed_dense_or_lazily_agree_and_only_factors_have_subspaces(
    tiny_base, tiny_adapters
):
    base = open_base(tiny_base)
    specialists = [open_specialist(folder) for folder in tiny_adapters]
    labels = [s.label for s in specialists]
    lazy = pair_metrics(views(base, specialists), labels)
    dense = pair_metrics(stream(base, specialists), labels)
    subspace = ["left_overlap", "left_chance", "right_overlap", "right_chance"]
    assert lazy[subspace].notna().all(axis=None) and dense[subspace].isna().all(
        axis=None
    )
    pd.testing.assert_frame_equal(
        lazy.drop(columns=subspace), dense.drop(columns=subspace)
    )


def test_group_variance_is_the_variance_over_its_members():
    rows = some_rows()
    whole = np.array(
        [np.concatenate([r.taus[i].flatten() for r in rows]) for i in range(3)]
    )
    pairs = pair_metrics(rows, LABELS)
    raw = whole.var(axis=0).mean()
    assert group_variance(pairs, LABELS) == pytest.approx(raw, rel=1e-6)
    relative = raw / (whole**2).mean()
    assert group_variance(pairs, LABELS, relative=True) == pytest.approx(
        relative, rel=1e-6
    )
    assert group_variance(pairs, LABELS[:2]) == pytest.approx(pairs.variance[0])
    share = group_variance(pairs, LABELS[:2], relative=True)
    assert share == pytest.approx(pairs.variance_share[0])
    with pytest.raises(ValueError, match="3 members have 3 pairs, but 2 are given"):
        group_variance(pairs[:2], LABELS)


@pytest.mark.parametrize(
    "vectors, share",
    [
        ([[1.0, 2, 0], [1.0, 2, 0], [1.0, 2, 0]], 0),
        ([[3.0, 0, 0], [0, 1.0, 0], [0, 0, 2.0]], 2 / 3),
        ([[1.0, 0, 0], [-1.0, 0, 0], [0, 0, 0.0]], 1),
    ],
)
def test_relative_group_variance_of_equal_orthogonal_and_cancelling_vectors(
    vectors, share
):
    pairs = pair_metrics(one_row(*vectors), LABELS)
    assert group_variance(pairs, LABELS, relative=True) == pytest.approx(
        share, abs=1e-12
    )


@pytest.mark.parametrize(
    "rows, labels, message",
    [
        (one_row([1.0]), ["a"], "two or more models"),
        (one_row([1.0], [2.0]), ["a", "a"], "different labels"),
        (one_row([1.0], [2.0]), ["a", "b", "c"], "w has 2 task vectors for 3 labels"),
        ([], ["a", "b"], "no tensor to compare"),
    ],
)
def test_refuses(rows, labels, message):
    with pytest.raises(ValueError, match=message):
        pair_sums(rows, labels)
