"""What the README says exists, exists, and the equations are where its map puts them."""

import ast
import re

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
HANDBOOK = (ROOT / "docs/handbook.md").read_text()
MAP = re.split(r"\n###? ", HANDBOOK.split("## Map")[1])[0]
LINES = [line for line in MAP.splitlines() if line.startswith("|") and "`" in line]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES]


def names(path: str) -> dict[str, ast.stmt]:
    """The functions, classes and constants of a file."""
    found = {}
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {t.id: node for t in node.targets if isinstance(t, ast.Name)}
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_map(row):
    _, equation, places, test = row
    for path, name in re.findall(r"`([\w/]+\.py)`: `(\w+)`", places):
        node = names(path)[name]
        number = re.search(r"\((\d+)\)", equation)
        if number:  # the function's own text names the equation, directly or in a range
            text = ast.get_source_segment((ROOT / path).read_text(), node)
            spans = re.findall(r"\((\d+)\)(?: to \((\d+)\))?", text)
            inside = [int(a) <= int(number[1]) <= int(b or a) for a, b in spans]
            assert any(inside)
    path, _, name = test.strip("`").partition("::")
    assert name in names(path), f"{path} has no {name}"


def test_the_map_is_complete():
    """Equations (1) to (19), each once."""
    numbers = [int(n) for row in ROWS for n in re.findall(r"\((\d+)\)", row[1])]
    assert numbers == list(range(1, 20))


def test_links_and_deviations():
    """Files that are linked exist; deviations that the code names are in the README's list."""
    for folder, text in ((ROOT, README), (ROOT / "docs", HANDBOOK)):
        for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
            assert (folder / link).exists(), link
    listed = set(re.findall(r"^\| (D\d+) \|", HANDBOOK, re.MULTILINE))
    named = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]:
        named |= set(re.findall(r"\bD\d+\b", path.read_text()))
    assert listed == {f"D{n}" for n in range(1, len(listed) + 1)}
    assert named <= listed and {f"D{n}" for n in range(1, 9)} <= named


def test_the_table_of_faults():
    """Each test that it names is there."""
    table = HANDBOOK.split("### What a run survives")[1].split("\n## ")[0]
    tests = re.findall(r"\| `(test_\w+)` \|", table)
    assert len(tests) > 10 and set(tests) <= names("tests/test_run.py").keys()


def test_pieces():
    """The pieces of the table are there, and say what to take along."""
    table = HANDBOOK.split("## Taking pieces")[1].split("\n## ")[0]
    pieces = re.findall(r"`(\w+)\.(\w+)`", table)
    for file, name in pieces:
        if name != "py":
            assert name in names(f"{file}.py"), (file, name)
    assert len(pieces) >= 12


def test_the_readme_is_short():
    """At most 1,500 words, the first command within the first 200."""
    assert len(README.split()) <= 1500
    assert len(README.split("```")[0].split()) <= 200
