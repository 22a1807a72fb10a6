"""Decoding with a long KV cache that is split into parts: attention to each part, merged by `rau.merge_states`.

From a checkout, in a fresh environment:

    python -m pip install -e '.[torch]'
    python examples/split_kv_decode.py

One query attends to a cache of many keys. One unit of work per head leaves most of a GPU idle, and a cache may well lie
on several of them; so it is cut into K parts, which can be worked on at the same time, and their partial results are
merged in one pass, with one rounding. Here the parts are worked on one after another, by torch's own kernel, on a GPU
if there is one (never tried), else on the CPU.

Printed for each K: the time of the attention and of the merge, and the largest error against attention to the whole
cache in float64, also as a share of the bound at `bound`; and how the root mean square error compares with that of one
call of torch's kernel. Exit status 0 if no share is above 1 and no ratio above 2, 1 otherwise, 2 for wrong arguments.
"""

import argparse
import sys
import time
from statistics import median

import torch
from exact_attention import exact, kernel_errors, share

import rau

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def attend(q, k, v):
    """Torch's own kernel on (B, N, S, D): the output and its natural log-sum-exp, (B, N, S)."""
    if q.is_cuda:  # float16 and bfloat16
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


def partial_states(q, k, v, parts):
    """Attention to each part of the cache, as states in layout BNSD; the parts are views, nothing is copied."""
    states = []
    for keys, values in zip(k.tensor_split(parts, dim=2), v.tensor_split(parts, dim=2)):
        out, lse = attend(q, keys, values)
        states.append(rau.AttentionState.from_lse(out, lse, base="e", layout="BNSD"))
    return states


def bound(q, k, v, parts):
    """Return the bound of an output's error, as a multiple of its size: the sum of its terms' absolute values.

    It adds up the error e of a partial output, and 2 d because an error of d in its log-sum-exp changes its weight,
    both measured on the first part and doubled for the others; (K + 1) * 2**-24 for the merge of K states, as
    documented at `rau.merge_states`; and the rounding of the result to its dtype.
    """

    def attention(q, k, v, _dout, _causal):
        out, lse = attend(q, k, v)
        return lse, [out]

    first = (q, k.tensor_split(parts, dim=2)[0], v.tensor_split(parts, dim=2)[0], None)
    d, e = kernel_errors(attention, [first], causal=False).tolist()
    return 2 * (e + 2 * d) + (parts + 1) * 2.0**-24 + torch.finfo(q.dtype).eps / 2


def timed(job, device, repeats=5):
    """Return the job's result and its median time in seconds, without the first, which warms up."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        result = job()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return result, median(times[1:])


def main():
    """Split, merge, compare, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768, help="keys in the cache (default 32768)")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4, 16, 64], metavar="K", help="(1 2 4 16 64)")
    parser.add_argument("--queries", type=int, default=1, help="that attend to all of it (default 1)")
    parser.add_argument("--batch", type=int, default=1, help="B (default 1)")
    parser.add_argument("--heads", type=int, default=8, help="N (default 8)")
    parser.add_argument("--head-dim", type=int, default=64, help="D (default 64)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("tokens", "queries", "batch", "heads", "head_dim"):
        if getattr(options, name) <= 0:
            parser.error(f"argument --{name.replace('_', '-')}: must be positive")
    if not 1 <= min(options.parts) <= max(options.parts) <= options.tokens:
        parser.error(f"argument --parts: each must be from 1 to the number of tokens, {options.tokens}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random, dtype = torch.Generator(device).manual_seed(options.seed), DTYPES[options.dtype]
    q, k, v = (
        torch.randn(options.batch, options.heads, tokens, options.head_dim, generator=random, device=device).to(dtype)
        for tokens in (options.queries, options.tokens, options.tokens)
    )
    _, (right,), (size,) = exact(q, k, v)
    print(
        f"{options.queries} query tokens, a cache of {options.tokens}, B = {options.batch}, N = {options.heads}, "
        f"D = {options.head_dim}, {options.dtype}, on {device}, torch {torch.__version__}\n\n"
        "parts   attention, ms   merge, ms   largest error   share of the bound   rms error, by that of one call"
    )
    one_call = (attend(q, k, v)[0] - right).norm()
    good = True
    for parts in options.parts:
        states, attention = timed(lambda: partial_states(q, k, v, parts), device)
        # Nobody goes on to merge it: the output is enough.
        merged, merge = timed(lambda: rau.merge_states(states, layout="BNSD", statistics=False), device)
        error = merged - right
        of_bound = share(merged, right, size).item() / bound(q, k, v, parts)
        ratio = (error.norm() / one_call).item()
        good &= of_bound <= 1 and ratio <= 2  # a NaN is neither
        times = f"{attention * 1e3:16.2f}{merge * 1e3:12.3f}"
        print(f"{parts:5}{times}{error.abs().max().item():16.2e}{of_bound:21.3f}{ratio:33.2f}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
