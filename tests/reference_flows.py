"""The flow table of ext/flows.pyx once more, for the eye: dicts, no tricks. The two must tell the same."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

FIN, SYN, RST, ACK, TCP, UDP = 1, 2, 4, 16, 6, 17
OPENED, EXCHANGE, CLOSED, SEGMENT, RHYTHM, DULL, CARRIES, UNANSWERED, BEGUN, ECHOED, NOT_ECHOES = range(11)
SHUT, BRIEF, LONG = range(3)
BY_CLOSE, BY_IDLE, BY_EVICTION, BY_END = range(4)
TIMEOUT_NS = (10 * 10**9, 180 * 10**9, 86_400 * 10**9)
HOLE_BYTES_MAX = 1 << 24
ECHOES_MAX = 2048
HELD_MAX = 1024


@dataclass
class Side:
    expected: int | None = None
    holes: list[tuple[int, int]] = field(default_factory=list)
    dug: int = 0
    strange: int | None = None
    watched: int = 0
    watch_from: int = 0
    payload_bytes: int = 0
    first: int = 0
    small_ns: int | None = None
    small: int = 0
    grid: int = 0
    quick: int = 0
    quick_waiting: bool = False
    held: list[tuple[int, int, int]] = field(default_factory=list)  # start, size, time, in the order of the stream
    hole: int | None = None  # where begins what those wait for
    since_ns: int = 0


@dataclass
class Echoes:
    questions: set[int] = field(default_factory=set)
    answers: set[int] = field(default_factory=set)
    times_ns: deque[int] = field(default_factory=lambda: deque(maxlen=32))
    open: deque[tuple[int, int] | None] = field(default_factory=lambda: deque([None] * 16, maxlen=16))
    unlike: int = 0
    unlike_told: int = 0
    surplus_bytes: int = 0
    lengths: set[int] = field(default_factory=set)
    sizes_seen: set[int] = field(default_factory=set)
    turns: int = 0
    grew: bool = False


@dataclass
class Flow:
    key: tuple
    slot: int
    initiator_is_high: bool
    last_ns: int
    queue: int = BRIEF
    queued_ns: int = 0
    fins: int = 0
    packets: int = 0
    answered: int = 0
    syn_ns: int | None = None
    syn_sequence: int = 0
    syn_answer_ns: int | None = None
    rtt_ns: int = -1
    talk_ns: int | None = None
    waiting: bool = False
    asker: int = 0
    question_ns: int = 0
    question_bytes: int = 0
    large_side: int = 2
    turn: tuple[int, int] | None = None  # who speaks, and what that side had sent before it began to
    before: int = 0
    start_ns: int = 0
    known: bool = False
    named: bool = False
    led: bool = False
    heard: bool = False
    missed: bool = False
    carrier: int = 0
    echoes: Echoes | None = None
    told_ns: int = 0  # of what was last handed on while anything is held
    question: tuple[int, int] | None = None  # of an echo, not answered
    kinds: set[str] = field(default_factory=set)  # of ICMP
    sides: tuple[Side, Side] = field(default_factory=lambda: (Side(), Side()))


def signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


class Table:
    def __init__(self, size_max: int, seed: int = 0, *, quiet_flows=False, quiet_exchanges=False) -> None:
        self.quiet_flows, self.quiet_exchanges = quiet_flows, quiet_exchanges
        self.size_max = size_max
        self.flows: dict[tuple, Flow] = {}  # in order of opening
        self.queues: list[OrderedDict[tuple, None]] = [OrderedDict(), OrderedDict(), OrderedDict()]
        self.free: list[int] = []
        self.evicted = 0
        self.told: list[tuple] = []
        self.begun: list[tuple] = []
        self.listened = False
        self.tried: list[Flow] = []

    def run(self, rows, start, stop, netns):
        for row in rows[start:stop]:
            self.take(row, netns)
        return self.tell()

    def tell(self):
        told, self.told = [*self.begun, *self.told], []
        self.begun = []
        return told

    def touch(self, rows, row, netns):
        key, from_high = self.key(rows[row], netns)
        flow = self.flows.get(key)
        if flow is None or self.reused(flow, rows[row]):
            flow = self.open(flow, key, from_high, rows[row])
        self.name(flow)
        return flow.slot, self.side(flow, from_high), flow.packets + 1

    def packets_of(self, netns, protocol, *ends):
        near, far = ends[:2], ends[2:]
        flow = self.flows.get((netns, protocol, min(near, far), max(near, far)))
        return flow.packets if flow else None

    def mark(self, rows, row, netns, carrier):
        key, from_high = self.key(rows[row], netns)
        flow = self.flows.get(key)
        if flow is None or self.reused(flow, rows[row]):
            flow = self.open(flow, key, from_high, rows[row])
        flow.carrier = carrier
        return flow.slot if flow.named else -1

    def listen(self):
        self.listened = True
        for flow in self.flows.values():
            if flow.queue != SHUT and flow.key[1] == TCP:
                self.begin(flow)
        return self.tell()

    def begin(self, flow):
        self.begun.append((BEGUN, flow.start_ns, flow.key[0], *self.ends(flow)))

    def watch(self, slot, side, from_sequence):
        flow = next(flow for flow in self.flows.values() if flow.slot == slot)
        side = flow.sides[side]
        if not side.watched:
            side.dug = sum(signed(first - from_sequence) > 0 for first, _ in side.holes)
        side.watched = 1
        side.watch_from = from_sequence
        flow.large_side = 2

    def tick(self, time_ns):
        while self.tried and self.tried[0].start_ns + 4 * 10**9 <= time_ns:
            flow = self.tried.pop(0)
            if self.flows.get(flow.key) is flow and flow.queue != SHUT and not flow.heard:
                flow.missed = True
                self.told.append((UNANSWERED, *self.row(flow, time_ns, BY_IDLE)))
        for queue in (SHUT, BRIEF, LONG):
            while self.queues[queue]:
                flow = self.flows[next(iter(self.queues[queue]))]
                if flow.queued_ns + TIMEOUT_NS[queue] > time_ns:
                    break
                if flow.last_ns + TIMEOUT_NS[queue] > time_ns:
                    self.enqueue(flow, queue, flow.last_ns)
                else:
                    self.drop(flow, time_ns, BY_IDLE)
        return self.tell()

    def close(self, time_ns):
        for flow in list(self.flows.values()):
            self.drop(flow, time_ns, BY_END)
        return self.tell()

    @staticmethod
    def key(row, netns):
        icmp = row["protocol"] in (1, 58)
        near = (bytes(row["source"]), int(row["destination_port" if icmp else "source_port"]))
        far = (bytes(row["destination"]), int(row["destination_port"]))
        from_high = near > far
        low, high = (far, near) if from_high else (near, far)
        return (netns, int(row["protocol"]), low, high), from_high

    @staticmethod
    def side(flow, from_high):
        return 0 if from_high == flow.initiator_is_high else 1

    @staticmethod
    def reused(flow, row):
        if row["protocol"] != TCP or row["tcp_flags"] & (SYN | ACK | RST) != SYN:
            return False
        spoke = any(side.payload_bytes for side in flow.sides)
        if flow.queue == SHUT or spoke:
            return flow.queue == SHUT or bool(row["sequence"] != flow.syn_sequence)
        return flow.packets > 0 and flow.syn_ns is None and flow.syn_answer_ns is None

    def open(self, before, key, from_high, row):
        time_ns, protocol = int(row["time_ns"]), key[1]
        icmp_type = int(row["source_port"]) >> 8
        backwards = protocol == TCP and row["tcp_flags"] & (SYN | ACK) == (SYN | ACK)
        flags = row["tcp_flags"] & (SYN | ACK | RST)
        probe = protocol == TCP and not (flags or row["payload_bytes"])
        known = probe or (protocol == TCP and flags & SYN != 0)
        if protocol in (1, 58):
            request, reply = (8, 0) if protocol == 1 else (128, 129)
            backwards = icmp_type == reply
            known = icmp_type in (request, reply)
        if before:
            self.drop(before, time_ns, BY_CLOSE)
        if len(self.flows) >= self.size_max:
            self.evicted += 1
            queue = next(queue for queue in self.queues if queue)
            self.drop(self.flows[next(iter(queue))], time_ns, BY_EVICTION)
        slot = self.free.pop() if self.free else len(self.flows)
        flow = Flow(key, slot, bool(from_high != backwards), time_ns, start_ns=time_ns, known=bool(known))
        self.flows[key] = flow
        self.enqueue(flow, BRIEF, time_ns)
        if not self.quiet_flows:
            self.name(flow)
        if self.listened and protocol == TCP:
            self.begin(flow)
        if probe or flags == SYN if protocol == TCP else protocol == UDP or (known and not backwards):
            self.tried = [*self.tried, flow][-self.size_max:]
        return flow

    @staticmethod
    def ends(flow):
        low, high = flow.key[2:]
        return (*high, *low) if flow.initiator_is_high else (*low, *high)

    def name(self, flow):
        if not flow.named:
            flow.named = True
            self.told.append((OPENED, flow.start_ns, flow.slot, *flow.key[:2], *self.ends(flow), flow.known,
                              flow.carrier))
            kept = flow.echoes
            if kept and kept.times_ns:
                self.told.append((ECHOED, flow.slot, tuple(sorted(kept.questions)), tuple(sorted(kept.answers)),
                                  tuple(kept.times_ns)))

    @staticmethod
    def excess(flow):
        one, two = flow.sides
        return two.payload_bytes - one.payload_bytes >= 256

    def keep(self, flow, size, time_ns):
        if not self.quiet_flows or flow.key[1] not in (1, 58) or flow.asker == 1 or flow.named or flow.missed:
            return False
        if self.excess(flow):
            return False
        echoes = self.echoes_of(flow)
        if echoes is None:
            return False
        if len(echoes.questions) < 16:
            echoes.questions.add(flow.question_bytes)
            echoes.answers.add(size)
        echoes.times_ns.append(time_ns)
        return True

    def echoes_of(self, flow):
        if flow.echoes is None and sum(one.echoes is not None for one in self.flows.values()) < ECHOES_MAX:
            flow.echoes = Echoes()
        return flow.echoes

    def pair(self, flow, number, row, size):
        icmp_type, time_ns = int(row["source_port"]) >> 8, int(row["time_ns"])
        version_4 = flow.key[1] == 1
        request, reply = (8, 0) if version_4 else (128, 129)
        if icmp_type == request:
            flow.kinds.add("asked")
            if number == 0:
                self.ask_echo(flow, int(row["sequence"]) & 0xFFFF, size)
        elif icmp_type == reply:
            flow.kinds.add("answered")
            if number == 1:
                self.answer_echo(flow, int(row["sequence"]) & 0xFFFF, size, time_ns)
        else:
            flow.kinds.add("measured" if version_4 and icmp_type in range(13, 19) else "other")

    def ask_echo(self, flow, sequence, size):
        if flow.question and flow.question != (sequence, size):
            if flow.heard:
                if echoes := self.echoes_of(flow):
                    echoes.open.append(flow.question)
            elif flow.question[1] != size and (echoes := self.echoes_of(flow)):
                grows = size > flow.question[1]
                echoes.turns += grows != echoes.grew
                echoes.grew = grows
                echoes.sizes_seen.add(size % 512)
        flow.question = (sequence, size)

    def answer_echo(self, flow, sequence, size, time_ns):
        last = flow.question if flow.question and flow.question[0] == sequence else None
        if last:
            flow.question = None
        if last == (sequence, size) or not (last or flow.echoes):
            return
        echoes = self.echoes_of(flow)
        if echoes is None:
            return
        asked = [one[1] for one in (*echoes.open, last) if one and one[0] == sequence]
        echoes.open = deque([one if one and one[0] != sequence else None for one in echoes.open], maxlen=16)
        if not asked or size == max(asked) or (size < max(asked) and len(asked) > 1):
            return
        echoes.unlike += 1
        echoes.surplus_bytes += max(0, size - max(asked))
        echoes.lengths.add(size)
        if echoes.unlike >= max(4, 2 * echoes.unlike_told) and len(echoes.lengths) >= 3:
            echoes.unlike_told = echoes.unlike
            self.tell_strange(flow, 0, echoes.unlike, echoes.surplus_bytes, time_ns)

    def look_for_strange(self, flow, time_ns):
        size, packets = sum(side.payload_bytes for side in flow.sides), flow.packets
        if flow.kinds == {"answered"} and size >= 2048:
            self.tell_strange(flow, 1, packets, size, time_ns)
        if flow.kinds == {"measured"} and size - 12 * packets >= 256:
            self.tell_strange(flow, 3, packets, size - 12 * packets, time_ns)
        if flow.kinds == {"asked"} and flow.echoes and len(flow.echoes.sizes_seen) >= 24 and flow.echoes.turns >= 8:
            self.tell_strange(flow, 2, packets, size, time_ns)

    def tell_strange(self, flow, what, count, data_bytes, time_ns):
        self.name(flow)
        self.told.append((NOT_ECHOES, time_ns, flow.slot, what, count, data_bytes,
                          *(side.payload_bytes for side in flow.sides), flow.packets))

    def enqueue(self, flow, queue, time_ns):
        self.queues[flow.queue].pop(flow.key, None)
        flow.queue, flow.queued_ns = queue, time_ns
        self.queues[queue][flow.key] = None

    def drop(self, flow, time_ns, reason):
        if flow.queue != SHUT:
            self.tell_closed(flow, time_ns, reason)
        self.queues[flow.queue].pop(flow.key)
        del self.flows[flow.key]
        self.free.append(flow.slot)

    def tell_closed(self, flow, time_ns, reason):
        for number, side in enumerate(flow.sides):
            while side.held:
                self.give_up(flow, number)
        one, two = flow.sides
        if not flow.named and not (flow.key[1] in (1, 58) and self.excess(flow)):
            self.told.append((DULL, *self.row(flow, time_ns, reason)))
            return
        self.name(flow)
        self.told.append((CLOSED, time_ns, flow.slot, reason, flow.packets, one.payload_bytes, two.payload_bytes,
                          one.first, two.first, flow.answered, flow.last_ns))

    def row(self, flow, time_ns, reason):
        one, two = flow.sides
        return (time_ns, flow.start_ns, flow.key[0], *self.ends(flow), flow.key[1], flow.known, reason, flow.carrier,
                flow.missed, flow.packets, one.payload_bytes, two.payload_bytes, one.first, two.first, flow.answered,
                flow.last_ns)

    def take(self, row, netns):
        key, from_high = self.key(row, netns)
        flow = self.flows.get(key)
        if flow is None or self.reused(flow, row):
            flow = self.open(flow, key, from_high, row)
        number = self.side(flow, from_high)
        side, time_ns, tcp = flow.sides[number], int(row["time_ns"]), row["protocol"] == TCP
        if row["ip_version"] >> 4:
            flow.carrier = row["ip_version"] >> 4
            if flow.named:
                self.told.append((CARRIES, flow.slot, flow.carrier))
        stale = time_ns >> 34 > flow.last_ns >> 34
        flow.packets += 1
        flow.last_ns = max(flow.last_ns, time_ns)
        if flow.queue == SHUT:
            return
        flow.heard |= number == 1
        start, fresh = int(row["sequence"]), int(row["payload_bytes"])
        if tcp:
            self.await_holes(flow, number, row)
            self.handshake(flow, row, number)
            start, fresh = self.new_bytes(flow, side, row)
        elif row["protocol"] in (1, 58):
            self.pair(flow, number, row, fresh)
        if row["protocol"] in (1, 58) and flow.packets >= 16 and flow.packets.bit_count() == 1:
            self.look_for_strange(flow, time_ns)
        if fresh:
            side.payload_bytes += fresh
            self.talk(flow, number, fresh, time_ns)
            if side.watched:
                self.hand_on(flow, number, start, fresh, time_ns)
        if flow.queue == BRIEF and tcp and all(one.payload_bytes for one in flow.sides):
            self.enqueue(flow, LONG, time_ns)
        elif stale:
            self.enqueue(flow, flow.queue, time_ns)
        if tcp and row["tcp_flags"] & (FIN | RST) and self.taken(flow, number, row):
            flow.fins |= 3 if row["tcp_flags"] & RST else 1 << number
            if flow.fins == 3:
                self.tell_closed(flow, time_ns, BY_CLOSE)
                self.enqueue(flow, SHUT, time_ns)

    def taken(self, flow, number, row):
        """Whether the other side takes a FIN or RST."""
        side, flags = flow.sides[number], row["tcp_flags"]
        if side.expected is None:
            return True
        ahead = signed(int(row["sequence"]) - side.expected)
        if flags & RST:
            if ahead == 0 or (ahead == 1 and flow.fins & 1 << number):
                return True
            self.enqueue(flow, BRIEF, int(row["time_ns"]))
            return False
        return bool(flags & (SYN | ACK)) and 0 <= ahead + int(row["payload_bytes"]) <= HOLE_BYTES_MAX

    @staticmethod
    def handshake(flow, row, number):
        flags, time_ns = row["tcp_flags"] & (SYN | ACK | RST), int(row["time_ns"])
        if flags == SYN and number == 0:
            flow.syn_ns, flow.syn_sequence = time_ns, row["sequence"]
        elif flags == (SYN | ACK) and number == 1:
            flow.syn_answer_ns = time_ns
        elif flags == ACK and number == 0 and flow.rtt_ns < 0 and None not in (flow.syn_ns, flow.syn_answer_ns):
            flow.rtt_ns = max(0, time_ns - flow.syn_ns)

    def new_bytes(self, flow, side, row):
        sequence, size = int(row["sequence"]), int(row["payload_bytes"])
        if row["tcp_flags"] & RST or not row["tcp_flags"] & (SYN | ACK):
            return 0, 0
        if row["tcp_flags"] & SYN:
            sequence = (sequence + 1) & 0xFFFFFFFF
            side.expected = sequence if side.expected is None else side.expected
        if size == 0:
            return 0, 0
        side.expected = sequence if side.expected is None else side.expected
        end = (sequence + size) & 0xFFFFFFFF
        ahead = signed(sequence - side.expected)
        if abs(ahead) > HOLE_BYTES_MAX:
            if side.strange != sequence:
                side.strange = end
                return 0, 0
            side.holes, side.expected, ahead = [], sequence, 0
            side.dug += 1
        side.strange = None
        if ahead < 0:
            if signed(end - side.expected) <= 0:
                return self.fill(side, sequence, end)
            sequence = side.expected
        if ahead > 0:
            side.holes = [*side.holes, (side.expected, sequence)][-2:]
            if not self.hold(flow, side, int(row["time_ns"])):
                side.dug += 1
        side.expected = end
        return sequence, (end - sequence) & 0xFFFFFFFF

    @staticmethod
    def fill(side, sequence, end):
        for place, (first, last) in enumerate(side.holes):
            if signed(end - first) <= 0 or signed(last - sequence) <= 0:
                continue
            begin = sequence if signed(sequence - first) > 0 else first
            if begin != first and signed(last - end) <= 0:
                side.holes[place] = (first, begin)
                return begin, (last - begin) & 0xFFFFFFFF
            if begin != first and len(side.holes) == 1:
                side.holes = [(first, begin), (end, last)]
                return begin, (end - begin) & 0xFFFFFFFF
            if signed(last - end) > 0:
                side.holes[place] = (end, last)
                return begin, (end - begin) & 0xFFFFFFFF
            del side.holes[place]
            return begin, (last - begin) & 0xFFFFFFFF
        return 0, 0

    @staticmethod
    def holds(flow):
        return any(side.hole is not None for side in flow.sides)

    def hold(self, flow, side, time_ns):
        if not side.watched:
            return False
        if not self.holds(flow):
            if sum(map(self.holds, self.flows.values())) >= HELD_MAX:
                return False
            flow.told_ns = time_ns
        if side.hole is None:
            side.hole, side.since_ns = side.expected, time_ns
        return True

    def hand_on(self, flow, number, start, size, time_ns):
        """A stream is read in its order: what follows a hole is held until that is filled or given up."""
        side = flow.sides[number]
        if side.hole is not None and signed(start - side.hole) > 0:
            place = len(side.held)
            while place and signed(side.held[place - 1][0] - start) > 0:
                place -= 1
            side.held.insert(place, (start, size, time_ns))
            if len(side.held) > 8:
                self.give_up(flow, number)
            return
        if side.hole is not None and start != side.hole:
            return  # out of place: its hole was given up
        if side.hole is None and (start + size) & 0xFFFFFFFF != side.expected:
            return
        flow.told_ns = max(flow.told_ns, time_ns)
        self.segment(flow, number, start, size, time_ns)
        if side.hole is not None:
            side.hole = (start + size) & 0xFFFFFFFF
            self.follow(flow, number)

    def follow(self, flow, number):
        side = flow.sides[number]
        while side.held and signed(side.held[0][0] - side.hole) <= 0:
            start, size, time_ns = side.held.pop(0)
            flow.told_ns = side.since_ns = max(flow.told_ns, time_ns)
            if signed(start + size - side.hole) > 0:
                side.hole = (start + size) & 0xFFFFFFFF
            self.segment(flow, number, start, size, flow.told_ns)
        if not side.held:
            side.hole = None

    def give_up(self, flow, number):
        side = flow.sides[number]
        side.dug += 1
        side.hole = side.held[0][0]
        self.follow(flow, number)

    def await_holes(self, flow, number, row):
        for each, side in enumerate(flow.sides):
            while side.held:
                acknowledged = each != number and row["tcp_flags"] & ACK and signed(
                    int(row["acknowledgement"]) - side.held[0][0]) >= 0
                if not acknowledged and int(row["time_ns"]) - side.since_ns <= 10**9:
                    break
                self.give_up(flow, each)

    def talk(self, flow, number, size, time_ns):
        silence = max(80_000_000, 2 * flow.rtt_ns)
        if flow.waiting and number != flow.asker and time_ns - flow.question_ns <= 10**9:
            flow.waiting = False
            if flow.question_bytes <= 512 and size <= 512:
                flow.answered += 1
                flow.led |= flow.asker == 1
                asked = flow.key[1] == UDP or (flow.key[1] == TCP and flow.known)
                if (not self.quiet_exchanges or not asked or flow.led) and not self.keep(flow, size, time_ns):
                    self.tell_exchange(flow, size, time_ns)
        elif flow.talk_ns is not None and time_ns - flow.talk_ns > silence:
            flow.sides[number].first += 1
            other = 1 - number
            spoke = flow.turn is not None and flow.turn[0] == other
            flow.before = flow.sides[other].payload_bytes - flow.turn[1] if spoke else 0
            flow.waiting, flow.asker, flow.question_bytes, flow.question_ns = True, number, size, time_ns
        elif flow.waiting and number == flow.asker:
            flow.question_bytes += size
            flow.question_ns = time_ns
            flow.waiting = flow.question_bytes <= 512
        flow.talk_ns = time_ns
        noted = flow.led or (flow.key[1] == TCP and not flow.known)
        if noted and (flow.turn is None or flow.turn[0] != number):
            flow.turn = (number, flow.sides[number].payload_bytes - size)
        self.rhythm(flow, number, size, time_ns)

    def tell_exchange(self, flow, size, time_ns):
        self.name(flow)
        self.told.append((EXCHANGE, time_ns, flow.slot, flow.asker, max(0, time_ns - flow.question_ns),
                          flow.question_bytes, size, flow.sides[0].first, flow.sides[1].first, flow.answered,
                          flow.rtt_ns, flow.sides[0].payload_bytes, flow.sides[1].payload_bytes, flow.packets,
                          flow.before))

    def rhythm(self, flow, number, size, time_ns):
        side, other = flow.sides[number], flow.sides[1 - number]
        if other.quick_waiting:
            other.quick_waiting = False
            other.quick += time_ns - other.small_ns <= 5_000_000
        if size > 256:
            return
        if side.small_ns is not None:
            side.grid += 16_500_000 <= time_ns - side.small_ns <= 23_500_000
        side.small_ns, side.quick_waiting = time_ns, True
        side.small += 1
        if side.small == 64:
            if side.grid * 3 > 64:
                self.name(flow)
                self.told.append((RHYTHM, time_ns, flow.slot, number, 64, side.grid, side.quick, flow.packets))
            side.small = side.grid = side.quick = 0

    def segment(self, flow, number, start, size, time_ns):
        side = flow.sides[number]
        clear = signed(side.watch_from - start)
        if clear > 0 and side.watched == 1:
            if clear >= size:
                return
            size -= clear
        elif clear < -HOLE_BYTES_MAX:
            side.watched = 2
        total = side.payload_bytes - sum(one[1] for one in side.held)
        if size < 1024:
            flow.large_side = 2
        elif flow.large_side == number and total >> 16 == (total - size) >> 16:
            return
        else:
            flow.large_side = number
        self.name(flow)
        dug = (one.dug for one in flow.sides)
        self.told.append((SEGMENT, time_ns, flow.slot, number, size, total, flow.packets, *dug))
