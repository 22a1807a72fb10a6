"""show_config, and ``python -m rau info``: what is there, what is missing, and that it never fails."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from patience import LIMIT

import rau
from plugins import install
from rau import config, registry
from rau.backends.cython_ import missing
from rau.errors import shown


def info(*options, path="", **env):
    """Run the command in an interpreter of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAU_", "OMP_"))}
    if path:
        kept["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [kept.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "rau", "info", *options]
    done = subprocess.run(command, capture_output=True, timeout=LIMIT, env=kept | env)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def document(**env):
    return json.loads(info("--json", **env))


def test_the_document():
    found = document()
    assert set(found) == {"versions", "platform", "core", "threads", "backends", "choice", "environment"}
    assert found["versions"]["numpy"] == np.__version__
    assert {"name", "available", "state", "reason", "origin"} == set(found["backends"][0])
    assert [one["name"] for one in found["backends"]][:2] == ["cython", "numpy"]
    assert found["choice"] == {"backend": "cython" if found["core"]["compiled"] else "numpy", "origin": "automatic"}
    assert found["environment"] == {}
    if found["core"]["compiled"]:
        assert found["core"]["simd"] in found["core"]["simd_versions"]
        assert {"compiler", "flags", "openmp"} < set(found["core"])


def test_the_text():
    text = info()
    for line in ("versions: rau ", "platform: ", "compiled core: ", "threads: ", "backends:", "NumPy arrays run on: "):
        assert f"\n{line}" in f"\n{text}"
    assert "environment variables set: no RAU_*" in text


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RAU_BACKEND": "cythn"},
         "no backend is called 'cythn' (asked for by RAU_BACKEND); the known ones are"),
        ({"RAU_BACKEND": "numpy", "RAU_BLOCK": "numpy"},
         'backend "numpy" is not available (asked for by RAU_BACKEND): RAU_BLOCK = \'numpy\' names it'),
        ({"RAU_BACKEND": "\udcff"}, "no backend is called '\\udcff' (asked for by RAU_BACKEND)"),
    ],
)  # fmt: skip
def test_a_bad_backend(env, says):
    found = document(**env)
    assert (found["choice"]["backend"], found["choice"]["origin"]) == (env["RAU_BACKEND"], "RAU_BACKEND")
    assert found["choice"]["error"].startswith(says)
    assert found["environment"]["RAU_BACKEND"] == {
        "value": env["RAU_BACKEND"],
        "note": config.ENVIRONMENT["RAU_BACKEND"],
    }
    text = info(**env)
    assert f"but calls fail: {says}" in text


def test_a_backend_for_other_arrays(tmp_path):
    text = (
        "from rau.backends import Backend, Capabilities\n"
        "class Other(Backend):\n    name, capabilities = 'other', Capabilities(array_types=('other:Array',))\n"
    )
    install(tmp_path, "other-plugin", {"other": "rau_other:Other"}, rau_other=text)
    assert 'but calls fail: backend "other" takes no NumPy arrays' in info(path=tmp_path, RAU_BACKEND="other")
    assert "other" in info(path=tmp_path)


@pytest.mark.parametrize("text", ["raise SystemExit(3)", "import nothing_of_the_kind", "def"])
def test_a_broken_plugin(tmp_path, text):
    install(tmp_path, "bad-plugin", {"bad": "rau_bad:Bad"}, rau_bad=text)
    found = json.loads(info("--json", path=tmp_path))
    bad = next(one for one in found["backends"] if one["name"] == "bad")
    assert (bad["available"], bad["origin"]) == (False, "bad-plugin")
    assert "bad" in info(path=tmp_path)


def test_variables_and_their_typos():
    env = {"RAU_BLCK": "x", "RAU_ZEBRA": "", "RAU_BLOCK": "cythn, cython", "RAU_SIMD": "avx3"}
    found = document(**env)["environment"]
    assert {name: one["value"] for name, one in found.items()} == env
    assert found["RAU_BLCK"]["note"] == 'rau reads no such variable; did you mean "RAU_BLOCK"?'
    assert found["RAU_ZEBRA"]["note"] == "rau reads no such variable"
    assert found["RAU_BLOCK"]["note"] == f"{config.ENVIRONMENT['RAU_BLOCK']}; no backend is called cythn"
    text = info(**env)
    for name, one in found.items():
        assert f"\n  {name}={one['value']}: {one['note']}" in text


