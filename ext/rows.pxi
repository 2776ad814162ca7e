# What flows.pyx and attempts.pyx share: the row of a dull flow, and how keys are mixed.

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

# observations.CLOSED_FLOW
cdef packed struct Closed:
    int64_t time_ns
    int64_t start_ns
    int64_t netns
    uint8_t initiator[16]
    uint16_t initiator_port
    uint8_t responder[16]
    uint16_t responder_port
    uint8_t protocol
    uint8_t initiator_known
    uint8_t reason
    uint8_t carrier
    uint8_t missed
    uint64_t packets
    uint64_t payload_bytes[2]
    uint32_t first[2]
    uint32_t answered
    int64_t last_ns
