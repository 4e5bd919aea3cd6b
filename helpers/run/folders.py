"""Where are the tables of a profile? Asked by a notebook that the runner did not start."""

from pathlib import Path

from helpers.store import ROOT, read_jsonl


def study_folder(profile: str, given: str = "", kind: str = "results") -> Path:
    """The folder `given` (from the root), or the profile's own in data/results or data/runs.

    Raises ValueError for a folder that holds another profile's tables.
    """
    folder = ROOT / (given or f"data/{kind}/{profile}")
    held = _profile(folder)
    if held not in (None, profile):
        raise ValueError(
            f"RESULTS {given} holds the profile {held!r}, not {profile!r}: "
            f"give PROFILE {held!r}, or RESULTS '' for the folder of {profile!r}"
        )
    return folder


def _profile(folder: Path) -> str | None:
    """Whose tables a folder holds; None for an empty or unknown one."""
    if folder.parent == ROOT / "data" / "results":
        return folder.name
    rows = read_jsonl(folder / "manifest.jsonl")
    return rows[-1]["parameters"].get("PROFILE") if rows else None
