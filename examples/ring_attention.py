"""Ring attention on torch.distributed: exact attention over a sequence that no single rank holds, and its gradient.

From a checkout, in a fresh environment:

    python -m pip install -e '.[torch]'
    torchrun --standalone --nproc-per-node 4 examples/ring_attention.py --causal

Gloo on CPUs; nccl where every local rank has a GPU of its own. It has run on CPUs only, never on a GPU.

Every rank holds a part of the queries, keys and values. Keys and values travel round the ring; each rank attends to
those that it has at the moment while the next ones are under way, and `rau.StreamingMerge` turns the partial results
into attention to all the keys. In the backward pass the gradients of keys and values travel along.

Causal attention would leave the ranks with early tokens idle. Zig-zag balances it: of 2P chunks of each sequence rank
r holds chunk r (its "front") and chunk 2P-1-r (its "back"). Of an earlier rank's keys, the front half are visible to
all the queries; a later rank's keys are all visible to the back half of the queries: every step costs the same.

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
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate

import torch
import torch.distributed as dist
from exact_attention import kernel_errors, verdict

import rau

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
aten = torch.ops.aten


# ---- the ring -------------------------------------------------------------------------------------------------------


class Ring:
    """The way from each rank to the next, with a clock for each phase and a count of the bytes sent."""

    def __init__(self, device):
        self.device = device
        self.seconds, self.sent = defaultdict(float), 0

    @contextmanager
    def phase(self, name):
        """Time a phase; a GPU's own stream is waited for, the stream that communicates is not."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self.seconds[name] += time.perf_counter() - start

    def start(self, outgoing, incoming):
        """Begin to send `outgoing` to the next rank and to receive `incoming` from the one before."""
        if RANKS == 1:
            incoming.copy_(outgoing)
            return []
        self.sent += outgoing.nbytes
        send = dist.P2POp(dist.isend, outgoing, (RANK + 1) % RANKS)
        receive = dist.P2POp(dist.irecv, incoming, (RANK - 1) % RANKS)
        with lost_rank(f"passing tensors from rank {(RANK - 1) % RANKS} to rank {(RANK + 1) % RANKS}"):
            return dist.batch_isend_irecv([send, receive])

    def finish(self, works):
        """Wait for what `start` began."""
        neighbours = f"waiting for rank {(RANK - 1) % RANKS} to send or rank {(RANK + 1) % RANKS} to receive"
        with self.phase("communication"), lost_rank(neighbours):
            for work in works:
                work.wait()

    def travel(self, kv):
        """Yield (rank of origin, keys and values) of every rank, one's own first; the next travel meanwhile."""
        spare = torch.empty_like(kv)
        for step in range(RANKS):
            last = step == RANKS - 1
            works = [] if last else self.start(kv, spare)
            yield (RANK - step) % RANKS, kv
            self.finish(works)
            kv, spare = spare, kv


@contextmanager
def lost_rank(doing):
    """Turn what torch.distributed raises when a rank is gone, or silent for too long, into one clear error."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"rank {RANK}: a rank is lost or too slow, {doing}: {reason}") from error


# ---- attention to one rank's keys -----------------------------------------------------------------------------------


def attend(q, k, v, causal):
    """Torch's own kernel on (B, N, S, D): the output and its natural log-sum-exp, (B, N, S)."""
    if q.is_cuda:  # float16 and bfloat16
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)


def attend_backward(dout, q, k, v, out, lse, causal):
    """Gradients by torch's own kernel.

    Given the output and log-sum-exp over *all* the keys, it makes of a part of the keys their part of dq, and their
    dk and dv: it recomputes the probabilities as exp(score - lse), and these are the final ones.
    """
    if q.is_cuda:
        unused = torch.zeros(2, dtype=torch.int64, device=q.device)  # the random state of a dropout that is off
        lengths = None, None, q.shape[2], k.shape[2]
        return aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, *lengths, 0.0, causal, unused, unused
        )
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal)


