"""One SSH connection made up of message lengths, for tests of the record grammar; and what such connections are for."""

from __future__ import annotations

from gpuguard.core.records import SshKexInit
from gpuguard.core.ssh.session import SshSession
from gpuguard.core.ssh.suites import record_bytes, suite_of

SUITES = {
    "chacha20": ("chacha20-poly1305@openssh.com", "", "none"),
    "gcm": ("aes256-gcm@openssh.com", "", "none"),
    "etm": ("aes128-ctr", "hmac-sha2-256-etm@openssh.com", "none"),
    "umac": ("aes128-ctr", "umac-64-etm@openssh.com", "none"),
    "sha512": ("aes256-ctr", "hmac-sha2-512", "none"),
    "sha1": ("aes128-ctr", "hmac-sha1", "none"),
    "sha256": ("aes128-ctr", "hmac-sha2-256", "none"),
    "umac64": ("aes128-ctr", "umac-64@openssh.com", "none"),
    "umac128": ("aes128-ctr", "umac-128@openssh.com", "none"),
    "cbc": ("3des-cbc", "hmac-md5-96", "none"),
}


HOST_KEYS = ("rsa-sha2-512", "rsa-sha2-256", "ecdsa-sha2-nistp256", "ssh-ed25519")
HOST_KEYS_BYTES = 29 + (4 + 407) + (4 + 104) + (4 + 51)  # hostkeys-00 with RSA 3072, ECDSA and Ed25519


def kexinit(suite, *marks, keys=HOST_KEYS):
    cipher, mac, compression = SUITES[suite]
    macs = (mac or "hmac-sha2-256",)
    return SshKexInit(0, ("curve25519-sha256", *marks), keys, (cipher,), (cipher,), macs, macs,
                      (compression,), (compression,))


class Talk:
    """One session: the client is the initiator unless swapped; time goes on by 10 ms a record."""

    def __init__(self, suite="chacha20", *, swapped=False, marks=True, banner="SSH-2.0-OpenSSH_9.2p1", server="",
                 keys=HOST_KEYS):
        self.suite = suite_of(*SUITES[suite], banner)
        self.server_suite = suite_of(*SUITES[suite], server)
        self.session = SshSession(initiator_known=True)
        self.client = 1 if swapped else 0
        self.now, self.totals, self.uses = 0, [0, 0], []
        self.holes = (0, 0)
        self.session.banner(self.client, banner)
        self.session.banner(1 - self.client, server)
        self.session.kexinit(self.client, kexinit(suite, *(("ext-info-c",) if marks else ())))
        self.session.kexinit(1 - self.client, kexinit(suite, keys=keys))
        self.uses += self.session.newkeys(1 - self.client)
        self.uses += self.session.newkeys(self.client)

    def raw(self, size, *, client, after_ns=10_000_000):
        side = self.client if client else 1 - self.client
        self.now += after_ns
        self.totals[side] += size
        new = self.session.segment(self.now, side, size, self.totals[side], holes=self.holes)
        self.uses += new
        return [use.use for use in new]

    def ours(self, *payloads, **how):
        return self.raw(sum(record_bytes(self.suite, one) for one in payloads), client=True, **how)

    def theirs(self, *payloads, **how):
        return self.raw(sum(record_bytes(self.server_suite, one) for one in payloads), client=False, **how)

    def ours_bytes(self, payload):
        return record_bytes(self.suite, payload)

    def login(self):
        self.ours(17)
        self.theirs(17)
        self.ours(35)
        self.theirs(48)
        self.ours(270)
        assert self.theirs(1) == ["authenticated"]
        return self

    def nats(self, use):
        return sum(one.nats for one in self.uses if one.use == use)

    def named(self):
        return {one.use for one in self.uses}


# Who sends what: c and s with the sizes of the messages in one segment, w is a pause. Then the name it is given.
BENIGN = {
    "shell": ("c24+34 s344 s17 c350 s5+9 s300 c10 s10", "ssh-interactive"),
    "shell, confirmed late": ("c24+34 s990 s17+120 c350 s5 s5", "ssh-interactive"),
    "shell from a pipe": ("c24+34 s344 s17 c47+15 s9+5 s60 c10 s10 c10 s10 c10 s10 c10 s10 c10 s10", "ssh-interactive"),
    "exec": ("c24+34 s344 s17 c27 s9+5 c9 s120", "ssh-exec"),
    "plain session": ("c24 s17 c40 s5", "ssh-exec"),
    "sftp": ("c24+34 s344 s17 c27 s9+5 c18 s330 c60 s90", "ssh-transfer"),
    "-N -L": ("c34 s344 w c63 s17 c90 s200", "ssh-local-forward"),
    "-D": ("c34 s344 w c63 s17 w c83 s17", "ssh-dynamic-forward"),
    "-W": ("c63+34 s344 s17 s50 c50 c1100", "ssh-jump"),
    "-N and keepalives": ("c34 s344 w c27 s1 w c27 s1", "ssh-local-forward"),
    "-N and a keepalive at once": ("c34 c27 s1 w c27 s1", None),
    "keepalives in a shell": ("c24+34 s17 c350 s5 w c27 s1", "ssh-interactive"),
    "agent": ("c24+34 s17 c400 s5 w s39 c17 s14", "ssh-interactive"),
}


def play(talk, story):
    for step in story.split():
        if step == "w":
            talk.now += 2 * 10**9
        else:
            sizes = [int(one) for one in step[1:].split("+")]
            (talk.ours if step[0] == "c" else talk.theirs)(*sizes)
