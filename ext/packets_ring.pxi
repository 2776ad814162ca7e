# The ring that AF_PACKET shares with us: Documentation/networking/packet_mmap.rst, TPACKET_V3.

cdef extern from "<sys/mman.h>" nogil:
    enum: PROT_READ, PROT_WRITE, MAP_SHARED
    void* MAP_FAILED
    void* mmap(void* address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void* address, size_t length)

cdef extern from *:
    """
    #include <linux/if_packet.h>
    _Static_assert(TPACKET_ALIGN(sizeof(struct tpacket3_hdr)) == 48, "LINK_HEADER");
    """

cdef extern from "<linux/if_packet.h>" nogil:
    enum: TP_STATUS_KERNEL, TP_STATUS_USER, TP_STATUS_VLAN_VALID
    struct tpacket3_hdr:
        uint32_t tp_next_offset
        uint32_t tp_sec
        uint32_t tp_nsec
        uint32_t tp_snaplen
        uint32_t tp_len
        uint32_t tp_status
        uint16_t tp_net
    struct tpacket_hdr_v1:
        uint32_t block_status
        uint32_t num_pkts
        uint32_t offset_to_first_pkt
    union tpacket_bd_header_u:
        tpacket_hdr_v1 bh1
    struct tpacket_block_desc:
        tpacket_bd_header_u hdr
    struct sockaddr_ll:
        uint16_t sll_protocol
        int sll_ifindex
        uint16_t sll_hatype
        uint8_t sll_pkttype

cdef enum:
    ARPHRD_ETHER = 1
    ARPHRD_LOOPBACK = 772
    LINK_HEADER = 48            # TPACKET_ALIGN(sizeof(struct tpacket3_hdr)): where struct sockaddr_ll begins


# A packet that crosses several interfaces of a namespace (a container's veth, the bridge, the card) is met on each,
# some microseconds apart, the same but for its time to live. It counts where it was met first.
cdef enum:
    MET_MAX = 4096              # slots, each for the last packet of its hash

cdef int64_t MET_NS = 10000000

cdef struct Met:
    uint64_t hash
    int64_t time_ns
    int32_t interface


cdef extern from *:
    """
    /* All of a row that stays the same on the way, and the identification of IPv4 (RFC 791), mixed as wyhash does. */
    static inline uint64_t gpuguard_row_hash(const gpuguard_packet_row *row, uint64_t more) {
        uint64_t words[7];
        memcpy(words, row->source, 48);
        words[6] = more ^ (uint64_t)row->protocol << 32 ^ (uint64_t)row->tcp_flags << 40;
        for (int i = 0; i < 7; i++) {
            unsigned __int128 product = (unsigned __int128)(more ^ words[i]) * (0xa0761d6478bd642fu + 2 * i);
            more = (uint64_t)product ^ (uint64_t)(product >> 64) ^ words[i] >> 29;
        }
        return more;
    }
    """
    uint64_t row_hash "gpuguard_row_hash"(const Row* row, uint64_t more) noexcept nogil


cdef bint met_elsewhere(Met* table, const Row* row, const uint8_t* packet, int32_t interface,
                        uint64_t seed) noexcept nogil:
    """Whether the packet was just met on another interface. ``packet`` has room for the fields that a row came from."""
    cdef uint64_t hash = row_hash(row, seed ^ (be16(packet + 4) if packet[0] >> 4 == 4 else 0))
    cdef Met* met = &table[hash >> 52]
    cdef int64_t since = row.time_ns - met.time_ns
    if met.hash == hash and met.interface != interface and -MET_NS <= since <= MET_NS:
        return 1
    met.hash = hash
    met.time_ns = row.time_ns
    met.interface = interface
    return 0


cdef uint32_t tags_before(uint32_t kind, const uint8_t* p, uint32_t n, uint32_t wire) noexcept nogil:
    """Return the length of the tags that a packet begins with although it is said to be of ``kind``, which is IP.

    So does Linux since 6.11 where a frame has two tags: the first is told beside it, the second one lies ahead of the
    IP header, and the protocol is that of the header. The same bytes might be a header whose length looks like a tag;
    then what would be the header behind it has a version and a length that fit by chance.
    """
    cdef uint32_t at = 4
    while at < 4 * VLAN_TAGS_MAX and n >= at and is_tag(be16(p + at - 2)):
        at += 4
    if n < at + 8 or be16(p + at - 2) != kind:
        return 0
    if kind == 0x0800:
        return at if p[at] >> 4 == 4 and p[at] & 15 >= 5 and 20 <= be16(p + at + 2) <= wire - at else 0
    return at if p[at] >> 4 == 6 and be16(p + at + 4) + 40 <= wire - at else 0