def cut(tensor, lengths, which=None):
    """Views (B, N, S, D) of the sequences in (S, B, N, D), which has one, or (T, N, D), which has one for each length.

    `which` is "front" or "back" for half of the tokens of each.
    """
    if tensor.dim() == 4:
        views = [tensor.permute(1, 2, 0, 3)]
    else:
        views = [part.transpose(0, 1)[None] for part in tensor.split(lengths)]
    if which:
        views = [view.chunk(2, dim=2)[which == "back"] for view in views]
    return views


def visible(source, causal):
    """Which queries of this rank attend to which keys of rank `source`, and whether by a triangular mask."""
    if not causal:
        return None, None, False
    if source == RANK:
        return None, None, True
    return (None, "front", False) if source < RANK else ("back", None, False)


def as_state(outs, lses, layout):
    """What the kernel returned for each sequence, as one state in layout SBH or TND."""
    if layout == "SBH":
        out, lse = outs[0].permute(2, 0, 1, 3).flatten(2), lses[0][..., None]  # views
    else:
        out = torch.cat([out[0].transpose(0, 1) for out in outs])
        lse = torch.cat([lse[0].T for lse in lses])[..., None]
    # The row (max, sum) = (lse, 1); in one lane, of which a ring moves fewer bytes than of the vendor's eight.
    return rau.AttentionState(out, lse, torch.ones_like(lse))


class RingAttention(torch.autograd.Function):
    """Attention of this rank's queries to the keys of all ranks; (S, B, N, D), or (T, N, D) with `lengths`."""

    @staticmethod
    def forward(ctx, q, k, v, ring, lengths, causal):
        """Merge one partial attention a step."""
        layout, ends = ("TND", [0, *accumulate(lengths)]) if lengths else ("SBH", None)
        merge = rau.StreamingMerge(layout, actual_seq_qlen=ends)
        for source, kv in ring.travel(torch.stack((k, v))):
            queries, keys, mask = visible(source, causal)
            with ring.phase("attention"):
                qs, ks, vs = cut(q, lengths, queries), cut(kv[0], lengths, keys), cut(kv[1], lengths, keys)
                parts = [attend(*sequence, mask) for sequence in zip(qs, ks, vs)]
                partial = as_state(*zip(*parts), layout)
            with ring.phase("merge"):
                merge.update(*partial, tokens=queries)
        with ring.phase("merge"):
            out, maximum, total = merge.result(q.dtype)
            out, lse = out.view_as(q), maximum + total.log()
            lse = lse if lengths else lse.permute(2, 0, 1, 3)  # with the axes of q
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring, ctx.lengths, ctx.causal = ring, lengths, causal
        return out

    @staticmethod
    def backward(ctx, dout):
        """Go round once more; dk and dv follow their keys and values one step behind, in float32."""
        q, k, v, out, lse = ctx.saved_tensors
        ring, lengths = ctx.ring, ctx.lengths
        dq = torch.zeros_like(q, dtype=torch.float32)
        dkv = torch.zeros(2, *k.shape, dtype=torch.float32, device=k.device)  # of the keys at hand
        arriving, works = torch.empty_like(dkv), []
        for source, kv in ring.travel(torch.stack((k, v))):
            queries, keys, mask = visible(source, ctx.causal)
            with ring.phase("attention"):
                douts, qs, outs, lses, dqs = (cut(each, lengths, queries) for each in (dout, q, out, lse, dq))
                ks, vs = (cut(each, lengths, keys) for each in kv)
                gradients = [
                    attend_backward(*sequence, lse1[..., 0], mask)
                    for *sequence, lse1 in zip(douts, qs, ks, vs, outs, lses)
                ]
            ring.finish(works)  # what the ranks before have added up for these keys
            if works:
                dkv, arriving = arriving, dkv
            with ring.phase("attention"):
                dks, dvs = (cut(each, lengths, keys) for each in dkv)
                for sums, terms in zip(zip(dqs, dks, dvs), gradients):
                    for total, term in zip(sums, terms):
                        total.add_(term)
            works = ring.start(dkv, arriving)
        ring.finish(works)  # the last hop brings them home
        return dq.to(q.dtype), *arriving.to(k.dtype), None, None, None


