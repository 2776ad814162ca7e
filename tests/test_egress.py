"""Egress policy: rules against the same written for the eye, look-alikes that are left alone, and what is told."""

from __future__ import annotations

import ipaddress
import json
import struct
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpuguard.cli.commands import config, pcap
from gpuguard.core.egress import EgressMatch, EgressPolicy, EgressRule, End, Names, Rules, check, judge
from gpuguard.core.events import Decision, Finding
from gpuguard.core.guard import Guard
from gpuguard.core.policy import Policy, Rule, decide
from gpuguard.core.records import HostInfo, Packets, ProcessStarted, Socket, Sockets, Tick
from gpuguard.core.subjects import ProcessId
from gpuguard.policies import PolicyError, parse_policy
from gpuguard.recording.codec import PREFIX, decode_frame, encode_frame
from gpuguard.replaying import guard_for
from gpuguard.sensors.packets import read_capture

sys.path.insert(0, str(Path(__file__).parent))
from test_cli_pcap import pcap as capture_of
from test_dns_answers import a, answer, name, pointer, record

S = 1_000_000_000
AGENT = ProcessId("boot", 77, 900)
HERE, RESOLVER = "10.0.0.2", "10.0.0.53"

# -- rules, written for the eye ---------------------------------------------------------------------------------------


def is_network(target):
    try:
        return ipaddress.ip_network(target)
    except ValueError:
        return None


def fits(rule, host, address, port, protocol):
    target, network, one = rule.target, is_network(rule.target), ipaddress.ip_address(address)
    if rule.protocol and protocol not in {"tcp": [6], "udp": [17], "icmp": [1, 58]}[rule.protocol]:
        return False
    spans = [(str(span) + "-" + str(span)).split("-")[:2] if "-" not in str(span) else span.split("-")
             for span in rule.ports]
    if spans and not any(int(low) <= port <= int(high) for low, high in spans):
        return False
    if target == "*":
        return True
    if network:
        return one.version == network.version and one in network
    if rule.allow and (one.is_loopback or one.is_link_local or one.is_unspecified):
        return False
    return host == target or (target.startswith("*.") and host.endswith(target[1:]))


def first(policy, *connection):
    return next((rule for rule in policy.rules if fits(rule, *connection)), None)


HOSTS = ["", "example.org", "a.example.org", "b.a.example.org", "badexample.org", "org", "x.test"]
TARGETS = ["*", "example.org", "*.example.org", "*.a.example.org", "*.org", "x.test", "Example.ORG.", "10.0.0.0/8",
           "10.1.0.0/16", "10.1.2.3", "0.0.0.0/0", "::/0", "2001:db8::/32", "169.254.169.254", "fd00:ec2::254"]
ADDRESSES = ["10.1.2.3", "10.1.9.9", "10.9.9.9", "203.0.113.7", "2001:db8::1", "2001:db9::1", "169.254.169.254",
             "fe80::1", "127.0.0.1", "fd00:ec2::254"]
rules = st.builds(
    lambda deny, target, ports, protocol: EgressRule(**{"deny" if deny else "allow": target}, ports=ports,
                                                     protocol="" if ports and protocol == "icmp" else protocol),
    st.booleans(), st.sampled_from(TARGETS), st.sampled_from([(), (), (443,), ("8000-9000",), (22, "80-443")]),
    st.sampled_from(["", "", "tcp", "udp", "icmp"]),
)
connections = st.tuples(st.sampled_from(HOSTS), st.sampled_from(ADDRESSES), st.sampled_from([0, 22, 80, 443, 8500]),
                        st.sampled_from([1, 6, 17, 58]))


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.lists(rules, max_size=12), st.lists(connections, min_size=1, max_size=6))
@example([EgressRule(allow="*.example.org")], [("example.org", "203.0.113.7", 443, 6)])
def test_the_first_rule_that_fits_is_the_first_that_is_read(some, tried):
    policy = EgressPolicy("x", rules=tuple(some))
    assert not list(check(policy))
    quick = Rules(policy)
    for connection in tried:
        assert quick.first(*connection) == first(policy, *connection)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=30), st.text(max_size=12))