cdef void ring_frame(Parse* s, const uint8_t* p, uint32_t room) noexcept nogil:
    """One packet of a cooked (SOCK_DGRAM) ring, ``room`` bytes of its block away from the end. It begins at the
    network header; the 14 bytes that Ethernet had before are counted, so that a file gives the same frame_bytes."""
    cdef const tpacket3_hdr* header = <const tpacket3_hdr*>p
    cdef const sockaddr_ll* link = <const sockaddr_ll*>(p + LINK_HEADER)
    cdef uint32_t at = header.tp_net
    cdef uint32_t n = header.tp_snaplen
    cdef uint32_t wire = n if header.tp_len < n else header.tp_len
    cdef uint32_t kind = be16(<const uint8_t*>&link.sll_protocol)
    cdef uint32_t before = 14 if link.sll_hatype == ARPHRD_ETHER or link.sll_hatype == ARPHRD_LOOPBACK else 0
    s.frames += 1
    if at > room or n > room - at:
        s.malformed += 1
        return
    p += at
    at = past_tags(p, n, 0, &kind)
    if kind != 0x0800 and kind != 0x86DD:
        s.other += 1
        return
    if header.tp_status & TP_STATUS_VLAN_VALID and not at:
        at = tags_before(kind, p, n, wire)
    network(s, p + at, n - at, wire - at, wire + before,
            <int64_t>header.tp_sec * 1000000000 + header.tp_nsec, link.sll_pkttype)


cdef class Ring:
    """A mapped TPACKET_V3 ring. The socket may be closed once it is mapped; only the mapping is used from then on."""

    cdef uint8_t* base
    cdef uint32_t block_bytes, blocks
    cdef uint32_t block         # the one to be read next
    cdef uint32_t at            # where in it the next packet is, 0: not begun
    cdef uint32_t left          # packets left in it
    cdef uint32_t bad_blocks
    cdef Met* met               # NULL where all packets are of one interface
    cdef readonly unsigned long long duplicates

    def __cinit__(self, int fd, unsigned int block_bytes, unsigned int blocks, *, bint many=False):
        if not 4096 <= block_bytes <= 1 << 24 or not 1 <= blocks <= 65536:
            raise ValueError("block size or count out of range")
        self.block_bytes = block_bytes
        self.blocks = blocks
        cdef void* base = mmap(NULL, <size_t>block_bytes * blocks, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        if base == MAP_FAILED:
            raise OSError(errno, f"the packet ring could not be mapped: {strerror(errno).decode()}")
        self.base = <uint8_t*>base
        if many:
            self.met = <Met*>calloc(MET_MAX, sizeof(Met))
            if self.met == NULL:
                raise MemoryError

    def __dealloc__(self):
        self.close()
        free(self.met)

    def close(self):
        """Unmap the ring; the kernel then frees the socket, if nobody else has it."""
        if self.base != NULL:
            munmap(self.base, <size_t>self.block_bytes * self.blocks)
            self.base = NULL

    @property
    def malformed_blocks(self):
        """Blocks whose inner lengths did not add up; the rest of each was passed over."""
        return self.bad_blocks

    def read(self, Parser parser not None, unsigned int blocks_max):
        """Parse what is ready, in place, at most ``blocks_max`` blocks. True: the parser is full, take and read on."""
        cdef Parse* s = &parser.s
        cdef uint32_t done = 0
        if self.base == NULL:
            raise ValueError("the ring is closed")
        with nogil:
            while done < blocks_max:
                if not self._begin():
                    break
                while self.left and not full(s):
                    self._packet(s)
                if self.left:
                    break
                self._release()
                done += 1
        return bool(self.left)

    cdef bint _begin(self) noexcept nogil:
        cdef tpacket_block_desc* head = <tpacket_block_desc*>(self.base + <size_t>self.block * self.block_bytes)
        if self.at:
            return 1
        if not load_acquire(&head.hdr.bh1.block_status) & TP_STATUS_USER:
            return 0
        self.at = head.hdr.bh1.offset_to_first_pkt
        self.left = head.hdr.bh1.num_pkts
        return 1

    cdef void _packet(self, Parse* s) noexcept nogil:
        cdef const uint8_t* head = self.base + <size_t>self.block * self.block_bytes
        cdef uint32_t step
        if self.at & 7 or self.at > self.block_bytes - LINK_HEADER - sizeof(sockaddr_ll):
            self.bad_blocks += 1
            self.left = 0
            return
        step = (<const tpacket3_hdr*>(head + self.at)).tp_next_offset
        # Packets lie far apart, each on lines that no cache has yet: fetch the next one's headers meanwhile.
        prefetch(head + self.at + step)
        prefetch(head + self.at + step + 64)
        prefetch(head + self.at + step + 128)
        self._frame(s, head + self.at, self.block_bytes - self.at)
        self.left -= 1
        if self.left and (step < LINK_HEADER or step > self.block_bytes):
            self.bad_blocks += 1
            self.left = 0
        self.at += step

    cdef void _frame(self, Parse* s, const uint8_t* p, uint32_t room) noexcept nogil:
        """Parse one packet; what it left is taken back if it was met on another interface."""
        cdef uint32_t used = s.used, facts = s.facts_used, arena = s.arena_used
        ring_frame(s, p, room)
        if self.met == NULL or s.used == used:
            return
        # A row was written: the header at tp_net is there, behind at most four tags of which none is IP.
        if met_elsewhere(self.met, &s.rows[used], p + (<const tpacket3_hdr*>p).tp_net,
                         (<const sockaddr_ll*>(p + LINK_HEADER)).sll_ifindex, s.seed):
            s.used = used
            s.facts_used = facts
            s.arena_used = arena
            self.duplicates += 1

    cdef void _release(self) noexcept nogil:
        cdef tpacket_block_desc* head = <tpacket_block_desc*>(self.base + <size_t>self.block * self.block_bytes)
        store_release(&head.hdr.bh1.block_status, TP_STATUS_KERNEL)
        self.block = (self.block + 1) % self.blocks
        self.at = 0
