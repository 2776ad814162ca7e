# pcap and pcapng, fed in pieces of any size: draft-ietf-opsawg-pcap, draft-ietf-opsawg-pcapng.

cdef enum:
    RECORD_MAX = 16777216       # bytes of one record or block; libpcap has the same bound
    INTERFACES_MAX = 1024
    BLOCK_SECTION = 0x0A0D0D0A
    BLOCK_INTERFACE = 1
    BLOCK_PACKET = 2
    BLOCK_SIMPLE = 3
    BLOCK_ENHANCED = 6

cdef struct Interface:
    uint32_t link
    uint32_t snap_bytes
    uint32_t resolution
    int64_t offset_s

cdef struct Source:
    Parse* s
    bint swap
    bint ng
    uint32_t header         # bytes before the data of a pcap record
    Interface pcap
    Interface* interfaces
    uint32_t interfaces_used
    int64_t last_ns
    uint64_t unsupported    # frames of a link type that is not known
    const char* problem


cdef inline uint32_t u16(Source* c, const uint8_t* p) noexcept nogil:
    return be16(p) if c.swap else (<uint32_t>p[1] << 8) | p[0]


cdef inline uint32_t u32(Source* c, const uint8_t* p) noexcept nogil:
    return be32(p) if c.swap else (<uint32_t>p[3] << 24) | (<uint32_t>p[2] << 16) | (<uint32_t>p[1] << 8) | p[0]


cdef inline int64_t wrapping(int64_t a, int64_t b) noexcept nogil:
    return <int64_t>(<uint64_t>a + <uint64_t>b)


cdef int64_t bad(Source* c, const char* problem) noexcept nogil:
    c.problem = problem
    return -1


# Each reader returns how many bytes the record took, 0 if it is not all there, -1 with c.problem set if it is broken.

cdef int64_t pcap_header(Source* c, const uint8_t* p, uint64_t n) noexcept nogil:
    cdef uint32_t magic
    if n < 24:
        return 0
    magic = be32(p)
    c.swap = magic == 0xA1B2C3D4U or magic == 0xA1B23C4DU or magic == 0xA1B2CD34U
    magic = u32(c, p)
    if magic != 0xA1B2C3D4U and magic != 0xA1B23C4DU and magic != 0xA1B2CD34U:
        return bad(c, "not a pcap or pcapng file")
    c.ng = 0
    c.header = 24 if magic == 0xA1B2CD34U else 16
    c.pcap.resolution = 9 if magic == 0xA1B23C4DU else 6
    c.pcap.link = u32(c, p + 20) & 0x03FFFFFF
    if not known_link(c.pcap.link):
        return bad(c, "link type not supported")
    return 24


cdef int64_t pcap_record(Source* c, const uint8_t* p, uint64_t n) noexcept nogil:
    cdef uint32_t size
    cdef uint32_t packet_type = PACKET_TYPE_UNKNOWN
    if n < c.header:
        return 0
    size = u32(c, p + 8)
    if size > RECORD_MAX:
        return bad(c, "packet record longer than 16 MiB")
    if n < <uint64_t>c.header + size:
        return 0
    if c.header == 24 and p[22] <= 4:  # Kuznetzov's format: interface index, protocol, packet type, padding
        packet_type = p[22]
    c.last_ns = wrapping(<int64_t>u32(c, p) * 1000000000, ticks_ns(u32(c, p + 4), c.pcap.resolution))
    frame(c.s, c.pcap.link, p + c.header, size, u32(c, p + 12), c.last_ns, packet_type)
    return <int64_t>c.header + size


cdef int64_t ng_interface(Source* c, const uint8_t* p, uint32_t n) noexcept nogil:
    cdef Interface* face
    cdef uint32_t at = 16, code, size
    if n < 20:
        return bad(c, "interface block too short")
    if c.interfaces_used >= INTERFACES_MAX:
        return bad(c, "more than 1024 interfaces in one section")
    face = &c.interfaces[c.interfaces_used]
    c.interfaces_used += 1
    face.link = u16(c, p + 8)
    face.snap_bytes = u32(c, p + 12)
    face.resolution = 6
    face.offset_s = 0
    while at + 8 <= n:  # four bytes of option header and, at the end, four of block length
        code = u16(c, p + at)
        size = u16(c, p + at + 2)
        at += 4
        if code == 0 or size > n - 4 - at:
            break
        if code == 9 and size >= 1:
            face.resolution = p[at]
        elif code == 14 and size >= 8:
            face.offset_s = <int64_t>((<uint64_t>u32(c, p + at + (0 if c.swap else 4)) << 32)
                                      | u32(c, p + at + (4 if c.swap else 0)))
        at += (size + 3) & ~<uint32_t>3
    return n


