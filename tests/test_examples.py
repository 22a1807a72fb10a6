"""The examples: rings of local ranks against attention in one process, lost ranks, split keys, the cost model."""

import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from patience import LIMIT

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
FAULTS = Path(__file__).with_name("ring_with_faults.py")
SMALL = ["--tokens", "512", "--heads", "2", "--head-dim", "32"]

if "torch" in os.environ.get("RAU_TEST_BACKENDS", ""):
    import torch  # noqa: F401  asked for: its absence is a failure
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed and was not asked for"
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _examples_import_one_another(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "RAU_BACKEND")}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def run(*command, **more):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=LIMIT, env=environment(**more)
    )
    return done.returncode, done.stdout, done.stderr


def torchrun(ranks, script, *arguments):
    return run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, script, *arguments)


def imported(name):
    return importlib.import_module(name)


# ---- the ring -------------------------------------------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, ["--causal", "--batch", "2"]),
        (2, ["--layout", "TND", "--dtype", "bfloat16"]),
        (2, ["--causal", "--layout", "TND", "--sequences", "1", "--dtype", "float16"]),
        (4, ["--batch", "2", "--dtype", "bfloat16"]),
        (4, ["--causal", "--layout", "TND"]),
        (4, ["--causal", "--dtype", "bfloat16"]),
    ],
    ids=lambda value: "-".join(map(str, value)).replace("--", "") if isinstance(value, list) else None,
)
def test_a_ring_agrees_with_one_process(ranks, options):
    status, shown, errors = torchrun(ranks, EXAMPLES / "ring_attention.py", *SMALL, *options, "--json")
    assert status == 0, errors
    document = json.loads(shown)
    assert set(document["results"]) == {"attn_out", "dq", "dk", "dv"}
    for name, found in document["results"].items():
        assert found["right"] and 0 < found["share"] <= 1 and 0 < found["ratio"] <= 2, (name, found)
    assert len(document["ranks"]) == ranks
    for cost in document["ranks"]:
        for phase in ("forward", "backward"):
            seconds = cost[phase]
            assert 0 < seconds["attention"] + seconds["communication"] + seconds.get("merge", 0) <= seconds["total"]
        assert cost["memory"] >= 0


@needs_torch
def test_the_table_and_a_ring_of_one():
    command = "    torchrun --standalone --nproc-per-node 4 examples/ring_attention.py --causal\n"
    assert command in (EXAMPLES / "ring_attention.py").read_text()  # run above, with fewer tokens
    status, shown, errors = run(EXAMPLES / "ring_attention.py", *SMALL, "--causal")
    assert (status, errors) == (0, "")
    for word in ("1 ranks on cpu", "attention", "communication", "merge", "memory", "attn_out", "dq", "dk", "dv"):
        assert word in shown


@needs_torch
@pytest.mark.parametrize("fault", ["mask", "gradient"])
def test_a_ring_that_is_wrong_is_found_out(fault):
    status, shown, errors = torchrun(2, FAULTS, fault, *SMALL, "--causal", "--dtype", "bfloat16")
    assert status == 1
    wrong = [line for line in errors.splitlines() if line.startswith("WRONG: ")]
    assert len(wrong) == 1 and ("dk" if fault == "gradient" else "attn_out") in wrong[0], errors
    assert "rms error" in shown  # the table is printed all the same


@needs_torch
def test_the_bytes_are_those_of_the_model(tmp_path):
    ring_cost = imported("ring_cost")
    ranks, options = 4, ["--causal", "--dtype", "bfloat16"]
    status, shown, errors = torchrun(ranks, FAULTS, "count", tmp_path, *SMALL, *options, "--json")
    assert status == 0, errors
    ring = ring_cost.Ring(ranks, 512, 2, 2, 32, 2, causal=True)
    for rank, cost in enumerate(json.loads(shown)["ranks"]):
        assert (cost["forward"]["sent"], cost["backward"]["sent"]) == ring_cost.sent_bytes(ring)
        counted = json.loads((tmp_path / f"{rank}.json").read_text())
        assert counted["sent"] == 2 * sum(ring_cost.sent_bytes(ring))  # the example goes round twice
        assert counted["merge"] == 2 * ring_cost.merge_bytes(ring, rank)


# ---- wrong arguments, lost ranks ------------------------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "1022"], "--tokens: 1022 is not a multiple of 4, twice the number of ranks"),
        (["--dtype", "float63"], "--dtype: invalid choice: 'float63'"),
        (["--layout", "TND", "--tokens", "64", "--sequences", "17"], "--sequences: 64 tokens make at most 16"),
        (["--heads", "0"], "--heads: must be positive"),
    ],
)
def test_wrong_arguments(arguments, said):
    status, shown, errors = run(EXAMPLES / "ring_attention.py", *arguments, RANK="0", WORLD_SIZE="2")
    assert (status, shown) == (2, "")
    assert errors.count("\n") == 1 and errors.startswith("ring_attention.py: error: argument ") and said in errors


