"""The house rules on files: a first line that says the job, a bound on length, and what may not occur."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("src/postil", "tests", "bench", "examples", "docs")
LONGEST = 500  # lines; C++ is exempt
REFUSED_NAMES = {"util", "utils", "helper", "helpers", "common", "misc"}
UNFINISHED = re.compile(r"\b(TO[D]O|FIX[M]E|X[X]X)\b")
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(home|root|tmp|work|Users)(/|$|(?=[\s'\"]))")


def sources() -> list[Path]:
    """Every Python and C++ file of the repository's own folders."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return sorted(path for path in found if path.suffix in {".py", ".cpp", ".h"})


def faults(path: Path, *, product: bool) -> list[str]:
    """What breaks the rules in one file; `product` files (src/postil) obey some that tests need not."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    found = []
    if not says_its_job(path, lines):
        found.append("the first line is no docstring or comment that says the file's job")
    if path.suffix == ".py" and len(lines) > LONGEST:
        found.append(f"{len(lines)} lines, more than {LONGEST}: which noun wants its own file?")
    if path.stem in REFUSED_NAMES or (product and path.name == "base.py"):
        found.append("the name says nothing about the file's job")
    found += [
        f"line {number}: unfinished work ({match[0]})"
        for number, line in enumerate(lines, 1)
        if (match := UNFINISHED.search(line))
    ]
    if product and path.suffix == ".py":
        found += product_faults(ast.parse(text))
    elif product:
        found += [f"line {n}: a machine's path" for n, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]
    return found


def says_its_job(path: Path, lines: list[str]) -> bool:
    """Whether the first line opens a docstring (Python) or a comment (C++) of at least three words."""
    opening = '"""' if path.suffix == ".py" else ("//", "/*")
    first = lines[0] if lines else ""
    return first.startswith(opening) and len(re.findall(r"\w+", first)) >= 3


def product_faults(tree: ast.AST) -> list[str]:
    """Swallowed errors, abstract base classes and a machine's paths in a module of src/postil."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and swallows(node):
            found.append(f"line {node.lineno}: catches every error; name the ones that are expected")
        if isinstance(node, ast.ImportFrom) and node.module == "abc":
            found.append(f"line {node.lineno}: an abstract class; functions over class hierarchies")
        if isinstance(node, ast.Import) and any(alias.name == "abc" for alias in node.names):
            found.append(f"line {node.lineno}: an abstract class; functions over class hierarchies")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and MACHINE_PATH.search(node.value):
            found.append(f"line {node.lineno}: a machine's path in a string")
    return found


def swallows(handler: ast.ExceptHandler) -> bool:
    """True for a bare except, and for one of Exception or BaseException whose last statement does not raise.

    Where a user's or another library's code runs, anything may come, and `except Exception` tells it as an error of
    ours; a BaseException may only be raised again as it is.
    """
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = {kind.id for kind in kinds if isinstance(kind, ast.Name)}
    last = handler.body[-1]
    raises = isinstance(last, ast.Raise)
    raised_again = isinstance(last, ast.Raise) and last.exc is None
    return None in kinds or ("Exception" in names and not raises) or ("BaseException" in names and not raised_again)


def test_every_file_keeps_the_house_rules() -> None:
    files = sources()
    assert ROOT / "src/postil/errors.py" in files
    product = ROOT / "src/postil"
    found = {
        str(path.relative_to(ROOT)): wrong
        for path in files
        if (wrong := faults(path, product=path.is_relative_to(product)))
    }
    assert not found, "\n".join(f"{path}: {line}" for path, wrong in found.items() for line in wrong)


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("empty.py", "", "first line"),
        ("plain.py", "import os\n", "first line"),
        ("short.py", '"""Things."""\n', "first line"),
        ("kernel.cpp", "#include <cmath>\n", "first line"),
        ("kernel.cpp", '// Adds two vectors.\nopen("/root/x");\n', "machine's path"),
        ("long.py", '"""A long file of nothing."""\n' + "x = 1\n" * LONGEST, "501 lines"),
        ("utils.py", '"""Things of all kinds."""\n', "name"),
        ("base.py", '"""An abstract thing here."""\n', "name"),
        ("a.py", '"""Does one good thing."""\n# TO' + "DO later\n", "unfinished"),
        ("a.py", '"""Does one good thing."""\ntry:\n    f()\nexcept:\n    pass\n', "every error"),
        ("a.py", '"""Does one good thing."""\ntry:\n    f()\nexcept Exception:\n    pass\n', "every error"),
        (
            "a.py",
            '"""Does one good thing."""\ntry:\n    f()\nexcept (OSError, Exception):\n    raise\n    g()\n',
            "every error",
        ),
        (
            "a.py",
            '"""Does one good thing."""\ntry:\n    f()\nexcept BaseException:\n    g()\n',
            "every error",
        ),
        (
            "a.py",
            '"""Does one good thing."""\ntry:\n    f()\nexcept BaseException as e:\n    raise ValueError from e\n',
            "every error",
        ),
        ("a.py", '"""Does one good thing."""\nfrom abc import ABC\n', "abstract"),
        ("a.py", '"""Does one good thing."""\nimport abc\n', "abstract"),
        ("a.py", '"""Does one good thing."""\nx = "/tmp"\n', "machine's path"),
        ("a.py", '"""Does one good thing."""\nx = f"{y} in /home/me/x"\n', "machine's path"),
    ],
)
def test_each_rule_notices_its_fault(tmp_path: Path, name: str, text: str, fault: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    found = faults(path, product=True)
    assert len(found) == 1, found
    assert fault in found[0]


@pytest.mark.parametrize(
    "text",
    [
        "try:\n    f()\nexcept BaseException:\n    g()\n    raise\n",
        "try:\n    f()\nexcept (OSError, ValueError):\n    g()\n",
        "try:\n    f()\nexcept Exception as e:\n    g()\n    raise ValueError(str(e)) from None\n",
        "try:\n    f()\nexcept (Exception, SystemExit) as e:\n    raise ValueError(str(e)) from e\n",
        "x = 'as in a/tmp/b, ~/books/x and https://example.org/home/x'\n",
    ],
)
def test_what_is_allowed_is_let_through(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.py"
    path.write_text('"""Does one good thing."""\n' + text)
    assert faults(path, product=True) == []