cdef uint32_t ng_direction(Source* c, const uint8_t* p, uint32_t at, uint32_t n) noexcept nogil:
    """epb_flags: 1 inbound, 2 outbound."""
    cdef uint32_t code, size
    while at + 8 <= n:
        code = u16(c, p + at)
        size = u16(c, p + at + 2)
        at += 4
        if code == 0 or size > n - 4 - at:
            break
        if code == 2 and size >= 4:
            size = u32(c, p + at) & 3
            return 0 if size == 1 else 4 if size == 2 else PACKET_TYPE_UNKNOWN
        at += (size + 3) & ~<uint32_t>3
    return PACKET_TYPE_UNKNOWN


cdef int64_t ng_packet(Source* c, uint32_t kind, const uint8_t* p, uint32_t n) noexcept nogil:
    cdef uint32_t data = 12 if kind == BLOCK_SIMPLE else 28
    cdef uint32_t index = 0, size, wire
    cdef Interface* face
    if n < data + 4:
        return bad(c, "packet block too short")
    if kind == BLOCK_ENHANCED:
        index = u32(c, p + 8)
    elif kind == BLOCK_PACKET:
        index = u16(c, p + 8)
    if index >= c.interfaces_used:
        return bad(c, "packet block names an interface that was not described")
    face = &c.interfaces[index]
    if kind == BLOCK_SIMPLE:  # has no time of its own: that of the packet before
        wire = u32(c, p + 8)
        size = least(wire, n - data - 4)
        if face.snap_bytes:
            size = least(size, face.snap_bytes)
    else:
        size = u32(c, p + 20)
        wire = u32(c, p + 24)
        c.last_ns = wrapping(ticks_ns((<uint64_t>u32(c, p + 12) << 32) | u32(c, p + 16), face.resolution),
                             <int64_t>(<uint64_t>face.offset_s * 1000000000))
    if size > n - data - 4:
        return bad(c, "packet longer than its block")
    if not known_link(face.link):
        c.unsupported += 1
        return n
    frame(c.s, face.link, p + data, size, wire, c.last_ns,
          ng_direction(c, p, data + ((size + 3) & ~<uint32_t>3), n) if kind == BLOCK_ENHANCED
          else PACKET_TYPE_UNKNOWN)
    return n


cdef int64_t ng_block(Source* c, const uint8_t* p, uint64_t n) noexcept nogil:
    cdef uint32_t kind, size
    if n < 12:
        return 0
    kind = be32(p)
    if kind == BLOCK_SECTION:  # the same in either byte order, which its third word tells
        if be32(p + 8) != 0x1A2B3C4D and be32(p + 8) != 0x4D3C2B1A:
            return bad(c, "section header without byte-order magic")
        c.swap = be32(p + 8) == 0x1A2B3C4D
        c.ng = 1
        c.interfaces_used = 0
    kind = u32(c, p)
    size = u32(c, p + 4)
    if size < 12 or size & 3 or size > RECORD_MAX:
        return bad(c, "block length impossible")
    if n < size:
        return 0
    if u32(c, p + size - 4) != size:
        return bad(c, "block lengths before and after differ")
    if kind == BLOCK_INTERFACE:
        return ng_interface(c, p, size)
    if kind == BLOCK_PACKET or kind == BLOCK_SIMPLE or kind == BLOCK_ENHANCED:
        return ng_packet(c, kind, p, size)
    return size


cdef class CaptureFile:
    """The bytes of a capture file, in order, into a `Parser`. ``offset`` is where the next record begins."""

    cdef Source c
    cdef Parser parser
    cdef readonly long long offset
    cdef bint begun

    def __cinit__(self, Parser parser not None):
        memset(&self.c, 0, sizeof(Source))
        self.parser = parser
        self.c.s = &parser.s
        self.c.interfaces = <Interface*>calloc(INTERFACES_MAX, sizeof(Interface))
        if self.c.interfaces == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.c.interfaces)

    @property
    def unsupported(self):
        """Frames passed over, since nothing here reads their link type."""
        return self.c.unsupported

    def feed(self, const unsigned char[::1] data, size_t start, size_t end):
        """Parse whole records of ``data[start:end]`` until the parser is full; return how many bytes were taken.

        Raises ValueError, its text the reason, at a record that cannot be read; those before it are in the parser.
        """
        cdef size_t at = start
        cdef int64_t took = 0
        if end > <size_t>data.shape[0] or start > end:
            raise IndexError("start and end lie outside of data")
        with nogil:
            if not self.begun:
                if end - at >= 4 and be32(&data[at]) == BLOCK_SECTION:
                    took = ng_block(&self.c, &data[at], end - at)
                elif end > at:
                    took = pcap_header(&self.c, &data[at], end - at)
                self.begun = took > 0
                at += took if took > 0 else 0
            while self.begun and at < end and not full(self.c.s):
                took = (ng_block if self.c.ng else pcap_record)(&self.c, &data[at], end - at)
                if took <= 0:
                    break
                at += took
        self.offset += at - start
        if took < 0:
            raise ValueError(self.c.problem.decode("ascii"))
        return at - start
