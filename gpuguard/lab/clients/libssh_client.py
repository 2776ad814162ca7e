"""libssh (by its binding ssh-python) as the lab's client."""

from __future__ import annotations

import contextlib
import importlib
import socket
import time
from typing import Any

from gpuguard.lab.clients import plan as plans

options = importlib.import_module("ssh.options")
errors = importlib.import_module("ssh.exceptions")
_POLL_S = 0.005


def main() -> None:
    """Do what the plan says."""
    plan = plans.read()
    with socket.create_connection((plan.host, plan.port)) as line:
        session = _connected(plan, line)
        end = time.monotonic() + plan.hold_s
        if not plan.reverse_after_s:
            _ask(session, plan)
        asked = not plan.reverse_after_s
        pumps: list[tuple[Any, socket.socket]] = []
        typed = _typing(session, plan)
        start = time.monotonic()
        while time.monotonic() < end:
            with contextlib.suppress(errors.EOF):
                next(typed, None)
            if not asked and time.monotonic() - start > plan.reverse_after_s:
                _ask(session, plan)
                asked = True
            if plan.reverse and asked:
                _pump(session, plan, pumps)
            time.sleep(_POLL_S)
        session.disconnect()


def _connected(plan: plans.Plan, line: socket.socket) -> Any:
    session = importlib.import_module("ssh.session").Session()
    session.options_set(options.HOST, plan.host)
    session.options_set(options.USER, plan.user)
    session.options_set_port(plan.port)
    if plan.cipher:
        session.options_set(options.CIPHERS_C_S, plan.cipher)
        session.options_set(options.CIPHERS_S_C, plan.cipher)
    if plan.mac:
        session.options_set(options.HMAC_C_S, plan.mac)
        session.options_set(options.HMAC_S_C, plan.mac)
    if plan.compressed:
        session.options_set(options.COMPRESSION, "yes")
    session.set_socket(line)
    session.connect()
    session.userauth_publickey(importlib.import_module("ssh.key").import_privkey_file(plan.key))
    return session


def _ask(session: Any, plan: plans.Plan) -> None:
    for one in plan.reverse:
        session.listen_forward(one.bind, one.port, 0)


def _typing(session: Any, plan: plans.Plan) -> Any:
    """Take one turn of the session each time this is resumed: keys as they fall due, then commands."""
    if plan.shell:
        channel = session.channel_new()
        channel.open_session()
        channel.request_pty()
        channel.request_shell()
        for key, gap_s in plans.keys(plan):
            channel.write(key.encode())
            due = time.monotonic() + gap_s
            while time.monotonic() < due:
                channel.read_nonblocking(65_536)
                yield
    for command in plan.commands:
        channel = session.channel_new()
        channel.open_session()
        channel.request_exec(command)
        while not channel.is_eof():
            channel.read_nonblocking(65_536)
            yield
        channel.close()
    for host, port in plan.local:
        channel = session.channel_new()
        channel.open_forward(host, port, "127.0.0.1", 50_000)
        channel.write(b"GET / HTTP/1.0\r\n\r\n")
        while not channel.is_eof():
            channel.read_nonblocking(65_536)
            yield
        channel.close()


def _pump(session: Any, plan: plans.Plan, pumps: list[tuple[Any, socket.socket]]) -> None:
    """Take a forwarded connection in, and carry what waits on those that are open."""
    with contextlib.suppress(errors.BaseSSHError, errors.EOF):
        channel = session.accept_forward(0, plan.reverse[0].port)
        if channel is not None:
            inner = socket.create_connection((plan.reverse[0].to_host, plan.reverse[0].to_port))
            inner.setblocking(False)
            pumps.append((channel, inner))
    for channel, inner in pumps:
        size, data = channel.read_nonblocking(32_768)
        if size > 0:
            inner.sendall(data[:size])
        with contextlib.suppress(BlockingIOError):
            if out := inner.recv(32_768):
                channel.write(out)


if __name__ == "__main__":
    main()
