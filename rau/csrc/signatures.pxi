# Where arrays lie, and the signatures of calls by which a call that is like an earlier one is recognised: a part of
# rau/_core.pyx.

from libc.string cimport memcmp, memset


def address(ndarray array not None):
    """Address of the first element of a NumPy array."""
    return <uintptr_t>PyArray_DATA(array)


cdef enum:
    MOST_ARRAYS = 15  # as many as an update with out=, or a merge of four states with it

cdef struct Described:
    const void *dtype
    int64_t nd
    int64_t shape[4]


def signature(arrays, Py_ssize_t inputs):
    """Describe a call by all that decides whether it is allowed, apart from values, as bytes; see rau.constraints.cache.

    `arrays` are those of the input states, `inputs` of them, then perhaps those to write into. None where it takes the
    validator: one is no plain array, or an output meets another array but by standing exactly on an input of its role.
    """
    cdef Described described[MOST_ARRAYS + 1]
    cdef char *low[MOST_ARRAYS]
    cdef char *high[MOST_ARRAYS]
    cdef Py_ssize_t count = len(arrays), i, j, axis
    cdef int64_t in_place = 0
    cdef ndarray array
    if count > MOST_ARRAYS:
        return None
    memset(described, 0, sizeof(described))
    for i in range(count):
        if not PyArray_CheckExact(arrays[i]):
            return None
        array = <ndarray>arrays[i]
        wanted = NPY_ARRAY_CARRAY_RO if i < inputs else NPY_ARRAY_CARRAY
        if PyArray_NDIM(array) > 4 or not PyArray_FLAGSWAP(array, wanted):
            return None
        described[i].dtype = PyArray_DESCR(array)  # whoever remembers the call keeps it alive
        described[i].nd = PyArray_NDIM(array)
        for axis in range(PyArray_NDIM(array)):
            described[i].shape[axis] = PyArray_DIMS(array)[axis]
        low[i] = <char *>PyArray_DATA(array)
        high[i] = low[i] + PyArray_NBYTES(array)
    for i in range(inputs, count):
        for j in range(count):
            if j == i or low[j] >= high[i] or low[i] >= high[j]:
                if j < inputs and j % 3 == i - inputs and arrays[j] is arrays[i]:  # without an element: it meets nothing, and is the same all the same
                    in_place = 1
                continue
            if not _in_role(i, j, inputs) or low[j] != low[i] or memcmp(&described[j], &described[i], sizeof(Described)):
                return None
            in_place = 1
    described[count].nd = in_place
    return (<char *>described)[: (count + 1) * sizeof(Described)]


cdef inline bint _in_role(Py_ssize_t output, Py_ssize_t other, Py_ssize_t inputs) noexcept:
    """Whether an output may stand on another array: an input, attn_out on attn_out, statistics on statistics."""
    return other < inputs and (other % 3 == 0) == (output == inputs)


def tensor_signature(arrays, Py_ssize_t inputs, plain):
    """Describe a call on torch tensors, all on the CPU or on one CUDA device, as a list; `plain` is torch.Tensor."""
    cdef uintptr_t low[MOST_ARRAYS]
    cdef uintptr_t high[MOST_ARRAYS]
    cdef Py_ssize_t count = len(arrays), i, j
    cdef bint in_place = False
    if count > MOST_ARRAYS:
        return None
    described = []
    device = None  # on the CPU
    if type(arrays[0]) is plain and arrays[0].is_cuda:
        device = arrays[0].device
    for i in range(count):
        array = arrays[i]
        # An object's own attributes may hide its methods; a dispatch key of torch's own makes zeros of no memory at all.
        if type(array) is not plain or array.__dict__ or not array.is_contiguous() or array.is_neg():
            return None
        if not array.is_cpu if device is None else array.device != device:
            return None
        described.append(array.dtype)
        described.append(array.shape)
        low[i] = array.data_ptr()
        high[i] = low[i] + <Py_ssize_t>array.nbytes
        if device is None and high[i] != low[i]:
            storage = array.untyped_storage()  # which may have been freed, or shrunk, under the tensor
            base = storage.data_ptr()
            if low[i] < base or high[i] > base + <Py_ssize_t>storage.nbytes():
                return None
            if low[i] % 8 and low[i] % <Py_ssize_t>array.itemsize:
                return None
    for i in range(inputs, count):
        for j in range(count):
            if j == i or low[j] >= high[i] or low[i] >= high[j]:
                if j < inputs and j % 3 == i - inputs and arrays[j] is arrays[i]:
                    in_place = True
                continue
            if not _in_role(i, j, inputs) or low[j] != low[i] or described[2 * j : 2 * j + 2] != described[2 * i : 2 * i + 2]:
                return None
            in_place = True
    described.append(in_place)
    described.append(device)
    return described
