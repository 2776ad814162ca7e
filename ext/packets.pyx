# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Frames to rows of `records.PACKET` and to facts: one parser for capture files and for the live ring.

Sources: RFC 791, 8200 (extension headers, fragments), 9293, 768, 792, 4443; Linux "cooked" and other link layers from
tcpdump.org/linktypes.html; RFC 4253 (SSH), RFC 8446 (TLS), RFC 6066, RFC 7301, RFC 1035, 7766 (DNS over TCP); RFC
1928, 1929 and openssh.com/txt/socks4.protocol (SOCKS); RFC 9112 section 3.2 (proxies); RFC 9113 section 3.4 (HTTP/2);
RFC 6455 and 7692 (WebSockets); yamux's spec.md (hashicorp/yamux); X Window System Protocol, X.Org's edition for
X11R7.7; RFC 7296 (IKE); wireguard.com/protocol; OpenVPN's doc/doxygen/doc_protocol_overview.h; Tor's tor-spec
(cells); sv2-spec chapter 4 (Stratum V2); pcap and pcapng from draft-ietf-opsawg-pcap and -pcapng; TPACKET_V3 from
Documentation/networking/packet_mmap.rst and linux/if_packet.h.

Every byte is hostile. Each function gets a pointer with the number of bytes that are there, and reads no others;
each loop takes at least one byte a round or has a fixed bound. No Python object is touched per packet.

A fact needs the first bytes of a TCP stream in order. Per direction a `Stream` notes which sequence number is wanted
next; only bytes in order are read. A segment from beyond a hole waits until that is filled, AHEAD_MAX of a stream and
AHEAD_SEGMENTS of all, of which the oldest gives way and is counted (its row is written in any case); a hole that lies
within a message that is not read anyway is jumped. Nothing is copied while messages are whole within a segment and in
order; else the beginning of one message waits in a buffer of at most MESSAGE_MAX bytes. A stream is decided, and its
payload not looked at again while its place in the table lasts, once it has sent NEWKEYS, or its first messages are of
none of the protocols that are known here. Of TLS the headers of the first RECORDS_MAX records are read on, to the
second that is large: who sends many small ones, slowly, is told of with their times and sizes, and so is who sends
cells. Of JSON the first LINES_MAX lines, or messages in a WebSocket, are looked at for the words and forms of mining
pools; of requests over HTTP, TEXT_MAX bytes in all, each POST that begins a segment for a miner's calls of a node, in
what came at once of its body; of other text of the side that dialled, as much, the end of each segment for a prompt,
and how each answer begins; of what an X display says, how often a key was pressed, up to X11_KEYS_MIN; what a proxy was
asked to carry is read as a stream of its own. What the side that was called says first may be a greeting, behind which
somebody speaks as a client: up to GREETING_MAX bytes, the beginning of each segment is compared with what clients of
HTTP and SOCKS say first, and so are its messages in a WebSocket and in the first FRAMES_MAX frames of yamux. The table
is set-associative: a full set gives up its oldest decided, else its oldest stream; those within a handshake are
counted.
Of a stream that is not in the table the first six bytes of a segment are compared with a banner's and a ClientHello's.
A datagram is compared with the few bytes that the handshakes of VPNs and DNS have in fixed places; WireGuard's data,
which has four, needs DATAGRAMS_MIN of them in a row, and a place in the table.

