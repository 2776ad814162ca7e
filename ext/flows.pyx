# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The flow table: one pass over packet rows, no Python object but for what is told.

Sizes are of TCP payload as the sender's sequence numbers order it (RFC 9293 section 3.4): what was sent again,
keepalive probes and overlaps add nothing, a hole is filled by whoever arrives later. `tests/reference_flows.py` is the
same table written for the eye; the two must agree on every input.

Most flows are dull: nothing that anybody listens for was seen, be it that both sides spoke or that nobody answered. A
`quiet` table makes no Python object for them, neither when they open nor when they close: their ends are rows of
`observations.CLOSED_FLOW`. A flow is named, told of as opened, right before anything else is told of it.
Where that is asked for, exchanges that the initiator led only count before the responder has led one.
Echoes that bring back what was sent are dull as well. What must be known of them should they not stay so is kept, for
ECHOES_MAX flows, and told when the flow is named; of more flows each exchange is told, as of any that is named.
A watched segment that came before the one ahead of it is held until that came, so that a stream is told of in its order
(see `hand_on`).
The question that was asked last is kept in the hot part, where an answer of its sequence number and size ends it; those
still open when the next is asked, and what answers held beyond their questions, are cold.

Hot and cold are apart. A packet within a conversation touches the two cache lines of `Hot` and one of `heads`, and no
other. Floor, by the bytes: 64 of its row, 128 of the flow, 64 of the bucket's line. When the flows fit no cache, the
last three come from memory: at some 90 ns a miss and one at a time 270 ns a packet, so they are asked for BATCH
packets before they are needed, and what remains is the work on them.
"""

from cpython.buffer cimport PyBUF_ND, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort, realloc
from libc.string cimport memcpy, memset

cdef extern from *:
    """
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    typedef struct {
        uint8_t low[16], high[16];
        uint16_t low_port, high_port;
        uint8_t protocol;
        uint8_t queue;
        uint8_t used;
        uint8_t initiator_is_high;
        uint32_t netns;
        int32_t chain;
        uint8_t marks;
        uint8_t order;
        uint8_t spoke;
        uint8_t quick_waiting;
        uint32_t expected[2];
        uint32_t packets;
        int64_t last_ns;
        int64_t talk_ns;
        int64_t small_ns[2];
        uint64_t payload_bytes[2];
        uint32_t silence_ns;
        uint8_t small[2], grid[2], quick[2];
        uint8_t waiting;
        uint8_t asker;
        uint32_t question_bytes;
    } gpuguard_hot;
    _Static_assert(sizeof(gpuguard_hot) == 128, "two cache lines, the ends within the first");
    static inline uint64_t gpuguard_be64(const uint8_t *p) {
        uint64_t v;
        memcpy(&v, p, 8);
    #if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        v = __builtin_bswap64(v);
    #endif
        return v;
    }
    static inline int gpuguard_same(const uint8_t *a, const uint8_t *b) {
        uint64_t a0, a1, b0, b1;
        memcpy(&a0, a, 8); memcpy(&a1, a + 8, 8); memcpy(&b0, b, 8); memcpy(&b1, b + 8, 8);
        return ((a0 ^ b0) | (a1 ^ b1)) == 0;
    }
    static void *gpuguard_lines(size_t bytes) {
        /* Zeroed pages that are not touched before use; one line more, so that the caller may begin at a line. */
        return calloc(bytes / 64 + 2, 64);
    }
    """
    ctypedef struct Hot "gpuguard_hot":
        uint8_t low[16]
        uint8_t high[16]
        uint16_t low_port
        uint16_t high_port
        uint8_t protocol
        uint8_t queue
        uint8_t used
        uint8_t initiator_is_high
        uint32_t netns
        int32_t chain
        uint8_t marks           # KNOWN.. below
        uint8_t order           # what is known of the sequence numbers: EXPECTED.. below, << side
        uint8_t spoke           # bits 0 and 1: sides that sent payload; 2 and 3: sides that sent a FIN
        uint8_t quick_waiting   # sides whose last small record may yet be answered at once
        uint32_t expected[2]
        uint32_t packets        # the lower half, the upper one is cold
        # -- the second line
        int64_t last_ns
        int64_t talk_ns
        int64_t small_ns[2]
        uint64_t payload_bytes[2]
        uint32_t silence_ns     # the larger of SILENCE_NS and two round trips; SILENCE_LONG: see the cold part
        uint8_t small[2]
        uint8_t grid[2]
        uint8_t quick[2]
        uint8_t waiting         # a question is open
        uint8_t asker
        uint32_t question_bytes
    uint64_t be64 "gpuguard_be64"(const uint8_t *p) noexcept nogil
    bint same "gpuguard_same"(const uint8_t *a, const uint8_t *b) noexcept nogil
    void *lines "gpuguard_lines"(size_t bytes) noexcept nogil

include "mixing.pxi"
include "rows.pxi"

# An attempt to open a connection, to be looked at again.
cdef struct Tried:
    int64_t start_ns
    uint64_t serial
    int32_t slot

# observations.OPENED_FLOW
cdef packed struct Opened:
    int64_t start_ns
    int64_t netns
    uint8_t initiator[16]
    uint16_t initiator_port
    uint8_t responder[16]
    uint16_t responder_port

cdef enum:
    ECHOES_MAX = 2048
    ECHO_SIZES_MAX = 16
    ECHO_TIMES_MAX = 32
    ECHO_EXCESS_BYTES = 256
    ECHO_OPEN_MAX = 16
    ECHO_UNLIKE_MIN = 4
    ECHO_LENGTHS_MIN = 3
    ICMP_STRANGE_MIN = 16
    ICMP_UNASKED_BYTES = 2048
    ICMP_OVERLONG_BYTES = 256
    ICMP_TIMES_BYTES = 12   # what a timestamp holds, the longest of those whose length is laid down
    ICMP_SIZES_MIN = 24
    ICMP_TURNS_MIN = 8
    HELD_MAX = 1024
    HELD_SEGMENTS_MAX = 8
    POOL_MAX = 2048

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

# What one flow is reduced to: `Hot`, and here what only some packets ask for. Ends are kept in byte order of
# (address, port), so that both directions meet; "side" is 0 for the initiator and 1 for the responder everywhere.
cdef struct Cold:
    int64_t question_ns
    uint64_t turn_from      # what the side that speaks had sent before it began to, where `talk` notes it
    uint64_t before         # what the other side had said in a row when the question came; 0: nothing, or unknown
    int64_t syn_ns
    int64_t syn_answer_ns
    int64_t rtt_ns
    int64_t start_ns
    uint64_t serial
    uint32_t packets_high
    uint32_t answered
    uint32_t first[2]
    uint32_t dug[2]
    uint32_t hole_start[2][2]
    uint32_t hole_end[2][2]
    uint32_t strange[2]
    uint32_t watch_from[2]
    uint32_t syn_sequence
    uint8_t holes[2]
    uint8_t watched[2]
    uint8_t large_side
    uint8_t turn            # whose it is, plus one; 0: not noted
    uint8_t carrier
    int32_t echoes          # plus one
    int32_t held            # plus one

# What was exchanged in echoes that are dull so far; a bit for each size from 1 to SMALL_BYTES.
cdef struct Echoes:
    uint64_t questions[8]
    uint64_t answers[8]
    int64_t times_ns[ECHO_TIMES_MAX]
    uint32_t answered
    uint32_t sizes          # of questions, how many
    uint32_t opened
    int64_t open[ECHO_OPEN_MAX][2]  # a ring of sequence numbers, plus one, and sizes; 0: answered
    uint64_t surplus_bytes  # what answers held more than their question did
    uint32_t unlike         # how many held more or less
    uint32_t unlike_told    # how many had when that was told
    uint32_t lengths[ECHO_LENGTHS_MIN]  # of such answers, the first that differ
    uint64_t sizes_seen[8]  # of questions before any answer, a bit for each size modulo 512
    uint32_t sizes_differ   # how many of those bits are set
    uint32_t turns          # how often sizes that had grown shrank, and the other way round
    bint grew

# What of a watched flow came ahead of a hole, by side and in the order of the stream. One more than may be held: the
# one that comes then is put in its place before the hole is given up.
cdef struct Held:
    int64_t times_ns[2][HELD_SEGMENTS_MAX + 1]
    uint32_t starts[2][HELD_SEGMENTS_MAX + 1]
    uint32_t sizes[2][HELD_SEGMENTS_MAX + 1]
    int64_t since_ns[2]     # when the hole was first waited for
    int64_t told_ns         # the time of what was last handed on, of either side
    uint64_t bytes[2]
    uint32_t hole[2]        # where the hole begins
    uint8_t count[2]
    bint waits[2]

# Which rows of an array no flow has, by number, plus one; the one to be taken next is the last.
cdef struct Pool:
    int32_t free[POOL_MAX]
    int32_t count

# The queues by which flows leave, in an array of their own: a neighbour is moved without touching its flow.
cdef struct Link:
    int64_t queued_ns
    int32_t older
    int32_t newer

# A packet's ends in order, and their bucket.
cdef struct Look:
    uint32_t place
    uint16_t low_port
    uint16_t high_port
    bint from_high

cdef enum:
    FIN = 1
    SYN = 2
    RST = 4
    ACK = 16
    TCP = 6
    UDP = 17

cdef enum:
    KNOWN = 1       # who opened it
    NAMED = 2       # told of as opened
    AWAIT_ACK = 4   # SYN and its answer were seen: the next ACK of the initiator gives the round trip
    WATCHED = 8     # segments are told of
    LED = 16        # the responder has led an exchange
    HEARD = 32      # the responder sent anything at all
    MISSED = 64     # told of as unanswered
    HOLDS = 128     # segments are held until a hole before them is filled

cdef enum:
    EXPECTED = 1
    STRANGE = 4

# Of ICMP `order` says what came, beside EXPECTED: the latest echo request was not answered yet.
cdef enum:
    ASKED = 2       # echo requests
    ANSWERED = 4    # echo replies
    MEASURED = 8    # queries and answers whose length is laid down, types 13 to 18
    OTHERS = 16
    KINDS = 30

cdef enum:
    UNLIKE = 0
    UNASKED = 1
    UNHEARD = 2
    OVERLONG = 3

cdef enum:
    OPENED = 0
    EXCHANGE = 1
    CLOSED = 2
    SEGMENT = 3
    RHYTHM = 4
    DULL = 5
    CARRIES = 6
    UNANSWERED = 7
    BEGUN = 8
    ECHOED = 9
    NOT_ECHOES = 10

cdef enum:
    QUEUE_CLOSED = 0
    QUEUE_BRIEF = 1
    QUEUE_LONG = 2
    NO_QUEUE = 255

cdef enum:
    REASON_CLOSED = 0
    REASON_IDLE = 1
    REASON_EVICTED = 2
    REASON_END = 3

cdef enum:
    BATCH = 64
    AHEAD = 8

# The constants are explained in gpuguard/core/flows.py, which states them for the reference too.
cdef enum:
    SILENCE_NS = 80_000_000
    ANSWER_NS = 1_000_000_000
    HELD_NS = 1_000_000_000
    QUEUE_EPOCH_LOG2 = 34
    QUICK_NS = 5_000_000
    GRID_LOW_NS = 16_500_000
    GRID_HIGH_NS = 23_500_000
    SMALL_BYTES = 512
    RHYTHM_BYTES = 256
    RHYTHM_RECORDS = 64
    LARGE_BYTES = 1024
    LARGE_STEP_LOG2 = 16
    HOLE_BYTES_MAX = 1 << 24

cdef int64_t UNANSWERED_NS = 4_000_000_000
cdef uint32_t SILENCE_LONG = 0xFFFFFFFF
cdef int64_t[3] TIMEOUT_NS
TIMEOUT_NS[0] = 10_000_000_000
TIMEOUT_NS[1] = 180_000_000_000
TIMEOUT_NS[2] = 86_400_000_000_000


# A flow, to be put in order of opening.
cdef struct Placed:
    uint64_t serial
    int32_t slot


cdef int by_serial(const void *a, const void *b) noexcept nogil:
    cdef uint64_t one = (<const Placed *>a).serial, other = (<const Placed *>b).serial
    return (one > other) - (one < other)


cdef void *grown(void *rows, size_t *room, size_t used, size_t row_bytes) except NULL:
    """Return an array with room for one more row, moved if need be."""
    cdef void *more
    if rows != NULL and used < room[0]:
        return rows
    more = realloc(rows, (room[0] * 2 + 64) * row_bytes)
    if more == NULL:
        raise MemoryError
    room[0] = room[0] * 2 + 64
    return more


cdef inline bint icmp(uint8_t protocol) noexcept nogil:
    return protocol == 1 or protocol == 58


cdef void fill_pool(Pool *pool, int32_t rows) noexcept nogil:
    """Have so many rows, at most POOL_MAX; the first is taken first."""
    pool.count = 0
    while rows:
        give_row(pool, rows)
        rows -= 1


cdef int32_t take_row(Pool *pool) noexcept nogil:
    """Return the number of a row, plus one; 0 if there is none."""
    if not pool.count:
        return 0
    pool.count -= 1
    return pool.free[pool.count]


cdef void give_row(Pool *pool, int32_t row) noexcept nogil:
    pool.free[pool.count] = row
    pool.count += 1


cdef class Table:
    """See `gpuguard.core.flows`, which turns what this tells into observations."""

    cdef void *memory
    cdef Hot *flows
    cdef Cold *colds
    cdef Link *links
    cdef int32_t *heads
    cdef int32_t[3] oldest
    cdef int32_t[3] newest
    cdef int32_t free_slot
    cdef int32_t size_max
    cdef int32_t peak           # slots that were ever in use; the memory of the others is not touched
    cdef uint64_t mask
    cdef uint64_t seed
    cdef uint64_t serials
    cdef readonly uint64_t evicted
    cdef readonly int32_t size
    cdef bint quiet_flows
    cdef bint quiet_exchanges
    cdef list told
    cdef Tried *tried           # a ring: attempts of the last UNANSWERED_NS, the oldest at tried_first
    cdef uint64_t tried_first
    cdef uint64_t tried_next
    cdef Echoes *echoes
    cdef Pool echoes_free
    cdef Held *held
    cdef Pool held_free
    cdef bint listened          # openings of TCP are told of by the row
    cdef Opened *begun
    cdef size_t begun_used
    cdef size_t begun_room
    cdef Closed *dull
    cdef size_t dull_used
    cdef size_t dull_room
    cdef uint32_t dull_unanswered
    cdef object rows
    cdef const Packet *packets
    cdef Py_ssize_t packets_size

    def __cinit__(self, int size_max, uint64_t seed=0, *, bint quiet_flows=False, bint quiet_exchanges=False):
        cdef int32_t i
        cdef uint64_t buckets = 16
        if size_max < 1 or size_max > 1 << 24:
            raise ValueError(f"size_max must lie in 1..{1 << 24}, not {size_max}")
        while buckets < <uint64_t>size_max * 2:
            buckets *= 2
        self.memory = lines(<size_t>size_max * sizeof(Hot))
        self.flows = <Hot *>((<size_t>self.memory + 63) & ~<size_t>63)
        self.colds = <Cold *>calloc(size_max, sizeof(Cold))
        self.links = <Link *>calloc(size_max, sizeof(Link))
        self.heads = <int32_t *>calloc(buckets, sizeof(int32_t))
        self.tried = <Tried *>calloc(size_max, sizeof(Tried))
        self.echoes = <Echoes *>calloc(ECHOES_MAX, sizeof(Echoes))
        self.held = <Held *>calloc(HELD_MAX, sizeof(Held))
        if (self.memory == NULL or self.colds == NULL or self.links == NULL or self.heads == NULL
                or self.tried == NULL or self.echoes == NULL or self.held == NULL):
            raise MemoryError
        # A slot number is stored plus one, so that fresh zeroed memory reads as "none" and is not touched before use.
        for i in range(3):
            self.oldest[i] = self.newest[i] = -1
        self.free_slot = -1
        fill_pool(&self.echoes_free, ECHOES_MAX)
        fill_pool(&self.held_free, HELD_MAX)
        self.size_max = size_max
        self.mask = buckets - 1
        self.seed = seed
        self.told = []
        self.quiet_flows = quiet_flows
        self.quiet_exchanges = quiet_exchanges

    def __dealloc__(self):
        free(self.memory)
        free(self.colds)
        free(self.links)
        free(self.heads)
        free(self.tried)
        free(self.echoes)
        free(self.held)
        free(self.begun)
        free(self.dull)

    # -- what flows.py calls ------------------------------------------------------------------------------------------

    def run(self, rows, Py_ssize_t start, Py_ssize_t stop, uint32_t netns):
        """Take rows[start:stop] in and return what they tell, in order."""
        self.add(rows, start, stop, netns)
        return self.tell()

    def add(self, rows, Py_ssize_t start, Py_ssize_t stop, uint32_t netns):
        """Take rows[start:stop] in; `tell` returns what they told."""
        self.load(rows)
        if start < 0 or stop > self.packets_size:
            raise IndexError("rows out of range")
        self.take_all(start, stop, netns)

    def touch(self, rows, Py_ssize_t row, uint32_t netns):
        """Return (slot, side, packets) of the flow that rows[row] belongs to, opening and naming it if need be.

        The row itself, which is yet to be taken in, is counted.
        """
        cdef Look look
        cdef int32_t slot = self.slot_of(rows, row, netns, &look)
        self.name(slot)
        cdef uint64_t packets = <uint64_t>self.colds[slot].packets_high << 32 | self.flows[slot].packets
        return slot, self.side(&self.flows[slot], look.from_high), packets + 1

    def packets_of(self, uint32_t netns, uint8_t protocol, const uint8_t[::1] near, uint16_t near_port,
                   const uint8_t[::1] far, uint16_t far_port):
        """Return how many packets were seen of the flow with these ends, None if there is no such flow."""
        cdef Packet packet
        cdef Look look
        cdef int32_t slot
        if near.shape[0] != 16 or far.shape[0] != 16:
            raise ValueError("addresses have 16 bytes")
        memset(&packet, 0, sizeof(Packet))
        packet.protocol = protocol
        memcpy(packet.source, &near[0], 16)
        memcpy(packet.destination, &far[0], 16)
        packet.source_port = near_port
        packet.destination_port = far_port
        self.look(&packet, netns, &look)
        slot = self.find(&packet, netns, &look)
        if slot < 0:
            return None
        return <uint64_t>self.colds[slot].packets_high << 32 | self.flows[slot].packets

    def mark(self, rows, Py_ssize_t row, uint32_t netns, uint8_t carrier):
        """Note what the flow of rows[row] carries; return its slot if it is named, else -1."""
        cdef Look look
        cdef int32_t slot = self.slot_of(rows, row, netns, &look)
        self.colds[slot].carrier = carrier
        return slot if self.flows[slot].marks & NAMED else -1

    def tell(self):
        """Return what was told since the last call."""
        self.flush()
        told, self.told = self.told, []
        if self.begun_used:
            told.insert(0, (BEGUN, <bytes>(<char *>self.begun)[:self.begun_used * sizeof(Opened)]))
            self.begun_used = 0
        return told

    def listen(self):
        """From now on tell by the row when a TCP connection was opened; and now of those that are open."""
        cdef Placed *order = self.in_order()
        cdef int32_t i
        cdef Hot *flow
        self.listened = True
        try:
            for i in range(self.size):
                flow = &self.flows[order[i].slot]
                if flow.queue != QUEUE_CLOSED and flow.protocol == TCP:
                    self.begin(order[i].slot)
        finally:
            free(order)
        return self.tell()

    def watch(self, int32_t slot, int side, uint32_t from_sequence):
        """From this sequence number on, tell of every small segment of this side; of holes before it, no more."""
        cdef Cold *cold
        cdef int i
        if slot < 0 or slot >= self.size_max or side not in (0, 1) or not self.flows[slot].used:
            raise IndexError("no such flow")
        cold = &self.colds[slot]
        if not cold.watched[side]:
            cold.dug[side] = 0
            for i in range(cold.holes[side]):
                cold.dug[side] += <int32_t>(cold.hole_start[side][i] - from_sequence) > 0
        self.flows[slot].marks |= WATCHED
        cold.watched[side] = 1
        cold.watch_from[side] = from_sequence
        cold.large_side = 2

    def tick(self, int64_t time_ns):
        """Close what has been idle for too long at this time."""
        cdef int32_t slot
        cdef int queue
        cdef int64_t last_ns
        self.look_back(time_ns)
        for queue in range(3):
            while self.oldest[queue] >= 0:
                slot = self.oldest[queue]
                if self.links[slot].newer >= 0:
                    self.ask_for(self.links[slot].newer)
                if self.links[slot].queued_ns + TIMEOUT_NS[queue] > time_ns:
                    break
                last_ns = self.flows[slot].last_ns
                if last_ns + TIMEOUT_NS[queue] > time_ns:
                    self.enqueue(slot, queue, last_ns)
                    continue
                self.drop(slot, time_ns, REASON_IDLE)
        return self.tell()

    def close(self, int64_t time_ns):
        """Close everything, in the order it was opened."""
        cdef Placed *order = self.in_order()
        cdef int32_t i, count = self.size
        try:
            for i in range(count):
                if i + 2 * AHEAD < count:
                    self.ask_for(order[i + 2 * AHEAD].slot)
                if i + AHEAD < count:
                    ask(&self.heads[self.place_of(order[i + AHEAD].slot)])
                self.drop(order[i].slot, time_ns, REASON_END)
        finally:
            free(order)
        return self.tell()

    cdef Placed *in_order(self) except NULL:
        """Return all flows in the order they were opened, to be freed by the caller."""
        cdef Placed *order = <Placed *>malloc((<size_t>self.size + 1) * sizeof(Placed))
        cdef int32_t slot, count = 0
        if order == NULL:
            raise MemoryError
        for slot in range(self.peak):
            if self.flows[slot].used:
                order[count].serial = self.colds[slot].serial
                order[count].slot = slot
                count += 1
        qsort(order, count, sizeof(Placed), by_serial)
        return order

    cdef inline void ask_for(self, int32_t slot) noexcept:
        """Fetch a flow that is soon to be dropped."""
        ask(&self.flows[slot])
        ask(&self.flows[slot].last_ns)
        ask(&self.colds[slot])
        ask(<char *>&self.colds[slot] + 64)
        ask(&self.links[slot])

    # -- the table ----------------------------------------------------------------------------------------------------

    cdef load(self, rows):
        """Look at these rows; the array is kept, since the next call is most often about the same one."""
        cdef Py_buffer memory
        if rows is self.rows:
            return
        PyObject_GetBuffer(rows, &memory, PyBUF_ND)
        try:
            if memory.itemsize != sizeof(Packet) or memory.ndim != 1:
                raise ValueError("rows must be a contiguous array of records.PACKET")
            self.packets = <const Packet *>memory.buf
            self.packets_size = memory.shape[0]
        finally:
            PyBuffer_Release(&memory)
        self.rows = rows

    cdef int32_t slot_of(self, rows, Py_ssize_t row, uint32_t netns, Look *look) except -1:
        self.load(rows)
        if row < 0 or row >= self.packets_size:
            raise IndexError("row out of range")
        self.look(&self.packets[row], netns, look)
        cdef int32_t slot = self.find(&self.packets[row], netns, look)
        if slot < 0 or self.reused(slot, &self.packets[row]):
            slot = self.open(slot, &self.packets[row], netns, look)
        return slot

    cdef inline uint32_t bucket(self, const uint8_t *low, const uint8_t *high, uint32_t ports, uint8_t protocol,
                                uint32_t netns) noexcept:
        cdef uint64_t rest = <uint64_t>ports | <uint64_t>protocol << 32 | <uint64_t>netns << 40
        return <uint32_t>(ends_hash(low, high, rest, self.seed) & self.mask)

    cdef inline uint32_t place_of(self, int32_t slot) noexcept:
        cdef Hot *flow = &self.flows[slot]
        return self.bucket(flow.low, flow.high, <uint32_t>flow.low_port << 16 | flow.high_port, flow.protocol,
                           flow.netns)

    cdef inline void look(self, const Packet *packet, uint32_t netns, Look *look) noexcept:
        cdef uint16_t near = packet.source_port
        cdef uint16_t far = packet.destination_port
        cdef uint64_t a = be64(packet.source)
        cdef uint64_t b = be64(packet.destination)
        if a == b:
            a = be64(&packet.source[8])
            b = be64(&packet.destination[8])
        if icmp(packet.protocol):
            # Both directions of an echo carry the same identifier, RFC 792.
            near = far
        look.from_high = a > b or (a == b and near > far)
        if look.from_high:
            look.low_port = far
            look.high_port = near
            look.place = self.bucket(packet.destination, packet.source, <uint32_t>far << 16 | near, packet.protocol,
                                     netns)
        else:
            look.low_port = near
            look.high_port = far
            look.place = self.bucket(packet.source, packet.destination, <uint32_t>near << 16 | far, packet.protocol,
                                     netns)

    cdef inline int32_t find(self, const Packet *packet, uint32_t netns, const Look *look) noexcept:
        cdef const uint8_t *low = packet.source
        cdef const uint8_t *high = packet.destination
        cdef int32_t slot = self.heads[look.place] - 1
        cdef Hot *flow
        if look.from_high:
            low, high = high, low
        while slot >= 0:
            flow = &self.flows[slot]
            if (flow.low_port == look.low_port and flow.high_port == look.high_port
                    and flow.protocol == packet.protocol and flow.netns == netns and same(flow.low, low)
                    and same(flow.high, high)):
                return slot
            slot = flow.chain - 1
        return -1

    cdef inline int side(self, Hot *flow, bint from_high) noexcept:
        return from_high ^ flow.initiator_is_high

    cdef inline bint reused(self, int32_t slot, const Packet *packet) noexcept:
        """A new SYN on the same ends: RFC 9293 section 3.6.1 lets a port be used again after the close."""
        if packet.protocol != TCP or packet.tcp_flags & (SYN | ACK | RST) != SYN:
            return False
        if self.flows[slot].queue == QUEUE_CLOSED:
            return True
        if self.flows[slot].spoke & 3:
            return packet.sequence != self.colds[slot].syn_sequence
        # What came before was no opening: a segment that belongs to no connection says nothing of who opens one.
        return self.flows[slot].packets != 0 and self.colds[slot].syn_ns < 0 and self.colds[slot].syn_answer_ns < 0

    cdef int32_t open(self, int32_t before, const Packet *packet, uint32_t netns, const Look *look) except -1:
        cdef int32_t slot
        cdef bint echo = icmp(packet.protocol)
        cdef uint8_t icmp_type = packet.source_port >> 8
        cdef bint backwards = packet.protocol == TCP and packet.tcp_flags & (SYN | ACK) == (SYN | ACK)
        # All segments but the first carry ACK or RST (RFC 9293 section 3.10.7.4); without, they ask who is there.
        cdef bint probe = packet.protocol == TCP and not (packet.tcp_flags & (SYN | ACK | RST) or packet.payload_bytes)
        cdef bint known = probe or (packet.protocol == TCP and packet.tcp_flags & SYN != 0)
        if echo:
            backwards = icmp_type == 0 if packet.protocol == 1 else icmp_type == 129
            known = backwards or icmp_type == (8 if packet.protocol == 1 else 128)
        if before >= 0:
            self.drop(before, packet.time_ns, REASON_CLOSED)
        slot = self.room(packet.time_ns)
        cdef Hot *flow = &self.flows[slot]
        cdef Cold *cold = &self.colds[slot]
        memset(flow, 0, sizeof(Hot))
        memset(cold, 0, sizeof(Cold))
        flow.used = 1
        flow.protocol = packet.protocol
        flow.netns = netns
        memcpy(&flow.high[0] if look.from_high else &flow.low[0], packet.source, 16)
        memcpy(&flow.low[0] if look.from_high else &flow.high[0], packet.destination, 16)
        flow.low_port = look.low_port
        flow.high_port = look.high_port
        flow.initiator_is_high = look.from_high != backwards
        flow.marks = KNOWN if known else 0
        flow.silence_ns = <uint32_t>SILENCE_NS
        flow.last_ns = cold.start_ns = packet.time_ns
        flow.talk_ns = flow.small_ns[0] = flow.small_ns[1] = -1
        cold.syn_ns = cold.syn_answer_ns = cold.rtt_ns = -1
        cold.large_side = 2
        cold.serial = self.serials
        self.serials += 1
        flow.chain = self.heads[look.place]
        self.heads[look.place] = slot + 1
        flow.queue = NO_QUEUE
        self.enqueue(slot, QUEUE_BRIEF, packet.time_ns)
        if not self.quiet_flows:
            self.name(slot)
        if self.listened and packet.protocol == TCP:
            self.begin(slot)
        if packet.protocol == TCP:
            if probe or packet.tcp_flags & (SYN | ACK | RST) == SYN:
                self.remember(slot, packet.time_ns)
        elif packet.protocol == UDP or known and not backwards:
            self.remember(slot, packet.time_ns)
        return slot

    cdef void remember(self, int32_t slot, int64_t time_ns) noexcept:
        """Of more attempts than there is room for flows, the oldest are not looked at again."""
        cdef Tried *one = &self.tried[self.tried_next % <uint64_t>self.size_max]
        one.start_ns = time_ns
        one.serial = self.colds[slot].serial
        one.slot = slot
        self.tried_next += 1
        if self.tried_next - self.tried_first > <uint64_t>self.size_max:
            self.tried_first += 1

    cdef int begin(self, int32_t slot) except -1:
        cdef Hot *flow = &self.flows[slot]
        self.begun = <Opened *>grown(self.begun, &self.begun_room, self.begun_used, sizeof(Opened))
        cdef Opened *row = &self.begun[self.begun_used]
        self.begun_used += 1
        row.start_ns = self.colds[slot].start_ns
        row.netns = flow.netns
        memcpy(row.initiator, &flow.high[0] if flow.initiator_is_high else &flow.low[0], 16)
        memcpy(row.responder, &flow.low[0] if flow.initiator_is_high else &flow.high[0], 16)
        row.initiator_port = flow.high_port if flow.initiator_is_high else flow.low_port
        row.responder_port = flow.low_port if flow.initiator_is_high else flow.high_port
        return 0

    cdef int32_t room(self, int64_t time_ns) except -1:
        """Return a free slot, the longest idle flow's if there is no other."""
        cdef int32_t slot
        if self.size >= self.size_max:
            self.evicted += 1
            slot = self.oldest[QUEUE_CLOSED]
            if slot < 0:
                slot = self.oldest[QUEUE_BRIEF]
            if slot < 0:
                slot = self.oldest[QUEUE_LONG]
            self.drop(slot, time_ns, REASON_EVICTED)
        if self.free_slot >= 0:
            slot = self.free_slot
            self.free_slot = self.flows[slot].chain
            if self.free_slot >= 0:
                self.ask_for(self.free_slot)
        else:
            slot = self.size
        self.size += 1
        if self.size > self.peak:
            self.peak = self.size
        return slot

    cdef int name(self, int32_t slot) except -1:
        """Tell of the flow as opened, unless that was done."""
        cdef Hot *flow = &self.flows[slot]
        if flow.marks & NAMED:
            return 0
        flow.marks |= NAMED
        low = (<bytes>(<char *>flow.low)[:16], flow.low_port)
        high = (<bytes>(<char *>flow.high)[:16], flow.high_port)
        ends = high + low if flow.initiator_is_high else low + high
        self.say((OPENED, self.colds[slot].start_ns, slot, flow.netns, flow.protocol, *ends, flow.marks & KNOWN != 0,
                  self.colds[slot].carrier))
        if self.colds[slot].echoes and self.echoes[self.colds[slot].echoes - 1].answered:
            self.say(self.echoed(slot))
        return 0

    # -- echoes that are dull so far ----------------------------------------------------------------------------------

    cdef bint excess(self, int32_t slot) noexcept:
        """Whether an ICMP flow brought back more than echoes may: whoever judges them begins there."""
        cdef Hot *flow = &self.flows[slot]
        return (flow.payload_bytes[1] >= flow.payload_bytes[0]
                and flow.payload_bytes[1] - flow.payload_bytes[0] >= ECHO_EXCESS_BYTES)

    cdef bint keep(self, int32_t slot, uint32_t size, int64_t time_ns) noexcept:
        """Note an exchange of dull echoes instead of telling of it; return whether that was done."""
        cdef Hot *flow = &self.flows[slot]
        cdef Echoes *echoes
        cdef uint32_t asked = flow.question_bytes - 1, answer = size - 1
        if not self.quiet_flows or not icmp(flow.protocol) or flow.asker or flow.marks & (NAMED | MISSED):
            return False
        if self.excess(slot):
            return False
        echoes = self.echoes_of(slot)
        if echoes == NULL:
            return False
        if echoes.sizes < ECHO_SIZES_MAX:
            echoes.sizes += not echoes.questions[asked >> 6] >> (asked & 63) & 1
            echoes.questions[asked >> 6] |= <uint64_t>1 << (asked & 63)
            echoes.answers[answer >> 6] |= <uint64_t>1 << (answer & 63)
        echoes.times_ns[echoes.answered % ECHO_TIMES_MAX] = time_ns
        echoes.answered += 1
        return True

    cdef Echoes *echoes_of(self, int32_t slot) noexcept:
        """Return where a flow's echoes are kept, NULL where ECHOES_MAX others are."""
        cdef Cold *cold = &self.colds[slot]
        if not cold.echoes:
            cold.echoes = take_row(&self.echoes_free)
            if not cold.echoes:
                return NULL
            memset(&self.echoes[cold.echoes - 1], 0, sizeof(Echoes))
        return &self.echoes[cold.echoes - 1]

    cdef tuple echoed(self, int32_t slot):
        """Return what was kept of exchanges of echoes, and forget it."""
        cdef Echoes *echoes = &self.echoes[self.colds[slot].echoes - 1]
        cdef uint32_t i, first = 0
        if echoes.answered > ECHO_TIMES_MAX:
            first = echoes.answered - ECHO_TIMES_MAX
        questions = tuple([i + 1 for i in range(SMALL_BYTES) if echoes.questions[i >> 6] >> (i & 63) & 1])
        answers = tuple([i + 1 for i in range(SMALL_BYTES) if echoes.answers[i >> 6] >> (i & 63) & 1])
        times_ns = tuple([echoes.times_ns[i % ECHO_TIMES_MAX] for i in range(first, echoes.answered)])
        echoes.answered = 0
        return ECHOED, slot, questions, answers, times_ns

    cdef void forget_echoes(self, int32_t slot) noexcept:
        cdef Cold *cold = &self.colds[slot]
        if cold.echoes:
            give_row(&self.echoes_free, cold.echoes)
            cold.echoes = 0

    # -- each echo and its own question -------------------------------------------------------------------------------

    cdef inline int pair(self, int32_t slot, int side, const Packet *packet, uint32_t size) except -1:
        cdef Hot *flow = &self.flows[slot]
        cdef uint8_t kind = packet.source_port >> 8
        if kind == (8 if packet.protocol == 1 else 128):
            flow.order |= ASKED
            if side == 0:
                self.ask_echo(slot, packet.sequence & 0xFFFF, size)
        elif kind == (0 if packet.protocol == 1 else 129):
            flow.order |= ANSWERED
            if side == 1:
                self.answer_echo(slot, packet, size)
        else:
            flow.order |= MEASURED if packet.protocol == 1 and 13 <= kind <= 18 else OTHERS
        return 0

    cdef inline void ask_echo(self, int32_t slot, uint32_t sequence, uint32_t size) noexcept:
        """Note a question."""
        cdef Hot *flow = &self.flows[slot]
        cdef Echoes *echoes
        if flow.order & EXPECTED and (flow.expected[0] != sequence or flow.expected[1] != size):
            if flow.marks & HEARD:
                echoes = self.echoes_of(slot)
                if echoes != NULL:
                    echoes.open[echoes.opened % ECHO_OPEN_MAX][0] = flow.expected[0] + 1
                    echoes.open[echoes.opened % ECHO_OPEN_MAX][1] = flow.expected[1]
                    echoes.opened += 1
            elif flow.expected[1] != size:
                self.vary(slot, flow.expected[1], size)
        flow.order |= EXPECTED
        flow.expected[0] = sequence
        flow.expected[1] = size

    cdef void vary(self, int32_t slot, uint32_t before, uint32_t size) noexcept:
        """Note that a question has another size than the one before it, neither of them answered."""
        cdef Echoes *echoes = self.echoes_of(slot)
        cdef bint grows = size > before
        if echoes == NULL:
            return
        echoes.turns += grows != echoes.grew
        echoes.grew = grows
        echoes.sizes_differ += not echoes.sizes_seen[size >> 6 & 7] >> (size & 63) & 1
        echoes.sizes_seen[size >> 6 & 7] |= <uint64_t>1 << (size & 63)

    cdef int answer_echo(self, int32_t slot, const Packet *packet, uint32_t size) except -1:
        """Find the questions that this may be the answer to, and compare. What differs from one alone is no echo."""
        cdef Hot *flow = &self.flows[slot]
        cdef uint32_t sequence = packet.sequence & 0xFFFF
        cdef int64_t asked = -1
        cdef int i, questions = 0
        if flow.order & EXPECTED and flow.expected[0] == sequence:
            flow.order &= ~EXPECTED
            if flow.expected[1] == size:
                return 0
            asked = flow.expected[1]
            questions = 1
        elif not self.colds[slot].echoes:
            return 0
        cdef Echoes *echoes = self.echoes_of(slot)
        if echoes == NULL:
            return 0
        for i in range(ECHO_OPEN_MAX):
            if echoes.open[i][0] == sequence + 1:
                echoes.open[i][0] = 0
                asked = max(asked, echoes.open[i][1])
                questions += 1
        if not questions or size == asked or (size < asked and questions > 1):
            return 0
        echoes.unlike += 1
        if size > asked:
            echoes.surplus_bytes += size - asked
        return self.tell_unlike(slot, echoes, size, packet.time_ns)

    cdef int tell_unlike(self, int32_t slot, Echoes *echoes, uint32_t size, int64_t time_ns) except -1:
        cdef int i
        for i in range(ECHO_LENGTHS_MIN):
            if echoes.lengths[i] == 0:
                echoes.lengths[i] = size + 1
            if echoes.lengths[i] == size + 1:
                break
        if (echoes.unlike < ECHO_UNLIKE_MIN or not echoes.lengths[ECHO_LENGTHS_MIN - 1]
                or echoes.unlike < 2 * echoes.unlike_told):
            return 0
        echoes.unlike_told = echoes.unlike
        return self.tell_strange(slot, UNLIKE, echoes.unlike, echoes.surplus_bytes, time_ns)

    cdef inline int look_for_strange(self, int32_t slot, int64_t time_ns) except -1:
        """Tell of what all packets so far have in common, where no host would send them for what they are."""
        cdef Hot *flow = &self.flows[slot]
        cdef uint64_t packets, size = flow.payload_bytes[0] + flow.payload_bytes[1]
        cdef uint8_t kinds = flow.order & KINDS
        cdef Echoes *echoes
        if flow.packets < ICMP_STRANGE_MIN or flow.packets & (flow.packets - 1):
            return 0
        packets = <uint64_t>self.colds[slot].packets_high << 32 | flow.packets
        if kinds == ANSWERED and size >= ICMP_UNASKED_BYTES:
            return self.tell_strange(slot, UNASKED, packets, size, time_ns)
        if kinds == MEASURED and size >= ICMP_TIMES_BYTES * packets + ICMP_OVERLONG_BYTES:
            return self.tell_strange(slot, OVERLONG, packets, size - ICMP_TIMES_BYTES * packets, time_ns)
        if kinds == ASKED and self.colds[slot].echoes:
            echoes = &self.echoes[self.colds[slot].echoes - 1]
            if echoes.sizes_differ >= ICMP_SIZES_MIN and echoes.turns >= ICMP_TURNS_MIN:
                return self.tell_strange(slot, UNHEARD, packets, size, time_ns)
        return 0

    cdef int tell_strange(self, int32_t slot, int what, uint64_t count, uint64_t data_bytes,
                          int64_t time_ns) except -1:
        cdef Hot *flow = &self.flows[slot]
        self.name(slot)
        return self.say((NOT_ECHOES, time_ns, slot, what, count, data_bytes, flow.payload_bytes[0],
                         flow.payload_bytes[1], <uint64_t>self.colds[slot].packets_high << 32 | flow.packets))

    # -- what is told -------------------------------------------------------------------------------------------------

    cdef int carries(self, int32_t slot, uint8_t carrier) except -1:
        """Take what the parser found in the payload and told in the row alone."""
        self.colds[slot].carrier = carrier
        if self.flows[slot].marks & NAMED:
            self.say((CARRIES, slot, carrier))
        return 0

    cdef int say(self, tuple one) except -1:
        if self.dull_used:
            self.flush()
        self.told.append(one)
        return 0

    cdef int flush(self) except -1:
        """Put the rows of dull flows in their place among what is told."""
        if self.dull_used:
            self.told.append((DULL, <bytes>(<char *>self.dull)[:self.dull_used * sizeof(Closed)],
                              self.dull_unanswered))
            self.dull_used = 0
            self.dull_unanswered = 0
        return 0

    cdef void enqueue(self, int32_t slot, int queue, int64_t time_ns) noexcept:
        self.dequeue(slot)
        cdef Link *link = &self.links[slot]
        self.flows[slot].queue = queue
        link.queued_ns = time_ns
        link.newer = -1
        link.older = self.newest[queue]
        if link.older >= 0:
            self.links[link.older].newer = slot
        else:
            self.oldest[queue] = slot
        self.newest[queue] = slot

    cdef void dequeue(self, int32_t slot) noexcept:
        cdef Hot *flow = &self.flows[slot]
        cdef Link *link = &self.links[slot]
        if flow.queue == NO_QUEUE:
            return
        if link.newer >= 0:
            self.links[link.newer].older = link.older
        else:
            self.newest[flow.queue] = link.older
        if link.older >= 0:
            self.links[link.older].newer = link.newer
        else:
            self.oldest[flow.queue] = link.newer
        flow.queue = NO_QUEUE

    cdef int drop(self, int32_t slot, int64_t time_ns, int reason) except -1:
        """Forget a flow; it is told of as closed unless it was before."""
        cdef Hot *flow = &self.flows[slot]
        if flow.queue != QUEUE_CLOSED:
            self.tell_closed(slot, time_ns, reason)
        self.forget_echoes(slot)
        self.dequeue(slot)
        cdef int32_t *link = &self.heads[self.place_of(slot)]
        while link[0] != slot + 1:
            link = &self.flows[link[0] - 1].chain
        link[0] = flow.chain
        flow.used = 0
        flow.chain = self.free_slot
        self.free_slot = slot
        self.size -= 1
        return 0

    cdef int tell_closed(self, int32_t slot, int64_t time_ns, int reason) except -1:
        cdef Hot *flow = &self.flows[slot]
        cdef Cold *cold = &self.colds[slot]
        cdef uint64_t packets = <uint64_t>cold.packets_high << 32 | flow.packets
        if flow.marks & HOLDS:
            self.give_all_up(slot)
        if not flow.marks & NAMED:
            if not (icmp(flow.protocol) and self.excess(slot)):
                return self.tell_dull(slot, time_ns, reason)
            self.name(slot)
        self.say((CLOSED, time_ns, slot, reason, packets, flow.payload_bytes[0], flow.payload_bytes[1],
                  cold.first[0], cold.first[1], cold.answered, flow.last_ns))
        return 0

    cdef int tell_dull(self, int32_t slot, int64_t time_ns, int reason) except -1:
        self.dull = <Closed *>grown(self.dull, &self.dull_room, self.dull_used, sizeof(Closed))
        self.write(&self.dull[self.dull_used], slot, time_ns, reason)
        self.dull_used += 1
        if not self.flows[slot].spoke & 2 or self.flows[slot].marks & MISSED:
            self.dull_unanswered += 1
        return 0

    cdef void write(self, Closed *row, int32_t slot, int64_t time_ns, int reason) noexcept:
        cdef Hot *flow = &self.flows[slot]
        cdef Cold *cold = &self.colds[slot]
        row.time_ns = time_ns
        row.start_ns = cold.start_ns
        row.netns = flow.netns
        row.protocol = flow.protocol
        row.initiator_known = flow.marks & KNOWN
        row.reason = reason
        row.carrier = cold.carrier
        row.missed = flow.marks & MISSED != 0
        memcpy(row.initiator, &flow.high[0] if flow.initiator_is_high else &flow.low[0], 16)
        memcpy(row.responder, &flow.low[0] if flow.initiator_is_high else &flow.high[0], 16)
        row.initiator_port = flow.high_port if flow.initiator_is_high else flow.low_port
        row.responder_port = flow.low_port if flow.initiator_is_high else flow.high_port
        row.packets = <uint64_t>cold.packets_high << 32 | flow.packets
        row.payload_bytes[0] = flow.payload_bytes[0]
        row.payload_bytes[1] = flow.payload_bytes[1]
        row.first[0] = cold.first[0]
        row.first[1] = cold.first[1]
        row.answered = cold.answered
        row.last_ns = flow.last_ns

    # -- packets ------------------------------------------------------------------------------------------------------

    cdef int take_all(self, Py_ssize_t start, Py_ssize_t stop, uint32_t netns) except -1:
        """Take packets in, BATCH at a time: bucket, then flow are asked for well before either is needed."""
        cdef Look[BATCH] looks
        cdef Py_ssize_t at = start
        cdef int i, count
        cdef int32_t slot
        while at < stop:
            count = BATCH if stop - at > BATCH else <int>(stop - at)
            for i in range(count):
                self.look(&self.packets[at + i], netns, &looks[i])
                ask(&self.heads[looks[i].place])
            for i in range(count):
                slot = self.heads[looks[i].place] - 1
                if slot >= 0:
                    ask(&self.flows[slot])
                    ask(&self.flows[slot].last_ns)
            for i in range(count):
                self.take(&self.packets[at + i], netns, &looks[i])
            at += count
        return 0

    cdef int look_back(self, int64_t time_ns) except -1:
        """Tell by the row of attempts that nobody answered in time, once each."""
        cdef Tried *one
        cdef Closed row
        rows = []
        while self.tried_first < self.tried_next:
            one = &self.tried[self.tried_first % <uint64_t>self.size_max]
            if one.start_ns + UNANSWERED_NS > time_ns:
                break
            self.tried_first += 1
            if (self.flows[one.slot].used and self.colds[one.slot].serial == one.serial
                    and self.flows[one.slot].queue != QUEUE_CLOSED and not self.flows[one.slot].marks & HEARD):
                self.flows[one.slot].marks |= MISSED
                self.write(&row, one.slot, time_ns, REASON_IDLE)
                rows.append(<bytes>(<char *>&row)[:sizeof(Closed)])
        if rows:
            self.say((UNANSWERED, b"".join(rows)))
        return 0

    cdef inline int take(self, const Packet *packet, uint32_t netns, const Look *look) except -1:
        cdef int32_t slot = self.find(packet, netns, look)
        if slot < 0 or self.reused(slot, packet):
            slot = self.open(slot, packet, netns, look)
        cdef Hot *flow = &self.flows[slot]
        cdef int side = self.side(flow, look.from_high)
        cdef uint32_t fresh = packet.payload_bytes
        cdef uint32_t start = packet.sequence
        cdef bint tcp = packet.protocol == TCP
        if packet.ip_version >> 4:
            self.carries(slot, packet.ip_version >> 4)
        cdef bint stale = False
        flow.packets += 1
        if flow.packets == 0:
            self.colds[slot].packets_high += 1
        if packet.time_ns > flow.last_ns:
            stale = (packet.time_ns ^ flow.last_ns) >> QUEUE_EPOCH_LOG2 != 0
            flow.last_ns = packet.time_ns
        if flow.queue == QUEUE_CLOSED:
            return 0
        if side:
            flow.marks |= HEARD
        if tcp:
            if packet.tcp_flags & SYN or flow.marks & (AWAIT_ACK | HOLDS):
                if flow.marks & HOLDS:
                    self.await_holes(slot, side, packet)
                self.handshake(slot, packet, side)
            fresh = self.new_bytes(slot, side, packet, &start)
        elif icmp(packet.protocol):
            self.pair(slot, side, packet, fresh)
            self.look_for_strange(slot, packet.time_ns)
        if fresh:
            flow.spoke |= 1 << side
            flow.payload_bytes[side] += fresh
            self.talk(slot, side, fresh, packet.time_ns)
            if flow.marks & WATCHED and self.colds[slot].watched[side]:
                self.hand_on(slot, side, start, fresh, packet.time_ns)
        if flow.queue == QUEUE_BRIEF and flow.spoke & 3 == 3 and tcp:
            self.enqueue(slot, QUEUE_LONG, packet.time_ns)
        elif stale:
            self.enqueue(slot, flow.queue, packet.time_ns)
        if tcp and packet.tcp_flags & (FIN | RST) and self.ends(slot, side, packet):
            flow.spoke |= 12 if packet.tcp_flags & RST else 4 << side
            if flow.spoke & 12 == 12:
                self.tell_closed(slot, packet.time_ns, REASON_CLOSED)
                self.enqueue(slot, QUEUE_CLOSED, packet.time_ns)
        return 0

    cdef bint ends(self, int32_t slot, int side, const Packet *packet) noexcept:
        """Whether the other side takes a FIN or RST (RFC 9293 section 3.10.7.4, RFC 5961 section 3.2): else who goes on
        after a false one would be seen no more. A RST that may have crossed other packets ends a flow that is silent.
        """
        cdef Hot *flow = &self.flows[slot]
        cdef int32_t ahead = <int32_t>(packet.sequence - flow.expected[side])
        if not flow.order & EXPECTED << side:
            return True
        if packet.tcp_flags & RST:
            if ahead == 0 or ahead == 1 and flow.spoke & 4 << side:
                return True
            self.enqueue(slot, QUEUE_BRIEF, packet.time_ns)
            return False
        ahead += packet.payload_bytes
        return packet.tcp_flags & (SYN | ACK) and 0 <= ahead <= HOLE_BYTES_MAX

    cdef void handshake(self, int32_t slot, const Packet *packet, int side) noexcept:
        """RTT is from the SYN to the ACK of its answer: a whole one, wherever on the path it is seen from."""
        cdef Hot *flow = &self.flows[slot]
        cdef Cold *cold = &self.colds[slot]
        cdef uint8_t flags = packet.tcp_flags & (SYN | ACK | RST)
        if flags == SYN and side == 0:
            cold.syn_ns = packet.time_ns
            cold.syn_sequence = packet.sequence
        elif flags == (SYN | ACK) and side == 1:
            cold.syn_answer_ns = packet.time_ns
        elif flags == ACK and side == 0 and flow.marks & AWAIT_ACK:
            cold.rtt_ns = packet.time_ns - cold.syn_ns if packet.time_ns > cold.syn_ns else 0
            if cold.rtt_ns * 2 >= SILENCE_LONG:
                flow.silence_ns = SILENCE_LONG
            elif cold.rtt_ns * 2 > SILENCE_NS:
                flow.silence_ns = <uint32_t>(cold.rtt_ns * 2)
        if cold.rtt_ns < 0 and cold.syn_ns >= 0 and cold.syn_answer_ns >= 0:
            flow.marks |= AWAIT_ACK
        else:
            flow.marks &= ~AWAIT_ACK

    cdef inline uint32_t new_bytes(self, int32_t slot, int side, const Packet *packet, uint32_t *start) noexcept:
        """Return how many of the segment's bytes were not seen before, and from which sequence number on."""
        cdef Hot *flow = &self.flows[slot]
        cdef uint32_t sequence = packet.sequence
        cdef uint32_t size = packet.payload_bytes
        if packet.tcp_flags & RST or not packet.tcp_flags & (SYN | ACK):
            return 0
        if packet.tcp_flags & SYN:
            # A SYN takes one number; data in it (TCP Fast Open, RFC 7413) follows.
            sequence += 1
            if not flow.order & EXPECTED << side:
                flow.expected[side] = sequence
                flow.order |= EXPECTED << side
        if size == 0:
            return 0
        if not flow.order & EXPECTED << side:
            flow.expected[side] = sequence
            flow.order |= EXPECTED << side
        if sequence == flow.expected[side] and not flow.order & STRANGE << side:
            start[0] = sequence
            flow.expected[side] = sequence + size
            return size
        return self.out_of_order(slot, side, sequence, size, packet.time_ns, start)

    cdef uint32_t out_of_order(self, int32_t slot, int side, uint32_t sequence, uint32_t size, int64_t time_ns,
                               uint32_t *start) noexcept:
        cdef Hot *flow = &self.flows[slot]
        cdef Cold *cold = &self.colds[slot]
        cdef uint32_t end = sequence + size
        cdef int32_t ahead = <int32_t>(sequence - flow.expected[side])
        if ahead > HOLE_BYTES_MAX or ahead < -HOLE_BYTES_MAX:
            # Farther than any window reaches by loss alone: believed only when the next segment carries on from it.
            if not flow.order & STRANGE << side or cold.strange[side] != sequence:
                flow.order |= STRANGE << side
                cold.strange[side] = end
                return 0
            cold.holes[side] = 0
            cold.dug[side] += 1
            ahead = 0
            flow.expected[side] = sequence
        flow.order &= ~(STRANGE << side)
        start[0] = sequence
        if ahead < 0:
            if <int32_t>(end - flow.expected[side]) > 0:
                start[0] = flow.expected[side]
                size = end - flow.expected[side]
                flow.expected[side] = end
                return size
            return self.fill(cold, side, sequence, end, start)
        if ahead > 0:
            self.dig(cold, side, flow.expected[side], sequence)
            if not self.hold(slot, side, flow.expected[side], time_ns):
                cold.dug[side] += 1
        flow.expected[side] = end
        return size

    cdef void dig(self, Cold *cold, int side, uint32_t start, uint32_t end) noexcept:
        """Remember a hole; of more than two the oldest is given up."""
        if cold.holes[side] == 2:
            cold.hole_start[side][0] = cold.hole_start[side][1]
            cold.hole_end[side][0] = cold.hole_end[side][1]
            cold.holes[side] = 1
        cold.hole_start[side][cold.holes[side]] = start
        cold.hole_end[side][cold.holes[side]] = end
        cold.holes[side] += 1

    cdef uint32_t fill(self, Cold *cold, int side, uint32_t sequence, uint32_t end, uint32_t *start) noexcept:
        """Take what a late segment brings to the first hole that it touches.

        Within a hole, it leaves one on each side; where there is no room for both, the earlier is given up.
        """
        cdef int i
        cdef uint32_t first, last
        for i in range(cold.holes[side]):
            first = cold.hole_start[side][i]
            last = cold.hole_end[side][i]
            if <int32_t>(end - first) <= 0 or <int32_t>(last - sequence) <= 0:
                continue
            if <int32_t>(sequence - first) > 0:
                if <int32_t>(last - end) <= 0:
                    cold.hole_end[side][i] = sequence
                    start[0] = sequence
                    return last - sequence
                if cold.holes[side] == 1:
                    cold.hole_start[side][1] = end
                    cold.hole_end[side][1] = last
                    cold.hole_end[side][0] = sequence
                    cold.holes[side] = 2
                    start[0] = sequence
                    return end - sequence
                first = sequence
            if <int32_t>(last - end) > 0:
                cold.hole_start[side][i] = end
                last = end
            else:
                if i == 0:
                    cold.hole_start[side][0] = cold.hole_start[side][1]
                    cold.hole_end[side][0] = cold.hole_end[side][1]
                cold.holes[side] -= 1
            start[0] = first
            return last - first
        return 0

    # -- watched segments, in the order of the stream -----------------------------------------------------------------

    cdef bint hold(self, int32_t slot, int side, uint32_t hole, int64_t time_ns) noexcept:
        """From here on wait for what a hole lacks; return whether that is done: if watched, for HELD_MAX flows."""
        cdef Hot *flow = &self.flows[slot]
        cdef Cold *cold = &self.colds[slot]
        cdef Held *held
        if not (flow.marks & WATCHED and cold.watched[side]):
            return False
        if not flow.marks & HOLDS:
            cold.held = take_row(&self.held_free)
            if not cold.held:
                return False
            flow.marks |= HOLDS
            memset(&self.held[cold.held - 1], 0, sizeof(Held))
            self.held[cold.held - 1].told_ns = time_ns
        held = &self.held[cold.held - 1]
        if not held.waits[side]:
            held.waits[side] = True
            held.hole[side] = hole
            held.since_ns[side] = time_ns
        return True

    cdef int hand_on(self, int32_t slot, int side, uint32_t start, uint32_t size, int64_t time_ns) except -1:
        """Tell of a segment, or hold it: it can be read when what comes before it came.

        What was held is told with the time of that, and with its own where the hole was given up; never with one
        before that of what was told last. What comes when its hole was given up is out of place, and not told.
        """
        cdef Hot *flow = &self.flows[slot]
        cdef Held *held
        cdef int i
        if not flow.marks & HOLDS:
            if start + size == flow.expected[side]:
                self.segment(slot, side, start, size, flow.payload_bytes[side], time_ns)
            return 0
        held = &self.held[self.colds[slot].held - 1]
        if held.waits[side] and <int32_t>(start - held.hole[side]) > 0:
            i = held.count[side]
            while i and <int32_t>(held.starts[side][i - 1] - start) > 0:
                held.starts[side][i] = held.starts[side][i - 1]
                held.sizes[side][i] = held.sizes[side][i - 1]
                held.times_ns[side][i] = held.times_ns[side][i - 1]
                i -= 1
            held.starts[side][i] = start
            held.sizes[side][i] = size
            held.times_ns[side][i] = time_ns
            held.bytes[side] += size
            held.count[side] += 1
            return self.give_up(slot, side) if held.count[side] > HELD_SEGMENTS_MAX else 0
        if start != held.hole[side] if held.waits[side] else start + size != flow.expected[side]:
            return 0
        held.told_ns = max(held.told_ns, time_ns)
        self.segment(slot, side, start, size, flow.payload_bytes[side] - held.bytes[side], time_ns)
        if held.waits[side]:
            held.hole[side] = start + size
            self.follow(slot, side)
        return 0

    cdef int follow(self, int32_t slot, int side) except -1:
        """Tell of what was held up to the next hole."""
        cdef Held *held = &self.held[self.colds[slot].held - 1]
        cdef uint32_t start, size
        cdef int i, told = 0
        while told < held.count[side] and <int32_t>(held.starts[side][told] - held.hole[side]) <= 0:
            start = held.starts[side][told]
            size = held.sizes[side][told]
            held.told_ns = max(held.told_ns, held.times_ns[side][told])
            if <int32_t>(start + size - held.hole[side]) > 0:
                held.hole[side] = start + size
            held.bytes[side] -= size
            held.since_ns[side] = held.told_ns
            told += 1
            self.segment(slot, side, start, size, self.flows[slot].payload_bytes[side] - held.bytes[side],
                         held.told_ns)
        held.count[side] -= told
        for i in range(held.count[side]):
            held.starts[side][i] = held.starts[side][i + told]
            held.sizes[side][i] = held.sizes[side][i + told]
            held.times_ns[side][i] = held.times_ns[side][i + told]
        if held.count[side] == 0:
            held.waits[side] = False
            if not held.waits[1 - side]:
                self.flows[slot].marks &= ~HOLDS
                give_row(&self.held_free, self.colds[slot].held)
        return 0

    cdef int give_up(self, int32_t slot, int side) except -1:
        """Count the hole that is waited for, and go on behind it."""
        cdef Held *held = &self.held[self.colds[slot].held - 1]
        self.colds[slot].dug[side] += 1
        held.hole[side] = held.starts[side][0]
        return self.follow(slot, side)

    cdef int await_holes(self, int32_t slot, int side, const Packet *packet) except -1:
        """Give a hole up once the other side has what it lacks (it was not captured), or after HELD_NS."""
        cdef Hot *flow = &self.flows[slot]
        cdef Held *held = &self.held[self.colds[slot].held - 1]
        cdef int i
        for i in range(2):
            while flow.marks & HOLDS and held.waits[i] and (
                    packet.time_ns - held.since_ns[i] > HELD_NS
                    or (i != side and packet.tcp_flags & ACK
                        and <int32_t>(packet.acknowledgement - held.starts[i][0]) >= 0)):
                self.give_up(slot, i)
        return 0

    cdef int give_all_up(self, int32_t slot) except -1:
        cdef Hot *flow = &self.flows[slot]
        cdef Held *held = &self.held[self.colds[slot].held - 1]
        cdef int i
        for i in range(2):
            while flow.marks & HOLDS and held.waits[i]:
                self.give_up(slot, i)
        return 0

    # -- who speaks ---------------------------------------------------------------------------------------------------

    cdef inline int talk(self, int32_t slot, int side, uint32_t size, int64_t time_ns) except -1:
        """Turn taking: who breaks a silence, and how the other answers. Turns are noted where the far side may lead."""
        cdef Hot *flow = &self.flows[slot]
        cdef int64_t silence = flow.silence_ns
        if flow.waiting:
            self.answer(slot, side, size, time_ns)
        elif flow.talk_ns >= 0 and time_ns - flow.talk_ns > silence:
            self.question(slot, side, size, time_ns)
        flow.talk_ns = time_ns
        if (flow.marks & LED or flow.protocol == TCP and not flow.marks & KNOWN) and self.colds[slot].turn != side + 1:
            self.colds[slot].turn = side + 1
            self.colds[slot].turn_from = flow.payload_bytes[side] - size
        self.rhythm(slot, side, size, time_ns)
        return 0

    cdef void question(self, int32_t slot, int side, uint32_t size, int64_t time_ns) noexcept:
        cdef Hot *flow = &self.flows[slot]
        cdef Cold *cold = &self.colds[slot]
        if flow.silence_ns == SILENCE_LONG and time_ns - flow.talk_ns <= cold.rtt_ns * 2:
            return
        cold.first[side] += 1
        cold.before = flow.payload_bytes[1 - side] - cold.turn_from if cold.turn == 2 - side else 0
        flow.waiting = 1
        flow.asker = side
        flow.question_bytes = size
        cold.question_ns = time_ns

    cdef int answer(self, int32_t slot, int side, uint32_t size, int64_t time_ns) except -1:
        """Payload while a question is open: its answer, the question of a new silence, or more of the question."""
        cdef Hot *flow = &self.flows[slot]
        cdef Cold *cold = &self.colds[slot]
        cdef int64_t silence = flow.silence_ns
        if side != flow.asker and time_ns - cold.question_ns <= ANSWER_NS:
            flow.waiting = 0
            if flow.question_bytes <= SMALL_BYTES and size <= SMALL_BYTES:
                cold.answered += 1
                self.tell_exchange(slot, size, time_ns)
            return 0
        if flow.silence_ns == SILENCE_LONG:
            silence = cold.rtt_ns * 2
        if flow.talk_ns >= 0 and time_ns - flow.talk_ns > silence:
            self.question(slot, side, size, time_ns)
        elif side == flow.asker:
            flow.question_bytes += size
            cold.question_ns = time_ns
            if flow.question_bytes > SMALL_BYTES:
                flow.waiting = 0
        return 0

    cdef int tell_exchange(self, int32_t slot, uint32_t size, int64_t time_ns) except -1:
        cdef Hot *flow = &self.flows[slot]
        cdef Cold *cold = &self.colds[slot]
        if flow.asker:
            flow.marks |= LED
        elif self.quiet_exchanges and (flow.protocol == UDP and not flow.marks & LED
                                       or flow.protocol == TCP and flow.marks & (KNOWN | LED) == KNOWN):
            return 0
        if self.keep(slot, size, time_ns):
            return 0
        self.name(slot)
        self.say((EXCHANGE, time_ns, slot, flow.asker,
                  time_ns - cold.question_ns if time_ns > cold.question_ns else 0,
                  flow.question_bytes, size, cold.first[0], cold.first[1], cold.answered,
                  cold.rtt_ns, flow.payload_bytes[0], flow.payload_bytes[1],
                  <uint64_t>cold.packets_high << 32 | flow.packets, cold.before))
        return 0

    cdef inline int rhythm(self, int32_t slot, int side, uint32_t size, int64_t time_ns) except -1:
        """Small records on a 20 ms grid (OpenSSH's keystroke chaff), and whose are answered at once."""
        cdef Hot *flow = &self.flows[slot]
        cdef int other = 1 - side
        cdef int64_t gap
        if flow.quick_waiting & 1 << other:
            flow.quick_waiting &= ~(1 << other)
            if time_ns - flow.small_ns[other] <= QUICK_NS:
                flow.quick[other] += 1
        if size > RHYTHM_BYTES:
            return 0
        if flow.small_ns[side] >= 0:
            gap = time_ns - flow.small_ns[side]
            if GRID_LOW_NS <= gap <= GRID_HIGH_NS:
                flow.grid[side] += 1
        flow.small_ns[side] = time_ns
        flow.quick_waiting |= 1 << side
        flow.small[side] += 1
        if flow.small[side] == RHYTHM_RECORDS:
            if flow.grid[side] * 3 > RHYTHM_RECORDS:
                self.name(slot)
                self.say((RHYTHM, time_ns, slot, side, flow.small[side], flow.grid[side], flow.quick[side],
                          <uint64_t>self.colds[slot].packets_high << 32 | flow.packets))
            flow.small[side] = flow.grid[side] = flow.quick[side] = 0
        return 0

    cdef int segment(self, int32_t slot, int side, uint32_t start, uint32_t size, uint64_t total,
                     int64_t time_ns) except -1:
        """Tell of the encrypted part of a segment; of a run of large ones only the first and every 64 KiB."""
        cdef Hot *flow = &self.flows[slot]
        cdef Cold *cold = &self.colds[slot]
        cdef int32_t clear = <int32_t>(cold.watch_from[side] - start)
        if clear > 0 and cold.watched[side] == 1:
            if <uint32_t>clear >= size:
                return 0
            size -= clear
        elif clear < -HOLE_BYTES_MAX:
            # Sequence numbers come round again: from here on all is beyond the boundary.
            cold.watched[side] = 2
        if size < LARGE_BYTES:
            cold.large_side = 2
        elif cold.large_side == side and total >> LARGE_STEP_LOG2 == (total - size) >> LARGE_STEP_LOG2:
            return 0
        else:
            cold.large_side = side
        self.name(slot)
        self.say((SEGMENT, time_ns, slot, side, size, total,
                  <uint64_t>cold.packets_high << 32 | flow.packets, cold.dug[0], cold.dug[1]))
        return 0
