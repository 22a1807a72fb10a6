"""Geometry: every layout as a table of blocks.

A *block* is a rectangle of tokens x heads over which every operand is regular: the row of token t and
head h starts at ``offset + t * token_stride + h * head_stride``. Kernels see only this table, never a
layout; a new layout is a new entry of :data:`LAYOUTS`.

The table is an int64 array with one line per block. Its columns are

===============  ===============================================================================
``TOKENS``       number of tokens in the block
``HEADS``        number of heads in the block
then, for each of the K input states and last for the result, nine columns:
``ATTN + 0..2``  offset, token stride and head stride of ``attn_out``
``MAX + 0..2``   the same three of ``softmax_max``
``SUM + 0..2``   the same three of ``softmax_sum``
===============  ===============================================================================

Offsets and strides count elements, from the operand's first element; :func:`column` finds an operand's columns. Since each
operand has entries of its own, halves of sequences can be merged in place into a state of whole sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

TOKENS, HEADS = 0, 1
ATTN, MAX, SUM = 0, 3, 6
FIELDS = ("attn_out", "softmax_max", "softmax_sum")  # those of an AttentionState
PER_OPERAND = 9


def column(operand: int, part: int = ATTN) -> int:
    """Column of the offset of one part of one operand; its token and head strides follow.

    Parameters
    ----------
    operand : int
        0 to K - 1 for the input states, K for the result.
    part : {ATTN, MAX, SUM}
        Which of the operand's three arrays.

    Returns
    -------
    int

    Examples
    --------
    >>> column(0), column(1, MAX)
    (2, 14)
    """
    return 2 + PER_OPERAND * operand + part


class Layout(NamedTuple):
    """Where the axes of one layout are; None for an axis that the layout lacks."""

    attn: str
    stats: str
    attn_batch: int | None
    attn_token: int
    attn_head: int | None  # None: heads are folded into the last axis, D elements apart
    stats_batch: int | None
    stats_token: int
    stats_head: int

    @property
    def tokens_then_heads(self) -> tuple[int, ...]:
        """Axes of the statistics, except the lanes: those of tokens, in the order in which the output has them, then heads."""
        return (*_by_first((self.attn_batch, self.stats_batch), (self.attn_token, self.stats_token)), self.stats_head)

    @property
    def row_order(self) -> tuple[int, ...]:
        """Axes of the statistics, except the lanes, in the order in which the output has its rows."""
        if self.attn_head is None:  # within a row of tokens, on the last axis
            return self.tokens_then_heads
        tokens = (self.attn_batch, self.stats_batch), (self.attn_token, self.stats_token)
        return _by_first(*tokens, (self.attn_head, self.stats_head))


def _by_first(*pairs: tuple[int | None, int | None]) -> tuple[int, ...]:
    """Return the second of each pair, in the order of the first; pairs of an axis that is lacking are left out."""
    there = sorted((first, second) for first, second in pairs if first is not None and second is not None)
    return tuple(second for _, second in there)


LAYOUTS: dict[str, Layout] = {
    "SBH": Layout("(S, B, H)", "(B, N, S, {lanes})", 1, 0, None, 0, 2, 1),
    "TND": Layout("(T, N, D)", "(T, N, {lanes})", None, 0, 1, None, 0, 1),
    "BSND": Layout("(B, S, N, D)", "(B, N, S, {lanes})", 0, 1, 2, 0, 2, 1),
    "BNSD": Layout("(B, N, S, D)", "(B, N, S, {lanes})", 0, 2, 1, 0, 2, 1),
}
LSE_LAYOUTS = {"BNS": "(B, N, S)", "BSN": "(B, S, N)", "TN": "(T, N)", "NT": "(N, T)"}
PADDED = {"BNS": "(sequences, N, longest)", "BSN": "(sequences, longest, N)"}  # what they are of in layout "TND"

# What other libraries call them: the layout of ours with these axes in this order, and what has to be done before.
_NO_SUCH = ' rau has no layout (N, T, D): pass attn_out.swapaxes(0, 1) as "TND", with statistics (T, N, 8).'
OTHER_LAYOUTS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("BSHD", "BTHD", "BLHD", "BTND", "BTNH", "BMHK"), ("BSND", "")),
    **dict.fromkeys(("BHSD", "BHTD", "BHLD", "BNTD", "BNTH"), ("BNSD", "")),
    **dict.fromkeys(("THD", "NHD"), ("TND", "")),
    **dict.fromkeys(("SBHD", "SBND"), ("SBH", " Its heads are merged, H = N * D: pass attn_out.reshape(S, B, N * D).")),
    **dict.fromkeys(("BSH", "BTH"), ("BSND", " Pass attn_out.reshape(B, S, N, D).")),
    "TH": ("TND", " Pass attn_out.reshape(T, N, D)."),
    **dict.fromkeys(("HND", "NTD", "HTD"), ("", _NO_SUCH)),
}
OTHER_LSE_LAYOUTS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("BHS", "BHT", "BHL", "BNT"), ("BNS", "")),
    **dict.fromkeys(("BSH", "BTH", "BLH", "BTN"), ("BSN", "")),
    **dict.fromkeys(("TH", "NH"), ("TN", "")),
    **dict.fromkeys(("HT", "HN"), ("NT", "")),
}


def lse_layouts(layout: str) -> tuple[str, ...]:
    """Name the log-sum-exp layouts that go with an attention layout; the first has the statistics' axes.

    Parameters
    ----------
    layout : str
        A key of :data:`LAYOUTS`.

    Returns
    -------
    tuple of str

    Examples
    --------
    >>> lse_layouts("BSND"), lse_layouts("TND")
    (('BNS', 'BSN'), ('TN', 'NT'))
    """
    return ("TN", "NT") if layout == "TND" else ("BNS", "BSN")


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a C-contiguous array.

    Parameters
    ----------
    shape : sequence of int

    Returns
    -------
    tuple of int

    Examples
    --------
    >>> contiguous_strides((4, 2, 8))
    (16, 8, 1)
    """
    strides = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step = step * length
    return tuple(reversed(strides))


