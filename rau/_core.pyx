# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""The streaming-merge core: it walks the block table in tiles, in parallel, and calls the row kernels.

Everything has been checked before: nothing here looks at an argument again.
"""

from cython.parallel cimport prange
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free, malloc

from numpy cimport (  # to ask arrays by their attributes costs more than the smallest merge
    NPY_ARRAY_CARRAY, NPY_ARRAY_CARRAY_RO, NPY_FLOAT, NPY_INT64, PyArray_CheckExact, PyArray_DATA, PyArray_DESCR, PyArray_DIMS,
    PyArray_FLAGSWAP, PyArray_ISBEHAVED, PyArray_ISBEHAVED_RO, PyArray_NBYTES, PyArray_NDIM, PyArray_SIZE, PyArray_STRIDES,
    PyArray_TYPE, import_array, ndarray,
)

import_array()

include "csrc/signatures.pxi"
include "csrc/roof.pxi"

cdef extern from "versions.h" nogil:
    ctypedef struct rau_plane:
        char *base
        Py_ssize_t token
        Py_ssize_t head

    ctypedef struct rau_line:
        pass

    ctypedef struct rau_tile:
        Py_ssize_t states
        Py_ssize_t tokens
        Py_ssize_t heads
        Py_ssize_t head_dim
        Py_ssize_t lanes
        int stream
        Py_ssize_t ahead
        const rau_plane *attn
        const rau_plane *max
        const rau_plane *sum
        void *weights
        Py_ssize_t weight_token
        Py_ssize_t weight_head
        double *numbers
        rau_line *lines
        const char **sources
        double *shares

    ctypedef void (*rau_kernel)(rau_tile *) noexcept nogil

    ctypedef struct rau_version:
        const char *name
        rau_kernel weigh_f32
        rau_kernel weigh_f64

    ctypedef struct rau_fenv:
        pass

    int rau_versions(const rau_version *found[3])
    ctypedef struct rau_tuning:
        Py_ssize_t tile_bytes
        Py_ssize_t stream_bytes
        Py_ssize_t worker_bytes
        Py_ssize_t rows_ahead

    rau_tuning rau_tuned()
    Py_ssize_t rau_most_weights(Py_ssize_t rows)
    rau_kernel rau_rows_kernel(const rau_version *version, int first, int later)
    rau_fenv rau_fenv_set()
    void rau_fenv_restore(rau_fenv old)
    void rau_fence()
    void rau_watch_forks()
    int rau_processors()
    size_t rau_stack_bytes()
    int rau_team(int wanted, size_t stack_bytes)
    int rau_forked
    Py_ssize_t RAU_ITEM(int format)
    int RAU_F32, RAU_F16, RAU_BF16, RAU_F64, RAU_GROUP, RAU_OPENMP
    const char *RAU_COMPILER
    const char *RAU_COMPILE_FLAGS

cdef struct Call:
    const int64_t *starts    # of each block, and lengths: see rau.layouts.BlockTerms
    const int64_t *lengths
    const int64_t *terms
    Py_ssize_t blocks
    Py_ssize_t columns
    Py_ssize_t states
    Py_ssize_t heads
    Py_ssize_t head_dim
    Py_ssize_t lanes
    Py_ssize_t tokens        # over all blocks
    Py_ssize_t tile_tokens
    Py_ssize_t tile_heads
    Py_ssize_t rows_ahead
    Py_ssize_t first_item    # bytes of an element of the first state and the result, of later states, of statistics
    Py_ssize_t later_item
    Py_ssize_t stats_item
    int stream
    char **arrays            # 3 * (states + 1) addresses
    rau_kernel weigh
    rau_kernel rows
    char *scratch            # one piece for each worker
    Py_ssize_t weights_bytes, scratch_bytes
    Py_ssize_t workers

cdef enum:
    TILE_TOKENS = 1024       # each head's statistics run on for 32 KiB

_FORMATS = {"float32": RAU_F32, "float16": RAU_F16, "bfloat16": RAU_BF16, "float64": RAU_F64}

cdef const rau_version *version = NULL
cdef rau_tuning _tuning = rau_tuned()


def simd_versions():
    """Names of the instruction-set versions that this processor can run, best last."""
    cdef const rau_version *found[3]
    cdef int count = rau_versions(found), i
    return [found[i].name.decode() for i in range(count)]


def use_simd(name):
    """Choose the instruction-set version; the bits do not depend on it."""
    global version
    cdef const rau_version *found[3]
    cdef int count = rau_versions(found), i
    for i in range(count):
        if found[i].name.decode() == name:
            version = found[i]
            return
    raise ValueError(f"no version {name!r}; this processor and build have {', '.join(simd_versions())}")


def simd():
    """Name of the version in use."""
    return version.name.decode()


def tuning():
    """What the speed depends on and the bits do not: bytes of weights in a tile, of an output that goes around the cache, of
    work for another thread, and contiguous rows to prefetch."""
    return dict(_tuning)


def tune(Py_ssize_t tile_bytes, Py_ssize_t stream_bytes, Py_ssize_t worker_bytes, Py_ssize_t rows_ahead):
    """Set what :func:`tuning` tells, for measuring, while no merge runs."""
    global _tuning
    if tile_bytes < 1 or stream_bytes < 0 or worker_bytes < 1 or not 0 <= rows_ahead <= 64:
        raise ValueError("expected tile_bytes and worker_bytes from 1, stream_bytes from 0, rows_ahead from 0 to 64")
    _tuning = rau_tuning(tile_bytes, stream_bytes, worker_bytes, rows_ahead)


def processors():
    """CPUs that this process may use, as OpenMP counted them when it was loaded; 0 without OpenMP."""
    return rau_processors()


def forked():
    """Whether this process is a forked child, which runs serially."""
    return bool(rau_forked)


def build():
    """Compiler, flags and OpenMP of this build."""
    return {
        "compiler": RAU_COMPILER.decode(),
        "flags": RAU_COMPILE_FLAGS.decode(),
        "openmp": bool(RAU_OPENMP),
    }


cdef inline const int64_t *_numbers(ndarray array) except? NULL:
    """Where the numbers of a block table are."""
    if PyArray_TYPE(array) != NPY_INT64 or not PyArray_FLAGSWAP(array, NPY_ARRAY_CARRAY_RO):
        raise ValueError("a block table: expected contiguous arrays of int64")
    return <const int64_t *>PyArray_DATA(array)


def merge(ndarray starts not None, ndarray lengths not None, ndarray terms not None, tuple arrays, str dtype, str cur_dtype,
          Py_ssize_t whole, Py_ssize_t heads, Py_ssize_t head_dim, Py_ssize_t lanes, bint statistics, bint in_place,
          Py_ssize_t threads):
    """Merge K states.

    Parameters
    ----------
    starts, lengths, terms : int64, shapes (blocks,), (blocks,), (3, 2 + 9 * (K + 1))
        The blocks: a rau.layouts.BlockTerms.
    arrays : tuple of 3 * (K + 1) ndarrays, or tensors with a data_ptr
        attn_out, softmax_max, softmax_sum of each input, then of the result.
    dtype, cur_dtype : str
        Of the first state and the result; of the later states.
    whole, heads, head_dim, lanes : int
        `whole` counts the tokens of an array, of which the blocks may have fewer.
    statistics : bool
        Whether the result has any; if not, None stands in their places.
    in_place : bool
        The result stands on an input: it is in the cache when it is written.
    threads : int
        The most to use.
    """
    cdef Call call
    cdef Py_ssize_t i, part, rows, row_bytes, weight_item
    cdef Py_ssize_t states = len(arrays) // 3 - 1
    cdef bint lost
    cdef int64_t tokens = 0, elements, bytes_  # of which 32 bits may not be enough

    call.blocks, call.columns = PyArray_SIZE(starts), PyArray_SIZE(terms) // 3
    call.starts, call.lengths, call.terms = _numbers(starts), _numbers(lengths), _numbers(terms)
    for i in range(call.blocks):
        tokens += _entry(&call, i, 0)
    if tokens == 0 or heads == 0 or not (head_dim or statistics):  # nothing to write
        return
    call.tokens, call.states, call.heads, call.head_dim = tokens, states, heads, head_dim
    call.lanes = lanes if statistics else 0  # that are written
    cdef int first = _FORMATS[dtype], later = _FORMATS[cur_dtype]
    call.first_item, call.later_item = RAU_ITEM(first), RAU_ITEM(later)
    cdef bint wide = dtype == "float64"
    call.stats_item = weight_item = 8 if wide else 4
    call.weigh = version.weigh_f64 if wide else version.weigh_f32
    call.rows = rau_rows_kernel(version, first, later)

    rows = max(_tuning.tile_bytes // (weight_item * states), 1)
    call.tile_heads = min(heads, rows)
    call.tile_tokens = min(max(rows // call.tile_heads, 1), TILE_TOKENS, tokens)

    row_bytes = head_dim * (2 * call.first_item + (states - 1) * call.later_item)
    row_bytes += 2 * (states + statistics) * lanes * call.stats_item
    bytes_ = tokens * heads * row_bytes
    call.stream = not in_place and tokens * heads * head_dim * call.first_item > _tuning.stream_bytes
    call.rows_ahead = _tuning.rows_ahead
    call.workers = min(threads, min(tokens, 1 + bytes_ // _tuning.worker_bytes))
    if rau_forked or not RAU_OPENMP:
        call.workers = 1
    if call.workers > 1:
        call.workers = rau_team(<int>call.workers, _stack_bytes)

    # Each worker's scratch: weights, the rows' numbers, planes, pointers and shares.
    call.weights_bytes = _round_up(states * rau_most_weights(call.tile_tokens * call.tile_heads) * weight_item)
    call.scratch_bytes = (
        call.weights_bytes
        + _round_up(2 * states * RAU_GROUP * sizeof(double))
        + _round_up(3 * (states + 1) * sizeof(rau_plane))
        + _round_up((2 * states + 2) * sizeof(rau_line))
        + _round_up(states * sizeof(char *))
        + _round_up(states * sizeof(double))
    )
    call.scratch = <char *>malloc(call.workers * call.scratch_bytes + 64)
    call.arrays = <char **>malloc(len(arrays) * sizeof(char *))
    try:
        if call.scratch == NULL or call.arrays == NULL:
            raise MemoryError("rau: no memory for the scratch of a merge")
        for i in range(3 * (states + 1)):
            array = arrays[i]
            if array is None:  # not written to, and still to be computed with: the first state's place
                call.arrays[i] = call.arrays[i % 3]
                continue
            # What was checked may have been changed since, by a log handler or another thread: seen for the last time here,
            # where nobody else can run.
            elements = whole * heads * (lanes if i % 3 else head_dim)
            if PyArray_CheckExact(array):
                call.arrays[i] = <char *>PyArray_DATA(<ndarray>array)
                lost = PyArray_SIZE(<ndarray>array) < elements
            else:
                # Of its class: an attribute of its own may hide the method.
                call.arrays[i] = <char *><uintptr_t>type(array).data_ptr(array)
                bytes_ = elements * _item(&call, i // 3, i % 3)
                lost = elements != 0 and (call.arrays[i] == NULL or array.nbytes < bytes_)
            if lost:
                raise ValueError("an array lost its memory after it was checked (resized or freed meanwhile); nothing was written")
        with nogil:
            if call.workers == 1:  # enters no parallel region, which would start OpenMP's threads
                _work(&call, 0)
            else:
                for part in prange(call.workers, num_threads=call.workers, schedule="static", chunksize=1):
                    _work(&call, part)
    finally:
        free(call.scratch)
        free(call.arrays)


cdef inline Py_ssize_t _round_up(Py_ssize_t bytes_) noexcept nogil:
    return (bytes_ + 63) // 64 * 64


cdef inline int64_t _entry(const Call *call, Py_ssize_t block, Py_ssize_t column) noexcept nogil:
    """An entry of the block table."""
    cdef const int64_t *term = call.terms + column
    return term[0] + call.starts[block] * term[call.columns] + call.lengths[block] * term[2 * call.columns]


cdef void _work(const Call *call, Py_ssize_t part) noexcept nogil:
    """One worker's share: an equal part of all the tokens, wherever the blocks' borders are."""
    cdef Py_ssize_t low = call.tokens * part // call.workers
    cdef Py_ssize_t high = call.tokens * (part + 1) // call.workers
    cdef Py_ssize_t seen = 0, b = 0, t, h, first, last, tokens, blocks
    cdef rau_tile tile
    cdef rau_fenv old = rau_fenv_set()

    cdef char *at = <char *>((<uintptr_t>call.scratch + 63) // 64 * 64) + part * call.scratch_bytes
    tile.states, tile.head_dim, tile.lanes, tile.stream = call.states, call.head_dim, call.lanes, call.stream
    tile.ahead = call.rows_ahead
    tile.weights = at
    at += call.weights_bytes
    tile.numbers = <double *>at
    at += _round_up(2 * call.states * RAU_GROUP * sizeof(double))
    cdef rau_plane *planes = <rau_plane *>at
    at += _round_up(3 * (call.states + 1) * sizeof(rau_plane))
    tile.lines = <rau_line *>at
    at += _round_up((2 * call.states + 2) * sizeof(rau_line))
    tile.sources = <const char **>at
    at += _round_up(call.states * sizeof(char *))
    tile.shares = <double *>at
    tile.attn, tile.max, tile.sum = planes, planes + call.states + 1, planes + 2 * (call.states + 1)

    while b < call.blocks and seen < high:
        tokens = _entry(call, b, 0)
        first, last = max(low - seen, 0), min(high - seen, tokens)
        if call.blocks > 1 and first == 0:
            blocks = _run(call, planes, b, min(call.tile_tokens, high - seen))
            if blocks > 1:
                seen += _merge_run(call, &tile, planes, b, blocks)
                b += blocks
                continue
        t = first
        while t < last:
            tile.tokens = min(call.tile_tokens, last - t)
            h = 0
            while h < call.heads:
                tile.heads = min(call.tile_heads, call.heads - h)
                _place(call, planes, b, t, h, 3)
                call.weigh(&tile)
                if call.head_dim:
                    call.rows(&tile)
                h += tile.heads
            t += tile.tokens
        seen += tokens
        b += 1
    if call.stream:
        rau_fence()
    rau_fenv_restore(old)


cdef Py_ssize_t _run(const Call *call, rau_plane *planes, Py_ssize_t first, Py_ssize_t most) noexcept nogil:
    """How many blocks, of so many tokens together at most, have statistics that are one run in every array.

    As packed sequences and batch entries often have. The planes then say where the run starts; its steps are `token`.
    """
    cdef Py_ssize_t block = first, rows = 0, tokens, operand, part, row
    cdef rau_plane plane
    cdef rau_plane *start
    while block < call.blocks and call.tile_heads == call.heads:
        tokens = _entry(call, block, 0)
        most -= tokens
        if most < 0:
            break
        for operand in range(call.states + 1):
            for part in range(1, 3):
                plane = _plane(call, block, operand, part)
                start = planes + part * (call.states + 1) + operand
                if block == first:
                    start[0] = plane
                row = start.token
                if plane.base != start.base + rows * row:
                    return block - first
                if (tokens > 1 and plane.token != row) or (call.heads > 1 and plane.head != tokens * row):
                    return block - first
        rows += tokens * call.heads
        block += 1
    return block - first


cdef Py_ssize_t _merge_run(const Call *call, rau_tile *tile, rau_plane *planes, Py_ssize_t first,
                           Py_ssize_t blocks) noexcept nogil:
    """Merge blocks whose statistics are one run, weighing them as one. Returns how many tokens they have."""
    cdef Py_ssize_t block, tokens = 0
    cdef char *weights = <char *>tile.weights
    for block in range(first, first + blocks):
        tokens += _entry(call, block, 0)
    if tokens == 0:
        return 0
    tile.tokens, tile.heads = tokens * call.heads, 1
    call.weigh(tile)
    tile.heads, tile.weight_token = call.heads, 1
    if call.head_dim:
        for block in range(first, first + blocks):
            tile.tokens = tile.weight_head = _entry(call, block, 0)
            if tile.tokens:
                _place(call, planes, block, 0, 0, 1)
                call.rows(tile)
            tile.weights = <char *>tile.weights + tile.tokens * tile.heads * call.stats_item
    tile.weights = weights
    return tokens


cdef inline Py_ssize_t _item(const Call *call, Py_ssize_t operand, Py_ssize_t part) noexcept nogil:
    """Bytes of an element of an operand's attn_out, softmax_max or softmax_sum."""
    if part:
        return call.stats_item
    return call.first_item if operand == 0 or operand == call.states else call.later_item


