"""AsyncSSH as the lab's client, and, with ``serve`` or ``dial-out`` before the plan, as its server."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sys
import tempfile
import time
from typing import Any

from gpuguard.lab.clients import plan as plans

asyncssh: Any = importlib.import_module("asyncssh")


async def play(plan: plans.Plan) -> None:
    """Do what the plan says."""
    options = {
        **({"encryption_algs": [plan.cipher]} if plan.cipher else {}),
        **({"mac_algs": [plan.mac]} if plan.mac else {}),
        **({"compression_algs": ["zlib@openssh.com"]} if plan.compressed else {}),
    }
    connection = await asyncssh.connect(plan.host, plan.port, username=plan.user, client_keys=[plan.key], config=None,
                                        known_hosts=None, keepalive_interval=plan.keepalive_s, **options)
    end = time.monotonic() + plan.hold_s
    asking = asyncio.create_task(_ask(connection, plan))
    if not plan.reverse_after_s:
        await asking
    await _session(connection, plan)
    for host, port in plan.local:
        reader, writer = await connection.open_connection(host, port)
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        await reader.read(1 << 20)
        writer.close()
    await asyncio.sleep(max(0.0, end - time.monotonic()))
    await asking
    connection.close()


async def _ask(connection: Any, plan: plans.Plan) -> None:
    await asyncio.sleep(plan.reverse_after_s)
    for one in plan.reverse:
        if one.path:
            await connection.forward_remote_path_to_port(one.path, one.to_host, one.to_port)
        else:
            await connection.forward_remote_port(one.bind, one.port, one.to_host, one.to_port)


async def _session(connection: Any, plan: plans.Plan) -> None:
    if plan.shell:
        process = await connection.create_process(term_type="xterm", encoding=None)
        drain = asyncio.create_task(process.stdout.read())
        for key, gap_s in plans.keys(plan):
            process.stdin.write(key.encode())
            await asyncio.sleep(gap_s)
        drain.cancel()
    for command in plan.commands:
        await connection.run(command)
    if plan.put_bytes:
        with tempfile.NamedTemporaryFile() as file:
            file.write(bytes(plan.put_bytes))
            file.flush()
            async with connection.start_sftp_client() as sftp:
                await sftp.put(file.name, f"/tmp/lab-{plan.seed}")


def _allow(*_: object) -> bool:
    return True


#: Lets the lab's key in and forwards what is asked for.
_Server = type("_Server", (asyncssh.SSHServer,), {
    "connection_requested": _allow, "server_requested": _allow, "unix_server_requested": _allow})


async def _shell(process: Any) -> None:
    """A shell's worth of answers: echoes, and a prompt after each line."""
    command = process.command
    if command:
        done = await asyncio.create_subprocess_shell(command, stdout=asyncio.subprocess.PIPE)
        out, _ = await done.communicate()
        process.stdout.write(out)
        process.exit(done.returncode or 0)
        return
    process.stdout.write(b"$ ")
    while key := await process.stdin.read(1):
        process.stdout.write(b"\r\nuid=1001 gid=1001\r\n$ " if key in b"\r\n" else key)
    process.exit(0)


async def serve(host_key: str, authorized: str, port: int, *, dial: tuple[str, int] | None = None) -> None:
    """Be a server; ``dial`` says where the client waits to be called, as malware does that swaps the roles."""
    options = {"server_factory": _Server, "server_host_keys": [host_key], "authorized_client_keys": authorized,
               "process_factory": _shell, "encoding": None, "line_editor": False, "sftp_factory": True}
    if dial:
        connection = await asyncssh.connect_reverse(*dial, **options)
        await connection.wait_closed()
        return
    await asyncssh.listen("", port, **options)
    await asyncio.Event().wait()


async def wait_for_a_server(plan: plans.Plan) -> None:
    """Be the client that is called: type in the shell of whoever dials in."""
    done = asyncio.Event()

    async def called(connection: Any) -> None:
        await _session(connection, plan)
        done.set()

    def take(connection: Any) -> None:
        tasks.append(asyncio.create_task(called(connection)))

    tasks: list[asyncio.Task[None]] = []
    await asyncssh.listen_reverse(plan.host, plan.port, username=plan.user, client_keys=[plan.key], known_hosts=None,
                                  acceptor=take, config=None)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(done.wait(), plan.hold_s)


def main() -> None:
    """PLAN; serve HOSTKEY AUTHORIZED PORT; or, swapped: dial-out HOSTKEY AUTHORIZED HOST PORT, and called PLAN."""
    match sys.argv[1:]:
        case ["serve", host_key, authorized, port]:
            asyncio.run(serve(host_key, authorized, int(port)))
        case ["dial-out", host_key, authorized, host, port]:
            asyncio.run(serve(host_key, authorized, 0, dial=(host, int(port))))
        case ["called", text]:
            sys.argv = [sys.argv[0], text]
            asyncio.run(wait_for_a_server(plans.read()))
        case _:
            asyncio.run(play(plans.read()))


if __name__ == "__main__":
    main()
