"""The opcode table against NVIDIA's own disassembler, on code that the table was not learnt from.

Needs nvdisasm (the wheel nvidia-cuda-nvdisasm, in a venv of its own): on PATH, or named by GPUGUARD_NVDISASM. The
committed cubins are four architectures; a folder with more (scripts/fixtures.sh FOLDER 75 80 86 ...) is named by
GPUGUARD_ORACLE_CUBINS.
"""

from __future__ import annotations

import collections
import os
import shutil
import sys
from pathlib import Path

import pytest

from gpuguard.code.decode import opcode_names

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import learn_opcodes  # noqa: E402

AGREEMENT_MIN = 0.9998
NVDISASM = os.environ.get("GPUGUARD_NVDISASM") or shutil.which("nvdisasm")
CUBINS = Path(os.environ.get("GPUGUARD_ORACLE_CUBINS", ROOT / "tests" / "fixtures" / "cubins"))


@pytest.mark.skipif(NVDISASM is None, reason="no nvdisasm: put it on PATH or name it by GPUGUARD_NVDISASM")
def test_mnemonics_are_those_of_nvdisasm():
    seen: collections.Counter[int] = collections.Counter()
    agreed: collections.Counter[int] = collections.Counter()
    missed: collections.Counter[tuple[int, str, str, str]] = collections.Counter()
    for path in sorted(CUBINS.glob("*.cubin")):
        rows = learn_opcodes.pairs(NVDISASM, path)
        assert len(rows) == sum(len(text) // 16 for text in learn_opcodes.texts(path.read_bytes()).values())
        for sm, code, shown in rows:
            theirs = learn_opcodes.SAME_NAME.get(shown, shown)
            ours = opcode_names(sm).get(code, "UNK")
            seen[sm] += 1
            agreed[sm] += ours == theirs
            if ours != theirs:
                missed[sm, f"{code:03x}", theirs, ours] += 1
    for sm, count in sorted(seen.items()):
        print(f"sm_{sm:<4} {count:>7} instructions  {agreed[sm] / count:.4%} agree")
    assert seen, f"no cubins in {CUBINS}"
    assert agreed.total() / seen.total() >= AGREEMENT_MIN, missed


def test_the_table_is_what_its_script_writes():
    assert learn_opcodes.written(learn_opcodes.known()) == learn_opcodes.TARGET.read_text()


def test_a_meaning_that_changes_is_kept_apart():
    rows = {0x235: {80: "HFMA2", 90: "HFMA2", 120: "IADD"}, 0x212: {90: "LOP3"}}
    text = learn_opcodes.written(rows)
    assert 'HFMA2 = "235"' in text.partition("\n[[from]]")[0]
    assert "sm = 120" in text
    assert 'IADD = "235"' in text.partition("\n[[from]]")[2]
