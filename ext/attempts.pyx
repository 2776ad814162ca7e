# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Who tried what: the memory that `probing` and `beacon` have of dull flows, taken in by the row.

One packet in 16 of ordinary traffic ends a dull flow, and nearly all of them say nothing to either detector: a place
that was not called before, an attempt that succeeded. These are counted here, and only the rows that may lead to
evidence are returned, to be judged in Python. `tests/reference_attempts.py` is the same written for the eye.

Floor, by the bytes: a row of 110 bytes is two cache lines, read in order; an entry is one or two, its bucket's line
and those of its neighbours in the order of use three more, all from memory when there are many.
"""

cimport cython
from cpython.buffer cimport PyBUF_ND, PyBuffer_Release, PyObject_GetBuffer
from cpython.dict cimport PyDict_GetItemWithError
from cpython.object cimport PyObject
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp, memcpy, memset

include "rows.pxi"

# What was tried (responder, port, protocol) and by whom (namespace, address), as they lie in a row.
cdef enum:
    TARGET_BYTES = 19
    ADDRESS_BYTES = 16
    PORT_BYTES = 2
    SOURCE_BYTES = 24
    PLACE_BYTES = 43

cdef enum:
    BATCH = 32
    WORDS_MAX = 6
    ROOM_MIN = 16
    TARGETS_MAX = 1024
    REASON_CLOSED = 0
    REFUSED_PACKETS_MAX = 4
    ICMP = 1
    TCP = 6
    ICMPV6 = 58

cdef struct Entry:
    uint64_t words[WORDS_MAX]
    int64_t value
    int32_t older
    int32_t newer
    int32_t chain       # all three are slots plus one, so that 0 is none


@cython.final
cdef class Recent:
    """The last ``size_max`` keys that were used, each with a number; of more the longest unused is forgotten.

    Keys are of ``key_bytes``, at most 48. Raises ValueError where a size or a key is not so.
    """

    cdef Entry *entries
    cdef int32_t *heads
    cdef int32_t size, room, size_max, oldest, newest, buckets
    cdef Py_ssize_t key_bytes

    def __cinit__(self, Py_ssize_t key_bytes, int32_t size_max):
        if not 1 <= key_bytes <= WORDS_MAX * 8 or not 1 <= size_max <= 1 << 24:
            raise ValueError(f"no table for {size_max} keys of {key_bytes} bytes")
        self.key_bytes = key_bytes
        self.size_max = size_max

    def __dealloc__(self):
        free(self.entries)
        free(self.heads)

    def __len__(self):
        return self.size

    def __contains__(self, const uint8_t[::1] key):
        cdef uint64_t[WORDS_MAX] words
        self.read(key, words)
        return self.find(words) != 0

    def get(self, const uint8_t[::1] key):
        """Return the number of a key, None if it is not here; it is not used by that."""
        cdef uint64_t[WORDS_MAX] words
        self.read(key, words)
        cdef int32_t at = self.find(words)
        return self.entries[at - 1].value if at else None

    def put(self, const uint8_t[::1] key, int64_t value):
        """Use a key and give it this number."""
        cdef uint64_t[WORDS_MAX] words
        cdef bint fresh = False
        self.read(key, words)
        self.use(words, &fresh)[0].value = value

    cdef int read(self, const uint8_t[::1] key, uint64_t *words) except -1:
        if key.shape[0] != self.key_bytes:
            raise ValueError(f"keys have {self.key_bytes} bytes")
        memset(words, 0, WORDS_MAX * 8)
        memcpy(words, &key[0], self.key_bytes)
        return 0

    cdef inline int32_t *head(self, const uint64_t *words) noexcept:
        cdef uint64_t value = fold(words[0] ^ <uint64_t>0xa0761d6478bd642f, words[1] ^ <uint64_t>0xe7037ed1a0b428db)
        value ^= fold(words[2] ^ <uint64_t>0x8ebc6af09c88c6e3, words[3] ^ <uint64_t>0x589965cc75374cc3)
        value ^= fold(words[4] ^ <uint64_t>0x1d8e4e27c47d124f, words[5] ^ <uint64_t>0xeb44accab455d165)
        return &self.heads[fold(value, <uint64_t>0x9e3779b97f4a7c15) & <uint64_t>(self.buckets - 1)]

    cdef void ask_for(self, uint64_t[WORDS_MAX] *words, int count) noexcept:
        """Fetch what these keys will touch, all at once: one by one, each would wait for memory twice."""
        cdef int32_t *heads[BATCH]
        cdef int i
        if self.size == 0:
            return
        for i in range(count):
            heads[i] = self.head(words[i])
            ask(heads[i])
        for i in range(count):
            if heads[i][0]:
                ask(&self.entries[heads[i][0] - 1])
                ask(&self.entries[heads[i][0] - 1].value)

    cdef inline int32_t find(self, const uint64_t *words) noexcept:
        cdef int32_t at
        if self.size == 0:
            return 0
        at = self.head(words)[0]
        while at and memcmp(self.entries[at - 1].words, words, WORDS_MAX * 8) != 0:
            at = self.entries[at - 1].chain
        return at

    cdef Entry *use(self, const uint64_t *words, bint *fresh) except NULL:
        """Return the entry of a key as the newest, made with the number 0 if there was none."""
        cdef int32_t at = self.find(words)
        cdef int32_t *head
        fresh[0] = at == 0
        if at:
            self.unlink(at)
        else:
            at = self.slot()
            head = self.head(words)
            memcpy(self.entries[at - 1].words, words, WORDS_MAX * 8)
            self.entries[at - 1].value = 0
            self.entries[at - 1].chain = head[0]
            head[0] = at
        self.entries[at - 1].older = self.newest
        self.entries[at - 1].newer = 0
        if self.newest:
            self.entries[self.newest - 1].newer = at
        else:
            self.oldest = at
        self.newest = at
        return &self.entries[at - 1]

    cdef int32_t slot(self) except -1:
        """Return an entry that nothing leads to, that of the oldest key if there is no other."""
        cdef int32_t at = self.oldest
        cdef int32_t *link
        if self.size == self.room and self.room < self.size_max:
            self.grow()
        if self.size < self.room:
            self.size += 1
            return self.size
        self.unlink(at)
        link = self.head(self.entries[at - 1].words)
        while link[0] != at:
            link = &self.entries[link[0] - 1].chain
        link[0] = self.entries[at - 1].chain
        return at

    cdef void unlink(self, int32_t at) noexcept:
        cdef Entry *entry = &self.entries[at - 1]
        if entry.older:
            self.entries[entry.older - 1].newer = entry.newer
        else:
            self.oldest = entry.newer
        if entry.newer:
            self.entries[entry.newer - 1].older = entry.older
        else:
            self.newest = entry.older

    cdef int grow(self) except -1:
        """Make room for twice as many: most sources try few places."""
        cdef int32_t room = min(max(self.room * 2, <int32_t>ROOM_MIN), self.size_max)
        cdef int32_t buckets = ROOM_MIN
        cdef int32_t at
        cdef int32_t *head
        while buckets < room:
            buckets *= 2
        cdef int32_t *heads = <int32_t *>calloc(buckets, sizeof(int32_t))
        cdef Entry *entries = <Entry *>realloc(self.entries, <size_t>room * sizeof(Entry))
        if entries != NULL:
            self.entries = entries
        if heads == NULL or entries == NULL:
            free(heads)
            raise MemoryError
        free(self.heads)
        self.heads = heads
        self.room = room
        self.buckets = buckets
        for at in range(1, self.size + 1):
            head = self.head(self.entries[at - 1].words)
            self.entries[at - 1].chain = head[0]
            head[0] = at
        return 0


cdef class Tried:
    """What one unit tried last, and how much is held against it: ``nats``."""

    cdef public double nats
    cdef readonly Recent targets

    def __cinit__(self, *_):
        self.targets = Recent(TARGET_BYTES, TARGETS_MAX)

    def succeed(self, const uint8_t[::1] target, double answered_nats, double again_nats):
        """Count a success, for which nothing is to be taken away where nothing is held against the unit."""
        cdef uint64_t[WORDS_MAX] words
        self.targets.read(target, words)
        self.take(words, answered_nats, again_nats)

    cdef int take(self, const uint64_t *words, double answered_nats, double again_nats) except -1:
        cdef bint fresh = False
        self.targets.use(words, &fresh)
        if self.nats > 0.0:
            self.nats += answered_nats if fresh else again_nats
            if self.nats < 0.0:
                self.nats = 0.0
        return 0


@cython.final
cdef class Rows:
    """Rows of CLOSED_FLOW, held for as long as they are looked at."""

    cdef Py_buffer buffer
    cdef const Closed *first
    cdef Py_ssize_t size

    def __cinit__(self, rows):
        PyObject_GetBuffer(rows, &self.buffer, PyBUF_ND)
        if self.buffer.itemsize != sizeof(Closed) or self.buffer.ndim != 1:
            raise ValueError("rows must be a contiguous array of observations.CLOSED_FLOW")
        self.first = <const Closed *>self.buffer.buf
        self.size = self.buffer.shape[0]

    def __dealloc__(self):
        PyBuffer_Release(&self.buffer)


cdef inline bint in_vain(const Closed *row) noexcept:
    """Whether nobody answered, or so late that it was counted."""
    if row.protocol == ICMP or row.protocol == ICMPV6:
        return row.missed or row.payload_bytes[1] == 0
    if row.protocol != TCP:
        return False
    if row.missed:
        return True
    if row.payload_bytes[0] or row.payload_bytes[1]:
        return False
    return row.reason != REASON_CLOSED or row.packets <= REFUSED_PACKETS_MAX


def succeed(rows, Py_ssize_t start, sources, double answered_nats, double again_nats):
    """Take the successes among rows[start:] in; return the first row that is to be looked at, len(rows) if none is.

    That is one in vain, and a success of a source (`SOURCE_BYTES`) that ``sources`` has anything but a `Tried` for.
    """
    cdef Rows held = Rows(rows)
    cdef const Closed *row = held.first
    cdef Py_ssize_t at
    cdef uint64_t[WORDS_MAX] words
    cdef PyObject *found
    if not isinstance(sources, dict):
        raise TypeError("sources must be a dict")
    cdef bint any_source = len(sources) > 0
    if start < 0:
        raise IndexError("rows out of range")
    memset(words, 0, sizeof(words))
    for at in range(start, held.size):
        if in_vain(&row[at]):
            return at
        if not any_source or not (row[at].protocol == TCP or row[at].protocol == ICMP or row[at].protocol == ICMPV6):
            continue
        found = PyDict_GetItemWithError(sources, <bytes>(<const char *>&row[at].netns)[:SOURCE_BYTES])
        if found == NULL:
            continue
        if not isinstance(<object>found, Tried):
            return at
        memcpy(words, row[at].responder, TARGET_BYTES)
        if row[at].protocol != TCP:  # an echo's identifier is the sender's own
            memset(<char *>words + ADDRESS_BYTES, 0, PORT_BYTES)
        (<Tried>found).take(words, answered_nats, again_nats)
    return held.size


def apart(rows, Recent seen not None, int64_t apart_ns):
    """Return the rows that begin at least so long after the last one of the same ends, and when that one began.

    ``seen`` has the start of the last one of ends (`PLACE_BYTES`); rows whose initiator is not known are passed over.
    """
    cdef Rows held = Rows(rows)
    cdef const Closed *row
    cdef uint64_t[BATCH][WORDS_MAX] words
    cdef Py_ssize_t start
    cdef int at, count
    cdef Entry *entry
    cdef bint fresh = False
    if seen.key_bytes != PLACE_BYTES or apart_ns < 0:
        raise ValueError(f"keys must have {PLACE_BYTES} bytes, and what is apart does not begin before: {apart_ns}")
    found = []
    memset(words, 0, sizeof(words))
    for start in range(0, held.size, BATCH):
        row = &held.first[start]
        count = <int>min(held.size - start, <Py_ssize_t>BATCH)
        for at in range(count):
            memcpy(words[at], &row[at].netns, SOURCE_BYTES)
            memcpy(&words[at][3], row[at].responder, TARGET_BYTES)
        seen.ask_for(words, count)
        for at in range(count):
            if not row[at].initiator_known:
                continue
            entry = seen.use(words[at], &fresh)
            # Times are whatever a capture says: the difference of two may be more than 63 bits hold.
            if (not fresh and row[at].start_ns >= entry.value
                    and <uint64_t>row[at].start_ns - <uint64_t>entry.value >= <uint64_t>apart_ns):
                found.append((start + at, entry.value))
            entry.value = row[at].start_ns
    return found
