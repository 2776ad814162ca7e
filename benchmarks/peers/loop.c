/* The limit that benchmarks/packets.py measures against: what a plain C loop needs for a packet.
 *
 * A pcap file read 256 KiB at a time (cheaper than mapping it), Ethernet (with VLAN tags), IPv4 or
 * IPv6, TCP or UDP; a hash of the five-tuple, an open addressing table whose records begin at a
 * cache line, and per direction running statistics as every flow meter has them: count, bytes, mean
 * and variance of sizes and of gaps (Welford), least, most, first and last time, a histogram of
 * sizes and one of gaps, small records and those on a 20 ms grid; per flow who broke silences and
 * took turns. No timeouts, no bound, no sequence numbers, nothing told: less than any tool that is
 * of use must do.
 *
 * Prints packets, flows and a sum over the statistics, so that no compiler leaves work out. Usage:
 * loop FILE LOG2: the table has 2**LOG2 places, of which half may be taken.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct {
    uint64_t packets, bytes;
    double size_mean, size_m2, gap_mean, gap_m2;
    uint32_t least, most;
    int64_t first_ns, last_ns;
    uint16_t sizes[8], gaps[12];
    uint32_t small, grid;
} Side;

typedef struct {
    uint8_t low[16], high[16];
    uint16_t low_port, high_port;
    uint8_t protocol, used, opener, last_side;
    uint32_t turns, first[2];
    int64_t last_ns;
    Side side[2];
} __attribute__((aligned(64))) Flow;

enum { WINDOW = 1 << 18 };

static unsigned table_log2;

static uint32_t be16(const uint8_t *p) { return (uint32_t)p[0] << 8 | p[1]; }

static uint64_t mix(uint64_t h, uint64_t word) {
    h = (h ^ word) * 0x9E3779B97F4A7C15u;
    return h ^ h >> 32;
}

static Flow *find(Flow *table, const uint8_t *low, const uint8_t *high, uint16_t low_port, uint16_t high_port,
                  uint8_t protocol, uint64_t *flows) {
    uint64_t word[4], h = protocol;
    memcpy(word, low, 16);
    memcpy(word + 2, high, 16);
    for (int i = 0; i < 4; i++)
        h = mix(h, word[i]);
    h = mix(h, (uint64_t)low_port << 16 | high_port);
    for (uint64_t at = h >> (64 - table_log2);; at = (at + 1) & ((1u << table_log2) - 1)) {
        Flow *flow = &table[at];
        if (!flow->used) {
            if (++*flows > (1u << table_log2) / 2)
                exit(3);
            memcpy(flow->low, low, 16);
            memcpy(flow->high, high, 16);
            flow->low_port = low_port;
            flow->high_port = high_port;
            flow->protocol = protocol;
            flow->used = 1;
            flow->opener = 2;
            return flow;
        }
        if (flow->low_port == low_port && flow->high_port == high_port && flow->protocol == protocol &&
            !memcmp(flow->low, low, 16) && !memcmp(flow->high, high, 16))
            return flow;
    }
}

static void count(Flow *flow, int side, uint32_t size, int64_t time_ns) {
    Side *s = &flow->side[side];
    if (flow->opener == 2)
        flow->opener = side;
    double off = size - s->size_mean;
    s->packets++;
    s->bytes += size;
    s->size_mean += off / s->packets;
    s->size_m2 += off * (size - s->size_mean);
    s->sizes[size ? (32 - __builtin_clz(size)) * 7 / 17 : 0]++;
    s->most = size > s->most ? size : s->most;
    s->least = size < s->least || s->packets == 1 ? size : s->least;
    if (s->packets == 1) {
        s->first_ns = time_ns;
    } else {
        int64_t gap = time_ns - s->last_ns;
        double late = gap - s->gap_mean;
        s->gap_mean += late / (s->packets - 1);
        s->gap_m2 += late * (gap - s->gap_mean);
        int bin = gap > 0 ? (64 - __builtin_clzll(gap)) / 4 : 0;
        s->gaps[bin < 11 ? bin : 11]++;
        s->grid += size && size <= 256 && gap >= 16500000 && gap <= 23500000;
    }
    s->last_ns = time_ns;
    s->small += size && size <= 256;
    if (size) {
        flow->turns += flow->last_side != side;
        flow->first[side] += flow->last_ns && time_ns - flow->last_ns > 80000000;
        flow->last_side = side;
        flow->last_ns = time_ns;
    }
}

static void packet(Flow *table, const uint8_t *p, uint32_t n, int64_t time_ns, uint64_t *flows) {
    uint32_t at = 14, kind = n >= 14 ? be16(p + 12) : 0, size;
    uint8_t near[16] = {0}, far[16] = {0}, protocol;
    while ((kind == 0x8100 || kind == 0x88A8) && n >= at + 4) {
        kind = be16(p + at + 2);
        at += 4;
    }
    if (kind == 0x0800 && n >= at + 20) {
        uint32_t header = (p[at] & 15) * 4;
        near[10] = near[11] = far[10] = far[11] = 255;
        memcpy(near + 12, p + at + 12, 4);
        memcpy(far + 12, p + at + 16, 4);
        protocol = p[at + 9];
        size = be16(p + at + 2) - header;
        at += header;
    } else if (kind == 0x86DD && n >= at + 40) {
        memcpy(near, p + at + 8, 16);
        memcpy(far, p + at + 24, 16);
        protocol = p[at + 6];
        size = be16(p + at + 4);
        at += 40;
    } else {
        return;
    }
    uint16_t near_port = 0, far_port = 0;
    if (protocol == 6 && n >= at + 20) {
        size -= (p[at + 12] >> 4) * 4;
    } else if (protocol == 17 && n >= at + 8) {
        size -= 8;
    } else if (protocol == 6 || protocol == 17) {
        return;
    }
    if (protocol == 6 || protocol == 17) {
        near_port = be16(p + at);
        far_port = be16(p + at + 2);
    }
    int order = memcmp(near, far, 16);
    int swap = order > 0 || (order == 0 && near_port > far_port);
    Flow *flow = swap ? find(table, far, near, far_port, near_port, protocol, flows)
                      : find(table, near, far, near_port, far_port, protocol, flows);
    count(flow, swap, size & 0xFFFF, time_ns);
}

int main(int argc, char **argv) {
    static uint8_t window[WINDOW];
    uint64_t packets = 0, flows = 0;
    double sum = 0;
    size_t have = 0;
    ssize_t got;
    int fd = argc == 3 ? open(argv[1], O_RDONLY) : -1;
    table_log2 = argc == 3 ? strtoul(argv[2], NULL, 10) : 0;
    if (fd < 0 || table_log2 < 4 || table_log2 > 24 || read(fd, window, 24) != 24)
        return 2;
    Flow *table = mmap(NULL, sizeof(Flow) << table_log2, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (table == MAP_FAILED)
        return 2;
    while ((got = read(fd, window + have, WINDOW - have)) > 0) {
        size_t at = 0;
        have += got;
        while (at + 16 <= have) {
            uint32_t head[4];
            memcpy(head, window + at, 16);
            if (head[2] > have - at - 16)
                break;
            packet(table, window + at + 16, head[2], head[0] * 1000000000ll + head[1] * 1000ll, &flows);
            packets++;
            at += 16 + head[2];
        }
        memmove(window, window + at, have - at);
        have -= at;
    }
    for (uint64_t i = 0; i < 1u << table_log2; i++)
        for (int side = 0; table[i].used && side < 2; side++)
            sum += table[i].side[side].size_m2 + table[i].side[side].gap_mean;
    printf("%llu %llu %g\n", (unsigned long long)packets, (unsigned long long)flows, sum);
    return 0;
}
