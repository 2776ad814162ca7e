"""From the bytes of an image to a verdict for each kernel in it: what `scan` and the daemon both ask.

Pure: the same bytes and the same allow list give the same verdicts. A kernel on the allow list (by the hash of its
code) is not judged at all: vendors' libraries do contain hashing code, and what it is used for is not in the code.
PTX is judged by its constants alone: how its instructions will look once compiled is not known well enough for their
mix to count.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from gpuguard.code import constants as known
from gpuguard.code import decode
from gpuguard.code.containers import elf, ptx
from gpuguard.code.containers.finding import find_images
from gpuguard.code.containers.images import Budget, Flaw, Image, Malformed
from gpuguard.code.rows import KernelRow
from gpuguard.code.verdicts import ACCUSED, ALLOWED, KernelVerdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gpuguard.code.allow import AllowList
    from gpuguard.code.classify import CodeVerdict
    from gpuguard.core.labels import Verdict

#: Rows of windows and loops that are held at once: a part costs some kilobytes, and a library's image has 100,000.
_PARTS_HELD_MAX = 6_000
#: Known constants alone do not reach it, nor does the mix alone count for it.
CONFIRMED_PROBABILITY = 0.999
_CACHED_IMAGES_MAX = 4_096


class Classifier(Protocol):
    """What `gpuguard.code.classify.classify` is."""

    def __call__(self, rows: Sequence[KernelRow]) -> Sequence[CodeVerdict]: ...


Batch = tuple[list[KernelRow], list[Flaw]]
Allowed: TypeAlias = "AllowList | frozenset[str]"


def rows_of(image: Image, allowed: Allowed = frozenset()) -> Iterator[Batch]:
    """Decode the kernels of one image, so many at a time; what cannot be decoded is a flaw.

    Kernels that are allowed come without their parts.
    """
    try:
        if image.kind == "ptx":
            yield _ptx_rows(ptx.read_ptx(image.data)), []
        elif image.kind == "cubin":
            yield from _cubin_rows(image, elf.read_cubin(image.data), allowed)
    except Malformed as error:
        yield [], [_flaw(image, str(error))]


def _flaw(image: Image, reason: str, *, unread: bool = False) -> Flaw:
    return Flaw(image.path, image.container, image.offset, "unread" if unread else "malformed", reason)


def _cubin_rows(image: Image, cubin: elf.Cubin, allowed: Allowed) -> Iterator[Batch]:
    if not decode.SM_MIN <= cubin.sm <= decode.SM_MAX:
        yield [], [_flaw(image, f"code of sm_{cubin.sm} is not understood", unread=True)]
        return
    # Sections are padded so that no word straddles two of them.
    found = known.in_data(b"".join(bytes(part) + bytes(-len(part) % 4) for part in cubin.constants))
    rows: list[KernelRow] = []
    flaws: list[Flaw] = []
    parts = 0
    for kernel in cubin.kernels:
        judged = not allowed or hashlib.sha256(kernel.text).hexdigest() not in allowed
        try:
            rows.append(decode.decode_kernel(cubin.sm, kernel.text, kernel=kernel.name, windows=judged,
                                             module=lambda _: found))
        except ValueError as error:
            flaws.append(_flaw(image, f"{kernel.name}: {error}"))
            continue
        parts += 1 + len(rows[-1].windows)
        if parts > _PARTS_HELD_MAX:
            yield rows, flaws
            rows, flaws, parts = [], [], 0
    yield rows, flaws


def _ptx_rows(module: ptx.PtxModule) -> list[KernelRow]:
    found = known.in_data(b"".join(one + bytes(-len(one) % 4) for one in module.constants))
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
        known_const_imm=known.in_words(np.unique(np.array(kernel.immediates, np.uint32))), known_const_module=found,
        text_sha256=hashlib.sha256(text).hexdigest())


def judge_image(image: Image, allowed: Allowed = frozenset(),
                classify: Classifier | None = None) -> Iterator[tuple[list[KernelVerdict], list[Flaw]]]:
    """Yield the verdicts of an image's kernels, in its order, and what of it could not be read, so many at a time."""
    for rows, flaws in rows_of(image, allowed):
        asked = [row for row in rows if row.text_sha256 not in allowed]
        answers = iter((classify or _classifier())(asked)) if asked else iter(())
        yield [_allowed(image, row) if row.text_sha256 in allowed else _verdict(image, row, next(answers))
               for row in rows], flaws


