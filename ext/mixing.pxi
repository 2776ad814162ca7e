# How keys are mixed for the tables of packets.pyx, flows.pyx and attempts.pyx, and memory asked for ahead of its use.

cdef extern from *:
    """
    #include <stdint.h>
    /* Both halves of a 128-bit product, folded: the mixing step of wyhash. */
    static inline uint64_t gpuguard_fold(uint64_t a, uint64_t b) {
        unsigned __int128 product = (unsigned __int128)a * b;
        return (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    static inline void gpuguard_ask(const void *p) { __builtin_prefetch(p, 1); }
    """
    uint64_t fold "gpuguard_fold"(uint64_t a, uint64_t b) noexcept nogil
    void ask "gpuguard_ask"(const void *p) noexcept nogil


cdef inline uint64_t turned(uint64_t seed, int bits) noexcept nogil:
    return seed << bits | seed >> (64 - bits)


cdef inline uint64_t ends_hash(const uint8_t *one, const uint8_t *other, uint64_t rest, uint64_t seed) noexcept nogil:
    """Return 64 bits of two addresses and what else tells flows apart.

    Who does not know the seed cannot choose which flows meet in a bucket. It is in each factor, each time turned: one
    that an address alone could make 0 would hide the other half of that address, and two products of the same factors
    would cancel each other.
    """
    cdef uint64_t words[4]
    memcpy(words, one, 16)
    memcpy(&words[2], other, 16)
    return fold(fold(words[0] ^ seed ^ <uint64_t>0xa0761d6478bd642f,
                     words[1] ^ turned(seed, 16) ^ <uint64_t>0xe7037ed1a0b428db)
                ^ fold(words[2] ^ turned(seed, 32) ^ <uint64_t>0x8ebc6af09c88c6e3,
                       words[3] ^ turned(seed, 48) ^ <uint64_t>0x589965cc75374cc3)
                ^ <uint64_t>0x1d8e4e27c47d124f, rest ^ seed ^ <uint64_t>0xeb44accab455d165)