@needs_torch
def test_the_other_ranks_leave_the_error_to_rank_0():
    assert run(EXAMPLES / "ring_attention.py", "--tokens", "1022", RANK="1", WORLD_SIZE="2") == (2, "", "")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@needs_torch
@pytest.mark.parametrize("fault", ["dies", "dies-backward", "hangs"])
def test_when_a_rank_is_lost_the_others_say_so_and_end(fault):
    # Without torchrun, which would end the others itself: each finds out on its own.
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "3"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(FAULTS), fault, *SMALL, "--tokens", "510", "--timeout", str(LIMIT / 30)],
            env=environment(**where, RANK=str(rank)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    try:
        for rank in (0, 2):
            shown, errors = ranks[rank].communicate(timeout=LIMIT)
            assert ranks[rank].returncode == 1, errors
            start_of_line = f"ring_attention: rank {rank} of 3: a rank is lost or too slow, "
            said = [line for line in errors.splitlines() if line.startswith(start_of_line)]
            assert len(said) == 1 and "Traceback" not in errors, errors
            assert shown == ""
    finally:
        if ranks[1].poll() is None:
            ranks[1].send_signal(signal.SIGKILL)
        ranks[1].communicate()
    assert ranks[1].returncode == (-signal.SIGKILL if fault == "hangs" else 7)


@needs_torch
def test_torchrun_ends_a_ring_that_lost_a_rank():
    status, _, errors = torchrun(2, FAULTS, "dies", *SMALL)
    assert status == 1
    assert "exitcode  : 7" in errors and "rank      : 1" in errors


# ---- what they are checked against ----------------------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize("causal", [False, True])
def test_exact_attention_is_torchs_in_float64(causal):
    import torch

    exact = imported("exact_attention").exact
    q, k, v, dout = torch.randn(4, 2, 3, 40, 8, dtype=torch.float64, generator=torch.manual_seed(0))
    leaves = [each.clone().requires_grad_() for each in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal)
    expected = [out, *torch.autograd.grad(out, leaves, dout)]
    lse, results, sizes = exact(q, k, v, dout, causal)
    for result, size, right in zip(results, sizes, expected, strict=True):
        assert torch.allclose(result, right, rtol=0, atol=1e-13)
        assert (size >= result.abs() - 1e-13).all()
    rows = torch.einsum("bnqd,bnkd->bnqk", q, k) * 8**-0.5
    if causal:
        rows = rows.masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), -torch.inf)
    assert torch.allclose(lse, rows.logsumexp(-1), rtol=0, atol=1e-13)


@needs_torch
def test_exact_attention_in_slabs(monkeypatch):
    import torch

    exact_attention = imported("exact_attention")
    tensors = torch.randn(4, 1, 2, 24, 8, generator=torch.manual_seed(0))
    whole = exact_attention.exact(*tensors, causal=True)
    monkeypatch.setattr(exact_attention, "SCORES", 2 * 24 * 5)  # slabs of 5, 5, 5, 5 and 4 queries
    for parts, right in zip(exact_attention.exact(*tensors, causal=True), whole, strict=True):
        for part, one in zip(parts, right, strict=True):
            assert torch.allclose(part, one, rtol=0, atol=1e-13)


# ---- split keys -----------------------------------------------------------------------------------------------------


@needs_torch
def test_split_kv_decode_as_its_docstring_says():
    assert "    python examples/split_kv_decode.py\n" in (EXAMPLES / "split_kv_decode.py").read_text()
    status, shown, errors = run(EXAMPLES / "split_kv_decode.py")
    assert (status, errors) == (0, "")
    rows = [line.split() for line in shown.splitlines()[3:]]
    assert [row[0] for row in rows] == ["1", "2", "4", "16", "64"] and rows[0][-1] == "1.00"


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_split_kv_decode_in_uneven_parts(dtype, monkeypatch, capsys):
    arguments = ["--dtype", dtype, "--tokens", "509", "--parts", "3", "7", "--queries", "4", "--batch", "2"]
    monkeypatch.setattr(sys, "argv", ["split_kv_decode.py", *arguments])
    assert imported("split_kv_decode").main() == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


@needs_torch
def test_split_kv_decode_finds_a_wrong_merge(monkeypatch):
    example = imported("split_kv_decode")
    monkeypatch.setattr(sys, "argv", ["split_kv_decode.py", "--tokens", "500", "--parts", "1", "10"])
    right = example.partial_states
    monkeypatch.setattr(example, "partial_states", lambda *cut: right(*cut)[: max(1, cut[-1] - 1)])  # the last is lost
    assert example.main() == 1


@needs_torch
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "0"], "--parts: each must be from 1 to the number of tokens, 32768"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--tokens", "-1"], "--tokens: must be positive"),
    ],
)
def test_split_kv_decode_refuses(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["split_kv_decode.py", *arguments])
    with pytest.raises(SystemExit) as refused:
        imported("split_kv_decode").main()
    assert refused.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@needs_torch
