"""Ring attention on torch.distributed: exact attention over a sequence that no single rank holds, and its gradient.

From a checkout, in a fresh environment:

    python -m pip install -e '.[torch]'
    torchrun --standalone --nproc-per-node 4 examples/ring_attention.py --causal

Gloo on CPUs; nccl where every local rank has a GPU of its own. It has run on CPUs only, never on a GPU.

The ring is `rau.distributed.ring_attention`; here it is run, timed and checked. Every rank holds a part of the queries, keys
and values, cut zig-zag: of 2P chunks of each sequence rank r holds chunk r (its "front") and chunk 2P-1-r (its "back").

Printed: time per phase and rank (communication is the time spent waiting, what the attention did not hide), memory and
bytes sent; then the errors of the output and the gradients against attention in one process over the gathered
sequence, in float64: their share of the bound that `exact_attention.verdict` derives, and how they compare with those
of torch's own kernel in one process. Exit status 0 if all is within the bounds, 1 if not or if a rank was lost, 2 for
wrong arguments (torchrun itself then exits with 1). When a rank dies, or is silent for --timeout seconds, the others
end with an error that says for whom they were waiting; torchrun may end them first, and names the rank that died.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections import defaultdict
from datetime import timedelta
from functools import wraps
from itertools import accumulate

import torch
import torch.distributed as dist
from exact_attention import kernel_errors, verdict
from ring_cost import Ring, sent_bytes

import rau
from rau.distributed import LostRankError, ring_attention
from rau.distributed.attention import attend, attend_backward
from rau.distributed.ranks import Ranks

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


# ---- the ring, timed ------------------------------------------------------------------------------------------------


def timed(function, seconds, phase):
    """Add up the time that a function takes; a GPU's own stream is waited for, the stream that communicates is not."""

    @wraps(function)
    def timed_function(*arguments, **options):
        start = time.perf_counter()
        result = function(*arguments, **options)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        seconds[phase] += time.perf_counter() - start
        return result

    return timed_function


def run(ranks, local, lengths, causal):
    """One forward and one backward pass; return (attn_out, dq, dk, dv) and the seconds of their phases."""
    *inputs, dout = local
    inputs = [each.clone().requires_grad_() for each in inputs]
    seconds, costs = defaultdict(float), {}
    kernel = {"forward": timed(attend, seconds, "attention"), "backward": timed(attend_backward, seconds, "attention")}
    layout, ends = ("TND", [0, *accumulate(lengths)]) if lengths else ("BNSD", None)
    update, wait = rau.StreamingMerge.update, Ranks.wait
    rau.StreamingMerge.update, Ranks.wait = timed(update, seconds, "merge"), timed(wait, seconds, "communication")
    try:
        for name in ("forward", "backward"):
            with ranks.waiting("before the next pass"):
                dist.barrier()
            seconds.clear()
            start = time.perf_counter()
            if name == "forward":
                out, _ = ring_attention(*inputs, causal=causal, layout=layout, actual_seq_qlen=ends, **kernel)
            else:
                out.backward(dout)
            costs[name] = {**seconds, "total": time.perf_counter() - start}
    finally:
        rau.StreamingMerge.update, Ranks.wait = update, wait
    return [out.detach(), *(each.grad for each in inputs)], costs


# ---- is it right? ---------------------------------------------------------------------------------------------------


def cut(tensor, lengths, half=None):
    """Views (B, N, S, D) of sequences, or of their halves, in (B, N, S, D), or in (T, N, D), which has one for each length."""
    views = [part.transpose(0, 1)[None] for part in tensor.split(lengths)] if lengths else [tensor]
    return [view.chunk(2, dim=2)[half == "back"] for view in views] if half else views


def one_process(q, k, v, dout, causal):
    """Attention to all the keys, and its gradients, by torch's kernel alone."""
    out, lse = attend(q, k, v, causal)
    return lse, [out, *attend_backward(dout, q, k, v, out, lse, causal)]


def check(ranks, local, results, lengths, causal):
    """Compare with attention in one process over the gathered sequences; return the verdict on rank 0."""
    parts = zip(*(cut(each, lengths) for each in local))
    measured = kernel_errors(one_process, parts, causal=True)  # rows with few keys have the largest errors
    with ranks.waiting("comparing results"):
        dist.all_reduce(measured, dist.ReduceOp.MAX)
        whole = [gather(each, lengths) for each in (*local, *results)]
    return None if RANK else verdict(one_process, zip(*whole), causal, measured.tolist(), RANKS)


def gather(tensor, lengths):
    """Collect the ranks' parts on rank 0 and undo the zig-zag: (B, N, S, D) of each whole sequence."""
    parts = [torch.empty_like(tensor) for _ in range(RANKS)] if RANK == 0 else None
    dist.gather(tensor.contiguous(), parts)
    if RANK:
        return None
    fronts = [cut(part, lengths, "front") for part in parts]
    backs = [cut(part, lengths, "back") for part in reversed(parts)]
    return [torch.cat(chunks, dim=2) for chunks in zip(*fronts, *backs)]


# ---- the program ----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """One line about a wrong argument, from rank 0 alone."""

    def error(self, message):
        """Exit with 2."""
        self.exit(2, None if RANK else f"{self.prog}: error: {message}\n")