def test_any_target_and_port_is_good_or_refused_in_words(target, port):
    policy = EgressPolicy("x", rules=(EgressRule(deny=target, ports=(port,) if port else ()),))
    if not list(check(policy)):
        Rules(policy).first("example.org", "203.0.113.7", 443, 6)


@pytest.mark.parametrize(("written", "words"), [
    ("{name: a, rules: [{deny: 'a*.org'}]}", "a star stands alone or first"),
    ("{name: a, rules: [{deny: '10.1.2.3/8'}]}", "host bits must be zero"),
    ("{name: a, rules: [{deny: 'münchen.de'}]}", "with xn--"),
    ("{name: a, rules: [{deny: '1.2.3'}]}", "is no name"),
    ("{name: a, rules: [{deny: a.org, allow: b.org}]}", "give either allow or deny"),
    ("{name: a, rules: [{ports: [1]}]}", "give either allow or deny"),
    ("{name: a, rules: [{deny: a.org, ports: [0]}]}", "0 is no port"),
    ("{name: a, rules: [{deny: a.org, ports: ['9-1']}]}", "'9-1' is no port"),
    ("{name: a, rules: [{deny: a.org, ports: [1], protocol: icmp}]}", "ICMP has no ports"),
    ("{name: a, rules: [{deny: a.org, attempts: 0}]}", "attempts must be at least 1"),
    ("{name: a, rules: [{allow: a.org, observe: true}]}", "for what is denied"),
    ("{name: a, rules: [{deni: a.org}]}", "did you mean 'deny'?"),
    ("{name: a, match: {container: [x]}}", "did you mean 'container_ids'?"),
    ("{name: a, defualt: deny}", "did you mean 'default'?"),
    ("{name: a, default: block}", "Invalid enum value"),
    ("{name: a, resolvers: [dns.example]}", "is no address"),
    ("{default: deny}", "name"),
    ("{name: a}, {name: a}", "two sections of egress"),
])
def test_a_wrong_section_is_refused_with_the_place(written, words):
    with pytest.raises(PolicyError, match=r"site.yaml: ") as error:
        parse_policy(f"egress: [{written}]", "site.yaml")
    assert words in str(error.value)


@pytest.mark.parametrize(("policy", "status"), [("deny: '*.test'", 0), ("deny: '*'}, {deny: 'a*'", 2)])
def test_config_validate_checks_a_policy_file(tmp_path, policy, status):
    file = tmp_path / "site.yaml"
    file.write_text(f"egress: [{{name: a, rules: [{{{policy}}}]}}]")
    result = CliRunner().invoke(config.command, ["validate", str(file)])
    assert result.exit_code == status
    assert ("good" in result.output) is (status == 0)


# -- one connection ---------------------------------------------------------------------------------------------------

DENY = EgressPolicy("box", default="deny", rules=(
    EgressRule(allow="*.pypi.org"), EgressRule(allow="pypi.org", ports=(443,)), EgressRule(allow="10.0.0.0/8")))
ME, OTHER = (0, HERE), (0, "10.0.0.3")


def ruled(end, *answers, policy=DENY, at_s=0):
    names = Names()
    for client, host, address in answers:
        names.learn(client, host, [address], 60, 0)
    return judge(Rules(policy), names, ME, end, at_s * S)


