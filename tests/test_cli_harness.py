"""python -m rau check, difftest and cases: as a kernel's author runs them, and what they say of mistakes."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from command import status
from patience import LIMIT

import rau
from rau import install
from rau.__main__ import main
from rau.cli import case_options, difftest
from rau.testing.cases import Case
from rau.testing.differential import record

# A kernel in its author's folder. MODE says what is wrong with it.
KERNEL = '''
import dataclasses, time
from pathlib import Path
import numpy as np
from rau.backends import Backend
from rau.backends.numpy_ import NumPyBackend

MODE = "right"

class Mine(NumPyBackend):
    name = "mine"

    def update(self, problem, prev, cur, out):
        return self.merge(problem, [prev, cur], out)

    def merge(self, problem, states, out):
        if MODE == "slow":
            Path("called").touch()
            time.sleep(0.02)
        if MODE == "raises":
            raise KeyError("weights \\u00b5")
        result = super().merge(problem, states, out)
        attn = result.attn_out
        if MODE == "one lane" and problem.lanes == 1 or MODE == "wrong":
            attn += np.asarray(0.01, attn.dtype)
        if MODE == "last bit":  # where the two sides nearly cancel, it is well within the bound
            small = np.abs(attn) < 0.1 * np.minimum(*(np.abs(state.attn_out) for state in states))
            attn[small] = np.nextafter(attn[small], np.float32(0))
        return result

class Stopped(Mine):
    calls = 0

    def merge(self, problem, states, out):
        Stopped.calls += 1
        if Stopped.calls > 5:
            raise KeyboardInterrupt
        return super().merge(problem, states, out)

class Narrow(Mine):
    name = "narrow"
    capabilities = dataclasses.replace(NumPyBackend.capabilities, dtypes=("float32",), mixed=False)

class Loose(Mine):
    name = "loose"
    capabilities = dataclasses.replace(NumPyBackend.capabilities, tolerance=8.0)

class Numpy(Mine):
    name = "numpy"

class Markup(Mine):
    name = "<i>"

class Broken(Mine):
    def __init__(self):
        raise OSError("no such device")

class Stranger:
    name = "stranger"
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The author's folder; the function writes its kernel in a mode."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # or a kernel rewritten within a second is not seen
    for name in [name for name in os.environ if name.startswith("RAU_")]:
        monkeypatch.delenv(name)

    def write(mode: str) -> Path:
        sys.modules.pop("kernel_at_hand", None)
        source = KERNEL.replace('MODE = "right"', f'MODE = "{mode}"')
        (tmp_path / "kernel_at_hand.py").write_text(source, encoding="utf-8")
        return tmp_path

    write("right")
    yield write
    sys.modules.pop("kernel_at_hand", None)


def document(capsys) -> dict:
    captured = capsys.readouterr()
    assert captured.err == ""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(captured.out, parse_constant=refuse)


def launch(*arguments: str, **environment: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    # Where the test itself runs in the background, SIGINT may be ignored, and a child inherits that.
    return subprocess.Popen(
        [sys.executable, "-m", "rau", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out.decode(), err.decode()


# --------------------------------------------------------------------------------------------------------------- check


def test_check_says_what_it_ran_on(folder, monkeypatch, capsys):
    monkeypatch.setenv("RAU_TEST_BACKENDS", "numpy")
    monkeypatch.setenv("RAU_BACKENT", "nump")
    assert main(["check", "numpy", "--select", "smallest/*"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert f"numpy {np.__version__}" in captured.out and "compiled core: " in captured.out
    assert "RAU_TEST_BACKENDS=numpy (test suite" in captured.out
    assert "RAU_BACKENT=nump (rau reads no such variable" in captured.out
    assert "checking numpy, which declares: dtypes float16" in captured.out
    assert captured.out.splitlines()[-1].startswith("PASSED: numpy: 1 passed (")


def test_check_json(folder, capsys):
    assert main(["check", "kernel_at_hand:Narrow", "--json", "--select", "dtype/*"]) == 0
    found = document(capsys)
    assert found["backend"] == "narrow" and found["asked_for"] == "kernel_at_hand:Narrow"
    assert found["passed"] is True and found["interrupted"] is False and found["failures"] == []
    assert sorted(found["succeeded"]) == ["dtype/float32", "dtype/float32-attention"]
    excluded = {item["id"]: item["message"] for item in found["excluded"]}
    assert excluded["dtype/bfloat16"] == "dtype bfloat16 is not one of float32"
    assert excluded["dtype/float16-into-float32"] == "it does not merge float16 into float32"
    assert found["checks"] == len(found["succeeded"]) + len(excluded)
    assert found["configuration"]["versions"]["numpy"] == np.__version__


def test_check_lists_what_is_excluded(folder, capsys):
    assert main(["check", "kernel_at_hand:Narrow", "--select", "*bfloat16"]) == 1
    out = capsys.readouterr().out
    assert re.search(
        r"excluded: dtype bfloat16 is not one of float32\n    (flash/bfloat16, )?dtype/bfloat16, .* and \d+ more\n", out
    )
    assert "FAILED: narrow: nothing that was selected could be checked" in out


def test_without_ml_dtypes(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert main(["check", "numpy", "--select", "*/commutativity-*"]) == 0
    assert "excluded: bfloat16 NumPy arrays need ml_dtypes" in capsys.readouterr().out
    assert main(["difftest", "--backends", "numpy", "--select", "dtype/*"]) == 0
    assert re.search(r"excluded from numpy: \d cases: bfloat16 NumPy arrays need ml_dtypes", capsys.readouterr().out)


@pytest.mark.parametrize("mode", ["wrong", "raises"])
def test_check_fails(folder, mode, capsys):
    folder(mode)
    assert main(["check", "kernel_at_hand:Mine", "--select", "layout/*"]) == 1
    out = capsys.readouterr().out
    raised = r"KeyError: 'weights \u00b5' \(kernel_at_hand.py:\d+, in merge\)"
    said = {"wrong": "times the bound", "raises": raised}[mode]
    assert re.search(r"^failed: \d checks?: .*\n    layout/SBH", out, re.MULTILINE) and re.search(said, out)
    assert "smallest failing cases: python -m rau difftest --backends kernel_at_hand:Mine,numpy" in out
    assert out.splitlines()[-1].startswith("FAILED: mine: 0 passed, 6 failed (")


def test_expected_failures_are_strict(folder, capsys):
    folder("one lane")
    check = ["check", "kernel_at_hand:Mine", "--select", "lanes/*"]
    assert main(check) == 1
    known = ["--expect-failure", "lanes/1-*=one lane = not done yet"]
    assert main([*check, *known]) == 0
    out = capsys.readouterr().out
    assert "failed as expected: lanes/1-SBH" in out and "(expected: one lane = not done yet)" in out
    assert main([*check, *known, "--expect-failure", "lanes/8-SBH=a mistake"]) == 1
    assert "passes: take it off the list" in capsys.readouterr().out
    assert main([*check, *known, "--expect-failure", "tnd/*=not selected"]) == 0


def test_what_is_not_promised_can_be_tried_alone(folder, capsys):
    check = ["check", "lse_kernels:Weights", "--select"]
    assert main([*check, "unpromised/*"]) == 0
    out = capsys.readouterr().out
    assert "; a log-sum-exp to base e; promises one-empty, small-weights, infinity, nan, subnormal\n" in out
    assert out.count("does not promise ") == 3 and "does not promise payload " in out and "does it: no: " in out
    assert out.splitlines()[-1].startswith("PASSED: weights: 0 passed, 3 not promised (")
    assert main([*check, "*/two-empty", "--json"]) == 0
    found = document(capsys)
    assert found["checks"] == 1 and found["unpromised"].keys() == {"two-empty"} and not found["succeeded"]
    assert status([*check, "unpromised/nan"]) == 2  # which it promises
    assert "--select 'unpromised/nan' matches no check of weights" in capsys.readouterr().err


def test_the_whole_kit_on_a_kernel_of_ones_own(folder, capsys):
    """All of it passes; the one failure is an expectation that matches nothing."""
    assert main(["check", "kernel_at_hand:Mine", "--json", "--expect-failure", "nothing/at-all=why not"]) == 1
    found = document(capsys)
    assert found["failures"] == [{"id": "nothing/at-all", "message": "an expected failure that matches no check"}]
    assert len(found["succeeded"]) > 700
    without_torch = [] if find_spec("torch") else ["autograd/learns-of-writes", "autograd/rows-and-sinks"]
    assert [excluded["id"] for excluded in found["excluded"]] == without_torch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nump"], 'Did you mean "numpy"?'),
        (["check", "kernel_at_hand:Theirs"], "module 'kernel_at_hand' has no class 'Theirs'"),
        (["check", "not_here:Mine"], "no module 'not_here' here or installed"),
        (["check", "not_here.at_all:Mine"], "no module 'not_here.at_all' here or installed"),
        (["check", "kernel_at_hand:Broken"], "Broken() failed: OSError: no such device (kernel_at_hand.py:"),
        (["check", "kernel_at_hand:Stranger"], "Stranger has no capabilities, update, merge"),
        (["check", "numpy", "--expect-failure", "layout/SBH"], "--expect-failure: got 'layout/SBH'; expected ID=REASON"),
        (["check", "numpy", "--expect-failure", "layout/SBH="], "got 'layout/SBH='; expected ID=REASON"),
        (["check"], "got none; expected the name of one backend"),
        (["check", "numpy", "--select", "nothing/*", "--json"], "--select 'nothing/*' matches no check of numpy"),
        (["difftest", "--backends", "numpy,nump"], 'Did you mean "numpy"?'),
        (["difftest", "--backends", ","], "argument --backends: got ','; expected names of backends"),
        (["difftest", "--backends", "numpy,kernel_at_hand:Numpy"], "several backends are called numpy"),
        (["difftest", "--cases", "-1"], "argument --cases: got '-1'; expected a whole number, 0 or more"),
        (["difftest", "--cases", "some"], "argument --cases: got 'some'; expected a whole number, 0 or more"),
        (["difftest", "--minutes", "0"], "argument --minutes: got '0'; expected a number above 0"),
        (["difftest", "--minutes", "nan"], "argument --minutes: got 'nan'; expected a number above 0"),
        (["difftest", "--minutes", "soon"], "argument --minutes: got 'soon'; expected a number above 0"),
        (["difftest", "--seed", "-1"], "argument --seed: got '-1'; expected a whole number, 0 or more"),
        (["difftest", "--cases", "3", "--minutes", "1"], "--minutes: not allowed with argument --cases"),
        (["difftest", "--replay", "x.npz", "--cases", "3"], "--cases: not allowed with argument --replay"),
        (["difftest", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["difftest", "--select", "nothing/*"], "no case matches"),
        (["difftest", "--select", "none/*", "--layout", "TND"], "no case matches"),
        (["difftest", "--replay", "x.npz", "--seed", "1"], "--seed cannot be combined with --replay"),
        (["difftest", "--replay", "absent.npz"], "absent.npz: no such file in "),
        (["difftest", "--replay", "kernel_at_hand.py"], "kernel_at_hand.py: no whole .npz file, and none of torch.save; "),
        (["difftest", "--report", "kernel_at_hand.py"], "--report: "),
        (["cases", "--select", "nothing/*"], "no case matches"),
        (["cases", "--generated", "-1"], "argument --generated: got '-1'; expected a whole number, 0 or more"),
        (["cases", "--tolerance", "2"], "--tolerance only makes sense with --verify"),
        (["cases", "--verify", ".", "--dtype", "float32"], "--dtype cannot be combined with --verify"),
        (["cases", "--verify", ".", "--generated", "2"], "--generated cannot be combined with --verify"),
        (["cases", "--verify", ".", "--tolerance", "-2"], "argument --tolerance: got '-2'; expected a number above 0"),
        (["cases", "--export", "a", "--verify", "b"], "--verify: not allowed with argument --export"),
        (["cases", "--verify", "."], "holds no exported cases"),
        (["cases", "--export", "."], "is not empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.filterwarnings("ignore:rau runs on NumPy")
def test_wrong_usage(folder, arguments, message, capsys):
    assert status(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.splitlines()[-1].startswith(f"python -m rau {arguments[0]}: error: ")
    assert "Traceback" not in captured.err
    assert captured.out == "" or "check" in arguments  # which checks there are is known after the heading only


@pytest.mark.parametrize("command", ["check", "difftest", "cases"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0 and "Exit status" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ difftest


def test_difftest(folder, capsys):
    assert main(["difftest", "--cases", "20", "--select", "generated/*"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("PASSED: 20 cases in ")
    assert "no RAU_* variable is set" in out and "largest error against the oracle" in out
    assert sorted(path.name for path in Path().iterdir()) == ["kernel_at_hand.py"]  # no folder where nothing failed


def test_difftest_json(folder, capsys):
    options = ["--cases", "80", "--seed", "3", "--select", "*[0-9]"]
    assert main(["difftest", "--json", "--backends", "numpy,kernel_at_hand:Mine", *options]) == 0
    found = document(capsys)
    assert found["passed"] is True and found["cases"] > 150 and found["options"]["seed"] == 3
    assert list(found["backends"]) == ["numpy", "mine"]
    for backend in found["backends"].values():
        assert backend["cases"] == found["cases"] and 0.9 < backend["attn_share"] <= 1 and backend["tolerance"] == 1
        worst = backend["attn_shares"]
        assert set(worst) == set(backend["sum_shares"]) == {"float32", "bfloat16", "float16", "float64"}
        assert max(worst.values()) == backend["attn_share"]
        assert 0.3 < worst["float64"] < worst["bfloat16"]  # each by a bound of its own
        assert len(backend["histogram"]) == 21 and backend["histogram"][-1] == 0 and sum(backend["histogram"]) > 1e5
    (pair,) = found["pairs"]
    assert pair["backends"] == ["numpy", "mine"] and pair["different"] == 0 and pair["cases"] == found["cases"]


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        (["--select", "tnd/*qlen*"], lambda case: case.id.startswith("tnd/")),
        (["--dtype", "bfloat16-into-float32"], lambda case: "bfloat16" == case.cur_dtype != case.dtype),
        (["--layout", "BNSD", "--dtype", "float16"], lambda case: (case.layout, case.dtype) == ("BNSD", "float16")),
        (["--select", "generated/5/*"], lambda case: case.id.startswith("generated/5/")),
        (["--select", "generated/5/123456789"], lambda case: case.id == "generated/5/123456789"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_selection(folder, options, fits, capsys):
    ids = []

    def listed(more: list[str]) -> list[Case]:
        assert main(["cases", "--json", *options, *more]) == 0
        return [Case(**{**case, "lengths": tuple(case["lengths"])}) for case in document(capsys)["cases"]]

    for more in ([], ["--generated", "4"]):
        if not more and ("generated" in options[1] or "float16" in options):  # there are no named ones
            continue
        cases = listed(more)
        assert cases and all(map(fits, cases))
        ids.append([case.id for case in cases])
    assert main(["difftest", "--json", "--backends", "numpy", "--cases", "4", *options]) == 0
    assert document(capsys)["cases"] == len(ids[-1])


def test_cases_are_found_by_looking_ahead_and_not_for_ever(monkeypatch):
    monkeypatch.setattr(case_options, "_LOOK_AHEAD", 50)
    import argparse

    options = argparse.Namespace(select="generated/0/1?", dtype=None, layout=None, seed=0)
    assert [case.id for case in case_options.generated_cases(options)] == [f"generated/0/{i}" for i in range(10, 20)]


def test_minutes_keeps_generating_until_then(folder, monkeypatch, capsys):
    """By a clock that goes on by a second whenever it is read, which is twice a case."""
    readings = itertools.count()
    monkeypatch.setattr(difftest, "time", SimpleNamespace(monotonic=lambda: float(next(readings))))
    options = ["--minutes", "10", "--backends", "numpy", "--dtype", "float32", "--layout", "TND"]
    assert main(["difftest", "--json", *options]) == 0
    found = document(capsys)
    assert 600 <= found["seconds"] < 605 and 298 <= found["cases"] <= 300
    assert found["backends"]["numpy"]["worst"]


def replay_of(out: str) -> str:
    """The command that the output offers."""
    found = re.search(r"^    again: (.*--replay.*)$", out, re.MULTILINE)
    assert found
    return found[1]


def test_a_wrong_kernel_is_found_written_replayed_and_repaired(folder, capsys):
    folder("wrong")
    options = ["--backends", "kernel_at_hand:Mine,numpy", "--cases", "0", "--select", "tnd/packed-*"]
    assert main(["difftest", *options]) == 1
    out = capsys.readouterr().out
    assert re.search(r"FAILED: \d+ cases in \d+ s: mine is wrong on \d+ of them$", out)
    assert "WRONG: mine: attn_out[" in out and "    smallest failing case: tnd/packed-even; TND" in out
    assert "T 1 in sequences of 1" in out
    command = replay_of(out)
    assert command == (
        "python -m rau difftest --replay rau-difftest/mine-tnd-packed-even.npz --backends kernel_at_hand:Mine"
    )
    replay = shlex.split(command)[3:]
    ended, out, err = finish(launch(*replay))
    assert ended == 1 and err == ""
    assert re.search(r"FAILED: 1 case in \d+ s: mine is wrong on 1 of them$", out)
    assert pair_of(out, "the recorded output and mine") == 0
    folder("right")
    ended, out, err = finish(launch(*replay))
    assert ended == 0 and pair_of(out, "the recorded output and mine") == 1
    assert "WRONG: the recorded output: attn_out[" in out
    assert re.search(r"PASSED: 1 case in .* none beyond the bound; the recorded output is wrong$", out)
    # Without a name the question is about the output in the file.
    assert main(replay[:3]) == 1
    assert re.search(r"FAILED: 1 case in \d+ s: the recorded output is wrong on 1 of them$", capsys.readouterr().out)


def pair_of(out: str, names: str) -> int:
    """How many cases have different bits, by the table of pairs."""
    found = re.search(rf"^{names} +1 +(\d+) ", out, re.MULTILINE)
    assert found
    return int(found[1])


def test_replay_json(folder, capsys):
    folder("wrong")
    options = ["--backends", "kernel_at_hand:Mine", "--cases", "0", "--select", "layout/*", "--json"]
    assert main(["difftest", *options]) == 1
    finding = document(capsys)["findings"][0]
    assert main([*shlex.split(finding["replay"])[3:], "--json"]) == 1
    found = document(capsys)
    recorded, mine = found["findings"]
    assert found["passed"] is False and found["options"]["replay"] == finding["file"]
    assert recorded["backend"] == "the recorded output" and mine["backend"] == "mine"
    assert recorded["case"] == mine["case"] == finding["case"] and recorded["message"] == mine["message"]
    assert found["backends"]["mine"]["wrong"] == 1
    assert found["backends"]["the recorded output"]["wrong"] == 0  # it is not asked about
    (pair,) = found["pairs"]
    assert pair["different"] == 0 and pair["first"] == ""


def test_replay_of_a_file_of_anybodys(folder, capsys):
    case = Case(id="anything", tokens=3)
    prev, cur = case.fill()
    names = ("attn_out", "softmax_max", "softmax_sum")
    sides = (("prev", prev), ("cur", cur))
    arrays = {f"{side}_{name}": part for side, state in sides for name, part in zip(names, state, strict=True)}
    np.savez("anybodys.npz", **arrays)
    assert main(["difftest", "--replay", "anybodys.npz"]) == 0
    assert "recorded" not in capsys.readouterr().out.split("replaying")[1]
    np.savez("impossible.npz", **arrays | {"cur_softmax_sum": cur[2][:, :, 1:]})
    assert main(["difftest", "--replay", "impossible.npz"]) == 2
    np.savez("pickled.npz", **arrays | {"case": np.array([object()])})
    assert main(["difftest", "--replay", "pickled.npz"]) == 2
    np.savez("strange.npz", **arrays | {"case": np.array('{"color": 3}')})
    assert main(["difftest", "--replay", "strange.npz"]) == 2
    assert "does not describe a case" in capsys.readouterr().err


def test_other_bits_within_the_bound(folder, capsys):
    """Backends that promise the same bits are held to that; one that declares a tolerance is not."""
    folder("last bit")
    select = ["--cases", "0", "--select", "layout/SBH", "--backends"]
    assert main(["difftest", *select, "kernel_at_hand:Mine,numpy"]) == 1
    out = capsys.readouterr().out
    assert "mine and numpy differ on 1 of them" in out and "WRONG: mine and numpy: attn_out[" in out
    command = replay_of(out)
    assert command.endswith("--backends kernel_at_hand:Mine,numpy")
    assert main(shlex.split(command)[3:]) == 1
    out = capsys.readouterr().out
    assert out.endswith(": mine and numpy differ on 1 of them\n") and "WRONG: mine and numpy: attn_out[" in out
    assert out.count("WRONG: ") == 1 and pair_of(out, "the recorded output and numpy") == 1  # nobody promises its bits
    folder("right")
    assert main(shlex.split(command)[3:]) == 0
    assert re.search(r"PASSED: 1 case in \d+ s, 2 with different bits, none beyond the bound$", capsys.readouterr().out)
    folder("last bit")
    assert main(["difftest", *select, "kernel_at_hand:Loose,numpy"]) == 0
    out = capsys.readouterr().out
    assert "loose (tolerance 8)" in out
    assert re.search(r"PASSED: 1 case in \d+ s, 1 with different bits, none beyond the bound$", out)


def test_a_backend_that_runs_nothing_fails(folder, capsys):
    assert main(["difftest", "--backends", "kernel_at_hand:Narrow,numpy", "--select", "dtype/float16"]) == 1
    out = capsys.readouterr().out
    assert "excluded from narrow: 1 case: dtype float16 is not one of float32" in out
    assert "of which narrow ran none" in out


def test_a_backend_that_nobody_named_may_run_nothing(folder, capsys):
    """A plugin changes nothing for those who do not ask for it."""
    sys.path.insert(0, "")
    rau.registry.register(importlib.import_module("kernel_at_hand").Narrow)
    try:
        assert main(["difftest", "--select", "dtype/float16", "--cases", "0", "--in-process"]) == 0
        out = capsys.readouterr().out
        assert "excluded from narrow: 1 case" in out and out.splitlines()[-1].startswith("PASSED: 1 case")
        rau.registry.refresh()
        rau.registry.register(importlib.import_module("kernel_at_hand").Narrow)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAU_BLOCK", ",".join(set(rau.registry.names()) - {"narrow"}))
            assert main(["difftest", "--select", "dtype/float16", "--cases", "0", "--in-process"]) == 1
            assert re.search(r"FAILED: 1 case in \d+ s, of which narrow ran none$", capsys.readouterr().out)
    finally:
        rau.registry.refresh()


def test_a_folder_that_cannot_be_written_to(folder, capsys):
    folder("wrong")
    Path("rau-difftest").write_text("in the way")
    assert main(["difftest", "--backends", "kernel_at_hand:Mine", "--select", "layout/SBH"]) == 1
    out = capsys.readouterr().out
    assert "the case could not be written" in out and "--replay" not in out


# ---------------------------------------------------------------------------------------------------------- interrupted


def test_what_was_found_before_an_interruption_is_kept(folder, capsys):
    assert main(["check", "kernel_at_hand:Stopped", "--json", "--in-process"]) == 130
    found = document(capsys)
    assert found["interrupted"] is True and found["passed"] is False
    assert found["succeeded"][0] == "smallest/one-token-one-head" and found["failures"] == []
    folder("wrong")
    assert main(["difftest", "--backends", "kernel_at_hand:Stopped", "--report", "page", "--json", "--in-process"]) == 1
    found = document(capsys)
    assert found["interrupted"] is True and found["passed"] is False
    assert Path("page/index.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "mode", "begun", "expected", "verdict"),
    [
        (["check"], "slow", "called", 130, r"INTERRUPTED in [^ ]+/[^ ]+: mine: of \d+ checks, \d+ passed"),
        (["difftest", "--backends"], "slow", "called", 130, r"INTERRUPTED in [^ ]+/[^ ]+: \d+ cases? in \d+ s, nothing wrong so far"),
        (["difftest", "--minutes", "5", "--backends"], "wrong", "rau-difftest/*.npz", 1, r"FAILED: .*\(interrupted in [^ ]+/[^ ]+\): mine is wrong on"),
    ],
    ids=["check", "difftest", "difftest-wrong"],
)
def test_ctrl_c(folder, arguments, mode, begun, expected, verdict):
    here = folder(mode)
    process = launch(*arguments, "kernel_at_hand:Mine")
    while not any(here.glob(begun)):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    returned, out, err = finish(process)
    assert (returned, err) == (expected, "")
    assert re.search(verdict, out.splitlines()[-1])


# ----------------------------------------------------------------------------------------------------------------- page


class Page(HTMLParser):
    """Collects tags, links and words; refuses what is not closed."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_report(folder, capsys):
    folder("wrong")
    options = ["--cases", "0", "--select", "layout/*", "--report", "out/page"]
    assert main(["difftest", "--backends", "numpy,kernel_at_hand:Markup", *options]) == 1
    assert "report: out/page/index.html" in capsys.readouterr().out
    text = Path("out/page/index.html").read_text(encoding="utf-8")
    page = Page(text)
    words = "".join(page.words)
    assert "FAILED: 6 cases" in words and "<i> is wrong on 6 of them" in words
    assert "i" not in [tag for tag, _ in page.tags]
    command = "python -m rau difftest --backends numpy,kernel_at_hand:Markup --cases 0 --select 'layout/*' --seed 0\n"
    assert re.search(rf"\d{{4}}, \d\d:\d\d .*: {re.escape(command)}", words)
    assert f"numpy {np.__version__}" in words and "no RAU_* variable is set" in words
    assert "python -m rau difftest --replay out/page/-i-" in words
    files = {attributes["href"] for tag, attributes in page.tags if "href" in attributes}
    assert {record.read_record(Path("out/page") / file).case.id for file in files} == {"layout/SBH", "layout/SBH-attention"}
    # It opens from disk and asks nobody for anything.
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|src=", text)
    assert 'name="viewport"' in text and 'name="color-scheme" content="light dark"' in text


