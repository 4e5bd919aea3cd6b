"""Killed before any of its changes to the disk, a run leaves nothing that could pass for a result.

Every moment, not a few: an audit hook counts the runner's changes below its folder and kills the
process before the n-th, for n = 1, 2, … until a run comes to its end. Notebooks run in the runner
itself: a moment costs a tenth of a second (tests/benchmarks/bench_kills.py kills real runs).
"""

import os
import subprocess
import sys

import toy

from helpers import store

DRIVER = """
import os, shutil, signal, sys
from pathlib import Path
import toy
from helpers.run import chain, execute, keys, profiles

folder = Path(sys.argv[1])
for module in (chain, execute, keys, profiles):
    module.ROOT = folder
chain.execute = toy.in_process
os.chdir(folder)
results, before = folder / "data/runs/demo", folder / "before"
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir")

def kill_before(change):
    left = [change]
    def hook(event, arguments):
        if event not in CHANGES or not str(arguments[0]).startswith(str(folder)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def forked(rate, change=0):
    child = os.fork()
    if not child:
        if change:
            kill_before(change)
        chain.run("demo", parameters={"RATE": rate})
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def check():
    rows = chain.finished(results)
    numbers = (results / "numbers.csv").read_text().split() if "01_make" in rows else []
    if numbers:
        rate = rows["01_make"]["parameters"]["RATE"]
        assert [float(x) for x in numbers] == [i * rate for i in range(3)]
    if "02_read" in rows:  # and so what it was made from
        assert float((results / "sum.csv").read_text().split()[1]) == sum(map(float, numbers))
    assert len(rows) == 2 or not (results / "index.html").exists(), "a page of half a run"
    return rows

assert forked(1.0) == 0
results.rename(before)
codes = []
while not codes or codes[-1] == -signal.SIGKILL:
    shutil.copytree(before, results)
    codes.append(forked(0.5, len(codes) + 1))
    check()
    assert forked(0.5) == 0
    assert len(check()) == 2
    assert (results / "sum.csv").read_text() == "sum\\n1.5\\n"
    shutil.rmtree(results)
assert codes[-1] == 0, codes
print("killed at", len(codes) - 1)
"""


def test_a_run_killed_before_any_of_its_changes_goes_on_to_the_same_tables(project):
    tests = str(toy.__file__).removesuffix("/toy.py")
    command = [sys.executable, "-c", DRIVER, str(project)]
    env = os.environ | {"PYTHONPATH": f"{tests}:{store.ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 10