@pytest.mark.parametrize(("end", "answers", "what"), [
    (End("203.0.113.7", 443, 6), [(ME, "pypi.org", "203.0.113.7")], "allowed"),
    (End("203.0.113.7", 22, 6), [(ME, "pypi.org", "203.0.113.7")], "denied"),
    (End("203.0.113.7", 443, 6), [], "denied"),
    (End("203.0.113.7", 443, 6), [(OTHER, "pypi.org", "203.0.113.7")], "unclear"),
    (End("203.0.113.7", 443, 6, "pypi.org"), [(ME, "pypi.org", "203.0.113.7")], "allowed"),
    (End("203.0.113.7", 443, 6, "pypi.org"), [(ME, "pypi.org", "203.0.113.9")], "unproven"),
    (End("203.0.113.7", 443, 6, "pypi.org"), [], "unclear"),
    (End("203.0.113.7", 443, 6, "pypi.org"), [(ME, "evil.test", "203.0.113.7")], "denied"),
    (End("203.0.113.7", 443, 6, "evil.test"), [(ME, "pypi.org", "203.0.113.7")], "denied"),
    (End("203.0.113.7", 443, 6, "front.test", True), [(ME, "pypi.org", "203.0.113.7")], "allowed"),
    (End("203.0.113.7", 443, 6, "front.test", True), [], "unclear"),
    (End("203.0.113.7", 443, 6), [(ME, "pypi.org", "203.0.113.7"), (ME, "evil.test", "203.0.113.7")], "allowed"),
    (End("10.9.9.9", 5000, 6), [], "allowed"),
    (End("10.9.9.9", 443, 6, "evil.test"), [], "allowed"),
    (End("169.254.169.254", 80, 6), [(ME, "a.pypi.org", "169.254.169.254")], "denied"),
    (End("2001:db8::1", 443, 17), [(ME, "files.pypi.org", "2001:db8::1")], "allowed"),
])
def test_what_a_name_clears(end, answers, what):
    assert ruled(end, *answers).what == what


def test_an_answer_clears_while_it_holds_and_is_a_hint_for_a_day():
    learnt = (ME, "pypi.org", "203.0.113.7")
    assert [ruled(End("203.0.113.7", 443, 6), learnt, at_s=at_s).what for at_s in (600, 3600, 3 * 86_400)] == [
        "allowed", "unclear", "denied"]


def test_tables_of_names_are_bounded(monkeypatch):
    monkeypatch.setattr("gpuguard.core.egress.ADDRESSES_MAX", 10)
    names = Names()
    for index in range(40):
        names.learn(ME, f"n{index}.test", ["203.0.113.7", f"10.0.0.{index}"], 60, 0)
    assert len(names.fresh(ME, "203.0.113.7", 0)) == 16
    assert names.fresh(ME, "10.0.0.1", 0) == []
    assert names.evicted == 3 * 30 + 2 + 2 * 24


# -- captures ---------------------------------------------------------------------------------------------------------


def ip(source, destination, protocol, data):
    ends = [ipaddress.ip_address(one) for one in (source, destination)]
    if ends[0].version == 6:
        return struct.pack(">IHBB", 6 << 28, len(data), protocol, 64) + ends[0].packed + ends[1].packed + data
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(data), 0, 0, 64, protocol, 0)
    return head + ends[0].packed + ends[1].packed + data


def udp(source, port, destination, to, data):
    return ip(source, destination, 17, struct.pack(">HHHH", port, to, 8 + len(data), 0) + data)


def tcp(source, port, destination, to, flags, sequence=1, data=b""):
    return ip(source, destination, 6, struct.pack(">HHIIBBHHH", port, to, sequence, 1, 80, flags, 999, 0, 0) + data)


def hello(server_name, *, encrypted=False):
    host = server_name.encode()
    extensions = struct.pack(">HHHBH", 0, len(host) + 5, len(host) + 3, 0, len(host)) + host if host else b""
    extensions += struct.pack(">HH", 0xFE0D, 0) if encrypted else b""
    body = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0" + struct.pack(">H", len(extensions)) + extensions
    return b"\x16\3\1" + struct.pack(">HB", len(body) + 4, 1) + len(body).to_bytes(3, "big") + body


