"""How long and how dense is the code? Lines, and tokens a line of code, of each file (make size).

Comments and docstrings are left out, an f-string counts as one token. By this count seaborn and
statsmodels have 8 tokens a line, papermill 5.6, PEFT's merge_utils 9.3.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

import nbformat

NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
FSTRING_START = getattr(tokenize, "FSTRING_START", -1)  # Python 3.12 and later
FSTRING_END = getattr(tokenize, "FSTRING_END", -1)
DOCUMENTED = ast.Module | ast.FunctionDef | ast.ClassDef


def docstring_lines(source: str) -> set[int]:
    """Numbers of the lines that hold docstrings."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False):
            first = node.body[0]
            lines.update(range(first.lineno, first.end_lineno + 1))
    return lines


def density(source: str) -> tuple[int, int]:
    """Number of tokens, and of lines that hold code."""
    skipped = docstring_lines(source)
    lines: set[int] = set()
    tokens = depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in NO_CODE or token.start[0] in skipped:
            continue
        depth += (token.type == FSTRING_START) - (token.type == FSTRING_END)
        inside = depth - (token.type == FSTRING_START)
        tokens += inside == 0 and token.type != FSTRING_END
        lines.update(range(token.start[0], token.end[0] + 1))
    return tokens, len(lines)


def sources(path: Path) -> list[str]:
    """The Python of a file, or of each code cell of a notebook but for lines for IPython."""
    if path.suffix == ".py":
        return [path.read_text(encoding="utf-8")]
    cells = nbformat.read(path, as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    kept = [
        [x for x in text.splitlines() if not x.startswith(("%", "!"))] for text in code
    ]
    return ["\n".join(lines) for lines in kept]


def size(path: Path) -> tuple[int, float]:
    """Lines of a file, and tokens a line of code."""
    texts = sources(path)
    counts = [density(text) for text in texts]
    lines = sum(len(text.splitlines()) for text in texts)
    tokens, code = (sum(column) for column in zip(*counts, strict=True))
    return lines, tokens / max(code, 1)


def longest_function(path: Path) -> int:
    """Lines of the longest function of a Python file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return max((node.end_lineno - node.lineno + 1 for node in functions), default=0)


def main(paths: list[str]) -> None:
    """Print a line for every Python file and notebook below these paths."""
    total = 0
    for path in map(Path, paths):
        found = [*path.rglob("*.py"), *path.rglob("*.ipynb")]
        for file in sorted(found) if path.is_dir() else [path]:
            lines, tokens = size(file)
            total += lines
            print(f"{lines:6d} lines {tokens:5.1f} tokens a line  {file}")
    print(f"{total:6d} lines")


if __name__ == "__main__":
    main(sys.argv[1:] or ["helpers", "notebooks"])
