"""The journal: what must be undone survives a cut at any byte, a full file and a second holder."""

from __future__ import annotations

import os
import stat

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.broker import journal
from gpuguard.broker.boxes import Box
from gpuguard.broker.journal import Completed, Ended, Grown, Intent, Journal, JournalFailed, JournalLocked, Plan
from gpuguard.core.subjects import ProcessId

BOXES = st.builds(Box, path=st.text(max_size=8), origin=st.text(max_size=8))
PLANS = st.builds(Plan, boxes=st.lists(BOXES, max_size=2).map(tuple),
                  stopped=st.lists(st.tuples(st.integers(1, 99), st.integers(0, 99)), max_size=3).map(tuple))
IDS = st.sampled_from(["a", "b", "c", "d"])
TIMES = st.integers(0, 2**62)
LINES = st.lists(st.one_of(
    st.builds(Intent, time_ns=TIMES, id=IDS, boot_id=st.just("boot"), action=st.sampled_from(["pause", "kill"]),
              process=st.builds(ProcessId, st.just("boot"), st.integers(1, 99), st.integers(0, 99)),
              by_hand=st.booleans(), approved_by=st.text(max_size=4), reason=st.text(max_size=8),
              expires_ns=TIMES, deadline_ns=TIMES, plan=PLANS),
    st.builds(Grown, time_ns=TIMES, id=IDS, plan=PLANS),
    st.builds(Completed, time_ns=TIMES, id=IDS, text=st.text(max_size=8)),
    st.builds(Ended, time_ns=TIMES, id=IDS, outcome=st.sampled_from(["undone", "expired"]), text=st.text(max_size=8)),
), max_size=8)


def intent(name="a", time_ns=1, **changes):
    fields = {"boot_id": "boot", "action": "pause", "process": ProcessId("boot", 9, 9), "by_hand": False,
              "approved_by": "", "reason": "", "expires_ns": 0, "deadline_ns": 0, "plan": Plan()}
    return Intent(time_ns=time_ns, id=name, **{**fields, **changes})


def plain(lines):
    """Say naively what lines leave in force: the last intent of each id that nothing ended, its plans added up."""
    left = {}
    for line in lines:
        if isinstance(line, Intent):
            left[line.id] = (line.plan.boxes, line.plan.stopped)
        elif isinstance(line, Ended):
            left.pop(line.id, None)
        elif isinstance(line, Grown) and line.id in left:
            left[line.id] = (left[line.id][0] + line.plan.boxes, left[line.id][1] + line.plan.stopped)
    return left


@settings(max_examples=60, deadline=None)
@given(lines=LINES, data=st.data())
def test_a_journal_cut_at_any_byte_replays_up_to_the_cut(tmp_path_factory, lines, data):
    encoded = [msgspec.json.encode(line) + b"\n" for line in lines]
    whole = b"".join(encoded)
    cut = data.draw(st.integers(0, len(whole)))
    kept, size = 0, 0
    while kept < len(encoded) and size + len(encoded[kept]) <= cut:
        size += len(encoded[kept])
        kept += 1
    folder = tmp_path_factory.mktemp("journal")
    (folder / journal.NAME).write_bytes(whole[:cut])
    one = Journal(folder)
    try:
        found = {name: (state.plan.boxes, state.plan.stopped) for name, state in one.state.in_force.items()}
        assert found == plain(lines[:kept])
        assert bool(one.damage) == (cut != size)
        one.append(intent("later"))
    finally:
        one.close()
    again = Journal(folder)
    assert again.damage == []
    assert "later" in again.state.in_force
    again.close()


def test_damage_in_the_middle_is_reported_and_costs_only_its_line(tmp_path):
    good = [msgspec.json.encode(intent(name)) for name in "abc"]
    (tmp_path / journal.NAME).write_bytes(good[0] + b'\n{"type":"intent"\xff\n' + good[2] + b"\n")
    one = Journal(tmp_path)
    assert sorted(one.state.in_force) == ["a", "c"]
    assert len(one.damage) == 1
    assert "line 2" in one.damage[0]
    one.close()


def test_only_one_may_hold_it(tmp_path):
    first = Journal(tmp_path)
    with pytest.raises(JournalLocked):
        Journal(tmp_path)
    first.close()
    Journal(tmp_path).close()


def test_files_are_for_the_owner_alone(tmp_path):
    one = Journal(tmp_path)
    one.append(intent())
    one.compact(0)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {journal.NAME: 0o600, "journal.lock": 0o600}
    one.close()


def test_compaction_keeps_what_is_in_force_and_the_last_hour(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "COMPACT_BYTES", 20_000)
    one = Journal(tmp_path)
    one.append(intent("stays", plan=Plan(stopped=((5, 6),))))
    one.append(Completed(2, "stays", "three"))
    for number in range(400):
        one.append(intent(f"n{number}", time_ns=journal.HOUR_NS * number // 100))
        one.append(Ended(1, f"n{number}", "undone", "over"))
    assert (tmp_path / journal.NAME).stat().st_size < 60_000
    recent = one.acts_since(journal.HOUR_NS * 399 // 100 - journal.HOUR_NS)
    one.close()
    again = Journal(tmp_path)
    assert set(again.state.in_force) == {"stays"}
    assert again.state.in_force["stays"].plan.stopped == ((5, 6),)
    assert again.state.completed == {"stays": "three"}
    assert again.acts_since(journal.HOUR_NS * 399 // 100 - journal.HOUR_NS) == recent == 101
    again.close()


def test_a_full_file_refuses_more(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "FILE_BYTES_MAX", 2_000)
    one = Journal(tmp_path)
    lines = [intent(f"n{number}") for number in range(100)]
    with pytest.raises(JournalFailed, match="full"):
        list(map(one.append, lines))
    size = (tmp_path / journal.NAME).stat().st_size
    assert size <= 2_000
    assert journal.replay((tmp_path / journal.NAME).read_bytes())[1] == []
    one.close()


def test_after_a_failed_sync_nothing_is_believed(tmp_path, monkeypatch):
    one = Journal(tmp_path)

    def fail(_):
        raise OSError(5, "input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(JournalFailed):
        one.append(intent())
    monkeypatch.undo()
    with pytest.raises(JournalFailed, match="synced"):
        one.append(intent())
    one.close()


def test_a_link_in_its_place_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / journal.NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        Journal(tmp_path)