def test_report_of_nothing_wrong(folder, capsys):
    assert main(["difftest", "--backends", "numpy", "--cases", "0", "--select", "none/tokens", "--report", "page"]) == 0
    words = "".join(Page(Path("page/index.html").read_text(encoding="utf-8")).words)
    assert "PASSED: 1 case" in words and "WRONG" not in words
    assert [path.name for path in Path("page").iterdir()] == ["index.html"]
    shown = capsys.readouterr().out.splitlines()
    for line in ("comparing numpy with the oracle", "report: page/index.html"):
        shown.remove(line)
    assert shown[-1].startswith("PASSED") and [line for line in shown if line not in words] == []


def test_a_report_needs_rich(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["difftest", "--backends", "numpy", "--cases", "0", "--report", "page"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and f"--report needs rich: {install.command('cli')}" in captured.err
    assert not Path("page").exists()


def test_how_large_the_errors_are(folder, capsys):
    """The table of the terminal has the counts of the document, two bins a row."""
    folder("wrong")
    options = ["difftest", "--backends", "numpy,kernel_at_hand:Mine", "--cases", "0", "--select", "dtype/*"]
    assert main([*options, "--json"]) == 1
    bins = {name: standing["histogram"] for name, standing in document(capsys)["backends"].items()}
    assert main(options) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r"0\.\d to|beyond", line)]
    assert len(rows) == 11 and [row[0] for row in rows[:-1]] == [f"0.{tenth}" for tenth in range(10)]
    for at, counts in enumerate(bins.values()):
        shown = [[int(word.replace(",", "")) for word in row if set(word) <= set("0123456789,")][at] for row in rows]
        assert shown == [*(sum(counts[2 * tenth : 2 * tenth + 2]) for tenth in range(10)), counts[-1]]
    assert bins["numpy"][-1] == 0 < bins["mine"][-1]


