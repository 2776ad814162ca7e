"""From the bytes of an image to a verdict for each kernel in it: what `scan` and the daemon both ask.

Pure: the same bytes and the same allow list give the same verdicts. A kernel on the allow list (by the hash of its
code) is not judged at all: vendors' libraries do contain hashing code, and what it is used for is not in the code.
PTX is judged by its constants alone: how its instructions will look once compiled is not known well enough for their
mix to count.
"""

from __future__ import annotations

import bisect
import hashlib
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from gpuguard.code import batch, decode
from gpuguard.code import constants as known
from gpuguard.code.classify import PRIOR, CodeVerdict, classify, table_hits
from gpuguard.code.containers import elf, ptx
from gpuguard.code.containers.images import Flaw, Image, Malformed
from gpuguard.code.rows import KernelRow
from gpuguard.code.verdicts import ACCUSED, ALLOWED, KernelVerdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from gpuguard.code.allow import AllowList
    from gpuguard.core.labels import Verdict

#: Windows and loops that are held at once: a part costs a kilobyte, and a library's image has 100,000.
_PARTS_HELD_MAX = 4_096
#: A module has a few tables, and its kernels read few different sets of them; each set is looked through by itself.
_VARIABLE_SETS_MAX = 1_024
#: Known constants alone do not reach it, nor does the mix alone count for it.
CONFIRMED_PROBABILITY = 0.999


class Decoded(NamedTuple):
    """A kernel that is decoded and not yet judged."""

    name: str
    text_sha256: str
    counts: decode.Parts
    module: dict[str, int]  # what it can read of the words in its module's data


#: First byte and end of some `__constant__` variables of a module.
Variables: TypeAlias = frozenset[tuple[int, int]]
Chunk: TypeAlias = tuple[list[Decoded], list[Flaw]]
Allowed: TypeAlias = "AllowList | frozenset[str]"


def _flaw(image: Image, reason: str, *, unread: bool = False) -> Flaw:
    return Flaw(image.path, image.container, image.offset, "unread" if unread else "malformed", reason)


def in_constants(cubin: elf.Cubin) -> list[dict[str, int]]:
    """Return, for each kernel, the words found in its module's data. Sections are padded: no word straddles two.

    Only what a kernel can read counts for it, or one hash in a library's module accuses all that was compiled beside
    it. Code without an operand in a constant bank, and without an address to be filled in, reads nothing but what it is
    given; operands say which variables are read, where they say it. What no code names is anybody's: a table that the
    host hands over, or one that is reached in a way that was not seen. Of a module that no compiler makes, with more
    sets of variables than can be looked through, all count for all.
    """
    found = known.in_data(_joined(cubin.constants))
    if not found:
        return [found] * len(cubin.kernels)
    reads = [None if kernel.patched else _variables_read(cubin, kernel.text) for kernel in cubin.kernels]
    named = {one for one in reads if one}
    if not (named or None in reads) or len(named) > _VARIABLE_SETS_MAX:
        return [found] * len(cubin.kernels)
    rest = {} if None in reads else known.in_data(_unnamed(cubin, frozenset().union(*named)))
    of_variables = {one: _most(known.in_data(_only(cubin, one)), rest) for one in named}
    return [found if one is None else of_variables.get(one, {}) for one in reads]


def _variables_read(cubin: elf.Cubin, text: memoryview) -> Variables | None:
    """Return which variables of its module code reads; None: any, for all that its operands say."""
    offsets = decode.constants_read(text)
    if offsets is None:
        return None
    named: set[tuple[int, int]] = set()
    for offset in offsets:
        at = bisect.bisect(cubin.variables, (offset, elf.BANK_BYTES_MAX)) - 1
        if at < 0 or offset >= cubin.variables[at][1]:
            return None
        named.add(cubin.variables[at])
    return frozenset(named)


