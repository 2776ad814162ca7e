"""Global requests on a connection that is in use: a port asked for in mid-session (`ssh -O forward`), and keepalives.

The answer to a global request is shorter than any data can be in suites with 8-byte blocks, and elsewhere where no data
may flow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpuguard.core.ssh.asked import Asked
    from gpuguard.core.ssh.connection import Seen, Terms
    from gpuguard.core.ssh.line import Segment
    from gpuguard.core.ssh.uses import Use

# A forward on a running session (`ssh -O forward`): the size may be typed data, the answer of three bytes or less may
# not (channel data costs more in 8-byte suites), keepalives are of another size. The rest as for the first request of a
# session, without "first".
LATER_REQUEST_NATS = 10.0
# In AEAD and encrypt-then-MAC suites with 16-byte blocks that answer is as long as two typed bytes' echo. What a person
# pastes is echoed at its length, but for passwords: one session with a terminal in twenty has that.
LATER_ALIKE_NATS = 3.0
# With classic MACs no data is as short as that answer, but a keepalive costs what the request costs. Where the line was
# silent for longer than before it, by more than the second that OpenSSH's clock is coarse, no keepalive was due: but a
# client that was held up (one session in a hundred, of the tenth that has keepalives).
LATER_OFF_BEAT_NATS = 7.0

#: What follows so much, the least that TCP sends in one segment (RFC 1122, 4.2.2.6), may be the end of a longer record.
_FULL_BYTES = 536
_LATER_NS = 1_000_000_000
_COARSE_NS = 1_100_000_000


def later_request(seg: Segment, terms: Terms, seen: Seen) -> list[Use]:
    """Say what an answer to a global request tells, which the server sent now."""
    sizes, request = terms.sizes, seen.request
    when, size = seen.line.client
    # no-more-sessions is over by now, and another session is confirmed at greater length.
    unclear = request.answered or not sizes.exact or seen.line.heard >= _FULL_BYTES
    if unclear or size not in sizes.forward or seg.time_ns - when > _LATER_NS:
        return []
    # Without a channel, if none can have been opened unseen, even where a key's echo costs what an answer does.
    no_data = not seen.channel and seg.whole
    short = seen.channel and sizes.reply < sizes.reply_port
    beside = seen.pty and not seen.line.setting_up
    no_data_fits = no_data or (beside and sizes.key_echo > sizes.reply)
    keepalive = size == sizes.keepalive and terms.peers.awaits_keepalives
    if not (no_data or short or beside) or (keepalive and (short or not no_data_fits)):
        return []
    # The ends of both directions of a channel, which are answered by one, may cost as much too.
    alike = not no_data and not short and not (no_data_fits and size % sizes.ending and seg.whole)
    if not keepalive and seen.line.owes(seg.time_ns):
        return []
    if alike or (keepalive and not _off_beat(seg, terms, seen)):
        request.possible = True
        text = f"{size} bytes were answered by {sizes.reply}, as tcpip-forward is, or a pasted password"
        return [] if no_data_fits else request.say(LATER_ALIKE_NATS, text)
    request.answered = True
    text = f"on the running session a request of {size} bytes was answered by {sizes.reply} bytes: tcpip-forward"
    if keepalive:
        return request.say(LATER_OFF_BEAT_NATS, text + ", and no keepalive, for none came in longer silences")
    return request.say(LATER_REQUEST_NATS, text)


def padded_request(seg: Segment, asked: list[Asked], terms: Terms, seen: Seen) -> list[Use]:
    """However a request was padded, its answer was not; of these clients nothing else is answered so early."""
    if not asked or not terms.sizes.exact or seen.request.answered or terms.peers.awaits_keepalives or not seg.whole:
        return []
    seen.request.answered = True
    return seen.request.say(LATER_REQUEST_NATS, f"a padded request of {asked[-1].size} bytes was answered by "
                            f"{terms.sizes.reply} bytes with no channel open: tcpip-forward")


def _off_beat(seg: Segment, terms: Terms, seen: Seen) -> bool:
    """Return whether what the client sent last comes too early for a keepalive: longer silences brought none."""
    if not terms.peers.counts_silence:
        return False
    return seen.line.silence_ns > seen.line.waited_ns + _COARSE_NS and seg.whole
