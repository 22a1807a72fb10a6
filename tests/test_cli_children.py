"""A kit that survives what it tests: kernels that crash, hang, end their process or print; files that cannot be written."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import LIMIT

from rau import registry
from rau.__main__ import main
from rau.errors import BackendUnavailableError
from rau.testing import bits
from rau.testing.apart import PATIENCE, Apart, Here, NoAnswer
from rau.testing.cases import named
from rau.testing.causes import cause_of
from rau.testing.conformance import check_backend
from rau.testing.conformance.matrix import matrix
from rau.testing.conformance.properties import with_capabilities
from rau.testing.differential import run_differential

KERNELS = '''
import ctypes, dataclasses, os, subprocess, sys, threading, time
from pathlib import Path
import numpy as np
from rau.backends import Backend, Capabilities
from rau.backends.numpy_ import NumPyBackend

if os.environ.get("FAULT") == "at import":
    ctypes.string_at(0)

class Faulty(NumPyBackend):
    """Right in the three cases "lanes/unequal-*"; each of the other four ends it in another way."""
    name = "faulty"

    def update(self, problem, prev, cur, out):
        return self.merge(problem, [prev, cur], out)

    def merge(self, problem, states, out):
        if problem.D == 8:
            self.end(problem.lanes, problem.layout)
        return super().merge(problem, states, out)

    def end(self, lanes, layout):
        if (lanes, layout) == (8, "SBH"):
            os.abort()
        if (lanes, layout) == (8, "TND"):
            time.sleep(600)
        if (lanes, layout) == (1, "SBH"):
            ctypes.string_at(0)
        if (lanes, layout) == (1, "TND"):
            os._exit(3)

class Other(Faulty):
    name = "other"

    def end(self, lanes, layout):
        if lanes == 1:
            sys.exit("enough")

class Hangs(Faulty):
    name = "hangs"

    def end(self, lanes, layout):
        Path("pid").write_text(str(os.getpid()))
        time.sleep(600)

class Shifted(NumPyBackend):
    """float32 results a little too large, and in one layout it returns prev: two causes, and a third in mixed cases."""
    name = "shifted"
    capabilities = dataclasses.replace(NumPyBackend.capabilities, dtypes=("float32",), softmax_layouts=("SBH",), mixed=False)

    def update(self, problem, prev, cur, out):
        result = super().merge(problem, [prev, cur], out)
        if problem.layout == "BNSD":
            result.attn_out[...] = prev.attn_out
        else:
            result.attn_out[...] *= np.float32(1 + 3e-7)
        return result

class LastBit(NumPyBackend):
    """Wrong for D = 22; for D = 16 right, but in other bits."""
    name = "last-bit"

    def update(self, problem, prev, cur, out):
        result = super().merge(problem, [prev, cur], out)
        attn = result.attn_out
        if problem.D == 22:
            attn += 1
        small = np.abs(attn) < 0.1 * np.minimum(*(np.abs(state.attn_out) for state in (prev, cur)))
        attn[small] = np.nextafter(attn[small], np.float32(0))
        return result

class Half(NumPyBackend):
    """Crashes in some calls of float16."""
    name = "half"

    def update(self, problem, prev, cur, out):
        return self.merge(problem, [prev, cur], out)

    def merge(self, problem, states, out):
        if problem.dtype == "float16" and problem.D >= 64 and (problem.layout == "SBH" or problem.T == 48):
            ctypes.string_at(0)
        return super().merge(problem, states, out)

class Loud(NumPyBackend):
    """Where all of its threads are when it crashes is more than a pipe holds."""
    name = "loud"

    def update(self, problem, prev, cur, out):
        def deep(n):
            return deep(n - 1) if n else started.append(threading.current_thread()) or time.sleep(600)

        started = []
        for _ in range(80):
            threading.Thread(target=deep, args=(90,), daemon=True).start()
        while len(started) < 80:
            time.sleep(0.01)
        ctypes.string_at(0)

class Late(NumPyBackend):
    """What it returns crashes whoever reads it."""
    name = "late"

    def update(self, problem, prev, cur, out):
        result = self.merge(problem, [prev, cur], out)
        nowhere = (ctypes.c_float * result.attn_out.size).from_address(8)
        return result._replace(attn_out=np.ctypeslib.as_array(nowhere).reshape(result.attn_out.shape))

class Talks(NumPyBackend):
    name = "talks"

    def update(self, problem, prev, cur, out):
        print("from Python")
        ctypes.CDLL(None).printf(b"from C\\n")
        subprocess.run(["echo", "from a process"])
        return super().update(problem, prev, cur, out)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "kernels.py").write_text(KERNELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("kernels", None)


def launch(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "rau", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "RAU_BLOCK": "torch,cuda,ascend",  # to import torch takes seconds
             "PYTHONUNBUFFERED": ""},  # or C would keep nothing of what a kernel prints, either
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None, start_new_session=True,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out, err


# ------------------------------------------------------------------------------------------------- crashes, hangs, exits

ENDS = {
    "lanes/8-SBH": r"crashed: SIGABRT \(Aborted\) \(kernels\.py:\d+, in end\)",
    "lanes/8-TND": rf"hung: no answer within {LIMIT / 60:g} s \(--timeout\) \(kernels\.py:\d+, in end\)",
    "lanes/1-SBH": r"crashed: SIGSEGV \(Segmentation fault\) \(kernels\.py:\d+, in end\)",
    "lanes/1-TND": r"ended its process, exit status 3",
}


def test_whatever_ends_a_kernel_is_a_failure_of_its_case(folder, capsys):
    assert main(["check", "kernels:Faulty", "--select", "lanes/*", "--timeout", f"{LIMIT / 60:g}", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    failures = {failure["id"]: failure["message"] for failure in found["failures"]}
    assert failures.keys() == ENDS.keys() and all(re.fullmatch(ENDS[id], told) for id, told in failures.items()), failures
    assert found["succeeded"] == ["lanes/unequal-SBH", "lanes/unequal-TND", "lanes/unequal-packed"]  # which ran after them
    assert sorted(cause["again"] for cause in found["causes"]) == sorted(
        f"python -m rau check kernels:Faulty --select {id}" for id in ENDS
    )
    assert found["grid"]["SBH"] == {"float32": [1, 2, 0]} and found["grid"]["TND packed"] == {"float32": [1, 0, 0]}


def test_difftest_says_who_it_was(folder, capsys):
    """Two that may crash, beside one that does not: each is blamed for its own, and the third one's standing is whole."""
    options = ["--backends", "kernels:Faulty,kernels:Other,numpy", "--select", "lanes/[1u]*-SBH", "--cases", "0"]
    assert main(["difftest", *options, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["cases"] == 2
    assert {name: (its["cases"], its["wrong"]) for name, its in found["backends"].items()} == {
        "faulty": (2, 1), "other": (2, 1), "numpy": (2, 0),
    }  # fmt: skip
    crash, other = found["findings"]
    assert (other["backend"], other["ids"]) == ("other", ["lanes/1-SBH"]) and "SystemExit: enough (kernels.py:" in other["message"]
    assert (crash["backend"], crash["ids"]) == ("faulty", ["lanes/1-SBH"]) and re.fullmatch(ENDS["lanes/1-SBH"], crash["message"])
    assert (crash["case"]["tokens"], crash["case"]["heads"], crash["case"]["head_dim"]) == (1, 1, 8)  # as small as crashes
    assert main(shlex.split(crash["replay"])[3:]) == 1
    assert re.search(r"WRONG: faulty: crashed: SIGSEGV.*\(kernels\.py:\d+, in end\)", capsys.readouterr().out)


def test_ctrl_c_says_what_was_running_and_leaves_nothing_behind(folder):
    process = launch("check", "kernels:Hangs", "--select", "lanes/8-*")
    end = time.monotonic() + LIMIT
    while not (Path("pid").exists() and Path("pid").read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of its processes
    status, out, err = finish(process)
    assert (status, err) == (130, "")
    assert out.splitlines()[-1].startswith("INTERRUPTED in lanes/8-SBH: hangs: of 2 checks, 0 passed")
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)


def test_a_crash_before_anything_runs_is_told_in_a_line(folder, monkeypatch, capsys):
    monkeypatch.setenv("FAULT", "at import")
    assert main(["check", "kernels:Talks"]) == 2
    captured = capsys.readouterr()
    told = r"python -m rau check: error: 'kernels:Talks': while it was loaded: crashed: SIGSEGV \(Segmentation fault\) \(.*\)\n"
    assert re.fullmatch(told, captured.err) and captured.out == ""


CRASHED = r"crashed: SIGSEGV \(Segmentation fault\) \(kernels\.py:\d+, in merge\)"


def asked(capsys, *arguments):
    status = main([*arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_page_of_answers_survives_a_crash(folder, capsys):
    status, found = asked(capsys, "matrix", "--backends", "kernels:Half,numpy")
    half, other = found["kernels"].values()
    crashed = {question for question, answer in half.items() if re.fullmatch(CRASHED, answer["found"])}
    assert status == 1 and crashed == {"error, float16", "rounded right"} and len(found["broken"]) == 2
    assert all(answer["good"] for question, answer in half.items() if question not in crashed) and len(half) == len(other)
    assert all(answer["good"] for answer in other.values())


def test_digests_survive_a_crash(folder, capsys):
    status, found = asked(capsys, "bits", "--backends", "kernels:Half")
    (row,), (digests,) = found["backends"].values(), found["digests"].values()
    assert status == 1 and row["differ"] == ["float16, SBH"] and re.fullmatch(CRASHED, digests["float16, SBH"])
    assert len(row["same"]) + len(row["not_taken"]) == len(digests) + len(row["not_taken"]) - 1 > 50


def test_the_next_command_names_a_class_as_it_was_named(folder, monkeypatch, capsys):
    group = "float32, SBH, 1 lane"
    every = bits.cases()
    monkeypatch.setattr(bits, "cases", lambda: {group: every[group]})
    monkeypatch.setattr(bits, "rings", lambda backend: iter([]))
    assert main(["bits", "--backends", "kernels:Shifted", "--in-process"]) == 1
    assert "    Next: python -m rau check kernels:Shifted says what is wrong.\n" in capsys.readouterr().out


def test_what_is_not_promised_may_crash(folder):
    backend = with_capabilities(registry.get("numpy"), unpromised=("nan",), contiguous=True)
    row = matrix([backend], place=Dead())[backend.name]
    assert not any(answer.good for answer in row.values())
    assert {question for question, answer in row.items() if not answer.promised} == {"nan", "strides"}
    assert [answer.found for answer in row.values()].count("not run after so many crashes in a row") == len(row) - PATIENCE


def test_measuring_survives_a_crash(folder, capsys):
    status, found = asked(capsys, "bench", "--quick", "--backends", "kernels:Half,numpy")
    large, small = found["groups"]
    assert status == 1 and re.fullmatch(CRASHED, large["lost"].pop("half")) and not large["lost"] and not small["lost"]
    measured = [{(row["name"], row["how"]) for row in group["rows"]} for group in (large, small)]
    three = {"out=", "fresh", "in place"}
    assert measured == [{("numpy", how) for how in three}, {(name, how) for name in ("half", "numpy") for how in three}]
    assert main(["bench", "--quick", "--backends", "kernels:Half"]) == 1
    assert re.search(rf"^WRONG: half: {CRASHED}$", capsys.readouterr().out, re.MULTILINE)


def test_a_demonstration_survives_a_crash(folder, capsys):
    small = "demo", "--tokens", "64", "--heads", "2", "--dtype", "float16", "--backends", "kernels:Half,numpy"
    status, found = asked(capsys, *small)
    assert status == 1 and not found["passed"] and re.fullmatch(CRASHED, found["lost"].pop("half")) and not found["lost"]
    assert [(result["backend"], result["passed"]) for result in found["results"]] == [("numpy", True)] * 2
    assert main([*small]) == 1
    assert re.search(rf"^WRONG: half did not come to its end: {CRASHED}$", capsys.readouterr().out, re.MULTILINE)
    status, found = asked(capsys, *small[:-1], "kernels:Half", "--head-dim", "8")  # which it can do
    assert status == 0 and {result["backend"] for result in found["results"]} == {"half"}
    assert main([*small[:-1], "kernels:Shifted"]) == 2  # which does not take it
    assert 'error: backend "shifted" cannot run this: ' in capsys.readouterr().err


def test_a_crash_with_many_words_is_no_hang(folder, capsys):
    _, found = asked(capsys, "check", "kernels:Loud", "--select", "lanes/8-SBH", "--timeout", "15")
    assert re.fullmatch(CRASHED.replace("merge", "update"), found["failures"][0]["message"])


def test_a_crash_outside_of_the_kernel_is_said_to_be(folder, capsys):
    _, found = asked(capsys, "check", "kernels:Late", "--select", "lanes/8-SBH")
    where = r"\(\w+\.py:\d+, in .*: outside of the kernel, which may have written beside its arrays before\)"
    assert re.fullmatch(rf"crashed: SIGSEGV \(Segmentation fault\) {where}", found["failures"][0]["message"]), found["failures"]


def test_in_process_a_crash_is_the_debuggers(folder):
    status, _, _ = finish(launch("check", "kernels:Faulty", "--select", "lanes/1-SBH", "--in-process"))
    assert status == -signal.SIGSEGV


def test_our_own_run_in_process(monkeypatch, capsys):
    monkeypatch.setattr(Apart, "__init__", None)
    assert main(["check", "numpy", "--select", "lanes/*"]) == 0
    assert main(["difftest", "--backends", "numpy", "--cases", "0", "--select", "lanes/*"]) == 0


class Dead(Here):
    """A place where nothing that runs a kernel answers."""

    def call(self, function, *arguments, seconds=0.0):
        if function.__name__ == "checks":
            return function(*arguments)
        raise NoAnswer("crashed: SIGSEGV")


def test_who_only_crashes_is_not_asked_for_ever():
    cases = [case for case in named() if case.id.startswith("statistics/")]
    assert len(cases) > 2 * PATIENCE
    report = check_backend("numpy", cases=cases, select="statistics/*", place=Dead())
    assert [len(report.failures), len(report.not_run)] == [PATIENCE, len(cases) - PATIENCE] and not report.passed
    backend = type("Mine", (type(registry.get("numpy")),), {"name": "mine"})()
    found = run_differential([backend], cases, place=Dead())
    assert found.stopped and found.cases == found.wrong["mine"] == PATIENCE


def test_apart_gives_what_here_gives(folder):
    with Apart(["numpy"], 30) as place:
        place.backends = [registry.get("numpy")]
        mine, its = (check_backend(place.backends[0], select="layout/*", place=where) for where in (Here(), place))
        assert mine.succeeded == its.succeeded and len(its.succeeded) == 6 and its.passed
        with pytest.raises(NoAnswer, match="ZeroDivisionError"):
            place.call(divmod, 1, 0)
        assert place.call(divmod, 7, 2) == (3, 1)
        assert signal.SIGINT in place.call(signal.pthread_sigmask, signal.SIG_BLOCK, [])  # Ctrl-C is for the other one
    with pytest.raises(BackendUnavailableError, match="nobody"):
        Apart(["nobody"], 30)


def test_a_process_that_cannot_be_started(folder, monkeypatch, tmp_path):
    """Since the working folder is gone: nobody's kernel is wrong."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(BackendUnavailableError, match="'numpy': no process can be started for it: .*No such file"):
        Apart(["numpy"], 30)


# ------------------------------------------------------------------------------------------------------- what it prints


@pytest.mark.parametrize("where", [[], ["--in-process"]], ids=["apart", "in process"])
def test_json_is_json_whatever_a_kernel_prints(where, folder):
    status, out, err = finish(launch("check", "kernels:Talks", "--select", "smallest/*", "--json", *where))
    assert status == 0, err
    assert json.loads(out) and {"from Python", "from C", "from a process"} == {*err.splitlines()}


# --------------------------------------------------------------------------------------------- files that cannot be written


@pytest.mark.parametrize("json_too", [False, True])
def test_a_page_that_cannot_be_written_loses_nothing(json_too, folder, capsys):
    Path("rep/index.html").mkdir(parents=True)
    options = ["--backends", "numpy", "--cases", "0", "--select", "lanes/*", "--report", "rep", *["--json"] * json_too]
    assert main(["difftest", *options]) == 2
    out, err = capsys.readouterr()
    if json_too:
        assert json.loads(out)["passed"] is True
    else:
        assert "worst by dtype" in out and out.splitlines()[-1].startswith("PASSED: 7 cases")
    assert re.fullmatch(r"python -m rau difftest: error: --report: got 'rep'; the page could not be written: .*index.html'\n", err)


# ----------------------------------------------------------------------------------------------------------------- causes


@pytest.mark.parametrize(
    ("problem", "cause"),
    [
        ("attn_out[0, 0] is nan, expected 1.5, off by inf times the bound, 1e-8; 3 of 8 are wrong", "attn_out is NaN where a number is expected"),
        ("attn_out[0, 0] is 1.5, expected nan, off by inf times the bound, 1e-8; 3 of 8 are wrong", "attn_out is a number where NaN is expected"),
        ("softmax_sum[0, 0, 0, 0] is -0, expected 48.9, to be kept bit for bit; 1 of 8 are wrong", "softmax_sum is not kept bit for bit"),
        ("KeyError: 'w[3]' (k.py:12, in update)", "KeyError: 'w[...]' (k.py:12, in update)"),
        ("ValueError: shapes (4,2) and (3,); see (a; b) (k.py:12, in update)", "ValueError: shapes (...,...) and (...,); see (a; b) (k.py:12, in update)"),
        ("crashed: SIGSEGV (Segmentation fault) (k.py:6, in update)", "crashed: SIGSEGV (Segmentation fault) (k.py:6, in update)"),
        ("wrote beside its output; attn_out[0]: 1.0 and 2.0; 1 of 8 elements differ", "wrote beside its output"),
    ],
    ids=range(7),
)  # fmt: skip
def test_the_cause_of_a_problem(problem, cause):
    assert cause_of(problem) == cause


def test_check_sorts_failures_by_cause(folder, capsys):
    check = ["check", "kernels:Shifted", "--in-process", "--select", "[ld]*[/-][SBDf]*"]
    assert main([*check, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    kept, gone, slight = found["causes"]  # what is only a little off comes last
    assert [cause["cause"] for cause in found["causes"]] == [
        "attn_out is not kept bit for bit", "attn_out is beyond the bound", "attn_out is a little beyond the bound",
    ]  # fmt: skip
    assert gone["ids"] == ["layout/BNSD", "layout/BNSD-attention"] and gone["again"].endswith("--select layout/BNSD")
    assert gone["advice"][0].startswith("known mistake: prev-returned ") and kept["advice"] == ["no known mistake reproduces it"]
    assert slight["advice"] == [
        "rows computed in float32 come this far. If that is intended, declare it: Capabilities(tolerance=3) would cover what is "
        "seen here"
    ]
    failed = [id for cause in found["causes"] for id in cause["ids"]]
    assert sorted(failed) == sorted(failure["id"] for failure in found["failures"])
    assert found["grid"] == {
        "SBH": {"float32": [0, 7, 0]} | {dtype: [0, 0, 2] for dtype in (
            "float16", "float64", "float16-into-float32", "bfloat16-into-float32")},
        "BSND": {"float32": [0, 2, 0]}, "BNSD": {"float32": [0, 2, 0]},
    }  # fmt: skip
    assert main(check) == 1
    out = capsys.readouterr().out
    assert (
        "failed: 2 checks: attn_out is beyond the bound\n    layout/BNSD, layout/BNSD-attention\n    layout/BNSD: attn_out[" in out
    )
    assert "excluded: dtype float16, float64 is not one of float32\n    dtype/float16, " in out
    assert "excluded: it does not merge float16, bfloat16 into float32\n" in out
    assert re.search(r"^float32 +0/7/0 +0/2/0 +0/2/0$", out, re.MULTILINE)


def test_difftest_finds_the_smallest_case_of_each_cause(folder, capsys):
    difftest = ["difftest", "--backends", "kernels:LastBit,numpy", "--in-process", "--cases", "0", "--select", "l*SBH"]
    assert main([*difftest, "--report", "page"]) == 1
    out = capsys.readouterr().out
    table = re.search(r"^last-bit and numpy +4 +(\d) ", out, re.MULTILINE)
    told = re.search(r"last-bit and numpy differ on (\d) of them \((\d) without either being wrong\), last-bit is wrong on 1", out)
    assert table and told and table[1] == told[1] == "4" and told[2] == "3"
    assert out.index("WRONG: last-bit: ") < out.index("WRONG: last-bit and numpy: ")
    assert "1 case like this: attn_out is not kept bit for bit" in out and "3 cases like this: attn_out has other bits" in out
    assert len(re.findall(r"^    smallest failing case: .* N [12], ", out, re.MULTILINE)) == 2
    assert out.splitlines()[-2].startswith("FAILED: ") and out.splitlines()[-1] == "report: page/index.html"
    page = Path("page/index.html").read_text()
    assert "last-bit and numpy: attn_out has other bits: 3 cases: layout/SBH, lanes/8-SBH, lanes/1-SBH" in page
    assert re.search(r"float32 +3/1/0", page)
    assert main([*difftest, "--json"]) == 1
    one, pair = json.loads(capsys.readouterr().out)["findings"]
    assert (one["backend"], one["ids"], pair["cause"]) == ("last-bit", ["lanes/unequal-SBH"], "attn_out has other bits")
    assert one["advice"][0] == "no known mistake reproduces it" and pair["advice"] == []
