"""The command line: python -m helpers run|refresh|merge|advise|students."""

import argparse
import sys
from pathlib import Path

from helpers import supported


def main(argv: list[str] | None = None) -> int:
    """Parse and call. Exit code 2 for a bad request, 1 if a notebook fails."""
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    run_parser = commands.add_parser("run", help="run the notebooks headless")
    run_parser.add_argument("profile", help="a name in data/profiles.toml, such as demo")
    run_parser.add_argument(
        "--only", nargs="+", metavar="NOTEBOOK", help="only these, by number or name: --only 04"
    )
    run_parser.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="another value for a notebook's parameter: -p SEED 1",
    )

    refresh_parser = commands.add_parser(
        "refresh", help="maintainers: rerun from nothing and write committed results"
    )
    refresh_parser.add_argument("profile", nargs="?", default="demo")
    refresh_parser.add_argument(
        "--reuse", action="store_true", help="take up finished work; minutes are not rewritten"
    )
    refresh_parser.add_argument(
        "--publish", action="store_true", help="run nothing: write what data/runs holds, as it is"
    )
    refresh_parser.add_argument(
        "--recompute",
        action="store_true",
        help="only run what needs no model on the committed tables, elsewhere, and compare; with "
        "--publish write what comes out",
    )
    refresh_parser.add_argument(
        "--compare",
        metavar="FOLDER",
        help="only hold another run's scores (data/runs/NAME) to the committed ones",
    )
    refresh_parser.add_argument(
        "--take",
        metavar="FOLDER",
        help="only take over the scores in data/results/NAME of merges that are the same but for "
        "rounding, after notebook 01, before 02",
    )
    refresh_parser.add_argument(
        "--readme", action="store_true", help="only bring the README's tables up to date"
    )

    students_parser = commands.add_parser(
        "students", help="write copies of the notebooks with the exercises left to do"
    )
    students_parser.add_argument("folder")

    commands.add_parser("merge", add_help=False, help="merge checkpoints or adapters")
    commands.add_parser("advise", add_help=False, help="say before merging which will go together")

    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command not in ("merge", "advise"):
        parser.error(f"unknown argument: {rest[0]}")
    sentence = supported.problem() or supported.no_packages()
    if sentence:
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    sys.stdout.reconfigure(line_buffering=True)  # progress shows at once in a pipe as well
    return _call(arguments, rest)


def _call(arguments: argparse.Namespace, rest: list[str]) -> int:
    # Imported here: the commands differ in what they need, and --help needs none of it.
    from helpers.run.chain import NotebookFailed, run, typed

    try:
        if arguments.command == "run":
            run(arguments.profile, arguments.only, typed(arguments.parameters))
        elif arguments.command == "students":
            from helpers.run.students import write_copies

            print(*write_copies(Path(arguments.folder)), sep="\n")
        elif arguments.command == "refresh":
            from helpers.run import publish

            if arguments.readme:
                publish.write_readme()
            elif arguments.compare:
                print(publish.compare(arguments.profile, Path(arguments.compare)).to_string())
            elif arguments.take:
                print(publish.take(arguments.profile, Path(arguments.take)).to_string())
            elif arguments.recompute:
                publish.recompute(arguments.profile, write=arguments.publish)
            elif arguments.publish:
                publish.publish(arguments.profile)
            else:
                publish.refresh(arguments.profile, arguments.reuse)
        elif arguments.command == "merge":
            from helpers import merge

            merge.main(rest, _fetched)
        else:
            from helpers.advise import report as advise

            advise.main(rest)
    except NotebookFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command takes up what is not finished", file=sys.stderr)
        return 130
    return 0


def _fetched(model: str) -> Path:
    """The folder of a model that has to be fetched by its name."""
    from helpers.study import assets  # imports transformers: seconds that a folder needs not

    return assets.model_folder(model)


if __name__ == "__main__":
    sys.exit(main())
