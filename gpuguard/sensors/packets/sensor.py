"""The guard's half: rings are read, and what was lost is said."""

from __future__ import annotations

import os
import select
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

from gpuguard._packets import Parser, Ring
from gpuguard.core.records import Gap
from gpuguard.messages import Answer, Opened, OpenPackets, Refused
from gpuguard.sensors import EyeClosed
from gpuguard.sensors.packets.parsed import MISSED, taken
from gpuguard.sensors.packets.rings import COUNT, DESCRIPTORS, STATISTICS_S

if TYPE_CHECKING:
    from gpuguard.config import Config
    from gpuguard.core.records import Block

#: Live: what one block of a ring holds of short packets, so that it is judged at one go, or as many of several blocks.
LIVE_ROWS_MAX = 16_384
#: Blocks of rows that one read takes from all rings together: what follows a read, a signal to end too, waits for it.
BLOCKS_MAX = 8


class Broker(Protocol):
    """What this sensor needs of the broker's client."""

    def ask(self, request: OpenPackets) -> tuple[Answer, tuple[int, ...]]:
        """Send one request; return the answer and its descriptors."""
        ...


def open_sensor(broker: Broker, config: Config, *, brief: bool = False) -> PacketSensor:
    """Open every interface of the settings, or all at once where none is named. ``brief``: see `Parser`."""
    if not config.packets.enabled:
        raise EyeClosed("packets: turned off by packets.enabled in the settings")
    with ExitStack() as stack:
        sources = []
        for interface in config.packets.interfaces or ("",):
            for source in _open_sources(broker, interface, config, brief=brief):
                stack.callback(source.close)
                sources.append(source)
        sensor = PacketSensor(sources, config.packets.ignore)
        stack.pop_all()
    return sensor


def _open_sources(broker: Broker, interface: str, config: Config, *, brief: bool) -> list[_Source]:
    asked = config.packets
    answer, descriptors = broker.ask(
        OpenPackets(interface, asked.snap_bytes, asked.ring_bytes, asked.ignore, asked.rings))
    with ExitStack() as stack:
        for descriptor in descriptors:
            stack.callback(os.close, descriptor)
        if isinstance(answer, Refused):
            raise EyeClosed(answer.reason)
        if not isinstance(answer, Opened) or answer.descriptors != DESCRIPTORS * asked.rings:
            raise EyeClosed("packets: the broker gave an answer that this version does not know")
        rings = [Ring(packet, answer.values["block_bytes"], answer.values["blocks"], many=not interface)
                 for packet in descriptors[::3]]
        stack.pop_all()
    for packet in descriptors[::3]:
        os.close(packet)
    return [_Source(interface, ring, answer.values, ready, drops, brief=brief)
            for ring, ready, drops in zip(rings, descriptors[1::3], descriptors[2::3], strict=True)]


class _Source:
    """One ring, with the descriptors that came with it."""

    def __init__(self, interface: str, ring: Ring, values: dict[str, int], ready: int, drops: int, *,
                 brief: bool) -> None:
        self.interface = interface
        self.ready = ready
        self._drops: int | None = drops
        self._ring = ring
        self._blocks = values["blocks"]
        self._netns = values["netns"]
        # A secret seed: whoever sends packets must not be able to choose which streams share a set.
        self._parser = Parser(rows_max=LIVE_ROWS_MAX, seed=int.from_bytes(os.urandom(8)), brief=brief)
        self._told: dict[str, int] = dict.fromkeys(("dropped", "malformed_blocks", *MISSED), 0)
        self._looked_ns: int | None = None
        self._met_again = 0

    def read(self, now_ns: int, blocks_max: int) -> list[Block]:
        """Parse what is ready, at most so many blocks; for the rest the descriptor stays ready."""
        blocks: list[Block] = []
        more = True
        while more and len(blocks) < blocks_max:
            more = self._ring.read(self._parser, self._blocks)
            if len(self._parser):
                blocks.append(taken(self._parser, self._netns, self._ring.duplicates - self._met_again))
                self._met_again = self._ring.duplicates
        if self._looked_ns is None or now_ns - self._looked_ns >= STATISTICS_S * 1e9:
            blocks += self._gaps(now_ns)
            self._looked_ns = now_ns
        return blocks

    def _gaps(self, now_ns: int) -> list[Block]:
        """Say what was lost since the last time."""
        where = self.interface or "all interfaces"
        parsed = self._parser.counts()
        counts = {
            "dropped": (self._dropped(), f"packets dropped by the kernel, the ring of {where} was full"),
            "malformed_blocks": (self._ring.malformed_blocks, f"ring blocks of {where} did not add up"),
            **{name: (parsed[name], f"{where}: {reason}") for name, reason in MISSED.items()},
        }
        gaps: list[Block] = []
        for key, (count, reason) in counts.items():
            if count is not None and count > self._told[key]:
                gaps.append(Gap(now_ns, "packets", reason, self._looked_ns, count - self._told[key]))
                self._told[key] = count
        if counts["dropped"][0] is None and self._drops is not None:
            os.close(self._drops)
            self._drops = None
            gaps.append(Gap(now_ns, "packets", f"the broker has gone: drops of {where} are no longer counted",
                            self._looked_ns))
        return gaps

    def _dropped(self) -> int | None:
        """Return the sum that the broker wrote last, None once it has gone."""
        if self._drops is None:
            return None
        try:
            data = os.read(self._drops, 4096)
        except BlockingIOError:
            return self._told["dropped"]
        if len(data) < COUNT.size:
            return None
        return int(COUNT.unpack_from(data, len(data) // COUNT.size * COUNT.size - COUNT.size)[0])

    def close(self) -> None:
        self._ring.close()
        os.close(self.ready)
        if self._drops is not None:
            os.close(self._drops)
            self._drops = None


class PacketSensor:
    """All rings of the settings as one sensor."""

    name = "packets"
    period_ns: int | None = 1_000_000_000

    def __init__(self, sources: list[_Source], ignored: tuple[str, ...] = ()) -> None:
        self._sources = sources
        self._untold = ignored
        self._epoll = select.epoll()
        for source in sources:
            self._epoll.register(source.ready, select.EPOLLIN)
        self.descriptor: int | None = self._epoll.fileno()

    def read(self, now_ns: int) -> list[Block]:
        """Return the packets since the last call, interface by interface, and a `Gap` for what was lost.

        What the settings keep from sight is a `Gap` of the first call.
        """
        blocks_max = max(1, BLOCKS_MAX // len(self._sources))
        blocks = [block for source in self._sources for block in source.read(now_ns, blocks_max)]
        if self._untold:
            reason = f"not looked at and not counted, by packets.ignore: {'; '.join(self._untold)}"
            blocks.append(Gap(now_ns, "packets", reason, now_ns))
            self._untold = ()
        return blocks

    def close(self) -> None:
        """Unmap the rings and close what was handed over; the broker's side follows by itself."""
        self.descriptor = None
        self._epoll.close()
        for source in self._sources:
            source.close()
        self._sources = []
