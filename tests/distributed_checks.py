"""What each of a few ranks does for test_distributed.py: distributed_checks.py RANK SIZE FOLDER runs every check, once.

All ranks run the same checks in the same order; what goes wrong in one is written into FOLDER as its traceback.
"""

import hashlib
import itertools
import json
import os
import random
import sys
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
import torch.distributed as dist
from exact_attention import exact, kernel_errors, ring_bounds, share
from patience import LIMIT
from ring_cost import Ring, merge_received, sent_bytes

import rau
from rau.distributed import LostRankError, merge, merge_scatter, ring_attention
from rau.distributed.attention import _products, attend, attend_backward
from rau.distributed.ring import _Plan
from rau.testing import oracle

RANK, SIZE = int(sys.argv[1]), int(sys.argv[2])
OUT_OF_STEP = random.Random(RANK)
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def out_of_step():
    """Let ranks arrive in another order every time."""
    time.sleep(OUT_OF_STEP.random() / 30)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def everyone_has(value):
    """Assert that something is the same on all ranks."""
    found = [None] * SIZE
    dist.all_gather_object(found, value)
    assert found == [value] * SIZE, found


def raised(kind, *arguments, call=merge, **options):
    try:
        call(*arguments, **options)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


@contextmanager
def broken_group():
    """A group of all ranks that cannot be used any more afterwards; left alone, gloo's thread would be busy with it."""
    group = dist.new_group()
    yield group
    dist.barrier()
    dist.destroy_process_group(group)


# ---- states ---------------------------------------------------------------------------------------------------------

S, B, N, D = 5, 2, 3, 4
SHAPES = {"SBH": (S, B, N * D), "BSND": (B, S, N, D), "BNSD": (B, N, S, D), "TND": (S * B, N, D)}


def states(layout="SBH", dtypes=("float32",) * 8, lanes=1, seed=0):
    """States with empty rows, NaN behind them, and gaps between the maxima."""
    made = []
    for k, dtype in enumerate(dtypes):
        generator = seeded(seed + k)
        rows = (S * B, N) if layout == "TND" else (B, N, S)
        wide = torch.float64 if dtype == "float64" else torch.float32
        maximum = (30 * torch.randn(rows, generator=generator)).to(wide)[..., None]
        total, seen = torch.rand(2, *rows, 1, generator=generator)
        total = (total * (seen < 0.8)).to(wide)
        out = torch.randn(SHAPES[layout], generator=generator)
        if layout in ("BNSD", "TND"):
            out = out.masked_fill(total == 0, torch.nan)
        lane = (*rows, lanes)
        made.append(rau.AttentionState(out.to(getattr(torch, dtype)), maximum.expand(lane), total.expand(lane)))
    return made


