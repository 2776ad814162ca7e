"""Frames and capture files under mutation, for as many seconds as the first argument says.

Three things are asserted of each input: a file ends well or in a `CaptureError` after the same `Gap`; the rows do not
depend on the size of the blocks; and every fact points at a row. With GPUGUARD_DATA_DIR real captures are mutated too.
For reads out of bounds build the parser as tests/asan_packets.sh does.
"""

from __future__ import annotations

import io
import os
import random
import sys
import time
from pathlib import Path

from gpuguard.core.records import Gap
from gpuguard.sensors.packets import CaptureError, read_capture

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test_packets as frames
import test_packets_capture as files
import test_packets_fragments as fragments
import test_packets_protocols as protocols

SEED_BYTES_MAX = 200_000
INTERESTING = (0, 1, 4, 5, 15, 16, 20, 21, 63, 64, 127, 128, 191, 192, 254, 255)


def corpus() -> list[bytes]:
    """Every format, with every kind of message, and real captures where there are some."""
    hello = frames.tls_record(frames.client_hello("a.example", ("h2", "http/1.1"), 300))
    packets = [data for stream in (frames.SSH_STREAM, b"hello\r\n" + frames.SSH_STREAM, hello)
               for _, data, _ in frames.tcp_frames(stream, list(range(50, len(stream), 400)))]
    packets += [frames.ipv4(frames.udp(frames.question(b"a", b"example")), 17),
                frames.ipv6(b"\x2c\0" + bytes(6) + b"\x11\0\0\1" + bytes(4) + frames.udp(bytes(20)), 60)]
    packets += [one for make in (fragments.piece4, fragments.piece6) for cuts in ([24, 96], [512])
                for one in fragments.pieces(fragments.DATAGRAM[:900], cuts, make, number=len(cuts))]
    packets += fragments.pieces(frames.tcp(frames.SSH_STREAM), [40, 600], protocol=6)[::-1]
    packets += [data for _, data, _ in frames.tcp_frames(frames.SSH_STREAM, list(range(50, 1500, 200)), 9000)[::-1]]
    asked = [protocols.GREETING, protocols.REQUEST, protocols.REQUESTED]
    visits = ([b"ok", *asked[:2]], [protocols.START_WORK, asked[2]],
              [protocols.mux(1, 1), *(protocols.mux(0, 0, 1, one) for one in asked)],
              [protocols.SWITCHED, *(protocols.ws(one, opcode=2) for one in (b"SSH-2.0-x\r\n", *asked))])
    packets += [data for said in visits for _, data, _ in protocols.frames([(one, 1) for one in said], flags=18)[0]]
    seeds = [files.pcap(packets), files.pcap(packets, ">", 0xA1B2CD34)]
    seeds += [files.pcapng(packets), files.pcapng(packets, ">")]
    seeds += [path.read_bytes()[:SEED_BYTES_MAX] for path in files.CAPTURES]
    return seeds


def mutated(seed: bytes, dice: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(dice.choice((1, 2, 4, 16, 64))):
        at = dice.randrange(len(data))
        kind = dice.randrange(5)
        if kind == 0:
            data[at] = dice.choice(INTERESTING)
        elif kind == 1:
            data[at] ^= 1 << dice.randrange(8)
        elif kind == 2:
            del data[at:at + dice.choice((1, 4, 64))]
        elif kind == 3:
            data[at:at] = data[at:at + dice.choice((1, 4, 64))]
        else:
            data[at:at + 4] = dice.randbytes(4)
        if not data:
            data = bytearray(seed)
    return bytes(data)


def outcome(data: bytes, rows_max: int) -> tuple[bytes, int, str]:
    """Return all rows, how many facts there were, and the error."""
    rows, facts, gaps = b"", 0, []
    try:
        for block in read_capture(io.BytesIO(data), rows_max):
            if isinstance(block, Gap):
                gaps.append(block.reason)
                continue
            assert all(0 <= fact.row < len(block.rows) for fact in block.facts)
            rows += block.rows.tobytes()
            facts += len(block.facts)
    except CaptureError as error:
        assert str(error) in gaps
        return rows, facts, str(error)
    return rows, facts, ""


def main(seconds: float) -> None:
    seed_number = int(os.environ.get("GPUGUARD_FUZZ_SEED", "1"))
    dice = random.Random(seed_number)
    seeds = corpus()
    end = time.monotonic() + seconds
    tried = 0
    while time.monotonic() < end:
        data = mutated(dice.choice(seeds), dice)
        try:
            assert outcome(data, 8192) == outcome(data, dice.choice((1, 3, 100)))
        except BaseException:
            Path("fuzz_packets.failed").write_bytes(data)
            print(f"input {tried} of seed {seed_number} is in fuzz_packets.failed", file=sys.stderr)
            raise
        tried += 1
    print(f"{tried} inputs, none failed")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60)
