"""The rules on singular values against second implementations, on factors and by invariance."""

import pytest
import torch
from test_rules import low_rank, random_taus, rows

from helpers import merge as merging
from helpers.merge import spectral

BOTH = ["a", "b"]
RULES = [spectral.iso_c, spectral.iso_cts, spectral.tsv, spectral.actmerge]


def iso_cts_of_full_rank(taus, common):
    """As in the authors' description, on the full spectrum, in double precision."""
    taus = [tau.double() for tau in taus]
    n, rank = len(taus), min(taus[0].shape)
    own = round((rank - int(rank * common)) / n)
    shared = rank - own * n
    u, s, v = torch.linalg.svd(sum(taus), full_matrices=False)
    us, ss, vs = [u[:, :shared]], [s[:shared]], [v[:shared]]
    for tau in taus:
        rest = tau - u[:, :shared] @ u[:, :shared].T @ tau
        x, y, z = torch.linalg.svd(rest, full_matrices=False)
        us.append(x[:, :own])
        ss.append(y[:own])
        vs.append(z[:own])
    outer = torch.linalg.svd(torch.cat(us, 1), full_matrices=False)
    inner = torch.linalg.svd(torch.cat(vs, 0), full_matrices=False)
    return torch.cat(ss).mean() * (outer.U @ outer.Vh) @ (inner.U @ inner.Vh)


@pytest.mark.parametrize("common", [0.0, 0.5, 0.8, 1.0])
def test_iso_cts_is_the_authors_on_matrices_of_full_rank(common):
    taus = random_taus(3, (9, 12))
    ours = spectral.iso_cts(taus, [1.0] * 3, common=common)
    expected = iso_cts_of_full_rank(taus, common).float()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    if common == 1:
        torch.testing.assert_close(
            ours, spectral.iso_c(taus, [1.0] * 3), rtol=1e-4, atol=1e-4
        )


def test_actmerge_solves_its_least_squares():
    """min over D of sum_i w_i ||tau_i (D - tau_i)'||^2: each task vector is its own probe."""
    taus, weights = random_taus(2, (15, 6)), [2.0, 0.5]
    probes = torch.cat([w**0.5 * tau for tau, w in zip(taus, weights, strict=True)])
    wanted = torch.cat(
        [w**0.5 * tau @ tau.T for tau, w in zip(taus, weights, strict=True)]
    )
    best = torch.linalg.lstsq(probes, wanted).solution.T
    torch.testing.assert_close(
        spectral.actmerge(taus, weights), best, rtol=1e-3, atol=1e-3
    )


def svc_by_hand(delta, taus, alpha):
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    calibrated = torch.zeros_like(delta)
    for r in range(len(s)):
        merged = u[:, r] @ delta
        shares = []
        for tau in taus:
            own = u[:, r] @ tau
            shares.append(max(alpha, float(merged @ own / (own @ own))))
        calibrated += len(taus) / sum(shares) * s[r] * torch.outer(u[:, r], v[r])
    return calibrated


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_svc_is_its_formula_and_counts_shared_knowledge_once(alpha):
    taus = random_taus(3, (8, 11))
    delta = sum(taus)
    ours = spectral.svc(delta, taus, alpha)
    torch.testing.assert_close(
        ours, svc_by_hand(delta, taus, alpha), rtol=1e-4, atol=1e-4
    )
    copies, report = merging.merge(
        rows(taus[0], taus[0]), "task_arithmetic", BOTH, svc=alpha
    )
    torch.testing.assert_close(copies["w"], taus[0], rtol=1e-4, atol=1e-4)
    assert report.own == pytest.approx([1, 1], rel=1e-4)
    assert report.ingredient == pytest.approx([0.5, 0.5], rel=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_factors_and_dense_matrices_give_the_same(rule):
    lazy, dense = low_rank(3)
    weights = [1.0, 0.5, 2.0]
    torch.testing.assert_close(
        rule(lazy, weights), rule(dense, weights), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("rule", RULES)
def test_rotating_rows_and_columns_rotates_the_merge(rule):
    taus, weights = random_taus(2, (7, 5)), [1.0, 2.0]
    left, right = (
        torch.linalg.qr(x).Q
        for x in (random_taus(1, (7, 7), 5)[0], random_taus(1, (5, 5), 6)[0])
    )
    turned = rule([left @ tau @ right for tau in taus], weights)
    torch.testing.assert_close(
        turned, left @ rule(taus, weights) @ right, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("rule", ["iso_c", "iso_cts", "tsv", "actmerge"])
def test_experts_are_taken_one_by_one_and_other_stacks_are_said(rule):
    taus = random_taus(2, (3, 6, 5))
    row = merging.Row("mlp.experts.up", torch.zeros(3, 6, 5), taus)
    delta, report = merging.merge([row], rule, BOTH)
    for i in range(3):
        one, _ = merging.merge(rows(taus[0][i], taus[1][i]), rule, BOTH)
        torch.testing.assert_close(delta["mlp.experts.up"][i], one["w"])
    assert report.plain == 0
    mean, report = merging.merge([row._replace(name="conv")], rule, BOTH)
    torch.testing.assert_close(mean["conv"], sum(taus) / 2)
    assert report.plain == 1


def test_lines_scales_by_depth():
    names = ["embed", "layers.0.w", "layers.1.w", "layers.2.w", "norm"]
    model = [
        merging.Row(n, torch.zeros(4, 3), random_taus(2, (4, 3), i))
        for i, n in enumerate(names)
    ]
    plain, _ = merging.merge(model, "task_arithmetic", BOTH)
    scaled, report = merging.merge(model, "task_arithmetic", BOTH, lines=(0.5, 1.0))
    for name, factor in zip(names, [0.5, 0.5, 1.0, 1.5, 1.5], strict=True):
        torch.testing.assert_close(scaled[name], factor * plain[name])
    own = merging.merge(model, "task_arithmetic", BOTH)[1].own
    assert report.own != pytest.approx(own) and report.as_dict()["lines"] == (0.5, 1.0)
    for bad in ({"lines": [1.0]}, {"svc": 0.0}, {"svc": float("nan")}):
        with pytest.raises(ValueError, match="svc|lines"):
            merging.merge(model, "task_arithmetic", BOTH, **bad)
