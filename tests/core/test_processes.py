"""Processes and their ancestry, as starts and ends tell them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpuguard.core.processes import ANCESTORS_MAX, ELDEST_MAX, ENDED_MAX, Processes
from gpuguard.core.records import ProcessExited, ProcessStarted
from gpuguard.core.subjects import ProcessId, context_of
from tests.core.builders import SPAN, T0, TRACE, pid, started


def processes_of(*records: ProcessStarted | ProcessExited) -> Processes:
    known = Processes()
    for record in records:
        known.start(record) if isinstance(record, ProcessStarted) else known.exit(record)
    return known


def test_ancestry_stops_at_a_reused_pid() -> None:
    known = processes_of(started(pid(10), pid(1)), started(pid(20), pid(10)), started(pid(30), pid(31, 99)))
    assert known.ancestors(pid(20)) == (pid(10), pid(1))
    assert known.ancestors(pid(30)) == ()


def test_who_forks_deep_stays_below_the_eldest_though_all_between_end() -> None:
    known = processes_of(started(pid(1)), *(started(pid(one), pid(one - 1)) for one in range(2, 301)))
    nearest, eldest = range(299, 299 - ANCESTORS_MAX, -1), range(ELDEST_MAX, 0, -1)
    assert known.ancestors(pid(300)) == tuple(map(pid, [*nearest, *eldest]))
    for one in range(2, 300):
        known.exit(ProcessExited(time_ns=T0, process=pid(one)))
        known.forget(pid(one))
    known.start(started(pid(400), pid(300)))
    known.start(started(pid(401), pid(299)))
    for one in (400, 401):
        assert known.ancestors(pid(one))[-ELDEST_MAX:] == tuple(map(pid, eldest))
    for one in range(1000, 1000 + ENDED_MAX):
        known.forget(pid(one))
    assert known.ancestors(pid(400)) == tuple(map(pid, [300, 299, *eldest])), "what lay between was forgotten"


def test_a_long_line_ends_at_a_reused_pid() -> None:
    line = [started(pid(one, one), pid(one - 1, one - 1)) for one in range(2, 101)]
    again = started(pid(50, 500)), started(pid(201, 501), pid(50, 500))
    known = processes_of(*line, started(pid(200, 50), pid(100, 100)), *again)
    assert known.ancestors(pid(200, 50)) == ()
    assert known.ancestors(pid(201, 501)) == (pid(50, 500),)
    assert known.ancestors(pid(100, 100))[-1] == pid(1, 1)


def test_of_records_that_go_round_in_a_circle_nobody_is_an_ancestor_twice() -> None:
    x, y, z, w, other = (pid(number, 1) for number in range(10, 15))
    born = ((x, None), (y, x), (x, y), (y, x), (z, y), (y, other), (w, z))
    assert processes_of(*(started(process, parent) for process, parent in born)).ancestors(w) == (z, y, other, x)


CGROUPS = ["/", "/user.slice", f"/docker/{'ab' * 32}", "/slurm/job_7/step_0", "/slurm/job_8"]
ENVIRONS = [{}, {"GPUGUARD_SANDBOX_ID": "s1"}, {"TRACEPARENT": f"00-{TRACE}-{SPAN}-01"}, {"SLURM_JOB_ID": "9"}]
BIRTHS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 6), st.integers(1, 3),
                            st.sampled_from(CGROUPS), st.sampled_from(ENVIRONS)), max_size=20)


@given(BIRTHS)
def test_a_brief_says_what_follows_from_one_parent_after_the_other(births: list[tuple]) -> None:
    """However pids, starts and parents are mixed up; short of the lengths at which lines are cut."""
    said = {pid(number, ticks): started(pid(number, ticks), pid(parent, before), cgroup=cgroup, environ=environ)
            for number, ticks, parent, before, cgroup, environ in births}
    known = processes_of(*said.values())
    for process in said:
        line = [process]
        while at := said.get(line[-1]):
            if at.parent in line[1:] or at.parent.start_ticks > at.process.start_ticks:
                break
            line.append(at.parent)
        told = known.brief(process)
        contexts = [context_of(said[one].cgroup, said[one].environ) for one in line if one in said]
        assert told.ancestors[:len(line) - 1] == tuple(line[1:])
        assert len(set(told.ancestors)) == len(told.ancestors)
        assert told.context == known.context(process)
        for name in ("container_id", "slurm_job_id", "sandbox_id", "trace_id", "span_id"):
            found = [value for one in contexts if (value := getattr(one, name))]
            assert found == [] or getattr(told.context, name) == found[0]


def test_ancestry_survives_the_ancestors() -> None:
    environ = {"TRACEPARENT": f"00-{TRACE}-{SPAN}-01"}
    known = processes_of(started(pid(10), pid(1)), started(pid(20), pid(10), environ=environ),
                         started(pid(30), pid(20)))
    known.exit(ProcessExited(time_ns=T0, process=pid(20)))
    known.forget(pid(20))
    assert known.current(20) is None
    assert known.ancestors(pid(30)) == (pid(20), pid(10), pid(1))
    assert known.context(pid(30)).span_id == SPAN


def test_a_parent_loop_ends() -> None:
    known = processes_of(started(pid(1, 5), pid(2, 5)), started(pid(2, 5), pid(1, 5)))
    assert len(known.ancestors(pid(1, 5))) <= 2


def test_an_exit_of_an_earlier_life_of_a_pid_does_not_end_the_later() -> None:
    known = processes_of(started(pid(9, 1)), started(pid(9, 2)), ProcessExited(time_ns=T0, process=pid(9, 1)))
    assert known.current(9) == pid(9, 2)


def test_who_has_ended_stays_ended() -> None:
    known = processes_of(started(pid(5)), started(pid(6)))
    assert not known.has_ended(pid(5))
    known.exit(ProcessExited(time_ns=T0, process=pid(5)))
    assert known.has_ended(pid(5))
    known.forget(pid(5))
    assert known.has_ended(pid(5))
    known.start(started(pid(6, 99)))
    assert known.has_ended(pid(6)), "another process has its pid"


def test_a_row_names_who_is_known_or_somebody_of_this_boot() -> None:
    known = processes_of(started(pid(5, 7)))
    known.boot_id = "this"
    assert known.named(5, 7) == pid(5, 7)
    assert known.named(5, 8) == ProcessId("this", 5, 8), "a later life of the pid"
    assert known.named(6, 7) == ProcessId("this", 6, 7)
