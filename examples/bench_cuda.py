"""Bandwidth of the cuda backend on this GPU, beside a copy, torch eager, torch.compile and FlashInfer's merge_state.

    python examples/bench_cuda.py            a table, and what it was measured on
    python examples/bench_cuda.py --json     one JSON document
    TRITON_INTERPRET=1 python examples/bench_cuda.py --smoke    does it run at all? tiny sizes, on the CPU

Sizes, states, composites and timer are those of `python -m rau bench`: everything runs in turn, a time is the median of the
rounds, a share that of the two times of a round. Times are the GPU's own, each call after the cache was emptied. A share of
1 means that a merge moves its bytes (each input read once, each output written once) as fast as a device-to-device copy
moves as many.
"""

import argparse
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch

import rau
from rau.cli import session
from rau.cli.bench.peers import Peers
from rau.cli.bench.timing import interleaved, on_host, ratio
from rau.cli.bench.workload import LARGE, SEQUENCES, SERVING, Size, modes, states

SIZES = [
    LARGE, LARGE._replace(heads=64), LARGE._replace(lengths=(32768,)), LARGE._replace(lengths=(65536,)),
    SEQUENCES._replace(softmax_layout="TND"), SEQUENCES,
    Size("TND", (256,), 4, 128), SERVING, SERVING._replace(heads=64, head_dim=64), SERVING._replace(head_dim=256),
]  # fmt: skip
SMOKE = [Size("SBH", (5,), 2, 16), Size("TND", (3, 4), 2, 64), Size("TND", (3, 4), 2, 64, "SBH")]
SECONDS = 0.3  # of measuring each call


def on_gpu(call, repeats):
    """Seconds that some calls take on the GPU, each after the cache was emptied."""
    cache = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    milliseconds = 0.0
    for _ in range(repeats):
        cache.zero_()  # takes longer than starting the call does: the GPU never waits for it
        start.record()
        call()
        stop.record()
        stop.synchronize()
        milliseconds += start.elapsed_time(stop)
    return milliseconds / 1e3


def compete(size, dtype, device, smoke):
    """Measure one size and dtype: by name, the seconds, and a copy's by them."""
    peers, backend = Peers(compiled=not smoke), rau.registry.get("cuda")
    prev, cur, out = (
        rau.AttentionState(attn_out.to(device, dtype), maximum.to(device), total.to(device))
        for attn_out, maximum, total in map(peers.tensors, states(size, "float32", 3))  # NumPy alone has no bfloat16
    )
    result = rau.ring_attention_update(*prev, *cur, out=out, backend=backend, **size.options)
    expected = rau.ring_attention_update(*prev, *cur, backend="torch", **size.options)
    right = all(map(torch.equal, result, expected))
    calls = {f"rau, {how}": call for how, call in modes(size, backend, [prev, cur, out], wait=False).items()}
    moved = sum(part.nbytes for part in (*prev, *cur, *out))
    source, target = torch.empty(2, moved // 2, dtype=torch.uint8, device=device)
    calls["copy"] = lambda: target.copy_(source)
    if size.softmax_layout == "TND":
        calls |= peers.calls(size, prev, cur)
    if size.layout == size.softmax_layout == "TND" and dtype != torch.float32:
        try:
            from flashinfer import merge_state
        except ImportError:
            pass
        else:
            lse = [(state[1][..., 0] + state[2][..., 0].log()) / 0.6931471805599453 for state in (prev, cur)]
            calls["FlashInfer"] = lambda: merge_state(prev[0], lse[0], cur[0], lse[1])
    seconds, least = (0.0, 1) if smoke else (SECONDS * len(calls), 3)
    times = interleaved(calls, seconds, least=least, clock=on_gpu if device == "cuda" else on_host)
    return {
        "size": size, "dtype": str(dtype).removeprefix("torch."), "bytes": moved, "right": right,
        "seconds": {name: float(np.median(one)) for name, one in times.items()},
        "of_a_copy": {name: ratio(times["copy"], one).median for name, one in times.items()},
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
    report = setting(device)
    if not arguments.json:
        print(report["hardware"], *(f"{name} {number}" for name, number in report["versions"].items()), sep="\n")
    report["results"] = []
    for size in SMOKE if arguments.smoke else SIZES:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            one = compete(size, dtype, device, arguments.smoke)
            report["results"].append(one)
            if not arguments.json:
                rate, share = one["bytes"] / one["seconds"]["rau, out="] / 1e9, one["of_a_copy"]["rau, out="]
                verdict = "" if one["right"] else "  WRONG"
                print(f"\n{size}, {one['dtype']}: {rate:.0f} GB/s, {share:.2f} of a copy{verdict}")
                print("  " + ", ".join(f"{name} {seconds * 1e6:.1f} us" for name, seconds in one["seconds"].items()))
    if arguments.json:
        session.print_json(report)
    return 0 if all(one["right"] for one in report["results"]) else 1


if __name__ == "__main__":
    sys.exit(main())
