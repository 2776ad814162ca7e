# What flows.pyx and attempts.pyx share: the row of a dull flow.

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
