"""Archives: every file is what was pinned, and whatever is wrong is said in one sentence."""

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from package_index import Index, pin, publish, refusal

from helpers.study import archives

pytestmark = pytest.mark.usefixtures("own_cache")
CONTENT = bytes(range(256)) * 8192  # 2 MiB: two chunks of a download

# ---------------------------------------------------------------- fetching


def test_a_file_is_fetched_once(index):
    publish(index, "thing", "thing-1.0-py3-none-any.whl", CONTENT)
    assert archives.fetch("thing").read_bytes() == CONTENT
    assert archives.fetch("thing").read_bytes() == CONTENT
    assert index.sent == [None]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_half_download_is_resumed_or_redone(index, ranges):
    publish(index, "thing", "thing-1.0-py3-none-any.whl", CONTENT)
    index.ranges, index.cut = ranges, len(CONTENT) * 3 // 4
    assert "thing-1.0-py3-none-any.whl (2.1 MB)" in refusal(archives.fetch, "thing")
    assert not list(archives.cache().rglob("*.whl"))
    index.cut = None
    assert archives.fetch("thing").read_bytes() == CONTENT
    asked = int(index.sent[1].removeprefix("bytes=").rstrip("-"))
    assert 0 < asked < len(CONTENT)


def test_a_corrupt_download_is_refused_and_redone(index):
    publish(index, "thing", "thing-1.0-py3-none-any.whl", CONTENT)
    index.files["thing"] = ("thing-1.0-py3-none-any.whl", CONTENT[::-1])
    assert "sha256 differs" in refusal(archives.fetch, "thing")
    index.files["thing"] = ("thing-1.0-py3-none-any.whl", CONTENT)
    assert archives.fetch("thing").read_bytes() == CONTENT


def test_a_file_damaged_in_the_cache_is_refused_and_redone(index):
    publish(index, "thing", "thing-1.0-py3-none-any.whl", CONTENT)
    archives.fetch("thing").write_bytes(CONTENT[:-1])
    assert "deleted" in refusal(archives.fetch, "thing")
    assert archives.fetch("thing").read_bytes() == CONTENT


def test_without_a_network_the_file_and_the_remedy_are_named(own_cache):
    pin("thing", "thing-1.0-py3-none-any.whl", CONTENT)
    said = refusal(archives.fetch, "thing")
    assert "thing-1.0-py3-none-any.whl (2.1 MB)" in said and "ConnectionError" in said
    assert str(own_cache / "downloads") in said and "MERGING_COLLAPSE_CACHE" in said
    assert "secret" not in said
    (own_cache / "downloads" / "thing-1.0-py3-none-any.whl").write_bytes(CONTENT)
    assert archives.fetch("thing").read_bytes() == CONTENT


@pytest.mark.parametrize("files", [{}, {"thing": ("thing-2.0-py3-none-any.whl", b"")}])
def test_a_package_that_the_index_lacks_is_named(index, files):
    pin("thing", "thing-1.0-py3-none-any.whl", CONTENT)
    index.files = files
    assert "the package index does not have it" in refusal(archives.fetch, "thing")


def test_several_at_once_download_once(index):
    publish(index, "thing", "thing-1.0-py3-none-any.whl", CONTENT)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(archives.fetch, ["thing"] * 4))
    assert len(found) == len(index.sent) == 1


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MERGING_COLLAPSE_CACHE", str(tmp_path / "file"))
    pin("thing", "thing-1.0-py3-none-any.whl", CONTENT)
    assert "cannot write to" in refusal(archives.fetch, "thing")


@pytest.mark.parametrize("path", ["../evil", "/evil", "a/../../evil"])
def test_no_archive_member_escapes(tmp_path, path):
    root = tmp_path / "root"
    assert "outside" in refusal(archives.unpack, io.BytesIO(b"x"), 1, root, path)
    assert not list(tmp_path.rglob("evil*"))


def test_an_archive_member_of_insane_size_is_refused(tmp_path):
    size = archives.MEMBER_LIMIT + 1
    assert "would unpack to" in refusal(
        archives.unpack, io.BytesIO(b""), size, tmp_path, "big"
    )


# ---------------------------------------------------------------- BIG-bench

TASKS = {
    "plural": {"examples": [{"input": "cat", "target": "cats"}]},
    "sums": {"name": "only announces its subtasks"},
    "sums/two_digits": {"examples": [{"input": "10+11", "target": "21"}]},
    "sums/three_digits": {"examples": [{"input": "100+11", "target": "111"}]},
}


def task_archive() -> bytes:
    """The tiny tasks as a source archive, among members that must not be taken for tasks."""
    content = {
        f"benchmark_tasks/{name}/task.json": task for name, task in TASKS.items()
    }
    content |= {
        "benchmark_tasks/../../evil/task.json": {"examples": [1]},
        "task.json": {},
    }
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as archive:
        for path, task in content.items():
            member = tarfile.TarInfo(f"bigbench-1.0.0/bigbench/{path}")
            text = json.dumps(task).encode()
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
        link = tarfile.TarInfo("bigbench-1.0.0/bigbench/benchmark_tasks/link/task.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    return written.getvalue()


@pytest.fixture
def bigbench(index) -> Index:
    publish(index, "bigbench", "bigbench-1.0.0.tar.gz", task_archive())
    return index


def test_bigbench_names_are_the_tasks_with_examples(bigbench):
    assert archives.bigbench_names() == [
        "plural",
        "sums/three_digits",
        "sums/two_digits",
    ]


def test_bigbench_tasks_are_taken_out_on_demand(bigbench, own_cache):
    file = archives.bigbench_files(["sums/two_digits"])[0]
    assert json.loads(file.read_text()) == TASKS["sums/two_digits"]
    assert list(own_cache.rglob("task.json")) == [file]
    files = archives.bigbench_files(["sums/three_digits", "plural", "sums/two_digits"])
    assert [file.parent.name for file in files] == [
        "three_digits",
        "plural",
        "two_digits",
    ]
    assert bigbench.sent == [None]


def test_a_changed_task_file_is_written_anew(bigbench):
    archives.bigbench_files(["plural"])[0].write_text("{}")
    assert (
        json.loads(archives.bigbench_files(["plural"])[0].read_text())
        == TASKS["plural"]
    )


def test_a_damaged_task_index_is_refused_and_redone(bigbench, own_cache):
    names = archives.bigbench_names()
    next(own_cache.rglob("index-*.json")).write_text("{")
    assert "damaged" in refusal(archives.bigbench_names)
    assert archives.bigbench_names() == names


def test_an_unknown_bigbench_task_is_refused_with_its_neighbours(bigbench):
    assert "near to it is sums/two_digits" in refusal(
        archives.bigbench_files, ["sums/two_digit"]
    )