def _only(cubin: elf.Cubin, variables: Variables) -> bytes:
    """Return the bank with nothing but these variables in it."""
    kept = bytearray(-(-len(cubin.bank) // 4) * 4)
    for first, end in variables:
        kept[first:end] = cubin.bank[first:end]
    return bytes(kept)


def _unnamed(cubin: elf.Cubin, named: Variables) -> bytes:
    """Return all data of a module but these variables."""
    bank = bytearray(cubin.bank)
    for first, end in named:
        bank[first:end] = bytes(end - first)
    return _joined([bank, *(part for part in cubin.constants if part is not cubin.bank)])


def _joined(parts: Iterable[bytes | bytearray | memoryview]) -> bytes:
    return b"".join(bytes(part) + bytes(-len(part) % 4) for part in parts)


def _ptx_rows(module: ptx.PtxModule) -> list[KernelRow]:
    found = known.in_data(_joined(module.constants))
    return [_ptx_row(module.sm, kernel, found) for kernel in module.kernels]


def _ptx_row(sm: int, kernel: ptx.PtxKernel, found: dict[str, int]) -> KernelRow:
    classes, names = decode.lut_classes(), tuple(decode.DERIVED)
    derived = {"rot": kernel.rotates, "maxrun": kernel.longest_run, "distinct_op": len(kernel.opcodes),
               "n_ctrl": sum(count for name, count in kernel.opcodes.items() if name in ptx.CONTROL)}
    for lut, count in kernel.luts.items():
        if lut in classes:
            name = names[classes[lut]]
            derived[name] = derived.get(name, 0) + count
    big = [word for word in kernel.immediates if 0xFFFF < word < 0xFFFF_0000]
    derived |= {"imm_big": len(big), "imm_big_distinct": len(set(big))}
    text = repr((kernel.opcodes, kernel.immediates)).encode()
    return KernelRow(
        sm=sm, kernel=kernel.name, n_instr=kernel.n_instr, opcodes=kernel.opcodes,
        derived={name: count for name, count in derived.items() if count},
        known_const_imm=known.in_words(np.array(kernel.immediates, np.uint32)), known_const_module=found,
        text_sha256=hashlib.sha256(text).hexdigest())


def judge_image(image: Image, allowed: Allowed = frozenset(), *,
                compiled: bool = False) -> Iterator[tuple[list[KernelVerdict], list[Flaw]]]:
    """Yield the verdicts of an image's kernels, in its order, and what of it could not be read, so many at a time.

    ``compiled``: judge by compiled loops, which take seconds to compile once.
    """
    try:
        if image.kind == "ptx":
            yield _ptx_verdicts(image), []
        elif image.kind == "cubin":
            for kernels, flaws in _chunks(image, elf.read_cubin(image.data), allowed):
                yield _verdicts(image, kernels, allowed, compiled=compiled), flaws
    except Malformed as error:
        yield [], [_flaw(image, str(error))]


def _chunks(image: Image, cubin: elf.Cubin, allowed: Allowed) -> Iterator[Chunk]:
    """Yield decoded kernels, so many at a time, and what could not be decoded."""
    if not decode.SM_MIN <= cubin.sm <= decode.SM_MAX:
        yield [], [_flaw(image, f"code of sm_{cubin.sm} is not understood", unread=True)]
        return
    kernels: list[Decoded] = []
    flaws: list[Flaw] = []
    parts = 0
    for kernel, module in zip(cubin.kernels, in_constants(cubin), strict=True):
        digest = hashlib.sha256(kernel.text).hexdigest()
        try:
            counts = decode.decode_counts(cubin.sm, kernel.text, parts=not allowed or digest not in allowed)
        except ValueError as error:
            flaws.append(_flaw(image, f"{kernel.name}: {error}"))
            continue
        kernels.append(Decoded(kernel.name, digest, counts, module))
        parts += 1 + len(counts.windows) + len(counts.loops)
        if parts > _PARTS_HELD_MAX:
            yield kernels, flaws
            kernels, flaws, parts = [], [], 0
    yield kernels, flaws


def _verdicts(image: Image, kernels: list[Decoded], allowed: Allowed, *, compiled: bool) -> list[KernelVerdict]:
    asked = [one for one in kernels if not allowed or one.text_sha256 not in allowed]
    tables = [_most(known.in_words(one.counts.words), one.module) for one in asked]
    said = batch.judge([one.counts for one in asked], tables, compiled=compiled)
    answers = iter(zip(said, tables, strict=True))
    return [_allowed(image, one) if allowed and one.text_sha256 in allowed else
            _verdict(image, one.name, one.counts.n_instr, one.text_sha256, *next(answers)) for one in kernels]


def _most(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {name: max(one.get(name, 0), other.get(name, 0)) for name in {*one, *other}} if one else other


def _allowed(image: Image, one: Decoded) -> KernelVerdict:
    return KernelVerdict(
        path=image.path, container=image.container, offset=image.offset, arch=image.arch, kernel=one.name,
        instructions=one.counts.n_instr, label="benign", probability=0.0, nats=0.0, verdict="clear",
        evidence=(ALLOWED,), text_sha256=one.text_sha256, image_sha256=image.sha256)


def _ptx_verdicts(image: Image) -> list[KernelVerdict]:
    """Look at the functions of a module one by one only if the words of a hash are anywhere in it."""
    outline = ptx.outline(image.data)
    unknown = CodeVerdict("unknown", PRIOR, 0.0, ("PTX without known constants: judged once it is compiled",))
    if not table_hits(_most(known.in_words(outline.words), known.in_data(_joined(outline.constants)))):
        return [_verdict(image, name, statements, "", unknown, {}) for name, statements in outline.functions]
    found = []
    for row in _ptx_rows(ptx.read_ptx(image.data)):
        tables = _most(row.known_const_imm, row.known_const_module)
        said = classify([row], backend="reference")[0] if table_hits(tables) else unknown
        found.append(_verdict(image, row.kernel, row.n_instr, row.text_sha256, said, tables))
    return found


def _verdict(image: Image, name: str, instructions: int, digest: str, said: CodeVerdict,
             tables: dict[str, int]) -> KernelVerdict:
    words = tuple(table_hits(tables)) if tables else ()
    return KernelVerdict(
        path=image.path, container=image.container, offset=image.offset, arch=image.arch, kernel=name,
        instructions=instructions, label=said.label, probability=said.probability, nats=said.nats, words=words,
        verdict=verdict_of(said.label, said.probability, hits=bool(words)),
        evidence=said.evidence, text_sha256=digest, image_sha256=image.sha256)


def verdict_of(label: str, probability: float, *, hits: bool) -> Verdict:
    """Return what a label comes to; ``hits``: constants of a hash were found."""
    if label == "unknown":
        return "unknown"
    if label not in ACCUSED:
        return "clear"
    return "confirmed" if hits and probability >= CONFIRMED_PROBABILITY else "suspect"


def runs_on(arch: str, sm: int | None) -> bool:
    """Return whether a GPU of compute capability ``sm`` runs this code: same major, no higher minor; PTX may."""
    kind, _, number = arch.partition("_")
    if sm is None or kind == "compute":
        return True
    return int(number) // 10 == sm // 10 and int(number) <= sm
