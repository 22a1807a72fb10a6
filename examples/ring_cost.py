"""What a ring of P ranks costs: a model of bytes and arithmetic, its tables, and its check against measured rings.

From a checkout, in a fresh environment (the tables alone need no torch, nor `rau`):

    python -m pip install -e '.[torch]'
    python examples/ring_cost.py               the tables of docs/scaling.md
    python examples/ring_cost.py --measure     predict rings of examples/ring_attention.py on this machine, and run them

The model: in a step a rank attends to one rank's keys and merges, while the next keys arrive. So a step takes the
longer of the two; what the network takes beyond attention and merge is "exposed". docs/scaling.md explains the numbers.
Exit status 0; 1 if a ring could not be measured; 2 for wrong arguments.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

HERE = Path(__file__).parent
STATS = 4  # bytes of a float32 maximum or sum, of which each state has one a row


class Ring(NamedTuple):
    """A problem and how it is cut; B is 1, or part of `tokens`."""

    ranks: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int
    causal: bool


class Rates(NamedTuple):
    """How fast one rank is."""

    forward: float  # FLOP/s of attention
    backward: float
    merge: float  # bytes/s
    network: float  # bytes/s to the next rank
    message: float = 0.0  # seconds a message takes beyond its bytes
    call: float = 0.0  # seconds a merge takes beyond its bytes


class Cost(NamedTuple):
    """Seconds of one pass."""

    attention: float
    exposed: float
    merge: float

    @property
    def total(self):
        """Seconds in all."""
        return sum(self)


# ---- bytes and arithmetic -------------------------------------------------------------------------------------------


def kv_bytes(ring):
    """Bytes of one rank's keys and values: a message of either pass."""
    return 2 * ring.tokens // ring.ranks * ring.kv_heads * ring.head_dim * ring.itemsize


def dkv_bytes(ring):
    """Bytes of their gradients, float32: the backward pass's other message."""
    return 2 * ring.tokens // ring.ranks * ring.kv_heads * ring.head_dim * 4


def sent_bytes(ring):
    """Bytes that a rank sends, forward and backward; the last hop of the gradients brings them home."""
    if ring.ranks == 1:
        return 0, 0
    forward = (ring.ranks - 1) * kv_bytes(ring)
    return forward, forward + ring.ranks * dkv_bytes(ring)


def merge_received(method, ranks, rows, head_dim, itemsize):
    """Most bytes that a rank receives in `rau.distributed.merge`, by its method, or in merge_scatter ("scatter")."""
    state = rows * (head_dim * itemsize + 2 * STATS)
    if method == "tree":  # of float32
        return (ranks - 1).bit_length() * rows * (head_dim * 4 + 2 * STATS)
    return (ranks - 1) * state // (ranks if method == "scatter" else 1)


def update_bytes(ring, part=1.0):
    """Bytes that an update reads and writes: a partial state, and the running one twice; of a `part` of the queries."""
    partial = ring.head_dim * ring.itemsize + 2 * STATS
    running = ring.head_dim * 4 + 2 * STATS
    return part * ring.tokens // ring.ranks * ring.heads * (partial + 2 * running)


def merge_bytes(ring, rank):
    """Bytes that the updates of a forward pass read and write; causal, half the queries are merged for a later rank."""
    if not ring.causal:
        return ring.ranks * update_bytes(ring)
    return (1 + rank) * update_bytes(ring) + (ring.ranks - 1 - rank) * update_bytes(ring, 0.5)


def attention_flops(ring):
    """Floating-point operations of one step, forward and backward: two and five products of queries and keys."""
    pairs = (ring.tokens / ring.ranks) ** 2 * (0.5 if ring.causal else 1)
    return 4 * pairs * ring.heads * ring.head_dim, 10 * pairs * ring.heads * ring.head_dim


# ---- time -----------------------------------------------------------------------------------------------------------


def predict(ring, rates, rank=None):
    """Cost of the forward and the backward pass; causal, the last rank (the default) merges most, the first least."""
    rank = ring.ranks - 1 if rank is None else rank
    forward, backward = (flops / rate for flops, rate in zip(attention_flops(ring), rates[:2]))
    kv, dkv = (rates.message + size / rates.network for size in (kv_bytes(ring), dkv_bytes(ring)))
    merge = merge_bytes(ring, rank) / rates.merge + ring.ranks * rates.call
    exposed = (ring.ranks - 1) * max(0, kv - forward - merge / ring.ranks)
    # Backward, keys and values travel in all steps but the last, gradients in all but the first, and once more: home.
    steps = range(ring.ranks) if ring.ranks > 1 else ()
    waits = [max(0, kv * (step < ring.ranks - 1) + dkv * (step > 0) - backward) for step in steps]
    homeward = dkv if ring.ranks > 1 else 0
    return Cost(ring.ranks * forward, exposed, merge), Cost(ring.ranks * backward, sum(waits) + homeward, 0.0)


