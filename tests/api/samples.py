"""One of everything that the API carries, and strategies for more."""

from __future__ import annotations

import msgspec

from gpuguard.core.events import Decision, Finding, Incident, ProcessBrief
from gpuguard.core.evidence import Evidence
from gpuguard.core.guard import Explanation, ProcessVerdict
from gpuguard.core.records import ActionOutcome, Gap, ToolCall
from gpuguard.core.subjects import Context, DeviceId, FlowId, ProcessId

START_NS = 1_760_000_000_000_000_000
AGENT = ProcessId(boot_id="b00", pid=4000, start_ticks=1_000)
SSH = ProcessId(boot_id="b00", pid=4711, start_ticks=2_000)
MINER = ProcessId(boot_id="b00", pid=4712, start_ticks=2_100)
FLOW = FlowId(netns=4026531840, protocol=6, initiator="10.0.0.2", initiator_port=40000, responder="198.51.100.7",
              responder_port=443, start_ns=START_NS + 1_000_000_000)
CONTEXT = Context(sandbox_id="box-1", trace_id="a" * 32, span_id="b" * 16)

SSH_BRIEF = ProcessBrief(process=SSH, name="ssh", argv=("ssh", "-R", "8022:localhost:22", "far"), user="agent",
                         cgroup="/jobs/1", cgroup_id=77, context=CONTEXT, ancestors=(AGENT,))
MINER_BRIEF = ProcessBrief(process=MINER, name="trainer", argv=("./trainer",), user="agent", cgroup="/jobs/1",
                           cgroup_id=77, context=CONTEXT, ancestors=(AGENT,))
CALL = ToolCall(time_ns=START_NS, start_ns=START_NS, end_ns=None, trace_id="a" * 32, span_id="b" * 16,
                parent_span_id="c" * 16, tool_name="shell", tool_call_id="call_1", agent_name="coder",
                sandbox_id="box-1", arguments='{"command": "ssh -R ..."}', process=AGENT)
GAP = Gap(time_ns=START_NS, sensor="launches", reason="libbpf is missing", since_ns=START_NS, lost=None)

REQUESTED = Evidence(time_ns=START_NS + 1_400_000_000, subject=FLOW, label="ssh-reverse-tunnel",
                     evidence_class="network", kind="ssh-reverse-forward-request", nats=9.25,
                     text="a record of the size of tcpip-forward", start_ns=START_NS + 1_000_000_000, carrier="ssh",
                     blind_spots=("padding by a changed client",))
TYPED = Evidence(time_ns=START_NS + 1_500_000_000, subject=FLOW, label="ssh-reverse-tunnel",
                 evidence_class="network", kind="ssh-typing", nats=-0.5, text="somebody types",
                 start_ns=START_NS + 1_000_000_000)
HASHED = Evidence(time_ns=START_NS + 4_000_000_000, subject=MINER, label="mining", evidence_class="launch",
                  kind="launch-signature", nats=12.0, text="one kernel, steady cadence", start_ns=START_NS)
HOT = Evidence(time_ns=START_NS + 4_000_000_000, subject=DeviceId(uuid="GPU-1"), label="mining",
               evidence_class="counter", kind="flat-power", nats=1.0, text="flat power", start_ns=START_NS)

TUNNEL = Finding(time_ns=START_NS + 1_500_000_000, id="F1", subject=FLOW, verdict="confirmed",
                 label="ssh-reverse-tunnel", carrier="ssh", probability=0.9998, nats=8.75,
                 start_ns=START_NS + 1_000_000_000, decided_after_s=0.5, evidence=(REQUESTED,),
                 counter_evidence=(TYPED,), process=SSH_BRIEF, tool_call=CALL, trace_id="a" * 32, gaps=(GAP,))
MINING = Finding(time_ns=START_NS + 4_000_000_000, id="F2", subject=MINER, verdict="suspect", label="mining",
                 carrier="", probability=0.97, nats=3.5, start_ns=START_NS + 2_000_000_000, decided_after_s=2.0,
                 evidence=(HASHED, HOT), counter_evidence=(), process=MINER_BRIEF, tool_call=None, trace_id="")
NOBODYS = Finding(time_ns=START_NS, id="F3", subject=DeviceId(uuid="GPU-1"), verdict="unknown", label="compute",
                  carrier="", probability=0.0, nats=0.0, start_ns=START_NS, decided_after_s=0.0, evidence=(),
                  counter_evidence=(), process=None, tool_call=None, trace_id="")

DECISION = Decision(time_ns=START_NS + 4_100_000_000, id="D1", incident_id="I1", finding_id="F2", rung="kill",
                    mode="enforce", needs_approval=True, target=MINER_BRIEF, ttl_s=900.0, reason="mining confirmed",
                    rule="kill-mining")
WOULD = Decision(time_ns=START_NS + 1_600_000_000, id="D2", incident_id="I1", finding_id="F1", rung="isolate",
                 mode="observe", needs_approval=False, target=None, ttl_s=900.0, reason="tunnel", rule="cut-tunnels")
OUTCOME = ActionOutcome(time_ns=START_NS + 1_700_000_000, decision_id="D2", action="isolate", outcome="would_have",
                        text="would isolate: mode is observe", process=SSH, expires_ns=None)

INCIDENT = Incident(time_ns=START_NS + 4_100_000_000, id="I1", state="open", start_ns=START_NS,
                    title="mining, ssh-reverse-tunnel by ssh, trainer, asked for by tool call shell",
                    story="trace " + "a" * 32, verdict="confirmed", findings=(TUNNEL, MINING, NOBODYS),
                    tool_calls=(CALL,), processes=(SSH_BRIEF, MINER_BRIEF), decisions=(WOULD, DECISION),
                    outcomes=(OUTCOME,))
STANDING = ProcessVerdict(process=MINER_BRIEF, verdict="suspect", label="mining", probability=0.97)

NEARLY = msgspec.structs.replace(MINING, id="F4", verdict="unknown", nats=4.4, evidence=(msgspec.structs.replace(
    HASHED, evidence_class="counter", nats=4.4, text="expected after 1200 s of work like this"),))
#: Nobody is accused: one process, and the GPU that it uses.
EXPLANATION = Explanation(time_ns=START_NS + 5_000_000_000, subject=MINER, process=MINER_BRIEF,
                          findings=(NEARLY, NOBODYS), left_out=0, gaps=(GAP,))
