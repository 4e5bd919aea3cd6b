"""What the file holds after the cast is what is reported, and what overflows is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import merge as merging
from helpers.merge.rounding import Grid


def model(folder, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


def merge(base, models, out, *flags):
    named = ["--base", str(base), "--models", *map(str, models), "--out", str(out)]
    merging.main(["--rule", "linear", *named, *flags])
    return load_file(out / "model.safetensors"), json.loads(
        (out / "merge_report.json").read_text()
    )


def changed(state, size, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = {
        k: size * torch.randn(v.shape, generator=generator) for k, v in state.items()
    }
    return {name: tensor.float() + noise[name] for name, tensor in state.items()}


@pytest.fixture
def small_change(tmp_path):
    """A bf16 base, and two fp32 models a fraction of its grid's step away."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (300, 400), "b": (50,)}
    state = {
        k: torch.randn(shape, generator=generator).bfloat16()
        for k, shape in shapes.items()
    }
    base = model(tmp_path / "base", state)
    models = [model(tmp_path / str(i), changed(state, 1e-3, i)) for i in (1, 2)]
    return base, models


@pytest.mark.parametrize("mode", ["nearest", "stochastic"])
def test_the_dose_is_that_of_the_file(small_change, tmp_path, capsys, mode):
    base, models = small_change
    written, report = merge(base, models, tmp_path / "out", "--round", mode)
    start = load_file(base / "model.safetensors")
    names = sorted(start)
    flat = {
        n: torch.cat([s[k].double().flatten() for k in names])
        for n, s in (("w", written),)
    }
    origin = torch.cat([start[k].double().flatten() for k in names])
    step = flat["w"] - origin
    taus = []
    for folder in models:
        state = load_file(folder / "model.safetensors")
        taus.append(torch.cat([state[k].double().flatten() for k in names]) - origin)
    doses = [float(step @ tau / (tau @ tau)) for tau in taus]
    assert report["own"] == pytest.approx(doses, rel=1e-4)
    assert report["asked"] == pytest.approx([0.5, 0.5], abs=0.02)
    delta = sum(taus) / 2
    assert report["left"] == pytest.approx(
        float(step @ delta / (delta @ delta)), rel=1e-4
    )
    cosine = torch.nn.functional.cosine_similarity(step, delta, dim=0)
    assert report["cos_written"] == pytest.approx(float(cosine), rel=1e-4)
    warned = "warning: rounding left" in capsys.readouterr().out
    if mode == "nearest":
        assert report["left"] < 0.6 and warned
    else:
        assert report["left"] == pytest.approx(1, abs=0.05) and not warned
    _, exact = merge(base, models, tmp_path / "exact", "--dtype", "float32")
    assert exact["own"] == pytest.approx([0.5, 0.5], abs=0.02)


def test_stochastic_rounding_is_seeded_and_does_not_depend_on_shards(
    small_change, tmp_path
):
    base, models = small_change
    flags = ["--round", "stochastic"]
    first, _ = merge(base, models, tmp_path / "a", *flags)
    again, _ = merge(base, models, tmp_path / "b", *flags)
    other, _ = merge(base, models, tmp_path / "c", *flags, "--seed", "1")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["a"], other["a"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2000, generator=generator) * 10.0 ** torch.arange(
        -4, 1
    ).repeat(400)
    rounds = [Grid(dtype, seed)(values).float() for seed in range(300)]
    nearest = values.to(dtype)
    codes = nearest.view(torch.int16)
    beside = [(codes + i).view(dtype).float() for i in (-1, 0, 1)]
    step = (beside[2] - beside[1]).abs()
    for rounded in rounds:
        assert torch.stack([rounded == x for x in beside]).any(0).all()
        assert ((rounded - values).abs() < step * 1.0001).all()
    error = (torch.stack(rounds).mean(0) - values) / step
    assert error.abs().max() < 5 * 0.5 / 300**0.5 and abs(error.mean()) < 0.01
    on_grid = nearest.float()
    assert torch.equal(Grid(dtype, 1)(on_grid), nearest)
    assert Grid(torch.float16, 1)(torch.tensor([1e6, -1e6])).tolist() == [
        torch.inf,
        -torch.inf,
    ]


def test_what_overflows_and_what_was_never_finite_is_refused_by_name(tmp_path):
    state = {"changed": torch.ones(4, 5), "kept": torch.ones(3)}
    tuned = model(tmp_path / "tuned", {**state, "changed": torch.full((4, 5), 2.0)})
    huge = model(tmp_path / "huge", {**state, "kept": torch.full((3,), 1e5)})
    fits = model(
        tmp_path / "fits",
        {**state, "kept": torch.full((3,), 1e5), "changed": -state["changed"]},
    )
    cases = [
        (
            tmp_path / "base",
            state,
            tuned,
            ["--scale", "1e6"],
            "changed: the merge overflows",
        ),
        (None, huge, fits, ["--force"], "kept: the base overflows torch.float16"),
    ]
    for folder, base, specialist, flags, message in cases:
        base = model(folder, base) if folder else base
        with pytest.raises(ValueError, match=message):
            merge(base, [specialist], tmp_path / "out", "--dtype", "float16", *flags)
    broken = model(
        tmp_path / "broken", {**state, "kept": torch.tensor([1.0, torch.nan, 1])}
    )
    with pytest.raises(ValueError, match="the base holds NaN or infinite values"):
        merge(broken, [tuned], tmp_path / "out")
    assert not (tmp_path / "out").exists()
