"""What `ext/attempts.pyx` does, written for the eye: dictionaries that know the order of use."""

from __future__ import annotations

from collections import OrderedDict

TARGETS_MAX = 1024
REFUSED_PACKETS_MAX = 4


class Recent:
    def __init__(self, key_bytes, size_max):
        self.size_max = size_max
        self.entries = OrderedDict()

    def __len__(self):
        return len(self.entries)

    def __contains__(self, key):
        return key in self.entries

    def get(self, key):
        return self.entries.get(key)

    def put(self, key, value):
        self.entries[key] = value
        self.entries.move_to_end(key)
        if len(self.entries) > self.size_max:
            self.entries.popitem(last=False)


class Tried:
    def __init__(self, *_):
        self.nats = 0.0
        self.targets = Recent(19, TARGETS_MAX)

    def succeed(self, target, answered_nats, again_nats):
        if self.nats:
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
    spoke = row["payload_bytes_initiator"] or row["payload_bytes_responder"]
    ended = row["reason"] == 0 and row["packets"] > REFUSED_PACKETS_MAX
    return row["protocol"] == 6 and bool(row["missed"] or not (spoke or ended))


def succeed(rows, start, sources, answered_nats, again_nats):
    for at in range(start, len(rows)):
        if in_vain(rows[at]):
            return at
        if rows[at]["protocol"] in (1, 6, 58) and source(rows[at]) in sources:
            tried = sources[source(rows[at])]
            if not isinstance(tried, Tried):
                return at
            tried.succeed(target(rows[at]), answered_nats, again_nats)
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