class Wire:
    """Frames of one host, a connection or a look-up at a time."""

    def __init__(self):
        self.frames, self.now_us, self.port = [], 0, 40_000

    def put(self, frame, after_us=1000):
        self.now_us += after_us
        self.frames.append((self.now_us, frame))

    def wait(self, seconds):
        self.now_us += round(seconds * 1e6)
        return self

    def ask(self, host, *records, kind=1, client=HERE, server=RESOLVER):
        self.port += 1
        question = struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0) + name(host) + struct.pack(">HH", kind, 1)
        self.put(udp(client, self.port, server, 53, question))
        self.put(udp(server, 53, client, self.port, answer(host, *records, kind=kind)))
        return self

    def connect(self, address, port=443, *, data=b"", answered=True, client=HERE):
        self.port += 1
        self.put(tcp(client, self.port, address, port, 2, 0))
        if answered:
            self.put(tcp(address, port, client, self.port, 18, 0))
            self.put(tcp(client, self.port, address, port, 24, 1, data or b"x"))
            self.put(tcp(address, port, client, self.port, 24, 1, b"y"))
            self.put(tcp(client, self.port, address, port, 17, 1 + len(data or b"x")))
            self.put(tcp(address, port, client, self.port, 17, 2))
        return self


def sandbox(*lines, default="deny"):
    listed = "".join(f"\n      - {line}" for line in lines)
    return f"egress:\n  - name: box\n    default: {default}\n    rules:{listed or ' []'}\n"


STRICT = sandbox("{allow: '*.pypi.org'}", "{allow: pypi.org}", "{allow: 10.0.0.0/8}", "{allow: 'fd00::/8'}")


def run(tmp_path, wire, policy=STRICT, *more):
    file, rules = tmp_path / "a.pcap", tmp_path / "egress.yaml"
    file.write_bytes(capture_of(wire.frames))
    rules.write_text(policy)
    result = CliRunner().invoke(pcap.command, [str(file), "-o", "json", "--policy", str(rules), *more])
    assert result.exit_code in (0, 1), result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return lines[:-1], lines[-1]["summary"]


def told(lines):
    return [line for line in lines if line["label"].startswith("egress")]


LOOK_ALIKES = {
    "an allowed name": Wire().ask("pypi.org", a("203.0.113.7")).connect("203.0.113.7", data=hello("pypi.org")),
    "an allowed name without TLS": Wire().ask("pypi.org", a("203.0.113.7")).connect("203.0.113.7", 80),
    "an allowed name behind a CNAME": Wire().ask(
        "files.pypi.org", record(pointer(12), 5, name("edge.cdn.test")), a("203.0.113.7", name("edge.cdn.test")),
        ).connect("203.0.113.7", data=hello("files.pypi.org")),
    "IPv6, resolved over IPv6": Wire().ask(
        "pypi.org", a("2001:db8::7"), kind=28, client="2001:db8::2", server="fd00::53",
        ).connect("2001:db8::7", data=hello("pypi.org"), client="2001:db8::2"),
    "one of many names of an address": Wire().ask("pypi.org", a("203.0.113.7")).ask(
        "shop.pypi.org", a("203.0.113.7")).connect("203.0.113.7", data=hello("shop.pypi.org")),
    "an answer without addresses of the other family": Wire().ask("pypi.org", kind=28).ask(
        "pypi.org", a("203.0.113.7")).connect("203.0.113.7"),
    "names of a search list": Wire().ask("pypi.org.default.svc.cluster.local").ask("pypi.org.svc.cluster.local").ask(
        "pypi.org.cluster.local").ask("pypi.org", a("203.0.113.7")).connect("203.0.113.7", data=hello("pypi.org")),
    "names of the cluster": Wire().ask("db.default.svc.cluster.local", a("10.96.0.7")).connect("10.96.0.7", 5432),
    "one label": Wire().ask("trainer-0").ask("trainer-0.default.svc.cluster.local", a("10.96.0.8")),
    "an address looked up": Wire().ask("7.113.0.203.in-addr.arpa", kind=12),
    "a resolver outside": Wire().ask("pypi.org", a("203.0.113.7"), server="203.0.113.53"),
    "names of this link": Wire().ask("printer._ipp.local", client="fe80::9", server="ff02::fb"),
    "multicast and this machine": Wire().connect("127.0.0.1", 9000).connect("::1", 9000, client="::1"),
    "the encrypted hello of an allowed name": Wire().ask("pypi.org", a("203.0.113.7")).connect(
        "203.0.113.7", data=hello("front.test", encrypted=True)),
}


