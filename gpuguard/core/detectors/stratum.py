"""Mining pools, spoken to in clear: the first line of a connection is JSON-RPC in the words of a pool's protocol.

Stratum V1 (mining.subscribe, mining.authorize), the dialect of CryptoNote coins (login, then a job with its blob) and
ethproxy's (eth_submitLogin). The port says nothing, nor does the name of the pool: pools listen on 443, and proxies of
pools anywhere.

Benign look-alikes: JSON-RPC of other programs (language servers, Electrum and Lightning wallets, Ethereum nodes asked
for blocks and balances, a ``login`` of any service): other methods, or without the fields that only a pool's have. A
pool that runs on this host and is dialled from outside is somebody else's mining.

Encrypted, a pool is not told from other talk by its timing alone: a push every half minute and small answers in between
are what chats, brokers and telemetry have as well. There the launches speak (`detectors.mining`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.evidence import Evidence
from gpuguard.core.host import BoundedTable
from gpuguard.core.observations import FlowOpened, StratumSeen

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block
    from gpuguard.core.subjects import FlowId

FLOWS_MAX = 16_384

# The methods of Stratum V1 are nobody else's: a first line with one is a miner's, a pool's, or a test of either, and
# with tests and honeypots the odds are still those of a confirmed finding. Ethereum nodes know eth_getWork and
# eth_submitWork too, over HTTP. A login with a password, and a job with a blob, are each rare, and each of one side.
MINING_NATS = 21.0
ETHPROXY_NATS = 14.0
CRYPTONOTE_NATS = 11.0

_SPOTS = ("TLS, SSH and other wrappings", "a connection whose opening was not seen", "Stratum V2")

Ends = tuple[int, str, int, str, int]


class Detector:
    """Tells of connections whose first line is a pool's."""

    takes = (FlowOpened, StratumSeen)

    def __init__(self) -> None:
        self._flows: BoundedTable[Ends, FlowId] = BoundedTable(FLOWS_MAX)

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return what a first line weighs."""
        match item:
            case FlowOpened() if item.flow.protocol == 6:
                flow = item.flow
                ends = (flow.initiator, flow.initiator_port, flow.responder, flow.responder_port)
                self._flows[flow.netns, *ends] = flow
            case StratumSeen():
                return self._line(item, host)
            case _:
                pass
        return []

    def _line(self, item: StratumSeen, host: Host) -> list[Evidence]:
        near, far = (item.source, item.source_port), (item.destination, item.destination_port)
        flow = self._flows.get((item.netns, *near, *far)) or self._flows.get((item.netns, *far, *near))
        if flow is None or host.is_inbound(flow):
            return []
        by_far = near == (flow.responder, flow.responder_port)
        return [Evidence(
            time_ns=item.time_ns,
            subject=flow,
            label="mining-pool",
            evidence_class="network",
            kind="pool-answers" if by_far else "pool-is-asked",
            nats=_weigh(item.method),
            text=f"the first line of the {'far' if by_far else 'near'} side is a mining pool's JSON-RPC: {item.method}",
            start_ns=flow.start_ns,
            carrier="tcp",
            blind_spots=_SPOTS,
        )]


def _weigh(method: str) -> float:
    if method.startswith("mining."):
        return MINING_NATS
    return ETHPROXY_NATS if method.startswith("eth_") else CRYPTONOTE_NATS