def test_the_benchmark_of_a_gpu_runs_without_one(tmp_path):
    status, shown, errors = run(EXAMPLES / "bench_cuda.py", "--smoke", str(tmp_path / "records"), TRITON_INTERPRET="1")
    assert (status, errors) == (0, ""), shown
    assert "FlashInfer's kernel is NOT MEASURED" in shown and "vLLM's kernel is NOT MEASURED" in shown
    records = [json.loads(line) for line in (tmp_path / "records").read_text().splitlines()]
    values = [record for record in records if record["kind"] == "values"]
    assert len(values) == 3 and not any(record["differences"] for record in values)
    contenders = {}
    for record in records:
        if record["kind"] == "time":
            contenders.setdefault((record["size"], record["K"]), []).append(record["who"])
            assert record["seconds"] > 0 and (record["who"] != "copy" or record["of_a_copy"]["median"] == 1)
    ours = ["rau, out=", "rau, in place", "rau, 1 lane, out=", "copy"]
    pair = [*ours, "addition", "torch eager"]
    assert list(contenders.values()) == [pair, pair, pair[:-1], ours]
    assert {record["who"] for record in records if record["kind"] == "host"} >= {"rau, out=", "rau, fresh"}


@needs_torch
def test_the_benchmark_of_a_gpu_says_where_bits_differ(capsys):
    bench_cuda = imported("bench_cuda")
    bench = bench_cuda.Bench(io.StringIO(), smoke=True)
    bench.say("values", size="SBH", dtype="float32", differences=["attn_out: element (0,): 1.0 and 2.0"])
    assert not bench.summary() and "WRONG" in capsys.readouterr().out


@needs_torch
def test_the_benchmark_of_a_gpu_refuses_to_run_without_one(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_cuda.py"])
    with pytest.raises(SystemExit) as refused:
        imported("bench_cuda").main()
    assert refused.value.code == 2 and "torch finds no CUDA device (--smoke runs on the CPU" in capsys.readouterr().err


# ---- the model ------------------------------------------------------------------------------------------------------


def test_the_tables_of_the_model_are_those_of_its_page():
    status, shown, errors = run(EXAMPLES / "ring_cost.py")
    assert (status, errors) == (0, "")
    page = (ROOT / "docs" / "scaling.md").read_text()
    rings, merges = shown.split("\nA merge of one state ")
    assert f"```text\n{rings}```\n" in page and f"```text\nA merge of one state {merges}```\n" in page


def test_the_model_by_hand():
    ring_cost = imported("ring_cost")
    # 2 ranks of 8 tokens, 1 head, D = 4, 16 bits: keys and values are 2 * 8 * 4 * 2 = 128 bytes, their gradients 256.
    ring = ring_cost.Ring(2, 16, 1, 1, 4, 2, causal=False)
    assert (ring_cost.kv_bytes(ring), ring_cost.dkv_bytes(ring)) == (128, 256)
    assert ring_cost.sent_bytes(ring) == (128, 128 + 2 * 256)
    # A row of a partial has 4 * 2 + 8 bytes, of the running state 4 * 4 + 8, read and written.
    assert ring_cost.update_bytes(ring) == 8 * (16 + 2 * 24) == 512
    assert ring_cost.merge_bytes(ring, 0) == ring_cost.merge_bytes(ring, 1) == 1024
    causal = ring._replace(causal=True)
    assert [ring_cost.merge_bytes(causal, rank) for rank in (0, 1)] == [512 + 256, 1024]
    assert ring_cost.attention_flops(ring) == (4 * 64 * 4, 10 * 64 * 4)
    rates = ring_cost.Rates(forward=1024, backward=2560, merge=2048, network=64, message=1, call=0.25)
    forward, backward = ring_cost.predict(ring, rates)  # a step takes 1 s, keys and values 1 + 2 s, gradients 1 + 4 s
    assert forward == (2, 3 - 1.5, 1)  # an update takes 0.25 + 0.25 s; a step hides 1.5 s of the one message
    # Backward: keys and values in the first step, 2 s exposed; gradients in the second, 4 s; and home, 5 s.
    assert backward == (2, 2 + 4 + 5, 0)
    assert ring_cost.predict(ring._replace(ranks=1), rates)[0].exposed == 0


@needs_torch
def test_the_model_against_a_ring(capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    imported("ring_cost").compare(tokens=256, repeats=1, sizes=(2,), masks=(True,))
    compared, large = capfd.readouterr().out.split("\nRates with 2 ranks: ")
    rows = [line.split() for line in compared.splitlines()[3:]]
    assert [row[:3] for row in rows] == [["causal", "predicted", "2"], ["causal", "measured", "2"]]
    assert len(large.splitlines()) == 4 + len(imported("ring_cost").SIZES)
    assert all(float(cell) >= 0 for row in rows for cell in row[3:])


@needs_torch
def test_the_model_refuses(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ring_cost.py", "--measure", "--tokens", "12"])
    with pytest.raises(SystemExit) as refused:
        imported("ring_cost").main()
    assert refused.value.code == 2 and "multiple of 8" in capsys.readouterr().err
