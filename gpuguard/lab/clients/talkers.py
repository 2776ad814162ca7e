"""One end of a conversation that GPU servers have all day: ``talkers ROLE HOST PORT SECONDS SEED``.

Roles come in pairs, the one that serves a broker's requests on the node and the one that makes them far away; brokers
are real (Redis, NATS, Mosquitto, RabbitMQ), behind TLS. Requests come as in life: at times that are drawn
exponentially, as work arrives, and answers are made from them: short ones of one form, of all lengths ("-varied"), or
after work that takes from 1 to 50 ms ("-worked", asked for less often, "-slow").
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
import math
import os
import random
import socket
import ssl
import struct
import sys
import threading
import time
from typing import Any

_QUEUE = "tasks"
_GAP_S = 0.7


def main() -> None:
    """Play a role until its time is over."""
    global _QUEUE, _GAP_S  # noqa: PLW0603 what both ends of a pair have to agree on, and the pace of one
    role, host, port, seconds, seed = sys.argv[1:6]
    _QUEUE = f"tasks-{seed}"
    if role.endswith("-slow"):
        role, _GAP_S = role.removesuffix("-slow"), 3.0
    _ROLES[role](host, int(port), time.monotonic() + float(seconds), random.Random(int(seed)))


def _source() -> tuple[str, int] | None:
    address = os.environ.get("LAB_SOURCE", "")
    return (address, 0) if address else None


def _context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _answer(request: bytes, *, form: str) -> bytes:
    """Return what the service makes of a request: a verdict of one form, or a text as long as was asked for."""
    task = json.loads(request)
    result: dict[str, Any] = {"id": task["id"], "ok": True, "score": round(task["seed"] % 997 / 997, 3)}
    if form == "worked":
        time.sleep(math.exp(task["seed"] % 1_000 / 255 - 6.9))
    if form:
        result["text"] = "lorem ipsum " * (task["seed"] % 90)
    return json.dumps(result).encode()


def _requests(noise: random.Random, until: float) -> Any:
    number = 0
    while time.monotonic() < until:
        time.sleep(noise.expovariate(1 / _GAP_S))
        number += 1
        seed = noise.randrange(10**6)
        yield json.dumps({"id": number, "seed": seed, "prompt": "word " * (1 + seed % 12)}).encode()


# -- Redis: a worker that waits in BLPOP -------------------------------------------------------------------------------


def _redis(host: str, port: int) -> Any:
    library = importlib.import_module("redis")
    return library.Redis(host=host, port=port, ssl=True, ssl_cert_reqs="none", ssl_check_hostname=False)


def _redis_worker(host: str, port: int, until: float, _noise: random.Random, *, form: str = "") -> None:
    client = _redis(host, port)
    while time.monotonic() < until:
        got = client.blpop(_QUEUE, timeout=2)
        if got:
            client.rpush("results", _answer(got[1], form=form))


def _redis_asker(host: str, port: int, until: float, noise: random.Random) -> None:
    client = _redis(host, port)
    for request in _requests(noise, until):
        client.rpush(_QUEUE, request)


# -- NATS: a service that answers requests -----------------------------------------------------------------------------


def _nats_service(host: str, port: int, until: float, _noise: random.Random, *, form: str = "") -> None:
    async def serve() -> None:
        client = await importlib.import_module("nats").connect(f"tls://{host}:{port}", tls=_context())

        async def handle(message: Any) -> None:
            await message.respond(_answer(message.data, form=form))

        await client.subscribe(_QUEUE, cb=handle)
        await asyncio.sleep(until - time.monotonic())
        await client.close()

    asyncio.run(serve())


def _nats_asker(host: str, port: int, until: float, noise: random.Random) -> None:
    async def ask() -> None:
        client = await importlib.import_module("nats").connect(f"tls://{host}:{port}", tls=_context())
        number = 0
        while time.monotonic() < until:
            await asyncio.sleep(noise.expovariate(1 / _GAP_S))
            number += 1
            seed = noise.randrange(10**6)
            await client.request(_QUEUE, json.dumps({"id": number, "seed": seed, "prompt": "word " * (1 + seed % 12)})
                                 .encode(), timeout=3)
        await client.close()

    asyncio.run(ask())


# -- MQTT: commands and answers as two topics --------------------------------------------------------------------------


def _mqtt(host: str, port: int) -> Any:
    library = importlib.import_module("paho.mqtt.client")
    client = library.Client(library.CallbackAPIVersion.VERSION2)
    client.tls_set_context(_context())
    client.connect(host, port, keepalive=10)
    return client


def _mqtt_service(host: str, port: int, until: float, _noise: random.Random, *, form: str = "") -> None:
    client = _mqtt(host, port)
    client.on_message = lambda one, _, message: one.publish("answers", _answer(message.payload, form=form))
    client.subscribe(_QUEUE)
    while time.monotonic() < until:
        client.loop(0.2)


def _mqtt_asker(host: str, port: int, until: float, noise: random.Random) -> None:
    client = _mqtt(host, port)
    client.loop_start()
    for request in _requests(noise, until):
        client.publish(_QUEUE, request)


# -- AMQP: a worker with a queue of its own and a reply-to -------------------------------------------------------------


def _amqp(host: str, port: int) -> Any:
    pika = importlib.import_module("pika")
    return pika.BlockingConnection(pika.ConnectionParameters(host, port, ssl_options=pika.SSLOptions(_context())))


def _amqp_worker(host: str, port: int, until: float, _noise: random.Random, *, form: str = "") -> None:
    connection = _amqp(host, port)
    channel = connection.channel()
    channel.queue_declare(_QUEUE)
    channel.basic_qos(prefetch_count=1)

    def handle(one: Any, method: Any, properties: Any, body: bytes) -> None:
        one.basic_publish("", properties.reply_to, _answer(body, form=form))
        one.basic_ack(method.delivery_tag)

    channel.basic_consume(_QUEUE, handle)
    while time.monotonic() < until:
        connection.process_data_events(0.2)


def _amqp_asker(host: str, port: int, until: float, noise: random.Random) -> None:
    pika = importlib.import_module("pika")
    channel = _amqp(host, port).channel()
    channel.queue_declare(_QUEUE)
    channel.queue_declare("answers")
    for request in _requests(noise, until):
        channel.basic_publish("", _QUEUE, request, pika.BasicProperties(reply_to="answers"))


# -- files, collectives, metrics ---------------------------------------------------------------------------------------


def _listen(port: int) -> socket.socket:
    listener = socket.create_server(("0.0.0.0", port))  # noqa: S104
    return listener.accept()[0]


def _exactly(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = peer.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _file_server(_host: str, port: int, _until: float, _noise: random.Random) -> None:
    """Answer remote calls as an NFS server does: a length, a number, as many bytes as were asked for (RFC 5531)."""
    peer = _listen(port)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        while True:
            number, wanted, _rest = struct.unpack("!II120s", _exactly(peer, 128))
            peer.sendall(struct.pack("!II", number, wanted) + bytes(wanted))
    except EOFError:
        return


def _file_client(host: str, port: int, until: float, noise: random.Random) -> None:
    """Look files up and read some, one call after the other, with pauses as a training job's loader has."""
    peer = socket.create_connection((host, port))
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    number = 0
    while time.monotonic() < until:
        for _ in range(noise.randrange(1, 30)):
            number += 1
            wanted = noise.choice((112, 112, 112, 240, 8_192))
            peer.sendall(struct.pack("!II120s", number, wanted, b""))
            _exactly(peer, 8 + wanted)
        time.sleep(noise.expovariate(2))


