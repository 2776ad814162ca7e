"""What an SSH record costs on the wire: the suites, how two sides agree on one, and the size of a record in it.

Both KEXINITs travel in clear, so the cipher, the MAC and the compression of each direction are known (RFC 4253 section
7.1), and with them the size of every message (section 6; OpenSSH, dropbear, libssh, Paramiko, AsyncSSH and Go all pad
to the minimum).
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gpuguard.core.records import SshKexInit

_CIPHERS = {
    "chacha20-poly1305@openssh.com": (8, True),
    "aes128-gcm@openssh.com": (16, True),
    "aes256-gcm@openssh.com": (16, True),
    "AEAD_AES_128_GCM": (16, True),
    "AEAD_AES_256_GCM": (16, True),
    "3des-cbc": (8, False),
    "3des-ctr": (8, False),
    "blowfish-cbc": (8, False),
    "blowfish-ctr": (8, False),
    "cast128-cbc": (8, False),
    "cast128-ctr": (8, False),
    "arcfour": (8, False),
    "arcfour128": (8, False),
    "arcfour256": (8, False),
}
_WIDE_CIPHERS = ("aes", "rijndael", "camellia", "twofish", "serpent")
_MAC_BYTES = {
    "hmac-sha1": 20,
    "hmac-sha1-96": 12,
    "hmac-md5": 16,
    "hmac-md5-96": 12,
    "hmac-ripemd160": 20,
    "hmac-sha2-256": 32,
    "hmac-sha2-256-96": 12,
    "hmac-sha2-512": 64,
    "umac-64": 8,
    "umac-128": 16,
}

ASYNCSSH = "SSH-2.0-AsyncSSH"
_FLUSHES = {"SSH-2.0-dropbear": zlib.Z_SYNC_FLUSH, ASYNCSSH: zlib.Z_SYNC_FLUSH, "SSH-2.0-paramiko": zlib.Z_FULL_FLUSH}


class Suite(NamedTuple):
    """What one direction was agreed to: ``outside`` says that the length field is not padded with the rest.

    ``least_bytes`` is what a record has at least without its MAC; ``flush`` is how its sender ends each message that
    it compresses, one of zlib's constants; ``ignores`` says that it sends an IGNORE before each.
    """

    block_bytes: int
    mac_bytes: int
    outside: bool
    compressed: bool = False
    least_bytes: int = 0
    flush: int = zlib.Z_PARTIAL_FLUSH
    ignores: bool = False
    #: RFC 4253 asks for four bytes of padding.
    padding_bytes: int = 4


def suite_of(cipher: str, mac: str, compression: str, banner: str = "") -> Suite | None:
    """Return the suite of these names, None if a name is not known: its sizes cannot be computed then.

    ``banner`` is the sender's, since senders differ where RFC 4253 leaves it to them. Go pads all ciphers but CBC to 16
    bytes (x/crypto/ssh, packetSizeMultiple); dropbear sends no record under 16 bytes (MIN_PACKET_LEN, section 6 of the
    RFC), which the others do; dropbear and AsyncSSH flush fully where OpenSSH and libssh flush in part, and Paramiko
    forgets what went before. AsyncSSH sends an IGNORE before each message. JSch pads by a block at least (Packet.java).
    """
    known = _CIPHERS.get(cipher)
    if known is None and cipher.startswith(_WIDE_CIPHERS) and cipher.endswith(("-ctr", "-cbc", "@lysator.liu.se")):
        known = (16, False)
    if known is None or compression not in ("none", "zlib", "zlib@openssh.com"):
        return None
    block, aead = known
    if banner.startswith("SSH-2.0-Go") and not cipher.endswith("-cbc"):
        block = max(block, 16)
    base = mac.removesuffix("@openssh.com")
    mac_bytes = 16 if aead else _MAC_BYTES.get(base.removesuffix("-etm"))
    if mac_bytes is None:
        return None
    return Suite(
        block_bytes=block,
        mac_bytes=mac_bytes,
        outside=aead or base.endswith("-etm"),
        compressed=compression != "none",
        least_bytes=16 if banner.startswith("SSH-2.0-dropbear") else 0,
        flush=next((how for name, how in _FLUSHES.items() if banner.startswith(name)), zlib.Z_PARTIAL_FLUSH),
        ignores=banner.startswith(ASYNCSSH),
        padding_bytes=block if banner.startswith("SSH-2.0-JSCH") else 4,
    )


def negotiate(client: SshKexInit, server: SshKexInit,
              banners: tuple[str, str] = ("", "")) -> tuple[Suite | None, Suite | None]:
    """Return the suites client to server and server to client: the client's first that the server has too."""

    def first(wanted: tuple[str, ...], offered: tuple[str, ...]) -> str:
        return next((name for name in wanted if name in offered), "")

    return (
        suite_of(
            first(client.encryption_client_to_server, server.encryption_client_to_server),
            first(client.mac_client_to_server, server.mac_client_to_server),
            first(client.compression_client_to_server, server.compression_client_to_server),
            banners[0],
        ),
        suite_of(
            first(client.encryption_server_to_client, server.encryption_server_to_client),
            first(client.mac_server_to_client, server.mac_server_to_client),
            first(client.compression_server_to_client, server.compression_server_to_client),
            banners[1],
        ),
    )


def record_bytes(suite: Suite, payload_bytes: int) -> int:
    """Return the size on the wire of a message of so many bytes, RFC 4253 section 6, with the least padding.

    The length field counts into the alignment for classic MACs, and not for AEAD and encrypt-then-MAC
    (OpenSSH's PROTOCOL.chacha20poly1305 and PROTOCOL section 1.5, RFC 5647 section 7.2).
    """
    body = 1 + payload_bytes
    aligned = body if suite.outside else body + 4
    padding = suite.block_bytes - aligned % suite.block_bytes
    if padding < suite.padding_bytes:
        padding += suite.block_bytes
    if 4 + body + padding < suite.least_bytes:
        padding += suite.block_bytes
    return 4 + body + padding + suite.mac_bytes
