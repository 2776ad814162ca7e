"""How soon a program answers, and how far apart people type: what a shell is known by, on whatever carrier.

`detectors.reverse_shell` goes by who breaks a silence, `ssh.visitor` by the order of records inside one connection.
"""

from __future__ import annotations

#: A local program echoes or answers in a millisecond or two; a loaded host, or a command that runs, in some tens.
AT_ONCE_NS = 40_000_000
#: No program is woken, reads, runs something and writes sooner: shells here took 125 microseconds and more. What comes
#: faster was written before, and TCP held it back until the far side's segment acknowledged what went out (RFC 896).
NO_PROGRAM_NS = 40_000
#: Lines lie as far apart as it takes a person to type one.
LINE_GAP_NS = 500_000_000
