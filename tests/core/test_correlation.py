from __future__ import annotations

import pytest

from gpuguard.core.correlation import Correlation
from gpuguard.core.host import Host
from gpuguard.core.processes import ANCESTORS_MAX
from tests.core.builders import SECOND, SPAN, T0, TRACE, call, pid, started


def joined(host: Host, *calls: object) -> Correlation:
    correlation = Correlation()
    for one in calls:
        correlation.receive(one)  # type: ignore[arg-type]
    return correlation


def test_traceparent_of_an_ancestor_names_the_call() -> None:
    host = Host()
    host.receive(started(pid(10), environ={"TRACEPARENT": f"00-{TRACE}-{SPAN}-01"}))
    host.receive(started(pid(20), pid(10)))
    found = joined(host, call()).tool_call(pid(20), host)
    assert found is not None
    assert found.span_id == SPAN


def test_traceparent_of_an_unknown_span_is_not_guessed() -> None:
    host = Host()
    host.receive(started(pid(5)))
    host.receive(started(pid(10), pid(5), environ={"TRACEPARENT": f"00-{TRACE}-{'f' * 16}-01"}))
    assert joined(host, call(process=pid(5))).tool_call(pid(10), host) is None


def test_the_only_call_that_ran_when_the_agents_child_started() -> None:
    host = Host()
    host.receive(started(pid(5)))
    host.receive(started(pid(10), pid(5), time_ns=T0 + SECOND))
    host.receive(started(pid(11), pid(10), time_ns=T0 + 100 * SECOND))
    calls = [call("a" * 16, end_ns=T0 + 2 * SECOND, process=pid(5)),
             call("b" * 16, start_ns=T0 + 50 * SECOND, process=pid(5))]
    found = joined(host, *calls).tool_call(pid(11), host)
    assert found is not None
    assert found.span_id == "a" * 16


def test_two_calls_at_once_leave_it_open() -> None:
    host = Host()
    host.receive(started(pid(5)))
    host.receive(started(pid(10), pid(5), time_ns=T0 + SECOND))
    calls = [call("a" * 16, process=pid(5)), call("b" * 16, process=pid(5))]
    assert joined(host, *calls).tool_call(pid(10), host) is None


def test_nobody_asked() -> None:
    host = Host()
    host.receive(started(pid(10), pid(1)))
    assert joined(host, call(process=pid(5))).tool_call(pid(10), host) is None


def test_a_trace_that_nobody_reported_hides_nobody() -> None:
    host = Host()
    host.receive(started(pid(5)))
    host.receive(started(pid(10), pid(5), environ={"TRACEPARENT": f"00-{'e' * 32}-{'f' * 16}-01"}))
    found = joined(host, call(process=pid(5))).tool_call(pid(10), host)
    assert found is not None
    assert found.span_id == SPAN


def test_an_unknown_span_below_a_known_one_was_started_by_the_known_one() -> None:
    host = Host()
    host.receive(started(pid(10), environ={"TRACEPARENT": f"00-{TRACE}-{SPAN}-01"}))
    host.receive(started(pid(20), pid(10), environ={"TRACEPARENT": f"00-{'e' * 32}-{'f' * 16}-01"}))
    found = joined(host, call()).tool_call(pid(20), host)
    assert found is not None
    assert found.span_id == SPAN


@pytest.mark.parametrize("environ", [{}, {"TRACEPARENT": f"00-{'e' * 32}-{'f' * 16}-01"}])
def test_two_hundred_forks_shake_no_tool_call_off(environ: dict[str, str]) -> None:
    host = Host()
    host.receive(started(pid(5)))
    host.receive(started(pid(10), pid(5), time_ns=T0 + SECOND))
    for one in range(11, 211):
        host.receive(started(pid(one), pid(one - 1), time_ns=T0 + 100 * SECOND, environ=environ))
    calls = [call("a" * 16, end_ns=T0 + 2 * SECOND, process=pid(5)),
             call("b" * 16, start_ns=T0 + 50 * SECOND, process=pid(5))]
    found = joined(host, *calls).tool_call(pid(210), host)
    assert found is not None
    assert found.span_id == "a" * 16


def test_a_span_at_the_head_of_a_long_line_names_the_call() -> None:
    host = Host()
    host.receive(started(pid(10), environ={"TRACEPARENT": f"00-{TRACE}-{SPAN}-01"}))
    for one in range(11, 211):
        host.receive(started(pid(one), pid(one - 1)))
    assert joined(host, call()).tool_call(pid(210), host) is not None


def test_of_an_agent_in_the_gap_of_a_long_line_the_next_known_is_not_taken_for_its_child() -> None:
    host = Host()
    for one in range(2, 201):
        host.receive(started(pid(one), pid(one - 1) if one > 2 else None, time_ns=T0 + one * SECOND))
    agent = host.processes.ancestors(pid(200))[ANCESTORS_MAX]
    below = host.processes.ancestors(pid(200))[ANCESTORS_MAX - 1]
    then_ns = T0 + below.pid * SECOND
    one_then = call(start_ns=then_ns - SECOND, end_ns=then_ns + SECOND, process=agent)
    assert joined(host, one_then).tool_call(pid(200), host) is None