def _ring(peer: socket.socket, until: float) -> None:
    """All-reduce in steps: a bulk each way at once, and a barrier of a few bytes."""
    part = os.urandom(200_000)

    def give() -> None:
        peer.sendall(part)

    while time.monotonic() < until:
        giver = threading.Thread(target=give)
        giver.start()
        _exactly(peer, len(part))
        giver.join()
        peer.sendall(b"barrier!")
        _exactly(peer, 8)
        time.sleep(0.25)


def _ring_far(_host: str, port: int, until: float, _noise: random.Random) -> None:
    try:
        _ring(_listen(port), until + 1)
    except (EOFError, OSError):
        return


def _ring_near(host: str, port: int, until: float, _noise: random.Random) -> None:
    _ring(socket.create_connection((host, port)), until)


def _scraper(host: str, port: int, until: float, noise: random.Random) -> None:
    """Ask for metrics once a second on one connection that is kept."""
    connection = importlib.import_module("http.client").HTTPConnection(host, port, timeout=5, source_address=_source())
    while time.monotonic() < until:
        connection.request("GET", "/metrics")
        connection.getresponse().read()
        time.sleep(1 + noise.random() / 100)


def _metrics(_host: str, port: int, _until: float, _noise: random.Random) -> None:
    server = importlib.import_module("http.server")

    class Handler(server.BaseHTTPRequestHandler):  # type: ignore[misc, name-defined]
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:  # noqa: N802 its name in http.server
            body = "".join(f'DCGM_FI_DEV_GPU_UTIL{{gpu="{gpu}"}} {random.randrange(100)}\n'
                           for gpu in range(24)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server.HTTPServer(("0.0.0.0", port), Handler).serve_forever()  # noqa: S104


# -- a terminal in a web page ------------------------------------------------------------------------------------------


def _terminal_server(_host: str, port: int, _until: float, _noise: random.Random) -> None:
    """A shell on a terminal behind a WebSocket, as Jupyter's terminals are."""
    import fcntl
    import pty

    async def serve(page: Any) -> None:
        child, terminal = pty.fork()
        if child == 0:
            os.execv("/bin/bash", ["bash", "--norc"])  # noqa: S606
        fcntl.fcntl(terminal, fcntl.F_SETFL, os.O_NONBLOCK)
        screen: asyncio.Queue[bytes] = asyncio.Queue()
        asyncio.get_running_loop().add_reader(terminal, lambda: _read_screen(terminal, screen))

        async def show() -> None:
            while text := await screen.get():
                await page.send(json.dumps(["stdout", text.decode(errors="replace")]))
            await page.close()

        shower = asyncio.create_task(show())
        async for message in page:
            os.write(terminal, json.loads(message)[1].encode())
        shower.cancel()

    async def run() -> None:
        async with importlib.import_module("websockets").serve(serve, "0.0.0.0", port):  # noqa: S104
            await asyncio.Future()

    asyncio.run(run())


def _read_screen(terminal: int, screen: asyncio.Queue[bytes]) -> None:
    try:
        screen.put_nowait(os.read(terminal, 4096))
    except OSError:
        screen.put_nowait(b"")
        asyncio.get_running_loop().remove_reader(terminal)


def _terminal_user(host: str, port: int, until: float, noise: random.Random) -> None:
    """Type into such a terminal."""
    async def type_in() -> None:
        async with importlib.import_module("websockets").connect(f"ws://{host}:{port}/terminals/1",
                                                                    local_addr=_source()) as page:
            async def watch() -> None:
                async for _ in page:
                    pass

            watcher = asyncio.create_task(watch())
            while time.monotonic() < until:
                for key in noise.choice(("ls -l /\r", "nvidia-smi\r", "uname -a\r", "cat /proc/loadavg\r")):
                    await page.send(json.dumps(["stdin", key]))
                    await asyncio.sleep(noise.lognormvariate(-2.04, 0.45))
                await asyncio.sleep(noise.uniform(0.6, 1.4))
            watcher.cancel()

    asyncio.run(type_in())


# -- passwords ---------------------------------------------------------------------------------------------------------


def _guesser(host: str, port: int, until: float, noise: random.Random) -> None:
    """Try passwords, three to a connection, as hydra and an agent's own loop do."""
    paramiko = importlib.import_module("paramiko")
    while time.monotonic() < until:
        transport = paramiko.Transport((host, port))
        transport.start_client(timeout=5)
        for _attempt in range(3):
            try:
                transport.auth_password("root", f"password{noise.randrange(10**4)}", fallback=False)
            except (paramiko.SSHException, EOFError):
                continue
        transport.close()


def _forms(name: str, role: Any) -> dict[str, Any]:
    return {name: role, f"{name}-varied": functools.partial(role, form="varied"),
            f"{name}-worked": functools.partial(role, form="worked")}


_ROLES: dict[str, Any] = {
    **_forms("redis-worker", _redis_worker), "redis-asker": _redis_asker,
    **_forms("nats-service", _nats_service), "nats-asker": _nats_asker,
    **_forms("mqtt-service", _mqtt_service), "mqtt-asker": _mqtt_asker,
    **_forms("amqp-worker", _amqp_worker), "amqp-asker": _amqp_asker,
    "file-server": _file_server, "file-client": _file_client, "ring-far": _ring_far, "ring-near": _ring_near,
    "scraper": _scraper, "metrics": _metrics, "terminal-server": _terminal_server, "terminal-user": _terminal_user,
    "guesser": _guesser,
}


if __name__ == "__main__":
    main()
