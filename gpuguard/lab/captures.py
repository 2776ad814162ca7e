"""Make labelled captures: every scenario of `corpus` and `programs`, played by real programs over the lab's wire.

Each scenario has a far address of its own, so that one capture holds many and the address is the label's key. Packets
are those of the node's side of a TAP pair with 12 ms and up to 2 ms of jitter each way (`link`), to which the bridge
adds what the machine's load makes of it: that is measured by a ping throughout, and stated with the labels. Of each
connection all of the first frames is kept, for the key exchange, and of the rest the headers.

Usage: ``python -m gpuguard.lab.captures OUT [--only WORD] [--first N] [--jobs N] [--lost RATIO]``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import gzip
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from gpuguard.lab import corpus, link, namespaces, peers, programs, sessions
from gpuguard.lab.namespaces import LabClosed, furnish, in_network_of, run, run_as_first, tool_path
from gpuguard.lab.player import ADDRESSES, Player, Row, address_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpuguard.lab.corpus import Scenario

WHOLE_FRAMES = 40
HEADERS_BYTES = 96
COLUMNS = ("file", "address", "family", "split", "client", "server", "suite", "arguments", "through", "expected",
           "start_ns", "asked_ns", "used_ns", "problem", "rtt_ms_median", "rtt_ms_p95")
class Settings(msgspec.Struct, frozen=True):
    """What the caller wants of the lab."""

    out: str
    only: str = ""
    first: int = 0
    jobs: int = 16
    lost_ratio: float = 0.0
    delay_ms: float = link.DELAY_NS / 1e6


def main() -> None:
    """Start the lab and wait for it; or, inside it, play."""
    if sys.argv[1].startswith("{"):
        settings = msgspec.json.decode(sys.argv[1], type=Settings)
        run_as_first(lambda: play(settings))
    parser = argparse.ArgumentParser(description="Make labelled captures of SSH in namespaces.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="", help="families with this word in their name")
    parser.add_argument("--first", type=int, default=0, help="number of the first scenario, to go on after a break")
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--lost", type=float, default=0.0, help="share of frames to lose on the wire")
    parser.add_argument("--delay-ms", type=float, default=link.DELAY_NS / 1e6, help="of the wire, each way")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(str(arguments.out.resolve()), arguments.only, arguments.first, arguments.jobs, arguments.lost,
                        arguments.delay_ms)
    lab = subprocess.Popen(namespaces.unshare_command(
        [sys.executable, "-m", "gpuguard.lab.captures", msgspec.json.encode(settings).decode()]),
        stdin=subprocess.PIPE, start_new_session=True)
    sys.exit(lab.wait())


def play(settings: Settings) -> int:
    """Build the lab, play all scenarios while capturing, and write captures and labels."""
    if tool_path("ping") is None or tool_path("tcpdump") is None:
        raise LabClosed("ping or tcpdump is missing (packages iputils-ping, tcpdump)")
    furnish()
    peers.make_keys()
    far = _far_side(settings)
    wanted = [(number, one) for number, one in enumerate([*corpus.scenarios(), *programs.scenarios()])
              if number >= settings.first and settings.only in one.family
              and peers.available(one.client) and peers.available(one.server)]
    for number, _ in wanted:
        run(*in_network_of(far), "ip", "address", "add", f"{address_of(number)}/32", "dev", "lo")
    servers = tuple(name for name in peers.SERVER_PORTS if peers.available(name))
    peers.start_servers(servers, far)
    peers.start_servers(tuple(f"openssh:{release}" for release in peers.RELEASES), None)
    _targets(far)
    programs.start_services(far)
    raw = Path(settings.out) / "all.pcap"
    capture = subprocess.Popen([str(tool_path("tcpdump")), "-i", "eth0", "-s", "0", "-B", "65536", "-Z", "root", "-w",
                                str(raw), f"(tcp or udp or icmp) and not host {link.FAR}"], stderr=subprocess.PIPE)
    ping = subprocess.Popen([str(tool_path("ping")), "-n", "-D", "-i", "0.1", link.FAR], stdout=subprocess.PIPE)
    pings = _Pings(ping)
    time.sleep(1)
    with concurrent.futures.ThreadPoolExecutor(settings.jobs) as pool:
        rows = list(pool.map(lambda one: Player(one[0], one[1], far).play(_scene(one[1])), wanted))
    time.sleep(1)
    capture.send_signal(signal.SIGINT)
    said = capture.communicate()[1].decode()
    ping.send_signal(signal.SIGINT)
    pings.join()
    _write(settings, rows, raw, pings)
    problems = [row for row in rows if row.problem]
    print(f"{len(rows)} scenarios, {len(problems)} with a problem; {said.strip()}")  # noqa: T201
    for row in problems:
        print(f"  {row.scenario.family} {row.scenario.suite} {row.scenario.server}: {row.problem}")  # noqa: T201
    return 0


def _scene(scenario: Scenario) -> Callable[[Player], None]:
    return programs.PLAYS[scenario.use].run if scenario.client == "program" else sessions.play


def _far_side(settings: Settings) -> int:
    holder = subprocess.Popen([str(tool_path("unshare")), "--net", "--", "sleep", "infinity"])
    ours = Path("/proc/self/ns/net").readlink()
    while Path(f"/proc/{holder.pid}/ns/net").readlink() == ours:
        time.sleep(0.01)
    bridge = subprocess.Popen([sys.executable, "-m", "gpuguard.lab.link", str(holder.pid),
                               str(settings.lost_ratio), str(settings.delay_ms)],
                              stdout=subprocess.PIPE)
    if bridge.stdout is None or not bridge.stdout.readline():
        raise LabClosed("the delay bridge did not come up")
    subprocess.Popen([str(tool_path("cat"))], stdin=bridge.stdout, stdout=subprocess.DEVNULL)
    run("ip", "route", "add", f"{ADDRESSES}.0.0/16", "via", link.FAR)
    return holder.pid


def _targets(far: int) -> None:
    """What tunnels lead to, on both sides: a shell on a terminal, a shell on a socket, and a file by HTTP."""
    folder = namespaces.ROOT / "web"
    folder.mkdir()
    (folder / "index.html").write_bytes(os.urandom(300_000))
    for prefix in ([], in_network_of(far)):
        for port, how in ((7001, "EXEC:/bin/bash,pty,stderr,setsid,sane,ctty"), (7002, "EXEC:/bin/bash,stderr")):
            subprocess.Popen([*prefix, str(tool_path("socat")), f"TCP-LISTEN:{port},fork,reuseaddr", how])
        subprocess.Popen([*prefix, sys.executable, "-m", "http.server", "7003", "--directory", str(folder)],
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    certificate = namespaces.ROOT / "tls.pem"
    run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout",
        str(certificate), "-out", str(certificate) + ".crt", "-subj", "/CN=lab")
    with certificate.open("a") as file:
        file.write((namespaces.ROOT / "tls.pem.crt").read_text())
    for (carrier, server), port in sessions.CARRIER_PORTS.items():
        behind = peers.SERVER_PORTS[server]
        wrap = ["-m", "websockify", str(port), f"127.0.0.1:{behind}"]
        command = [sys.executable, *wrap] if carrier == "websocket" else [
            str(tool_path("socat")), f"OPENSSL-LISTEN:{port},fork,reuseaddr,cert={certificate},verify=0",
            f"TCP:127.0.0.1:{behind}"]
        subprocess.Popen([*in_network_of(far), *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(2)


class _Pings(threading.Thread):
    """Round trips over the wire as ping(8) measures them throughout, 10 a second."""

    def __init__(self, ping: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        self._ping = ping
        self._seen: list[tuple[float, float]] = []
        self.start()

    def run(self) -> None:
        """Read `[SECONDS] 64 bytes from ...: icmp_seq=1 ttl=64 time=25.1 ms` until ping ends."""
        for line in self._ping.stdout or ():
            words = line.decode().replace("=", " ").split()
            if words[:1] and words[0].startswith("[") and "time" in words:
                self._seen.append((float(words[0].strip("[]")), float(words[words.index("time") + 1])))

    def between(self, start_ns: int, end_ns: int) -> tuple[str, str]:
        """Return the median and the 95th percentile in milliseconds, "" where none came back."""
        times = sorted(rtt for seconds, rtt in self._seen if start_ns <= seconds * 1e9 <= end_ns)
        if not times:
            return "", ""
        return f"{times[len(times) // 2]:.1f}", f"{times[len(times) * 95 // 100]:.1f}"


# -- files ------------------------------------------------------------------------------------------------------------

_ETHERNET, _IPV4, _TCP = 14, 0x0800, 6


def _frames(raw: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield (record header, frame) of a pcap file of this machine's byte order."""
    with raw.open("rb") as file:
        file.read(24)
        while len(head := file.read(16)) == 16:
            yield head, file.read(struct.unpack("=IIII", head)[2])