@pytest.mark.parametrize("kind", LOOK_ALIKES)
def test_what_is_allowed_is_left_alone(tmp_path, kind):
    lines, summary = run(tmp_path, LOOK_ALIKES[kind])
    assert told(lines) == []
    assert summary["counts"]["suspect"] == summary["counts"]["confirmed"] == 0


def test_a_host_with_two_families_is_one_client(tmp_path):
    wire = Wire().ask("pypi.org", a("2001:db8::7"), kind=28).connect("2001:db8::7", client="2001:db8::2")
    assert told(run(tmp_path, wire, STRICT, "--host", HERE, "--host", "2001:db8::2")[0]) == []
    lines, summary = run(tmp_path, wire)
    assert told(lines) == []
    assert any("whose name is not known" in gap for gap in summary["gaps"])


def test_what_others_ask_and_open_here_is_not_judged(tmp_path):
    wire = Wire().ask("exfil.test", client="203.0.113.9", server=HERE).connect(HERE, 22, client="203.0.113.9")
    assert told(run(tmp_path, wire, STRICT.replace("10.0.0.0/8", "10.9.0.0/16"), "--host", HERE)[0]) == []


def blocks_of(wire, tmp_path):
    file = tmp_path / "a.pcap"
    file.write_bytes(capture_of(wire.frames))
    return list(read_capture(file))


def test_cut_anywhere_and_recorded_it_gives_the_same_events(tmp_path):
    wire = Wire()
    for index in range(4):
        wire.ask("exfil.test", a("203.0.113.66")).connect("203.0.113.66", data=hello("exfil.test")).wait(3)
        wire.ask("pypi.org", a("203.0.113.7")).connect(f"203.0.113.{7 + index}", data=hello("pypi.org")).wait(9)
    (block,) = blocks_of(wire, tmp_path)
    policy = parse_policy(STRICT, "x")
    first_block = HostInfo(0, 1, "b", "h", 100, settings={"policy": msgspec.json.encode(policy).decode()})

    def judged(blocks):
        guard = guard_for(first_block)
        events = [event for one in [first_block, *blocks] for event in guard.receive(one)]
        return [*events, *guard.close(block.time_ns)]

    whole = judged([block])
    assert {one.label for one in whole if isinstance(one, Finding)} == {"egress-denied"}
    for at in range(1, len(block.rows)):
        left = tuple(fact for fact in block.facts if fact.row < at)
        right = tuple(msgspec.structs.replace(fact, row=fact.row - at) for fact in block.facts if fact.row >= at)
        cut = [Packets(int(block.rows["time_ns"][at - 1]), 0, block.rows[:at], left),
               Packets(block.time_ns, 0, block.rows[at:], right)]
        assert judged([decoded for one in cut for decoded in decode(one)]) == whole


def decode(block):
    """Return a block as a recording gives it back."""
    frame = encode_frame([block])
    size, crc = PREFIX.unpack_from(frame)
    assert size == len(frame) - PREFIX.size
    return decode_frame(frame[PREFIX.size:], crc)


def test_the_first_attempt_is_low_and_the_third_is_suspect(tmp_path):
    wire = Wire()
    for _ in range(3):
        wire.ask("exfil.test", a("203.0.113.66")).connect("203.0.113.66", data=hello("exfil.test")).wait(20)
    lines, summary = run(tmp_path, wire, sandbox("{deny: exfil.test}", default="allow"))
    found = told(lines)
    assert len(found) == 6
    assert sorted({line["verdict"] for line in found}) == ["suspect", "unknown"]
    assert summary["counts"]["confirmed"] == 0
    words = " ".join(one["text"] for line in found for one in line["evidence"])
    assert "tried exfil.test: 3 attempts within 40 s against deny exfil.test of egress policy 'box'" in words


def test_a_lookup_that_fails_and_a_connection_refused_are_attempts(tmp_path):
    wire = Wire()
    for _ in range(3):
        wire.ask("exfil.test").wait(20)
    assert {line["carrier"] for line in told(run(tmp_path, wire)[0])} == {"dns"}
    wire = Wire()
    for _ in range(3):
        wire.connect("203.0.113.66", 22, answered=False).wait(20)
    found = told(run(tmp_path, wire)[0])
    assert "203.0.113.66 port 22" in found[-1]["evidence"][0]["text"]
    assert {line["verdict"] for line in found} == {"suspect", "unknown"}