def spread(numbers):
    """Cut a list of states into lists of so many, one for each rank."""
    ends = [0, *itertools.accumulate(numbers)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def bits(state):
    """A digest; any NaN equals any other."""
    digest = hashlib.sha256()
    for part in state:
        digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
        digest.update(part.nan_to_num(12345.0).double().numpy().tobytes())
    return digest.hexdigest()


SPREADS = {1: [(8,)], 2: [(4, 4), (1, 7), (0, 8)], 4: [(2, 2, 2, 2), (5, 1, 0, 2), (0, 0, 8, 0)]}


@check
def the_merge_of_a_list_has_its_bits_however_it_is_spread():
    mixed = ("float32", *("bfloat16",) * 7)
    for layout, dtypes, lanes in [
        ("SBH", ("bfloat16",) * 8, 8), ("BNSD", ("float64",) * 8, 1), ("TND", mixed, 1), ("BSND", ("float16",) * 8, 1),
    ]:  # fmt: skip
        every = states(layout, dtypes, lanes)
        wanted = bits(rau.merge_states(every, layout=layout))
        for size, spreads in SPREADS.items():
            group = GROUPS[size]
            for numbers in spreads if RANK < size else ():
                out_of_step()
                assert bits(merge(every[spread(numbers)[RANK]], group, layout=layout)) == wanted, (layout, numbers)
    packed = states("TND")
    how = {"layout": "TND", "softmax_layout": "SBH", "actual_seq_qlen": [0, 3, 3, S * B]}
    assert bits(merge(packed[2 * RANK : 2 * RANK + 2], **how)) == bits(rau.merge_states(packed, **how))
    one = states()[RANK]
    assert bits(merge(one)) == bits(rau.merge_states(states()[:SIZE])) == bits(merge([one], GROUPS[4]))


@check
def a_share_is_a_slice_of_the_merge():
    for layout, over, axes in [
        ("SBH", "heads", (2, 1)), ("SBH", "tokens", (0, 2)), ("TND", "heads", (1, 1)), ("TND", "tokens", (0, 0)),
        ("BNSD", "heads", (1, 1)), ("BSND", "tokens", (1, 2)),
    ]:  # fmt: skip
        every = states(layout, ("bfloat16",) * 8, 8)
        whole = rau.merge_states(every, layout=layout)
        for size in (1, 2, 4):  # 3 heads and 5 or 10 tokens: the shares are uneven, and one is empty
            if RANK >= size:
                continue
            number = N if over == "heads" else whole[1].shape[axes[1]]
            parts = torch.arange(number).tensor_split(size)
            first, last = (sum(map(len, parts[:rank])) for rank in (RANK, RANK + 1))
            wide = D if (layout, over) == ("SBH", "heads") else 1
            wanted = rau.AttentionState(
                whole[0].narrow(axes[0], first * wide, (last - first) * wide),
                *(part.narrow(axes[1], first, last - first) for part in whole[1:]),
            )
            for numbers in SPREADS[size]:
                out_of_step()
                mine = every[spread(numbers)[RANK]]
                found = merge_scatter(mine, GROUPS[size], layout=layout, over=over)
                assert bits(found) == bits(wanted), (layout, over, size, numbers)


@check
def a_tree_has_the_same_bits_on_every_rank_and_keeps_its_bound():
    for numbers in [(1, 1), (1, 1, 1), (1, 1, 1, 1), (3, 0, 4, 1)]:
        size, count = len(numbers), sum(numbers)
        if RANK >= size:
            continue
        for dtype in ("float32", "bfloat16"):
            every = states("BNSD", (dtype,) * 8, 8)[:count]
            out_of_step()
            found = merge(every[spread(numbers)[RANK]], GROUPS[size], layout="BNSD", method="tree")
            same = [None] * size
            dist.all_gather_object(same, bits(found), group=GROUPS[size])
            assert same == [bits(found)] * size
            assert [(part.dtype, part.shape) for part in found] == [(part.dtype, part.shape) for part in every[0]]
            host = [[part.double().nan_to_num(0.0).numpy() for part in state] for state in every]
            right, sizes = (
                torch.tensor(oracle([(term(out), *stats) for out, *stats in host], layout="BNSD").attn_out.astype("float64"))
                for term in (lambda out: out, abs)
            )
            depth, most, u = (size - 1).bit_length(), max(numbers), 2.0**-24
            bound = (1.01 * (5 * depth + most + 1) * u + (dtype == "bfloat16") * 2.0**-8) * sizes
            assert ((found.attn_out.double() - right).abs() <= bound).all()
            assert bits(found) != bits(every[0])
    # A tree's bits may differ from those of one pass: nothing else here would notice a tree that gathers.
    wide = states("BNSD", seed=100)[:4]
    assert bits(merge(wide[RANK], layout="BNSD", method="tree")) != bits(merge(wide[RANK], layout="BNSD"))


@contextmanager
def counting():
    """Count the bytes that this rank receives and sends in what is handed to torch.distributed, descriptions left out."""
    found, kept = Counter(), (dist.all_gather, dist.all_to_all_single, dist.batch_isend_irecv)

    def all_gather(everyone, mine, **options):
        if mine.numel() != 1024:
            found["received"] += sum(each.nbytes for each in everyone) - mine.nbytes
        return kept[0](everyone, mine, **options)

    def all_to_all_single(theirs, mine, received, sent, **options):
        found["received"] += sum(received) - received[RANK]
        return kept[1](theirs, mine, received, sent, **options)

    def batch_isend_irecv(operations):
        found["received"] += sum(each.tensor.nbytes for each in operations if each.op is dist.irecv)
        found["sent"] += sum(each.tensor.nbytes for each in operations if each.op is dist.isend)
        return kept[2](operations)

    dist.all_gather, dist.all_to_all_single, dist.batch_isend_irecv = all_gather, all_to_all_single, batch_isend_irecv
    try:
        yield found
    finally:
        dist.all_gather, dist.all_to_all_single, dist.batch_isend_irecv = kept


@check
def the_bytes_are_those_of_the_model():
    rows, width = 16, 32  # a state of 4 heads, whose shares are multiples of 8 bytes
    state = rau.AttentionState(torch.ones(rows, 4, width, dtype=torch.bfloat16), *torch.ones(2, rows, 4, 1))
    table = []
    for method in ("gather", "tree", "scatter"):
        for size in (2, 4):
            if RANK < size:
                with counting() as found:
                    if method == "scatter":
                        merge_scatter(state, GROUPS[size], layout="TND")
                    else:
                        merge(state, GROUPS[size], layout="TND", method=method)
                predicted = merge_received(method, size, rows * 4, width, 2)
                assert found["received"] == predicted, (method, size, found)
                table.append(f"| {method} | {size} | {predicted} | {found['received']} |\n")
    ring = Ring(SIZE, 64, 4, 2, 8, 2, causal=True)  # whose gradients travel in float32
    q, k, v = (torch.randn(1, heads, 64 // SIZE, 8).bfloat16().requires_grad_() for heads in (4, 2, 2))
    for phase, predicted in zip(("forward", "backward"), sent_bytes(ring), strict=True):
        with counting() as found:
            if phase == "forward":
                out, _ = ring_attention(q, k, v, causal=True)
            else:
                out.sum().backward()
        assert found["sent"] == found["received"] == predicted
        table.append(f"| ring, {phase} | {SIZE} | {predicted} | {found['received']} |\n")
    if RANK == 0:
        assert "".join(table) in (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")


# ---- rings ----------------------------------------------------------------------------------------------------------


class Problem:
    """Whole sequences, which every rank makes for itself, and which tokens of them each rank holds."""

    def __init__(self, layout, causal, dtype="float32", heads=4, kv_heads=4, sink=False, uneven=False, scale=None, D=16, Dv=16):
        self.layout, self.causal, self.scale, self.heads = layout, causal, scale, heads
        dtype, generator = getattr(torch, dtype), seeded(5)
        count = 3 if layout == "TND" else 2
        self.q_places, self.k_places = [], []
        self.whole = []
        for sequence in range(count):
            sizes = [4] * SIZE
            if uneven:
                sizes = [(3 * rank + (sequence if layout == "TND" else 0)) % 5 for rank in range(SIZE)]
            if causal:
                chunks, starts = [*sizes, *sizes[::-1]], [0]
                starts += itertools.accumulate(chunks)
                places = [
                    [start + k for start in (starts[r], starts[-2 - r]) for k in range(sizes[r])] for r in range(SIZE)
                ]
                k_places = places
            else:
                places = [list(range(sum(sizes[:r]), sum(sizes[: r + 1]))) for r in range(SIZE)]
                more = [size + 1 if uneven else size for size in sizes[::-1]]
                k_places = [list(range(sum(more[:r]), sum(more[: r + 1]))) for r in range(SIZE)]
            self.q_places.append(places)
            self.k_places.append(k_places)
            tokens, keys = (sum(map(len, each)) for each in (places, k_places))
            shapes = (heads, tokens, D), (kv_heads, keys, D), (kv_heads, keys, Dv), (heads, tokens, Dv)
            self.whole.append([torch.randn(1, *shape, generator=generator).to(dtype) for shape in shapes])
        wide = torch.promote_types(dtype, torch.float32)
        self.sink = torch.randn(heads, generator=generator).to(wide) if sink else None

    def held(self, parts, places):
        """Put this rank's tokens of whole sequences into the layout."""
        mine = [part[:, :, its[RANK]] for part, its in zip(parts, places, strict=True)]
        if self.layout == "TND":
            return torch.cat([each[0].transpose(0, 1) for each in mine])
        batch = torch.cat(mine)
        return batch if self.layout == "BNSD" else batch.transpose(1, 2).contiguous()

    def local(self):
        q, k, v, dout = zip(*self.whole, strict=True)
        of_q, of_k = self.q_places, self.k_places
        return [self.held(q, of_q), self.held(k, of_k), self.held(v, of_k), self.held(dout, of_q)]

    def run(self, **how):
        *leaves, dout = self.local()
        leaves = [leaf.requires_grad_() for leaf in leaves]
        sink = None if self.sink is None else self.sink.clone().requires_grad_()
        ends = {}
        if self.layout == "TND":
            lengths = ([len(places[RANK]) for places in each] for each in (self.q_places, self.k_places))
            qlen, kvlen = ([0, *itertools.accumulate(each)] for each in lengths)
            ends = {"actual_seq_qlen": qlen, "actual_seq_kvlen": torch.tensor(kvlen)}
        out_of_step()
        out, lse = ring_attention(
            *leaves, causal=self.causal, layout=self.layout, sink=sink, scale=self.scale, timeout=LIMIT / 10, **ends, **how
        )
        assert not lse.requires_grad and out.dtype == leaves[0].dtype
        out_of_step()
        out.backward(dout)
        return [out.detach(), *(leaf.grad for leaf in leaves)], lse, None if sink is None else sink.grad

    def judge(self, kernel=None):
        """Compare with one softmax in float64, of each element by the bound, and tell the largest share of it."""
        forward, backward = kernel or (attend, attend_backward)
        group = self.heads // self.whole[0][1].shape[1]

        def attention(q, k, v, dout, causal):
            out, lse = forward(q, k, v, causal)
            return lse, [out, *backward(dout, q, k, v, out, lse, causal)]

        how = {} if kernel is None else {"forward": forward, "backward": backward}
        results, lse, of_sink = self.run(**how)
        samples = [(q, k, v, dout) for q, k, v, dout in self.whole]
        repeated = [(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), dout) for q, k, v, dout in samples]
        scale = 1.0 if self.scale is None else self.scale * self.whole[0][0].shape[-1] ** 0.5  # what q is to be multiplied with
        measured = kernel_errors(attention, repeated, self.causal).tolist()
        bounds = ring_bounds(measured, results[0].dtype, SIZE + (self.sink is not None) + group - 1)
        right = [exact(q.double() * scale, k, v, dout, self.causal, self.sink) for q, k, v, dout in repeated]
        for which, (result, bound) in enumerate(zip(results, bounds, strict=True)):
            values, sizes = ([each[part][which] for each in right] for part in (1, 2))
            if which == 1:  # of q, which was scaled
                values, sizes = ([each * scale for each in those] for those in (values, sizes))
            if which >= 2 and group > 1:  # of key heads that were repeated
                values, sizes = ([each.unflatten(1, (-1, group)).sum(2) for each in those] for those in (values, sizes))
            places = self.k_places if which >= 2 else self.q_places
            found = share(result, self.held(values, places), self.held(sizes, places)) / bound if result.numel() else 0
            assert found <= 1, (which, float(found))
        rows = self.held([each[0][..., None] for each in right], self.q_places)
        its = lse.transpose(1, 2)[..., None] if self.layout == "BSND" else lse[..., None]
        assert its.shape == rows.shape and ((its - rows).abs() <= 2 * measured[0] + 2.0**-21 * (1 + rows.abs())).all()
        if self.sink is not None:
            terms = [
                ((self.sink.double()[:, None] - its_lse).exp() * (dout.double() * values[0]).sum(-1), sizes[0], dout)
                for (its_lse, values, sizes), (_, _, _, dout) in zip(right, self.whole, strict=True)
            ]
            whole = sum(-each.sum((0, 2)) for each, _, _ in terms)
            size = sum((out_size * dout.double().abs()).sum((0, 2, 3)) for _, out_size, dout in terms)
            total = of_sink.double()
            dist.all_reduce(total)
            assert ((total - whole).abs() <= 2 * bounds[1] * size).all()
        return results


@check
def a_ring_is_one_softmax_within_the_bound_in_every_mode():
    for mode in (
        {"layout": "BNSD", "causal": False},
        {"layout": "BNSD", "causal": True},
        {"layout": "BSND", "causal": True, "kv_heads": 2, "dtype": "bfloat16"},
        {"layout": "BSND", "causal": False, "kv_heads": 1, "sink": True, "uneven": True},
        {"layout": "BNSD", "causal": True, "sink": True, "dtype": "float64", "scale": 0.3},
        {"layout": "BNSD", "causal": True, "uneven": True, "scale": 0.5},
        {"layout": "TND", "causal": False, "uneven": True, "dtype": "float16"},
        {"layout": "TND", "causal": True, "uneven": True, "kv_heads": 2, "sink": True},
        {"layout": "TND", "causal": True, "dtype": "bfloat16"},
    ):
        try:
            Problem(**mode).judge()
        except Exception as error:
            raise AssertionError(f"{mode}: {error}") from error


def products(q, k, v, causal):
    """An attention function of the caller's, which torch differentiates; it takes other head dimensions of v."""
    scores = q @ k.mT / q.shape[3] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@check
def any_attention_function_will_do():
    for causal in (False, True):
        problem = Problem("BNSD", causal, dtype="float64", Dv=8)
        out, lse, _ = problem.run(forward=products)
        wanted = []
        for q, k, v, dout in problem.whole:
            leaves = [each.requires_grad_() for each in (q, k, v)]
            its, _ = products(*leaves, causal)
            wanted.append([its.detach(), *torch.autograd.grad(its, leaves, dout)])
        for which, result in enumerate(out):
            whole = [each[which] for each in wanted]
            expected = problem.held(whole, problem.k_places if which >= 2 else problem.q_places)
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)
    calls = Counter()

    def counted(name, function):
        def call(*given):
            calls[name] += 1
            return function(*given)

        return call

    Problem("TND", True).judge((counted("forward", attend), counted("backward", attend_backward)))
    assert calls["forward"] >= 3 * SIZE and calls["backward"] >= 3 * SIZE
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    for kernel, kind, said in [
        ([lambda *given: [each.detach() for each in attend(*given)]], rau.UnsupportedError, "the kernel's own gradient as backward="),
        ([attend, lambda *given: attend_backward(*given)[:2]], rau.OptionError, "expected those of q, k and v, [(1, 2, 4, 8), (1"),
        ([attend, lambda *given: [each[:, :, :1] for each in attend_backward(*given)]], rau.OptionError, "shapes [(1, 2, 1, 8), (1"),
    ]:
        with broken_group() as group:
            out, _ = ring_attention(q, q, q, group, **dict(zip(("forward", "backward"), kernel)))
            assert said in raised(kind, call=out.sum().backward)
    out, _ = ring_attention(q, q, q)
    message = raised(rau.UnsupportedError, out.sum(), q, create_graph=True, call=torch.autograd.grad)
    assert "create_graph" in message


@check
def a_ring_has_the_same_bits_at_every_run():
    for mode in (
        {"layout": "BNSD", "causal": True, "dtype": "bfloat16", "sink": True},
        {"layout": "TND", "causal": False, "uneven": True},
    ):
        runs = [Problem(**mode).run() for _ in range(3)]
        digests = {bits([*results, lse, *([] if of_sink is None else [of_sink])]) for results, lse, of_sink in runs}
        assert len(digests) == 1


@check
def queries_may_lie_anyhow():
    """The kernels that are called below torch's dispatch read the last axis as contiguous."""
    seeded(dist.get_rank())
    q, k, v = (torch.randn(1, 2, 6, 16, 3) for _ in range(3))
    spread_out, packed = ([each[..., 0].detach() for each in (q, k, v)] for _ in range(2))
    packed = [each.contiguous() for each in packed]
    found = []
    for leaves in (spread_out, packed):
        leaves = [each.requires_grad_() for each in leaves]
        out, _ = ring_attention(*leaves, layout="BNSD")
        out.sum().backward()
        found.append([out.detach(), *(each.grad for each in leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@check
def a_ring_agrees_with_torchs_templates():
    from torch.distributed.tensor.experimental._context_parallel import _attention as templates

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    for causal in (False, True):
        templates._cp_options.enable_load_balance = causal
        problem = Problem("BNSD", causal)
        q, k, v, dout = problem.local()
        how = {"is_causal": causal, "dropout_p": 0.0}
        out, lse = templates._templated_ring_attention(dist.group.WORLD, 2, kernel, q, k, v, **how)
        theirs = templates._templated_ring_attention_backward(
            dist.group.WORLD, 2, kernel_backward, dout, "grad_out", q, k, v, out, lse, **how
        )
        results, its_lse, _ = problem.run()
        right = [exact(*sequence, causal) for sequence in problem.whole]
        for which, (mine, its) in enumerate(zip(results, (out, *theirs), strict=True)):
            sizes = problem.held([each[2][which] for each in right], problem.k_places if which >= 2 else problem.q_places)
            assert ((mine - its).abs() <= 2.0**-19 * sizes).all()
        torch.testing.assert_close(its_lse, lse, rtol=0, atol=2.0**-20)


@check
def a_mask_that_is_wrong_is_found():
    right = _Plan.visible
    _Plan.visible = lambda plan, source: (None, None, False) if source == plan.ranks.rank else right(plan, source)
    try:
        raised(AssertionError, call=Problem("BNSD", True).judge)
    finally:
        _Plan.visible = right
    dist.barrier()


# ---- calls that do not fit ------------------------------------------------------------------------------------------


@check
def ranks_that_disagree_are_told_before_anything_is_sent():
    one = states()[RANK]
    with counting() as found:
        message = raised(rau.ConstraintError, one, method="tree" if RANK == 2 else "gather")
        assert message == 'merge: [ranks] method is "gather" on rank 0, 1, 3, "tree" on rank 2; expected the same on all ranks.'
        message = raised(rau.ConstraintError, one if RANK else states("BNSD")[0], layout="SBH" if RANK else "BNSD")
        assert "layout is" in message and "attn_out.shape is [2, 3, 5, 4] on rank 0, [5, 2, 12] on rank 1, 2, 3;" in message
        message = raised(rau.ConstraintError, [one] if RANK else one[0])
        if RANK:
            assert message.startswith("merge: [ranks] rank 0 refused its part of the call: ShapeError: merge: [states] state is of")
        else:
            assert "state is of type torch.Tensor; expected an AttentionState of torch tensors, or a list of them" in message
        found_dtypes = {0: "bfloat16", 2: "float16"}
        mixed = one._replace(attn_out=one.attn_out.to(getattr(torch, found_dtypes.get(RANK, "bfloat16"))))
        message = raised(rau.ConstraintError, mixed, method="tree")
        assert "attn_out is float16 on rank 2, and the first state's is bfloat16; expected bfloat16." in message
        message = raised(rau.ConstraintError, [])
        assert "state is an empty list on every rank" in message
        q = torch.randn(1, 2, 4, 8)
        call, arguments = (ring_attention, [q] * 3) if RANK else (merge, [one])
        assert 'call is "merge" on rank 0, "ring_attention" on rank 1, 2, 3' in raised(rau.ConstraintError, *arguments, call=call)
        for wrong, said in [
            ({"causal": RANK == 3}, "causal is false on rank 0, 1, 2, true on rank 3"),
            ({"scale": 0.5 if RANK else None}, 'scale is "None" on rank 0, "0.5" on rank 1, 2, 3'),
            ({"sink": torch.zeros(2) if RANK == 1 else None}, "sink is given is false on rank 0, 2, 3, true on rank 1"),
        ]:
            assert said in raised(rau.ConstraintError, q, q, q, call=ring_attention, **wrong)
        mine = q.clone().requires_grad_(RANK == 0)
        assert "a gradient is wanted is true on rank 0, false on" in raised(rau.ConstraintError, mine, q, q, call=ring_attention)
        assert not found, found  # no bytes but those of descriptions
    everyone_has(bits(merge(one)))  # and the group is as good as before
    long = [0] * 400 + [S * B]  # a description that is longer than what is exchanged at once
    how = {"layout": "TND", "softmax_layout": "SBH"}
    merge(states("TND")[0], actual_seq_qlen=long, **how)
    assert "actual_seq_qlen is" in raised(rau.ConstraintError, states("TND")[0], actual_seq_qlen=long[RANK == 1 :], **how)


@check
def wrong_arguments():
    one = states()[RANK]
    grad = one._replace(attn_out=one.attn_out.clone().requires_grad_())
    assert "a tensor requires grad" in raised(rau.UnsupportedError, grad)
    with torch.no_grad():
        merge(grad)
    assert "method = 'ring'" in raised(rau.OptionError, one, method="ring")
    assert "over = 'rows'" in raised(rau.OptionError, one, over="rows", call=merge_scatter)
    arrays = [part.numpy() for part in one]
    assert "states[0].attn_out is of type numpy.ndarray; expected a torch" in raised(rau.DTypeError, [arrays])
    for timeout in (0, -1.0, "60", True, float("nan"), float("inf")):
        assert "expected a positive number of seconds" in raised(rau.OptionError, one, timeout=timeout)
    assert "group is of type str" in raised(rau.OptionError, one, "world")
    with torch.autocast("cpu", torch.bfloat16):  # products of 16 bits would be off by as much as these are long
        inputs = [torch.randn(1, 2, 6, 8, generator=seeded(k)) for k in range(3)]
        torch.testing.assert_close(_products(*inputs, True, None)[1], attend(*inputs, True)[1], rtol=2**-20, atol=2**-20)
    q, k, odd = torch.randn(1, 4, 6, 8), torch.randn(1, 3, 6, 8), torch.randn(1, 4, 5, 8)
    for arguments, options, kind, said in [
        ((q, k, k), {}, rau.ShapeError, "q has 4 heads and k has 3"),
        ((q, q, q[..., :4]), {}, rau.OptionError, "v has D = 4 and q 8; torch's own kernel expects the same. Pass a forward"),
        ((q, q.double(), q), {}, rau.DTypeError, "k has dtype torch.float64; expected that of q, torch.float32"),
        ((q[0], q, q), {}, rau.ShapeError, 'q has shape (4, 6, 8); layout "BNSD" expects (B, N, S, D)'),
        ((q, q, odd), {}, rau.ShapeError, "v has shape (1, 4, 5, 8); expected that of k but for D"),
        ((q, odd, odd), {"causal": True}, rau.ShapeError, "queries have [6] tokens and keys [5]; with causal=True"),
        ((odd, odd, odd), {"causal": True}, rau.ShapeError, "this rank holds [5] tokens of the sequences; with causal=True"),
        ((q, q, q), {"causal": "yes"}, rau.OptionError, "causal = 'yes'; expected True or False"),
        ((q, q, q), {"layout": "SBH"}, rau.LayoutError, 'layout = \'SBH\'; expected one of "BNSD", "BSND", "TND"'),
        ((q, q, q), {"layout": "BHSD"}, rau.LayoutError, "BNSD"),
        ((q, q, q), {"actual_seq_qlen": [0, 6]}, rau.OptionError, "actual_seq_qlen is given"),
        (
            (q[0].mT, q[0].mT, q[0].mT),
            {"layout": "TND", "actual_seq_qlen": [0, 3]},
            rau.ConstraintError,
            "actual_seq_qlen = [0, 3]",
        ),
        ((q, q, q), {"sink": torch.zeros(3)}, rau.ShapeError, "sink has dtype torch.float32 and shape (3,)"),
        ((q, q, q), {"backward": products}, rau.OptionError, "backward is given, but not the forward"),
        ((q, q, q), {"forward": products, "scale": 1.0}, rau.OptionError, "a forward scales its scores itself"),
        ((q, q, q), {"forward": "flash"}, rau.OptionError, "forward is of type str; expected a function"),
        ((q, q, q), {"scale": "2"}, rau.OptionError, "scale = '2'; expected a number"),
        ((q.numpy(), q, q), {}, rau.DTypeError, "q is of type numpy.ndarray; expected a torch tensor"),
        ((q.to("meta"),) * 3, {}, rau.ConstraintError, "tensors are on meta; expected cpu, which is what the group's backend"),
    ]:
        message = raised(kind, *arguments, call=ring_attention, **options)
        assert said in message, (said, message)


# ---- ranks that are lost: last, since one of them ends ---------------------------------------------------------------

VICTIM = 1


@check
def a_silent_rank_ends_in_one_error_in_time():
    """Not later: the group's own timeout is longer than these tests wait."""
    one, q, timeout = states()[RANK], torch.randn(1, 2, 4, 8, requires_grad=True), LIMIT / 100

    def waited(call):
        start = time.monotonic()
        try:
            call()
        except LostRankError as error:
            return str(error), time.monotonic() - start
        raise AssertionError("nobody noticed")

    for way in (merge, merge_scatter):
        with broken_group() as group:
            if RANK != VICTIM:
                message, seconds = waited(lambda: way(one, group, timeout=timeout))
                assert f"{way.__name__}: rank {RANK} of {SIZE}: a rank is lost or too slow" in message, message
                assert seconds > 0.9 * timeout, seconds

    def slow(phase, kernel):
        def waits(*given):
            while RANK == VICTIM and STORE.add(phase, 0) < SIZE - 1:  # until the others have given up
                time.sleep(0.05)
            return kernel(*given)

        return waits

    for phase, kernel in (("forward", attend), ("backward", attend_backward)):
        names = {"forward": attend, "backward": attend_backward} | {phase: slow(phase, kernel)}
        with broken_group() as group:
            message, _ = waited(lambda: ring_attention(q, q, q, group, timeout=timeout, **names)[0].sum().backward())
            STORE.add(phase, 1)
        before, after = (RANK - 1) % SIZE, (RANK + 1) % SIZE
        assert f"ring_attention: rank {RANK} of {SIZE}: a rank is lost or too slow, {phase}, step " in message, message
        assert f"waiting for rank {before} to send or rank {after} to receive" in message
    # A rank that is slow, but not too slow, is waited for.
    if RANK == VICTIM:
        time.sleep(0.7)
    ring_attention(q, q, q, timeout=LIMIT)


@check
def a_killed_rank_ends_in_one_error():
    q = torch.randn(1, 2, 4, 8)

    def kernel(*given):
        if RANK == VICTIM:
            (FOLDER / f"{RANK}.json").write_text(json.dumps(RESULTS))
            os.kill(os.getpid(), 9)
        return attend(*given)

    message = raised(LostRankError, q, q, q, forward=kernel, backward=attend_backward, timeout=LIMIT / 15, call=ring_attention)
    assert "ring_attention" in message
    raised(LostRankError, states()[RANK], timeout=LIMIT / 60)


# ---- the process ----------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    torch.set_num_threads(1)
    FOLDER, RESULTS = Path(sys.argv[3]), {}
    STORE, patience = dist.FileStore(str(FOLDER / "store"), SIZE), timedelta(seconds=LIMIT / 3)
    dist.init_process_group("gloo", store=STORE, rank=RANK, world_size=SIZE, timeout=patience)
    LAST = list(CHECKS)[-1]
    GROUPS = {size: dist.new_group(list(range(size)), timeout=patience) for size in range(1, SIZE + 1)}
    for name, function in CHECKS.items():
        start = time.monotonic()
        try:
            function()
            RESULTS[name] = None
        except BaseException:
            RESULTS[name] = traceback.format_exc()
        print(RANK, name, f"{time.monotonic() - start:.2f} s", file=sys.stderr)
        # A rank that has failed is out of step, and the others would wait for it in every check that follows.
        STORE.set(f"{name} {RANK}", "failed" if RESULTS[name] else "passed")
        others = [rank for rank in range(SIZE) if name != LAST or rank != VICTIM]
        if b"failed" in [STORE.get(f"{name} {rank}") for rank in others]:
            break
    (FOLDER / f"{RANK}.json").write_text(json.dumps(RESULTS))
    os._exit(0)  # leaving in good order would wait for the rank that is lost
