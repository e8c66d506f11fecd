"""What README.md and docs/ say exists, exists, and the equations are where the map puts them."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "CONTRIBUTING.md"]
MAP = (ROOT / "docs/paper-map.md").read_text().split("## Map")[1].split("\n## ")[0]
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


def test_the_readme_has_the_maps_functions():
    """The function of each equation, but for the game (2), which is a loop."""
    table = README.split("| file | what it computes")[1].split("\n\n")[0]
    told = {}
    for line in table.splitlines():
        file = re.match(r"\| `(\w+\.py)`", line)
        for name, number in re.findall(r"`(\w+)` \((\d+)\)", line):
            told[f"({number})"] = f"`{file[1]}`: `{name}`"
    mapped = {row[1]: row[2] for row in ROWS if row[1]}
    assert told == {number: place for number, place in mapped.items() if number != "(2)"}


def test_the_map_is_complete():
    """Equations (1) to (19), each once."""
    numbers = [int(n) for row in ROWS for n in re.findall(r"\((\d+)\)", row[1])]
    assert numbers == list(range(1, 20))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    """What a page links to is there, a heading too."""
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_deviations():
    """Each deviation of the list is named in the code, and the code names no other."""
    text = (ROOT / "docs/deviations.md").read_text()
    listed = set(re.findall(r"^\| (D\d+) \|", text, re.MULTILINE))
    named = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), ROOT / "docs/lmms.py"]:
        named |= set(re.findall(r"\bD\d+\b", path.read_text()))
    assert listed == {f"D{n}" for n in range(1, len(listed) + 1)}
    assert named == listed


def test_the_table_of_faults():
    """Each test that it names is there."""
    table = (ROOT / "docs/reliability.md").read_text()
    tests = re.findall(r"\| `(test_\w+)` \|", table)
    there = {name for path in (ROOT / "tests").glob("test_*.py") for name in names(str(path))}
    assert len(tests) > 10 and set(tests) <= there


def test_what_is_published():
    """The table names every published checkpoint and data set that a stage has as a default."""
    table = (ROOT / "docs/paper-map.md").read_text().split("## Published checkpoints and data")[1]
    listed = re.findall(r"^\| `([\w./-]+)`(?:, file `([\w.]+)`)?", table, re.MULTILINE)
    listed = {"/".join(filter(None, name)) for name in listed}
    code = "".join(path.read_text() for path in ROOT.glob("*.py"))
    named = re.findall(r'= "(Qwen/[^"]+)"|"(?:hf://datasets/)?(prism-vlm/[^"]+)"', code)
    named = {qwen or prism for qwen, prism in named}
    assert len(named) >= 10 and named <= listed, named - listed


def test_pieces():
    """The pieces of the table are there, and say what to take along."""
    table = (ROOT / "docs/pieces.md").read_text().split("## Pieces")[1]
    pieces = re.findall(r"`([\w/]+)\.(\w+)`", table)
    for file, name in pieces:
        if name == "py":
            assert (ROOT / f"{file}.py").exists()
        else:
            assert name in names(f"{file}.py"), (file, name)
    assert len(pieces) >= 12


def test_the_readme_is_short():
    """At most 1,500 words, the first command within the first 200."""
    assert len(README.split()) <= 1500
    assert len(README.split("```")[0].split()) <= 200


def test_the_readme_lists_every_page():
    more = README.split("\n## More")[1]
    pages = {str(page.relative_to(ROOT)) for page in PAGES} - {"README.md"}
    assert pages <= set(re.findall(r"\]\(([\w./-]+)", more))


def test_the_benchmarks_are_listed():
    listed = re.findall(
        r"^\| `(\w+\.py)", (ROOT / "benchmarks/README.md").read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(path.name for path in (ROOT / "benchmarks").glob("*.py"))
