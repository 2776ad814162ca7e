"""Acting, step by step the same for every rung: permit, check the target, journal, act, verify, audit; undo on time.

One `Enforcement` at a time holds the journal of a host: the broker's, or, while no broker runs, that of a command at
the operator's hand. It never trusts what asks: mode, kill switch, rate, time to live and identity are its own checks.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections import deque
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec
import structlog
from msgspec import Struct

from gpuguard import proctree
from gpuguard.broker import boxes
from gpuguard.broker.actions import Effect, Job, isolate, kill, pause, throttle
from gpuguard.broker.audit import AuditFailed, Log
from gpuguard.broker.journal import HOUR_NS, Completed, Ended, Grown, Intent, Journal, JournalFailed, Plan
from gpuguard.broker.protected import Limits, refusal
from gpuguard.core.records import ActionOutcome
from gpuguard.proctree import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gpuguard.core.subjects import ProcessId
    from gpuguard.messages import Act, Approve
    from gpuguard.proctree import Member

DISARMED_NAME = "disarmed"
VERIFY_PERIOD_S = 1.0
VERIFY_SHARE = 50  # looking whether acts hold takes at most a fiftieth of our time, however large the trees
NEWS_MAX = 256
APPROVALS_MAX = 64
APPROVAL_NS = 600 * 1_000_000_000
AUDIT_BYTES_PER_HOUR = 64 * 1024 * 1024
_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,63}$")
_NS = 1_000_000_000

Outcome = Literal["would_have", "done", "refused", "failed", "undone", "expired"]
Over = Literal["done", "undone", "expired", "failed"]
By = Literal["guard", "operator"]

_log: structlog.stdlib.BoundLogger = structlog.get_logger("gpuguard.enforcement")


class Action(Protocol):
    """What a file in actions/ offers."""

    def apply(self, job: Job) -> Effect:
        """Act."""
        ...

    def verify(self, effect: Effect) -> str:
        """Return what does not hold."""
        ...

    def undo(self, plan: Plan, effect: Effect | None, keep: frozenset[str]) -> str:
        """Take it back."""
        ...


ACTIONS: dict[str, Action] = {"isolate": isolate, "throttle": throttle, "pause": pause, "kill": kill}


class Clock(Struct, frozen=True):
    """Wall time for people, boot time for deadlines: nobody can set that one, and it counts suspend."""

    def wall_ns(self) -> int:
        """Return Unix nanoseconds."""
        return time.time_ns()

    def boot_ns(self) -> int:
        """Return CLOCK_BOOTTIME."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Enforcement:
    """Everything that is in force on this host, and the way into it and out of it."""

    def __init__(self, state: Path, logs: Path, *, enforcing: bool, limits: Limits | None = None,
                 clock: Clock | None = None) -> None:
        """Take the journal and the audit log; raises `JournalLocked`, `JournalFailed`, `AuditFailed` or `OSError`."""
        self.limits = limits or Limits()
        self.ours: set[int] = set()
        self.asking = 0
        self._enforcing = enforcing
        self._disarmed = False
        self._switch = state / DISARMED_NAME
        self._clock = clock or Clock()
        self._boot = proctree.boot_id()
        self._effects: dict[str, Effect] = {}
        self._problems: dict[str, str] = {}
        self._approvals: dict[str, tuple[Approve, int]] = {}
        self._news: deque[ActionOutcome] = deque(maxlen=NEWS_MAX)
        self._verify_at_ns = 0
        self._budget, self._budget_ns = AUDIT_BYTES_PER_HOUR, self._clock.boot_ns()
        self._journal = Journal(state)
        try:
            self._audit = Log(logs)
        except (AuditFailed, OSError):
            self._journal.close()
            raise

    # -- what is asked --

    @property
    def enforcing(self) -> bool:
        """Whether a guard's request would be carried out now."""
        return self._enforcing and not self._disarmed and not self._switch.exists()

    def act(self, request: Act, by: By) -> ActionOutcome:
        """Do what was asked, or say why not. Never raises for the request's sake."""
        if by == "guard":
            request = msgspec.structs.replace(request, approved_by=self._approver(request))
        expires_ns: int | None = None
        outcome: Outcome
        try:
            self._permit(request, by)
            if by == "guard" and not self.enforcing:
                why = "disarmed" if self._enforcing else "observe mode"
                with self._checked(request):
                    outcome, text = "would_have", f"{why}: would have done {request.action}"
            else:
                text, expires_ns = self._perform(request, by)
                outcome = "done"
                self._approvals.pop(request.decision_id, None)
        except Refusal as refused:
            outcome, text = "refused", str(refused)
        except (OSError, JournalFailed, AuditFailed) as error:
            outcome, text = "failed", str(error)
        return self._say(request.decision_id, request.action, outcome, text, process=request.target,
                         expires_ns=expires_ns, by=by, reason=request.reason[:512],
                         approved_by=request.approved_by[:128])

    def approve(self, request: Approve) -> None:
        """Hold a person's approval of one decision about one process for a while; raises `Refusal` or `AuditFailed`."""
        if not _ID.match(request.decision_id):
            raise Refusal("not a decision id")
        with proctree.held(request.target):
            self._audit.append(self._clock.wall_ns(), "operator", "act.approved", {
                "decision_id": request.decision_id, "process": msgspec.to_builtins(request.target),
                "by": request.by[:128], "reason": request.reason[:512]})
        self._approvals[request.decision_id] = (request, self._clock.boot_ns() + APPROVAL_NS)
        while len(self._approvals) > APPROVALS_MAX:
            del self._approvals[next(iter(self._approvals))]

    def _approver(self, request: Act) -> str:
        """Return who approved this very act on this very process, "" if nobody did lately."""
        approval, until_ns = self._approvals.get(request.decision_id, (None, 0))
        if approval is None or approval.target != request.target or self._clock.boot_ns() > until_ns:
            return ""
        return approval.by[:128]

    def undo(self, decision_id: str, reason: str, by: By) -> list[ActionOutcome]:
        """Undo one act, or everything (""). What a person paused only a person lets go."""
        acts = self._journal.state.in_force
        mine = [one.id for one in reversed(acts.values()) if by == "operator" or not one.by_hand]
        if decision_id in acts and decision_id not in mine:
            return [self._outcome(decision_id, "undo", "refused", "a person paused it: only a person lets it go")]
        outcomes = [self._undo_one(one, reason, "undone") for one in ([decision_id] if decision_id else mine)]
        if by == "operator":
            # The guard did not ask, so it has to be told.
            self._news.extend(outcomes)
        return outcomes

    def in_force(self) -> list[ActionOutcome]:
        """Return what is in force now."""
        acts, texts = self._journal.state.in_force, self._journal.state.completed
        return [self._outcome(one.id, one.action, "done", texts.get(one.id, "not verified yet"), process=one.process,
                              expires_ns=one.expires_ns) for one in acts.values()]

    def take_news(self) -> list[ActionOutcome]:
        """Return what changed by itself (expired, ended, did not hold) since this was asked last."""
        news = list(self._news)
        self._news.clear()
        return news

    def disarm(self, reason: str, by: By) -> list[ActionOutcome]:
        """Turn enforcement off and undo everything: by an operator until the switch is lifted, else until we end."""
        self._disarmed = True
        outcomes = self.undo("", f"disarmed: {reason}", by)
        text = "enforcement is off until the next start"
        if by == "operator":
            text = f"enforcement is off until `gpuguard disarm --lift`, which removes {self._switch}"
            try:
                self._switch.touch(mode=0o600)
            except OSError as error:
                text = f"enforcement is off until the next start only: {error}"
        return [*outcomes, self._say("", "disarm", "done", text, process=None, by=by, reason=reason[:512])]

    def enter(self, time_ns: int, source: Literal["guard", "operator"], kind: str, body: dict[str, object]) -> None:
        """Append an entry of somebody else to the audit log; raises `AuditFailed`."""
        now_ns, size = self._clock.boot_ns(), len(msgspec.msgpack.encode(body)) + len(kind)
        earned = (now_ns - self._budget_ns) * AUDIT_BYTES_PER_HOUR // HOUR_NS
        self._budget, self._budget_ns = min(AUDIT_BYTES_PER_HOUR, self._budget + earned), now_ns
        if size > self._budget:
            raise AuditFailed("the guard wrote more than it may in an hour: no disk is filled at its word")
        self._budget -= size
        self._audit.append(time_ns, source, kind, body)

    # -- what time brings --

    def unreadable(self) -> list[ActionOutcome]:
        """Return a failure for each line of the journal that cannot be read: what it named may still be in force."""
        text = "an act that it named may still be in force; what is paused or cut off is in cgroups named gpuguard-*"
        return [self._outcome("", "journal", "failed", f"{line}: {text}") for line in self._journal.unreadable]

    def recover(self) -> list[ActionOutcome]:
        """Undo what an earlier life left in force. What a person paused stays so until its time is over."""
        for damage in self._journal.damage:
            self._note("journal.damaged", {"text": damage})
        left = [one.id for one in reversed(self._journal.state.in_force.values())
                if one.boot_id != self._boot or not one.by_hand]
        outcomes = [self._undo_one(one, "left over from an earlier run", "undone") for one in left]
        self._note("opened", {"enforcing": self.enforcing, "in_force": [one.decision_id for one in self.in_force()]})
        self._journal.compact(self._clock.wall_ns())
        return outcomes

    def next_ns(self) -> int | None:
        """Return in how many nanoseconds `tick` has something to do, None if never."""
        now = self._clock.boot_ns()
        due = [one.deadline_ns - now for one in self._journal.state.in_force.values()]
        kills = [effect.due_s for effect in self._effects.values() if effect.due_s is not None]
        due += [int((at_s - time.monotonic()) * _NS) for at_s in kills]
        if self._effects:
            due.append(self._verify_at_ns - now)
        return max(0, min(due)) if due else None

    def tick(self) -> None:
        """Let expire what is over, end kills, and look whether the rest holds."""
        now = self._clock.boot_ns()
        look = now >= self._verify_at_ns
        for one in list(self._journal.state.in_force.values()):
            effect = self._effects.get(one.id)
            if effect is not None and effect.due_s is not None:
                self._go_on_killing(one, effect, look=look)
            elif now >= one.deadline_ns:
                self._news.append(self._undo_one(one.id, "its time is over", "expired"))
        if look:
            self._verify_all()
            spent_ns = self._clock.boot_ns() - now
            self._verify_at_ns = now + max(int(VERIFY_PERIOD_S * _NS), VERIFY_SHARE * spent_ns)

    def close(self, reason: str, *, undo: bool = True) -> list[ActionOutcome]:
        """Undo everything but what a person paused, give the journal back, and return what stays in force."""
        for one in reversed(list(self._journal.state.in_force.values())):
            if undo and not one.by_hand:
                self._undo_one(one.id, reason, "undone")
        left = self.in_force()
        if undo:
            self._note("closed", {"reason": reason, "in_force": [one.decision_id for one in left]})
        self._journal.close()
        self._audit.close()
        return left

    # -- steps --

    def _permit(self, request: Act, by: By) -> None:
        if not _ID.match(request.decision_id):
            raise Refusal("not a decision id")
        if request.decision_id in self._journal.state.in_force:
            raise Refusal("this decision is in force already")
        if not math.isfinite(request.ttl_s) or not 0 < request.ttl_s <= self.limits.ttl_s_max:
            raise Refusal(f"a time to live of {request.ttl_s} s: it must lie in 0..{self.limits.ttl_s_max:g}")
        if request.action == "kill" and not request.approved_by.strip():
            raise Refusal("a kill needs the approval of a person, given to the broker: gpuguard approve")
        since = self._clock.wall_ns() - HOUR_NS
        if by == "guard" and self._journal.acts_since(since) >= self.limits.acts_per_hour:
            raise Refusal(f"{self.limits.acts_per_hour} acts in the last hour: the limit")
        if request.action == "kill" and self._journal.acts_since(since, "kill") >= self.limits.kills_per_hour:
            raise Refusal(f"{self.limits.kills_per_hour} kills in the last hour: the limit")

    @contextlib.contextmanager
    def _checked(self, request: Act) -> Iterator[Member]:
        """Hold exactly the target while it is acted on, after a look at its cgroup and its tree; raises `Refusal`."""
        with proctree.held(request.target):
            root = proctree.member(request.target.pid)
            if root is None:
                raise Refusal(f"process {request.target.pid} has ended")
            _check_cgroup(request)
            reason = refusal(proctree.tree([root.pid]), self.limits, self.ours | {self.asking})
            if reason:
                raise Refusal(reason)
            yield root

    def _perform(self, request: Act, by: By) -> tuple[str, int]:
        now, ttl_ns = self._clock.wall_ns(), int(request.ttl_s * _NS)
        intent = Intent(time_ns=now, id=request.decision_id, boot_id=self._boot, action=request.action,
                        process=request.target, by_hand=by == "operator", approved_by=request.approved_by[:128],
                        reason=request.reason[:512], expires_ns=now + ttl_ns,
                        deadline_ns=self._clock.boot_ns() + ttl_ns, plan=Plan())
        with self._checked(request) as root:
            self._write_intent(intent, by)
            job = Job(root=root, boot_id=self._boot, grace_s=self.limits.grace_s, keep=self._boxes_but(intent.id),
                      launches_per_s=self.limits.launches_per_s,
                      record=lambda plan: self._journal.append(Grown(self._clock.wall_ns(), intent.id, plan)))
            try:
                effect = ACTIONS[request.action].apply(job)
                self._effects[intent.id] = effect
                problem = "" if request.action == "kill" else ACTIONS[request.action].verify(effect)
                self._journal.append(Completed(self._clock.wall_ns(), intent.id, effect.text))
            except (OSError, JournalFailed):
                self._undo_one(intent.id, "it could not be completed", "failed")
                raise
        return effect.text + (f"; {problem}" if problem else ""), intent.expires_ns

    def _write_intent(self, intent: Intent, by: By) -> None:
        try:
            self._enter("act.intent", {"decision_id": intent.id, "action": intent.action, "by": by,
                                       "process": msgspec.to_builtins(intent.process), "expires_ns": intent.expires_ns})
            self._journal.append(intent)
        except (AuditFailed, JournalFailed) as error:
            raise Refusal(f"no act without a record of it: {error}") from error

    def _undo_one(self, decision_id: str, reason: str, over: Over) -> ActionOutcome:
        intent = self._journal.state.in_force.get(decision_id)
        if intent is None:
            return self._outcome(decision_id, "undo", "refused", "nothing of this name is in force")
        if intent.boot_id != self._boot:
            # Pids and start times of another boot mean other processes now.
            return self._end(intent, "undone", "the host was started again: nothing of it is left")
        try:
            effect = self._effects.get(decision_id)
            text = ACTIONS[intent.action].undo(intent.plan, effect, self._boxes_but(decision_id))
        except OSError as error:
            # It stays in the journal: the next try, or the next start, goes on from here.
            return self._say(intent.id, intent.action, "failed", f"could not be undone: {error}",
                             process=intent.process)
        self._effects.pop(decision_id, None)
        self._problems.pop(decision_id, None)
        return self._end(intent, over, f"{reason}: {text}")

    def _end(self, intent: Intent, over: Over, text: str) -> ActionOutcome:
        try:
            self._journal.append(Ended(self._clock.wall_ns(), intent.id, over, text))
        except JournalFailed as error:
            # The undo itself is done. To do it again after a restart is harmless, to leave it undone is not.
            self._journal.state.take(Ended(self._clock.wall_ns(), intent.id, over, text))
            text = f"{text}; not written down: {error}"
        return self._say(intent.id, intent.action, over, text, process=intent.process)

    def _go_on_killing(self, intent: Intent, effect: Effect, *, look: bool) -> None:
        due = time.monotonic() >= (effect.due_s or 0.0)
        problem = kill.verify(effect) if due or look else "not looked at"
        if problem and due and not effect.struck:
            kill.strike(effect)
        elif problem and due:
            self._effects.pop(intent.id)
            self._news.append(self._end(intent, "failed", problem))
        elif not problem:
            self._effects.pop(intent.id)
            text = f"all {len(effect.members)} processes have ended"
            try:
                kill.undo(effect.plan, effect, self._boxes_but(intent.id))
            except OSError as error:
                text = f"{text}; its empty cgroup stays behind: {error}"
            self._news.append(self._end(intent, "done", text))

    def _verify_all(self) -> None:
        for decision_id, effect in list(self._effects.items()):
            intent = self._journal.state.in_force.get(decision_id)
            if intent is None or intent.action == "kill":
                continue
            try:
                problem = ACTIONS[intent.action].verify(effect)
            except OSError as error:
                problem = str(error) if _anybody(effect) else ""
            if problem and problem != self._problems.get(decision_id):
                self._news.append(self._say(intent.id, intent.action, "failed", f"did not hold: {problem}",
                                            process=intent.process, expires_ns=intent.expires_ns))
            self._problems[decision_id] = problem

    def _boxes_but(self, decision_id: str) -> frozenset[str]:
        return frozenset(box.path for one in self._journal.state.in_force.values() if one.id != decision_id
                         for box in one.plan.boxes)

    # -- what is said --

    def _say(self, decision_id: str, action: str, outcome: Outcome, text: str, *, process: ProcessId | None,
             expires_ns: int | None = None, **more: object) -> ActionOutcome:
        """Write an outcome into the audit log and return it. That it could not be written is part of the outcome."""
        said = self._outcome(decision_id, action, outcome, text, process=process, expires_ns=expires_ns)
        try:
            self._enter(f"act.{outcome}", {**msgspec.to_builtins(said), **more})
        except AuditFailed as error:
            _log.error("audit log failed", error=str(error), outcome=text)
            return msgspec.structs.replace(said, text=f"{text}; not in the audit log: {error}")
        return said

    def _outcome(self, decision_id: str, action: str, outcome: Outcome, text: str, *, process: ProcessId | None = None,
                 expires_ns: int | None = None) -> ActionOutcome:
        return ActionOutcome(time_ns=self._clock.wall_ns(), decision_id=decision_id, action=action, outcome=outcome,
                             text=text, process=process, expires_ns=expires_ns)

    def _note(self, kind: str, body: dict[str, object]) -> None:
        """Write into the audit log what must not stop us if it cannot be written: undoing comes first."""
        try:
            self._enter(kind, body)
        except AuditFailed as error:
            _log.error("audit log failed", error=str(error), kind=kind, body=body)

    def _enter(self, kind: str, body: dict[str, object]) -> None:
        self._audit.append(self._clock.wall_ns(), "broker", kind, body)


def _check_cgroup(request: Act) -> None:
    """Refuse a target that is not in the cgroup that was meant; boxes of ours around it do not count."""
    pid = request.target.pid
    unified, systemd = proctree.cgroups_of(pid)
    now = proctree.without_boxes(unified)
    if not request.cgroup:
        raise Refusal("the cgroup of the target is not known")
    # On a hybrid host v2 says "/" of most processes; whoever named the target may then have read systemd's hierarchy.
    if proctree.without_boxes(request.cgroup) not in {now, systemd if unified in {"", "/"} else now}:
        raise Refusal(f"process {pid} is in cgroup {now or systemd!r} by now, not in {request.cgroup!r}")
    ids = {boxes.cgroup_id(path) for path in (unified, now)} | {boxes.systemd_cgroup_id(systemd)}
    if request.cgroup_id and ids != {0} and request.cgroup_id not in ids:
        raise Refusal(f"cgroup {request.cgroup} was made anew: its id is not {request.cgroup_id} any more")


def _anybody(effect: Effect) -> bool:
    """Return whether anybody of the tree still lives; of a tree that ended, nothing has to hold."""
    return any((now := proctree.member(one.pid)) and now.start_ticks == one.start_ticks and not now.is_gone
               for one in effect.members)
