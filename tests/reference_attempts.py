"""What `ext/attempts.pyx` does, written for the eye: dictionaries that know the order of use."""

from __future__ import annotations

from collections import OrderedDict

TARGETS_MAX = 2048
WAYS = 8
REFUSED_PACKETS_MAX = 4


def hash_of(key, seed):
    """The mixing step of wyhash, one word after the other; its first value and its factor are secret."""
    value = seed ^ 0xA0761D6478BD642F
    factor = (seed << 32 & 0xFFFFFFFFFFFFFFFF | seed >> 32) ^ 0xE7037ED1A0B428DB
    for at in range(0, len(key), 8):
        product = (value ^ int.from_bytes(key[at:at + 8], "little")) * factor
        value = (product ^ product >> 64) & 0xFFFFFFFFFFFFFFFF
    return value


class Recent:
    """Sets that know the order of use; twice as many when one is full, as long as there may be more."""

    def __init__(self, key_bytes, size_max, seed=0):
        self.seed = seed
        self.sets_max = size_max // WAYS
        self.sets = [OrderedDict()]

    def __len__(self):
        return sum(map(len, self.sets))

    def __contains__(self, key):
        return key in self.of(key)

    def of(self, key):
        return self.sets[hash_of(key, self.seed) % len(self.sets)]

    def get(self, key):
        return self.of(key).get(key)

    def put(self, key, value):
        while key not in self.of(key) and len(self.of(key)) == WAYS and len(self.sets) < self.sets_max:
            entries = [entry for one in self.sets for entry in one.items()]
            self.sets = [OrderedDict() for _ in range(2 * len(self.sets))]
            for entry in entries:
                self.of(entry[0])[entry[0]] = entry[1]
        self.of(key)[key] = value
        self.of(key).move_to_end(key)
        if len(self.of(key)) > WAYS:
            self.of(key).popitem(last=False)


class Places:
    def __init__(self, addresses, ports):
        self.addresses, self.ports = addresses, ports

    def kind(self, target):
        address, port, protocol = target[:16], int.from_bytes(target[16:18], "little"), target[18]
        return (self.ports.get(port) or self.addresses.get(address, 0)) if protocol == 6 else 0


class Tried:
    def __init__(self, *_, seed=0):
        self.nats = 0.0
        self.kinds = 0
        self.targets = Recent(19, TARGETS_MAX, seed)

    def succeed(self, target, places, answered_nats, again_nats):
        kind = places.kind(target)
        if kind and not self.kinds >> kind & 1:
            self.kinds |= 1 << kind
        elif self.nats:
            self.nats = max(0.0, self.nats + (again_nats if target in self.targets else answered_nats))
        self.targets.put(target, 0)


def source(row):
    return int(row["netns"]).to_bytes(8, "little", signed=True) + row["initiator"].tobytes()


def place(row):
    return row["responder"].tobytes() + int(row["responder_port"]).to_bytes(2, "little") + bytes([row["protocol"]])


def target(row):
    """What is tried; of echoes, the identifier is the sender's own."""
    return place(row) if row["protocol"] == 6 else row["responder"].tobytes() + bytes([0, 0, row["protocol"]])


def in_vain(row):
    if row["protocol"] in (1, 58):
        return bool(row["missed"] or not row["payload_bytes_responder"])
    if row["protocol"] == 17:
        return bool(row["reason"] == 3 and not row["payload_bytes_responder"])
    spoke = row["payload_bytes_initiator"] or row["payload_bytes_responder"]
    ended = row["reason"] == 0 and row["packets"] > REFUSED_PACKETS_MAX
    return row["protocol"] == 6 and bool(row["missed"] or not (spoke or ended))


def succeed(rows, start, sources, places, answered_nats, again_nats):
    for at in range(start, len(rows)):
        if in_vain(rows[at]):
            return at
        if rows[at]["protocol"] in (1, 6, 58) and source(rows[at]) in sources:
            tried = sources[source(rows[at])]
            if not isinstance(tried, Tried):
                return at
            tried.succeed(target(rows[at]), places, answered_nats, again_nats)
    return len(rows)


def apart(rows, seen, apart_ns):
    found = []
    for at, row in enumerate(rows):
        if row["initiator_known"]:
            ends, start_ns = source(row) + place(row), int(row["start_ns"])
            before_ns = seen.get(ends)
            if before_ns is not None and start_ns - before_ns >= apart_ns:
                found.append((at, before_ns))
            seen.put(ends, start_ns)
    return found
