"""The API end to end: a real server on a socket, a guard made by hand, the real client."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gpuguard.api import service as service_module
from gpuguard.api.client import Client, NoGuard, NotThere, Refused, connect
from gpuguard.api.service import SERVICE, WATCHERS_MAX, ApiServer, SocketTaken
from gpuguard.api.v1 import gpuguard_pb2 as pb
from gpuguard.api.v1 import gpuguard_pb2_grpc
from gpuguard.api.watching import RING_MAX
from gpuguard.core.events import Incident
from gpuguard.core.records import Gap
from gpuguard.core.subjects import DeviceId

from .samples import EXPLANATION, INCIDENT, MINER, STANDING


class HandMadeGuard:
    """What the service sees of a guard, filled by the test."""

    def __init__(self) -> None:
        self.standings = [STANDING, msgspec.structs.replace(STANDING, verdict="clear", label="training")]
        self.kept = {INCIDENT.id: INCIDENT}
        self.answers: list[tuple[str, str, str, str]] = []
        self.subscribers: list = []

    def processes(self):
        return self.standings

    def explain(self, of):
        gpu = msgspec.structs.replace(EXPLANATION, subject=DeviceId("GPU-1"), process=None, findings=(), left_out=3)
        return {MINER.pid: EXPLANATION, "GPU-1": gpu}.get(of)

    def incidents(self):
        return list(self.kept.values())

    def incident(self, incident_id):
        return self.kept.get(incident_id)

    def decide(self, decision_id, answer, by, reason):
        self.answers.append((decision_id, answer, by, reason))
        return decision_id == "D1"

    def subscribe(self, subscriber):
        self.subscribers.append(subscriber)
        return lambda: self.subscribers.remove(subscriber)

    def tell(self, event) -> None:
        for subscriber in self.subscribers:
            subscriber(event)


@pytest.fixture
def guard():
    return HandMadeGuard()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "g.sock"


@pytest.fixture
def server(guard, path):
    running = ApiServer(guard, path)
    yield running
    running.stop(0)


@pytest.fixture
def client(server, path):
    with connect(path) as made:
        yield made


def numbered(number: int) -> Incident:
    return msgspec.structs.replace(INCIDENT, id=f"I{number}", time_ns=number)


def await_that(condition) -> None:
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_goes_in_comes_out_whole(client):
    assert client.processes()[0] == STANDING
    assert client.explain(MINER.pid) == EXPLANATION
    gpu = client.explain("GPU-1")
    assert (gpu.subject, gpu.process, gpu.findings, gpu.left_out) == (DeviceId("GPU-1"), None, (), 3)
    assert client.incidents() == [INCIDENT]
    assert client.incident(INCIDENT.id) == INCIDENT


def test_lists_are_filtered_and_limited(client, guard):
    assert [one.label for one in client.processes(["clear"])] == ["training"]
    guard.kept = {f"I{n}": numbered(n) for n in range(5)}
    guard.kept["I9"] = msgspec.structs.replace(numbered(9), state="closed")
    assert [one.id for one in client.incidents(limit=2)] == ["I4", "I9"]
    assert [one.id for one in client.incidents("closed")] == ["I9"]
    assert len(client.incidents("open")) == 5


def test_nothing_of_that_id(client):
    with pytest.raises(NotThere, match="no incident 'I404'"):
        client.incident("I404")
    with pytest.raises(NotThere, match="of pid 404"):
        client.explain(404)
    with pytest.raises(NotThere, match="of GPU "):
        client.explain("")
    with pytest.raises(NotThere, match="no decision 'D404'"):
        client.decide("D404", "approve")


def test_an_answer_reaches_the_guard_with_who_and_why(client, guard):
    client.decide("D1", "reject", reason="a benchmark", by="ann")
    client.decide("D1", "approve")
    assert guard.answers[0] == ("D1", "reject", "ann", "a benchmark")
    assert guard.answers[1][2]


@pytest.mark.parametrize("request_", [
    pb.DecideRequest(decision_id="D1", answered_by="ann"),
    pb.DecideRequest(decision_id="D1", answer=pb.ANSWER_APPROVE),
    pb.DecideRequest(decision_id="D1", answer=pb.ANSWER_APPROVE, answered_by="  "),
    pb.DecideRequest(decision_id="D1", answer=77, answered_by="ann"),
    pb.DecideRequest(decision_id="D" * 300, answer=pb.ANSWER_APPROVE, answered_by="ann"),
    pb.DecideRequest(decision_id="D1", answer=pb.ANSWER_APPROVE, answered_by="ann", reason="x" * 3000),
])
def test_a_wrong_answer_never_reaches_the_guard(server, path, guard, request_):
    with grpc.insecure_channel(f"unix:{path}") as channel:
        stub = gpuguard_pb2_grpc.GuardServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Decide(request_, timeout=100)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert guard.answers == []


def test_a_watcher_sees_each_change_in_order(client, guard, server):
    _, token = client.incidents_and_token()
    for number in range(3):
        guard.tell(numbered(number))
        guard.tell(Gap(time_ns=1, sensor="nvml", reason="not an incident"))
    watched = client.watch(token)
    seen = [next(watched) for _ in range(3)]
    assert [item.id for _, item in seen] == ["I0", "I1", "I2"]
    again = client.watch(seen[0][0])
    assert next(again)[1].id == "I1"


def test_a_watcher_that_fell_behind_is_told_how_much_it_lost(client, guard, server):
    _, token = client.incidents_and_token()
    for number in range(RING_MAX + 10):
        guard.tell(numbered(number))
    watched = client.watch(token)
    _, gap = next(watched)
    assert isinstance(gap, Gap)
    assert gap.lost == 10
    assert "list the incidents" in gap.reason
    assert next(watched)[1].id == "I10"


def test_a_token_of_another_life_is_a_gap_then_everything_since(client, guard, server):
    guard.tell(numbered(7))
    watched = client.watch("0123456789abcdef.5")
    _, gap = next(watched)
    assert isinstance(gap, Gap)
    assert "restarted" in gap.reason
    assert next(watched)[1].id == "I7"


@pytest.mark.parametrize("token", ["nonsense", ".", "a.b", "a.-1", "x" * 100 + ".1", "a.٣"])
def test_a_token_that_was_never_given_is_refused(client, token):
    with pytest.raises(Refused, match="INVALID_ARGUMENT"):
        next(client.watch(token))


def test_a_token_of_the_future_is_refused(client):
    _, token = client.incidents_and_token()
    life = token.partition(".")[0]
    with pytest.raises(Refused, match="INVALID_ARGUMENT"):
        next(client.watch(f"{life}.99"))


def test_one_watcher_too_many_is_refused_and_the_others_go_on(client, guard, server):
    _, token = client.incidents_and_token()
    guard.tell(numbered(1))
    watchers = [client.watch(token) for _ in range(WATCHERS_MAX)]
    assert {next(watcher)[1].id for watcher in watchers} == {"I1"}
    with pytest.raises(Refused, match="RESOURCE_EXHAUSTED"):
        next(client.watch(token))
    # The other calls still have threads.
    assert client.incident(INCIDENT.id).id == INCIDENT.id
    guard.tell(numbered(2))
    assert {next(watcher)[1].id for watcher in watchers} == {"I2"}


def test_a_watcher_that_left_makes_room(path, guard, server):
    for _ in range(WATCHERS_MAX + 4):
        with connect(path) as one:
            _, token = one.incidents_and_token()
            guard.tell(numbered(1))

            def watches(one=one, token=token) -> bool:
                try:
                    return next(one.watch(token))[1].id == "I1"
                except Refused:
                    return False

            await_that(watches)


def test_stopping_ends_watches_and_removes_the_socket(guard, path):
    running = ApiServer(guard, path)
    ended: list[BaseException] = []
    with connect(path) as one:

        def watch() -> None:
            try:
                for _ in one.watch():
                    pass
            except NoGuard as error:
                ended.append(error)

        watcher = threading.Thread(target=watch)
        watcher.start()
        await_that(lambda: guard.subscribers)
        running.stop()
        watcher.join(100)
    assert not watcher.is_alive()
    assert len(ended) == 1
    assert not path.exists()
    assert guard.subscribers == []


def test_a_client_that_closes_ends_its_own_watch(server, path, guard):
    one = connect(path)
    _, token = one.incidents_and_token()
    guard.tell(numbered(1))
    begun, ended = threading.Event(), threading.Event()

    def watch() -> None:
        for _ in one.watch(token):
            begun.set()
        ended.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert begun.wait(100)
    one.close()
    assert ended.wait(100)
    watcher.join(100)


def test_the_socket_is_its_owners_alone(server, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_uid == os.geteuid()


def test_a_dead_guards_socket_is_taken_over(guard, path):
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    running = ApiServer(guard, path)
    with connect(path) as one:
        assert one.incidents() == [INCIDENT]
    running.stop(0)


def test_a_living_guards_socket_is_not(server, path, guard):
    with pytest.raises(SocketTaken, match="another guard"):
        ApiServer(HandMadeGuard(), path)
    with connect(path) as one:
        assert one.incidents() == [INCIDENT]


def test_places_where_no_socket_can_be(guard, tmp_path):
    with pytest.raises(OSError, match="107 bytes"):
        ApiServer(guard, tmp_path / ("x" * 120))
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError, match="is no socket"):
        ApiServer(guard, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_health_and_reflection(server, path):
    with grpc.insecure_channel(f"unix:{path}") as channel:
        checked = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=100)
        assert checked.status == health_pb2.HealthCheckResponse.SERVING
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        answer = next(iter(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked, timeout=100)))
    assert SERVICE in {one.name for one in answer.list_services_response.service}


def test_a_guard_that_does_not_answer_in_time(guard, path, server):
    held = threading.Event()
    guard.processes = lambda: held.wait(10) and []
    with connect(path, timeout_s=0.2) as one, pytest.raises(NoGuard, match=r"did not answer within 0\.2 s"):
        one.processes()
    held.set()


def test_no_guard_at_all_says_what_to_do(tmp_path):
    with pytest.raises(NoGuard, match="gpuguard run"):
        connect(tmp_path / "none.sock")
    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(dead))
    with Client(dead) as made, pytest.raises(NoGuard, match="gpuguard doctor"):
        made.incidents()


def test_a_request_too_large_is_refused(server, path):
    with grpc.insecure_channel(f"unix:{path}") as channel:
        stub = gpuguard_pb2_grpc.GuardServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetIncident(pb.GetIncidentRequest(incident_id="x" * 100_000), timeout=100)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_calls_are_those_of_the_proto_file():
    text = (Path(__file__).parents[2] / "proto/gpuguard/v1/gpuguard.proto").read_text()
    for method in pb.DESCRIPTOR.services_by_name["GuardService"].methods:
        assert f"rpc {method.name}({method.input_type.name})" in text
        assert hasattr(service_module._Servicer, method.name)


def test_the_client_loads_no_numba_and_no_driver():
    code = "import sys, gpuguard.api.client; print([m for m in ('numba', 'pynvml', 'pyroute2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
