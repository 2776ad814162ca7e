"""The one table of labels: what a subject may be called, and what a reader should think of it by default.

A label names the use; what wraps it (ssh, tls, wss, dns, icmp, tcp) is the ``carrier`` of a finding. ATT&CK ids are
of enterprise 2025-11, ATLAS ids of 5.6.1, OCSF classes of 1.8.0.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Verdict = Literal["unknown", "clear", "suspect", "confirmed"]

VERDICTS: tuple[Verdict, ...] = ("unknown", "clear", "suspect", "confirmed")


class Label(Struct, frozen=True):
    """One row: ``accuses`` is False where the label alone is nothing that an operator must see."""

    name: str
    accuses: bool
    attack: tuple[str, ...]
    ocsf_class: int
    description: str


_TUNNEL = 4014
_SSH = 4007
_NETWORK = 4001
_FINDING = 2004

_ROWS = (
    Label("ssh", False, (), _SSH, "SSH whose use could not be told"),
    Label("ssh-interactive", False, ("T1021.004",), _SSH, "a person or program types in a remote shell"),
    Label("ssh-exec", False, ("T1021.004",), _SSH, "one remote command"),
    Label("ssh-transfer", False, ("T1021.004",), _SSH, "scp, sftp or rsync"),
    Label("ssh-local-forward", False, ("T1572",), _TUNNEL, "a local port forwarded to the far side (-L)"),
    Label("ssh-dynamic-forward", False, ("T1572", "T1090"), _TUNNEL, "a local SOCKS proxy through the far side (-D)"),
    Label("ssh-jump", False, ("T1021.004",), _SSH, "a session through a jump host (-J, -W)"),
    Label("ssh-reverse-tunnel", True, ("T1572", "T1090"), _TUNNEL, "the far side was given a port into this host (-R)"),
    Label("ssh-reverse-shell", True, ("T1572", "T1021.004", "AML.T0072"), _TUNNEL,
          "the far side types in a shell of this host through a connection that this host opened"),
    Label("ssh-role-swap", True, ("T1572", "T1571"), _SSH, "this host dialled out and then acted as the SSH server"),
    Label("ssh-tun", True, ("T1572",), _TUNNEL, "a network device tunnelled over SSH (-w)"),
    Label("ssh-bruteforce", True, ("T1110.001",), _SSH, "many failed SSH logins"),
    Label("reverse-shell", True, ("T1059.004", "T1095", "AML.T0072"), _NETWORK,
          "the far side of a connection that this host opened gives commands and this host answers"),
    Label("dns-tunnel", True, ("T1071.004", "T1048"), _TUNNEL, "data carried in DNS names and answers"),
    Label("icmp-tunnel", True, ("T1095", "T1572"), _TUNNEL, "data carried in ICMP echo"),
    Label("mining-pool", True, ("T1496.001",), _NETWORK, "a connection that takes mining jobs and hands in shares"),
    Label("mining", True, ("T1496.001", "AML.T0034.002"), _FINDING, "a process computes proof of work on a GPU"),
    Label("cracking", True, ("T1110.002",), _FINDING, "a process searches passwords or keys on a GPU"),
    Label("launches-withheld", True, ("T1562.006",), _FINDING,
          "a process was given the capture library, computes on a GPU and shows no launch"),
    Label("socks-proxy", False, ("T1090",), _NETWORK, "a SOCKS proxy is spoken to"),
    Label("http-proxy", False, ("T1090",), _NETWORK, "an HTTP proxy is spoken to"),
    Label("reverse-proxy", True, ("T1090.002", "T1572"), _TUNNEL,
          "the far side of a connection that this host opened has it connect elsewhere"),
    Label("tor", False, ("T1090.003",), _NETWORK, "a Tor relay is spoken to"),
    Label("vpn", False, ("T1572",), _TUNNEL, "a VPN"),
    Label("scan", True, ("T1046",), _NETWORK, "many addresses or ports tried, most of them in vain"),
    Label("beacon", False, ("T1071", "T1029"), _NETWORK, "regular calls to one destination, be it home or telemetry"),
    Label("egress-denied", True, (), _NETWORK, "egress policy forbids what was tried"),
    Label("egress-observed", True, (), _NETWORK, "egress policy would forbid what was tried; told, never acted on"),
    Label("training", False, (), _FINDING, "a process trains a model on a GPU"),
    Label("inference", False, (), _FINDING, "a process serves or runs a model on a GPU"),
    Label("compute", False, (), _FINDING, "a process computes on a GPU, of a kind that does not look like mining"),
    Label("other", False, (), _NETWORK, "nothing above"),
)

LABELS: dict[str, Label] = {row.name: row for row in _ROWS}
