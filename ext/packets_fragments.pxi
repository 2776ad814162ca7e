# IP fragments: RFC 791 section 3.2, RFC 815, RFC 8200 section 4.5, RFC 5722, RFC 7112, RFC 1858.
#
# A datagram is read when it is whole, as its receiver does: until then nobody was given a byte of it, and a first
# fragment that is never followed would put words into a stream. It is one row, with the time of the fragment that made
# it whole and the frame bytes of all. Fragments are of the datagram with the same addresses, the same identification
# and, in IPv4, the same protocol. What belongs to it is kept as Linux keeps it (inet_frag_queue_insert): runs of bytes;
# a fragment within one came again, one that overlaps spoils the datagram, and the last piece that was missing makes it
# whole. A whole one waits for MET_AGAIN_NS only, in which its fragments may be met on another interface: IPv4 has
# 65,536 identifications and uses them again soon (RFC 4963).
#
# Of each the first HELD_BYTES are kept, as much as a message may have; what is beyond counts, as beyond a snap length.

cdef enum:
    DATAGRAM_SETS = 128
    DATAGRAM_WAYS = 8
    RUNS_MAX = 8
    DATAGRAM_BYTES_MAX = 65535
    HELD_BYTES = 16384

cdef int64_t DATAGRAM_NS = 30000000000  # net.ipv4.ipfrag_time
cdef int64_t MET_AGAIN_NS = 10000000

cdef struct Datagram:
    uint8_t ends[32]            # source and destination
    uint32_t id
    uint8_t kind                # the protocol in IPv4, the fragment header's number in IPv6
    uint8_t used
    uint8_t runs
    uint8_t spoiled
    uint8_t whole
    uint8_t headless            # the first fragment ends within its extension headers (RFC 7112)
    uint8_t protocol
    int64_t since_ns
    int64_t whole_ns
    uint16_t starts[RUNS_MAX]
    uint16_t stops[RUNS_MAX]
    uint16_t size               # of what is fragmented; 0: its end did not come yet
    uint16_t before             # bytes of extension headers in it
    uint32_t held               # how many of its first bytes were captured and may be kept
    uint32_t frame_bytes
    uint8_t begins[8]           # the first bytes behind these headers


cdef inline bint apart(int64_t a, int64_t b, int64_t limit_ns) noexcept nogil:
    """Whether two times are farther from each other than that. They are hostile: the difference may wrap."""
    return <uint64_t>a - <uint64_t>b + <uint64_t>limit_ns > 2 * <uint64_t>limit_ns


cdef void begin(Parse* s, Datagram* d, int64_t time_ns) noexcept nogil:
    """Forget all but which datagram it is. One that never was whole was never delivered, nor read."""
    if d.runs and not d.whole and not d.spoiled:
        s.datagrams_unfinished += 1
    memset(&d.runs, 0, sizeof(Datagram) - (<char*>&d.runs - <char*>d))
    d.since_ns = time_ns
    d.held = HELD_BYTES


cdef inline uint8_t* bytes_of(Parse* s, const Datagram* d) noexcept nogil:
    return s.held + <size_t>(d - s.datagrams) * HELD_BYTES


cdef Datagram* datagram_of(Parse* s, const Row* row, uint8_t kind, uint32_t id) noexcept nogil:
    """Return the datagram of a fragment, a new one if need be: in the place of the oldest, best of one that is done."""
    cdef uint64_t h = stream_hash(row, s.seed ^ (<uint64_t>kind << 32 | id))
    cdef Datagram* d = s.datagrams + (h >> 40) % DATAGRAM_SETS * DATAGRAM_WAYS
    cdef Datagram* chosen = d
    cdef uint64_t age, oldest = 0
    cdef bint done
    cdef int i
    for i in range(DATAGRAM_WAYS):
        if d.used and d.id == id and d.kind == kind and memcmp(d.ends, row.source, 32) == 0:
            if apart(row.time_ns, d.since_ns, DATAGRAM_NS) or d.whole and apart(row.time_ns, d.whole_ns, MET_AGAIN_NS):
                begin(s, d, row.time_ns)
            return d
        done = not d.used or d.whole or d.spoiled or apart(row.time_ns, d.since_ns, DATAGRAM_NS)
        age = (<uint64_t>row.time_ns - <uint64_t>d.since_ns) >> 1 | <uint64_t>done << 63
        if age >= oldest:
            oldest = age
            chosen = d
        d += 1
    begin(s, chosen, row.time_ns)
    memcpy(chosen.ends, row.source, 32)
    chosen.id = id
    chosen.kind = kind
    chosen.used = 1
    return chosen


