"""A disk that fills in the middle of a merge or a visit: one sentence, nothing half-written."""

import shutil
import subprocess

import pandas as pd
import pytest
import tiny

from helpers import merge
from helpers.study import plan, visit
from helpers.study.bench import Bench, load_base


@pytest.fixture
def small(tmp_path):
    """A function that mounts a folder of so many kB, or resizes it."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(kilobytes, again=False):
        options = ("remount," if again else "") + f"size={kilobytes}k"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if (
            shutil.which("mount") is None
            or subprocess.run(command, capture_output=True).returncode
        ):
            pytest.skip("no small file system can be mounted here")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def test_in_a_merge(tiny_base, tiny_adapters, small):
    folder = small(48)  # the weights alone are 52 kB
    models = ["--base", str(tiny_base), "--models", *map(str, tiny_adapters[:2])]
    with pytest.raises(
        OSError, match="small is full: free space there or name another --out"
    ):
        merge.main(["--rule", "linear", *models, "--out", str(folder / "merged")])
    assert list(folder.iterdir()) == []


def test_in_a_visit_which_goes_on_when_there_is_space(
    tiny_base, tiny_adapters, small, tmp_path, monkeypatch
):
    toys = {name: tiny.toy(name, 6, ("0", "1")) for name in "abc"}
    folders = dict(zip("abc", tiny_adapters, strict=True))
    bench = Bench(*load_base(str(tiny_base)), toys, folders)
    asked = plan.doses("abc", probed="abc") + plan.merges(
        ["ab", "bc"], ["linear", "ties"]
    )
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path / "large"))
    expected = [visited.examples for visited in visit.run(bench, asked)]

    folder = small(160)
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(folder))
    with pytest.raises(OSError, match="small is full: free space there"):
        visit.run(bench, asked)
    finished = [x for x in folder.glob("*/*") if not x.name.startswith(".")]
    assert finished and not list(folder.glob("*/.*"))
    before = {x: x.stat().st_mtime_ns for x in finished}
    small(4096, again=True)
    for visited, examples in zip(visit.run(bench, asked), expected, strict=True):
        pd.testing.assert_frame_equal(visited.examples, examples, atol=1e-6)
    assert before == {x: x.stat().st_mtime_ns for x in finished}
