"""What the examples are checked against: attention and its gradients in float64, and the sizes that errors go with."""

import torch

SCORES = 2**22  # computed at a time: 32 MB, several times


def exact(q, k, v, dout=None, causal=False, sink=None):
    """Attention and its gradients in float64, a slab of queries at a time.

    Parameters
    ----------
    q, k, v : Tensor, (B, N, S, D)
        Keys and values may have an S of their own, unless `causal`.
    dout : Tensor, shape of `q`, optional
        Gradient of the output.
    causal : bool
        A query sees no key after its own place.
    sink : Tensor, (N,), optional
        A logit of each head that takes part in the softmax, with value 0.

    Returns
    -------
    lse : Tensor of float64, (B, N, S)
    results : list of Tensors of float64
        attn_out and, if there is a `dout`, dq, dk and dv.
    sizes : list of Tensors of float64
        The same sums over the absolute values of their terms. Rounding errors go with these, however much a sum
        cancels, and they do not depend on how the keys are split: a part's errors, added up with the parts' weights,
        are a multiple of the whole's sizes.
    """
    q, k, v = q.double(), k.double(), v.double()
    dout = None if dout is None else dout.double()
    lse, scale = q.new_empty(q.shape[:3]), q.shape[3] ** -0.5
    results, sizes = ([torch.zeros_like(each) for each in ((q,) if dout is None else (q, q, k, v))] for _ in range(2))
    slab = max(1, SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    for first in range(0, q.shape[2], slab):
        rows = slice(first, first + slab)
        scores = q[:, :, rows] @ k.mT * scale
        if causal:
            scores += torch.full_like(scores[0, 0], -torch.inf).triu(1 + first)
        its_lse = scores.logsumexp(-1)
        if sink is not None:
            its_lse = its_lse.logaddexp(sink.double()[:, None])
        lse[:, :, rows] = its_lse
        p = (scores - its_lse[..., None]).exp()
        for sums, term, sign in ((results, torch.clone, -1), (sizes, torch.abs, 1)):
            vs = term(v)
            sums[0][:, :, rows] = out = p @ vs
            if dout is not None:
                qs, ks, douts = term(q[:, :, rows]), term(k), term(dout[:, :, rows])
                ds = p * (douts @ vs.mT + sign * (douts * out).sum(-1, keepdim=True)) * scale
                sums[1][:, :, rows] = ds @ ks
                sums[2] += ds.mT @ qs
                sums[3] += p.mT @ douts
    return lse, results, sizes


def kernel_errors(attention, parts, causal):
    """Measure a kernel against `exact`.

    Parameters
    ----------
    attention : callable
        Takes (q, k, v, dout, causal) and returns the log-sum-exp and a list of results, the first of those of `exact`.
    parts : iterable of (q, k, v, dout)
    causal : bool

    Returns
    -------
    Tensor of float64
        Largest error of the log-sum-exp, then of each result as a multiple of its size.
    """
    errors = []
    for part in parts:
        (lse, results), (right_lse, rights, sizes) = attention(*part, causal), exact(*part, causal)
        errors.append(torch.stack([(lse - right_lse).abs().max(), *map(share, results, rights, sizes)]))
    return torch.stack(errors).amax(0)


def share(result, right, size):
    """Largest difference as a share of its size; NaN if there is one."""
    difference = (result - right).abs()
    return torch.where(difference == 0, 0, difference / size).max()


def ring_bounds(measured, dtype, ranks):
    """Bounds of what a ring makes, of the output and of each gradient, as multiples of the sizes of `exact`.

    Parameters
    ----------
    measured : list of float
        `kernel_errors` of the ring's kernel on the parts that the ranks held: d of the log-sum-exp, e of each result.
    dtype : torch.dtype
        Of the results.
    ranks : int
        How many parts are merged; a sink counts as one.

    Notes
    -----
    They add up what the parts of a ring contribute:

    - the kernel: e, and 2 d in the output, since an error of d in its log-sum-exp changes a partial's weight. Other
      calls of the kernel may do worse than those that were measured, so twice the measured errors are allowed;
    - the merge: 3 * 2**-24 an update, as documented at `rau.ring_attention_update`;
    - in gradients also all that is wrong with the output, and one float32 sum a rank;
    - the rounding of the result to its dtype.
    """
    d, *e = measured
    rounding, unit = torch.finfo(dtype).eps / 2, torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    out = 2 * (e[0] + 2 * d) + 3 * unit * (ranks - 1) + rounding
    return [out, *(2 * (each + d) + out + unit * ranks + rounding for each in e[1:])]


def verdict(attention, sequences, causal, measured, ranks):
    """Judge what a ring made of whole sequences.

    Parameters
    ----------
    attention : callable
        The ring's kernel, as in `kernel_errors`.
    sequences : iterable of (q, k, v, dout, attn_out, dq, dk, dv)
    causal : bool
    measured : list of five float
        Its `kernel_errors` on the parts that the ranks held: d of the log-sum-exp, e of each result.
    ranks : int

    Returns
    -------
    dict
        For each result its largest error; that as a share of the bound; the ratio of its root mean square error to that
        of the same kernel in one process; and whether it is right: a share of at most 1 and a ratio of at most 2.

    Notes
    -----
    The bound, `ring_bounds`, holds for every element, and is wide because it adds up absolute values. The ratio is the
    sharper test.
    """
    sequences = list(sequences)
    bounds = ring_bounds(measured, sequences[0][0].dtype, ranks)
    largest, shares, squares, own_squares = torch.zeros(4, 4, dtype=torch.float64)
    for q, k, v, dout, *results in sequences:
        _, rights, sizes = exact(q, k, v, dout, causal)
        _, others = attention(q, k, v, dout, causal)
        for i, (result, other, right, size) in enumerate(zip(results, others, rights, sizes)):
            largest[i] = largest[i].maximum((result - right).abs().max())
            shares[i] = shares[i].maximum(share(result, right, size) / bounds[i])
            squares[i] += (result - right).square().sum()
            own_squares[i] += (other - right).square().sum()
    ratios = (squares / own_squares).sqrt()
    found = zip(("attn_out", "dq", "dk", "dv"), largest.tolist(), shares.tolist(), ratios.tolist())
    return {
        name: {"error": error, "share": share, "ratio": ratio, "right": share <= 1 and ratio <= 2}
        for name, error, share, ratio in found
    }
