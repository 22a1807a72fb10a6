"""python -m rau bench: that it measures what it says, and what it says of mistakes. Nothing here depends on a time."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from command import status

import rau
from rau.__main__ import main
from rau.arrays.memory import aligned
from rau.cli.bench import peers, survey, timing, workload

# One thread: on a machine with other work to do, several wait for each other.
QUICK = ["bench", "--quick", "--threads", "1"]
WITHOUT_CORE = bool(os.environ.get("RAU_EXPECT_NO_CORE"))


def test_as_typed():
    command = [sys.executable, "-m", "rau", *QUICK, "--backends", "numpy"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["numpy"]]
    assert len(rows) == len(survey.QUICK) * len(workload.HOW)
    assert "of roof    time of the roof divided by the call's" in done.stdout


def test_the_document(capsys):
    assert main([*QUICK, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"quick", "groups", "not_run", "threads", "load", "seconds", "interrupted", "configuration"}
    assert document["quick"] is True and document["threads"] == 1 and document["interrupted"] is False
    available = {one["name"]: one["available"] for one in document["configuration"]["backends"]}
    assert {name for name, there in available.items() if not there} == set(document["not_run"])
    assert [group["size"]["heads"] for group in document["groups"]] == [size.heads for size, _, _ in survey.QUICK]
    for group in document["groups"]:
        size = group["size"]
        assert group["bytes"] == traffic(sum(size["lengths"]), size["heads"], size["head_dim"], group["dtype"])
        found = [(row["name"], row["how"]) for row in group["rows"]]
        for name in ("numpy", *(() if WITHOUT_CORE else ("cython",))):
            assert [how for who, how in found if who == name] == list(workload.HOW)
        for row in group["rows"]:
            seconds = row["seconds"]
            assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
            assert row["gigabytes_per_second"] == pytest.approx(group["bytes"] / seconds["median"] / 1e9)


def traffic(tokens: int, heads: int, head_dim: int, dtype: str) -> int:
    """By the rule: 3 D elements and six statistics of 32 bytes, for each token and head."""
    return tokens * heads * (3 * head_dim * {"float32": 4, "float16": 2, "bfloat16": 2}[dtype] + 192)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "size",
    [
        workload.SMALLEST,
        workload.SEQUENCES._replace(lengths=(3, 5)),
        workload.SERVING._replace(lengths=(9,)),
        workload.Size("SBH", (5,), 3, 16, batch=2),
        workload.Size("BSND", (5,), 3, 16, batch=2),
        workload.Size("BNSD", (5,), 3, 16, batch=2),
    ],
    ids=str,
)
def test_bytes_and_arrays(size, dtype):
    prev, cur, out = workload.states(size, dtype, 3)
    assert 3 * size.state_bytes(dtype) == traffic(size.tokens, size.heads, size.head_dim, dtype)
    assert sum(array.nbytes for array in prev) == size.state_bytes(dtype)
    result = rau.ring_attention_update(*prev, *cur, out=out, check="values", **size.options)
    assert result.attn_out is out.attn_out and np.isfinite(out.attn_out.astype(np.float64)).all()


@pytest.mark.parametrize("wait", [True, False])
def test_who_waits_and_where_the_lengths_are(wait):
    """On a device of its own a backend is waited for, or its clock waits; lengths are sent there once, not at every call."""
    from rau.backends.numpy_ import NumPyBackend

    class Watched(NumPyBackend):
        sent, waited = [], 0

        def asarray(self, array):
            self.sent.append(array)
            return array

        def synchronize(self):
            Watched.waited += 1

    size = workload.SEQUENCES._replace(lengths=(3, 5))
    calls = workload.modes(size, Watched(), workload.states(size, "float32", 3), wait=wait)
    assert list(calls) == list(workload.HOW) and [array.tolist() for array in Watched.sent] == [[0, 3, 8]]
    for call in calls.values():
        call()
    assert len(Watched.sent) == 1 and Watched.waited == (3 if wait else 0)


def test_shares_are_of_the_roof_beside(monkeypatch):
    """With times that are made up, every share, rate and ratio is what a second, plainer formula says."""
    times = {
        ("copy", ""): [1.0, 2.0, 3.0],
        ("triad", ""): [2.0, 4.0, 2.0],
        ("in-place triad", ""): [1.0, 1.0, 1.0],
        ("numpy", "out="): [4.0, 5.0, 8.0],
        ("numpy", "fresh"): [8.0, 8.0],
        ("numpy", "in place"): [2.0, 4.0, 5.0],
    }
    monkeypatch.setattr(survey, "interleaved", lambda calls, seconds, least: {key: np.array(times[key]) for key in calls})
    monkeypatch.setattr(survey, "_LEAST_BYTES", 0)
    backend = rau.registry.get("numpy")
    group = survey.measure(workload.SMALLEST, "float32", 0.0, [backend])
    assert {row.how: (row.roof, row.share.median) for row in group.rows} == {
        "out=": ("triad", 0.5),  # of 2/4, 4/5 and 2/8
        "fresh": ("triad", 0.375),  # of 2/8 and 4/8
        "in place": ("in-place triad", 0.25),  # of 1/2, 1/4 and 1/5
    }
    moved = traffic(16, 8, 64, "float32")
    assert {row.how: row.gigabytes_per_second for row in group.rows} == pytest.approx(
        {"out=": moved / 5e9, "fresh": moved / 8e9, "in place": moved / 4e9}
    )
    assert {name: row.gigabytes_per_second for name, row in group.roof.items()} == pytest.approx(
        {"copy": moved * 2 / 3 / 2e9, "triad": moved / 2e9, "in-place triad": moved / 1e9}
    )


def test_interleaved_takes_turns(monkeypatch):
    monkeypatch.setattr(timing, "_TURN", 0.0)
    monkeypatch.setattr(timing, "_PAUSE", 0.0)
    order = []
    found = timing.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0, least=3)
    turns = "".join(order)
    assert turns.startswith("a") and turns.endswith("aabbaabbaabb")  # one untimed, one timed
    assert {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3}
    assert all((times >= 0).all() for times in found.values())


def test_another_clock_says_how_long_it_took(monkeypatch):
    """As on a GPU: the host's time plays no part, and every call is made under the clock."""
    monkeypatch.setattr(timing, "_PAUSE", 0.0)

    def clock(call, repeats):
        return sum(call() for _ in range(repeats))

    found = timing.interleaved({"a": lambda: 1.0, "b": lambda: 1e-4}, 0.0, least=2, clock=clock)
    assert {name: times.tolist() for name, times in found.items()} == {"a": [1.0] * 2, "b": pytest.approx([1e-4] * 2)}


