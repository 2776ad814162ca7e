"""Paramiko as the lab's client."""

from __future__ import annotations

import importlib
import io
import random
import struct
import threading
import time
from typing import Any

from gpuguard.lab.clients import plan as plans
from gpuguard.lab.clients.relay import relay

paramiko = importlib.import_module("paramiko")


def main() -> None:
    """Do what the plan says."""
    plan = plans.read()
    transport = paramiko.Transport((plan.host, plan.port))
    security = transport.get_security_options()
    if plan.cipher:
        security.ciphers = [plan.cipher]
    if plan.mac:
        security.digests = [plan.mac]
    transport.use_compression(plan.compressed)
    if plan.padded:
        _pad(transport.packetizer, random.Random(plan.seed))
    transport.connect(username=plan.user, pkey=paramiko.Ed25519Key.from_private_key_file(plan.key))
    transport.set_keepalive(plan.keepalive_s)
    end = time.monotonic() + plan.hold_s
    if plan.reverse_after_s:
        threading.Timer(plan.reverse_after_s, _ask, (transport, plan)).start()
    else:
        _ask(transport, plan)
    _session(transport, plan)
    for host, port in plan.local:
        channel = transport.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 50_000))
        channel.sendall(b"GET / HTTP/1.0\r\n\r\n")
        while channel.recv(65_536):
            pass
        channel.close()
    time.sleep(max(0.0, end - time.monotonic()))
    transport.close()


def _pad(packetizer: Any, noise: random.Random) -> None:
    """Pad every record by up to twelve blocks beyond the minimum, as RFC 4253 section 6 allows."""
    build = packetizer._build_packet  # noqa: SLF001, there is no other place to pad at

    def padded(payload: bytes) -> bytes:
        packet: bytes = build(payload)
        extra = 16 * noise.randrange(13)
        size, padding = struct.unpack_from(">IB", packet)
        return struct.pack(">IB", size + extra, padding + extra) + packet[5:] + bytes(extra)

    packetizer._build_packet = padded  # noqa: SLF001


def _ask(transport: Any, plan: plans.Plan) -> None:
    for one in plan.reverse:
        def connect(channel: Any, _origin: object, _server: object, one: plans.Reverse = one) -> None:
            threading.Thread(target=relay, args=(channel.recv, channel.sendall, one), daemon=True).start()
        transport.request_port_forward(one.bind, one.port, connect)


def _session(transport: Any, plan: plans.Plan) -> None:
    if plan.shell:
        channel = transport.open_session()
        channel.get_pty()
        channel.invoke_shell()
        for key, gap_s in plans.keys(plan):
            channel.sendall(key.encode())
            time.sleep(gap_s)
            while channel.recv_ready():
                channel.recv(65_536)
        channel.close()
    for command in plan.commands:
        channel = transport.open_session()
        channel.exec_command(command)
        while channel.recv(65_536):
            pass
        channel.close()
    if plan.put_bytes:
        with paramiko.SFTPClient.from_transport(transport) as sftp:
            sftp.putfo(io.BytesIO(bytes(plan.put_bytes)), f"/tmp/lab-{plan.seed}")


if __name__ == "__main__":
    main()
