# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Who tried what: the memory that `probing` and `beacon` have of dull flows, taken in by the row.

One packet in 16 of ordinary traffic ends a dull flow, and nearly all of them say nothing to either detector: a place
that was not called before, an attempt that succeeded. These are counted here, and only the rows that may lead to
evidence are returned, to be judged in Python. `tests/reference_attempts.py` is the same written for the eye.

Floor, by the bytes: a row of 110 bytes is two cache lines, read in order; a set of keys is two, in which the order of
use is the order they lie in.
"""

cimport cython
from cpython.buffer cimport PyBUF_ND, PyBuffer_Release, PyObject_GetBuffer
from cpython.dict cimport PyDict_GetItemWithError
from cpython.object cimport PyObject
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

include "mixing.pxi"
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
    WAYS = 8
    TARGETS_MAX = 2048
    KNOWN_MAX = 16
    REASON_CLOSED = 0
    REASON_END = 3
    REFUSED_PACKETS_MAX = 4
    ICMP = 1
    TCP = 6
    UDP = 17
    ICMPV6 = 58

cdef struct Way:
    uint64_t hash
    int64_t value


@cython.final
cdef class Recent:
    """Keys that were used lately, each with a number, at most ``size_max``, a power of two from WAYS on.

    A key belongs to one set of WAYS; of more the longest unused is forgotten, once the table has all its sets. Keys are
    of ``key_bytes``, at most 48, and known by 64 bits of hash: that two of a million share one happens once in thirty
    million tables. Who does not know the ``seed`` cannot choose which keys meet in a set. Raises ValueError where a
    size or a key is not so.
    """

    cdef void *memory
    cdef Way *ways              # of one set after the other, each from the one used last on
    cdef readonly int32_t size
    cdef int32_t sets, sets_max, words
    cdef Py_ssize_t key_bytes
    cdef uint64_t begin, factor

    def __cinit__(self, Py_ssize_t key_bytes, int32_t size_max, uint64_t seed=0):
        if not (1 <= key_bytes <= WORDS_MAX * 8 and WAYS <= size_max <= 1 << 24 and size_max & (size_max - 1) == 0):
            raise ValueError(f"no table for {size_max} keys of {key_bytes} bytes")
        self.key_bytes = key_bytes
        self.words = <int32_t>(key_bytes + 7) // 8
        self.sets_max = size_max // WAYS
        self.begin = seed ^ <uint64_t>0xa0761d6478bd642f
        self.factor = turned(seed, 32) ^ <uint64_t>0xe7037ed1a0b428db
        self.resize(1)

    def __dealloc__(self):
        free(self.memory)

    def __len__(self):
        return self.size

    def __contains__(self, const uint8_t[::1] key):
        return self.find(self.hash_of(key)) != NULL

    def get(self, const uint8_t[::1] key):
        """Return the number of a key, None if it is not here; it is not used by that."""
        cdef Way *way = self.find(self.hash_of(key))
        return way.value if way != NULL else None

    def put(self, const uint8_t[::1] key, int64_t value):
        """Use a key and give it this number."""
        cdef bint fresh = False
        cdef uint64_t hash = self.hash_of(key)
        self.use(hash, &fresh).value = value

    cdef uint64_t hash_of(self, const uint8_t[::1] key) except 0:
        cdef uint64_t[WORDS_MAX] words
        if key.shape[0] != self.key_bytes:
            raise ValueError(f"keys have {self.key_bytes} bytes")
        memset(words, 0, sizeof(words))
        memcpy(words, &key[0], self.key_bytes)
        return self.hash(words)

    cdef inline uint64_t hash(self, const uint64_t *words) noexcept:
        """Return the hash of a key, never 0: that is a way that is free."""
        cdef uint64_t value = self.begin
        cdef int i
        for i in range(self.words):
            value = fold(value ^ words[i], self.factor)
        return value if value else 1

    cdef inline Way *set_of(self, uint64_t hash) noexcept:
        return &self.ways[(hash & <uint64_t>(self.sets - 1)) * WAYS]

    cdef inline void ask_for(self, uint64_t hash) noexcept:
        ask(self.set_of(hash))
        ask(self.set_of(hash) + WAYS // 2)

    cdef inline Way *find(self, uint64_t hash) noexcept:
        cdef Way *way = self.set_of(hash)
        cdef int i
        for i in range(WAYS):
            if way[i].hash == hash:
                return &way[i]
        return NULL

    cdef inline Way *use(self, uint64_t hash, bint *fresh) except NULL:
        """Return the way of a key as the one used last in its set, made with the number 0 if there was none."""
        cdef Way *way = self.find(hash)
        cdef Way first
        fresh[0] = way == NULL
        if way != NULL:
            first = way[0]
        else:
            while self.set_of(hash)[WAYS - 1].hash and self.sets < self.sets_max:
                self.resize(self.sets * 2)
            way = self.set_of(hash)
            while way.hash and way < self.set_of(hash) + WAYS - 1:
                way += 1
            self.size += way.hash == 0
            first.hash = hash
            first.value = 0
        while way > self.set_of(hash):
            way[0] = (way - 1)[0]
            way -= 1
        way[0] = first
        return way

    cdef int resize(self, int32_t sets) except -1:
        """Have so many sets: most sources try few places. What was used earlier is put earlier."""
        cdef void *before = self.memory
        cdef Way *ways = self.ways
        cdef Way *way
        cdef int32_t at, count = self.sets * WAYS
        cdef void *memory = calloc(<size_t>sets * WAYS + 4, sizeof(Way))
        if memory == NULL:
            raise MemoryError
        self.memory = memory
        self.ways = <Way *>((<size_t>memory + 63) & ~<size_t>63)
        self.sets = sets
        for at in range(count):
            if ways[at].hash:
                way = self.set_of(ways[at].hash)
                while way.hash:
                    way += 1
                way[0] = ways[at]
        free(before)
        return 0


@cython.final
cdef class Places:
    """Places of TCP that everybody knows, by address or else by port, each of a kind from 1 to 63.

    Raises ValueError for more than KNOWN_MAX of either, and for an address that has not 16 bytes.
    """

    cdef uint64_t[KNOWN_MAX][2] addresses
    cdef uint16_t[KNOWN_MAX] ports
    cdef uint8_t[KNOWN_MAX] address_kinds
    cdef uint8_t[KNOWN_MAX] port_kinds
    cdef int addresses_size, ports_size

    def __cinit__(self, dict addresses, dict ports):
        cdef const uint8_t[::1] raw
        if len(addresses) > KNOWN_MAX or len(ports) > KNOWN_MAX:
            raise ValueError(f"at most {KNOWN_MAX} addresses and ports are known")
        for address, kind in addresses.items():
            raw = address
            if raw.shape[0] != ADDRESS_BYTES or not 0 < kind < 64:
                raise ValueError(f"no place: {address}, {kind}")
            memcpy(self.addresses[self.addresses_size], &raw[0], ADDRESS_BYTES)
            self.address_kinds[self.addresses_size] = kind
            self.addresses_size += 1
        for port, kind in ports.items():
            if not 0 < kind < 64:
                raise ValueError(f"no place: {port}, {kind}")
            self.ports[self.ports_size] = port
            self.port_kinds[self.ports_size] = kind
            self.ports_size += 1

    def kind(self, const uint8_t[::1] target):
        """Return the kind of a target, 0 if it is no known place."""
        cdef uint64_t[WORDS_MAX] words
        if target.shape[0] != TARGET_BYTES:
            raise ValueError(f"targets have {TARGET_BYTES} bytes")
        memset(words, 0, sizeof(words))
        memcpy(words, &target[0], TARGET_BYTES)
        return self.kind_of(words)

    cdef inline uint8_t kind_of(self, const uint64_t *target) noexcept:
        cdef int i
        if ((target[2] >> 16) & 255) != TCP:
            return 0
        for i in range(self.ports_size):
            if self.ports[i] == (target[2] & 0xffff):
                return self.port_kinds[i]
        for i in range(self.addresses_size):
            if self.addresses[i][0] == target[0] and self.addresses[i][1] == target[1]:
                return self.address_kinds[i]
        return 0


cdef class Tried:
    """What one unit tried last, how much is held against it: ``nats``, and a bit of ``kinds`` for each kind of place.

    An answer takes away from it, but for the first of a known kind: whoever asks there knows what everybody knows.
    ``seed``: as of `Recent`.
    """

    cdef public double nats
    cdef public uint64_t kinds
    cdef readonly Recent targets

    def __cinit__(self, *_, uint64_t seed=0):
        self.targets = Recent(TARGET_BYTES, TARGETS_MAX, seed)

    def succeed(self, const uint8_t[::1] target, Places places not None, double answered_nats, double again_nats):
        """Count a success, for which nothing is to be taken away where nothing is held against the unit."""
        self.take(self.targets.hash_of(target), places.kind(target), answered_nats, again_nats)

    cdef int take(self, uint64_t target, uint8_t kind, double answered_nats, double again_nats) except -1:
        cdef bint fresh = False
        cdef uint64_t known = <uint64_t>1 << kind if kind else self.kinds
        self.targets.use(target, &fresh)
        if known & ~self.kinds:
            self.kinds |= known
        elif self.nats > 0.0:
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
    if row.protocol == UDP:
        return row.reason == REASON_END and row.payload_bytes[1] == 0
    if row.protocol != TCP:
        return False
    if row.missed:
        return True
    if row.payload_bytes[0] or row.payload_bytes[1]:
        return False
    return row.reason != REASON_CLOSED or row.packets <= REFUSED_PACKETS_MAX


def succeed(rows, Py_ssize_t start, sources, Places places not None, double answered_nats, double again_nats):
    """Take the successes among rows[start:] in; return the first row that is to be looked at, len(rows) if none is.

    That is one in vain, and a success of a source (`SOURCE_BYTES`) that ``sources`` has anything but a `Tried` for.
    """
    cdef Rows held = Rows(rows)
    cdef Py_ssize_t stop
    if not isinstance(sources, dict):
        raise TypeError("sources must be a dict")
    if start < 0:
        raise IndexError("rows out of range")
    while start < held.size:
        stop = min(start + BATCH, held.size)
        start = succeed_some(held, start, stop, sources, places, answered_nats, again_nats)
        if start < stop:
            return start
    return held.size


cdef Py_ssize_t succeed_some(Rows held, Py_ssize_t start, Py_ssize_t stop, object sources, Places places,
                             double answered_nats, double again_nats) except -1:
    """Take in at most BATCH successes: what they touch is fetched for all of them before the first is counted."""
    cdef const Closed *row
    cdef uint64_t[WORDS_MAX] words
    cdef uint64_t[BATCH] targets
    cdef uint8_t[BATCH] kinds
    cdef PyObject *found
    cdef PyObject *tried[BATCH]
    cdef bint any_source = len(sources) > 0
    cdef int at, count = 0
    memset(words, 0, sizeof(words))
    while start < stop:
        row = &held.first[start]
        if in_vain(row):
            break
        start += 1
        if not any_source or not (row.protocol == TCP or row.protocol == ICMP or row.protocol == ICMPV6):
            continue
        found = PyDict_GetItemWithError(sources, <bytes>(<const char *>&row.netns)[:SOURCE_BYTES])
        if found == NULL:
            continue
        if not isinstance(<object>found, Tried):
            start -= 1
            break
        memcpy(words, row.responder, TARGET_BYTES)
        if row.protocol != TCP:  # an echo's identifier is the sender's own
            memset(<char *>words + ADDRESS_BYTES, 0, PORT_BYTES)
        tried[count] = found
        targets[count] = (<Tried>found).targets.hash(words)
        kinds[count] = places.kind_of(words)
        (<Tried>found).targets.ask_for(targets[count])
        count += 1
    for at in range(count):
        (<Tried>tried[at]).take(targets[at], kinds[at], answered_nats, again_nats)
    return start


def apart(rows, Recent seen not None, int64_t apart_ns):
    """Return the rows that begin at least so long after the last one of the same ends, and when that one began.

    ``seen`` has the start of the last one of ends (`PLACE_BYTES`); rows whose initiator is not known are passed over.
    """
    cdef Rows held = Rows(rows)
    cdef const Closed *row
    cdef uint64_t[WORDS_MAX] words
    cdef uint64_t[BATCH] hashes
    cdef Py_ssize_t start
    cdef int at, count
    cdef Way *way
    cdef bint fresh = False
    if seen.key_bytes != PLACE_BYTES or apart_ns < 0:
        raise ValueError(f"keys must have {PLACE_BYTES} bytes, and what is apart does not begin before: {apart_ns}")
    found = []
    memset(words, 0, sizeof(words))
    for start in range(0, held.size, BATCH):
        row = &held.first[start]
        count = <int>min(held.size - start, <Py_ssize_t>BATCH)
        for at in range(count):
            memcpy(words, &row[at].netns, SOURCE_BYTES)
            memcpy(&words[3], row[at].responder, TARGET_BYTES)
            hashes[at] = seen.hash(words)
            seen.ask_for(hashes[at])
        for at in range(count):
            if not row[at].initiator_known:
                continue
            way = seen.use(hashes[at], &fresh)
            # Times are whatever a capture says: the difference of two may be more than 63 bits hold.
            if (not fresh and row[at].start_ns >= way.value
                    and <uint64_t>row[at].start_ns - <uint64_t>way.value >= <uint64_t>apart_ns):
                found.append((start + at, way.value))
            way.value = row[at].start_ns
    return found
