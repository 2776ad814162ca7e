"""The HTML report: hostile text stays text, nothing is loaded from anywhere, and all that was found is on the page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuguard.core.events import Incident
from gpuguard.ui import markup, story
from gpuguard.ui.report import LeftAlone, Measure, incident_page, render
from gpuguard.ui.timeline import lanes, timeline
from tests.ui import events as report_events

HOSTILE = (
    "</title><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'-->]]></svg></style><b>", "&lt;b&gt;",
    "a\u202eb\u2066c", "\x1b[31mred\x00\r\n", "javascript:alert(1)", "x" * 5000, "\ud800", "",
)
SOMETHING_LOADED = re.compile(
    r"""(?:src|href|srcset|data|action|xlink:href)\s*=|url\(|@import|<(?:script|link|iframe|object|embed|base|form)\b"""
    r"""|\son\w+\s*=|https?://""", re.IGNORECASE)


class Read(HTMLParser):
    """What a browser would make of the page: its elements in order, and its text."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.attributes, self.text = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.text.append(data)


def page_of(text):
    return render(report_events.events(name=text, arguments=text, reason=text), host=text, notes=[text],
                  measures=[Measure(text, None, 1.0)], left_alone=[LeftAlone(text, text, text)])


def outside_text(page):
    """Return the page with every text between elements removed: names may hold any word, elements may not."""
    return re.sub(r">[^<]*<", "><", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(HOSTILE) | st.text())
def test_hostile_text_never_becomes_markup(text):
    read, plain = Read(page_of(text)), Read(page_of("ssh"))
    # Only how many rows the timeline needs may change; what kinds of element there are may not.
    assert set(read.elements) == set(plain.elements)
    assert set(read.attributes) == set(plain.attributes)
    assert read.elements.count("tr") == plain.elements.count("tr")


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(HOSTILE) | st.text())
def test_nothing_is_loaded(text):
    page = page_of(text)
    assert not SOMETHING_LOADED.search(outside_text(page).replace('http-equiv="', ""))
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)
    assert not SOMETHING_LOADED.search(style)
    page.encode("utf-8")


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_what_is_shown_can_be_read_and_is_what_was_said(text):
    shown = Read(f"<p>{markup.escape(text)}</p>").text
    assert "".join(shown) == markup.visible(text)
    assert "".join(shown).isprintable()


def test_direction_and_control_characters_are_written_out():
    assert markup.visible("a\u202eb\x1b\n\ud800") == "a\\u202eb\\x1b\\x0a\\ud800"


def test_everything_found_is_on_the_page():
    events = report_events.events()
    page = "".join(Read(render(events)).text)
    for incident in story.told_by(events).incidents:
        for finding in incident.findings:
            assert finding.label in page
            for evidence in (*finding.evidence, *finding.counter_evidence):
                assert evidence.text in page
                assert all(spot in page for spot in evidence.blind_spots)
        for decision in incident.decisions:
            assert story.decision_words(incident, decision) in page
    assert "no NVIDIA driver on this host" in page
    assert "waits for a person's approval" in page


def many_events(count, text="ssh"):
    incident = [one for one in report_events.events(name=text, arguments=text) if isinstance(one, Incident)][-1]
    return [msgspec.structs.replace(incident, id=f"I-{number}") for number in range(count)]


def test_a_page_of_many_incidents_has_contents_and_says_nothing_twice():
    few, many = render(many_events(3)), render(many_events(40))
    assert "href=" not in outside_text(few)
    ids = [f"I-{number}" for number in range(40)]
    assert re.findall(r'<article id="([^"]*)">', many) == ids
    assert re.findall(r'<a href="#(I-[^"]*)">', many) == ids
    assert many.count('href="#contents"') == 40
    assert many.count('id="contents"') == 1
    for finding in story.accused(many_events(1)[0]):
        for evidence in finding.evidence:
            assert markup.escape(evidence.text) in many
            assert all(many.count(f"<li>{markup.escape(spot)}</li>") == 1 for spot in evidence.blind_spots)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(HOSTILE) | st.text())
def test_hostile_text_in_contents_is_text(text):
    read, plain = (Read(render(many_events(4, one))) for one in (text, "ssh"))
    assert set(read.elements) - {"title"} == set(plain.elements) - {"title"}
    assert set(read.attributes) == set(plain.attributes)


def test_the_headline_says_who_did_what_in_order():
    incident = story.told_by(report_events.events()).incidents[0]
    assert story.headline(incident) == (
        "Tool calls of coder-rl probed the network, opened a reverse tunnel, let the far side type in a shell "
        "and mined on a GPU")


def test_nothing_to_report_says_so():
    text = "".join(Read(render([])).text)
    assert "Nothing to report" in text
    assert "Every eye was open" in text


def test_a_missed_target_is_said_to_be_missed():
    measures = [Measure("late", 2.0, 1.0), Measure("in time", 0.5, 1.0), Measure("never", None, 1.0)]
    words = Read(render([], measures=measures))
    assert [word for word in words.text if word in ("met", "missed")] == ["missed", "met", "missed"]


def test_the_same_events_give_the_same_page():
    assert render(report_events.events()) == render(report_events.events())


def test_timeline_items_of_one_row_do_not_overlap():
    from gpuguard.ui import timeline as module

    told = story.told_by(report_events.events())
    scale = module._Scale(*story.span_ns(told.incidents[0]))
    for _, items in lanes(told, told.incidents[0]):
        for row in module._rows(items, scale):
            extents = [module._extent(item, scale) for item in row]
            assert all(left[1] <= right[0] for left, right in pairwise(extents))
    assert "<svg" in timeline(told, told.incidents[0])


@given(st.integers(1, 10**18))
def test_ticks_are_round_and_few(length_ns):
    from gpuguard.ui import timeline as module

    step = module._step_ns(length_ns)
    assert str(step).rstrip("0") in {"1", "2", "5"}
    assert length_ns // step <= module.TICKS_WANTED


def test_a_page_of_one_incident_claims_nothing_of_the_rest_of_its_host():
    incident = next(e for e in reversed(list(report_events.events())) if isinstance(e, Incident))
    read = Read(incident_page(incident))
    text = " ".join(read.text)
    assert incident.id in text
    assert all(finding.label in text for finding in story.accused(incident))
    for claim in ("Every eye was open", "Nobody else was seen at work", "left alone"):
        assert claim not in text
    assert SOMETHING_LOADED.search(incident_page(incident)) is None


def test_a_verdict_is_marked_where_it_was_decided():
    incident = next(e for e in reversed(list(report_events.events())) if isinstance(e, Incident))
    late = tuple(msgspec.structs.replace(one, time_ns=one.time_ns + 10**12) for one in incident.findings)
    assert incident_page(msgspec.structs.replace(incident, findings=late)) == incident_page(incident)


def test_a_page_of_an_incident_in_which_nothing_stands_accused_says_so():
    incident = next(e for e in reversed(list(report_events.events())) if isinstance(e, Incident))
    assert "nothing in it stands accused" in incident_page(msgspec.structs.replace(incident, findings=()))