# ---- is it right? ---------------------------------------------------------------------------------------------------


def one_process(q, k, v, dout, causal):
    """Attention to all the keys, and its gradients, by torch's kernel alone."""
    out, lse = attend(q, k, v, causal)
    return lse, [out, *attend_backward(dout, q, k, v, out, lse, causal)]


def check(local, results, lengths, causal):
    """Compare with attention in one process over the gathered sequences; return the verdict on rank 0."""
    parts = zip(*(cut(each, lengths) for each in local))
    measured = kernel_errors(one_process, parts, causal=True)  # rows with few keys have the largest errors
    with lost_rank("comparing results"):
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
    """Read the command line; `lengths` are this rank's share of each sequence, None in layout SBH."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--causal", action="store_true", help="a query sees no later key")
    parser.add_argument("--layout", choices=("SBH", "TND"), default="SBH", help="TND: sequences of different lengths")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--tokens", type=int, default=4096, help="of the whole sequence; in TND of all (default 4096)")
    parser.add_argument("--sequences", type=int, default=24, help="layout TND: how many (default 24)")
    parser.add_argument("--batch", type=int, default=1, help="layout SBH: B (default 1)")
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
    with lost_rank("connecting"):
        dist.init_process_group("nccl" if enough else "gloo", timeout=timedelta(seconds=options.timeout), **alone)
    return device


def run(ring, local, lengths, causal):
    """One forward and one backward pass; return (attn_out, dq, dk, dv) and what it cost."""
    *inputs, dout = local
    inputs = [each.clone().requires_grad_() for each in inputs]
    cost = {}
    for name in ("forward", "backward"):
        ring.seconds, ring.sent = defaultdict(float), 0
        with lost_rank("before the next pass"):
            dist.barrier()
        with ring.phase("total"):
            if name == "forward":
                out = RingAttention.apply(*inputs, ring, lengths, causal)
            else:
                out.backward(dout)
        cost[name] = dict(ring.seconds, sent=ring.sent)
    return [out.detach(), *(each.grad for each in inputs)], cost


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
    try:
        ring = Ring(connect(options))
        lengths, dtype = options.lengths, DTYPES[options.dtype]
        tokens = (options.tokens // RANKS,) if lengths else (options.tokens // RANKS, options.batch)
        random = torch.Generator(ring.device).manual_seed(options.seed * RANKS + RANK)
        local = torch.randn(4, *tokens, options.heads, options.head_dim, generator=random, device=ring.device).to(dtype)
        memory = peak_memory(ring.device)
        run(ring, local, lengths, options.causal)  # once for nothing: it connects neighbours and makes kernels
        results, cost = run(ring, local, lengths, options.causal)
        cost["memory"] = peak_memory(ring.device) - memory
        report = check(local, results, lengths, options.causal)
        costs = [None] * RANKS if RANK == 0 else None
        with lost_rank("collecting times"):
            dist.gather_object(cost, costs)
    except ConnectionError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)  # leaving in good order would wait for the rank that is lost
    dist.destroy_process_group()
    if RANK:
        return 0
    title = (
        f"Ring attention, {'causal' if options.causal else 'full'}, layout {options.layout}, {options.dtype}: "
        f"{options.tokens} tokens, {f'{options.sequences} sequences' if lengths else f'B = {options.batch}'}, "
        f"N = {options.heads}, D = {options.head_dim}; {RANKS} ranks on {ring.device.type}, torch {torch.__version__}"
    )
    document = {"title": title, "ranks": costs, "results": report}
    print(json.dumps(document, indent=2)) if options.json else show(document)
    wrong = [name for name, found in report.items() if not found["right"]]
    if wrong:
        print(f"WRONG: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