def _classifier() -> Classifier:
    from gpuguard.code.classify import classify

    return classify


def _allowed(image: Image, row: KernelRow) -> KernelVerdict:
    return KernelVerdict(
        path=image.path, container=image.container, offset=image.offset, arch=image.arch, kernel=row.kernel,
        instructions=row.n_instr, label="benign", probability=0.0, nats=0.0, verdict="clear",
        evidence=(ALLOWED,), text_sha256=row.text_sha256,
        image_sha256=image.sha256)


def _verdict(image: Image, row: KernelRow, said: CodeVerdict) -> KernelVerdict:
    from gpuguard.code.classify import table_hits

    label, probability, nats, evidence = said.label, said.probability, said.nats, said.evidence
    tables = {name: max(row.known_const_imm.get(name, 0), row.known_const_module.get(name, 0))
              for name in {*row.known_const_imm, *row.known_const_module}}
    hits = bool(table_hits(tables))
    if image.kind == "ptx" and not hits:
        label, nats, evidence = "unknown", 0.0, ("PTX without known constants: judged once it is compiled",)
    return KernelVerdict(
        path=image.path, container=image.container, offset=image.offset, arch=image.arch, kernel=row.kernel,
        instructions=row.n_instr, label=label, probability=probability, nats=nats,
        verdict=verdict_of(label, probability, hits=hits), evidence=evidence, text_sha256=row.text_sha256,
        image_sha256=image.sha256)


def verdict_of(label: str, probability: float, *, hits: bool) -> Verdict:
    """Return what a label comes to; ``hits``: constants of a hash were found."""
    if label == "unknown":
        return "unknown"
    if label not in ACCUSED:
        return "clear"
    return "confirmed" if hits and probability >= CONFIRMED_PROBABILITY else "suspect"


class Judge:
    """Verdicts by content hash, for the daemon: the same module is loaded by every worker of a job.

    Bounded: the image not asked for longest leaves. Reading hostile bytes belongs into the worker's cell
    (`gpuguard.code.worker`); this is what runs in it, and what a test calls.
    """

    def __init__(self, allowed: Allowed = frozenset(), classify: Classifier | None = None) -> None:
        self._allowed = allowed
        self._classify = classify
        self._known: OrderedDict[str, tuple[KernelVerdict, ...]] = OrderedDict()

    def judge(self, data: bytes, sm: int | None = None) -> tuple[KernelVerdict, ...]:
        """Return the verdicts of a module's image: cubin, fatbin or PTX. ``sm``: only what runs there natively."""
        key = f"{hashlib.sha256(data).hexdigest()}/{sm}"
        if key not in self._known:
            self._known[key] = tuple(self._read(data, sm))
            if len(self._known) > _CACHED_IMAGES_MAX:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def _read(self, data: bytes, sm: int | None) -> list[KernelVerdict]:
        found: list[KernelVerdict] = []
        for one in find_images(data, "", Budget(len(data))):
            if isinstance(one, Image) and runs_on(one.arch, sm):
                found += [said for some, _ in judge_image(one, self._allowed, self._classify) for said in some]
        return found


def runs_on(arch: str, sm: int | None) -> bool:
    """Return whether a GPU of compute capability ``sm`` runs this code: same major, no higher minor; PTX may."""
    kind, _, number = arch.partition("_")
    if sm is None or kind == "compute":
        return True
    return int(number) // 10 == sm // 10 and int(number) <= sm