def number_of(frame: bytes) -> tuple[int, str] | None:
    """Return the scenario that a frame belongs to, by its far address, and the address."""
    if frame[12:14] != _IPV4.to_bytes(2, "big"):
        return None
    net = bytes(map(int, ADDRESSES.split(".")))
    for at in (26, 30):
        if frame[at:at + 2] == net:
            return frame[at + 2] * 250 + frame[at + 3] - 1, ".".join(map(str, frame[at:at + 4]))
    return None


def _write(settings: Settings, rows: list[Row], raw: Path, pings: _Pings) -> None:
    """Sort the frames into one file a family, and write the labels."""
    out = Path(settings.out)
    files = {row.number: f"{row.scenario.split}/{row.scenario.family}.pcap.gz" for row in rows}
    header = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65_535, 1)
    kept: dict[str, bytearray] = {}
    seen: dict[tuple[int, bytes], int] = {}
    for head, frame in _frames(raw):
        scenario = number_of(frame)
        if scenario is None or scenario[0] not in files:
            continue
        number = scenario[0]
        ports = frame[34:38] if frame[26:28] < frame[30:32] else frame[36:38] + frame[34:36]
        ports = ports if frame[23] == _TCP else os.urandom(4)
        count = seen[number, ports] = seen.get((number, ports), 0) + 1
        seconds, micros, _, size = struct.unpack("=IIII", head)
        cut = frame if count <= WHOLE_FRAMES else frame[:HEADERS_BYTES]
        record = struct.pack("=IIII", seconds, micros, len(cut), size) + cut
        kept.setdefault(files[number], bytearray(header)).extend(record)
    for name, data in kept.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(gzip.compress(bytes(data), 9, mtime=0))
    with (out / "LABELS.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(COLUMNS)
        for row in rows:
            one = row.scenario
            table.writerow((files[row.number], address_of(row.number), one.family, one.split, one.client, one.server,
                            one.suite, " ".join(one.arguments), one.through, one.expected, row.start_ns, row.asked_ns,
                            row.used_ns, row.problem, *pings.between(row.start_ns, row.end_ns)))
    raw.unlink()
    (out / "LINK.json").write_text(json.dumps({
        "delay_ms": settings.delay_ms, "jitter_ms_max": link.JITTER_NS / 1e6, "lost_ratio": settings.lost_ratio,
        "host": socket.gethostname()}) + "\n")


if __name__ == "__main__":
    main()
