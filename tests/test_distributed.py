"""Merges and rings over the ranks of torch.distributed, in a few processes: bits, bounds, bytes, and ranks that are lost."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pages import blocks
from patience import LIMIT

import rau

ROOT = Path(__file__).parents[1]
CHECKS = Path(__file__).with_name("distributed_checks.py")

if "torch" in os.environ.get("RAU_TEST_BACKENDS", ""):
    import torch  # noqa: F401  asked for: its absence is a failure
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed and was not asked for"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def environment():
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "RAU_BACKEND")}
    return {**kept, "OMP_NUM_THREADS": "1"}


def test_four_ranks(tmp_path):
    """All checks in one go, since starting a process costs more than they do."""
    ranks = [
        subprocess.Popen(
            [sys.executable, CHECKS, str(rank), "4", tmp_path], env=environment(), stderr=subprocess.PIPE, text=True
        )
        for rank in range(4)
    ]
    try:
        errors = [rank.communicate(timeout=LIMIT)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, -signal.SIGKILL, 0, 0], errors  # that of rank 1 is one of the checks
    names = re.findall(r"^@check\ndef (\w+)", CHECKS.read_text(encoding="utf-8"), re.M)
    assert len(names) == 14
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    wrong = [f"rank {rank}, {name}: {text}" for rank, each in enumerate(found) for name, text in each.items() if text]
    assert not wrong, "\n".join(wrong)
    assert [list(each) for each in found] == [names, names[:-1], names, names]


def test_torchrun_shows_the_three_statements_about_bits():
    script = ROOT / "examples" / "bits_across_ranks.py"
    command = "    torchrun --standalone --nproc-per-node 4 examples/bits_across_ranks.py\n"
    assert command in script.read_text(encoding="utf-8")
    shown = []
    for ranks in (1, 2, 4):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), script]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        assert [line[0] for line in lines] == ["merge", "tree", "ring"]
        shown.append([line[1] for line in lines])
        assert all(0 < float(line[2]) <= 1 for line in lines[1:])
    assert len({merge for merge, _, _ in shown}) == 1  # however the states are spread
    assert len({ring for _, _, ring in shown}) == 3  # a digest of something: that two runs agree, the script has seen to


@pytest.mark.parametrize("section", blocks("scaling.md"))
def test_the_code_of_the_page_runs(section, capsys):
    exec(compile(blocks("scaling.md")[section], f"docs/scaling.md, {section}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


@pytest.fixture
def alone():
    """A group of this process."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("ends", [[0], [0, 0], None])
def test_a_ring_of_no_tokens(alone, ends):
    import torch

    q, k, v = (torch.zeros(0, 2, 8, requires_grad=True) for _ in range(3))
    out, lse = rau.distributed.ring_attention(q, k, v, layout="TND", actual_seq_qlen=ends)
    out.sum().backward()
    assert out.shape == (0, 2, 8) and lse.shape == (0, 2) and q.grad.shape == k.grad.shape == v.grad.shape == (0, 2, 8)


def test_a_sink_that_is_none_has_no_gradient_from_rows_without_keys(alone):
    import torch

    q, keys = torch.ones(1, 2, 3, 8), torch.ones(1, 2, 0, 8)
    sink = torch.tensor([-torch.inf, 0.0], requires_grad=True)
    out, lse = rau.distributed.ring_attention(q, keys, keys, sink=sink)
    out.sum().backward()
    assert not out.any() and lse[0, :, 0].tolist() == [-torch.inf, 0.0]
    assert sink.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("returned", [lambda out, lse: out, lambda out, lse: (out,), lambda out, lse: None])
def test_a_kernel_that_returns_no_pair(alone, returned):
    import torch

    q = torch.ones(1, 2, 3, 8)
    forward = lambda q, k, v, causal: returned(q, q[..., 0])  # noqa: E731
    with pytest.raises(rau.ConstraintError, match="ring_attention: .attention. what forward returned is .*begins with .out, lse"):
        rau.distributed.ring_attention(q, q, q, forward=forward, backward=lambda *_: None)


def test_without_a_group():
    with pytest.raises(rau.OptionError, match=r"merge: \[group\] torch.distributed is not initialised; call torch."):
        rau.distributed.merge([])
