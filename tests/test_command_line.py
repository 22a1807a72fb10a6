"""One spelling on the command line, and words that lead on from a slip in it."""

import argparse
import shlex
import sys
from importlib import import_module
from importlib.metadata import version

import pytest
from command import status

from rau.__main__ import COMMANDS, main
from rau.cli import case_options, session

KERNEL = '''
from rau.backends.numpy_ import NumPyBackend

class Copies(NumPyBackend):
    name = "copies"

class Typo(NumPyBackend):
    name = "typo"
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the kernels of spelt.py and, in a package, of inner/deep.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delenv("RAU_BACKEND", raising=False)
    (tmp_path / "inner").mkdir()
    for name in ("spelt.py", "inner/__init__.py", "inner/deep.py"):
        (tmp_path / name).write_text(KERNEL)
    yield tmp_path
    for name in ("spelt", "inner", "inner.deep"):
        sys.modules.pop(name, None)


def parsers():
    top = argparse.ArgumentParser()
    subparsers = top.add_subparsers()
    return {name: import_module(f"rau.cli.{name}").add_parser(subparsers) for name in COMMANDS}


def test_every_command_has_examples_which_parse():
    for name, parser in parsers().items():
        examples = parser.epilog.partition("Examples:\n")[2].partition("\n\n")[0].splitlines()
        assert examples, name
        for line in examples:
            python, _, rau, command, *words = shlex.split(line)
            assert (python, rau, command) == ("python", "rau", name)
            parser.parse_args([word for word in words if word != "--json"])  # which is main's


@pytest.mark.parametrize("command", ["demo", "bench", "bits", "difftest", "matrix", "check"])
@pytest.mark.parametrize("words", ["a,b c", "a b,c", "a b c", "a, b ,c", "a,b --backends c"])
def test_backends_are_named_alike_everywhere(command, words):
    parsed = parsers()[command].parse_args(["--backends", *words.split()])
    assert parsed.backends == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["spelt"], "'spelt' is a module; expected module:Class. It has spelt:Copies, spelt:Typo."),
        (["spelt.py:Copies"], "'spelt.py:Copies' names a file; expected module:Class, such as spelt:Copies"),
        (["./inner/deep.py:Copies"], "names a file; expected module:Class, such as inner.deep:Copies"),
        (["spelt.py"], "'spelt.py' names a file; expected module:Class, such as spelt:MyKernel"),
        (["inner.deep"], "It has inner.deep:Copies, inner.deep:Typo."),
        (["spelt:copies"], "module 'spelt' has no class 'copies'. Did you mean spelt:Copies?"),
        (["spelt:Kopies"], "Did you mean spelt:Copies?"),
        (["spelt:Zebra"], "module 'spelt' has no class 'Zebra'. It has spelt:Copies, spelt:Typo."),
        (["spelt.Copies"], "'spelt.Copies' is no backend; expected module:Class. Did you mean spelt:Copies?"),
        (["inner.deep.Copies"], "Did you mean inner.deep:Copies?"),
        (["nothing.Copies"], "no backend is called 'nothing.Copies'"),
        (["nothing.Copies"], "A class of your own is named with its module: nothing:Copies, if it is in nothing.py"),
        (["CBackend"], "A class of your own is named with its module: mykernel:CBackend, if it is in mykernel.py"),
        (["nothing"], "A class of your own is named with its module: nothing:MyKernel, if it is in nothing.py"),
        (["C Backend"], "A class of your own is named with its module: mykernel:MyKernel"),
        (["CUDDA"], 'Did you mean "cuda"?'),
        (["Cythom"], 'Did you mean "cython"?'),
        (["spelt:"], "'spelt' is a module; expected module:Class."),
        (["numpy", "--backends", "cython"], "got numpy, cython; expected the name of one backend"),
        (["numpy,cython"], "got numpy,cython; expected the name of one backend: python -m rau check NAME"),
        ([], "got none; expected the name of one backend"),
        (["numpy", "--selct", "x"], "unrecognized arguments: --selct x. Did you mean --select?"),
        (["numpy", "--zzz"], "unrecognized arguments: --zzz\n"),
    ],
)
def test_slips_in_a_check(folder, arguments, said, capsys):
    assert status(["check", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err
    if "unrecognized" in said:
        assert captured.err.startswith("usage: python -m rau check ")


def test_one_backend_may_be_named_as_in_other_commands(folder, capsys):
    assert main(["check", "--backends", "spelt:Copies", "--select", "smallest/*"]) == 0
    assert "PASSED: copies: 1 passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", ["cases --export", "cases --verify", "difftest --replay", "difftest --report", "matrix --report"]
)
def test_a_path_without_a_name(option, capsys):
    """As of a variable of the shell that is not set: not the same as no option."""
    assert status([*option.split(), ""]) == 2
    assert "got an empty name; expected a path" in capsys.readouterr().err


def test_an_option_of_no_command(capsys):
    assert status(["--vesion"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("usage: python -m rau [-h]") and captured.err.endswith("Did you mean --version?\n")


def test_the_version(capsys):
    assert status(["--version"]) == 0
    assert capsys.readouterr().out == f"rau {version('ring-attention-update')}\n"


def test_commands_choose_for_themselves_and_say_so(monkeypatch, capsys):
    monkeypatch.setenv("RAU_BACKEND", "cuda")
    loaded, _ = session.choose(None)
    assert len(loaded) > 1
    assert capsys.readouterr().err == (
        "RAU_BACKEND=cuda chooses for calls of rau; this command runs every backend that is available: --backends cuda runs "
        "that one\n"
    )
    session.choose(["numpy"])
    assert capsys.readouterr().err == ""


def test_a_named_case_generates_none(monkeypatch):
    """Not one id is looked at: with --minutes that would take as long."""
    monkeypatch.setattr(case_options.itertools, "count", lambda: pytest.fail("ids are looked through"))
    options = argparse.Namespace(dtype=None, layout=None, seed=0)
    for select in ("layout/SBH", "tnd/*", "generator/1"):
        options.select = select
        assert list(case_options.generated_cases(options)) == []


def test_globs_that_mean_generated_cases_find_them():
    options = argparse.Namespace(dtype=None, layout=None, seed=0)
    for select in ("*", "gen*", "generated/0/*", "[g]enerated/*", "?enerated/*", "generated/0/[0-9]"):
        options.select = select
        assert next(case_options.generated_cases(options)).id.startswith("generated/0/")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("layouts='SBH'", "TypeError: Capabilities: layouts = 'SBH'; expected a tuple of str, such as ('SBH',)."),
        ("lanes=8", "TypeError: Capabilities: lanes = 8; expected a tuple of 8 and 1, such as (8,)."),
        ("tolerance='40'", "TypeError: Capabilities: tolerance = '40'; expected a positive number, such as 2.0."),
        ("head_dim_multiple=0", "TypeError: Capabilities: head_dim_multiple = 0; expected an int, at least 1."),
        ("layotus=('SBH',)", "TypeError: Capabilities: layotus = ('SBH',): no such field; did you mean \"layouts\"?"),
    ],
)
def test_capabilities_that_are_none_are_told_in_a_line(folder, wrong, said, capsys):
    (folder / "declares.py").write_text(f"from rau.backends import Capabilities\nX = Capabilities(array_types=(), {wrong})\n")
    sys.modules.pop("declares", None)
    assert main(["check", "declares:X"]) == 2
    captured = capsys.readouterr()
    told = f"python -m rau check: error: 'declares:X': module 'declares' cannot be imported: {said} (declares.py:2, in <module>)\n"
    assert captured.out == "" and captured.err == told