Known limits: Stratum is read where its opening was captured, and in clear only, in a WebSocket that compresses up to
the first message in several frames or above LINE_MAX; a ClientHello or KEXINIT above MESSAGE_MAX is not read; text
before an SSH banner is followed for TEXT_MAX bytes; what an HTTP proxy answers is read as text only; of a datagram in
IP fragments the first HELD_BYTES are read, once it is whole (see packets_fragments.pxi); urgent data are counted and
read where they were sent; of bytes that came twice the first count, though the receiver may have had reason to refuse
them; of two SYNs before any data the later counts.
"""

from cpython.buffer cimport PyBUF_ND, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memchr, memcmp, memcpy, memset, strerror

import zlib
from collections import OrderedDict

import numpy as np

from gpuguard.core import pools
from gpuguard.core.records import (
    PACKET,
    SPOKEN,
    DnsMessage,
    Spoken,
    SshBanner,
    SshKexInit,
    SshNewKeys,
    Stratum,
    TlsClientHello,
    TlsRecords,
)

cdef extern from *:
    """
    #include <stddef.h>
    #include <stdint.h>
    typedef struct {
        int64_t time_ns;
        uint8_t source[16];
        uint8_t destination[16];
        uint16_t source_port;
        uint16_t destination_port;
        uint32_t sequence;
        uint32_t acknowledgement;
        uint32_t payload_bytes;
        uint32_t frame_bytes;
        uint8_t protocol;
        uint8_t tcp_flags;
        uint8_t ip_version;
        uint8_t packet_type;
    } gpuguard_packet_row;
    _Static_assert(sizeof(gpuguard_packet_row) == 64, "a row is one cache line, without padding");
    /* A stream's key is the 36 bytes from source to destination_port. */
    _Static_assert(offsetof(gpuguard_packet_row, source) == 8, "");
    _Static_assert(offsetof(gpuguard_packet_row, sequence) == 44, "");
    #if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "records.PACKET is little-endian"
    #endif

    /* ticks of base 10**-n or 2**-n s to ns, for any n a file may claim; the result wraps, as hostile times may. */
    static int64_t gpuguard_ticks_ns(uint64_t ticks, unsigned resolution) {
        static const uint32_t ns[] = {1000000000, 100000000, 10000000, 1000000, 100000, 10000, 1000, 100, 10, 1};
        unsigned n = resolution & 0x7f;
        if (resolution < sizeof ns / sizeof *ns)
            return (int64_t)(ticks * ns[resolution]);
        if (resolution & 0x80) {
            if (n >= 64)
                return (int64_t)(n >= 94 ? 0 : ((unsigned __int128)ticks * 1000000000u) >> n);
            return (int64_t)(((unsigned __int128)ticks * 1000000000u) >> n);
        }
        for (; n > 9 && ticks; n--)
            ticks /= 10;
        return (int64_t)ticks;
    }
    static void gpuguard_prefetch(const uint8_t *p) { __builtin_prefetch(p); }
    static uint32_t gpuguard_load_acquire(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static void gpuguard_store_release(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    """
    ctypedef struct Row "gpuguard_packet_row":
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
    int64_t ticks_ns "gpuguard_ticks_ns"(uint64_t ticks, unsigned resolution) noexcept nogil
    void prefetch "gpuguard_prefetch"(const uint8_t* p) noexcept nogil
    uint32_t load_acquire "gpuguard_load_acquire"(const uint32_t* p) noexcept nogil
    void store_release "gpuguard_store_release"(uint32_t* p, uint32_t v) noexcept nogil

include "mixing.pxi"

cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(object)

cdef enum:
    POOL_MAX = 4
    SETS = 1024
    WAYS = 8
    MESSAGE_MAX = 16384
    BUFFERS_MAX = 1024
    AHEAD_MAX = 8
    AHEAD_SEGMENTS = 128
    TEXT_MAX = 16384
    GREETING_MAX = 512
    LINE_MAX = 2048
    LINES_MAX = 16
    FRAMES_MAX = 64
    INFLATERS_MAX = 64
    METHOD_MAX = 32
    BANNER_LINE_MAX = 8192
    SSH_PACKET_MAX = 262144
    FACTS_MAX = 4096
    FACTS_ROOM = 16
    ARENA_BYTES = 1048576
    ARENA_ROOM = 40960
    VLAN_TAGS_MAX = 4
    EXTENSION_HEADERS_MAX = 16
    PACKET_TYPE_UNKNOWN = 255
    RECORDS_MAX = 64
    RECORDS_STEP = 4
    RECORDS_GAP_MS = 500
    RECORD_LARGE = 4096
    RECORD_TALK = 3072
    CELLS_MIN = 3
    CELLS_CBC_MIN = 8
    DATAGRAMS_MIN = 4
    X11_KEYS_MIN = 20
    WORD_MAX = 256
    PROMPT_MAX = 64
    PROMPTS_MIN = 3
    SILENCE_MS = 1000
    AT_ONCE_MS = 40

# Of a place in the table of streams, beside bits of its hash; 0: free.
cdef enum:
    TAG_TAKEN = 1
    TAG_DECIDED = 2

cdef enum:
    OPENING = 0
    SSH = 1
    SSH_KEYS = 2
    TLS = 3
    RECORDS = 4
    SOCKS = 5
    DNS_STREAM = 6
    NOISE = 7
    WEBSOCKET = 8
    X11 = 9
    YAMUX = 10
    GREETED = 11    # none of these, but little was said so far
    DECIDED = 12
    DATAGRAMS = 13  # not TCP: never read as a stream

cdef enum:
    BANNER = 0
    KEXINIT = 1
    NEWKEYS = 2
    HELLO = 3
    DNS = 4
    STRATUM = 5
    TOLD_RECORDS = 6
    TOLD_SPOKEN = 7
    JSON = 8
    DEFLATED = 9

# records.SPOKEN, in its order.
cdef enum:
    SOCKS4_REQUEST = 0
    SOCKS4_REPLY = 1
    SOCKS5_GREETING = 2
    SOCKS5_CHOICE = 3
    SOCKS5_REQUEST = 4
    HTTP_CONNECT = 5
    HTTP_ABSOLUTE = 6
    TOR = 7
    WIREGUARD = 8
    OPENVPN = 9
    IKE = 10
    DNS_TCP = 11
    STRATUM2_HELLO = 12
    STRATUM2_ANSWER = 13
    MESSAGE_BROKER = 14
    HTTP_BACKWARDS = 15
    RFB_VERSION = 16
    X11_SETUP = 17
    X11_KEYS = 18
    SSH_IN_WEBSOCKET = 19
    YAMUX_BACKWARDS = 20
    SHELL_PROMPTS = 21
    SHELL_OUTPUT = 22
    TLS_ANSWERED_FIRST = 23

cdef enum:
    FIN = 1
    SYN = 2
    RST = 4
    ACK = 16
    URG = 32

# Where facts are brief: carriers in the upper bits of ip_version, and the room in a name that makes it a fact.
cdef enum:
    CARRIES_TLS = 2 << 4
    CARRIES_DNS = 3 << 4
    CARRIES_BROKER = 4 << 4
    BRIEF_NAME_BYTES = 27

# Stream.told, of what is told once.
cdef enum:
    TOLD = 1
    TOLD_GREETING = 2
    TOLD_REQUEST = 4
    TOLD_HTTP = 8
    TOLD_PROMPTS = 16
    TOLD_OUTPUT = 32

# Stream.console: whether this side said text before, which ended with a prompt; or talks HTTP.
cdef enum:
    CONSOLE_TEXT = 1
    CONSOLE_PROMPT = 2
    CONSOLE_NONE = 4

# Stream.printed: what programs print first, and a shell of its own.
cdef enum:
    PRINTED_ID = 1
    PRINTED_LS = 2
    PRINTED_PS = 4
    PRINTED_PASSWD = 8
    PRINTED_UNAME = 16
    PRINTED_SHELL = 32
    PRINTED_MOUNTS = 64
    PRINTED_LINKS = 128

# How far a request over HTTP was read: the head of a POST, up to its body, or to where the next request begins.
cdef enum:
    POST_HEAD = 1
    POST_BODY = 2
    POST_NEXT = 3

# How far the head that ends in a WebSocket was read.
cdef enum:
    UPGRADE_HEAD = 1
    UPGRADE_ASKED = 2

# Of what a DNS answer says.
cdef enum:
    ANSWERS_MAX = 64
    ADDRESSES_MAX = 16
    ALIASES_MAX = 4

# Application data records of one side of a TLS connection.
cdef struct Talk:
    int64_t first_ns
    uint32_t used
    uint32_t large
    uint32_t cells      # of one cell each or a few, by the overhead of AEAD ciphers
    uint32_t cells_cbc  # of one, by those of CBC, which pad: many other messages have that size
    uint32_t bodies     # with more in them than the one byte that TLS 1.0 sends ahead of each
    uint16_t sizes[RECORDS_MAX]
    uint32_t after_ms[RECORDS_MAX]

cdef struct Stream:
    uint8_t key[36]
    uint32_t first      # sequence number of the first byte
    uint32_t wanted     # of the next byte to be read
    uint32_t skip       # bytes to pass over unread
    uint32_t used       # when last used, counted in segments
    uint32_t text       # bytes of text before the banner
    uint32_t held       # bytes in the buffer
    uint32_t heard      # of the other side, by its last segment of text
    uint32_t prompt     # how its last prompt begins, and its sign
    uint8_t* buffer
    Talk* talk
    uint8_t state
    uint8_t mid_line    # the text before ended within a line
    uint8_t lost        # counted in streams_lost
    uint8_t proxied     # text is the head of a request to a proxy
    uint8_t told        # TOLD and what follows it
    uint8_t called      # of the side that was called: its SYN answers one
    uint8_t posted      # POST_HEAD, POST_BODY, POST_NEXT: text is requests over HTTP
    uint8_t upgrade     # UPGRADE_HEAD, UPGRADE_ASKED: text is a head that may end in a WebSocket
    uint8_t lines       # of JSON, messages of a WebSocket, frames of yamux, or keys of X11 so far
    uint8_t little      # of X11: its numbers are little-endian
    uint8_t ahead       # segments that wait in Parse.ahead
    uint8_t greets      # of the side that was called: what it said so far may be a greeting
    uint8_t console     # CONSOLE_TEXT and what follows it
    uint8_t prompts     # how many answers ended with a prompt, less those that did not
    uint8_t printed     # PRINTED_ID and what follows it
    uint8_t with_syn    # bytes that its SYN brought, which the other side may have refused, are all that was read

# A segment of a stream that came before the one ahead of it.
cdef struct Ahead:
    Stream* stream      # NULL: none
    uint8_t* data
    uint32_t sequence
    uint32_t have
    uint32_t size

cdef struct FactNote:
    uint32_t row
    uint32_t kind
    uint32_t a
    uint32_t b
    uint32_t start
    uint32_t size

cdef struct Parse:
    Row* rows
    uint32_t used
    uint32_t rows_max
    FactNote* facts
    uint32_t facts_used
    uint8_t* arena
    uint32_t arena_used
    uint32_t* tags
    Stream* streams
    uint8_t* scratch
    uint64_t seed
    uint32_t clock
    uint32_t buffers
    uint64_t frames
    uint64_t other
    uint64_t malformed
    uint64_t streams_lost
    uint64_t urgent
    Ahead* ahead        # a ring of AHEAD_SEGMENTS
    uint32_t ahead_next
    Datagram* datagrams
    uint8_t* held       # HELD_BYTES of each
    uint64_t fragments_headless
    uint64_t datagrams_spoiled
    uint64_t datagrams_unfinished
    bint brief


# -- bytes ------------------------------------------------------------------------------------------------------------

cdef inline uint32_t be16(const uint8_t* p) noexcept nogil:
    return (<uint32_t>p[0] << 8) | p[1]


cdef inline uint32_t be32(const uint8_t* p) noexcept nogil:
    return (<uint32_t>p[0] << 24) | (<uint32_t>p[1] << 16) | (<uint32_t>p[2] << 8) | p[3]


cdef inline uint32_t least(uint32_t a, uint32_t b) noexcept nogil:
    return a if a < b else b


cdef inline uint32_t above(uint32_t a, uint32_t b) noexcept nogil:
    """a - b, 0 where that would be negative."""
    return a - b if a > b else 0


# -- facts ------------------------------------------------------------------------------------------------------------

cdef inline bint full(Parse* s) noexcept nogil:
    """No room left for one more packet, whatever it may hold: one packet makes at most FACTS_ROOM facts."""
    return (s.used >= s.rows_max or s.facts_used + FACTS_ROOM > FACTS_MAX or s.arena_used + ARENA_ROOM > ARENA_BYTES)


cdef FactNote* note(Parse* s, uint32_t kind, uint32_t a, uint32_t b) noexcept nogil:
    cdef FactNote* fact
    if s.facts_used >= FACTS_MAX:
        return NULL
    fact = &s.facts[s.facts_used]
    s.facts_used += 1
    fact.row = s.used
    fact.kind = kind
    fact.a = a
    fact.b = b
    fact.start = s.arena_used
    fact.size = 0
    return fact


cdef void put(Parse* s, FactNote* fact, const uint8_t* p, uint32_t n) noexcept nogil:
    if fact == NULL or n > ARENA_BYTES - s.arena_used:
        return
    memcpy(s.arena + s.arena_used, p, n)
    s.arena_used += n
    fact.size += n


# -- SSH and TLS messages ---------------------------------------------------------------------------------------------
# Each returns how many bytes it took (more than there are: pass over the rest), 0 if it needs more, -1 when decided.

cdef int32_t kexinit(Parse* s, const uint8_t* p, uint32_t n) noexcept nogil:
    """RFC 4253, 7.1. ``p`` is the payload after the message number, without padding."""
    cdef uint32_t at = 16, size, lists_end = 0
    cdef int i
    cdef FactNote* fact
    for i in range(10):
        if at + 4 > n:
            return -1
        size = be32(p + at)
        if size > n - at - 4:
            return -1
        at += 4 + size
        if i == 7:
            lists_end = at
    if at + 5 > n:
        return -1
    fact = note(s, KEXINIT, 0, 0)
    put(s, fact, p + 16, lists_end - 16)
    return 1


cdef int32_t ssh_packet(Parse* s, Stream* t, const uint8_t* p, uint32_t n, uint32_t sequence) noexcept nogil:
    """RFC 4253, 6: one packet before encryption. Only KEXINIT and NEWKEYS are read, the others passed over."""
    cdef uint32_t size, padding, message
    if n < 6:
        return 0
    size = be32(p)
    padding = p[4]
    message = p[5]
    if size < 6 or size > SSH_PACKET_MAX or padding + 2 > size:
        return -1
    if message == 20:
        if t.state == SSH_KEYS or size + 4 > MESSAGE_MAX:
            return -1
        if n < size + 4:
            return 0
        if kexinit(s, p + 6, size - padding - 2) < 0:
            return -1
        t.state = SSH_KEYS
    elif message == 21:
        if n < size + 4 and size <= 512:
            return 0
        if t.state == SSH_KEYS and size <= 512:
            note(s, NEWKEYS, sequence + size + 4, 0)
        return -1
    elif not (1 <= message <= 19 or 30 <= message <= 49):
        return -1
    return <int32_t>(size + 4)


cdef int32_t ssh_banner(Parse* s, Stream* t, const uint8_t* p, uint32_t n) noexcept nogil:
    """RFC 4253, 4.2. Longer lines than its 255 bytes are taken, as OpenSSH does, so that nobody hides behind one."""
    cdef const uint8_t* end = <const uint8_t*>memchr(p, 10, least(n, BANNER_LINE_MAX))
    cdef uint32_t size
    if end == NULL:
        return -1 if n >= BANNER_LINE_MAX else 0
    size = <uint32_t>(end - p)
    put(s, note(s, BANNER, 0, 0), p, least(size - 1 if p[size - 1] == 13 else size, 255))
    if size < 8 or not (memcmp(p, b"SSH-2.0-", 8) == 0 or (size >= 9 and memcmp(p, b"SSH-1.99-", 9) == 0)):
        return -1
    t.state = SSH
    return <int32_t>(size + 1)


cdef int32_t extensions(Parse* s, const uint8_t* p, uint32_t n) noexcept nogil:
    """The extensions of a ClientHello: note the server name, the ALPN names, and whether another hello is within."""
    cdef uint32_t at = 0, kind, size, name = 0, name_size = 0, alpn = 0, alpn_size = 0, encrypted = 0
    cdef uint8_t head[2]
    cdef FactNote* fact
    while at < n:
        if n - at < 4:
            return -1
        kind = be16(p + at)
        size = be16(p + at + 2)
        at += 4
        if size > n - at:
            return -1
        if kind == 0 and size >= 5 and p[at + 2] == 0:
            name = at + 5
            name_size = be16(p + at + 3)
            if name_size > size - 5:
                return -1
        elif kind == 16 and size >= 2:
            alpn = at + 2
            alpn_size = be16(p + at)
            if alpn_size > size - 2:
                return -1
        elif kind == 0xFE0D:
            encrypted = 1
        at += size
    if s.brief:
        s.rows[s.used].ip_version = s.rows[s.used].ip_version & 15 | CARRIES_TLS
        return 1
    fact = note(s, HELLO, encrypted, 0)
    head[0] = <uint8_t>(name_size >> 8)
    head[1] = <uint8_t>(name_size & 255)
    put(s, fact, head, 2)
    put(s, fact, p + name, name_size)
    put(s, fact, p + alpn, alpn_size)
    return 1


cdef int32_t client_hello(Parse* s, const uint8_t* p, uint32_t n) noexcept nogil:
    """RFC 8446, 4.1.2: the body of a ClientHello."""
    cdef uint32_t at = 34, size
    if n < at + 1:
        return -1
    at += 1 + p[at]
    if n < at + 2:
        return -1
    at += 2 + be16(p + at)
    if n < at + 1:
        return -1
    at += 1 + p[at]
    if n == at:
        return extensions(s, p, 0)
    if n < at + 2:
        return -1
    size = be16(p + at)
    if size > n - at - 2:
        return -1
    return extensions(s, p + at + 2, size)


cdef int32_t tls_hello(Parse* s, Stream* t, const uint8_t* p, uint32_t n) noexcept nogil:
    """Join the handshake bytes of the records that are there (RFC 8446, 5.1), up to the end of the first message."""
    cdef uint32_t at = 0, joined = 0, size, part, total = 4
    while joined < total:
        if n - at < 5:
            return 0
        size = be16(p + at + 3)
        if p[at] != 22 or p[at + 1] != 3 or size == 0 or size > 16640:
            return -1
        at += 5
        part = least(least(size, n - at), MESSAGE_MAX - joined)
        memcpy(s.scratch + joined, p + at, part)
        joined += part
        if joined and s.scratch[0] == 2:  # a server's, which is not read
            t.state = RECORDS
            return tls_record(s, t, p, n)
        if joined and s.scratch[0] != 1:
            return -1
        if joined >= 4:
            total = 4 + (be32(s.scratch) & 0xFFFFFF)
            if total > MESSAGE_MAX:
                return -1
        if joined < total and size > n - at:
            return 0
        at += part
    if client_hello(s, s.scratch + 4, total - 4) < 0:
        return -1
    t.state = RECORDS
    return <int32_t>(at - part + size)


cdef int32_t tls_record(Parse* s, Stream* t, const uint8_t* p, uint32_t n) noexcept nogil:
    """The header of a record (RFC 8446, 5.1); what is in it is passed over."""
    cdef uint32_t size
    if n < 5:
        return 0
    size = be16(p + 3)
    if p[0] < 20 or p[0] > 23 or p[1] != 3 or size == 0 or size > 16640:
        return -1
    if p[0] == 23 and not application_record(s, t, size):
        return -1
    return <int32_t>(size + 5)


cdef bint application_record(Parse* s, Stream* t, uint32_t size) noexcept nogil:
    """Note one record; return whether the next is of interest."""
    cdef Talk* talk = t.talk
    cdef int64_t now_ns = s.rows[s.used].time_ns, after_ns
    if talk == NULL:
        talk = t.talk = <Talk*>malloc(sizeof(Talk))
        if talk == NULL:
            return 0
        memset(talk, 0, sizeof(Talk) - sizeof(talk.sizes) - sizeof(talk.after_ms))  # what has no entry is not read
        talk.first_ns = now_ns
    after_ns = now_ns - talk.first_ns
    if after_ns < 0 or after_ns >= <int64_t>4294967295 * 1000000:
        return 0
    talk.after_ms[talk.used] = <uint32_t>(after_ns // 1000000)
    talk.sizes[talk.used] = <uint16_t>size
    talk.used += 1
    talk.large += size > RECORD_LARGE
    talk.cells += cells(size)
    talk.cells_cbc += size == 544 or size == 560
    talk.bodies += size > 48
    if (talk.cells >= CELLS_MIN and talk.cells * 4 >= talk.bodies
            or talk.cells_cbc >= CELLS_CBC_MIN and talk.cells_cbc * 2 >= talk.bodies):
        spoken(s, TOR)
        return 0
    if talk.large >= 2 and talk.cells == 0:
        return 0
    if talk.used == 2 and not t.called and answered_first(s, talk, now_ns):
        note(s, TOLD_SPOKEN, TLS_ANSWERED_FIRST, size)
    if talk.used % RECORDS_STEP == 0:
        told_records(s, talk)
    return talk.used < RECORDS_MAX


cdef bint answered_first(Parse* s, const Talk* talk, int64_t now_ns) noexcept nogil:
    """Whether the first word of the side that dialled, behind its Finished (RFC 8446, 4.4.4), answers a first word.

    The other side broke the silence behind the handshake with it; nobody had been asked. In TLS 1.2 it is not known:
    Finished is no such record there, nor does the other side send some ahead of it (RFC 8446, 2).
    """
    cdef const Stream* far = other_side(s, &s.rows[s.used])
    cdef const Talk* theirs = NULL if far == NULL else far.talk
    cdef uint32_t at
    if (theirs == NULL or theirs.used < 2 or theirs.first_ns > talk.first_ns
            or talk.sizes[0] != 53 and talk.sizes[0] != 69):
        return 0
    at = theirs.used - 1
    if now_ns - theirs.first_ns - <int64_t>theirs.after_ms[at] * 1000000 > <int64_t>AT_ONCE_MS * 1000000:
        return 0
    while at and theirs.after_ms[theirs.used - 1] - theirs.after_ms[at - 1] <= AT_ONCE_MS:
        at -= 1
    return (at > 0 and theirs.after_ms[at] - theirs.after_ms[at - 1] >= SILENCE_MS
            and theirs.first_ns + <int64_t>theirs.after_ms[at] * 1000000 - talk.first_ns
            >= <int64_t>SILENCE_MS * 1000000)


cdef bint cells(uint32_t size) noexcept nogil:
    """Whether a record holds one to four of Tor's cells of 514 bytes, with what TLS 1.3, GCM or ChaCha20 add to it."""
    return size >= 530 and (
        size >= 531 and (size - 17) % 514 == 0 or size >= 538 and (size - 24) % 514 == 0 or (size - 16) % 514 == 0
    ) and size <= 4 * 514 + 24


cdef void told_records(Parse* s, Talk* talk) noexcept nogil:
    """Tell of a side that sends small records, slowly. What came with the handshake may be of any size."""
    cdef uint32_t i, large = 0
    cdef FactNote* fact
    for i in range(talk.used):
        large += talk.sizes[i] > RECORD_TALK
    if large > 2 or talk.after_ms[talk.used - 1] < RECORDS_GAP_MS * talk.used:
        return
    fact = note(s, TOLD_RECORDS, 0, 0)
    put(s, fact, <uint8_t*>&talk.first_ns, 8)
    put(s, fact, <uint8_t*>talk.after_ms, 4 * talk.used)
    put(s, fact, <uint8_t*>talk.sizes, 2 * talk.used)


cdef uint32_t behind(const uint8_t* p, uint32_t n, const char* what, uint32_t size) noexcept nogil:
    """Return where the first occurrence of a string ends, spaces behind it included; 0 if there is none."""
    cdef uint32_t at = 0
    while at + size <= n:
        if p[at] == <uint8_t>what[0] and memcmp(p + at, what, size) == 0:
            at += size
            while at < n and p[at] == 32:
                at += 1
            return at
        at += 1
    return 0


cdef uint32_t method(const uint8_t* p, uint32_t n, uint32_t* size) noexcept nogil:
    """Return where the name of the first method of JSON-RPC begins, 0 if there is none."""
    cdef uint32_t at = behind(p, n, b'"method":', 9)
    if at == 0 or at >= n or p[at] != 34:
        return 0
    at += 1
    size[0] = 0
    while at + size[0] < n and size[0] < METHOD_MAX and p[at + size[0]] != 34:
        size[0] += 1
    return at


cdef bint called(const uint8_t* p, uint32_t n, const char* name, uint32_t size) noexcept nogil:
    return n == size and memcmp(p, name, size) == 0


cdef bint work(Parse* s, const uint8_t* p, uint32_t n) noexcept nogil:
    """The body of a POST that asks a node for a block to find, or gives it one: BIP 22 and 23, Monero, Ethereum."""
    cdef uint32_t size = 0, at = method(p, n, &size)
    if at == 0 or not (called(p + at, size, b"getblocktemplate", 16) or called(p + at, size, b"submitblock", 11)
                       or called(p + at, size, b"get_block_template", 18) or called(p + at, size, b"submit_block", 12)
                       or called(p + at, size, b"getwork", 7) or called(p + at, size, b"eth_getWork", 11)
                       or size > 10 and memcmp(p + at, b"eth_submit", 10) == 0):
        return False
    put(s, note(s, STRATUM, 0, 0), p + at, size)
    return True


cdef bint stratum(Parse* s, const uint8_t* p, uint32_t n) noexcept nogil:
    """A line of JSON-RPC in the words of mining pools: Stratum V1, the dialect of CryptoNote coins, or ethproxy's."""
    cdef uint32_t size = 0, at = method(p, n, &size)
    if at == 0 and not behind(p, n, b'"method":', 9):
        # The first job comes with the answer to a login.
        if behind(p, n, b'"job":', 6) and behind(p, n, b'"blob":', 7) and behind(p, n, b'"target":', 9):
            put(s, note(s, STRATUM, 0, 0), b"job", 3)
            return True
        return False
    if at == 0 or not (size > 7 and memcmp(p + at, b"mining.", 7) == 0
                       or size > 10 and memcmp(p + at, b"eth_submit", 10) == 0
                       or called(p + at, size, b"eth_getWork", 11)
                       or called(p + at, size, b"login", 5) and behind(p, n, b'"login":', 8)
                       and behind(p, n, b'"pass":', 7)
                       or called(p + at, size, b"submit", 6) and behind(p, n, b'"nonce":', 8)
                       or called(p + at, size, b"job", 3) and behind(p, n, b'"blob":', 7)):
        return False
    put(s, note(s, STRATUM, 0, 0), p + at, size)
    return True


cdef void json_text(Parse* s, const uint8_t* p, uint32_t n) noexcept nogil:
    """Hand on an object that has a word of work in it, to be judged by its form (`core.pools`)."""
    if n and p[0] == 123 and (behind(p, n, b'"nonce', 6) or behind(p, n, b'"target', 7) or behind(p, n, b'"diff', 5)
                              or behind(p, n, b'"mining.', 8) or behind(p, n, b'"login"', 7)):
        put(s, note(s, JSON, 0, 0), p, n)


cdef int32_t websocket(Parse* s, Stream* t, const uint8_t* p, uint32_t n) noexcept nogil:
    """RFC 6455, 5.2: one frame. Messages in one frame of at most LINE_MAX bytes are read, LINES_MAX of them.

    Those of RFC 7692, which are told apart by a bit of the first byte, are compressed with all before them in mind.
    SSH goes in binary ones, its banner (RFC 4253, 4.2) ahead of all; brokers' protocols begin as they do without.
    """
    cdef uint32_t at = 2, size, i
    if n < 2:
        return 0
    size = p[1] & 127
    if p[0] & 0x30 or 2 < p[0] & 15 < 8:
        return -1
    at += (2 if size == 126 else 8 if size == 127 else 0) + (4 if p[1] & 128 else 0)
    if n < at:
        return 0
    if size == 126:
        size = be16(p + 2)
    elif size == 127:
        size = be32(p + 6) if be32(p + 2) == 0 else 0xFFFFFFFF
    if size > 0x3FFFFFFF:
        return -1
    if p[0] & 8:
        return <int32_t>(at + size)
    if size > LINE_MAX or not (p[0] & 0x80) or p[0] & 15 == 0:
        return -1 if p[0] & 0x40 or t.lines == LINES_MAX else <int32_t>(at + size)
    if n < at + size:
        return 0
    for i in range(size):
        s.scratch[i] = p[at + i] ^ (p[at - 4 + i % 4] if p[1] & 128 else 0)
    if p[0] & 0x40:
        put(s, note(s, DEFLATED, <uint32_t>(t - s.streams), t.told & TOLD | p[0] & 2), s.scratch, size)
        t.told |= TOLD
    elif p[0] & 2 and size > 4 and memcmp(s.scratch, b"SSH-", 4) == 0 and memchr(s.scratch, 10, least(size, 255)):
        spoken(s, SSH_IN_WEBSOCKET)
    elif t.lines == 0 and broker(s.scratch, size):
        spoken(s, MESSAGE_BROKER)
    else:
        json_text(s, s.scratch, size)
        if t.called:
            asked_within(s, t, s.scratch, size)
    t.lines += 1
    return -1 if t.lines == LINES_MAX else <int32_t>(at + size)


# -- proxies, VPNs and others -----------------------------------------------------------------------------------------

cdef void spoken(Parse* s, uint32_t what) noexcept nogil:
    note(s, TOLD_SPOKEN, what, 0)


cdef void spoken_once(Parse* s, Stream* t, uint32_t what, uint8_t told) noexcept nogil:
    if not t.told & told:
        spoken(s, what)
    t.told |= told


cdef bint looks_random(const uint8_t* p, uint32_t n) noexcept nogil:
    """Whether half the bytes have their upper bit set, within four standard deviations and a little; n >= 64."""
    cdef uint32_t i, high = 0
    for i in range(n):
        high += p[i] >> 7
    return high * 4 > n and high * 4 < 3 * n


cdef int32_t noise(Parse* s, Stream* t, const uint8_t* p, uint32_t n) noexcept nogil:
    """Stratum V2 (sv2-spec, 4.5 and 4.6): a key of 64 bytes; 234 bytes, and SetupConnection.Success in 22 + 22."""
    if t.state == NOISE:
        if n == 44:
            spoken(s, STRATUM2_ANSWER)
        return -1
    if n == 64:
        spoken(s, STRATUM2_HELLO)
        return -1
    t.state = NOISE
    return <int32_t>n


cdef int32_t socks_address(const uint8_t* p, uint32_t n) noexcept nogil:
    """RFC 1928, 4 to 6: version, command or reply, 0, type, address, port. How long it is; 0: more is needed."""
    cdef uint32_t size
    if n < 5:
        return 0
    if p[2] != 0 or not (p[3] == 1 or p[3] == 3 or p[3] == 4):
        return -1
    size = 10 if p[3] == 1 else 22 if p[3] == 4 else 7 + p[4]
    return <int32_t>size if n >= size else 0


cdef int32_t socks(Parse* s, Stream* t, const uint8_t* p, uint32_t n) noexcept nogil:
    """What either side sends after the methods: a login (RFC 1929), then the request or its reply, then anything."""
    cdef uint32_t size
    cdef int32_t took
    if p[0] == 1 and t.proxied < 2:
        size = 2
        if t.proxied == 1 and n >= 2:  # of the client: a name and a password
            size = 3 + p[1]
            size += p[size - 1] if n >= size else 0
        if n < 2 or n < size:
            return 0
        t.proxied += 2
        return <int32_t>size
    if p[0] != 5:
        return -1
    took = socks_address(p, n)
    if took > 0:
        if t.proxied & 1 and p[1] >= 1 and p[1] <= 3:
            spoken(s, SOCKS5_REQUEST)
        t.proxied = 0
        t.state = OPENING
    return took


cdef bint methods(const uint8_t* p, uint32_t n) noexcept nogil:
    """RFC 1928, 3: as many as are said to be there, each of which exists."""
    cdef uint32_t i
    if p[1] == 0 or p[1] > 16 or n < 2 + <uint32_t>p[1]:
        return 0
    for i in range(p[1]):
        if p[2 + i] == 4 or 9 < p[2 + i] < 128 or p[2 + i] == 255:
            return 0
    return 1


cdef int32_t socks5(Parse* s, Stream* t, const uint8_t* p, uint32_t n) noexcept nogil:
    """RFC 1928, 3: a client's methods, or the one that the server takes of them. Sent alone, since each waits."""
    if n < 2:
        return 0
    if n == 2 and (p[1] == 0 or p[1] == 2 or p[1] == 255):
        spoken(s, SOCKS5_CHOICE)
        t.state = SOCKS
        t.proxied = 0
        return 2
    if p[1] == 0 or p[1] > 16:
        return -1
    if n < 2 + <uint32_t>p[1]:
        return 0
    if not methods(p, n):
        return -1
    spoken(s, SOCKS5_GREETING)
    t.state = SOCKS
    t.proxied = 1
    return 2 + <int32_t>p[1]


cdef int32_t socks4(Parse* s, Stream* t, const uint8_t* p, uint32_t n) noexcept nogil:
    """4, command, port, address, user, 0; after the address 0.0.0.x a name and 0. All in one segment."""
    cdef uint32_t at = 8, names
    if n < 9 or not (p[1] == 1 or p[1] == 2) or be16(p + 2) == 0 or be32(p + 4) == 0:
        return -1
    for names in range(2 if be32(p + 4) < 256 else 1):
        while at < n and p[at] >= 32 and p[at] < 127:
            at += 1
        if at >= n or p[at] != 0 or at > 8 + 512:
            return -1
        at += 1
    spoken(s, SOCKS4_REQUEST)
    return <int32_t>at


cdef void proxy_request(Parse* s, Stream* t, const uint8_t* p, uint32_t n) noexcept nogil:
    """RFC 9112, 3.2.2 and 3.2.3: a request whose target is a whole address is one to a proxy. ``n``: of its line.

    Any other is a client's, and clients call (RFC 9110, 3.3): the side that was called does not begin with one, nor
    with the preface of HTTP/2 (RFC 9113, 3.4). A GET and a 101 may open a WebSocket (RFC 6455, 4).
    """
    cdef uint32_t at = 0
    if n > 8 and memcmp(p, b"CONNECT ", 8) == 0:
        if behind(p, n, b" HTTP/1.", 8):
            spoken(s, HTTP_CONNECT)
            t.proxied = 1
        return
    if n > 5 and memcmp(p, b"POST ", 5) == 0 and behind(p, n, b" HTTP/1.", 8):
        t.posted = POST_HEAD
    if n > 12 and p[n - 1] == 10 and (memcmp(p, b"GET ", 4) == 0 or memcmp(p, b"HTTP/1.1 101", 12) == 0):
        t.upgrade = UPGRADE_HEAD
    if t.called and n == 16 and memcmp(p, b"PRI * HTTP/2.0\r\n", 16) == 0:
        spoken(s, HTTP_BACKWARDS)
    while at < n and at < 8 and 65 <= p[at] <= 90:
        at += 1
    if at >= 3 and n > at + 8 and memcmp(p + at, b" http://", 8) == 0:
        spoken(s, HTTP_ABSOLUTE)
    elif t.called and at >= 3 and n > at + 2 and memcmp(p + at, b" /", 2) == 0 and behind(p, n, b" HTTP/1.", 8):
        spoken(s, HTTP_BACKWARDS)


cdef bint http_head(const uint8_t* p, uint32_t n) noexcept nogil:
    """Whether a client's head begins here (RFC 9112, 3 and 5): its whole line, then a field or the end of the head.

    Text that quotes a request goes on otherwise.
    """
    cdef uint32_t at = 0, begins
    while at < n and at < 8 and 65 <= p[at] <= 90:
        at += 1
    if at < 3 or at >= n or p[at] != 32:
        return 0
    at += 1
    begins = at
    while at < n and 32 < p[at] < 127:
        at += 1
    if (at == begins or n - at < 12 or memcmp(p + at, b" HTTP/1.", 8) != 0 or p[at + 8] & 0xFE != 48
            or p[at + 9] != 13 or p[at + 10] != 10):
        return 0
    at += 11
    begins = at
    if p[at] == 13:
        return n - at > 1 and p[at + 1] == 10
    while at < n and (p[at] == 45 or p[at] == 95 or 48 <= p[at] <= 57 or 65 <= p[at] <= 90 or 97 <= p[at] <= 122):
        at += 1
    return begins < at < n and p[at] == 58


cdef bint asks(const uint8_t* p, uint32_t n) noexcept nogil:
    """Whether these are a client's first words: a head of HTTP, its preface (RFC 9113, 3.4), or methods of SOCKS 5."""
    if n > 2 and p[0] == 5:
        return n == 2 + <uint32_t>p[1] and methods(p, n)
    return n >= 24 and memcmp(p, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 24) == 0 or http_head(p, least(n, LINE_MAX))


cdef void asked_within(Parse* s, Stream* t, const uint8_t* p, uint32_t n) noexcept nogil:
    """What the side that was called says as a client in a message of another protocol. Each kind is told once."""
    if asks(p, n):
        if p[0] == 5:
            spoken_once(s, t, SOCKS5_GREETING, TOLD_GREETING)
        else:
            spoken_once(s, t, HTTP_BACKWARDS, TOLD_HTTP)
    elif n > 4 and p[0] == 5 and 1 <= p[1] <= 3 and socks_address(p, n) == <int32_t>n:
        spoken_once(s, t, SOCKS5_REQUEST, TOLD_REQUEST)


cdef bint yamux_begins(const uint8_t* p, uint32_t n) noexcept nogil:
    """Whether a side begins with a window update that opens or accepts the first stream, 1 or 2, or with a ping.

    What begins with data is not told from calls that begin with a number, a status and a length.
    """
    if n < 12 or p[0] or not (be16(p + 2) == 1 or be16(p + 2) == 2):
        return 0
    return p[1] == 1 and 1 <= be32(p + 4) <= 2 or p[1] == 2 and be32(p + 4) == 0


cdef int32_t yamux(Parse* s, Stream* t, const uint8_t* p, uint32_t n) noexcept nogil:
    """A frame (hashicorp/yamux, spec.md): version 0, type, flags, stream, and the length of data.

    Whoever sends a SYN has opened the stream. FRAMES_MAX frames are read, of data only small ones.
    """
    cdef uint32_t size
    if n < 12:
        return 0
    size = 0 if p[1] else be32(p + 8)
    if (p[0] or p[1] > 3 or be16(p + 2) > 15 or (be32(p + 4) == 0) != (p[1] > 1) or size > 0xFFFFFF
            or t.lines == FRAMES_MAX):
        return -1
    if n - 12 < size <= LINE_MAX:
        return 0
    if p[3] & 1 and p[1] < 2:
        spoken_once(s, t, YAMUX_BACKWARDS, TOLD)
    if size <= LINE_MAX:
        asked_within(s, t, p + 12, size)
    t.lines += 1
    return <int32_t>(size + 12)


cdef bint websocket_header(const uint8_t* p, uint32_t n) noexcept nogil:
    """Whether this line of a head is "Upgrade: websocket", in letters of any case."""
    cdef const uint8_t* word = b"upgrade: websocket"
    cdef uint32_t i
    if not (n == 19 and p[18] == 10 or n == 20 and p[18] == 13 and p[19] == 10):
        return 0
    for i in range(18):
        if p[i] | 32 != word[i]:
            return 0
    return 1


cdef bint broker_chosen(const uint8_t* p, uint32_t n) noexcept nogil:
    """Whether this line of a head says that within the WebSocket a broker's protocol is spoken (RFC 6455, 4.2.2).

    IANA's registry of subprotocols has "mqtt", "mqttv3.1", "amqp", "v10.stomp" and its followers, "wamp.2.json".
    """
    cdef const uint8_t* header = b"sec-websocket-protocol:"
    cdef uint32_t i
    if n < 28 or n > 64:
        return 0
    for i in range(23):
        if p[i] | (p[i] != 45 and p[i] != 58) << 5 != header[i]:
            return 0
    return (behind(p, n, b" mqtt", 5) or behind(p, n, b" amqp", 5) or behind(p, n, b" wamp", 5)
            or behind(p, n, b".stomp", 6))


cdef bint broker(const uint8_t* p, uint32_t n) noexcept nogil:
    """The first bytes to or from one that hands messages and work on: NATS, Redis, AMQP, MQTT, STOMP, ZeroMQ, nanomsg.

    nanomsg's are its mapping onto TCP (sp-tcp-mapping-01): NUL, "SP", version 0, which pattern, and zeros.
    """
    cdef uint32_t at = 2
    if n < 8:
        return 0
    if memcmp(p, b"INFO {", 6) == 0 or memcmp(p, b"AMQP\0", 5) == 0 or p[0] == 255 and n >= 10 and p[9] == 127:
        return 1
    if memcmp(p, b"\0SP\0\0", 5) == 0:
        return p[5] != 0 and be16(p + 6) == 0
    if memcmp(p, b"STOMP\n", 6) == 0 or memcmp(p, b"CONNECT\n", 8) == 0:
        return 1
    if p[0] == 42 and 49 <= p[1] <= 57:
        at = 3 if 48 <= p[2] <= 57 else 2
        return memcmp(p + at, b"\r\n$", 3) == 0
    if p[0] == 16:
        while at < 4 and p[at - 1] & 128:
            at += 1
        return memcmp(p + at, b"\0\4MQTT", 6) == 0 if n >= at + 6 else 0
    return 0


cdef bint openvpn(const uint8_t* p, uint32_t n) noexcept nogil:
    """A hard reset, the first message of either side: opcode, session, [HMAC, number, time,] acknowledged, number.

    Sizes by HMAC (none, SHA-1, SHA-256, SHA-512); tls-crypt puts number and time first and hides what is acknowledged.
    """
    cdef uint32_t number
    if p[0] == 0x38 or p[0] == 0x50:
        if p[0] == 0x38 and (n == 14 or n == 42 or n == 54 or n == 86) and be32(p + n - 4) == 0 and p[n - 5] == 0:
            number = be32(p + n - 13)
            if n == 14 or number == 1 or number == 0x0F000001:
                return 1
        if n == 54 or p[0] == 0x50 and 54 < n <= 2048:
            number = be32(p + 9)
            return number == 1 or number == 0x0F000001
        return 0
    if p[0] != 0x40:
        return 0
    if (n == 26 or n == 54 or n == 66 or n == 98) and be32(p + n - 4) == 0 and p[n - 17] == 1 and be32(p + n - 16) == 0:
        number = be32(p + n - 25)
        if n == 26 or number == 1 or number == 0x0F000001:
            return 1
    if n == 66:
        number = be32(p + 9)
        return number == 1 or number == 0x0F000001
    return 0


cdef bint ike(const uint8_t* p, uint32_t n, uint32_t size) noexcept nogil:
    """RFC 7296, 3.1 and RFC 2408, 3.1: the header of the first messages; its length is that of the datagram."""
    if size < 28 or n < 28 or be32(p + 24) != size or be32(p + 20) != 0 or (be32(p) | be32(p + 4)) == 0:
        return 0
    return p[17] == 0x20 and p[18] == 34 or p[17] == 0x10 and (p[18] == 2 or p[18] == 4)


cdef inline uint32_t x11_16(const Stream* t, const uint8_t* p) noexcept nogil:
    return p[0] | <uint32_t>p[1] << 8 if t.little else be16(p)


cdef int32_t x11_setup(Parse* s, Stream* t, const uint8_t* p, uint32_t n) noexcept nogil:
    """X Window System Protocol, 8: a client's byte order and version 11.0, or a server's word that it may; else -2."""
    t.little = p[2] == 11
    if x11_16(t, p + 2) != 11 or x11_16(t, p + 4) != 0:
        return -2
    if t.called:
        t.state = X11
        return <int32_t>(8 + 4 * x11_16(t, p + 6))
    if p[1] != 0 or (p[0] == 108) != t.little:
        return -2
    spoken(s, X11_SETUP)
    return -1


cdef int32_t x11_message(Parse* s, Stream* t, const uint8_t* p, uint32_t n) noexcept nogil:
    """An error, a reply, or an event of a server: KeyPress is 2, and none that another client made has that byte."""
    cdef uint32_t more = 0
    if n < 8:
        return 0
    if p[0] == 1 or p[0] == 35:
        more = x11_16(t, p + 4) | x11_16(t, p + 6) << 16 if t.little else be32(p + 4)
    if more > 0x3FFFFFF:
        return -1
    t.lines += p[0] == 2
    if t.lines == X11_KEYS_MIN:
        spoken(s, X11_KEYS)
        return -1
    return <int32_t>(32 + 4 * more)


cdef int32_t opening_binary(Parse* s, Stream* t, const uint8_t* p, uint32_t n) noexcept nogil:
    """The first bytes of a stream that are no text; -2 if they are of none of these protocols."""
    cdef int32_t took = -1
    if (n == 64 or n == 234) and not (p[0] == 22 and p[1] == 3) and looks_random(p, n):
        return noise(s, t, p, n)
    if p[0] == 22:
        t.state = TLS
        return tls_hello(s, t, p, n)
    if t.called and n >= 8 and p[0] == 1 or not t.called and n >= 12 and (p[0] == 108 or p[0] == 66):
        took = x11_setup(s, t, p, n)
        if took != -2:
            return took
        took = -1
    if p[0] == 5:
        took = socks5(s, t, p, n)
    elif p[0] == 4:
        took = socks4(s, t, p, n)
    if took >= 0:
        return took
    if n == 8 and p[0] == 0 and 90 <= p[1] <= 93:
        spoken(s, SOCKS4_REPLY)
        return 8 if p[1] == 90 else -1
    if n >= 16 and be16(p) >= 14 and be16(p) <= n - 2 and openvpn(p + 2, be16(p)):
        spoken(s, OPENVPN)
        return -1
    if (p[0] < 9 or 13 < p[0] < 32) and (p[0] != 27 or t.called):  # a terminal's words may begin with ECMA-48's escape
        return dns_stream(s, t, p, n)
    return -2


cdef int32_t opening(Parse* s, Stream* t, const uint8_t* p, uint32_t n) noexcept nogil:
    """The first bytes of a stream: see `opening_binary`, a pool's JSON, a banner, or text that may stand before one."""
    cdef uint32_t size
    cdef int32_t took
    cdef const uint8_t* end
    if not t.mid_line:
        if memcmp(p, b"SSH-", least(n, 4)) == 0:
            return ssh_banner(s, t, p, n) if n >= 4 else 0
        if t.text == 0:
            if broker(p, n):
                if s.brief:
                    s.rows[s.used].ip_version = s.rows[s.used].ip_version & 15 | CARRIES_BROKER
                else:
                    spoken(s, MESSAGE_BROKER)
            took = opening_binary(s, t, p, n)
            if took != -2:
                return took
    end = <const uint8_t*>memchr(p, 10, n)
    size = n if end == NULL else <uint32_t>(end - p) + 1
    if (t.proxied or t.posted == POST_HEAD) and not t.mid_line and p[0] == 13 and n == 1:
        return 0
    if t.posted >= POST_BODY and not t.mid_line:
        if t.posted == POST_BODY and (p[0] == 123 or p[0] == 91) and work(s, p, least(n, LINE_MAX)):
            return -1
        t.posted = POST_NEXT
        if n <= 5 or memcmp(p, b"POST ", 5) != 0:
            t.text += n
            return -1 if t.text > TEXT_MAX or memchr(p, 0, n) != NULL else <int32_t>n
        t.posted = POST_HEAD
    if t.upgrade and not t.mid_line and end == NULL and n < LINE_MAX:
        return 0
    if p[0] == 123 and not t.mid_line and (t.text == 0 or 0 < t.lines < LINES_MAX):
        if end == NULL and n < LINE_MAX:
            return 0
        if end != NULL and end - p < LINE_MAX:
            if t.lines == 0 and stratum(s, p, <uint32_t>(end - p)):
                return -1
            json_text(s, p, <uint32_t>(end - p))
            t.lines += 1
    elif t.text == 0:
        if size == 12 and memcmp(p, b"RFB 00", 6) == 0 and p[11] == 10:
            spoken(s, RFB_VERSION)  # RFC 6143, 7.1.1
        elif 65 <= p[0] <= 90:
            proxy_request(s, t, p, least(size, LINE_MAX))
    if not t.mid_line and end != NULL and (size == 1 or size == 2 and p[0] == 13):
        if t.proxied:
            t.proxied = 0  # the end of the request: what follows is for whoever is behind the proxy
            t.text = 0
            t.console = 0
            return <int32_t>size
        if t.posted:
            t.posted = POST_BODY
        if t.upgrade == UPGRADE_ASKED:
            t.state = WEBSOCKET
            return <int32_t>size
        if t.upgrade and not t.called:
            t.posted = POST_NEXT
        t.upgrade = 0
    elif t.upgrade and not t.mid_line and websocket_header(p, size):
        t.upgrade = UPGRADE_ASKED
    elif t.upgrade and t.called and not t.mid_line and broker_chosen(p, size):
        spoken(s, MESSAGE_BROKER)
    t.text += size
    t.mid_line = end == NULL
    if t.text > TEXT_MAX or memchr(p, 0, size) != NULL:
        return -1
    return <int32_t>size


cdef inline bint begins(const uint8_t* p, uint32_t n, const char* word, uint32_t size) noexcept nogil:
    return n >= size and memcmp(p, word, size) == 0


cdef inline bint digit(const uint8_t* p, uint32_t n, uint32_t at) noexcept nogil:
    return at < n and 48 <= p[at] <= 57


cdef bint file_mode(const uint8_t* p, uint32_t n) noexcept nogil:
    """Whether a line of `ls -l` begins here (POSIX, ls, "STDOUT"), or the sum of blocks that stands above them."""
    cdef uint32_t at = 6
    if begins(p, n, b"total ", 6):
        while digit(p, n, at):
            at += 1
        return 6 < at < n and p[at] == 10
    if n < 11 or memchr(b"-dlcbps", p[0], 7) == NULL:
        return 0
    for at in range(1, 10):
        if memchr(b"-rwxsStT", p[at], 8) == NULL:
            return 0
    return memchr(b" .+@", p[10], 4) != NULL


cdef uint8_t prints(const uint8_t* p, uint32_t n) noexcept nogil:
    """Which program's output begins here, of those that whoever came into a shell runs first; 0: none of them."""
    cdef const uint8_t* end = <const uint8_t*>memchr(p, 10, n)
    cdef uint32_t line = least(n if end == NULL else <uint32_t>(end - p), WORD_MAX)
    if begins(p, line, b"uid=", 4) and digit(p, line, 4) and behind(p, line, b" gid=", 5):
        return PRINTED_ID
    if file_mode(p, n):
        return PRINTED_LS
    if ((begins(p, line, b"USER ", 5) or begins(p, line, b"UID ", 4) or begins(p, line, b"  ", 2))
            and behind(p, least(line, 32), b" PID ", 5)):
        return PRINTED_PS
    if begins(p, line, b"root:x:0:0:", 11):
        return PRINTED_PASSWD
    if begins(p, line, b"Linux ", 6) and behind(p, line, b" #", 2):
        return PRINTED_UNAME
    if (begins(p, line, b"sh: ", 4) and digit(p, line, 4) or begins(p, line, b"bash: ", 6)
            or begins(p, line, b"/bin/sh: ", 9) or begins(p, line, b"/bin/bash: ", 11) or begins(p, line, b"zsh: ", 5)):
        return PRINTED_SHELL
    if begins(p, line, b"Filesystem ", 11) or behind(p, line, b" on /", 5) and behind(p, line, b" type ", 6):
        return PRINTED_MOUNTS
    return PRINTED_LINKS if begins(p, line, b"1: lo: <", 8) else 0


cdef uint32_t prompt(const uint8_t* p, uint32_t n) noexcept nogil:
    """The sign of the prompt that a segment ends with, and how it begins; 0: it ends with none.

    A shell's ends in "$ ", "# " (POSIX, sh, PS1), "% " (zsh, csh), or is "PS ...> ", and stands on a line of its own.
    What stands between, the directory, changes. Behind a number the sign is a unit: of progress, of a price.
    """
    cdef uint32_t at = n, word = n - 2, end
    if n < 2 or p[n - 1] != 32 or memchr(b"$#%>", p[n - 2], 4) == NULL:
        return 0
    while at and n - at <= PROMPT_MAX and p[at - 1] != 10 and p[at - 1] != 13:
        at -= 1
    if n - at > PROMPT_MAX or n - at < 2 or p[n - 2] == 62 and not begins(p + at, n - at, b"PS ", 3):
        return 0
    while word > at and p[word - 1] == 32:
        word -= 1
    end = word
    while word > at and (p[word - 1] == 46 or digit(p, n, word - 1)):
        word -= 1
    if word < end and (word == at or p[word - 1] == 32):
        return 0
    return (<uint32_t>p[n - 2] << 24 | <uint32_t>p[at] << 16 | <uint32_t>p[at + 1] << 8
            | (p[at + 2] if n - at > 2 else 0))


cdef void console(Parse* s, Stream* t, const uint8_t* p, uint32_t n) noexcept nogil:
    """A segment of text of the side that dialled: whether it is a shell's.

    An answer is what follows a word of the other side, of WORD_MAX bytes at most: a segment that acknowledges more than
    the one before it. Before PROMPTS_MIN such words, less those before which there was none, stood the same prompt; or
    answers began as those of two programs do. Who asks for pages uploads files: HTTP is left alone.
    """
    cdef uint32_t acknowledged = s.rows[s.used].acknowledgement
    cdef uint32_t sign
    cdef Stream* other
    if t.console & CONSOLE_NONE:
        return
    if t.console == 0:
        other = other_side(s, &s.rows[s.used])
        t.heard = acknowledged if other == NULL else other.first
        if behind(p, least(n, LINE_MAX), b" HTTP/1.", 8):
            t.console = CONSOLE_NONE
            return
    if 0 < acknowledged - t.heard <= WORD_MAX:
        t.prompts = t.prompts + 1 if t.console & CONSOLE_PROMPT else above(t.prompts, 1)
        if t.prompts == PROMPTS_MIN:
            spoken_once(s, t, SHELL_PROMPTS, TOLD_PROMPTS)
        t.printed |= prints(p, n)
        if t.printed & (t.printed - 1):
            spoken_once(s, t, SHELL_OUTPUT, TOLD_OUTPUT)
    t.heard = acknowledged
    t.console = CONSOLE_TEXT
    sign = prompt(p, n)
    if sign:
        t.console = CONSOLE_TEXT | CONSOLE_PROMPT
        if sign != t.prompt:
            t.prompts = 0
        t.prompt = sign


cdef int32_t message(Parse* s, Stream* t, const uint8_t* p, uint32_t n, uint32_t sequence) noexcept nogil:
    if t.state == OPENING:
        return opening(s, t, p, n)
    if t.state == TLS:
        return tls_hello(s, t, p, n)
    if t.state == RECORDS:
        return tls_record(s, t, p, n)
    if t.state == SOCKS:
        return socks(s, t, p, n)
    if t.state == DNS_STREAM:
        return dns_stream(s, t, p, n)
    if t.state == NOISE:
        return noise(s, t, p, n)
    if t.state == WEBSOCKET:
        return websocket(s, t, p, n)
    if t.state == X11:
        return x11_message(s, t, p, n)
    if t.state == YAMUX:
        return yamux(s, t, p, n)
    return ssh_packet(s, t, p, n, sequence)


# -- streams ----------------------------------------------------------------------------------------------------------

cdef void drop_buffer(Parse* s, Stream* t) noexcept nogil:
    if t.buffer != NULL:
        free(t.buffer)
        t.buffer = NULL
        s.buffers -= 1
    t.held = 0


cdef void lose(Parse* s, Stream* t) noexcept nogil:
    """Count a stream of which something was missed, once. Headers of TLS records and the like are no handshake."""
    if t.state == RECORDS or WEBSOCKET <= t.state <= GREETED:
        return
    s.streams_lost += not t.lost
    t.lost = 1


cdef void drop_talk(Stream* t) noexcept nogil:
    free(t.talk)
    t.talk = NULL


cdef void drop_ahead(Ahead* one) noexcept nogil:
    free(one.data)
    one.data = NULL
    one.stream.ahead -= 1
    one.stream = NULL


cdef void clear(Parse* s, Stream* t) noexcept nogil:
    """Free what a stream keeps."""
    cdef int i
    drop_buffer(s, t)
    drop_talk(t)
    if t.ahead:
        for i in range(AHEAD_SEGMENTS):
            if s.ahead[i].stream == t:
                drop_ahead(&s.ahead[i])


cdef void give_up(Parse* s, Stream* t) noexcept nogil:
    """Forget a stream. One that was not begun is not lost: a banner is known without its SYN."""
    if t.held or t.ahead or t.state == SSH or t.state == SSH_KEYS:
        lose(s, t)
    clear(s, t)


cdef void decide(Parse* s, Stream* t) noexcept nogil:
    """Read no further; but behind what may be a greeting, see how each segment begins."""
    if t.greets:
        drop_buffer(s, t)
        drop_talk(t)
        t.state = GREETED
    else:
        clear(s, t)
        t.state = DECIDED


cdef void afresh(Parse* s, Stream* t) noexcept nogil:
    """Read what comes next as the first message."""
    drop_buffer(s, t)
    drop_talk(t)
    t.skip = 0
    t.text = 0
    t.state = OPENING
    t.mid_line = 0
    t.proxied = 0
    t.told = 0
    t.posted = 0
    t.upgrade = 0
    t.lines = 0
    t.little = 0
    t.greets = 0
    t.console = 0
    t.prompts = 0
    t.printed = 0


cdef bint answers(const uint8_t* p, uint32_t n) noexcept nogil:
    """Whether a status line begins here, of HTTP or what is like it (ICAP, RTSP, SIP)."""
    cdef uint32_t at = 0
    while at < n and at < 4 and 65 <= p[at] <= 90:
        at += 1
    return at > 2 and at < n and p[at] == 47


cdef void greeting(Parse* s, Stream* t, const uint8_t* p, uint32_t n) noexcept nogil:
    """Of the side that was called: behind a greeting of at most GREETING_MAX bytes a segment may be a client's first.

    So it is where a tunnel's end says that somebody came, and then lets him speak: frp, bore. What follows a status
    line is its body, or what an upgrade led to: Docker's daemon calls the client of a build back so.
    """
    if t.wanted == t.first and t.called and yamux_begins(p, n):
        t.state = YAMUX
    elif t.wanted == t.first:
        t.greets = t.called and not answers(p, n)
    elif t.greets and t.wanted - t.first > GREETING_MAX:
        t.greets = 0
        if t.state == GREETED:
            decide(s, t)
    elif t.greets and asks(p, n):
        afresh(s, t)


cdef void hold(Parse* s, Stream* t, const uint8_t* p, uint32_t n) noexcept nogil:
    """Keep the beginning of a message until the rest arrives."""
    if n >= MESSAGE_MAX:
        decide(s, t)
        return
    if s.buffers < BUFFERS_MAX:
        t.buffer = <uint8_t*>malloc(MESSAGE_MAX)
    if t.buffer == NULL:
        lose(s, t)
        decide(s, t)
        return
    s.buffers += 1
    memcpy(t.buffer, p, n)
    t.held = n


cdef uint32_t read_held(Parse* s, Stream* t, const uint8_t* p, uint32_t n, uint32_t sequence) noexcept nogil:
    """Go on with the message in the buffer; return how many of the new bytes it took."""
    cdef uint32_t held = t.held
    cdef uint32_t used = least(MESSAGE_MAX - held, n)
    cdef int32_t took
    memcpy(t.buffer + held, p, used)
    took = message(s, t, t.buffer, held + used, sequence - held)
    if took == 0 and held + used < MESSAGE_MAX:
        t.held += used
        return used
    # What was held was no whole message, so a message takes more than that.
    if took <= <int32_t>held:
        decide(s, t)
        return n
    drop_buffer(s, t)
    if <uint32_t>took > held + used:
        t.skip = <uint32_t>took - held - used
        return used
    return <uint32_t>took - held


cdef void read_stream(Parse* s, Stream* t, const uint8_t* p, uint32_t n, uint32_t sequence) noexcept nogil:
    """Read bytes in order. Each round takes at least one byte, or is the last."""
    cdef uint32_t at = 0, part
    cdef int32_t took
    while at < n and t.state < GREETED:
        if t.skip:
            part = least(t.skip, n - at)
            t.skip -= part
            at += part
        elif t.held:
            at += read_held(s, t, p + at, n - at, sequence + at)
        else:
            took = message(s, t, p + at, n - at, sequence + at)
            if took < 0:
                decide(s, t)
            elif took == 0:
                hold(s, t, p + at, n - at)
                return
            else:
                part = least(<uint32_t>took, n - at)
                t.skip = <uint32_t>took - part
                at += part


cdef void keep_ahead(Parse* s, Stream* t, uint32_t sequence, const uint8_t* p, uint32_t have,
                     uint32_t size) noexcept nogil:
    """Have a segment wait for what is missing before it. What cannot wait will not come again: the receiver has it."""
    cdef Ahead* one
    cdef int i
    if t.lost and t.ahead >= AHEAD_MAX:
        return
    if t.ahead:
        for i in range(AHEAD_SEGMENTS):
            if s.ahead[i].stream == t and s.ahead[i].sequence == sequence and s.ahead[i].size == size:
                return
    if t.ahead >= AHEAD_MAX or have > MESSAGE_MAX:
        lose(s, t)
        return
    one = &s.ahead[s.ahead_next % AHEAD_SEGMENTS]
    if one.stream != NULL:
        lose(s, one.stream)
        drop_ahead(one)
    one.data = <uint8_t*>malloc(have + 1)
    if one.data == NULL:
        lose(s, t)
        return
    memcpy(one.data, p, have)
    one.stream = t
    one.sequence = sequence
    one.have = have
    one.size = size
    t.ahead += 1
    s.ahead_next += 1


cdef inline bint beyond(const Stream* t, uint32_t sequence) noexcept nogil:
    """Whether bytes lack before this one that are to be read."""
    return <int32_t>(t.wanted - sequence) < 0 and sequence - t.wanted > t.skip


cdef Ahead* next_ahead(Parse* s, Stream* t) noexcept nogil:
    """Return the first of the segments that wait if it is in order now, else NULL."""
    cdef Ahead* first = NULL
    cdef int i
    for i in range(AHEAD_SEGMENTS):
        if s.ahead[i].stream == t and (first == NULL or <int32_t>(s.ahead[i].sequence - first.sequence) < 0):
            first = &s.ahead[i]
    return NULL if beyond(t, first.sequence) else first


cdef void advance(Parse* s, Stream* t, uint32_t sequence, const uint8_t* p, uint32_t have,
                  uint32_t size) noexcept nogil:
    """Read what of this segment is in order and new, and then of those that waited for it."""
    cdef Ahead* one
    cdef Ahead taken
    if beyond(t, sequence):
        if t.state == GREETED and sequence - t.first > GREETING_MAX:
            t.greets = 0
            decide(s, t)
        else:
            keep_ahead(s, t, sequence, p, have, size)
        return
    read_segment(s, t, sequence, p, have, size)
    while t.ahead:  # none is left when the stream is decided
        one = next_ahead(s, t)
        if one == NULL:
            return
        taken = one[0]
        one.data = NULL
        drop_ahead(one)
        read_segment(s, t, taken.sequence, taken.data, taken.have, taken.size)
        free(taken.data)


cdef void read_segment(Parse* s, Stream* t, uint32_t sequence, const uint8_t* p, uint32_t have,
                       uint32_t size) noexcept nogil:
    """Read what is new of a segment before which nothing lacks; ``have`` of its ``size`` bytes were captured."""
    cdef int32_t old = <int32_t>(t.wanted - sequence)
    if old < 0:
        t.skip -= sequence - t.wanted
        t.wanted = sequence
        old = 0
    if <uint32_t>old >= size:
        return
    size -= <uint32_t>old
    p += least(<uint32_t>old, have)
    have = above(have, <uint32_t>old)
    greeting(s, t, p, have)
    read_stream(s, t, p, have, t.wanted)
    if t.state == OPENING and t.text and have and not t.called:
        console(s, t, p, have)
    t.wanted += size
    size -= have
    if t.state >= GREETED or size == 0:
        return
    # The snap length cut bytes away that will not come again. A KEXINIT so cut is lost, not where its packet ends.
    if t.state == SSH and t.held >= 6 and t.buffer[5] == 20:
        lose(s, t)
        t.skip = be32(t.buffer) + 4 - t.held
        t.state = SSH_KEYS
        drop_buffer(s, t)
    if size > t.skip:
        lose(s, t)
        decide(s, t)
    else:
        t.skip -= size


cdef inline uint64_t stream_hash(const Row* row, uint64_t seed) noexcept nogil:
    return ends_hash(row.source, row.destination, <uint64_t>row.source_port << 16 | row.destination_port, seed)


cdef inline uint32_t tag_of(uint64_t h) noexcept nogil:
    return <uint32_t>h << 2 | TAG_TAKEN


cdef inline bint decided(Parse* s, uint64_t h) noexcept nogil:
    """Whether this is a stream that is not read any more: most segments are of one, and touch no other memory.

    It is known by 30 bits of its hash, beside those of its set: one stream in 10**8 is taken for another.
    """
    cdef uint32_t base = <uint32_t>(h >> 40) % SETS * WAYS
    cdef uint32_t tag = tag_of(h) | TAG_DECIDED
    cdef bint found = 0
    cdef int i
    for i in range(WAYS):
        found |= s.tags[base + i] == tag
    return found


cdef inline Stream* find(Parse* s, const Row* row, uint64_t h) noexcept nogil:
    cdef uint32_t base = <uint32_t>(h >> 40) % SETS * WAYS
    cdef uint32_t tag = tag_of(h)
    cdef int i
    for i in range(WAYS):
        if (s.tags[base + i] & ~<uint32_t>TAG_DECIDED == tag
                and memcmp(s.streams[base + i].key, <const uint8_t*>row + 8, 36) == 0):
            return &s.streams[base + i]
    return NULL


cdef Stream* other_side(Parse* s, const Row* row) noexcept nogil:
    """The stream of the other side, NULL if it is not in the table."""
    cdef Row back
    memcpy(back.source, row.destination, 16)
    memcpy(back.destination, row.source, 16)
    back.source_port = row.destination_port
    back.destination_port = row.source_port
    return find(s, &back, stream_hash(&back, s.seed))


cdef Stream* place(Parse* s, const Row* row, uint64_t h) noexcept nogil:
    """Take a free way of the set, else that of its oldest decided stream, else of its oldest."""
    cdef uint32_t base = <uint32_t>(h >> 40) % SETS * WAYS
    cdef uint32_t chosen = base
    cdef uint64_t age, oldest = 0
    cdef int i
    cdef Stream* t
    for i in range(WAYS):
        if s.tags[base + i] == 0:
            chosen = base + i
            oldest = 0
            break
        t = &s.streams[base + i]
        age = (<uint64_t>(t.state >= GREETED) << 32 | <uint32_t>(s.clock - t.used)) + 1
        if age > oldest:
            oldest = age
            chosen = base + i
    t = &s.streams[chosen]
    if oldest:
        give_up(s, t)
    s.tags[chosen] = tag_of(h)
    memset(t, 0, sizeof(Stream))
    memcpy(t.key, <const uint8_t*>row + 8, 36)
    return t


cdef void start(Parse* s, Stream* t, uint32_t first) noexcept nogil:
    """Begin anew; what waits, waits on, and who was called stays."""
    afresh(s, t)
    s.tags[t - s.streams] &= ~<uint32_t>TAG_DECIDED
    t.first = first
    t.wanted = first
    t.lost = 0
    t.with_syn = 0


cdef inline void segment(Parse* s, const Row* row, const uint8_t* p, uint32_t have, uint32_t size) noexcept nogil:
    """One TCP segment with data or a SYN.

    A stream begins with its SYN, or where that was not seen, with a banner or a ClientHello. RFC 9293, 3.10.7.4: nobody
    takes the data of a reset, nor of what has neither ACK nor SYN. RFC 7413, 4.2: those of a SYN may be refused, and
    come again.
    """
    cdef uint64_t h
    cdef uint32_t sequence = row.sequence
    cdef Stream* t
    if row.tcp_flags & RST or not row.tcp_flags & (SYN | ACK):
        return
    h = stream_hash(row, s.seed)
    if not row.tcp_flags & SYN and decided(s, h):
        return
    t = find(s, row, h)
    if row.tcp_flags & SYN:
        sequence += 1
        if t == NULL:
            t = place(s, row, h)
            start(s, t, sequence)
        elif t.first != sequence:
            give_up(s, t)
            start(s, t, sequence)
        t.called = row.tcp_flags & ACK != 0
        if size and t.wanted == sequence:
            t.with_syn = 1
    elif t == NULL:
        if not (have >= 4 and memcmp(p, b"SSH-", 4) == 0
                or have >= 6 and p[0] == 22 and p[1] == 3 and p[2] <= 4 and p[5] == 1):
            return
        t = place(s, row, h)
        start(s, t, sequence)
    elif t.with_syn:
        if sequence == t.first:
            start(s, t, sequence)
        elif sequence == t.wanted:
            t.with_syn = 0
        elif t.state == DECIDED:
            lose(s, t)
    if t.state >= DECIDED:
        if not t.with_syn:
            s.tags[t - s.streams] |= TAG_DECIDED
        return
    s.clock += 1
    t.used = s.clock
    if t.wanted == t.first and size > 1 and <int32_t>(sequence - t.first) < 0:  # its SYN was not the connection's
        lose(s, t)
    advance(s, t, sequence, p, have, size)
    if row.tcp_flags & FIN and t.wanted == sequence + size:
        t.greets = 0
        decide(s, t)


# -- DNS --------------------------------------------------------------------------------------------------------------

cdef uint32_t dns_question(const uint8_t* p, uint32_t n) noexcept nogil:
    """Return where the name that begins at 12 ends; 0 if it is not one. A first name cannot be compressed."""
    cdef uint32_t at = 12
    while at < n and at - 12 < 255:
        if p[at] == 0:
            return at + 1
        if p[at] > 63:
            return 0
        at += 1 + p[at]
    return 0


cdef uint32_t dns_answers(const uint8_t* p, uint32_t n, uint32_t at, uint32_t count, uint32_t size) noexcept nogil:
    """The sum of RDLENGTH over the answer section, no more than the message has left."""
    cdef uint32_t total = 0, data
    while count:
        count -= 1
        while at < n and 0 < p[at] < 64:
            at += 1 + p[at]
        if at >= n:
            break
        at += 2 if p[at] >= 192 else 1
        if at > n or n - at < 10:
            break
        data = least(be16(p + at + 8), above(size, at + 10))
        total += data
        at += 10 + data
    return total


cdef uint32_t dns_name(const uint8_t* p, uint32_t n, uint32_t at, uint8_t* out) noexcept nogil:
    """Write the name at ``at`` out whole and in lower case, at most 255 bytes; return its length, 0 if it is none.

    RFC 1035, 4.1.4: a pointer goes back, here to before where the part that it ends began, so that there is an end.
    """
    cdef uint32_t used = 0, size, i, began = at
    while at < n:
        if p[at] >= 192:
            if n - at < 2 or be16(p + at) & 0x3FFF >= began:
                return 0
            at = began = be16(p + at) & 0x3FFF
        elif p[at] > 63:
            return 0
        elif p[at] == 0:
            out[used] = 0
            return used + 1
        else:
            size = 1 + p[at]
            if size > n - at or used + size > 254:
                return 0
            for i in range(size):
                out[used + i] = p[at + i] | 32 if 65 <= p[at + i] <= 90 else p[at + i]
            used += size
            at += size
    return 0


cdef void dns_addresses(Parse* s, FactNote* fact, const uint8_t* p, uint32_t n, uint32_t at,
                        uint32_t count) noexcept nogil:
    """Put what the answer says of the question: the least TTL, how many addresses, the addresses, other names for it.

    A record counts if it belongs to the question, or to what a CNAME before it made of the question: what else a server
    adds, nobody asked for.
    """
    cdef uint8_t names[ALIASES_MAX + 1][256]
    cdef uint32_t sizes[ALIASES_MAX + 1]
    cdef uint8_t head[5 + 16 * ADDRESSES_MAX]
    cdef uint8_t owner[256]
    cdef uint32_t known = 1, found = 0, i, size, kind, ttl, data, least_ttl = 0xFFFFFFFF
    count = least(count, ANSWERS_MAX)
    sizes[0] = dns_name(p, n, 12, names[0])
    while count and sizes[0]:
        count -= 1
        size = dns_name(p, n, at, owner)
        while at < n and 0 < p[at] < 64:
            at += 1 + p[at]
        if size == 0 or at >= n:
            break
        at += 2 if p[at] >= 192 else 1
        if at > n or n - at < 10:
            break
        kind = be16(p + at)
        ttl = be32(p + at + 4)
        data = be16(p + at + 8)
        if be16(p + at + 2) & 0x7FFF != 1:  # mDNS marks the class, RFC 6762, 10.2
            kind = 0
        at += 10
        if data > n - at:
            break
        for i in range(known):
            if sizes[i] == size and memcmp(names[i], owner, size) == 0:
                break
        else:
            kind = 0
        if (kind == 1 and data == 4 or kind == 28 and data == 16) and found < ADDRESSES_MAX:
            memset(head + 5 + 16 * found, 0, 10)
            memset(head + 15 + 16 * found, 255, 2)
            memcpy(head + 5 + 16 * found + 16 - data, p + at, data)
            found += 1
            least_ttl = least(least_ttl, ttl)
        elif kind == 5 and known <= ALIASES_MAX:
            sizes[known] = dns_name(p, n, at, names[known])
            if sizes[known]:
                known += 1
                least_ttl = least(least_ttl, ttl)
        at += data
    if least_ttl > 0x7FFFFFFF:  # RFC 2181, 8: then it is zero
        least_ttl = 0
    head[0] = <uint8_t>(least_ttl >> 24)
    head[1] = <uint8_t>(least_ttl >> 16 & 255)
    head[2] = <uint8_t>(least_ttl >> 8 & 255)
    head[3] = <uint8_t>(least_ttl & 255)
    head[4] = <uint8_t>found
    put(s, fact, head, 5 + 16 * found)
    for i in range(1, known):
        put(s, fact, names[i], sizes[i])


cdef bint plain_name(const uint8_t* p, uint32_t n) noexcept nogil:
    """Whether a name is at most BRIEF_NAME_BYTES long when written out. Others than letters are written longer."""
    cdef uint32_t i, at = 0
    if n > BRIEF_NAME_BYTES + 2:
        return 0
    while at < n and p[at]:
        for i in range(at + 1, at + 1 + p[at]):
            if not (p[i] == 45 or p[i] == 95 or 48 <= p[i] <= 57 or 65 <= p[i] <= 90 or 97 <= p[i] <= 122):
                return 0
        at += 1 + p[at]
    return 1


cdef bint dns_elsewhere(const uint8_t* p, uint32_t flags, uint32_t at) noexcept nogil:
    """Whether all the rest is what a resolver would send, where no port says that this is DNS."""
    if be16(p + at + 2) != 1 or flags & 0x0040 or be16(p + 10) > 2 and not (flags & 0x8000):
        return 0
    return bool(flags & 0x8000) or not (be16(p + 6) or be16(p + 8))


cdef bint dns(Parse* s, Stream* t, const uint8_t* p, uint32_t n, uint32_t size, bint expected) noexcept nogil:
    """One question, opcode QUERY; return whether that is what it is. ``t``: its stream, NULL for a datagram."""
    cdef uint32_t flags, at
    cdef FactNote* fact
    if n < 17 or be16(p + 4) != 1:
        return 0
    flags = be16(p + 2)
    if flags & 0x7800:
        return 0
    at = dns_question(p, n)
    if at == 0 or n - at < 4 or not (expected or dns_elsewhere(p, flags, at)):
        return 0
    if s.brief and plain_name(p + 12, at - 12) and (not (flags & 0x8000) or be16(p + at) == 1 or be16(p + at) == 28):
        s.rows[s.used].ip_version = s.rows[s.used].ip_version & 15 | CARRIES_DNS
        return 1
    if t != NULL and not t.told:
        t.told = 1
        spoken(s, DNS_TCP)
    fact = note(s, DNS, (be16(p + at) << 1) | (flags >> 15),
                dns_answers(p, n, at + 4, be16(p + 6), size) if flags & 0x8000 else 0)
    put(s, fact, p + 12, at - 12)
    if flags & 0x8000 and be16(p + 6) and (not s.brief or be16(p + at) == 28):
        dns_addresses(s, fact, p, n, at + 4, be16(p + 6))
    return 1


cdef int32_t dns_stream(Parse* s, Stream* t, const uint8_t* p, uint32_t n) noexcept nogil:
    """RFC 7766, 8: each message behind its length. The first one's length may come alone, or with the whole header."""
    cdef uint32_t size
    if n < 2:
        return 0 if t.state == DNS_STREAM else -1
    size = be16(p)
    if size < 17 or size + 2 > MESSAGE_MAX:
        return -1
    if n < 14:
        return 0 if t.state == DNS_STREAM or n == 2 and size <= 512 else -1
    if be16(p + 6) != 1 or be16(p + 4) & 0x7800:
        return -1
    t.state = DNS_STREAM
    if n < size + 2:
        return 0
    # A packet has room for so many facts; who puts more questions than that into one is no resolver.
    if s.facts_used >= FACTS_ROOM - 2 and s.facts[s.facts_used - (FACTS_ROOM - 2)].row == s.used:
        lose(s, t)
        return -1
    if not dns(s, t, p + 2, size, size, 0):
        return -1
    return <int32_t>(size + 2)


# -- datagrams --------------------------------------------------------------------------------------------------------

cdef void wireguard_data(Parse* s, const Row* row, const uint8_t* p) noexcept nogil:
    """Told when DATAGRAMS_MIN came to one receiver, each numbered a little higher than the one before."""
    cdef uint64_t h = stream_hash(row, s.seed)
    cdef Stream* t = find(s, row, h)
    cdef uint32_t number
    memcpy(&number, p + 8, 4)
    if t == NULL:
        t = place(s, row, h)
        t.state = DATAGRAMS
    elif t.state != DATAGRAMS or t.told:
        return
    if t.text == 0 or be32(p + 4) != t.first or number - t.wanted - 1 > 1023:
        t.text = 0
        t.first = be32(p + 4)
    t.wanted = number
    t.text += 1
    s.clock += 1
    t.used = s.clock
    if t.text == DATAGRAMS_MIN:
        t.told = 1
        spoken(s, WIREGUARD)


cdef inline void datagram(Parse* s, const Row* row, const uint8_t* p, uint32_t n, uint32_t size) noexcept nogil:
    """One UDP payload of ``size`` bytes of which ``n`` were captured."""
    cdef bint expected = (row.source_port == 53 or row.destination_port == 53
                          or row.source_port == 5353 or row.destination_port == 5353)
    if n < 14 or dns(s, NULL, p, n, size, expected):
        return
    if 1 <= p[0] <= 4 and (p[1] | p[2] | p[3]) == 0 and n >= 16:
        if p[0] == 1 and size == 148 or p[0] == 2 and size == 92:
            spoken(s, WIREGUARD)
        elif p[0] == 4 and size >= 32 and size % 16 == 0 and (p[12] | p[13] | p[14] | p[15]) == 0:
            wireguard_data(s, row, p)
    elif n == size and (p[0] == 0x38 or p[0] == 0x40 or p[0] == 0x50) and openvpn(p, n):
        spoken(s, OPENVPN)
    elif ike(p, n, size) or n >= 32 and be32(p) == 0 and ike(p + 4, n - 4, size - 4):  # RFC 3948, 2.2
        spoken(s, IKE)


# -- frames -----------------------------------------------------------------------------------------------------------

cdef void tcp(Parse* s, Row* row, const uint8_t* p, uint32_t have, uint32_t size) noexcept nogil:
    cdef uint32_t header
    row.payload_bytes = above(size, 20)
    if have < 20:
        return
    row.sequence = be32(p + 4)
    row.acknowledgement = be32(p + 8)
    row.tcp_flags = p[13]
    header = (p[12] >> 4) * 4
    if header < 20 or header > size:
        s.malformed += 1
        row.payload_bytes = 0
        return
    row.payload_bytes = size - header
    if row.tcp_flags & URG and size > header and be16(p + 18):
        s.urgent += 1
    if row.payload_bytes or row.tcp_flags & SYN:
        segment(s, row, p + least(header, have), above(have, header), row.payload_bytes)


cdef inline void transport(Parse* s, Row* row, const uint8_t* p, uint32_t have, uint32_t size,
                           bint portless) noexcept nogil:
    """Fill ports and sizes from ``size`` bytes of IP payload, of which ``have`` were captured, and end the row."""
    row.payload_bytes = size
    if portless:
        pass
    elif row.protocol == 6 or row.protocol == 17:
        if have >= 4:
            row.source_port = <uint16_t>be16(p)
            row.destination_port = <uint16_t>be16(p + 2)
        if row.protocol == 6:
            tcp(s, row, p, have, size)
        else:
            row.payload_bytes = above(size, 8)
            if have > 8:
                datagram(s, row, p + 8, have - 8, size - 8)
    elif row.protocol == 1 or row.protocol == 58:
        row.payload_bytes = above(size, 8)
        if have >= 2:
            row.source_port = <uint16_t>be16(p)
        if have >= 8:
            row.destination_port = <uint16_t>be16(p + 4)
            row.sequence = be16(p + 6)
    s.used += 1


cdef inline void ipv4(Parse* s, Row* row, const uint8_t* p, uint32_t n, uint32_t wire) noexcept nogil:
    cdef uint32_t header, total, place
    if n < 20:
        s.malformed += 1
        return
    header = (p[0] & 15) * 4
    total = be16(p + 2)
    if total == 0:  # segmentation offload: the length did not fit or was left to the hardware
        total = wire
    if header < 20 or total < header:
        s.malformed += 1
        return
    row.source[10] = row.source[11] = row.destination[10] = row.destination[11] = 255
    memcpy(&row.source[12], p + 12, 4)
    memcpy(&row.destination[12], p + 16, 4)
    row.ip_version = 4
    row.protocol = p[9]
    place = be16(p + 6) & 0x3FFF  # of a fragment; the upper bit: more follow
    if place:
        fragment(s, row, p[9], be16(p + 4), (place & 0x1FFF) * 8, place >> 13, 0, p + least(header, n),
                 above(least(n, total), header), total - header, 0)
    else:
        transport(s, row, p + least(header, n), above(least(n, total), header), total - header, 0)


cdef inline void ipv6(Parse* s, Row* row, const uint8_t* p, uint32_t n, uint32_t wire) noexcept nogil:
    """Extension headers as RFC 7045 lists them; where one is not all there, the row keeps its number, portless.

    A fragment header with nothing before or behind it is of a whole packet, RFC 6946; in a fragment it is the last.
    """
    cdef uint32_t size, kind, length, at = 40, place = 0, cut = 0
    cdef bint portless = 0
    cdef int i
    if n < 40:
        s.malformed += 1
        return
    memcpy(row.source, p + 8, 16)
    memcpy(row.destination, p + 24, 16)
    row.ip_version = 6
    size = be16(p + 4)
    kind = p[6]
    if size == 0 and kind != 59:  # a jumbogram, or segmentation offload
        size = above(wire, 40)
    n = least(n, 40 + size)
    for i in range(EXTENSION_HEADERS_MAX):
        if not (kind == 0 or kind == 43 or kind == 44 or kind == 51 or kind == 60 or kind == 135 or kind == 139
                or kind == 140):
            break
        if n - at < 8:
            portless = 1
            break
        length = 8 if kind == 44 else (p[at + 1] + 2) * 4 if kind == 51 else (p[at + 1] + 1) * 8
        if length > n - at:
            portless = 1
            break
        if kind == 44 and be16(p + at + 2) & 0xFFF9:
            portless = cut != 0 or be16(p + at + 2) & 0xFFF8 != 0
            cut = cut or at
        kind = p[at]
        at += length
        if portless:
            break
    row.protocol = <uint8_t>kind
    if cut:
        place = be16(p + cut + 2)
        fragment(s, row, 44, be32(p + cut + 4), place & 0xFFF8, place & 1, at - cut - 8, p + at, n - at,
                 40 + size - at, portless)
    else:
        transport(s, row, p + at, n - at, 40 + size - at, portless)


cdef inline void network(Parse* s, const uint8_t* p, uint32_t n, uint32_t wire, uint32_t frame_bytes,
                         int64_t time_ns, uint32_t packet_type) noexcept nogil:
    """One IP packet of ``wire`` bytes of which ``n`` were captured, whatever link layer it came in."""
    cdef Row* row = &s.rows[s.used]
    if n == 0:
        s.malformed += 1
        return
    memset(row, 0, sizeof(Row))
    row.time_ns = time_ns
    row.frame_bytes = frame_bytes
    row.packet_type = <uint8_t>packet_type
    if p[0] >> 4 == 4:
        ipv4(s, row, p, n, wire)
    elif p[0] >> 4 == 6:
        ipv6(s, row, p, n, wire)
    else:
        s.malformed += 1


cdef bint known_link(uint32_t link) noexcept nogil:
    return (link == 0 or link == 1 or link == 12 or link == 14 or link == 101 or link == 108 or link == 113
            or link == 228 or link == 229 or link == 276)


cdef inline bint is_tag(uint32_t kind) noexcept nogil:
    return kind >= 0x8100 and (kind == 0x8100 or kind == 0x88A8 or kind == 0x9100)


cdef inline uint32_t past_tags(const uint8_t* p, uint32_t n, uint32_t at, uint32_t* kind) noexcept nogil:
    """Return where what the VLAN tags at ``at`` hold begins; ``kind``, theirs at first, is then of what they hold."""
    cdef int i
    for i in range(VLAN_TAGS_MAX):
        if not is_tag(kind[0]) or n < at + 4:
            break
        kind[0] = be16(p + at + 2)
        at += 4
    return at


cdef void frame(Parse* s, uint32_t link, const uint8_t* p, uint32_t n, uint32_t wire, int64_t time_ns,
                uint32_t packet_type) noexcept nogil:
    """One frame of ``wire`` bytes of which ``n`` were captured. Not IP, or not well-formed IP: counted, no row."""
    cdef uint32_t at = 0, kind = 0x0800
    s.frames += 1
    wire = n if wire < n else wire
    if link == 1:
        at = 14
        kind = be16(p + 12) if n >= 14 else 0
    elif link == 113:
        at = 16
        kind = be16(p + 14) if n >= 16 else 0
        packet_type = p[1] if n >= 16 else packet_type
    elif link == 276:
        at = 20
        kind = be16(p) if n >= 20 else 0
        packet_type = p[10] if n >= 20 else packet_type
    elif link == 0 or link == 108:  # the family number differs by system, the version of IP does not
        at = 4
    at = past_tags(p, n, at, &kind)
    if kind != 0x0800 and kind != 0x86DD or n < at:
        s.other += 1
        return
    network(s, p + at, n - at, wire - at, wire, time_ns, packet_type)


# -- Python's view ----------------------------------------------------------------------------------------------------

_PRINTABLE = bytes(b if 32 <= b < 127 else 63 for b in range(256))
_LABEL = tuple("\\" + chr(b) if b in b".\\" else chr(b) if 32 < b < 127 else f"\\{b:03d}" for b in range(256))

_PLAIN = bytes(b for b in range(33, 127) if b not in b".\\")


def _text(data):
    """Printable ASCII, "?" for every other byte."""
    return data.translate(_PRINTABLE).decode("ascii")


def _names(data):
    return tuple(_text(data).split(",")) if data else ()


def _kexinit(row, data):
    lists, at = [], 0
    for _ in range(8):
        size = int.from_bytes(data[at:at + 4], "big")
        lists.append(_names(data[at + 4:at + 4 + size]))
        at += 4 + size
    return SshKexInit(row, *lists)


def _hello(row, data, encrypted):
    size = int.from_bytes(data[:2], "big")
    at, names = 2 + size, []
    while at < len(data):
        names.append(_text(data[at + 1:at + 1 + data[at]]))
        at += 1 + data[at]
    return TlsClientHello(row, _text(data[2:2 + size]), tuple(names), encrypted)


def _name(data):
    """The name as in a master file (RFC 1035, 5.1): other bytes than printable ones as backslash and three digits."""
    at, labels = 0, []
    while data[at]:
        label = data[at + 1:at + 1 + data[at]]
        plain = not label.translate(None, _PLAIN)
        labels.append(label.decode("ascii") if plain else "".join(_LABEL[b] for b in label))
        at += 1 + data[at]
    return ".".join(labels)


def _dns(row, kind, answer_bytes, data):
    """A message, with what `dns_addresses` put behind its name."""
    at = _end(data, 0)
    said = DnsMessage(row, bool(kind & 1), _name(data), kind >> 1, answer_bytes)
    if at == len(data):
        return said
    ttl_s, count, at = int.from_bytes(data[at:at + 4], "big"), data[at + 4], at + 5
    addresses = tuple(data[at + 16 * i:at + 16 * (i + 1)] for i in range(count))
    aliases, at = [], at + 16 * count
    while at < len(data):
        aliases.append(_name(data[at:]))
        at = _end(data, at)
    return DnsMessage(row, True, said.name, said.query_type, answer_bytes, addresses, tuple(aliases), ttl_s)


def _end(data, at):
    while data[at]:
        at += 1 + data[at]
    return at + 1


def _inflated(inflaters, slot, further, data):
    """A message of RFC 7692, the first of the stream in this slot or a further one; nothing if one before failed."""
    one = inflaters.pop(slot, None) if further else zlib.decompressobj(-15)
    if one is None:
        return b""
    try:
        text = one.decompress(data + b"\0\0\xff\xff", MESSAGE_MAX)
    except zlib.error:
        return b""
    if not one.unconsumed_tail and not one.eof:
        inflaters[slot] = one
        if len(inflaters) > INFLATERS_MAX:
            inflaters.popitem(last=False)
    return text[:LINE_MAX]


def _records(row, data):
    used = (len(data) - 8) // 6
    first_ns = int.from_bytes(data[:8], "little", signed=True)
    after_ms = np.frombuffer(data, "<u4", used, 8).tolist()
    sizes = np.frombuffer(data, "<u2", used, 8 + 4 * used).tolist()
    return TlsRecords(row, tuple(first_ns + 1_000_000 * ms for ms in after_ms), tuple(sizes))


cdef class Parser:
    """Turns frames into rows and facts. Streams live as long as the parser, rows and facts until `take`.

    ``rows_max``: rows of one block. ``seed`` goes into the hash of streams: any number where the result must not
    depend on the run, a secret one where somebody may aim at the table. ``brief``: of a ClientHello and of DNS that can
    hold no data make no fact, only a mark in the row (see `records.PACKET`).
    """

    cdef Parse s
    cdef object rows
    cdef object inflaters
    cdef list pool

    def __cinit__(self, *, int rows_max=8192, uint64_t seed=0, bint brief=False):
        if rows_max < 1:
            raise ValueError("rows_max must be at least 1")
        memset(&self.s, 0, sizeof(Parse))
        self.s.rows_max = rows_max
        self.s.seed = seed
        self.s.brief = brief
        self.pool = []
        self.inflaters = OrderedDict()
        self.s.facts = <FactNote*>malloc(FACTS_MAX * sizeof(FactNote))
        self.s.arena = <uint8_t*>malloc(ARENA_BYTES)
        self.s.scratch = <uint8_t*>malloc(MESSAGE_MAX)
        self.s.tags = <uint32_t*>calloc(SETS * WAYS, sizeof(uint32_t))
        self.s.streams = <Stream*>calloc(SETS * WAYS, sizeof(Stream))
        self.s.ahead = <Ahead*>calloc(AHEAD_SEGMENTS, sizeof(Ahead))
        self.s.datagrams = <Datagram*>calloc(DATAGRAM_SETS * DATAGRAM_WAYS, sizeof(Datagram))
        # Pages are taken when written to: as long as nobody fragments, none is.
        self.s.held = <uint8_t*>malloc(DATAGRAM_SETS * DATAGRAM_WAYS * HELD_BYTES)
        if NULL in (self.s.facts, self.s.arena, self.s.scratch, self.s.tags, self.s.streams, self.s.ahead,
                    self.s.datagrams, self.s.held):
            raise MemoryError
        self._fresh()

    def __dealloc__(self):
        cdef int i
        if self.s.streams != NULL:
            for i in range(SETS * WAYS):
                free(self.s.streams[i].buffer)
                free(self.s.streams[i].talk)
        if self.s.ahead != NULL:
            for i in range(AHEAD_SEGMENTS):
                free(self.s.ahead[i].data)
        free(self.s.facts)
        free(self.s.arena)
        free(self.s.scratch)
        free(self.s.tags)
        free(self.s.streams)
        free(self.s.ahead)
        free(self.s.datagrams)
        free(self.s.held)

    cdef _fresh(self):
        """Begin new rows, in old ones that nobody has any more: fresh pages cost more than writing to them."""
        self.rows = None
        for rows in self.pool:
            if Py_REFCNT(rows) == 2:  # the pool's own and this loop's
                self.rows = rows
                break
        if self.rows is None:
            self.rows = np.empty(self.s.rows_max, dtype=PACKET)
            self.pool = [self.rows, *self.pool[:POOL_MAX - 1]]
        cdef Py_buffer memory
        PyObject_GetBuffer(self.rows, &memory, PyBUF_ND | PyBUF_WRITABLE)
        self.s.rows = <Row*>memory.buf
        PyBuffer_Release(&memory)  # the array is ours, and stays where it is
        self.s.used = 0
        self.s.facts_used = 0
        self.s.arena_used = 0

    def frame(self, unsigned int link, const unsigned char[::1] data, long long time_ns, *, wire_bytes=None,
              unsigned int packet_type=PACKET_TYPE_UNKNOWN):
        """Parse one frame of link type ``link`` (a LINKTYPE_ of tcpdump.org). The parser must not be full."""
        if full(&self.s):
            raise BufferError("the parser is full: take() first")
        if not known_link(link):
            raise ValueError(f"link type {link} is not supported")
        cdef uint32_t n = <uint32_t>least(<uint32_t>data.shape[0], 0x7FFFFFFF)
        frame(&self.s, link, &data[0] if n else NULL, n, n if wire_bytes is None else wire_bytes, time_ns, packet_type)

    @property
    def full(self):
        """Whether `take` must come before the next frame."""
        return bool(full(&self.s))

    def __len__(self):
        return self.s.used

    def take(self):
        """Return the rows and facts since the last call, and begin anew."""
        cdef FactNote* fact
        cdef list facts = []
        cdef uint32_t i
        for i in range(self.s.facts_used):
            fact = &self.s.facts[i]
            data = <bytes>self.s.arena[fact.start:fact.start + fact.size]
            if fact.kind == BANNER:
                facts.append(SshBanner(fact.row, _text(data)))
            elif fact.kind == KEXINIT:
                facts.append(_kexinit(fact.row, data))
            elif fact.kind == NEWKEYS:
                facts.append(SshNewKeys(fact.row, fact.a))
            elif fact.kind == HELLO:
                facts.append(_hello(fact.row, data, bool(fact.a)))
            elif fact.kind == STRATUM:
                facts.append(Stratum(fact.row, _text(data)))
            elif fact.kind == JSON or fact.kind == DEFLATED:
                if fact.kind == DEFLATED:
                    data = _inflated(self.inflaters, fact.a, fact.b & TOLD, data)
                    if fact.b & 2 and data[:4] == b"SSH-" and b"\n" in data[:255]:
                        facts.append(Spoken(fact.row, SPOKEN[SSH_IN_WEBSOCKET]))
                method = pools.said(data)
                if method:
                    facts.append(Stratum(fact.row, method))
            elif fact.kind == TOLD_SPOKEN:
                facts.append(Spoken(fact.row, SPOKEN[fact.a], fact.b))
            elif fact.kind == TOLD_RECORDS:
                facts.append(_records(fact.row, data))
            else:
                facts.append(_dns(fact.row, fact.a, fact.b, data))
        rows = self.rows[:self.s.used]
        if self.s.used > self.s.rows_max // 4:
            self._fresh()
        else:
            # Few are not worth the memory of many. By their bytes: numpy copies what has fields one by one.
            rows = rows.view(np.uint8).copy().view(PACKET)
            self.s.used = 0
            self.s.facts_used = 0
            self.s.arena_used = 0
        return rows, tuple(facts)

    def counts(self):
        """What was seen so far: frames; other (not IP); malformed; streams_lost (handshakes given up); urgent segments.

        Of fragments: first ones that are headless, without their ports; datagrams that are spoiled, by overlaps or out
        of bounds; and unfinished ones, of which parts lacked for 30 s or when others took their place.
        """
        return {"frames": self.s.frames, "other": self.s.other, "malformed": self.s.malformed,
                "streams_lost": self.s.streams_lost, "urgent": self.s.urgent,
                "fragments_headless": self.s.fragments_headless, "datagrams_spoiled": self.s.datagrams_spoiled,
                "datagrams_unfinished": self.s.datagrams_unfinished}

    def finish(self):
        """Count what waits in vain: nothing comes any more."""
        cdef int i
        for i in range(AHEAD_SEGMENTS):
            if self.s.ahead[i].stream != NULL:
                lose(&self.s, self.s.ahead[i].stream)
        for i in range(DATAGRAM_SETS * DATAGRAM_WAYS):
            begin(&self.s, &self.s.datagrams[i], 0)


def row_layout():
    """Return the size of the C row and the offset of each field, to be compared with `records.PACKET`."""
    cdef Row row
    cdef char* base = <char*>&row
    return sizeof(Row), {
        "time_ns": <char*>&row.time_ns - base, "source": <char*>&row.source - base,
        "destination": <char*>&row.destination - base, "source_port": <char*>&row.source_port - base,
        "destination_port": <char*>&row.destination_port - base, "sequence": <char*>&row.sequence - base,
        "acknowledgement": <char*>&row.acknowledgement - base, "payload_bytes": <char*>&row.payload_bytes - base,
        "frame_bytes": <char*>&row.frame_bytes - base, "protocol": <char*>&row.protocol - base,
        "tcp_flags": <char*>&row.tcp_flags - base, "ip_version": <char*>&row.ip_version - base,
        "packet_type": <char*>&row.packet_type - base,
    }


include "packets_capture.pxi"
include "packets_fragments.pxi"
include "packets_ring.pxi"
