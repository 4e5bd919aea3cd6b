"""The command line of a merge: lists add up, paths expand, numbers are read, errors come early."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from helpers import merge as merging


def merge(*flags):
    merging.main(["--rule", "task_arithmetic", *map(str, flags)])


def test_lists_that_are_given_twice_add_up(tiny_base, tiny_adapters, tmp_path):
    a, b = tiny_adapters[:2]
    fixed = ["--base", tiny_base]
    merge(
        *fixed, "--models", a, b, "--weights", ".5", "-1e-3", "--out", tmp_path / "one"
    )
    twice = ["--models", a, "--weights", ".5", "--models", b, "--weights", "-1E-3"]
    merge(*twice, *fixed, "--out", tmp_path / "two")
    reports = [
        json.loads((tmp_path / x / "merge_report.json").read_text())
        for x in ("one", "two")
    ]
    assert reports[0] == reports[1] and reports[0]["weights"] == [0.5, -1e-3]
    one, two = (load_file(tmp_path / x / "model.safetensors") for x in ("one", "two"))
    assert all((one[name] == two[name]).all() for name in one)


def test_the_home_folder_is_expanded_everywhere(
    tiny_base, tiny_adapters, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").symlink_to(tiny_base)
    (tmp_path / "a").symlink_to(tiny_adapters[0])
    merge("--base=~/base", "--models", "~/a", "--out=~/out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    config = tmp_path / "c.yaml"
    config.write_text(
        "models: [{model: ~/a, parameters: {weight: 1}}]\n"
        "merge_method: task_arithmetic\nbase_model: ~/base\n"
    )
    merging.main(["--mergekit=~/c.yaml", "--out=~/yaml"])
    assert (tmp_path / "yaml" / "model.safetensors").is_file()


def test_the_report_is_printed_as_json_on_request(
    tiny_base, tiny_adapters, tmp_path, capsys
):
    merge(
        "--base",
        tiny_base,
        "--models",
        tiny_adapters[0],
        "--out",
        tmp_path / "out",
        "--json",
    )
    report = json.loads(capsys.readouterr().out)  # nothing else
    assert report == json.loads((tmp_path / "out" / "merge_report.json").read_text())


def test_places_that_cannot_be_are_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match="file is a file: .* cannot be written below it"
    ):
        merge("--base", "none", "--models", "none", "--out", tmp_path / "file" / "x")
    with pytest.raises(SystemExit):
        merge("--base", "none", "--models", "none", "--out", "~no-such-user/x")
    assert "there is no such user" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["5GiB", "0KB", "-1GB", "5000000"])
def test_sizes_that_are_none_are_refused(tmp_path, size):
    with pytest.raises(SystemExit):
        merge(
            "--base",
            "b",
            "--models",
            "a",
            "--out",
            tmp_path / "out",
            "--shard-size",
            size,
        )


def test_a_terminal_without_the_letters_of_a_name_stops_no_merge(
    tiny_base, tiny_adapters, tmp_path
):
    named = tmp_path / "модель"
    named.symlink_to(tiny_adapters[0])
    command = [
        sys.executable,
        "-m",
        "helpers",
        "merge",
        "--base",
        tiny_base,
        "--models",
        named,
    ]
    command += ["--rule", "linear", "--out", tmp_path / "出力"]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "\\u51fa" in done.stdout and (tmp_path / "出力" / "model.safetensors").is_file()
    )