def arguments():
    """Read the command line; `lengths` are this rank's share of each sequence, None in layout BNSD."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--causal", action="store_true", help="a query sees no later key")
    parser.add_argument("--layout", choices=("BNSD", "TND"), default="BNSD", help="TND: sequences of different lengths")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--tokens", type=int, default=4096, help="of the whole sequence; in TND of all (default 4096)")
    parser.add_argument("--sequences", type=int, default=24, help="layout TND: how many (default 24)")
    parser.add_argument("--batch", type=int, default=1, help="layout BNSD: B (default 1)")
    parser.add_argument("--heads", type=int, default=4, help="N (default 4)")
    parser.add_argument("--head-dim", type=int, default=64, help="D (default 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for another rank (default 60)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, and nothing else")
    options = parser.parse_args()
    for name in ("tokens", "sequences", "batch", "heads", "head_dim", "timeout"):
        if getattr(options, name) <= 0:
            parser.error(f"argument --{name.replace('_', '-')}: must be positive")
    chunks, rest = divmod(options.tokens, 2 * RANKS)
    if rest:
        parser.error(f"argument --tokens: {options.tokens} is not a multiple of {2 * RANKS}, twice the number of ranks")
    options.lengths = None
    if options.layout == "TND":
        if options.sequences > chunks:
            parser.error(f"argument --sequences: {options.tokens} tokens make at most {chunks}, of {2 * RANKS} each")
        random = torch.Generator().manual_seed(options.seed)
        cuts = 1 + torch.randperm(chunks - 1, generator=random)[: options.sequences - 1].sort().values
        ends = torch.cat([torch.tensor([0]), cuts, torch.tensor([chunks])])
        options.lengths = (2 * ends.diff()).tolist()
    return options


def connect(options):
    """Join the other ranks; return this rank's device."""
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if enough else torch.device("cpu")
    if enough:
        torch.cuda.set_device(device)
    # A process started without torchrun is a ring of its own.
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if enough else "gloo", timeout=timedelta(seconds=options.timeout), **alone)
    return device


def peak_memory(device):
    """Most bytes that this process has held: on a GPU in tensors, on a CPU in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


PHASES = {
    "forward": ("attention", "communication", "merge", "total"),
    "backward": ("attention", "communication", "total"),
}


def show(document):
    """Print the tables."""
    print(document["title"])
    print("\nseconds; communication is what a rank waited for, beyond what its computing hid\n")
    print("      forward", " " * 31, "backward", " " * 23, "MiB")
    print("rank", *(f" {phase:>9}" for name in PHASES for phase in PHASES[name]), "     sent   memory")
    for rank, cost in enumerate(document["ranks"]):
        seconds = (f" {cost[name][phase]:{max(9, len(phase))}.4f}" for name in PHASES for phase in PHASES[name])
        mebibytes = (f"{x / 2**20:8.1f}" for x in (cost["forward"]["sent"] + cost["backward"]["sent"], cost["memory"]))
        print(f"{rank:<4}", *seconds, *mebibytes)
    print("\n          largest error  share of the bound  rms error, by that of one process")
    for name, found in document["results"].items():
        print(f"{name:<10}{found['error']:13.2e}{found['share']:20.3f}{found['ratio']:35.2f}")


def main():
    """Run, print, and return the exit status."""
    options = arguments()
    lengths, dtype, tokens = options.lengths, DTYPES[options.dtype], options.tokens // RANKS
    shape = (tokens, options.heads) if lengths else (options.batch, options.heads, tokens)
    try:
        device = connect(options)
        ranks = Ranks("ring_attention", None, None)
        random = torch.Generator(device).manual_seed(options.seed * RANKS + RANK)
        local = torch.randn(4, *shape, options.head_dim, generator=random, device=device).to(dtype)
        memory = peak_memory(device)
        run(ranks, local, lengths, options.causal)  # once for nothing: it connects neighbours and makes kernels
        results, cost = run(ranks, local, lengths, options.causal)
        cost["memory"] = peak_memory(device) - memory
        heads, total = options.heads, options.tokens * (1 if lengths else options.batch)
        ring = Ring(RANKS, total, heads, heads, options.head_dim, dtype.itemsize, options.causal)
        for name, sent in zip(PHASES, sent_bytes(ring)):  # as the model counts them, which the tests hold to the ring's
            cost[name]["sent"] = sent
        report = check(ranks, local, results, lengths, options.causal)
        costs = [None] * RANKS if RANK == 0 else None
        with ranks.waiting("collecting times"):
            dist.gather_object(cost, costs)
    except (LostRankError, dist.DistError) as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)  # leaving in good order would wait for the rank that is lost
    dist.destroy_process_group()
    if RANK:
        return 0
    title = (
        f"Ring attention, {'causal' if options.causal else 'full'}, layout {options.layout}, {options.dtype}: "
        f"{options.tokens} tokens, {f'{options.sequences} sequences' if lengths else f'B = {options.batch}'}, "
        f"N = {options.heads}, D = {options.head_dim}; {RANKS} ranks on {device.type}, torch {torch.__version__}"
    )
    document = {"title": title, "ranks": costs, "results": report}
    print(json.dumps(document, indent=2)) if options.json else show(document)
    wrong = [name for name, found in report.items() if not found["right"]]
    if wrong:
        print(f"WRONG: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
