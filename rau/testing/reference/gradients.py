"""Gradients of rows that are merged, as those of the softmax over their log-sum-exps, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def gradients_of_rows(
    states: Sequence[Sequence[np.ndarray]], made: Sequence[Sequence[tuple[int, int]]], g: np.ndarray, h: np.ndarray
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Differentiate sum(g * o) + sum(h * lse), o and lse being the merged outputs and their log-sum-exps.

    Parameters
    ----------
    states : sequence of triples of ndarray
        Outputs of shape (T, N, D), maxima and sums of shape (T, N, lanes), of which lane 0 counts.
    made : sequence of sequences of tuples (state, row)
        What each merged row is made of.
    g : ndarray, float64, shape (rows, N, D)
    h : ndarray, float64, shape (rows, N)

    Returns
    -------
    list of lists of tuples (gradient, size)
        For each array of each state, without lanes: the gradient, and the sum of what was added up to it, without signs.

    Notes
    -----
    With q_i the softmax over the states of m_i + log(l_i), the gradient of o_i is q_i g, that of m_i is q_i (g (o_i - o) + h), and
    that of l_i the same divided by l_i. What has q_i = 0 is not read. In the size of m_i's, h counts twice, and once more where m_i
    is the maximum: max + log(sum) has h for both, most of which cancels in m_i.
    """
    result = [[(np.zeros(shape), np.zeros(shape)) for shape in (out.shape, *[out.shape[:2]] * 2)] for out, *_ in states]
    for parts, its_g, its_h in zip(made, g, h, strict=True):
        if not parts:
            continue
        outs = np.stack([np.float64(states[k][0][row]) for k, row in parts])
        maxima, sums = (np.stack([np.float64(states[k][field][row, :, 0]) for k, row in parts]) for field in (1, 2))
        outs[sums == 0] = 0
        share = sums * np.exp(maxima - maxima.max(0))
        share /= share.sum(0)
        apart = outs - np.einsum("kn,knd->nd", share, outs)
        sizes = abs(outs) + np.einsum("kn,knd->nd", share, abs(outs))
        by_lse = share * (np.einsum("nd,knd->kn", its_g, apart) + its_h)
        much = share * (np.einsum("nd,knd->kn", abs(its_g), sizes) + 2 * abs(its_h)) + abs(its_h) * (maxima == maxima.max(0))
        by_out = share[..., None] * its_g
        total = np.where(sums == 0, np.inf, sums)
        for k, (state, row) in enumerate(parts):
            of_each = ((by_out, abs(by_out)), (by_lse, much), (by_lse / total, much / total))
            for (gradient, size), (one, its_size) in zip(result[state], of_each, strict=True):
                gradient[row] += one[k]
                size[row] += its_size[k]
    return result
