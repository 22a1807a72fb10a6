"""Speed of the cuda backend on this GPU, beside a copy and an addition, torch, and FlashInfer's and vLLM's kernels.

    pip install '.[cuda,cli]' && python examples/bench_cuda.py [RECORDS]
    TRITON_INTERPRET=1 python examples/bench_cuda.py --smoke    does it run at all? tiny sizes, on the CPU, no goals

First values: every size and dtype bit for bit against the compiled core on the CPU. Then times: of each contender a CUDA
graph of calls that walk over more memory than the second-level cache holds; contenders run in turn, a time is the median
of the rounds, a share that of the rates of a round. A share of 1 means that a merge moves its bytes (each input read once,
each output written once) as fast as a device-to-device copy moves its own. Last, what a small call costs the host.

Each record is a line of JSON in the file RECORDS (bench_cuda.jsonl) as soon as it is known. Takes some four minutes.
"""

import argparse
import itertools
import json
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import rau
from rau.cli.bench.peers import COMPILED, EAGER, Peers
from rau.cli.bench.timing import interleaved, on_host, ratio
from rau.cli.bench.workload import DECODE, LARGE, SEQUENCES, SERVING, SMALLEST, Size, states
from rau.testing.comparison import same_bits

PAIRS = [
    LARGE, LARGE._replace(layout="BNSD"), Size("TND", (8192,), 32, 128), LARGE._replace(heads=64), LARGE._replace(lengths=(32768,)),
    LARGE._replace(lengths=(65536,)), SEQUENCES, SERVING, SERVING._replace(heads=64, head_dim=64),
    SERVING._replace(head_dim=256), SERVING._replace(head_dim=80), DECODE, DECODE._replace(lengths=(256,)),
]  # fmt: skip
MANY = [(LARGE, 3), (LARGE, 4), (LARGE, 8), (DECODE, 4), (DECODE, 8)]  # states
SMOKE = [Size("SBH", (5,), 2, 16), Size("TND", (3, 4), 2, 64), Size("TND", (3, 4), 2, 64, "SBH")]
DTYPES = ("bfloat16", "float16", "float32")
GOAL = 0.92  # of a copy
SECONDS = 0.15  # of measuring each contender