# Published, see docs/scaling.md: FlashAttention-3's best, an H100 SXM's memory, NVLink and InfiniBand one way. Assumed:
# the rate of the backward pass (three quarters), 10 us a message, 5 us a merge.
H100 = {
    "NVLink": Rates(740e12, 555e12, 3.35e12, 450e9, 10e-6, 5e-6),
    "InfiniBand": Rates(740e12, 555e12, 3.35e12, 50e9, 10e-6, 5e-6),
}
SIZES = [(8, 2**17), (8, 2**20), (64, 2**20), (512, 2**20), (512, 2**24), (4096, 2**20), (4096, 2**24)]


def large_rings(networks, heads, kv_heads, head_dim, itemsize, second):
    """Print the forward pass of causal rings, on the last rank, in units of 1 / `second` seconds."""
    print("network     KV heads  ranks     tokens  tokens/rank  attention  exposed     merge  share of merge")
    for network, rates in networks.items():
        for kv in kv_heads:
            for ranks, tokens in SIZES:
                cost, _ = predict(Ring(ranks, tokens, heads, kv, head_dim, itemsize, True), rates)
                times = f"{cost.attention * second:11.1f}{cost.exposed * second:9.1f}{cost.merge * second:10.1f}"
                size = f"{ranks:7}{tokens:11}{tokens // ranks:13}"
                print(f"{network:<12}{kv:8}{size}{times}{cost.merge / cost.total:15.1%}")


def merges():
    """Print what a merge across ranks takes: on its way, and in memory, where each input is read and the result written."""
    tokens, heads, head_dim = 128, 64, 128
    rows, rates = tokens * heads, H100["NVLink"]
    narrow, wide = rows * (2 * head_dim + 2 * STATS), rows * (4 * head_dim + 2 * STATS)
    size = f"{tokens} tokens, N = {heads}, D = {head_dim}, bfloat16"
    print(f"A merge of one state a rank, {size}, on H100s: MB that a rank receives, and us")
    print("ranks   gather: MB  NVLink  memory    tree: MB  NVLink  memory    scatter: MB  NVLink  memory")
    for ranks in (2, 4, 8, 16, 64):
        levels = (ranks - 1).bit_length()
        moved = {"gather": (ranks + 1) * narrow, "tree": levels * 3 * wide, "scatter": (ranks + 1) * narrow / ranks}
        cells = []
        for method, messages in (("gather", 1), ("tree", levels), ("scatter", 1)):
            received = merge_received(method, ranks, rows, head_dim, 2)
            network = messages * rates.message + received / rates.network
            cells.append(f"{received / 1e6:12.2f}{network * 1e6:8.0f}{moved[method] / rates.merge * 1e6:8.1f}")
        print(f"{ranks:5}{'  '.join(cells)}")


def tables():
    """Print what docs/scaling.md shows: rings of up to thousands of ranks, when the merge shows, and merges across ranks."""
    print("One layer, causal, N = 64, D = 128, bfloat16, on H100s: forward pass on the last rank, milliseconds")
    large_rings(H100, 64, (64, 8), 128, 2, 1e3)
    print("\nTokens per rank from which, in a step on H100s (N = 64, D = 128, bfloat16),")
    print("        the merge takes less than             attention hides the network")
    print("        100 %    10 %     1 % of attention    NVLink, 64 and 8 KV heads   InfiniBand, 64 and 8")
    for name, causal in (("full", False), ("causal", True)):
        # Attention goes with the square of the tokens per rank, merge and network with the tokens: their ratio with one
        # token is the number of tokens at which they are equal.
        one = Ring(1, 1, 64, 64, 128, 2, causal)
        rates = H100["NVLink"]
        attention = attention_flops(one)[0] / rates.forward
        merge = update_bytes(one) / rates.merge / attention
        cells = [f"{merge * times:8.0f}" for times in (1, 10, 100)]
        for rates in H100.values():
            for heads in (64, 8):
                cells.append(f"{kv_bytes(one._replace(kv_heads=heads)) / rates.network / attention:15.0f}")
        print(f"{name:<6}", *cells)
    print()
    merges()


# ---- measured -------------------------------------------------------------------------------------------------------


def launch(ranks, script, *arguments):
    """Run a script under torchrun, with one thread a rank; return the JSON document that it prints."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*torchrun, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(1)  # it has said why
    return json.loads(done.stdout)


def measured_ring(ring):
    """Run the example; return the phases' seconds, means over the ranks."""
    causal = ["--causal"] if ring.causal else []
    size = "--tokens", ring.tokens, "--heads", ring.heads, "--head-dim", ring.head_dim
    costs = launch(ring.ranks, "ring_attention.py", *size, *causal, "--json")["ranks"]
    phases = [("forward", phase) for phase in ("attention", "communication", "merge", "total")]
    phases += [("backward", phase) for phase in ("attention", "communication", "total")]
    return [mean(cost[name][phase] for cost in costs) for name, phase in phases]


