"""How the code is laid out: who imports whom, how much there is of it, and that --help explains
every flag."""

import ast
import dataclasses
import inspect
import re
import typing
from graphlib import TopologicalSorter

import pytest

from align import AlignConfig
from discriminator import DiscriminatorConfig
from eval import EvalConfig
from rlvr import RLVRConfig
from sft import SFTConfig
from support.flags import _parser, comments_of
from tests.conftest import ROOT

FILES = {path.stem: path for path in ROOT.glob("*.py")}
ROOMS = {f"support.{path.stem}": path for path in ROOT.glob("support/*.py")}
STAGES = {"sft", "align", "rlvr", "eval"}


def imported(source: str) -> set[str]:
    """The modules of this project that a source imports, wherever in it that stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & (FILES.keys() | ROOMS.keys())


IMPORTS = {name: imported(path.read_text()) for name, path in (FILES | ROOMS).items()}


def reached(name: str) -> set[str]:
    """All that is imported with a module, by it or by what it imports."""
    found, new = set(), {name}
    while new:
        new = set().union(*(IMPORTS[one] for one in new)) - found
        found |= new
    return found


def test_every_way_to_import_is_seen():
    source = """
import data, torch
from model import load_policy
from support import digits, fit as bytes_of
def later():
    import support.rows as rows
    if rows:
        from support.run import Run
"""
    rooms = {f"support.{name}" for name in ("digits", "fit", "rows", "run")}
    assert imported(source) == {"data", "model"} | rooms
    assert IMPORTS["align"] >= {"data", "discriminator", "model", "support.run"}
    assert "support.resuming" in reached("align") - IMPORTS["align"]
    assert "align" not in reached("align")


def test_no_imports_form_a_circle():
    """CycleError names one."""
    assert {*TopologicalSorter(IMPORTS).static_order()} == IMPORTS.keys()


def test_support_imports_no_file_of_the_root():
    assert {room: IMPORTS[room] & FILES.keys() for room in ROOMS} == {room: set() for room in ROOMS}


def test_no_stage_imports_another():
    """Neither itself nor through what it imports."""
    assert STAGES <= FILES.keys()
    assert {stage: reached(stage) & STAGES for stage in STAGES} == {s: set() for s in STAGES}


def test_the_root_has_few_files():
    assert len(FILES) <= 10, sorted(FILES)


@pytest.mark.parametrize("name", sorted(FILES | ROOMS))
def test_no_file_is_long(name):
    length = len((FILES | ROOMS)[name].read_text().splitlines())
    assert length <= 750


def test_no_test_file_is_long():
    """By their names, verifier_table.py, a table, and chaos.py are none."""
    tests = {path.name: path.read_text().count("\n") for path in ROOT.glob("tests/test_*.py")}
    assert len(tests) > 20
    assert {name: length for name, length in tests.items() if length > 700} == {}


# --------------------------------------------------------------------------------------------------
# What --help prints

CONFIGS = [SFTConfig, DiscriminatorConfig, AlignConfig, RLVRConfig, EvalConfig]
each_stage = pytest.mark.parametrize("config_class", CONFIGS)


def default_of(field: dataclasses.Field):
    return (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )


@each_stage
def test_a_comment_stands_beside_every_field(config_class):
    """Found as a reader finds it: behind the first line of the field."""
    beside = {}
    for kind in reversed(config_class.__mro__[:-1]):
        beside |= re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(kind), re.MULTILINE)
    fields = {field.name for field in dataclasses.fields(config_class)}
    comments = comments_of(config_class)
    assert {name: comments[name] for name in fields} == beside
    if config_class is not EvalConfig:
        assert {"learning_rate", "lr_scheduler_type", "max_grad_norm"} <= {
            name for name, comment in beside.items() if re.search(r"\bpaper: \S", comment)
        }
    if "ckpt" in beside and config_class is not EvalConfig:
        assert "paper: 4B, 8B" in beside["ckpt"]


@each_stage
def test_help_prints_the_comment_and_the_default_of_every_flag(nursery, tmp_path, config_class):
    script = f"{config_class.stage}.py"
    done = nursery.run(script, "--help", log=tmp_path / "log", COLUMNS=2000)  # nothing is wrapped
    assert done.codes == [0] and done.said == ""
    flag = r"^  --(\w+)\b.*?(?:\n {24}| {2,})(\S.*)$"
    printed = dict(re.findall(flag, done.printed, re.MULTILINE))
    comments = comments_of(config_class)
    hints = typing.get_type_hints(config_class)
    assert printed.keys() == {field.name for field in dataclasses.fields(config_class)}
    for field in dataclasses.fields(config_class):
        choices = typing.get_args(hints[field.name])
        if typing.get_origin(hints[field.name]) is typing.Literal:
            assert f"--{field.name} {{{','.join(choices)}}}" in done.printed
        comment, _, default = printed[field.name].removesuffix(")").partition(" (default: ")
        assert comment and comment == comments[field.name]
        value = default_of(field)
        if value is None or value == []:
            assert default == "none"
        elif isinstance(value, bool):
            assert default == str(value).lower()
        elif isinstance(value, int | float):
            assert float(default) == value
        else:
            assert default == (value if isinstance(value, str) else " ".join(value))


@each_stage
def test_flags_stand_in_two_groups(config_class):
    """The method, and what every run has."""
    groups = {group.title: group._group_actions for group in _parser(config_class)._action_groups}
    names = {title: {action.dest for action in group} for title, group in groups.items()}
    assert names["options"] == {"help"}
    assert {"output_dir", "max_pixels", "dry_run"} <= names["the run"]
    assert {"ckpt", "model"} & names["the method"] and "data" in names["the method"]
    fields = {field.name for field in dataclasses.fields(config_class)}
    assert names["the method"] | names["the run"] == fields
    assert not names["the method"] & names["the run"]