def test_a_retry_within_five_seconds_is_the_same_attempt(tmp_path):
    wire = Wire()
    for _ in range(5):
        wire.ask("exfil.test").ask("exfil.test", kind=28).ask("exfil.test.corp.example").wait(0.5)
    assert {line["verdict"] for line in told(run(tmp_path, wire)[0])} == {"unknown"}


@pytest.mark.parametrize(("rule", "label", "verdict"), [
    ("{deny: '*.test', verdict: confirmed, attempts: 1}", "egress-denied", "confirmed"),
    ("{deny: '*.test', attempts: 1}", "egress-denied", "suspect"),
    ("{deny: '*.test', observe: true, attempts: 1}", "egress-observed", "suspect"),
    ("{deny: 203.0.113.0/24, protocol: tcp, ports: [443], attempts: 1}", "egress-denied", "suspect"),
])
def test_the_rule_says_how_far_it_goes(tmp_path, rule, label, verdict):
    wire = Wire().ask("exfil.test", a("203.0.113.66")).connect("203.0.113.66", data=hello("exfil.test"))
    found = told(run(tmp_path, wire, sandbox(rule, default="allow"))[0])
    assert {(line["label"], line["verdict"]) for line in found} == {(label, verdict)}


def test_never_confirmed_by_number_or_by_several_rules(tmp_path):
    wire = Wire()
    for _ in range(60):
        for host in ("a.test", "b.test", "c.test", "d.test"):
            wire.ask(host)
        wire.wait(6)
    policy = sandbox(*(f"{{deny: {one}.test}}" for one in "abcd"), default="allow")
    assert {line["verdict"] for line in told(run(tmp_path, wire, policy)[0])} == {"suspect", "unknown"}


def test_a_name_in_tls_that_dns_did_not_answer_is_told_and_no_more(tmp_path):
    wire = Wire().ask("pypi.org", a("203.0.113.7"))
    for _ in range(6):
        wire.connect("203.0.113.66", data=hello("pypi.org")).wait(20)
    found = told(run(tmp_path, wire)[0])
    assert {line["verdict"] for line in found} == {"unknown"}
    assert "which DNS did not answer it for that name" in found[0]["evidence"][0]["text"]


def test_an_alias_that_is_denied_is_found_behind_another_name(tmp_path):
    wire = Wire().ask("innocent.example", record(pointer(12), 5, name("x.tracker.test")),
                      a("203.0.113.5", name("x.tracker.test")))
    found = told(run(tmp_path, wire, sandbox("{deny: '*.tracker.test'}", default="allow"))[0])
    assert "tried x.tracker.test" in found[0]["evidence"][0]["text"]


def test_answers_of_a_server_that_is_no_resolver_clear_nobody(tmp_path):
    policy = STRICT + "    resolvers: [10.0.0.53]\n"
    wire = Wire().ask("pypi.org", a("203.0.113.66"), server="203.0.113.53").connect("203.0.113.66")
    texts = [line["evidence"][0]["text"] for line in told(run(tmp_path, wire, policy)[0])]
    assert any("203.0.113.53 port 53" in text for text in texts)
    assert any("203.0.113.66 port 443" in text for text in texts)


def test_without_egress_policy_nothing_is_said_of_it(tmp_path):
    wire = Wire().ask("exfil.test", a("203.0.113.66")).connect("203.0.113.66")
    assert told(run(tmp_path, wire, "rules: []\n")[0]) == []


def test_a_wrong_policy_is_wrong_usage(tmp_path):
    (tmp_path / "bad.yaml").write_text(sandbox("{deny: 'a*'}"))
    result = CliRunner().invoke(pcap.command, [__file__, "--policy", str(tmp_path / "bad.yaml")])
    assert result.exit_code == 2
    assert "a star stands alone" in result.output


# -- whose it is ------------------------------------------------------------------------------------------------------

