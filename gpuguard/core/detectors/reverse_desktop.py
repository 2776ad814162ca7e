"""A desktop or a window of this host, steered from the far side of a connection that this host opened: VNC and X11.

A VNC server speaks first, with its version; the viewer answers with one of the same form (RFC 6143, 7.1.1). Viewers
dial. Where the side that dialled sends its version before it was sent one, it is the server: `x11vnc -connect`,
`vncconfig -connect` and implants do so to get past a firewall, and the far side then types and moves the mouse here.
The order of two lines says so, before any use and whatever the ports.

A program of this host that opens its window on a far display (`xterm -display there:0`) is typed into by whoever sits
there: the oldest of all reverse shells. X11 in clear says so itself: this host's setup, and the display's KeyPress
events (X Window System Protocol, 8 and 10).

Benign look-alikes: viewers, who answer a version; a server that is dialled, however it is used; a capture that lost
the server's first line, which is why the viewer's has to be seen as well, and after it. People who ask for help on
their own desktop do the same on purpose: on a host without people it is for an operator to know, so that it is
suspect, no more. So it is with displays: clocks and plots there are not typed into; X terminals, and people who set
DISPLAY to their own desk, have nearly died out since X servers no longer listen on TCP unless told to (2014) and
`ssh -X` goes another way, and their keys are in clear for everybody between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.bounded import BoundedTable
from gpuguard.core.evidence import Evidence
from gpuguard.core.observations import FlowClosed, Spoke

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block
    from gpuguard.core.subjects import FlowId

FLOWS_MAX = 1_024

# Twelve bytes of fixed form on each side, in the order that only a server on the dialling side makes: what is left of
# doubt is help that was asked for.
NATS = 8.0

# Twenty keys are typing and no stray ones; who types at a desk of his own is most of what is left of doubt.
TYPED_NATS = 7.0

_SPOTS = ("VNC inside TLS, SSH or WebSockets", "repeaters that speak first", "keys by X11's input extension",
          "a connection whose opening was not seen")


class Detector:
    """Tells of VNC servers that dial, and of X11 displays that are typed at."""

    takes = (Spoke, FlowClosed)

    def __init__(self) -> None:
        self._first: BoundedTable[FlowId, tuple[str, str]] = BoundedTable(FLOWS_MAX)

    def evicted(self) -> dict[str, int]:
        """Return how much was forgotten because a table was full, by what it was."""
        return {"connections of desktops": self._first.evicted}

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return the evidence when the called side's word shows which way round this is."""
        if isinstance(item, FlowClosed):
            self._first.pop(item.flow)
        if not isinstance(item, Spoke) or item.what not in ("rfb-version", "x11-setup", "x11-keys"):
            return []
        flow = item.flow
        first = self._first.get(flow)
        self._first[flow] = first or (item.what, item.speaker)
        if item.speaker != "responder" or not host.network.dialled_out(flow):
            return []
        if (first, item.what) == (("rfb-version", "initiator"), "rfb-version"):
            return [_evidence(item, "desktop-served-outward", NATS,
                              "the side that dialled sent its VNC version first, as servers do, and was answered with "
                              "a viewer's: the far side sees and steers a desktop of this host")]
        if (first, item.what) == (("x11-setup", "initiator"), "x11-keys"):
            return [_evidence(item, "window-typed-in-afar", TYPED_NATS,
                              "a program of this host has its window on a far X display, where twenty keys were "
                              "pressed in it")]
        return []


def _evidence(item: Spoke, kind: str, nats: float, text: str) -> Evidence:
    return Evidence(
        time_ns=item.time_ns,
        subject=item.flow,
        label="reverse-shell",
        evidence_class="network",
        kind=kind,
        nats=nats,
        text=text,
        start_ns=item.flow.start_ns,
        carrier="tcp",
        blind_spots=_SPOTS,
    )
