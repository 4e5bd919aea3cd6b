"""The command line: python -m helpers list|run|refresh|students|merge|advise."""

import argparse
import os
import sys
from pathlib import Path

from helpers import supported

PASSED_ON = {
    "merge": "merge checkpoints or adapters",
    "advise": "say which models to merge, by trial merges on prompts without labels",
}


def parser() -> argparse.ArgumentParser:
    """The parser of every command but `merge` and `advise`, which have their own."""
    top = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "list", help="show profiles, notebooks, parameters, minutes and GB"
    )
    _add_run(commands.add_parser("run", help="run the notebooks headless"))
    maintainers = "maintainers: rerun from nothing and write committed results"
    _add_refresh(commands.add_parser("refresh", help=maintainers))
    copies = "write copies of the notebooks with the exercises left to do"
    commands.add_parser("students", help=copies).add_argument("folder", type=Path)
    for name, does in PASSED_ON.items():
        commands.add_parser(name, add_help=False, help=does)
    return top


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("profile", help="a name in data/profiles.toml, such as demo")
    only = "only these, by number or name: --only 04"
    command.add_argument("--only", nargs="+", metavar="NOTEBOOK", help=only)
    command.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="another value for a notebook's parameter: -p SEED 1",
    )
    command.add_argument(
        "--workers", metavar="N", help="processes that share the work here"
    )
    cluster = (
        "share the work over a Dask cluster: a scheduler's address or file, or local:N"
    )
    command.add_argument("--cluster", metavar="ADDRESS", help=cluster)


def _add_refresh(command: argparse.ArgumentParser) -> None:
    command.add_argument("profile", nargs="?", default="demo", metavar="STUDY")
    how = command.add_mutually_exclusive_group()
    how.add_argument(
        "--reuse", action="store_true", help="take up work that is finished"
    )
    how.add_argument(
        "--recompute",
        action="store_true",
        help="only rerun what needs no model on the committed tables, and compare",
    )
    how.add_argument(
        "--readme", action="store_true", help="only bring the README's numbers in"
    )
    publish = (
        "run nothing, commit what data/runs holds; with --recompute what comes out"
    )
    command.add_argument("--publish", action="store_true", help=publish)


def main(argv: list[str] | None = None) -> int:
    """Parse and call. Exit code 2 for a bad request, 1 if a notebook fails."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if rest and arguments.command not in PASSED_ON:
        top.error(f"unknown argument: {rest[0]}")
    # a class has no torch
    needed = "torch" if arguments.command in PASSED_ON else "papermill"
    sentence = supported.problem() or supported.no_packages(needed)
    if sentence:
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    # progress shows at once in a pipe; a letter that the terminal lacks stops no merge
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    from helpers.run import NotebookFailed

    try:
        code = COMMANDS[arguments.command](arguments, rest)
    except NotebookFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted; the same command takes up what is not finished",
            file=sys.stderr,
        )
        return 130
    return code or 0


# What each command needs is imported when it is called: --help needs none of it.


def _list(arguments: argparse.Namespace, rest: list[str]) -> None:
    from helpers.run.overview import overview

    print(overview())


def _run(arguments: argparse.Namespace, rest: list[str]) -> None:
    from helpers import run

    given = list(arguments.parameters)
    if arguments.workers:
        given.append(("WORKERS", arguments.workers))
    if arguments.cluster:
        given.append(("CLUSTER", arguments.cluster))
    run.run(arguments.profile, arguments.only, run.typed(given))


def _refresh(arguments: argparse.Namespace, rest: list[str]) -> None:
    from helpers.run import publish, readme

    if arguments.readme:
        readme.write_readme()
    elif arguments.recompute:
        publish.recompute(arguments.profile, write=arguments.publish)
    elif arguments.publish:
        publish.publish(arguments.profile)
    else:
        publish.refresh(arguments.profile, arguments.reuse)


def _students(arguments: argparse.Namespace, rest: list[str]) -> None:
    from helpers.run.students import write_copies

    print(*write_copies(arguments.folder), sep="\n")


def _merge(arguments: argparse.Namespace, rest: list[str]) -> None:
    from helpers import merge

    merge.main(rest, _fetched)


def _fetched(model: str) -> Path:
    """The folder of a model that has to be fetched by its name."""
    # imports transformers: seconds that a folder needs not
    from helpers.study import models

    return models.model_folder(model)


def _advise(arguments: argparse.Namespace, rest: list[str]) -> int:
    from helpers import advise

    return advise.main(rest)


COMMANDS = {
    "list": _list,
    "run": _run,
    "refresh": _refresh,
    "students": _students,
    "merge": _merge,
    "advise": _advise,
}


if __name__ == "__main__":
    sys.exit(main())