cdef bint fits(const Datagram* d, uint64_t start, uint64_t stop, bint more) noexcept nogil:
    """Whether a receiver would take a piece."""
    cdef int i
    if stop > DATAGRAM_BYTES_MAX or more and stop & 7 or d.size and (stop > d.size or not more and stop != d.size):
        return 0
    for i in range(d.runs):
        if start < d.stops[i] and stop > d.starts[i] or not more and stop < d.stops[i]:
            return 0
    return 1


cdef bint join(Parse* s, Datagram* d, uint64_t start, uint64_t stop, bint more, int64_t time_ns) noexcept nogil:
    """Note a piece; return whether it brought anything."""
    cdef int i, before = -1, behind = -1
    if start == stop or d.spoiled:
        return 0
    for i in range(d.runs):
        if start >= d.starts[i] and stop <= d.stops[i]:
            return 0
    if d.whole:  # likewise
        begin(s, d, time_ns)
    for i in range(d.runs):
        if d.stops[i] == start:
            before = i
        if d.starts[i] == stop:
            behind = i
    if not fits(d, start, stop, more) or before < 0 and behind < 0 and d.runs == RUNS_MAX:
        d.spoiled = 1
        s.datagrams_spoiled += 1
        return 0
    if not more:
        d.size = <uint16_t>stop
    if before >= 0 and behind >= 0:
        d.stops[before] = d.stops[behind]
        d.runs -= 1
        d.starts[behind] = d.starts[d.runs]
        d.stops[behind] = d.stops[d.runs]
    elif before >= 0:
        d.stops[before] = <uint16_t>stop
    elif behind >= 0:
        d.starts[behind] = <uint16_t>start
    else:
        d.starts[d.runs] = <uint16_t>start
        d.stops[d.runs] = <uint16_t>stop
        d.runs += 1
    if d.size and d.runs == 1 and d.starts[0] == 0 and d.stops[0] == d.size:
        d.whole = 1
        d.whole_ns = time_ns
    return 1


cdef void keep(Parse* s, Datagram* d, uint32_t at, const uint8_t* p, uint32_t have, uint32_t size) noexcept nogil:
    """Hold what was captured of the ``size`` bytes at ``at``."""
    if at < d.held:
        memcpy(bytes_of(s, d) + at, p, least(have, HELD_BYTES - at))
        if have < size:
            d.held = least(d.held, at + have)


cdef void fragment(Parse* s, Row* row, uint8_t kind, uint32_t id, uint32_t offset, bint more, uint32_t before,
                   const uint8_t* p, uint32_t have, uint32_t size, bint headless) noexcept nogil:
    """One fragment, ``offset`` bytes into its datagram; with the last that was missing, the row of the whole.

    Its last ``size`` bytes begin at ``p``; ``before`` them, in a first one, are extension headers. ``headless``: a
    first one that ends within these.
    """
    cdef Datagram* d = datagram_of(s, row, kind, id)
    if offset == 0 and d.whole and memcmp(d.begins, p, least(have, 8)) != 0:  # another datagram with its number
        begin(s, d, row.time_ns)
    if not join(s, d, offset, <uint64_t>offset + before + size, more, row.time_ns):
        return
    d.frame_bytes += row.frame_bytes
    keep(s, d, offset + before, p, have, size)
    if offset == 0:
        d.before = <uint16_t>before
        d.protocol = row.protocol
        d.headless = headless
        s.fragments_headless += headless
        memcpy(d.begins, p, least(have, 8))
    if d.whole:
        row.protocol = d.protocol
        row.frame_bytes = d.frame_bytes
        transport(s, row, bytes_of(s, d) + least(d.before, HELD_BYTES), above(least(d.held, d.size), d.before),
                  d.size - d.before, d.headless)