OF_SANDBOX = Policy(
    rules=(Rule("tell", "notify", "suspect"), Rule("cut", "isolate", "suspect")),
    egress=(EgressPolicy("box", match=EgressMatch(sandbox_ids=("sb-1",)), rules=(EgressRule(deny="203.0.113.0/24"),)),),
)


def live(tmp_path, policy, *, environ=None, cgroup="/box", owners=(AGENT,), tries=3):
    """Return the events of a host whose process tries and whose sockets are listed right after each attempt."""
    wire = Wire()
    for _ in range(tries):
        wire.connect("203.0.113.66", answered=False).wait(20)
    file = tmp_path / "a.pcap"
    file.write_bytes(capture_of(wire.frames))
    guard = Guard(policy, quiet=True)
    events = guard.receive(HostInfo(0, 1, "boot", "h", 100, addresses=(HERE,)))
    guard.receive(ProcessStarted(0, AGENT, None, "agent", ("agent",), user="ada", cgroup=cgroup, environ=environ or {}))
    (block,) = read_capture(file)
    for index in range(len(block.rows)):
        one = block.rows[index:index + 1]
        time_ns = int(one["time_ns"][0])
        events += guard.receive(Sockets(time_ns - 1, 0, ()))
        events += guard.receive(type(block)(time_ns, 0, one))
        socket = Socket(6, HERE, int(one["source_port"][0]), "203.0.113.66", 443, 2, 9 + index, 0, owners=owners)
        events += guard.receive(Sockets(time_ns + S, 0, (socket,)))
        events += guard.receive(Tick(time_ns + 4 * S))
    return [*events, *guard.close(time_ns + 5 * S)]


def findings(events):
    return [(one.verdict, one.process.process if one.process else None) for one in events if isinstance(one, Finding)]


def test_a_process_is_counted_told_once_and_then_suspect(tmp_path):
    events = live(tmp_path, OF_SANDBOX, environ={"GPUGUARD_SANDBOX_ID": "sb-1"})
    assert findings(events) == [("unknown", AGENT), ("suspect", AGENT)]
    assert [one.rung for one in events if isinstance(one, Decision)] == ["notify", "isolate"]
    (last,) = [one for one in events if isinstance(one, Finding)][1].evidence
    assert last.text.startswith("pid 77 tried 203.0.113.66 port 443: 3 attempts within 40 s")
    assert last.evidence_class == "network"


@pytest.mark.parametrize("case", [
    {"environ": {"GPUGUARD_SANDBOX_ID": "sb-2"}}, {"environ": {}},
    {"environ": {"GPUGUARD_SANDBOX_ID": "sb-1"}, "owners": ()},
])
def test_a_section_is_about_whom_it_names_and_nobody_unknown(tmp_path, case):
    assert findings(live(tmp_path, OF_SANDBOX, **case)) == []


@pytest.mark.parametrize(("match", "about"), [
    (EgressMatch(users=("ada",)), True), (EgressMatch(users=("*",)), True), (EgressMatch(users=("bob",)), False),
    (EgressMatch(cgroups=("/kubepods",)), True), (EgressMatch(cgroups=("/kube",)), False),
    (EgressMatch(container_ids=("c" * 64,)), True), (EgressMatch(container_ids=("*",), users=("bob",)), False),
    (EgressMatch(pod_uids=("0f7c2d9e-5a1b-4c3d-8e7f-112233445566",)), True),
    (EgressMatch(slurm_job_ids=("4711",)), True), (EgressMatch(slurm_job_ids=("*",), sandbox_ids=("*",)), False),
])
def test_whom_a_section_is_about(tmp_path, match, about):
    policy = Policy(egress=(EgressPolicy("x", match=match, rules=(EgressRule(deny="203.0.113.66", attempts=1),)),))
    cgroup = "/kubepods/pod0f7c2d9e-5a1b-4c3d-8e7f-112233445566/" + "c" * 64 + "/job_4711"
    assert (len(findings(live(tmp_path, policy, cgroup=cgroup, tries=1))) == 1) is about


