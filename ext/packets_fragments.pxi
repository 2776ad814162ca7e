# IP fragments: RFC 791 section 3.2, RFC 815, RFC 8200 section 4.5, RFC 5722, RFC 7112, RFC 1858.
#
# A later fragment has no ports. It is given those of the first one of its datagram: that with the same addresses, the
# same identification and, in IPv4, the same protocol. What belongs to which datagram is kept as Linux keeps it
# (inet_frag_queue_insert): runs of bytes; a fragment within one came again, one that overlaps spoils the datagram, and
# the last piece that was missing makes it whole. A whole one waits for MET_AGAIN_NS only, in which its fragments may be
# met on another interface: IPv4 has 65,536 identifications and uses them again soon (RFC 4963).
#
# A fragment that comes before the first has no bytes in its row. They are counted with the first; without one, never.

cdef enum:
    DATAGRAM_SETS = 128
    DATAGRAM_WAYS = 8
    RUNS_MAX = 8
    FRAGMENT = 32               # records.FRAGMENT
    DATAGRAM_BYTES_MAX = 65535

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
    uint8_t headed              # the first fragment came, and what is below is known
    uint8_t protocol
    uint8_t tcp_flags
    int64_t since_ns
    int64_t whole_ns
    uint16_t starts[RUNS_MAX]
    uint16_t stops[RUNS_MAX]
    uint16_t size               # of what is fragmented; 0: its end did not come yet
    uint16_t last               # where the piece began that made it whole
    uint16_t header             # bytes before the payload
    uint16_t source_port
    uint16_t destination_port
    uint32_t sequence           # of TCP: of the payload
    uint32_t acknowledgement
    uint32_t early_bytes        # that came before the first
    uint8_t begins[8]           # the first bytes of the first


cdef inline bint apart(int64_t a, int64_t b, int64_t limit_ns) noexcept nogil:
    """Whether two times are farther from each other than that. They are hostile: the difference may wrap."""
    return <uint64_t>a - <uint64_t>b + <uint64_t>limit_ns > 2 * <uint64_t>limit_ns


cdef void begin(Parse* s, Datagram* d, int64_t time_ns) noexcept nogil:
    """Forget all but which datagram it is. One that never was whole was never delivered, whatever was read of it."""
    if d.runs and not d.whole and not d.spoiled:
        s.datagrams_unfinished += 1
    memset(&d.runs, 0, sizeof(Datagram) - (<char*>&d.runs - <char*>d))
    d.since_ns = time_ns


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
        d.last = <uint16_t>start
    return 1


cdef void first_fragment(Parse* s, Datagram* d, Row* row, uint32_t before, const uint8_t* p, uint32_t have,
                         uint32_t size, bint headless, bint fresh) noexcept nogil:
    """Read it as a packet. UDP says how long the datagram is, by which messages are known; the row has what is here."""
    cdef uint32_t claimed = size, header = 0
    if row.protocol == 17 and have >= 8 and not headless and be16(p + 4) > size:
        claimed = be16(p + 4)
    transport(s, row, p, have, claimed, headless)
    row.payload_bytes -= claimed - size
    if row.protocol == 6:
        header = (p[12] >> 4) * 4 if have >= 20 and not headless else 0
        headless = header < 20 or header > size
    elif row.protocol == 17 or row.protocol == 1 or row.protocol == 58:
        header = 8
        headless = headless or have < 8
    if headless:
        s.fragments_headless += fresh
        return
    if row.protocol != 6:
        row.payload_bytes += d.early_bytes
    if d.headed:  # came again: the first one counts, as in Linux
        return
    d.headed = 1
    memcpy(d.begins, p, least(have, 8))
    d.protocol = row.protocol
    d.tcp_flags = row.tcp_flags & ACK
    d.header = <uint16_t>(before + header)
    d.source_port = row.source_port
    d.destination_port = row.destination_port
    d.sequence = row.sequence + (row.tcp_flags & SYN != 0)
    d.acknowledgement = row.acknowledgement


cdef void later_fragment(Parse* s, Datagram* d, Row* row, uint32_t offset, const uint8_t* p, uint32_t have,
                         uint32_t size, bint fresh) noexcept nogil:
    """Of TCP it is a segment of its own: its sequence number follows from its place."""
    if d.headed:
        row.protocol = d.protocol
        row.source_port = d.source_port
        row.destination_port = d.destination_port
        row.sequence = d.sequence
        row.payload_bytes = size
        if row.protocol == 6:
            row.sequence += offset - d.header
            row.acknowledgement = d.acknowledgement
            row.tcp_flags = d.tcp_flags
            if size:
                segment(s, row, p, have, size)
    else:
        s.fragments_early += 1 if fresh or d.spoiled else 0
        d.early_bytes += size if fresh else 0
    s.used += 1


cdef void fragment(Parse* s, Row* row, uint8_t kind, uint32_t id, uint32_t offset, bint more, uint32_t before,
                   const uint8_t* p, uint32_t have, uint32_t size, bint headless) noexcept nogil:
    """One fragment, ``offset`` bytes into its datagram, and the end of its row.

    Its last ``size`` bytes begin at ``p``; ``before`` them, in a first one, are extension headers. ``headless``: a
    first one that ends within these.
    """
    cdef Datagram* d = datagram_of(s, row, kind, id)
    cdef bint fresh
    if offset == 0 and d.whole and memcmp(d.begins, p, least(have, 8)) != 0:  # another datagram with its number
        begin(s, d, row.time_ns)
    fresh = join(s, d, offset, <uint64_t>offset + before + size, more, row.time_ns)
    if offset == 0:
        first_fragment(s, d, row, before, p, have, size, headless, fresh)
    else:
        later_fragment(s, d, row, offset, p, have, size, fresh)
    if row.protocol != 6:
        row.tcp_flags = FRAGMENT
        row.acknowledgement = d.size - d.header if d.whole and d.headed and offset == d.last else 0