def parts(ring):
    """Under torchrun: time what a step is made of, each part on all ranks at once; print the seconds, rank 0."""
    import torch
    import torch.distributed as dist

    import rau
    from rau.distributed.attention import attend, attend_backward
    from rau.distributed.ranks import Ranks

    dist.init_process_group("gloo")
    ranks, merge = Ranks("ring_cost.py", None, None), rau.StreamingMerge("BNSD")
    tensors = torch.randn(4, 1, ring.heads, ring.tokens // ring.ranks, ring.head_dim)
    q, k, v, dout = tensors
    out, lse = attend(q, k, v, ring.causal)
    sums, spare = torch.zeros(3, *q.shape), torch.empty_like(tensors[:2])
    moves = [("to", tensors[:2], (ranks.rank + 1) % ranks.size), ("from", spare, (ranks.rank - 1) % ranks.size)]

    def backward():
        for total, term in zip(sums, attend_backward(dout, q, k, v, out, lse, ring.causal)):
            total.add_(term)

    jobs = [
        lambda: attend(q, k, v, ring.causal),
        backward,
        lambda: merge.update(*rau.AttentionState.from_lse(out, lse, base="e", layout="BNSD")),
        lambda: ranks.wait(ranks.begin(moves, "timing it"), "timing it"),
    ]
    times = [[] for _ in jobs]
    for _ in range(10):
        for job, seconds in zip(jobs, times):
            dist.barrier()
            start = time.perf_counter()
            job()
            seconds.append(time.perf_counter() - start)
    all_ranks = [None] * ring.ranks if dist.get_rank() == 0 else None
    dist.gather_object([median(seconds) for seconds in times], all_ranks)
    if all_ranks:
        print(json.dumps([mean(seconds) for seconds in zip(*all_ranks)]))
    dist.destroy_process_group()


def compare(tokens, repeats, sizes=(2, 4), masks=(False, True)):
    """Predict rings of 2 and 4 ranks from their parts' speeds on this machine, measure them, predict large ones."""
    cores, found = len(os.sched_getaffinity(0)), None
    print(f"{tokens} tokens, N = 4, D = 64, float32, {cores} cores; milliseconds, mean of ranks, median of {repeats}")
    print("                    forward                                  backward")
    print("             ranks  attention  communication  merge   total  attention  communication   total")
    for ranks in sizes:
        for causal in masks:
            ring = Ring(ranks, tokens, 4, 4, 64, 4, causal)
            runs = [
                (launch(ranks, "ring_cost.py", "--parts", ranks, tokens, int(causal)), measured_ring(ring))
                for _ in range(repeats)
            ]
            seconds, measured = ([median(times) for times in zip(*which)] for which in zip(*runs))
            work = *attention_flops(ring), update_bytes(ring), kv_bytes(ring)
            rates = Rates(*(amount / taken for amount, taken in zip(work, seconds)))
            found = found or rates
            ahead, back = predict(ring, rates, rank=(ranks - 1) / 2)
            predicted = [*ahead, ahead.total, back.attention, back.exposed, back.total]
            for title, row in (("predicted", predicted), ("measured", measured)):
                cells = (f"{x * 1e3:{width}.1f}" for x, width in zip(row, (11, 15, 7, 8, 11, 15, 8)))
                print(f"{'causal' if causal else 'full':<7}{title:<10}{ranks:>1}{''.join(cells)}", flush=True)
    print(
        f"\nRates with {sizes[0]} ranks: attention {found.forward / 1e9:.1f} and {found.backward / 1e9:.1f} GFLOP/s, "
        f"merge {found.merge / 1e9:.2f} GB/s, network {found.network / 1e9:.2f} GB/s\n\n"
        "Large rings at these rates, causal, N = 4, D = 64, float32: forward pass on the last rank, seconds"
    )
    large_rings({"loopback": found}, 4, (4,), 64, 4, 1)


def main():
    """Print the tables, or the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="predict and run rings of 2 and 4 ranks on this machine")
    parser.add_argument("--tokens", type=int, default=4096, help="with --measure: of the whole sequence (default 4096)")
    parser.add_argument("--repeats", type=int, default=3, help="with --measure (default 3)")
    parser.add_argument("--parts", type=int, nargs=3, help=argparse.SUPPRESS)  # under torchrun, by --measure
    options = parser.parse_args()
    if options.tokens < 8 or options.tokens % 8 or options.repeats < 1:
        parser.error("arguments --tokens and --repeats: need a multiple of 8, and at least 1")
    if options.parts:
        ranks, tokens, causal = options.parts
        parts(Ring(ranks, tokens, 4, 4, 64, 4, bool(causal)))
    elif options.measure:
        compare(options.tokens, options.repeats)
    else:
        tables()
    return 0


if __name__ == "__main__":
    sys.exit(main())