def test_ratio_is_by_the_rounds_of_both():
    assert timing.ratio(np.array([1.0, 2.0, 9.0, 9.0]), np.array([2.0, 2.0])) == (0.75, 0.625, 0.875)


@pytest.mark.skipif(WITHOUT_CORE, reason="needs the compiled core")
@pytest.mark.parametrize("length", [1, 15, 16, 17, 1000])
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("runs", [1, 4])
def test_the_cores_roof_computes_what_it_says(threads, around, length, runs):
    roof = importlib.import_module("rau._core").roof
    whole = [np.resize(array, (runs, length // 16 * 16 + 32)) for array in (np.arange(5000, dtype=np.float32), 3, 8, -1)]
    places = [aligned(array.shape, np.float32) for array in whole]
    for place, array in zip(places, whole, strict=True):
        place[...] = array
    a, b, c, to = (place[:, :length] for place in places)
    roof(to, (a, b), around, threads)
    np.testing.assert_array_equal(to, a + 1.5)
    roof(to, (b,), around, threads)
    np.testing.assert_array_equal(to, b)
    roof(to, (a, b, c), around, threads)
    np.testing.assert_array_equal(to, a + 5.5)
    roof(to, (a, *[b] * 15), around, threads)
    np.testing.assert_array_equal(to, a + 22.5)
    roof(a, (a, b), around, threads)
    np.testing.assert_array_equal(a, whole[0][:, :length] + 1.5)
    for place, array in zip(places, whole, strict=True):  # between the runs
        np.testing.assert_array_equal(place[:, length:], array[:, length:])


@pytest.mark.skipif(WITHOUT_CORE, reason="needs the compiled core")
def test_what_the_cores_roof_does_not_take():
    roof = importlib.import_module("rau._core").roof
    a, b, to = (aligned((3, 64), np.float32) for _ in range(3))
    apart = aligned((3, 80), np.float32)[:, :64]
    kept, swapped = to.view(), to.view(to.dtype.newbyteorder())
    kept.flags.writeable = False
    for wrong in ((to[:, 1:3], (a[:, :2], b[:, :2])), (to, ()), (to, (a,) * 17), (to[:, ::2], (a[:, ::2],)), (to[:, :3].T, (a[:, :3].T,)),
                  *((one, (a, b)) for one in (kept, swapped, to[0], to[None], to.view(np.int32)))):  # fmt: skip
        with pytest.raises(ValueError, match="expected 1 to 16 arrays, and contiguous runs of `to`, float32, aligned to 64 bytes"):
            roof(*wrong, True, 1)
    good = a[:, :2]
    for wrong in (a[:, :3], b[:2, :2], apart[:, :2], b[:, :4:2], b[0, :2], b[:, :2].view(np.int32), b[:, :2].view(swapped.dtype), None):
        with pytest.raises(ValueError, match="expected arrays of 3 runs of 2 elements, 256 bytes apart, as `to` has"):
            roof(to[:, :2], (good, wrong), True, 1)


def test_a_roof_without_the_core(monkeypatch):
    monkeypatch.setitem(sys.modules, "rau._core", None)
    roof = timing.Roof(1000)
    assert roof.origin == "NumPy's copyto and add, in one thread: the compiled core is missing"
    assert list(roof.calls) == ["copy", "triad", "in-place triad"]
    for call in roof.calls.values():
        call()
    assert [roof.moved(name) for name in roof.calls] == [2000, 3000, 3000]


def test_threads_are_given_back():
    before = rau.get_num_threads()
    with timing.thread_count(before + 1) as number:
        assert rau.get_num_threads() == number == before + 1
    with timing.thread_count(None) as number:
        assert number == before
    assert rau.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backends", "nump"], 'Did you mean "numpy"?'),
        (["--backends", "no_such_module:Mine"], "no_such_module"),
        (["--threads", "0"], "argument --threads: got '0'; expected a whole number, 1 or more"),
        (["--threads", "100000"], "n = 100000; expected an int from 1"),
        (["--targets"], "unrecognized arguments: --targets"),
    ],
)
@pytest.mark.parametrize("json_too", [[], ["--json"]])
def test_wrong_usage(options, message, json_too, capsys):
    assert status([*QUICK, *options, *json_too]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err


def test_peers_without_torch(monkeypatch, capsys):
    def refuse(self, compiled):
        raise ImportError("No module named 'torch'")

    monkeypatch.setattr(peers.Peers, "__init__", refuse)
    assert main([*QUICK, "--backends", "numpy", "--peers", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert "torch composites" in document["not_run"] and document["groups"][0]["peers"] == []


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("size", [workload.SMALLEST, workload.SERVING._replace(lengths=(7,))], ids=str)
def test_composites_merge(size, dtype):
    """A ratio to something that computes something else would be worth nothing."""
    torch = pytest.importorskip("torch")
    composites = peers.Peers(compiled=False)
    prev, cur = map(composites.tensors, workload.states(size, dtype, 2))
    expected = rau.ring_attention_update(*prev, *cur, **size.options)
    tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    for call in composites.calls(size, prev, cur).values():
        for array, its in zip(call(), expected, strict=True):
            assert array.dtype == its.dtype
            torch.testing.assert_close(array, its, rtol=tolerance, atol=tolerance)


def test_peers_are_compared_with_the_core(capsys):
    pytest.importorskip("torch")
    assert main([*QUICK, "--backends", "numpy", "--peers", "--json"]) == 0
    packed, smallest = json.loads(capsys.readouterr().out)["groups"]
    assert packed["peers"] == [] and "torch composites" in packed["not_run"]
    assert [row["name"] for row in smallest["peers"]] == [peers.EAGER, peers.WRITTEN]
    assert all(set(row["slower"]) == set(workload.HOW) and smallest["reference"] == "numpy" for row in smallest["peers"])


def test_bfloat16_without_ml_dtypes(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    monkeypatch.setattr(survey, "QUICK", ((workload.SMALLEST, "bfloat16", 0.0), (workload.SMALLEST, "float32", 0.0)))
    assert main([*QUICK, "--backends", "numpy", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    reason = "bfloat16 NumPy arrays need ml_dtypes: pip install ml_dtypes"
    assert document["not_run"] == {f"{workload.SMALLEST}, bfloat16": reason}
    assert [group["dtype"] for group in document["groups"]] == ["float32"]


def test_the_parser_costs_nothing():
    code = (
        "import sys, argparse; from rau.cli import bench;"
        "bench.add_parser(argparse.ArgumentParser().add_subparsers());"
        "assert not {'rich', 'rau.testing', 'rau.cli.bench.survey', 'ml_dtypes', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("json_too", [True, False])
def test_what_was_measured_before_an_interruption_is_kept(json_too, monkeypatch, capsys):
    whole = survey.survey

    def interrupted(*arguments):
        yield next(whole(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(survey, "survey", interrupted)
    assert main([*QUICK, "--backend", "numpy", *["--json"] * json_too]) == 130
    out = capsys.readouterr().out
    if json_too:
        document = json.loads(out)
        assert document["interrupted"] is True and len(document["groups"]) == 1
    else:
        assert "INTERRUPTED: 1 of 2 sizes measured" in out.splitlines()[-1] and "of roof" in out


def test_a_table_for_a_paper(capsys):
    assert main([*QUICK, "--backends", "numpy", "--csv"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header == "size,dtype,call,how,seconds,low quartile,high quartile,GB/s,of roof"
    assert len(rows) >= 6 and all(row.count(",") >= 8 for row in rows) and any(",numpy,out=," in row for row in rows)
