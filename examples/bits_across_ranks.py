"""The same bits across ranks: merge states that are spread over them, and go round a ring; print digests and errors.

From a checkout, in a fresh environment:

    python -m pip install -e '.[torch]'
    torchrun --standalone --nproc-per-node 4 examples/bits_across_ranks.py

Three statements, each shown by a line: the merge of eight states has the same digest with 1, 2, 4 or 8 ranks, in whatever
order these arrive, and the joined shares of merge_scatter have it too; a tree has the same bits on every rank, within its
bound; a ring has the same bits at every run with as many ranks, within the bound of attention in one process. Exit status 1
if one is not so.
"""

import hashlib
import os
import random
import sys
import time

import torch
import torch.distributed as dist
from exact_attention import exact, kernel_errors, ring_bounds, share

import rau
from rau.distributed import merge, merge_scatter, ring_attention
from rau.distributed.attention import attend, attend_backward

STATES, TOKENS, HEADS, HEAD_DIM = 8, 64, 8, 16


def state(k):
    """A state that an attention kernel could have returned over some keys, in layout TND; some rows have seen none."""
    generator = torch.Generator().manual_seed(k)
    out = torch.randn(TOKENS, HEADS, HEAD_DIM, generator=generator)
    lse = 10 * torch.randn(TOKENS, HEADS, generator=generator)
    empty = torch.rand(TOKENS, HEADS, generator=generator) < 0.1
    return rau.AttentionState.from_lse(out, lse.masked_fill(empty, -torch.inf), base="e", layout="TND", lse_layout="TN")


def digest(*tensors):
    """Hash the bits of tensors."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def gathered(value):
    """What every rank has, in rank order."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def late(function, *arguments, **options):
    """Call a function after a moment that nobody knows beforehand: ranks arrive in any order."""
    time.sleep(random.random() / 10)
    return function(*arguments, **options)


def of_tree(merged, states, ranks):
    """Largest error as a share of the bound at `rau.distributed.merge`, to first order and for one K on all ranks."""
    lse = torch.stack([each.lse(base="e", layout="TND", lse_layout="TN") for each in states]).double()
    weights = lse.softmax(0)[..., None] * torch.stack([each.attn_out for each in states])
    bound = (5 * (ranks - 1).bit_length() + len(states) // ranks + 1) * 2.0**-24
    return share(merged.attn_out, weights.sum(0), weights.abs().sum(0)).item() / bound


def zigzag(tensor, rank, ranks):
    """A rank's part of (B, N, S, D)."""
    chunks = tensor.chunk(2 * ranks, dim=2)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]], dim=2)


def ring(rank, ranks):
    """A causal ring, forward and backward: a digest of what this rank has, and its largest share of a bound."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(4, 1, 2, 2 * TOKENS, HEAD_DIM, generator=generator)
    *leaves, dout = (zigzag(each, rank, ranks) for each in whole)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out, lse = late(ring_attention, *leaves, causal=True)
    out.backward(dout)
    results = [out.detach(), *(leaf.grad for leaf in leaves)]

    def attention(q, k, v, dout, causal):
        out, lse = attend(q, k, v, causal)
        return lse, [out, *attend_backward(dout, q, k, v, out, lse, causal)]

    bounds = ring_bounds(kernel_errors(attention, [whole], causal=True).tolist(), whole.dtype, ranks)
    shares = []
    for result, right, size, bound in zip(results, *exact(*whole, causal=True)[1:], bounds):
        right, size = (zigzag(each, rank, ranks) for each in (right, size))
        shares.append(share(result, right, size).item() / bound)
    return digest(*results, lse), max(shares)


def main():
    """Show the three statements; return the exit status."""
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if STATES % ranks:
        sys.exit(f"bits_across_ranks.py: error: {ranks} ranks; expected 1, 2, 4 or {STATES}, which divide {STATES} states")
    states = [state(k) for k in range(STATES)]
    mine = states[rank * STATES // ranks : (rank + 1) * STATES // ranks]

    merged = late(merge, mine, layout="TND")
    shares = gathered([part.clone() for part in late(merge_scatter, mine, layout="TND", over="heads")])
    joined = digest(*(torch.cat(parts, 1) for parts in zip(*shares)))
    bits = {joined, *gathered(digest(*merged)), digest(*rau.merge_states(states, layout="TND"))}

    tree = late(merge, mine, layout="TND", method="tree")
    tree_bits, tree_share = set(gathered(digest(*tree))), of_tree(tree, states, ranks)

    runs = [gathered(ring(rank, ranks)) for _ in range(2)]
    ring_bits = {tuple(its for its, _ in run) for run in runs}
    ring_share = max(share for run in runs for _, share in run)
    good = len(bits) == len(tree_bits) == len(ring_bits) == 1 and tree_share <= 1 and ring_share <= 1
    if rank == 0:
        print(f"merge  {' '.join(sorted(bits))}")
        print(f"tree   {' '.join(sorted(tree_bits))}  {tree_share:.3f} of its bound, with {ranks} ranks")
        print(f"ring   {' '.join(sorted(hashlib.sha256(str(run).encode()).hexdigest()[:16] for run in ring_bits))}  "
              f"{ring_share:.3f} of its bound, with {ranks} ranks")  # fmt: skip
    dist.destroy_process_group()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
