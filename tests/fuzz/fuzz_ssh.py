"""The SSH grammar under hostile orders and sizes, for as many seconds as the first argument says.

Whatever a peer sends, four things hold: nothing is raised; what is remembered stays bounded; all signs of one request
together weigh no more than `REQUEST_NATS_MAX`; and the same input gives the same uses. Half of the sizes are those of
real messages in the suite at hand, so that the state machine is driven deep, and not only refused at its door.
"""

from __future__ import annotations

import os
import random
import sys
import time

from gpuguard.core.records import SshKexInit
from gpuguard.core.ssh.request import REQUEST_NATS_MAX
from gpuguard.core.ssh.session import SshSession
from gpuguard.core.ssh.suites import record_bytes, suite_of
from gpuguard.core.ssh.uses import Use

CIPHERS = ("chacha20-poly1305@openssh.com", "aes128-gcm@openssh.com", "aes128-ctr", "aes256-cbc", "3des-cbc", "none",
           "")
MACS = ("hmac-sha2-256", "hmac-sha2-512-etm@openssh.com", "umac-64@openssh.com", "hmac-md5-96", "x" * 300)
COMPRESSION = ("none", "zlib@openssh.com", "zlib", "lz4")
MARKS = ("ext-info-c", "ext-info-s", "kex-strict-c-v00@openssh.com", "kex-strict-s-v00@openssh.com",
         "curve25519-sha256")
BANNERS = ("SSH-2.0-OpenSSH_9.2p1", "SSH-2.0-dropbear_2022.83", "SSH-2.0-Go", "SSH-2.0-paramiko_5.1.0",
           "SSH-2.0-AsyncSSH_2.24.1", "SSH-2.0-" + "a" * 9_000, "")
PAYLOADS = (1, 5, 9, 10, 17, 18, 24, 27, 34, 35, 36, 40, 63, 66, 90, 350)
GAPS_NS = (0, 1, 100_000, 4_999_999, 20_000_001, 900_000_001, 10**9, 31 * 10**9, -(10**9))
ROUNDS = 200


def names(dice: random.Random, pool: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dice.choice(pool) for _ in range(dice.randrange(4)))


def kexinit(dice: random.Random) -> SshKexInit:
    return SshKexInit(0, names(dice, MARKS), (), names(dice, CIPHERS), names(dice, CIPHERS), names(dice, MACS),
                      names(dice, MACS), names(dice, COMPRESSION), names(dice, COMPRESSION))


def sizes(dice: random.Random) -> list[int]:
    suite = suite_of(dice.choice(CIPHERS[:5]), dice.choice(MACS[:4]), "none")
    assert suite is not None
    return [record_bytes(suite, one) for one in PAYLOADS]


def play(seed: int) -> list[Use]:
    """Return what one hostile session is taken for."""
    dice = random.Random(seed)
    session = SshSession(initiator_known=dice.random() < 0.9)
    usual, total, now_ns, uses = sizes(dice), [0, 0], 0, []
    for _ in range(dice.randrange(ROUNDS)):
        side = dice.randrange(2)
        kind = dice.random()
        if kind < 0.04:
            session.banner(side, dice.choice(BANNERS))
        elif kind < 0.09:
            session.kexinit(side, kexinit(dice))
        elif kind < 0.14:
            uses += session.newkeys(side)
        else:
            real = sum(dice.choices(usual, k=dice.randrange(1, 4)))
            size = dice.randrange(1, 70_000) if dice.random() < 0.2 else real
            now_ns += dice.choice(GAPS_NS)
            total[side] += size
            holes = (dice.randrange(3), dice.randrange(3)) if dice.random() < 0.1 else (0, 0)
            uses += session.segment(now_ns, side, size, total[side], holes=holes)
    return uses


def main() -> None:
    end = time.monotonic() + float(sys.argv[1])
    seed = int(os.environ.get("GPUGUARD_FUZZ_SEED", "1"))
    done = told = 0
    while time.monotonic() < end:
        seed += 1
        uses = play(seed)
        again = play(seed) if seed % 16 == 0 else uses
        assert uses == again, f"seed {seed}: not the same twice"
        weight = sum(one.nats for one in uses if one.use == "ssh-reverse-forward-request")
        assert weight <= REQUEST_NATS_MAX + 1e-9, f"seed {seed}: {weight} nats of one request"
        assert len(uses) <= 4 * ROUNDS, f"seed {seed}: {len(uses)} uses"
        done += 1
        told += len(uses)
    print(f"fuzz_ssh: {done} sessions, {told} uses, nothing found")


if __name__ == "__main__":
    main()