cdef inline rau_plane _plane(const Call *call, Py_ssize_t block, Py_ssize_t operand, Py_ssize_t part) noexcept nogil:
    """Where a block lies in an operand's attn_out, softmax_max or softmax_sum."""
    cdef Py_ssize_t array = 3 * operand + part, column = 2 + 3 * array, item = _item(call, operand, part)
    cdef rau_plane plane
    plane.base = call.arrays[array] + _entry(call, block, column) * item
    plane.token, plane.head = _entry(call, block, column + 1) * item, _entry(call, block, column + 2) * item
    return plane


cdef inline void _place(const Call *call, rau_plane *planes, Py_ssize_t block, Py_ssize_t t, Py_ssize_t h,
                        Py_ssize_t parts) noexcept nogil:
    """Place the tile that starts at token t and head h of a block: its planes in all three arrays, or in attn_out alone."""
    cdef Py_ssize_t operand, part
    cdef rau_plane *plane
    for operand in range(call.states + 1):
        for part in range(parts):
            plane = planes + part * (call.states + 1) + operand
            plane[0] = _plane(call, block, operand, part)
            plane.base += t * plane.token + h * plane.head


rau_watch_forks()
cdef size_t _stack_bytes = rau_stack_bytes()  # once, as libgomp reads it: the environment is not safe to read later
use_simd(simd_versions().pop())
