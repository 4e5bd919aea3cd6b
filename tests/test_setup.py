"""Set-up: refused in one sentence where it cannot work, done once where it can."""

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest

from helpers import supported
from helpers.store import ROOT


def test_this_machine_is_supported():
    assert supported.problem() is None and supported.no_venv() is None


def test_a_python_without_the_packages_is_told_which_one_has_them():
    assert supported.no_packages() is None
    assert "no_such is not installed" in supported.no_packages("no_such")
    assert ".venv/bin/python -m helpers" in supported.no_packages("no_such")


@pytest.mark.parametrize("version", [(3, 10), (3, 15)])
def test_other_pythons_are_refused(version):
    assert "needs Python 3.11 to 3.14" in supported.problem(version)


def test_the_python_range_is_that_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.15"


@pytest.mark.parametrize(
    ("system", "machine", "mac", "fine"),
    [
        ("darwin", "arm64", "15.1", True),
        ("darwin", "arm64", "13.6", False),
        ("darwin", "x86_64", "14.0", False),
        ("linux", "aarch64", "", True),
        ("linux", "riscv64", "", False),
        ("win32", "AMD64", "", False),
    ],
)
def test_platforms(monkeypatch, system, machine, mac, fine):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "mac_ver", lambda: (mac, ("", "", ""), ""))
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert (supported.problem(system=system) is None) == fine


def test_musl_is_refused(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert "glibc" in supported.problem(system="linux")


@pytest.fixture
def checkout(tmp_path):
    """What set-up reads, in an empty folder."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "helpers").mkdir()
    shutil.copy(ROOT / "helpers" / "supported.py", tmp_path / "helpers")
    return tmp_path


def make(folder, *arguments):
    # without the flags of the make that may be running these tests
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_missing_python_is_one_sentence(checkout):
    done = make(checkout, "study", "PYTHON=no-such-python")
    assert done.returncode != 0
    assert done.stderr.startswith("error: no no-such-python on the PATH")
    assert not (checkout / ".venv").exists()


def test_set_up_happens_once_and_an_interrupted_one_is_taken_up(checkout):
    """A stand-in Python logs its calls and makes an environment whose pip fails once."""
    (checkout / "fails").touch()
    fake = checkout / "fake-python"
    fake.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {checkout}/log\n'
        f'if [ "$2" = venv ]; then mkdir -p {checkout}/.venv/bin; '
        f"cp $0 {checkout}/.venv/bin/python; fi\n"
        f'if [ "$3" = install ] && [ -e {checkout}/fails ]; then rm {checkout}/fails; exit 1; fi\n'
        "exit 0\n"
    )
    fake.chmod(0o755)
    assert make(checkout, "study", f"PYTHON={fake}").returncode != 0
    assert not (checkout / ".venv" / ".ready").exists()
    for _ in range(2):
        assert make(checkout, "study", f"PYTHON={fake}").returncode == 0
    calls = (checkout / "log").read_text().splitlines()
    assert calls.count("-m venv --clear .venv") == 1
    # the failed one, and once
    assert calls.count("-m pip install -r requirements.txt -e .") == 2
    assert calls.count("-m helpers run demo") == 2


@pytest.mark.parametrize(
    ("given", "passed_on"), [("", "PASSIVE"), ("ACTIVE", "ACTIVE")]
)
def test_kernels_of_the_lab_wait_without_spinning(
    checkout, monkeypatch, given, passed_on
):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    jupyter = checkout / ".venv" / "bin" / "jupyter"
    jupyter.parent.mkdir(parents=True)
    jupyter.write_text("#!/bin/sh\necho waits: $OMP_WAIT_POLICY\n")
    jupyter.chmod(0o755)
    (checkout / ".venv" / ".ready").touch()
    assert f"waits: {passed_on}\n" in make(checkout, "lab").stdout


def waiting(code: str, policy: str | None) -> str:
    """What the OpenMP that torch loads says of itself."""
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    env |= {"OMP_DISPLAY_ENV": "TRUE"} | ({"OMP_WAIT_POLICY": policy} if policy else {})
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True
    )
    return re.search(r"OMP_WAIT_POLICY ?= ?'(\w+)'", done.stderr)[1]


@pytest.mark.parametrize("policy", [None, "ACTIVE"])
def test_torch_is_told_to_wait_without_spinning_by_whatever_loads_it(policy):
    """The merge and advise commands, and workers, load `helpers` first."""
    assert waiting("import helpers.merge.engine", policy) == (policy or "PASSIVE")


def pins() -> dict[str, str]:
    lines = [
        line.split("#")[0]
        for line in (ROOT / "requirements.txt").read_text().splitlines()
    ]
    return dict(line.strip().split("==") for line in lines if line.strip())


def test_requirements_are_pinned_and_are_what_is_installed():
    assert len(pins()) > 20
    # a local build, such as 2.13.0+cpu, satisfies the pin
    assert pins() == {name: metadata.version(name).split("+")[0] for name in pins()}


def optional() -> list[str]:
    """Packages that pyproject.toml names as extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [name for names in extras for name in names]


def test_what_extras_need_is_pinned():
    assert set(optional()) < set(pins())


def test_what_the_code_imports_is_pinned():
    """A package that only comes along with another may leave with it."""
    packages = metadata.packages_distributions()
    found = set()
    for path in (*(ROOT / "helpers").rglob("*.py"), *(ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    theirs = {name for name in found if name in packages and name != "helpers"}
    assert "torch" in theirs
    missing = {
        name
        for name in theirs
        if not {package.lower().replace("_", "-") for package in packages[name]}
        & set(pins())
    }
    assert not missing
