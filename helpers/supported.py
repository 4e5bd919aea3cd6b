"""Can this machine run the study? Asked before anything is installed, so by any Python 3.

`make` runs this file with the Python that the user has; `python -m helpers` asks it first.
"""

import platform
import sys
from importlib.util import find_spec


def problem(version=sys.version_info[:2], system=sys.platform):
    """One sentence on why this machine cannot run the study, or None."""
    if not (3, 11) <= version <= (3, 14):
        return (
            f"Python {version[0]}.{version[1]} at {sys.executable} cannot run the study: it needs "
            "Python 3.11 to 3.14; install one and name it: make PYTHON=python3.13"
        )
    machine = platform.machine().lower()
    if system == "darwin":
        supported = (
            machine == "arm64" and int(platform.mac_ver()[0].split(".")[0]) >= 14
        )
    else:
        glibc = platform.libc_ver()[0] == "glibc"
        supported = system == "linux" and glibc and machine in ("x86_64", "aarch64")
    if not supported:
        return (
            f"{system} on {machine} is not supported: PyTorch is published for Linux (x86_64 or "
            "aarch64, glibc) and macOS 14 or newer on Apple silicon; on Windows use WSL"
        )
    return None


def no_venv():
    """One sentence on why no virtual environment can be made, or None."""
    try:
        import ensurepip  # noqa: F401  Debian and Ubuntu ship Python without it
        import venv  # noqa: F401
    except ImportError:
        return (
            f"Python at {sys.executable} cannot make virtual environments: install its venv "
            "package (on Debian and Ubuntu: apt install python3-venv)"
        )
    return None


def no_packages(needed="torch"):
    """One sentence on why the packages of requirements.txt are not there, or None."""
    if find_spec(needed) is None:
        return (
            f"{needed} is not installed for Python at {sys.executable}: `make study` sets up "
            ".venv, then call .venv/bin/python -m helpers"
        )
    return None


if __name__ == "__main__":
    sentence = problem() or no_venv()
    if sentence:
        sys.exit("error: " + sentence)
