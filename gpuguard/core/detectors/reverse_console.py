"""A shell in clear on a connection that this host opened: its prompt, and what programs print there.

Lines and the times between them leave much in doubt (`reverse_shell`), and a few commands are too few for it. In clear
the words are there to be read. An interactive shell prompts before each line (POSIX, sh, PS1), so that what this host
says ends alike each time before the far side's next line: prompts are a server's, and this one has dialled. And whoever
comes into a shell looks where he is (ATT&CK T1033, T1057, T1082, T1083, T1016): id, ls -l, ps, uname, mounts, links,
/etc/passwd, or the shell's own complaint about a program that is not there. Their first lines have forms that POSIX or
the kernel lay down; here they are the first thing that answers a short word of the far side.

Benign look-alikes, and what keeps them out:

- consoles, mail servers, games and telnet that this host calls: there the far side prompts;
- mails and uploads whose text holds listings, or prompts: what answers the far side's word is a head or a request;
- files that are sent, logs: nobody asks for them on that connection, and a prompt's last word is no line of its own;
- text in pieces (words of a model): the piece that stands last before the far side's next word is seldom a prompt's;
- a game, a debugger, a database's monitor: they prompt in "> " or "(Pdb) ". psql's "=# " is taken for a shell's.

A console that is served outward on purpose, of a device or of a virtual machine (QEMU's serial line, where it dials a
test's harness), looks the same, for it is the same: hence neither confirms alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.evidence import Evidence
from gpuguard.core.observations import Spoke

if TYPE_CHECKING:
    from gpuguard.core.host import Host
    from gpuguard.core.observations import Observation
    from gpuguard.core.records import Block

# P(seen | no shell): none of 364 connections of ordinary programs on which this side answered three times in text
# (mail, files, chats, brokers, databases, consoles): ln 120 at the rule-of-three bound. Two nats more for the form,
# which is no matter of chance: what prompts or prints so is a shell, or was built like one. Each comes without the
# other, and counts.
NATS = 6.8

_TOLD = {
    "shell-prompts": "this host, which dialled, prompts as a shell does before the far side's lines, three times alike",
    "shell-output": "this host, which dialled, answers the far side's words with what two programs of a shell print "
                    "(as of id, ls, ps, uname, or a command that was not found)",
}
_SPOTS = ("shells in clear behind the first 16 kB of either side", "prompts of other forms",
          "a connection whose opening was not seen")


class Detector:
    """Turns a shell's words in clear into evidence."""

    takes = (Spoke,)

    def receive(self, item: Block | Observation, host: Host) -> list[Evidence]:
        """Return what a shell's word weighs that went out on a connection of this host's."""
        if not isinstance(item, Spoke) or item.what not in _TOLD:
            return []
        flow = item.flow
        if not host.network.dialled_out(flow):
            return []
        return [Evidence(
            time_ns=item.time_ns,
            subject=flow,
            label="reverse-shell",
            evidence_class="network",
            kind=item.what,
            nats=NATS,
            text=_TOLD[item.what],
            start_ns=flow.start_ns,
            carrier="tcp",
            blind_spots=_SPOTS,
        )]