def dimensions(
    layout: str, attn_shape: Sequence[int], stats_shape: Sequence[int]
) -> tuple[int, int | None, int, int, int]:
    """Read B, S, T, N and D off a state's shapes; in TND, where only lengths tell sequences apart, as one sequence.

    Parameters
    ----------
    layout : str
        A key of :data:`LAYOUTS`.
    attn_shape, stats_shape : sequence of int

    Returns
    -------
    tuple of int

    Examples
    --------
    >>> dimensions("SBH", (6, 2, 12), (2, 3, 6, 8))
    (2, 6, 12, 3, 4)
    """
    axes = LAYOUTS[layout]
    tokens = attn_shape[axes.attn_token]
    if axes.attn_head is None:
        N = stats_shape[axes.stats_head]
        D = attn_shape[-1] // N if N else 0
    else:
        N, D = attn_shape[axes.attn_head], attn_shape[-1]
    B = 1 if axes.attn_batch is None else attn_shape[axes.attn_batch]
    return B, tokens, B * tokens, N, D


def shapes(layout: str, B: int, S: int, N: int, D: int, lanes: int = 8) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of a state's output and statistics; in TND, S counts the tokens of all sequences, and B is 1.

    Parameters
    ----------
    layout : str
        A key of :data:`LAYOUTS`.
    B, S, N, D : int
    lanes : int, default 8

    Returns
    -------
    attn_shape, stats_shape : tuple of int

    Examples
    --------
    >>> shapes("SBH", 2, 6, 3, 4)
    ((6, 2, 12), (2, 3, 6, 8))
    """
    sizes = {"B": B, "S": S, "T": B * S, "N": N, "D": D, "H": N * D, "{lanes}": lanes}
    attn, stats = (tuple(sizes[axis] for axis in form[1:-1].split(", ")) for form in LAYOUTS[layout][:2])
    return attn, stats


def packed_row_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """Distance between two consecutive rows of packed statistics, or None where it varies.

    Packed statistics are a flat sequence of T*N rows for which (T, N) is only a label, so they can be walked only
    where all the rows are evenly spaced.

    Parameters
    ----------
    shape, strides : sequence of int
        Of a (T, N, lanes) array; strides in elements.

    Returns
    -------
    int or None
    """
    tokens, heads = shape[0], shape[1]
    if heads == 1:
        return strides[0]
    if tokens <= 1 or strides[0] == heads * strides[1]:
        return strides[1]
    return None


class BlockTerms(NamedTuple):
    """A block table in compact form: every entry is linear in where its block starts and how long it is.

    Ten thousand blocks take ten thousand starts and lengths, rather than thirty times as many entries.

    Attributes
    ----------
    starts, lengths : ndarray of int64, shape (blocks,)
    terms : ndarray of int64, shape (3, 2 + 9 * (K + 1))
        An entry is ``terms[0] + start * terms[1] + length * terms[2]``, in each column.
    """

    starts: np.ndarray
    lengths: np.ndarray
    terms: np.ndarray

    def table(self) -> np.ndarray:
        """Write the block table out.

        Returns
        -------
        ndarray of int64, shape (blocks, 2 + 9 * (K + 1))
        """
        constant, by_start, by_length = self.terms
        columns = np.repeat(constant[:, None], len(self.starts), axis=1)  # by columns, which are fast to fill
        for factors, numbers in ((by_start, self.starts), (by_length, self.lengths)):
            for column in factors.nonzero()[0]:
                columns[column] += numbers * factors[column]
        return _frozen(np.ascontiguousarray(columns.T))


def _frozen(array: np.ndarray) -> np.ndarray:
    """Make an array read-only: backends are given it, and calls share it."""
    array.flags.writeable = False
    return array


_NONE = _frozen(np.zeros(1, dtype=np.int64))


def block_terms(
    layout: str,
    packed: bool,
    lengths: tuple[int, int, int, int],
    cumulative: np.ndarray | None,
    strides: Sequence[Sequence[int]],
    half: str | None = None,
    runs: tuple[np.ndarray, np.ndarray] | None = None,
) -> BlockTerms:
    """Describe the blocks of one call.

    Parameters
    ----------
    layout : str
        A key of :data:`LAYOUTS`.
    packed : bool
        Layout "TND" with statistics packed per sequence.
    lengths : tuple of int
        (B, tokens of a batch entry or of the whole, N, D).
    cumulative : ndarray of int64, shape (sequences + 1,), or None
        Cumulative sequence lengths; read only where `packed`, and for a half.
    strides : sequence of sequences of int
        Strides in elements of attn_out, softmax_max, softmax_sum of each input state, then of the result:
        3 * (K + 1) entries.
    half : {"front", "back"}, optional
        In layout "TND": the first state and the result hold sequences twice as long, and this half of each is merged.
    runs : pair of ndarrays of int64, shape (runs,), optional
        In layout "TND" with token-major statistics: first tokens and lengths of the runs of tokens that are merged, if not all.

    Returns
    -------
    BlockTerms

    Examples
    --------
    >>> two_sequences = block_terms("TND", True, (2, 3, 1, 4), np.array([0, 1, 3]), [(4, 4, 1), (8, 8, 1), (8, 8, 1)])
    >>> two_sequences.table()[:, TOKENS]
    array([1, 2])
    """
    _, _, attn_batch, attn_token, attn_head, stats_batch, token, head = LAYOUTS[layout]
    batch, tokens, heads, head_dim = lengths
    line = [tokens, heads]
    for index in range(0, len(strides), 3):
        attn, maximum, total = strides[index : index + 3]
        line += (
            0, attn[attn_token], head_dim if attn_head is None else attn[attn_head],
            0, maximum[token], maximum[head],
            0, total[token], total[head],
        )  # fmt: skip

    if not packed and half is None and runs is None:
        terms = np.zeros((3, len(line)), dtype=np.int64)
        terms[0] = line
        if attn_batch is None or stats_batch is None or batch == 1 or 0 in (tokens, heads):  # of which there may be any number
            return BlockTerms(_NONE, _NONE, _frozen(terms))
        terms[1, 2::3] = [stride[stats_batch if index % 3 else attn_batch] for index, stride in enumerate(strides)]
        return BlockTerms(_frozen(np.arange(batch, dtype=np.int64)), _frozen(np.zeros(batch, dtype=np.int64)), _frozen(terms))

    if runs is None:
        assert cumulative is not None  # the validator requires it here
        runs = cumulative[:-1], _frozen(np.diff(cumulative))
    by_start, by_length = [0] * len(line), [0] * len(line)
    line[TOKENS], by_length[TOKENS] = 0, 1
    for index, stride in enumerate(strides):
        first = 2 + 3 * index
        whole = half is not None and index // 3 in (0, len(strides) // 3 - 1)
        times = 2 if whole else 1  # as long as the others
        if packed and index % 3:
            row = stride[1] if heads != 1 else stride[0]  # as packed_row_stride has checked
            line[first + 1], line[first + 2], by_length[first + 2] = row, 0, times * row
            by_start[first] = times * heads * row
        else:
            row = stride[attn_token]
            by_start[first] = times * row
        if whole and half == "back":
            by_length[first] = row
    terms = np.array((line, by_start, by_length), dtype=np.int64)
    return BlockTerms(*runs, _frozen(terms))


def numbered(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return of each member of groups of some sizes the group's number and its own in that, int64 on every platform.

    Examples
    --------
    >>> numbered(np.array([2, 0, 3]))
    (array([0, 0, 2, 2, 2]), array([0, 1, 0, 1, 2]))
    """
    group = np.repeat(np.arange(len(counts), dtype=np.int64), counts.astype(np.intp))  # int64 repeats nothing on 32 bits
    return group, np.arange(len(group), dtype=np.int64) - (np.cumsum(counts) - counts)[group]


def row_index(table: np.ndarray, operand: int, part: int) -> np.ndarray:
    """Return where each row of one array starts, over all blocks: the block table as one index.

    Parameters
    ----------
    table : ndarray of int64, shape (blocks, 2 + 9 * (K + 1))
    operand : int
        0 to K - 1 for the input states, K for the result.
    part : {ATTN, MAX, SUM}

    Returns
    -------
    ndarray of int64, shape (rows,)
        In elements; rows run over blocks, then tokens, then heads.

    Examples
    --------
    >>> blocks = block_terms("TND", False, (1, 2, 2, 4), None, [(8, 4, 1), (16, 8, 1), (16, 8, 1)] * 2)
    >>> row_index(blocks.table(), 0, ATTN)
    array([ 0,  4,  8, 12])
    """
    heads = table[:, HEADS]
    block, within = numbered(table[:, TOKENS] * heads)
    token, head = np.divmod(within, heads[block])
    first = column(operand, part)
    return table[block, first] + token * table[block, first + 1] + head * table[block, first + 2]
