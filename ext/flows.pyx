# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The flow table: one pass over packet rows, no Python object but for what is told.

Sizes are of TCP payload as the sender's sequence numbers order it (RFC 9293 section 3.4): what was sent again,
keepalive probes and overlaps add nothing, a hole is filled by whoever arrives later. `tests/reference_flows.py` is the
same table written for the eye; the two must agree on every input.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

import numpy as np

cdef packed struct Packet:
    int64_t time_ns
    uint8_t source[16]
    uint8_t destination[16]
    uint16_t source_port
    uint16_t destination_port
    uint32_t sequence
    uint32_t acknowledgement
    uint32_t payload_bytes
    uint32_t frame_bytes
    uint8_t protocol
    uint8_t tcp_flags
    uint8_t ip_version
    uint8_t packet_type

# What one flow is reduced to. Ends are kept in byte order of (address, port), so that both directions meet; "side" is
# 0 for the initiator and 1 for the responder everywhere.
cdef struct Flow:
    uint8_t low[16]
    uint8_t high[16]
    uint16_t low_port
    uint16_t high_port
    uint8_t protocol
    uint8_t used
    uint8_t initiator_is_high
    uint8_t initiator_known
    int64_t netns
    int32_t chain
    int32_t older
    int32_t newer
    uint8_t queue
    uint8_t fins
    uint8_t spoke
    uint8_t waiting
    int64_t last_ns
    int64_t queued_ns
    uint32_t expected[2]
    uint8_t expected_known[2]
    uint8_t holes[2]
    uint8_t strange_known[2]
    uint8_t watched[2]
    int64_t talk_ns
    int64_t question_ns
    uint32_t question_bytes
    uint8_t asker
    uint8_t large_side
    uint8_t quick_waiting[2]
    uint64_t payload_bytes[2]
    uint64_t packets
    uint32_t first[2]
    uint32_t answered
    int64_t small_ns[2]
    uint16_t small[2]
    uint16_t grid[2]
    uint16_t quick[2]
    uint32_t dug[2]
    uint32_t hole_start[2][2]
    uint32_t hole_end[2][2]
    uint32_t strange[2]
    uint32_t watch_from[2]
    uint32_t syn_sequence
    int64_t syn_ns
    int64_t syn_answer_ns
    int64_t rtt_ns
    int64_t start_ns
    uint64_t serial

cdef enum:
    FIN = 1
    SYN = 2
    RST = 4
    ACK = 16
    TCP = 6

cdef enum:
    OPENED = 0
    EXCHANGE = 1
    CLOSED = 2
    SEGMENT = 3
    RHYTHM = 4

cdef enum:
    QUEUE_CLOSED = 0
    QUEUE_BRIEF = 1
    QUEUE_LONG = 2

cdef enum:
    REASON_CLOSED = 0
    REASON_IDLE = 1
    REASON_EVICTED = 2
    REASON_END = 3

# The constants are explained in gpuguard/core/flows.py, which states them for the reference too.
cdef int64_t SILENCE_NS = 80_000_000
cdef int64_t ANSWER_NS = 1_000_000_000
cdef int64_t QUEUE_NS = 1_000_000_000
cdef int64_t QUICK_NS = 5_000_000
cdef int64_t GRID_LOW_NS = 16_500_000
cdef int64_t GRID_HIGH_NS = 23_500_000
cdef uint32_t SMALL_BYTES = 512
cdef uint32_t RHYTHM_BYTES = 256
cdef uint32_t RHYTHM_RECORDS = 64
cdef uint32_t LARGE_BYTES = 1024
cdef uint32_t LARGE_STEP_LOG2 = 16
cdef int32_t HOLE_BYTES_MAX = 1 << 24
cdef int64_t[3] TIMEOUT_NS
TIMEOUT_NS[0] = 10_000_000_000
TIMEOUT_NS[1] = 180_000_000_000
TIMEOUT_NS[2] = 86_400_000_000_000


cdef inline uint64_t mix(uint64_t value) noexcept nogil:
    value ^= value >> 32
    value *= <uint64_t>0xd6e8feb86659fd93
    value ^= value >> 32
    value *= <uint64_t>0xd6e8feb86659fd93
    value ^= value >> 32
    return value


