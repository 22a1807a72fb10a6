"""Bandwidth of the cuda backend on this GPU, beside a copy, torch eager, torch.compile and FlashInfer's merge_state.

    python examples/bench_cuda.py            a table, and what it was measured on
    python examples/bench_cuda.py --json     one JSON document
    TRITON_INTERPRET=1 python examples/bench_cuda.py --smoke    does it run at all? tiny sizes, on the CPU

Every time is the median of many calls, each after the cache was emptied. A share of 1 means that a merge moves its
bytes (each input read once, each output written once) as fast as a device-to-device copy moves as many.
"""

import argparse
import json
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import torch

import rau

# MindSpeed's sizes, then vLLM's: layout, lengths of the sequences (batched layouts: one length, and B), N, D.
SIZES = [
    ("SBH", [8192], 32, 128), ("SBH", [8192], 64, 128), ("SBH", [32768], 32, 128), ("SBH", [65536], 32, 128),
    ("TND", [256, 512, 640, 1024], 32, 128), ("packed", [256, 512, 640, 1024], 32, 128),
    ("TND", [256], 4, 128), ("TND", [4096], 16, 128), ("TND", [4096], 64, 64), ("TND", [4096], 16, 256),
]  # fmt: skip
SMOKE = [("SBH", [5], 2, 16), ("TND", [3, 4], 2, 64), ("packed", [3, 4], 2, 64)]


def states(layout, lengths, heads, head_dim, dtype, device, count):
    """Random states."""
    tokens = sum(lengths)
    attn, stats = (tokens, heads, head_dim), (tokens, heads, 1)
    if layout == "SBH":
        attn, stats = (tokens, 1, heads * head_dim), (1, heads, tokens, 1)
    made = []
    for _ in range(count):
        maximum, total = torch.randn(stats, device=device), torch.rand(stats, device=device) + 1
        lanes = (part.repeat(*[1] * (len(stats) - 1), 8) for part in (maximum, total))
        made.append(rau.AttentionState(torch.randn(attn, device=device, dtype=torch.float32).to(dtype), *lanes))
    return made


def composite(prev, cur, heads):
    """The update as it is commonly written; statistics in the order of the output's rows."""
    maximum = torch.maximum(prev[1], cur[1])
    a, b = prev[2] * torch.exp(prev[1] - maximum), cur[2] * torch.exp(cur[1] - maximum)
    total = a + b
    rows = [(part / total)[..., :1] for part in (a, b)]
    shape = prev[0].shape
    if len(rows[0].shape) == 4:  # SBH
        rows = [part.permute(2, 0, 1, 3) for part in rows]
    outputs = [part.view(*shape[:2], heads, -1) if len(rows[0].shape) == 4 else part for part in (prev[0], cur[0])]
    merged = outputs[0].float() * rows[0] + outputs[1].float() * rows[1]
    return merged.view(shape).to(prev[0].dtype), maximum, total


def timer(device):
    """Return a function that measures a call, in seconds."""
    if device == "cpu":

        def measure(call):
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return measure
    from triton.testing import do_bench

    return lambda call: do_bench(call, warmup=50, rep=300, quantiles=[0.5]) / 1e3


def compete(layout, lengths, heads, head_dim, dtype, device, measure):
    """Measure one size and dtype; times in seconds by name."""
    prev, cur, out = states(layout, lengths, heads, head_dim, dtype, device, 3)
    options = {"layout": "TND" if layout != "SBH" else "SBH", "profile": "portable", "backend": "cuda"}
    if layout == "packed":
        ends = torch.tensor([0, *lengths], device=device).cumsum(0)
        options |= {"actual_seq_qlen": ends, "softmax_layout": "SBH"}
    result = rau.ring_attention_update(*prev, *cur, out=out, **options)
    expected = rau.ring_attention_update(*prev, *cur, **(options | {"backend": "torch"}))
    calls = {
        "rau": lambda: rau.ring_attention_update(*prev, *cur, out=out, **options),
        "rau, fresh": lambda: rau.ring_attention_update(*prev, *cur, **options),
        "rau, in place": lambda: rau.ring_attention_update(*prev, *cur, out=prev, **options),
    }
    moved = sum(part.nbytes for part in (*prev, *cur, *out))
    source, target = torch.empty(2, moved // 2, dtype=torch.uint8, device=device)
    calls["copy"] = lambda: target.copy_(source)
    if layout != "packed":
        compiled = torch.compile(composite)
        calls["torch eager"] = lambda: composite(prev, cur, heads)
        calls["torch.compile"] = lambda: compiled(prev, cur, heads)
    if layout == "TND" and dtype != torch.float32:
        try:
            from flashinfer import merge_state
        except ImportError:
            pass
        else:
            lse = [(state[1][..., 0] + state[2][..., 0].log()) / 0.6931471805599453 for state in (prev, cur)]
            calls["FlashInfer"] = lambda: merge_state(prev[0], lse[0], cur[0], lse[1])
    return {
        "layout": layout, "lengths": lengths, "heads": heads, "head_dim": head_dim, "dtype": str(dtype)[6:],
        "bytes": moved, "right": all(map(torch.equal, result, expected)),
        "seconds": {name: measure(call) for name, call in calls.items()},
    }  # fmt: skip


def setting(device):
    """What it was measured on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("ring-attention-update", "triton", "flashinfer-python"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    hardware = platform.processor()
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        hardware = f"{found.name}, {found.total_memory >> 30} GiB, capability {found.major}.{found.minor}"
    return {"hardware": hardware, "versions": versions}


def main():
    """Measure, print, and return 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, without a GPU too")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.smoke:
        parser.error("torch finds no CUDA device (--smoke runs on the CPU, under TRITON_INTERPRET=1)")
    measure, report = timer(device), setting(device)
    if not arguments.json:
        print(report["hardware"], *(f"{name} {number}" for name, number in report["versions"].items()), sep="\n")
    report["results"] = []
    for size in SMOKE if arguments.smoke else SIZES:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            torch.compiler.reset()
            one = compete(*size, dtype, device, measure)
            report["results"].append(one)
            if not arguments.json:
                layout, lengths, heads, head_dim = size
                copy, merge = one["seconds"]["copy"], one["seconds"]["rau"]
                speed = f"{one['bytes'] / merge / 1e9:.0f} GB/s, {copy / merge:.2f} of a copy"
                verdict = "" if one["right"] else "  WRONG"
                print(f"\n{layout} {lengths}, N = {heads}, D = {head_dim}, {one['dtype']}: {speed}{verdict}")
                print("  " + ", ".join(f"{name} {seconds * 1e6:.1f} us" for name, seconds in one["seconds"].items()))
    if arguments.json:
        print(json.dumps(report, indent=2))
    return 0 if all(one["right"] for one in report["results"]) else 1


if __name__ == "__main__":
    sys.exit(main())
