"""Packets of this host, live from the kernel or from capture files, as headers and facts: payload never leaves here.

Live: the broker opens an AF_PACKET socket with a TPACKET_V3 ring (Documentation/networking/packet_mmap.rst), binds it,
and hands over three descriptors: the socket, an epoll that watches it, and the reading end of a pipe. A packet socket
can also send, and be bound anew; so the guard maps the ring, closes the socket at once, and waits on the epoll. What
it keeps can read packets and nothing else.

Without the socket the guard cannot ask how many packets were dropped (PACKET_STATISTICS). The flag TP_STATUS_LOSING of
a block says that there were some, not how many, and stays until somebody asks. So a thread of the broker asks each
second and writes the sum into the pipe. The pipe also tells each side that the other has gone: the thread then closes
its socket, and the guard says that drops are no longer counted.

The socket is of type SOCK_DGRAM: frames begin at the network header whatever the interface is, so that "all
interfaces" may mix Ethernet, tun and WireGuard, and hardware addresses are never read. On loopback each packet passes
twice, outgoing and incoming; the socket filter keeps the incoming one. It also drops what the operator does not want to
be looked at (`packet_filter`): a classic program cannot count, so nobody knows how much that is.

Several rings (`packets.rings`) share the packets as one PACKET_FANOUT group, so that not all processors wait for one
ring's lock. Both directions of a flow are in the same one, and all fragments of a datagram, though not always with the
whole datagrams of their flow, for they have no ports: but for these, order is kept within a flow. What is in different
rings is met in turn, by blocks, as what is on different interfaces: time goes back by as much as a block may wait. No
socket passes anything until all have joined; else each would get all packets for a while.

A packet that crosses several interfaces of one namespace (a container's veth, a bridge, the card) is met on each, and
counts where it was met first: on another interface within 10 ms, a packet with the same addresses, ports, numbers and
sizes is the same one; a block says how many of them there were.

`captures` reads files, `rings` is the broker's half, `sensor` the guard's; `parsed` is what all have of the parser.

Known limits: an address translated on the way, or a segment cut up for the card, makes another packet; two interfaces
used in turn for equal datagrams of IPv6 look like one packet on its way. Other network namespaces are not looked into.
"""

from __future__ import annotations

from gpuguard.sensors.packets.captures import CaptureError, read_capture
from gpuguard.sensors.packets.rings import HELD_BYTES_MAX, grant
from gpuguard.sensors.packets.sensor import PacketSensor, open_sensor

__all__ = ["HELD_BYTES_MAX", "CaptureError", "PacketSensor", "grant", "open_sensor", "read_capture"]
