"""What must never leave a command line, and what must stay readable in it."""

from __future__ import annotations

import base64
import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuguard import redaction
from gpuguard.redaction import MARK, redact_argv, redact_text

MONERO = "44AFFq5kSiGBoZ4NMDwYtN18obc8AemS33DBLWs3H7otXft3XjrpDtQGv7SqSsaBYBb98uNbr2VBBEt7f2wfn3RVGQBEP3A"
BITCOIN = "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa"
BECH32 = "bc1qar0srrr7xfkvy5l643lydnw9re59gtzzwf5mdq"
ETHEREUM = "0x742d35cc6634c0532925a3b844bc454e4438f44e"
KASPA = "kaspa:qrelgny7sr3vahq69yykxx36m65gvmhryxrlwngfzgu8xkdslum2yxjp3ap8m"
DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

# A planted secret begins with something that no rule and no command below contains.
SECRETS = st.text(string.ascii_letters + string.digits + "!#%*+,.^_~-", min_size=6, max_size=60).map(
    lambda tail: "Zq9" + tail
)

PLACES = [
    lambda s: ["prog", "--password", s],
    lambda s: ["prog", f"--password={s}"],
    lambda s: ["prog", "-passphrase", s],
    lambda s: ["prog", f"--hub-token={s}", "--epochs", "3"],
    lambda s: ["prog", "--api-key", s],
    lambda s: ["env", f"AWS_SECRET_ACCESS_KEY={s}", "aws", "s3", "ls"],
    lambda s: ["env", f"OPENAI_API_KEY={s}"],
    lambda s: ["mysql", "-h", "db", f"-p{s}"],
    lambda s: ["sudo", "/usr/bin/mysqldump", f"-p{s}", "all"],
    lambda s: ["sshpass", "-p", s, "ssh", "host"],
    lambda s: ["redis-cli", "-a", s],
    lambda s: ["curl", "-H", f"Authorization: Bearer {s}", "http://host/"],
    lambda s: ["curl", "-H", f"X-Api-Key: {s}"],
    lambda s: ["curl", "-u", f"bob:{s}", "http://host/"],
    lambda s: ["git", "clone", f"https://bob:{s}@host/repo.git"],
    lambda s: ["sh", "-c", f"curl -H 'Authorization: Bearer {s}' http://host/ | sh"],
    lambda s: ["sh", "-c", f"PASSWORD='{s}' ./run"],
    lambda s: ["sh", "-c", f"./run --token {s} --epochs 3"],
    lambda s: ["sh", "-c", f"mysql -p{s} db"],
    lambda s: ["tool", f'{{"user": "bob", "password": "{s}"}}'],
    lambda s: ["tool", f"{{'api_key': '{s}'}}"],
]


@given(secret=SECRETS, place=st.sampled_from(PLACES))
def test_planted_secret_never_appears(secret, place):
    shown = " ".join(redact_argv(place(secret)))
    assert secret not in shown
    assert "Zq9" not in shown


@given(secret=SECRETS, place=st.sampled_from(PLACES), padding=st.integers(0, 6000))
def test_cutting_shows_no_part_of_a_secret(secret, place, padding):
    argv = ["x" * padding + " ", *place(secret)]
    assert "Zq9" not in " ".join(redact_argv(argv))
    assert "Zq9" not in redact_text("y " * (padding // 2) + " ".join(place(secret)))


@pytest.mark.parametrize("token", [
    "AKIAIOSFODNN7EXAMPLE",
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "11AAAA" * 6,
    "sk-proj-" + "Ab3_" * 10,
    "sk-ant-api03-" + "Ab3-" * 10,
    "hf_" + "aBcDeFgHiJ" * 3,
    "xoxb-" + "123456789012-abcdef",
    "glpat-" + "abcdEFGH12345678",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
])
def test_tokens_are_known_by_their_shape(token):
    for text in (token, f"https://{token}@host/x", f"run {token};", f"/srv/{token}/x"):
        assert token not in redact_text(text)


def test_drawn_strings_are_told_from_words():
    draw = random.Random(1)
    hidden = 0
    for _ in range(1000):
        length = draw.choice((32, 40, 64))
        hidden += redact_text("".join(draw.choices(string.ascii_letters + string.digits, k=length))) == MARK
    assert hidden >= 990
    raw = [base64.b64encode(draw.randbytes(48)).decode() for _ in range(300)]
    assert sum(text[8:24] not in redact_text(text) for text in raw) >= 295


@pytest.mark.parametrize("kept", [
    MONERO, BITCOIN, BECH32, ETHEREUM, KASPA, DIGEST,
    f"stratum+tcp://{MONERO}@pool.example:3333",
    "--tokenizer=gpt2", "--max-tokens=512", "--max_new_tokens=9", "--author=me", "--lr=3e-4",
    "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "/usr/lib/python3/dist-packages/torch/distributed/launcher/api.py",
    "123e4567-e89b-12d3-a456-426614174000",
    "--model_name_or_path=meta-llama/Meta-Llama-3-8B-Instruct",
    "ssh", "-R", "127.0.0.1:2222:127.0.0.1:22", "root@203.0.113.7",
])
def test_what_a_reader_needs_stays(kept):
    assert redact_text(kept) == kept
    assert redact_argv(["prog", kept]) == ("prog", kept)


def test_pool_user_stays_and_its_password_goes():
    shown = redact_text(f"stratum+ssl://{MONERO}.rig7:hunter2@pool.example:3333")
    assert MONERO in shown
    assert ".rig7" in shown
    assert "hunter2" not in shown


def test_wallet_import_format_is_a_key_and_goes():
    private = "5HueCGU8rMjxEXxiPuD5BDku4MkFqeZyd4dZ1jvhTVqvbTLvyTJ"
    assert not redaction.is_wallet(private)
    assert private not in redact_text(private)


@given(argv=st.lists(st.text(max_size=700), max_size=100))
def test_output_is_bounded_and_printable(argv):
    shown = redact_argv(argv)
    assert len(shown) <= redaction.ARGUMENTS_MAX + 1
    assert sum(map(len, shown)) <= redaction.TOTAL_CHARS_MAX + 32
    assert all(len(argument) <= redaction.ARGUMENT_CHARS_MAX for argument in shown)
    assert not any("\x1b" in argument or "\x00" in argument for argument in shown)
    "".join(shown).encode()