# ---------------------------------------------------------------------------------------------------- cases, appearance


def test_the_list_of_cases(capsys):
    assert main(["cases", "--select", "in-place/half-*"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^in-place/half-TND-cur  +TND, statistics token-major; T 10 in sequences of 10, N 3", out, re.M)
    assert "in place, over cur" in out and out.endswith("\n8 cases\n")


def test_plain_terminals(folder):
    folder("raises")
    for command in (["check"], ["difftest", "--cases", "0", "--backends"]):
        process = launch(*command, "kernel_at_hand:Mine", "--select", "layout/SBH", PYTHONIOENCODING="ascii")
        ended, out, err = finish(process)
        assert ended == 1 and err == ""
        assert out.isascii() and "weights \\xb5" in out


@pytest.mark.parametrize("rich", [True, False])
def test_progress(rich, folder, monkeypatch, capsys):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
        for name in ("rich.console", "rich.markup", "rich.progress"):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(difftest, "_INTERVAL", 0.0)
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        for command in (["check", "numpy", "--select", "layout/*"], ["difftest", "--select", "generated/*", "--cases", "30"]):
            assert main(command) == 0
            captured = capsys.readouterr()
            assert captured.out.splitlines()[-1].startswith("PASSED: ")
            assert bool(captured.err) is (terminal and rich)
            assert main([*command, "--json"]) == 0
            document(capsys)  # and nothing else


def test_no_command_shows_what_there_is():
    done = subprocess.run([sys.executable, "-m", "rau"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout
    assert "difftest" in done.stderr and "Traceback" not in done.stderr


# As a user has it: Python keeps what is printed until its buffer is full, or until its exit.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("words", [["cases"], ["info"], ["--help"], ["check", "--help"], ["--version"]], ids=" ".join)
def test_a_reader_that_has_seen_enough(words):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "rau", *words]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, env=BUFFERED)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(os.name != "posix", reason="no shell that closes a stream here")
@pytest.mark.parametrize("words", ["info", "info --json", "--help"])
def test_without_a_standard_output(words):
    command = f"exec {shlex.quote(sys.executable)} -m rau {words} >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False, env=BUFFERED)
    assert (done.returncode, done.stderr) == (0, "")