@pytest.mark.parametrize(
    ("value", "number", "origin"),
    [
        ("3", 3, "OMP_NUM_THREADS"),
        ("2,1", 2, "OMP_NUM_THREADS"),
        *[(bad, None, f"the CPUs this process may use, since OMP_NUM_THREADS = {bad!r} is not a number from 1 to 1024")
          for bad in ("abc", "0", "-1", "1.5", "1025")],
        ("9" * 5000, None, f"the CPUs this process may use, since OMP_NUM_THREADS = {shown('9' * 5000)} is not a number from 1 to 1024"),
        ("", None, "the CPUs this process may use"),
    ],
)  # fmt: skip
def test_threads_of_the_environment(value, number, origin):
    code = (
        "from rau.threads import *; from rau.threads import threads_origin; print(get_num_threads(), threads_origin())"
    )
    env = {**os.environ, "OMP_NUM_THREADS": value}
    # libgomp itself may complain about the value, on stderr.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, env=env)
    got, said = done.stdout.strip().split(" ", 1)
    assert int(got) == (number or min(len(os.sched_getaffinity(0)), 1024))
    assert said == origin


def test_threads_are_as_many_as_the_cpus_at_hand():
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); import rau; print(rau.get_num_threads())"
    )
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, env=env)
    assert done.stdout.strip() == "1", done.stderr


def test_an_instruction_set_that_is_not_there():
    found = document(RAU_SIMD="avx3")
    if not found["core"]["compiled"]:
        pytest.skip("RAU_SIMD is the compiled core's")
    cython = found["backends"][0]
    assert not cython["available"]
    assert cython["reason"].startswith("RAU_SIMD = 'avx3': no version 'avx3'; this processor and build have baseline")
    assert found["choice"]["backend"] == "numpy"


def test_without_the_core(monkeypatch):
    monkeypatch.setitem(sys.modules, "rau._core", None)
    monkeypatch.delattr(rau, "_core", raising=False)
    registry.refresh()
    try:
        found = config.collect()
        assert not found["core"]["compiled"]
        assert found["core"]["missing"].startswith("the compiled core rau._core is missing")
        assert (
            found["core"]["cost"] == "the numpy backend runs instead: the same bits, several times slower, on one thread"
        )
        text = config.render(found)
        assert "\ncompiled core: no\n  missing: the compiled core" in text
        assert "\n  cost: the numpy backend runs instead" in text
        assert missing(ImportError()).partition(" [")[0] in text
    finally:
        monkeypatch.undo()
        registry.refresh()


def test_show_config(capsys, monkeypatch):
    monkeypatch.delenv("RAU_BACKEND", raising=False)
    assert rau.show_config() is None
    printed = capsys.readouterr().out
    assert printed == config.render(rau.show_config("dicts")) + "\n"
    assert json.loads(json.dumps(rau.show_config("dicts"))) == config.collect()
    for mode in ("dict", None, np.zeros(2)):
        with pytest.raises(
            rau.OptionError, match=r"^show_config: \[mode\] mode = .*; expected one of \"stdout\", \"dicts\""
        ):
            rau.show_config(mode)


def test_text_for_a_terminal_that_shows_ascii_only():
    text = info(RAU_BLOCK="café", PYTHONIOENCODING="ascii")
    assert "RAU_BLOCK=caf\\xe9" in text


def test_the_version(monkeypatch):
    from importlib import metadata

    try:
        assert rau.__version__ == metadata.version("ring-attention-update")
    except metadata.PackageNotFoundError:
        assert rau.__version__ == "0+unknown"

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert rau.__version__ == "0+unknown"
    assert config.collect()["versions"]["rau"] == "not installed: running from a source tree"


def test_wrong_usage_of_the_command_line():
    for arguments in ([], ["inof"], ["info", "--jsn"]):
        done = subprocess.run([sys.executable, "-m", "rau", *arguments], capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 2
        assert done.stdout == ""
        assert "usage: python -m rau" in done.stderr


def test_the_processor_is_named(monkeypatch, tmp_path):
    told = tmp_path / "cpuinfo"
    told.write_text("processor\t: 0\nmodel name\t: A CPU: fast\nprocessor\t: 1\nmodel name\t: another\n")
    real = open
    monkeypatch.setattr("builtins.open", lambda name, *a, **k: real(told if name == "/proc/cpuinfo" else name, *a, **k))
    assert config.collect()["platform"].endswith(f", {os.cpu_count()} CPUs, A CPU: fast")
    told.unlink()
    monkeypatch.setattr(config.platform, "processor", lambda: "")
    assert config.collect()["platform"].endswith(" CPUs")