class Bench:
    """What is measured where, and its records."""

    def __init__(self, file, smoke):
        self.file, self.records, self.smoke = file, [], smoke
        self.device = "cpu" if smoke else "cuda"
        self.cache = 0 if smoke else torch.cuda.get_device_properties(0).L2_cache_size
        self.peers = Peers(compiled=not smoke)
        self.others = dict(self.installed())

    def say(self, kind, **record):
        """Keep a record, and write it at once."""
        self.records.append({"kind": kind, **record})
        print(json.dumps(self.records[-1]), file=self.file, flush=True)

    def setting(self):
        """What it is measured on."""
        versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
        for name in ("ring-attention-update", "triton", "flashinfer-python", "vllm"):
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                versions[name] = None
        hardware = platform.processor()
        if not self.smoke:
            found = torch.cuda.get_device_properties(0)
            hardware = f"{found.name}, {found.total_memory >> 30} GiB, capability {found.major}.{found.minor}"
        self.say("setting", hardware=hardware, versions=versions)
        print(hardware, *(f"{name} {number or 'NOT INSTALLED'}" for name, number in versions.items()), sep="\n")

    def installed(self):
        """The kernels of others that can be imported, by name: functions of (out, lse) pairs, heads and tokens as told."""
        try:
            from flashinfer import merge_state
        except ImportError as error:
            print(f"FlashInfer's kernel is NOT MEASURED: {error}")
        else:
            yield "FlashInfer", lambda a, b, to: lambda: merge_state(a[0], a[1], b[0], b[1])
        try:
            from vllm._custom_ops import merge_attn_states
        except ImportError as error:
            print(f"vLLM's kernel is NOT MEASURED: {error}")
        else:
            # Its log-sum-exps are (heads, tokens); these are random, so that the same memory will do.
            def lse(state):
                return state[1].view(*reversed(state[1].shape))

            yield "vLLM", lambda a, b, to: lambda: merge_attn_states(to[0], lse(to), a[0], lse(a), b[0], lse(b))

    def make(self, size, dtype, count):
        """States of a size on the device, as many as take turns, and the bytes of one: lists of `count`."""
        made = []
        for attn_out, maximum, total in map(self.peers.tensors, states(size, "float32", count)):  # NumPy has no bfloat16
            made.append(rau.AttentionState(attn_out.to(self.device, getattr(torch, dtype)), maximum.to(self.device),
                                           total.to(self.device)))  # fmt: skip
        one = sum(part.nbytes for state in made for part in state)
        return [made] + [[copied(state) for state in made] for _ in range(4 * self.cache // one)], one

    def values(self, size, dtype):
        """Compare with the compiled core, bit for bit."""
        (made, *_), _ = self.make(size, dtype, 2)
        mine = rau.ring_attention_update(*made[0], *made[1], backend="cuda", **size.options)
        host = [[part.cpu() for part in state] for state in made]
        core = rau.ring_attention_update(*host[0], *host[1], backend="cython", **size.options)
        differences = same_bits(*[[plain(part) for part in result] for result in (mine, core)])
        self.say("values", size=str(size), dtype=dtype, differences=differences)

    def compete(self, size, dtype, K=2):
        """Measure the contenders at one size and dtype."""
        sets, moved = self.make(size, dtype, K + 1)
        options = size.options | {"backend": "cuda"}
        if "actual_seq_qlen" in options:  # as a tensor on the device: from the host it could not be part of a graph
            options["actual_seq_qlen"] = torch.from_numpy(options["actual_seq_qlen"]).to(self.device)
        rows, width = size.tokens * size.heads, size.head_dim * sets[0][0][0].itemsize
        calls, bytes_ = {}, {}

        def contend(name, functions, row_bytes):
            calls[name], bytes_[name] = functions, rows * row_bytes

        def ours(made, out):
            if K == 2:
                return lambda: rau.ring_attention_update(*made[0], *made[1], out=out, **options)
            return lambda: rau.merge_states(made[:K], out=out, **options)

        contend("rau, out=", [ours(made, made[K]) for made in sets], (K + 1) * (width + 64))
        contend("rau, in place", [ours(made, made[0]) for made in sets], (K + 1) * (width + 64))
        one = [[state._replace(softmax_max=state[1][..., :1].contiguous(), softmax_sum=state[2][..., :1].contiguous())
                for state in made] for made in sets]  # fmt: skip
        contend("rau, 1 lane, out=", [ours(made, made[K]) for made in one], (K + 1) * (width + 8))
        flat = [[torch.empty(moved // 8, device=self.device).normal_() for _ in "ab"] for _ in sets]
        contend("copy", [lambda pair=pair: pair[1].copy_(pair[0]) for pair in flat], 0)
        bytes_["copy"] = 2 * flat[0][0].nbytes
        if K == 2:
            add = [lambda made=made: torch.add(made[0][0], made[1][0], out=made[2][0]) for made in sets]
            contend("addition", add, 3 * width)
        if K == 2 and size.softmax_layout == "TND":
            for name, call in self.peers.calls(size, *sets[0][:2]).items():
                if name == EAGER or name == COMPILED and size == LARGE:
                    contend(name, [call], 3 * (width + 64))
        if K == 2 and size.batch == 1 and size.layout in ("SBH", "TND") and size.softmax_layout == "TND":
            shape = size.tokens, size.heads, size.head_dim
            pairs = [[(state[0].view(shape), torch.randn(shape[:2], device=self.device)) for state in made] for made in sets]
            for name, contender in self.others.items():
                if name != "FlashInfer" or dtype != "float32":
                    contend(name, [contender(*made) for made in pairs], 3 * (width + 4))
        times = self.measure(calls)
        copy = times["copy"] / bytes_["copy"]
        for name, seconds in times.items():
            share = ratio(copy, seconds / bytes_[name])
            self.say("time", size=str(size), dtype=dtype, K=K, who=name, bytes=bytes_[name],
                     seconds=float(np.median(seconds)), of_a_copy=share._asdict())  # fmt: skip

    def measure(self, calls):
        """Seconds of each call, by rounds."""
        graphs, lengths = {}, {}
        for name, functions in calls.items():
            for function in functions:
                function()  # compiles
            if self.smoke:
                graphs[name], lengths[name] = functions[0], 1
                continue
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for function in functions:
                    function()
            graphs[name], lengths[name] = graph.replay, len(functions)
        seconds, least = (0.0, 1) if self.smoke else (SECONDS * len(calls), 5)
        times = interleaved(graphs, seconds, least=least, clock=on_host if self.smoke else on_gpu)
        return {name: its / lengths[name] for name, its in times.items()}

    def small(self):
        """What a call costs the host where the GPU has next to nothing to do."""
        (made, *_), _ = self.make(SMALLEST, "bfloat16", 3)
        options = SMALLEST.options | {"backend": "cuda"}
        calls = {
            "rau, out=": lambda: rau.ring_attention_update(*made[0], *made[1], out=made[2], **options),
            "rau, fresh": lambda: rau.ring_attention_update(*made[0], *made[1], **options),
            "one torch operation": lambda: torch.add(made[0][0], made[1][0], out=made[2][0]),
            EAGER: lambda: self.peers.eager(*made[:2]),
        }
        times = interleaved(calls, 0.0 if self.smoke else 2.0, clock=on_host)
        for name, seconds in times.items():
            self.say("host", who=name, seconds=float(np.median(seconds)))

    def summary(self):
        """Print tables and the verdict on each goal; return whether all bits and goals were met."""
        console = Console(width=None if sys.stdout.isatty() else 120)
        times = [record for record in self.records if record["kind"] == "time"]
        table = Table("size", "dtype", "K", *dict.fromkeys(record["who"] for record in times))
        for (size, dtype, K), group in itertools.groupby(times, key=lambda its: (its["size"], its["dtype"], its["K"])):
            found = {its["who"]: f"{its['seconds'] * 1e6:.1f} us\n{its['of_a_copy']['median']:.2f}" for its in group}
            table.add_row(size, dtype, str(K), *(found.get(column.header, "") for column in table.columns[3:]))
        console.print("Time, and share of a copy's rate:", table)
        host = [f"{its['who']} {its['seconds'] * 1e6:.1f} us" for its in self.records if its["kind"] == "host"]
        console.print("Small call, on the host:", ", ".join(host))
        wrong = [its for its in self.records if its["kind"] == "values" and its["differences"]]
        for record in wrong:
            console.print("[bold]WRONG[/] bits:", record)
        if self.smoke:
            return not wrong
        large = [its for its in times if its["who"] == "rau, out=" and its["bytes"] >= 4 * self.cache]
        worst = min(large, key=lambda its: its["of_a_copy"]["median"])
        goals = {f"every large size at least {GOAL} of a copy (8 lanes, out=); least "
                 f"{worst['of_a_copy']['median']:.3f}, {worst['size']}, {worst['dtype']}, K {worst['K']}":
                 worst["of_a_copy"]["median"] >= GOAL}  # fmt: skip
        by_name = {(its["size"], its["dtype"], its["K"], its["who"]): its["seconds"] for its in times}
        for name in ("FlashInfer", "vLLM"):
            ratios = [seconds / by_name[size, dtype, K, "rau, 1 lane, out="]
                      for (size, dtype, K, who), seconds in by_name.items() if who == name]  # fmt: skip
            text = f"with 1 lane at most 1.03 of {name}'s time"
            goals[text + (f"; most {1 / min(ratios):.3f}" if ratios else ": NOT MEASURED")] = bool(ratios) and (
                min(ratios) >= 1 / 1.03
            )
        for goal, met in goals.items():
            console.print("reached" if met else "MISSED ", goal)
        return not wrong


def copied(state):
    """A state in memory of its own."""
    return rau.AttentionState(*(part.clone() for part in state))


def plain(part):
    """A tensor as an array of NumPy's that has its bits."""
    part = part.cpu()
    return (part.view(torch.int16) if part.dtype == torch.bfloat16 else part).numpy()


def on_gpu(call, repeats):
    """Seconds that some calls take on the GPU."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def main():
    """Measure, print, and return 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs="?", default="bench_cuda.jsonl", help="file for the records (bench_cuda.jsonl)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, without a GPU too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.smoke:
        parser.error("torch finds no CUDA device (--smoke runs on the CPU, under TRITON_INTERPRET=1)")
    began = time.monotonic()
    with open(arguments.records, "w") as file:
        bench = Bench(file, arguments.smoke)
        bench.setting()
        pairs = zip(SMOKE, DTYPES, strict=True) if arguments.smoke else itertools.product(PAIRS, DTYPES)
        for size, dtype in pairs:
            bench.values(size, dtype)
            bench.compete(size, dtype)
        many = [((SMOKE[0], 3), "bfloat16")] if arguments.smoke else itertools.product(MANY, DTYPES)
        for (size, K), dtype in many:
            bench.compete(size, dtype, K)
        bench.small()
        right = bench.summary()
    print(f"{time.monotonic() - began:.0f} s; records: {arguments.records}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