def test_an_unknown_owner_is_counted_for_its_address_alone(tmp_path):
    policy = Policy(egress=(EgressPolicy("all", rules=(EgressRule(deny="203.0.113.66"),)),))
    assert findings(live(tmp_path, policy, owners=())) == [("unknown", None), ("suspect", None)]


def test_what_is_only_observed_is_told_and_never_acted_on(tmp_path):
    policy = Policy(OF_SANDBOX.rules, egress=(EgressPolicy("all", default="deny", observe=True),))
    events = live(tmp_path, policy)
    assert {one.label for one in events if isinstance(one, Finding)} == {"egress-observed"}
    assert [one.rung for one in events if isinstance(one, Decision)] == ["notify"]
    assert [step.rung for step in decide(policy, next(one for one in reversed(events) if isinstance(one, Finding)
                                                       and one.verdict == "suspect"))] == ["notify"]


@pytest.mark.parametrize(("namespaces", "owner"), [((9,), AGENT), ((9, 10), None), ((), None)])
def test_a_container_is_named_where_its_bridge_is_watched(tmp_path, namespaces, owner):
    (block,) = blocks_of(Wire().connect("203.0.113.66", answered=False, client="172.17.0.2"), tmp_path)
    guard = Guard(Policy(egress=(EgressPolicy("all", rules=(EgressRule(deny="203.0.113.66"),)),)), quiet=True)
    events = guard.receive(HostInfo(0, 1, "boot", "h", 100, addresses=(HERE,)))
    guard.receive(Sockets(block.time_ns - 1, 0, ()))
    events += guard.receive(block)
    socket = Socket(6, "172.17.0.2", 40_001, "203.0.113.66", 443, 2, 9, 0, owners=(AGENT,))
    for netns in namespaces:
        events += guard.receive(Sockets(block.time_ns + S, netns, (socket,)))
    events += guard.receive(Tick(block.time_ns + 4 * S))
    events += guard.receive(Tick(block.time_ns + 13 * S))
    assert findings(events) == [("unknown", owner)]


# -- OpenSandbox ------------------------------------------------------------------------------------------------------


def imported(text, *more):
    result = CliRunner().invoke(config.command, ["import-opensandbox", "-", *more], input=text)
    return result.exit_code, result.output


@pytest.mark.parametrize("wrapped", ["%s", '{"networkPolicy": %s}', '{"mode": "enforcing", "policy": %s}'])
def test_opensandbox_policy_is_imported(wrapped):
    status, text = imported(wrapped % json.dumps({"defaultAction": "deny", "egress": [
        {"action": "Allow", "target": "*.pypi.org"}, {"action": "deny", "target": "10.1.2.3/8"},
        {"target": "evil.test"}]}), "--sandbox", "sb-1")
    assert status == 0
    (section,) = parse_policy(text, "x").egress
    assert section == EgressPolicy("opensandbox", "deny", EgressMatch(sandbox_ids=("sb-1",)), (
        EgressRule(deny="10.0.0.0/8"), EgressRule(allow="*.pypi.org"), EgressRule(deny="evil.test")))


@pytest.mark.parametrize("empty", ["{}", "null", '{"egress": []}'])
def test_an_empty_policy_denies_all_as_it_does_there(empty):
    assert parse_policy(imported(empty)[1], "x").egress == (EgressPolicy("opensandbox", "deny"),)


@pytest.mark.parametrize(("text", "words"), [
    ("[]", "is an object"), ("nonsense", "no JSON"), ('{"egress": {}}', "list of rules"),
    ('{"defaultaction": "deny"}', "no such key 'defaultaction'"), ('{"egress": [{"action": "log", "target": "a"}]}',
                                                                   "neither allow nor deny"),
    ('{"egress": [{"action": "allow"}]}', "target must be"), ('{"egress": [{"target": "*.a.*"}]}', "a star stands"),
    ('{"defaultAction": 7}', "neither allow nor deny"), ('{"egress": ["a"]}', "is an object"),
])
def test_what_opensandbox_would_not_mean_is_refused(text, words):
    status, output = imported(text)
    assert status == 2
    assert words in output