cdef class Table:
    """See `gpuguard.core.flows`, which turns what this tells into observations."""

    cdef Flow *flows
    cdef int32_t *heads
    cdef int32_t[3] oldest
    cdef int32_t[3] newest
    cdef int32_t free_slot
    cdef int32_t size_max
    cdef uint64_t mask
    cdef uint64_t seed
    cdef uint64_t serials
    cdef readonly uint64_t evicted
    cdef readonly int32_t size
    cdef list told

    def __cinit__(self, int size_max, uint64_t seed=0):
        cdef int32_t i
        cdef uint64_t buckets = 16
        if size_max < 1 or size_max > 1 << 24:
            raise ValueError(f"size_max must lie in 1..{1 << 24}, not {size_max}")
        while buckets < <uint64_t>size_max * 2:
            buckets *= 2
        self.flows = <Flow *>calloc(size_max, sizeof(Flow))
        self.heads = <int32_t *>calloc(buckets, sizeof(int32_t))
        if self.flows == NULL or self.heads == NULL:
            raise MemoryError
        # A slot number is stored plus one, so that fresh zeroed memory reads as "none" and is not touched before use.
        for i in range(3):
            self.oldest[i] = self.newest[i] = -1
        self.free_slot = -1
        self.size_max = size_max
        self.mask = buckets - 1
        self.seed = seed
        self.told = []

    def __dealloc__(self):
        free(self.flows)
        free(self.heads)

    # -- what flows.py calls ------------------------------------------------------------------------------------------

    def run(self, rows, Py_ssize_t start, Py_ssize_t stop, int64_t netns):
        """Take rows[start:stop] in and return what they tell, in order."""
        cdef const uint8_t[::1] view = self._view(rows)
        cdef Py_ssize_t i
        if start < 0 or stop > rows.shape[0]:
            raise IndexError("rows out of range")
        if stop > start:
            for i in range(start, stop):
                self.take(<const Packet *>&view[i * sizeof(Packet)], netns)
        return self.tell()

    def touch(self, rows, Py_ssize_t row, int64_t netns):
        """Return (slot, side) of the flow that rows[row] belongs to, opening it if need be."""
        cdef const uint8_t[::1] view = self._view(rows)
        if row < 0 or row >= rows.shape[0]:
            raise IndexError("row out of range")
        cdef const Packet *packet = <const Packet *>&view[row * sizeof(Packet)]
        cdef bint from_high
        cdef int32_t slot = self.find(packet, netns, &from_high)
        if slot < 0 or self.reused(&self.flows[slot], packet):
            slot = self.open(slot, packet, netns, from_high)
        return slot, self.side(&self.flows[slot], from_high)

    def tell(self):
        """Return what was told since the last call."""
        told, self.told = self.told, []
        return told

    def watch(self, int32_t slot, int side, uint32_t from_sequence):
        """From this sequence number on, tell of every small segment of this side."""
        if slot < 0 or slot >= self.size_max or side not in (0, 1) or not self.flows[slot].used:
            raise IndexError("no such flow")
        self.flows[slot].watched[side] = 1
        self.flows[slot].watch_from[side] = from_sequence
        self.flows[slot].large_side = 2

    def tick(self, int64_t time_ns):
        """Close what has been idle for too long at this time."""
        cdef int32_t slot
        cdef int queue
        cdef Flow *flow
        for queue in range(3):
            while self.oldest[queue] >= 0:
                slot = self.oldest[queue]
                flow = &self.flows[slot]
                if flow.queued_ns + TIMEOUT_NS[queue] > time_ns:
                    break
                if flow.last_ns + TIMEOUT_NS[queue] > time_ns:
                    self.enqueue(slot, queue, flow.last_ns)
                    continue
                self.drop(slot, time_ns, REASON_IDLE)
        return self.tell()

    def close(self, int64_t time_ns):
        """Close everything, in the order it was opened."""
        cdef int32_t slot
        order = []
        for slot in range(self.size_max):
            if self.flows[slot].used:
                order.append((self.flows[slot].serial, slot))
        for _, slot in sorted(order):
            self.drop(slot, time_ns, REASON_END)
        return self.tell()

    # -- the table ----------------------------------------------------------------------------------------------------

    cdef const uint8_t[::1] _view(self, rows):
        if rows.dtype.itemsize != sizeof(Packet) or not rows.flags.c_contiguous or rows.ndim != 1:
            raise ValueError("rows must be a contiguous array of records.PACKET")
        return rows.view(np.uint8).reshape(-1)

    cdef uint64_t bucket(self, const uint8_t *low, const uint8_t *high, uint32_t ports, uint8_t protocol,
                         int64_t netns) noexcept:
        cdef uint64_t words[4]
        memcpy(words, low, 16)
        memcpy(&words[2], high, 16)
        cdef uint64_t value = mix(self.seed ^ (<uint64_t>ports | <uint64_t>protocol << 32) ^ <uint64_t>netns << 40)
        value = mix(value ^ words[0])
        value = mix(value ^ words[1])
        value = mix(value ^ words[2])
        return mix(value ^ words[3]) & self.mask

    cdef int32_t find(self, const Packet *packet, int64_t netns, bint *from_high) noexcept:
        cdef uint16_t near = packet.source_port
        cdef uint16_t far = packet.destination_port
        cdef int order = memcmp(packet.source, packet.destination, 16)
        cdef const uint8_t *low = packet.source
        cdef const uint8_t *high = packet.destination
        cdef uint16_t swap
        if packet.protocol == 1 or packet.protocol == 58:
            # ICMP: both directions of an echo carry the same identifier, RFC 792.
            near = far = packet.destination_port
        from_high[0] = order > 0 or (order == 0 and near > far)
        if from_high[0]:
            low, high = high, low
            swap = near
            near = far
            far = swap
        cdef int32_t slot = self.heads[self.bucket(low, high, <uint32_t>near << 16 | far, packet.protocol, netns)] - 1
        cdef Flow *flow
        while slot >= 0:
            flow = &self.flows[slot]
            if (flow.low_port == near and flow.high_port == far and flow.protocol == packet.protocol
                    and flow.netns == netns and memcmp(flow.low, low, 16) == 0 and memcmp(flow.high, high, 16) == 0):
                return slot
            slot = flow.chain - 1
        return -1

    cdef inline int side(self, Flow *flow, bint from_high) noexcept:
        return 0 if from_high == flow.initiator_is_high else 1

    cdef bint reused(self, Flow *flow, const Packet *packet) noexcept:
        """A new SYN on the same ends: RFC 9293 section 3.6.1 lets a port be used again after the close."""
        if packet.protocol != TCP or packet.tcp_flags & (SYN | ACK | RST) != SYN:
            return False
        if flow.queue == QUEUE_CLOSED:
            return True
        return flow.spoke != 0 and packet.sequence != flow.syn_sequence

    cdef int32_t open(self, int32_t before, const Packet *packet, int64_t netns, bint from_high):
        cdef int32_t slot
        cdef Flow *flow
        cdef bint icmp = packet.protocol == 1 or packet.protocol == 58
        cdef uint8_t icmp_type = packet.source_port >> 8
        cdef bint backwards = packet.protocol == TCP and packet.tcp_flags & (SYN | ACK) == (SYN | ACK)
        if icmp:
            backwards = icmp_type == 0 if packet.protocol == 1 else icmp_type == 129
        if before >= 0:
            self.drop(before, packet.time_ns, REASON_CLOSED)
        if self.size >= self.size_max:
            self.evicted += 1
            slot = self.oldest[QUEUE_CLOSED]
            if slot < 0:
                slot = self.oldest[QUEUE_BRIEF]
            if slot < 0:
                slot = self.oldest[QUEUE_LONG]
            self.drop(slot, packet.time_ns, REASON_EVICTED)
        if self.free_slot >= 0:
            slot = self.free_slot
            self.free_slot = self.flows[slot].chain
        else:
            slot = self.size
        self.size += 1
        flow = &self.flows[slot]
        memset(flow, 0, sizeof(Flow))
        flow.used = 1
        flow.protocol = packet.protocol
        flow.netns = netns
        if from_high:
            memcpy(flow.high, packet.source, 16)
            memcpy(flow.low, packet.destination, 16)
        else:
            memcpy(flow.low, packet.source, 16)
            memcpy(flow.high, packet.destination, 16)
        flow.low_port = packet.destination_port if from_high or icmp else packet.source_port
        flow.high_port = packet.source_port if from_high and not icmp else packet.destination_port
        flow.initiator_is_high = from_high != backwards
        flow.initiator_known = ((packet.protocol == TCP and packet.tcp_flags & SYN != 0)
                                or (icmp and (backwards or icmp_type == (8 if packet.protocol == 1 else 128))))
        flow.start_ns = flow.last_ns = packet.time_ns
        flow.syn_ns = flow.syn_answer_ns = flow.rtt_ns = flow.talk_ns = -1
        flow.small_ns[0] = flow.small_ns[1] = -1
        flow.large_side = 2
        flow.serial = self.serials
        self.serials += 1
        cdef uint64_t place = self.bucket(flow.low, flow.high, <uint32_t>flow.low_port << 16 | flow.high_port,
                                          flow.protocol, netns)
        flow.chain = self.heads[place]
        self.heads[place] = slot + 1
        flow.queue = 255
        self.enqueue(slot, QUEUE_BRIEF, packet.time_ns)
        low = (<bytes>(<char *>flow.low)[:16], flow.low_port)
        high = (<bytes>(<char *>flow.high)[:16], flow.high_port)
        ends = high + low if flow.initiator_is_high else low + high
        self.told.append((OPENED, packet.time_ns, slot, netns, packet.protocol, *ends, bool(flow.initiator_known)))
        return slot

    cdef void enqueue(self, int32_t slot, int queue, int64_t time_ns) noexcept:
        self.dequeue(slot)
        cdef Flow *flow = &self.flows[slot]
        flow.queue = queue
        flow.queued_ns = time_ns
        flow.newer = -1
        flow.older = self.newest[queue]
        if flow.older >= 0:
            self.flows[flow.older].newer = slot
        else:
            self.oldest[queue] = slot
        self.newest[queue] = slot

    cdef void dequeue(self, int32_t slot) noexcept:
        cdef Flow *flow = &self.flows[slot]
        if flow.queue == 255:
            return
        if flow.newer >= 0:
            self.flows[flow.newer].older = flow.older
        else:
            self.newest[flow.queue] = flow.older
        if flow.older >= 0:
            self.flows[flow.older].newer = flow.newer
        else:
            self.oldest[flow.queue] = flow.newer
        flow.queue = 255

    cdef drop(self, int32_t slot, int64_t time_ns, int reason):
        """Forget a flow; it is told of as closed unless it was before."""
        cdef Flow *flow = &self.flows[slot]
        if flow.queue != QUEUE_CLOSED:
            self.tell_closed(slot, time_ns, reason)
        self.dequeue(slot)
        cdef uint64_t place = self.bucket(flow.low, flow.high, <uint32_t>flow.low_port << 16 | flow.high_port,
                                          flow.protocol, flow.netns)
        cdef int32_t *link = &self.heads[place]
        while link[0] != slot + 1:
            link = &self.flows[link[0] - 1].chain
        link[0] = flow.chain
        flow.used = 0
        flow.chain = self.free_slot
        self.free_slot = slot
        self.size -= 1

    cdef tell_closed(self, int32_t slot, int64_t time_ns, int reason):
        cdef Flow *flow = &self.flows[slot]
        self.told.append((CLOSED, time_ns, slot, reason, flow.packets, flow.payload_bytes[0], flow.payload_bytes[1],
                          flow.first[0], flow.first[1], flow.answered))

    # -- one packet ---------------------------------------------------------------------------------------------------

    cdef int take(self, const Packet *packet, int64_t netns) except -1:
        cdef bint from_high
        cdef int32_t slot = self.find(packet, netns, &from_high)
        if slot < 0 or self.reused(&self.flows[slot], packet):
            slot = self.open(slot, packet, netns, from_high)
        cdef Flow *flow = &self.flows[slot]
        cdef int side = self.side(flow, from_high)
        cdef uint32_t fresh = packet.payload_bytes
        cdef uint32_t start = packet.sequence
        flow.packets += 1
        if packet.time_ns > flow.last_ns:
            flow.last_ns = packet.time_ns
        if flow.queue == QUEUE_CLOSED:
            return 0
        if packet.protocol == TCP:
            self.handshake(flow, packet, side)
            fresh = self.new_bytes(flow, side, packet, &start)
        if fresh:
            flow.spoke |= 1 << side
            flow.payload_bytes[side] += fresh
            self.talk(slot, side, fresh, packet.time_ns)
            if flow.watched[side]:
                self.segment(slot, side, start, fresh, packet.time_ns)
        if flow.queue == QUEUE_BRIEF and flow.spoke == 3 and packet.protocol == TCP:
            self.enqueue(slot, QUEUE_LONG, packet.time_ns)
        elif packet.time_ns - flow.queued_ns >= QUEUE_NS:
            self.enqueue(slot, flow.queue, packet.time_ns)
        if packet.protocol == TCP and packet.tcp_flags & (FIN | RST):
            flow.fins |= 3 if packet.tcp_flags & RST else 1 << side
            if flow.fins == 3:
                self.tell_closed(slot, packet.time_ns, REASON_CLOSED)
                self.enqueue(slot, QUEUE_CLOSED, packet.time_ns)
        return 0

    cdef void handshake(self, Flow *flow, const Packet *packet, int side) noexcept:
        """RTT is from the SYN to the ACK of its answer: a whole one, wherever on the path it is seen from."""
        cdef uint8_t flags = packet.tcp_flags & (SYN | ACK | RST)
        if flags == SYN and side == 0:
            flow.syn_ns = packet.time_ns
            flow.syn_sequence = packet.sequence
        elif flags == (SYN | ACK) and side == 1:
            flow.syn_answer_ns = packet.time_ns
        elif flags == ACK and side == 0 and flow.rtt_ns < 0 and flow.syn_ns >= 0 and flow.syn_answer_ns >= 0:
            flow.rtt_ns = packet.time_ns - flow.syn_ns if packet.time_ns > flow.syn_ns else 0

    cdef uint32_t new_bytes(self, Flow *flow, int side, const Packet *packet, uint32_t *start) noexcept:
        """Return how many of the segment's bytes were not seen before, and from which sequence number on."""
        cdef uint32_t sequence = packet.sequence
        cdef uint32_t size = packet.payload_bytes
        cdef uint32_t end
        cdef int32_t ahead
        if packet.tcp_flags & RST:
            return 0
        if packet.tcp_flags & SYN:
            # A SYN takes one number; data in it (TCP Fast Open, RFC 7413) follows.
            sequence += 1
            if not flow.expected_known[side]:
                flow.expected[side] = sequence
                flow.expected_known[side] = 1
        if size == 0:
            return 0
        if not flow.expected_known[side]:
            flow.expected[side] = sequence
            flow.expected_known[side] = 1
        end = sequence + size
        ahead = <int32_t>(sequence - flow.expected[side])
        if ahead > HOLE_BYTES_MAX or ahead < -HOLE_BYTES_MAX:
            # Farther than any window reaches by loss alone: believed only when the next segment carries on from it.
            if not flow.strange_known[side] or flow.strange[side] != sequence:
                flow.strange_known[side] = 1
                flow.strange[side] = end
                return 0
            flow.holes[side] = 0
            ahead = 0
            flow.expected[side] = sequence
        flow.strange_known[side] = 0
        start[0] = sequence
        if ahead < 0:
            if <int32_t>(end - flow.expected[side]) > 0:
                start[0] = flow.expected[side]
                size = end - flow.expected[side]
                flow.expected[side] = end
                return size
            return self.fill(flow, side, sequence, end, start)
        if ahead > 0:
            self.dig(flow, side, flow.expected[side], sequence)
        flow.expected[side] = end
        return size

    cdef void dig(self, Flow *flow, int side, uint32_t start, uint32_t end) noexcept:
        """Remember a hole; of more than two the oldest is given up."""
        if flow.holes[side] == 2:
            flow.hole_start[side][0] = flow.hole_start[side][1]
            flow.hole_end[side][0] = flow.hole_end[side][1]
            flow.holes[side] = 1
        flow.hole_start[side][flow.holes[side]] = start
        flow.hole_end[side][flow.holes[side]] = end
        flow.holes[side] += 1
        flow.dug[side] += 1

    cdef uint32_t fill(self, Flow *flow, int side, uint32_t sequence, uint32_t end, uint32_t *start) noexcept:
        """Take what a late segment brings to the first hole that it touches; what lies before it there is given up."""
        cdef int i
        cdef uint32_t first, last
        for i in range(flow.holes[side]):
            first = flow.hole_start[side][i]
            last = flow.hole_end[side][i]
            if <int32_t>(end - first) <= 0 or <int32_t>(last - sequence) <= 0:
                continue
            if <int32_t>(sequence - first) > 0:
                first = sequence
            if <int32_t>(last - end) > 0:
                flow.hole_start[side][i] = end
                last = end
            else:
                if i == 0:
                    flow.hole_start[side][0] = flow.hole_start[side][1]
                    flow.hole_end[side][0] = flow.hole_end[side][1]
                flow.holes[side] -= 1
            start[0] = first
            return last - first
        return 0

    cdef int talk(self, int32_t slot, int side, uint32_t size, int64_t time_ns) except -1:
        """Turn taking: who breaks a silence, and how the other side answers."""
        cdef Flow *flow = &self.flows[slot]
        cdef int64_t gap = time_ns - flow.talk_ns
        cdef int64_t silence = SILENCE_NS
        if flow.rtt_ns * 2 > silence:
            silence = flow.rtt_ns * 2
        if flow.waiting and side != flow.asker and time_ns - flow.question_ns <= ANSWER_NS:
            flow.waiting = 0
            if flow.question_bytes <= SMALL_BYTES and size <= SMALL_BYTES:
                flow.answered += 1
                self.told.append((EXCHANGE, time_ns, slot, flow.asker,
                                  time_ns - flow.question_ns if time_ns > flow.question_ns else 0,
                                  flow.question_bytes, size, flow.first[0], flow.first[1], flow.answered,
                                  flow.rtt_ns, flow.payload_bytes[0], flow.payload_bytes[1]))
        elif flow.talk_ns >= 0 and gap > silence:
            flow.first[side] += 1
            flow.waiting = 1
            flow.asker = side
            flow.question_bytes = size
            flow.question_ns = time_ns
        elif flow.waiting and side == flow.asker:
            flow.question_bytes += size
            flow.question_ns = time_ns
            if flow.question_bytes > SMALL_BYTES:
                flow.waiting = 0
        flow.talk_ns = time_ns
        self.rhythm(slot, side, size, time_ns)
        return 0

    cdef int rhythm(self, int32_t slot, int side, uint32_t size, int64_t time_ns) except -1:
        """Small records on a 20 ms grid (OpenSSH's keystroke chaff), and whose are answered at once."""
        cdef Flow *flow = &self.flows[slot]
        cdef int other = 1 - side
        cdef int64_t gap
        if flow.quick_waiting[other]:
            flow.quick_waiting[other] = 0
            if time_ns - flow.small_ns[other] <= QUICK_NS:
                flow.quick[other] += 1
        if size > RHYTHM_BYTES:
            return 0
        if flow.small_ns[side] >= 0:
            gap = time_ns - flow.small_ns[side]
            if GRID_LOW_NS <= gap <= GRID_HIGH_NS:
                flow.grid[side] += 1
        flow.small_ns[side] = time_ns
        flow.quick_waiting[side] = 1
        flow.small[side] += 1
        if flow.small[side] == RHYTHM_RECORDS:
            if flow.grid[side] * 3 > RHYTHM_RECORDS:
                self.told.append((RHYTHM, time_ns, slot, side, flow.small[side], flow.grid[side], flow.quick[side],
                                  flow.packets))
            flow.small[side] = flow.grid[side] = flow.quick[side] = 0
        return 0

    cdef int segment(self, int32_t slot, int side, uint32_t start, uint32_t size, int64_t time_ns) except -1:
        """Tell of the encrypted part of a segment; of a run of large ones only the first and every 64 KiB."""
        cdef Flow *flow = &self.flows[slot]
        cdef int32_t clear = <int32_t>(flow.watch_from[side] - start)
        cdef uint64_t total = flow.payload_bytes[side]
        if clear > 0 and flow.watched[side] == 1:
            if <uint32_t>clear >= size:
                return 0
            size -= clear
        elif clear < -HOLE_BYTES_MAX:
            # Sequence numbers come round again: from here on all is beyond the boundary.
            flow.watched[side] = 2
        if size < LARGE_BYTES:
            flow.large_side = 2
        elif flow.large_side == side and total >> LARGE_STEP_LOG2 == (total - size) >> LARGE_STEP_LOG2:
            return 0
        else:
            flow.large_side = side
        self.told.append((SEGMENT, time_ns, slot, side, size, total, flow.packets, flow.dug[0], flow.dug[1]))
        return 0
