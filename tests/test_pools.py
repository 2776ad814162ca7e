"""What is said in JSON, judged by its form: look-alikes of pools first, then the dialects, then whole conversations."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuguard.core import pools

sys.path.insert(0, str(Path(__file__).parent))
from test_named_protocols import conversation, judged
from test_packets_protocols import SWITCHED, WEBSOCKET, deflated, ws

DICE = random.Random(5)


def digits(count: int) -> str:
    return DICE.randbytes(count).hex()


def line(message: object) -> bytes:
    return json.dumps(message).encode()


# -- others -----------------------------------------------------------------------------------------------------------

BLOCK = {"number": "0x1b4", "hash": "0x" + digits(32), "parentHash": "0x" + digits(32), "difficulty": "0x4ea3f27bc",
         "nonce": "0x" + digits(8), "stateRoot": "0x" + digits(32)}

#: What the far side of others' connections pushes.
PUSHED = {
    "a node tells of blocks": {"method": "eth_subscription", "params": {"subscription": "0x9c", "result": BLOCK}},
    "an explorer tells of blocks": {"block": {"id": digits(32), "height": 840_000, "difficulty": 8e13, "nonce": 391}},
    "Electrum tells of headers": {"method": "blockchain.headers.subscribe",
                                  "params": [{"height": 800_000, "hex": digits(80)}]},
    "a task queue": {"method": "job", "params": {"job_id": digits(6), "dataset": "s3://b/" + digits(8), "epochs": 3}},
    "a CI runner": {"id": 7, "job_info": {"name": "build"}, "git_info": {"sha": digits(20), "before_sha": digits(20)},
                    "token": digits(16)},
    "a deployment": {"type": "deploy", "target": digits(20), "digest": "sha256:" + digits(32)},
    "a render farm": {"type": "job", "job_id": digits(16), "target": "frames/0001.exr", "height": 1080},
    "a trading feed": {"e": "trade", "s": "BTCUSDT", "target": 64_000.5, "order_id": digits(16)},
    "a hub of a home": {"id": 5, "type": "event", "event": {"target": {"entity_id": "light.hall"},
                                                            "context": {"id": digits(16)}}},
    "an agent's tool": {"jsonrpc": "2.0", "id": 3, "method": "tools/call",
                        "params": {"name": "read", "arguments": {"target": "src/main.py", "sha": digits(20)}}},
    "a language server": {"jsonrpc": "2.0", "method": "textDocument/publishDiagnostics",
                          "params": {"uri": "untitled:a.py", "diagnostics": []}},
    "a challenge to log in": {"type": "challenge", "nonce": digits(16), "difficulty": 4},
    "a diff": {"type": "diff", "diff": "+ a line", "sha": digits(20)},
    "a dataset's rows": {"difficulty": "hard", "id": digits(16), "question": "?"},
    "work that was done": {"result": {"target": digits(32), "status": "done"}},
}

#: What this host says.
SAID = {
    "a wallet": {"method": "eth_sendTransaction",
                 "params": [{"nonce": "0x1", "to": "0x" + digits(20), "gas": "0x5208", "data": "0x" + digits(68)}]},
    "a signed request": {"type": "order", "nonce": 1_763_737_800_000, "signature": digits(32), "key": digits(16)},
    "an encrypted message": {"nonce": digits(12), "ciphertext": digits(90)},
    "a login by challenge": {"method": "auth", "nonce": digits(16), "hash": digits(32)},
    "a result of training": {"method": "submit", "params": {"job_id": digits(6), "loss": 0.3, "sha256": digits(32)}},
    "a nonce alone": {"method": "Page.setCSP", "nonce": "r4nd0m"},
    "a login": {"method": "login", "params": {"user": "trainer", "token": digits(16)}},
    "a method of a mine": {"method": "mining.", "params": [digits(32)]},
    "a file": {"path": "a", "content": "nonce", "sha": digits(20)},
}


@pytest.mark.parametrize("name", [*PUSHED, *SAID])
def test_others_say_nothing_of_mining(name: str) -> None:
    assert pools.said(line({**PUSHED, **SAID}[name])) == ""


@pytest.mark.parametrize("data", [
    b"", b"{", b"[]", b"null", b"3", b'"nonce"', b"[" * 2000, b'{"a":' * 400 + b"1" + b"}" * 400,
    b'{"nonce":true,"x":"' + b"0" * 64 + b'"}', b'{"method":["mining.x"]}', b"\xff\xfe{}",
])
def test_what_is_no_object_says_nothing(data: bytes) -> None:
    assert pools.said(data) == ""


KEYS = st.sampled_from(["nonce", "target", "difficulty", "job_id", "blob", "result", "params", "height", "method"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["0f" * 32, "job"])


@given(st.recursive(LEAVES, lambda one: st.lists(one) | st.dictionaries(KEYS, one)))
def test_whatever_it_is_it_is_judged(message: object) -> None:
    said = pools.said(line(message))
    assert said in {"", "login", "job", "submit", pools.JOB, pools.SHARE} or said.startswith("mining.")


# -- pools ------------------------------------------------------------------------------------------------------------

XMR_JOB = {"blob": digits(76), "job_id": digits(14), "target": "b88d0600", "height": 3_100_000, "seed_hash": digits(32)}

DIALECTS = {
    "login": [{"id": 1, "method": "login", "params": {"login": "4A", "pass": "x", "agent": "m/1"}}],
    "job": [{"jsonrpc": "2.0", "method": "job", "params": XMR_JOB}, {"type": "job", "params": XMR_JOB},
            {"id": 1, "result": {"id": "a", "job": XMR_JOB, "status": "OK"}}, {"identifier": "job", **XMR_JOB}],
    "submit": [{"id": 2, "method": "submit", "params": {"job_id": "7", "nonce": digits(4), "result": digits(32)}},
               {"identifier": "solved", "job_id": "7", "nonce": digits(4), "result": digits(32)}],
    pools.JOB: [
        {"jsonrpc": "2.0", "id": "4f", "method": "job", "input": digits(32), "difficulty": 134_217_728, "height": 25,
         "nonceprefix": digits(3)},
        {"id": None, "type": "seed", "seed": digits(32), "difficulty": 512},
        {"method": "job", "params": {"difficulty": 32, "height": 3_000_000, "job_id": 5, "pre_pow": digits(246)}},
        {"type": "jobs", "body": [{"header": digits(80), "target": "0x" + digits(32), "jobId": 7}]},
    ],
    pools.SHARE: [
        {"jsonrpc": "2.0", "id": "11", "method": "solution", "nonce": digits(8), "output": digits(104)},
        {"id": 11, "method": "solution", "seed": digits(32), "nonce": digits(32)},
        {"method": "submit", "params": {"edge_bits": 32, "job_id": 3, "nonce": 2**62, "pow": [1, 2, 3]}},
    ],
    "mining.subscribe": [{"id": 1, "method": "mining.subscribe", "params": []}],
    "mining." + "?" * 25: [{"id": 1, "method": "mining." + "\u00e9" * 90}],
}


@pytest.mark.parametrize("kind", DIALECTS)
def test_pools_and_miners_say_what_they_must(kind: str) -> None:
    assert [pools.said(line(one)) for one in DIALECTS[kind]] == [kind] * len(DIALECTS[kind])


# -- conversations ----------------------------------------------------------------------------------------------------


def beam(shares: int, jobs: int = 2) -> list[tuple[int, bytes]]:
    """A pool of no known dialect: who says what, a job first."""
    accepted = {"jsonrpc": "2.0", "id": "1", "method": "result", "code": 1, "description": "accepted"}
    job, share = DIALECTS[pools.JOB][0], DIALECTS[pools.SHARE][0]
    said = [(0, line({"id": "login", "method": "login", "api_key": digits(34)})), (1, line(accepted))]
    said += [(1, line(job))] * jobs
    return said + [(0, line(share)), (1, line(accepted))] * shares


def lines(said: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    return [(side, data + b"\n") for side, data in said]


def in_websocket(said: list[tuple[int, bytes]], *, pressed: bool) -> list[tuple[int, bytes]]:
    sides = []
    for side in (0, 1):
        key, messages = b"" if side else b"k3y!", [data for one, data in said if one == side]
        sides.append(iter(deflated(*messages, key=key) if pressed else [ws(data, key=key) for data in messages]))
    return [(0, WEBSOCKET), (1, SWITCHED), *((side, next(sides[side])) for side, _ in said)]


@pytest.mark.parametrize("carried", [lines, lambda said: in_websocket(said, pressed=False),
                                     lambda said: in_websocket(said, pressed=True)])
def test_a_dialect_that_nobody_knows_is_a_pools_by_its_form(carried) -> None:
    assert judged(conversation([], opening=carried(beam(2)))) == {"mining-pool": "suspect"}
    assert judged(conversation([], opening=carried(beam(14)))) == {"mining-pool": "suspect"}
    assert judged(conversation([], opening=carried(beam(1)))) == {}
    assert judged(conversation([], opening=carried(beam(5, jobs=0)))) == {}
    backwards = [(1 - side, data) for side, data in beam(5)]
    assert judged(conversation([], opening=carried(backwards) if carried is lines else lines(backwards))) == {}


@pytest.mark.parametrize("pressed", [False, True])
def test_a_known_dialect_in_a_websocket_is_confirmed(pressed: bool) -> None:
    said = [(0, line(DIALECTS["login"][0])), (1, line(DIALECTS["job"][2])), (0, line(DIALECTS["submit"][0]))]
    assert judged(conversation([], opening=in_websocket(said, pressed=pressed))) == {"mining-pool": "confirmed"}


@pytest.mark.parametrize("pressed", [False, True])
def test_others_in_a_websocket_are_no_pools(pressed: bool) -> None:
    for pushed, own in zip(PUSHED.values(), itertools.cycle(SAID.values()), strict=False):
        said = [(1, line(pushed)), (0, line(own))] * 6
        assert judged(conversation([], opening=in_websocket(said, pressed=pressed))) == {}
        assert judged(conversation([], opening=lines(said))) == {}


def test_words_that_others_use_too_count_in_a_first_line_only() -> None:
    """A request may have a number against its repetition, and a method "submit"."""
    submit = line({"id": 1, "method": "submit", "params": {"script": "train.sh", "nonce": digits(8)}})
    hello = line({"id": 0, "method": "hello"})
    assert judged(conversation([], opening=lines([(0, hello), (1, b'{"ok":1}'), *[(0, submit)] * 9]))) == {}
    late = [(0, hello), (1, b'{"ok":1}'), (0, line(DIALECTS["mining.subscribe"][0]))]
    assert judged(conversation([], opening=lines(late))) == {"mining-pool": "confirmed"}
