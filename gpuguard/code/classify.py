"""What a GPU kernel is, by its machine code alone: mining, cracking, a named look-alike, benign, or not to be judged.

Four questions, in this order:

1. *Can it be judged?* Kernels of less than 64 instructions, or with counts that do not add up, are `unknown`, with the
   reason; with more than 3 % unknown opcodes only the next question is asked. Unknown weighs nothing.
2. *Does it carry the words of a hash?* A hit is at least 16 distinct words of one table (the whole table where it is
   shorter), never a single word: Philox's 0xBB67AE85 is SHA-256's second initial value, and hundreds of ML kernels have
   it.
3. *Does it bear the structure of a memory-hard proof of work?* (`gpuguard.code.structures`): things done together that
   no mix shows.
4. *Does its instruction mix look like hashing?* A forest over shares that mean the same at any length: of the whole
   kernel, and of its windows and innermost loops, where appended code that never runs cannot dilute.

Look-alikes are named rather than accused (`grey:...`): checksums, random numbers, ciphers, database hashing, unpacking
of few-bit weights. A grey name needs constants *and* a shape that proof of work does not have, or an attacker would
buy it with four words; it never outweighs a hash table.

Names play no part. The weight of a verdict is a log-likelihood ratio in nats, calibrated on kernels of projects that
the forest had not seen, and capped at what the size of the data can support; `probability` adds the prior, given
openly. A mix cannot tell mining from a password search, so what is accused by mix alone is called mining.

Tables, pitfalls and measured figures: models/code_forest.md.
"""

from __future__ import annotations

import functools
import math
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from msgspec import Struct

from gpuguard.code import structures
from gpuguard.code.rows import UNKNOWN_RATIO_MAX, KernelRow
from gpuguard.kernels import opcodes
from gpuguard.kernels.opcodes import COLUMN, Forest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from gpuguard.code.structures import Structure

#: The share of launched kernels outside the allow list that hash, before any look at them. A site that knows better
#: gives its own.
PRIOR = 0.01

INSTRUCTIONS_MIN = 64
#: A window is judged from this length on; a loop of a few instructions looks like anything.
PART_INSTRUCTIONS_MIN = 48

#: Most that each kind of evidence may weigh, in nats. Mix: the lower end of what an accusation by mix weighs with
#: thresholds crossed (models/code_forest.md). Tables: ln of recall over the upper 95 % bound of the false positive rate
#: that some 6,500 benign kernels can show (3 / 6,500), less half a nat for kernels of one library being alike.
MIX_NATS_MAX = 5.0
TABLE_NATS_MAX = 7.0
#: Of structures: the lowest of the lower bounds in models/code_forest.md, rounded down.
STRUCTURE_NATS = 2.5

#: Rows are judged this many at a time, so that memory stays bounded whatever is scanned.
BATCH_ROWS = 8_192

_ROTATES = ("rot", "prmt_swap", "prmt_rot")
_CHOICES = ("lop_ch", "lop_maj", "lop_chi")

_TEXT_MAX = 1 << 16
_ENTRIES_MAX = 4_096
_PARTS_MAX = 65_536


class Table(NamedTuple):
    """A table of constants: how many distinct words of it are a hit, and what it belongs to."""

    words_min: int
    label: str
    text: str


TABLES = {
    "sha256k": Table(16, "mining", "SHA-256 round constants"),
    "sha512k": Table(16, "mining", "SHA-512 round constants"),
    "sha2iv": Table(8, "mining", "SHA-256 initial values"),
    "sha512iv": Table(16, "mining", "SHA-512 initial values"),
    "keccak": Table(12, "mining", "Keccak round constants"),
    "pi": Table(16, "mining", "Blake's digits of pi"),
    "luffa": Table(8, "mining", "Luffa constants"),
    "jh": Table(8, "mining", "JH constants"),
    "cubehash": Table(8, "mining", "CubeHash initial values"),
    "skein": Table(8, "mining", "Skein constants"),
    "md5": Table(16, "cracking", "MD5 round constants"),
    "sha1": Table(7, "cracking", "SHA-1 round constants and initial values"),
}

#: AES S-box and T-table words that are a hit.
AES_WORDS_MIN = 48


class CodeVerdict(Struct, frozen=True):
    """What one kernel's code says.

    ``label`` is mining, cracking, grey:CLASS, benign or unknown. ``probability`` that it hashes, 0..1: the prior and
    the uncapped score, so that kernels can be ranked by it. ``nats`` is the weight as evidence, without the prior and
    capped: 0 for unknown, grey and benign, since a miner's code may be elsewhere. ``score`` is the log-likelihood
    ratio of the instruction mix, None where it was not judged.
    """

    label: str
    probability: float
    nats: float
    evidence: tuple[str, ...]
    score: float | None = None


class Calibration(NamedTuple):
    """From a forest's score to nats, and from which weight on the mix accuses."""

    slope: float
    intercept: float
    accuse_nats: float

    def nats(self, score: float) -> float:
        """Return the log-likelihood ratio of a score."""
        return self.slope * score + self.intercept


class Model(NamedTuple):
    """The trained parameters: the forest, and what its score means of whole kernels, and of windows and loops."""

    forest: Forest
    whole: Calibration
    part: Calibration


class Kernels(NamedTuple):
    """Kernels as arrays, with what the forest says of them and of their parts: what a scan judges, many at a time.

    ``counts`` are rows of `opcodes.COLUMNS`; ``tables`` the distinct words found, by table. The parts that can be
    judged stand kernel by kernel: ``part_ends[i]`` is where those of kernel i end, ``part_firsts`` are their first
    instructions, and ``part_loops`` says which are loops and no windows.
    """

    counts: np.ndarray  # float64[kernels, COLUMNS]
    scores: np.ndarray  # float64[kernels]
    tables: Sequence[Mapping[str, int]]
    part_scores: np.ndarray  # float64[parts]
    part_ends: np.ndarray  # int64[kernels]
    part_firsts: np.ndarray  # int64[parts]
    part_loops: np.ndarray  # bool[parts]


class Facts(NamedTuple):
    """What is used of a row, checked: counts, constants, and its parts as (kind, first instruction, counts)."""

    n_instr: int
    opcodes: Mapping[str, int]
    derived: Mapping[str, int]
    tables: Mapping[str, int]
    parts: Sequence[tuple[str, int, Mapping[str, int], Mapping[str, int]]] = ()


def classify(rows: Iterable[KernelRow | Mapping[str, Any]], prior: float = PRIOR,
             backend: str = "auto") -> list[CodeVerdict]:
    """Return a verdict for each row, in their order.

    A row is a `KernelRow`, or a mapping with its text columns: ``opcodes`` and ``derived`` as "NAME:count;...",
    ``known_const_imm``, ``known_const_module``, ``n_instr``. Nothing else in it is read. A row that cannot be read is
    unknown, never an exception. ``prior`` is the share of such kernels that hash, above 0 and below 1; ``backend`` is
    that of `gpuguard.kernels.opcodes.features`.
    """
    if not 0 < prior < 1:
        raise ValueError(f"a prior of {prior}: above 0 and below 1")
    verdicts: list[CodeVerdict] = []
    batch: list[Facts | str] = []
    for row in rows:
        batch.append(read(row))
        if len(batch) == BATCH_ROWS:
            verdicts += judge(batch, model(), prior, backend)
            batch = []
    return verdicts + judge(batch, model(), prior, backend)


@functools.cache
def model() -> Model:
    """Return the model that is shipped. Raises ValueError when it does not fit this code."""
    path = files("gpuguard.models").joinpath("code_forest.npz")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as a:
        names = opcodes.FEATURE_NAMES
        if tuple(a["feature_names"].tolist()) != names:
            raise ValueError("models/code_forest.npz was trained on other features: make it anew")
        forest = Forest(**{name: a[name] for name in Forest._fields if name != "base"}, base=float(a["base"]))
        whole, part = (Calibration(*a[f"{kind}_calibration"].tolist()) for kind in ("whole", "part"))
    forest.check(len(names))
    return Model(forest, whole, part)


def read(row: KernelRow | Mapping[str, Any]) -> Facts | str:
    """Return what is used of a row, or why it cannot be judged."""
    try:
        facts = _of_struct(row) if isinstance(row, KernelRow) else _of_columns(row)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as reason:
        return f"could not be read: {reason}"[:200]
    total = sum(facts.opcodes.values())
    if total != facts.n_instr:
        return f"could not be read: {facts.n_instr} instructions, but {total} counted"
    return _too_short(facts.n_instr) if facts.n_instr < INSTRUCTIONS_MIN else facts


def _too_short(total: float) -> str:
    return f"too short to judge: {total:.0f} instructions"


def _of_struct(row: KernelRow) -> Facts:
    parts = [(one.part, one.first_instruction, _checked(one.opcodes), _checked(one.derived))
             for one in row.windows[:_PARTS_MAX] if one.n_instr >= PART_INSTRUCTIONS_MIN and one.is_judgeable()]
    own = _checked(row.opcodes)
    return Facts(row.n_instr, own, _checked(row.derived),
                 _most(_checked(row.known_const_imm), _checked(row.known_const_module)), parts)


def _of_columns(row: Mapping[str, Any]) -> Facts:
    tables = _most(_counts(row.get("known_const_imm") or ""), _counts(row.get("known_const_module") or ""))
    own = _named(_counts(row["opcodes"]))
    return Facts(opcodes.checked(int(row["n_instr"])), own, _counts(row["derived"]), tables)


def _named(own: Mapping[str, int]) -> Mapping[str, int]:
    """Return opcode counts with the names that codes without one have been given since: UNK9f0 is HGMMA."""
    if not any(name.startswith("UNK") for name in own):
        return own
    named: dict[str, int] = {}
    for name, count in own.items():
        known = _code_names().get(name, name)
        named[known] = named.get(known, 0) + count
    return named


@functools.cache
def _code_names() -> dict[str, str]:
    from gpuguard.code.decode import SM_MIN, opcode_names

    return {f"UNK{code:03x}": name for code, name in opcode_names(SM_MIN).items()}


def _counts(value: Any) -> Mapping[str, int]:
    """Return the counts of "NAME:count;NAME:count", or of a mapping."""
    if not isinstance(value, str):
        return _checked(value)
    if len(value) > _TEXT_MAX:
        raise ValueError(f"a column of {len(value)} characters")
    out: dict[str, int] = {}
    for entry in filter(None, value.split(";")):
        name, colon, count = entry.partition(":")
        if not (name and colon and count.isascii() and count.isdigit()):
            raise ValueError(f"{entry[:40]!r} is not NAME:count")
        out[name] = out.get(name, 0) + int(count)
    return _checked(out)


def _checked(counts: Mapping[Any, Any]) -> Mapping[str, int]:
    if len(counts) > _ENTRIES_MAX:
        raise ValueError(f"{len(counts)} names in one column")
    for name, count in counts.items():
        if not (isinstance(name, str) and isinstance(count, int)):
            raise TypeError(f"{name!r}: {count!r} is not a name and a count"[:100])
        opcodes.checked(count)
    return counts


def _most(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: max(one.get(name, 0), other.get(name, 0)) for name in {*one, *other}}


def judge(batch: Sequence[Facts | str], trained: Model, prior: float, backend: str) -> list[CodeVerdict]:
    """Return the verdicts of a batch that `read` made."""
    good = [one for one in batch if not isinstance(one, str)]
    judged = iter(judge_kernels(_arrays(good, trained, backend), trained, prior))
    return [_unknown(one, prior) if isinstance(one, str) else next(judged) for one in batch]


def _arrays(good: Sequence[Facts], trained: Model, backend: str) -> Kernels:
    counts = opcodes.counts([(one.opcodes, one.derived) for one in good])
    parts = [part for facts in good for part in facts.parts]
    part_scores = np.zeros(len(parts))
    for first in range(0, len(parts), BATCH_ROWS):
        some = [(counts, derived) for _, _, counts, derived in parts[first:first + BATCH_ROWS]]
        part_scores[first:first + BATCH_ROWS] = _scores(opcodes.counts(some), trained, backend)
    return Kernels(
        counts=counts, scores=_scores(counts, trained, backend), tables=[one.tables for one in good],
        part_scores=part_scores, part_ends=np.cumsum([len(one.parts) for one in good], dtype=np.int64),
        part_firsts=np.array([first for _, first, *_ in parts], np.int64),
        part_loops=np.array([kind == "loop" for kind, *_ in parts], bool))


def _scores(table: np.ndarray, trained: Model, backend: str) -> np.ndarray:
    features, _ = opcodes.features(table, backend)
    return opcodes.scores(features, trained.forest, backend)[0]


def judge_kernels(kernels: Kernels, trained: Model, prior: float = PRIOR) -> list[CodeVerdict]:
    """Return a verdict for each kernel, in their order: `classify` for who has arrays."""
    totals, unknown = kernels.counts[:, 0].tolist(), kernels.counts[:, 1].tolist()
    whole = (trained.whole.slope * kernels.scores + trained.whole.intercept).tolist()
    borne = structures.found(kernels.counts)
    return [_verdict(kernels, i, total, few / max(total, 1), nats, part, bears, trained, prior)
            for i, (total, few, nats, part, bears)
            in enumerate(zip(totals, unknown, whole, best_parts(kernels, trained), borne, strict=True))]


def _unknown(reason: str, prior: float) -> CodeVerdict:
    return CodeVerdict("unknown", prior, 0.0, (reason,))


class BestPart(NamedTuple):
    """The most suspicious part of a kernel: where it is, its weight, and what of that was taken off for chance.

    The best of k parts is high by chance more often than one is, at most k times as often: ln k is taken off.
    """

    place: str
    nats: float
    chance_nats: float


def best_parts(kernels: Kernels, trained: Model) -> list[BestPart | None]:
    """Return each kernel's most suspicious part, None for a kernel without parts."""
    scores = kernels.part_scores
    out: list[BestPart | None] = []
    first = 0
    for end in kernels.part_ends.tolist():
        best = None
        if end > first:
            top = first + int(np.argmax(scores[first:end]))
            kind = "loop" if kernels.part_loops[top] else "window"
            chance = math.log(end - first)
            best = BestPart(f"{kind} at instruction {kernels.part_firsts[top]}",
                            trained.part.nats(float(scores[top])) - chance, chance)
        out.append(best)
        first = end
    return out


def _verdict(kernels: Kernels, i: int, total: float, unknown_ratio: float, nats: float,
             part: BestPart | None, bears: Sequence[Structure], trained: Model, prior: float) -> CodeVerdict:
    """Return the verdict on kernel ``i``; ``nats`` is what its whole mix weighs, ``bears`` its structures."""
    tables = kernels.tables[i]
    if total < INSTRUCTIONS_MIN:
        return _unknown(_too_short(total), prior)
    hits = table_hits(tables) if tables else []
    if unknown_ratio > UNKNOWN_RATIO_MAX:
        if not hits:
            return _unknown(f"refused to judge: {unknown_ratio:.1%} of its opcodes are unknown", prior)
        return _by_tables(tables, hits, (), prior, None)
    mix = [f"instruction mix of the whole kernel: {nats:+.1f} nats"]
    if part is not None and part.nats < -0.5 * part.chance_nats:
        # What hashes does so somewhere. Where even the best part weighs less than half of what chance gives the best
        # of so many, the sum of all of them weighs nothing: an FFT's addresses, say, and its floats.
        nats = min(nats, part.nats)
    accused = nats >= trained.whole.accuse_nats
    if part is not None:
        mix.append(f"instruction mix of its {part.place}: {part.nats:+.1f} nats")
        accused = accused or part.nats >= trained.part.accuse_nats
        nats = max(nats, part.nats)
    if hits:
        return _by_tables(tables, hits, mix, prior, nats)
    if bears:
        weight = max(STRUCTURE_NATS, min(nats, MIX_NATS_MAX) if accused else 0.0)
        return CodeVerdict("mining", _probability(STRUCTURE_NATS + max(nats, 0.0), prior), weight,
                           (*(one.text for one in bears), *mix), nats)
    if tables or nats > 0:
        grey = grey_class(tables, kernels.counts[i], accused=accused, suspicious=nats > 0)
        if grey is not None:
            return CodeVerdict(f"grey:{grey[0]}", _probability(min(nats, 0.0), prior), 0.0, (grey[1], *mix), nats)
    weight = min(nats, MIX_NATS_MAX) if accused else 0.0
    return CodeVerdict("mining" if accused else "benign", _probability(nats, prior), weight, tuple(mix), nats)


def _by_tables(tables: Mapping[str, int], hits: Sequence[str], mix: Sequence[str], prior: float,
               nats: float | None) -> CodeVerdict:
    """Return the verdict on a kernel with the words of a hash. The mix adds to the probability, not to the weight."""
    label = "cracking" if all(TABLES[name].label == "cracking" for name in hits) else "mining"
    found = [f"{tables[name]} distinct words of {TABLES[name].text}" for name in hits]
    return CodeVerdict(label, _probability(TABLE_NATS_MAX + max(nats or 0.0, 0.0), prior), TABLE_NATS_MAX,
                       (*found, *mix), nats)


def _probability(nats: float, prior: float) -> float:
    odds = nats + math.log(prior / (1 - prior))
    return 1 / (1 + math.exp(-odds)) if odds > 0 else math.exp(odds) / (1 + math.exp(odds))


def table_hits(tables: Mapping[str, int]) -> list[str]:
    """Return the tables of which enough distinct words are there, in the order of TABLES."""
    return [name for name, table in TABLES.items() if tables.get(name, 0) >= table.words_min]


def grey_class(tables: Mapping[str, int], counts: np.ndarray, *, accused: bool,
               suspicious: bool) -> tuple[str, str] | None:
    """Return the look-alike that a kernel is, with the reason, or None.

    ``counts`` is one row of `opcodes.counts`. What constants name is named always, what shape alone names only where
    the mix is suspicious. Each needs a shape that hash rounds do not have.
    """
    share = functools.partial(_share, counts)
    rotates, chooses = share(*_ROTATES), share(*_CHOICES)
    if tables.get("philox", 0) >= 4 and rotates <= 0.01 and chooses <= 0.02 and share("IMAD", "UIMAD") >= 0.03:
        return "rng", "the four words of Philox, multiplications and no rotates: random numbers"
    if tables.get("splitmix", 0) >= 5 and rotates <= 0.01 and chooses <= 0.02 and share("IMAD", "UIMAD") >= 0.1:
        return "rng", "the words of SplitMix, multiplications and no rotates: random numbers"
    if max(tables.get("crc32", 0) - 15, tables.get("mt19937", 0) - 2) > 0 and rotates <= 0.01 and not accused:
        return ("crc", "the table of CRC-32") if tables.get("crc32", 0) >= 16 else ("rng", "the words of MT19937")
    database = max(tables.get("murmur", 0), tables.get("xxhash", 0))
    if database >= 5 and share("ISETP", "SEL", "n_ctrl") >= 0.04 and share("rot", "lop_xor2", "lop_xor3") <= 0.15:
        return "database", f"{database} words of murmur or xxhash among compares and branches: hashing of table columns"
    if tables.get("aes", 0) >= AES_WORDS_MIN and (not accused or _looks_up_blocks(counts, one_table=True)):
        return "cipher", f"{tables['aes']} words of the AES tables, and no other: a block cipher"
    if tables.get("chacha", 0) >= 4 and not accused:
        return "cipher", "the four words of ChaCha: a stream cipher"
    if not suspicious:
        return None
    return _grey_by_shape(counts, rotates, chooses)


def _grey_by_shape(counts: np.ndarray, rotates: float, chooses: float) -> tuple[str, str] | None:
    """Return the look-alike that shape alone names.

    The bounds are a bit loop's (one shift, one `x ^ (y & z)` a bit, nothing looked up), a linear generator's
    (`_is_linear`), a stored generator's (its state is written back), a table cipher's (16 look-ups a round, up to 224
    for AES-256, each with its mask), and unpacking's (masks and shifts that feed float work, no xor).
    """
    share = functools.partial(_share, counts)
    xors = share("lop_xor2", "lop_xor3")
    shifts, bit_steps = share("SHF"), share("lop_chi")
    if _is_linear(counts, rotates):
        return "rng", "words looked up or stored, and summed by xor alone: a linear random generator"
    if bit_steps >= 0.15 and 0.65 <= shifts / bit_steps <= 1.35 and rotates <= 0.01 and xors <= 0.3 * bit_steps:
        return "crc", "a shift and a masked xor for each bit, and little else: a checksum"
    if counts[0] <= 768 and rotates <= 0.01 and chooses <= 0.01 and xors <= 0.15 and _keeps_a_state(counts):
        return "rng", "a state read and written back beside what is drawn, hardly an xor: a random generator"
    if _looks_up_blocks(counts):
        return "cipher", "a few rounds of masked table look-ups, folded by xor: a block cipher"
    floats = share("FFMA", "FMUL", "FADD", "HFMA2", "HMUL2", "HADD2", "IDP", "HMMA", "IMMA", "I2F", "I2FP")
    if floats >= 0.04 and xors <= 0.02 and rotates <= 0.005 and share("lop_and", "SHF", "PRMT") >= 0.08:
        return "dequantisation", "masks and shifts that feed float work, no xor: unpacking of few-bit weights"
    return None


def _looks_up_blocks(counts: np.ndarray, *, one_table: bool = False) -> bool:
    """Return whether a kernel is a few rounds of look-ups, 16 a round, each with its mask and folded by xor.

    A look-up takes a shift, and another where the word found is turned. Words of 64 bits take two a turn: those are
    Whirlpool's and its kin's, which hash.
    ``one_table``: three words of four come out of the one table turned by bytes, a rotate each; and what encrypts many
    blocks in a loop copies its table first and counts blocks.
    """
    share = functools.partial(_share, counts)
    lookups, masks, xors = share("LDS"), share("lop_and"), share("lop_xor2", "lop_xor3")
    instructions_max, lookups_max = (1_280, 256) if one_table else (1_024, 224)
    if not (32 <= counts[COLUMN["LDS"]] <= lookups_max and counts[0] <= instructions_max and lookups >= 0.06):
        return False
    turns = share("rot") <= lookups if one_table else share("rot") <= 0.03 and share(*_ROTATES) <= 0.12
    return bool(turns and share("SHF") <= 2 * lookups
                and 0.7 <= masks / lookups <= 1.8 and 0.25 <= xors / lookups <= 1.2
                and share(*_CHOICES) <= 0.02 and share(*opcodes.words(opcodes.COMPARE)) <= 0.06)


def _is_linear(counts: np.ndarray, rotates: float) -> bool:
    """Return whether a kernel does hardly anything but add words over GF(2), each from a table or each to memory.

    That is what Sobol's direction numbers, jumps ahead in a sequence (a matrix and a vector of bits) and the Mersenne
    Twister do, and what no hash can afford: without carries, products and choices it would be solved as a system of
    linear equations. Words that are added under a mask or a condition are added two at a time; the sums of a round are
    of three (one LOP3), so that `lop_xor3` tells them apart.
    """
    share = functools.partial(_share, counts)
    sums, triples = share("lop_xor2", "lop_chi"), share("lop_xor3")
    if (rotates > 0.01 or triples > 0.06 * sums or share("lop_ch", "lop_maj") > 0.02
            or share("IADD3", "VIADD", "IADD") > 0.1 or share("ATOMG", "ATOM", "ATOMS", "RED", "REDG") > 0):
        return False
    loads, stores = share("LDG", "LD", "LDC", "ULDC", "LDCU", "LDL", "LDS"), share("STG", "ST")
    products = share("IMAD", "UIMAD") - share("imad_mov")
    looked_up = sums >= 0.15 and 0.1 <= loads / sums <= 1.6 and counts[0] <= 1_024 and products <= 0.1
    return looked_up or (sums >= 0.1 and 0.1 <= stores / sums <= 1 and counts[0] <= 4_096 and products <= 0.2)


def _keeps_a_state(counts: np.ndarray) -> bool:
    """Return whether a kernel stores five to a dozen words or more as it loads, each thread for itself."""
    loads, stores = (sum(counts[COLUMN[name]] for name in names) for names in (("LDG", "LD"), ("STG", "ST")))
    shared = sum(counts[COLUMN[name]] for name in ("LDS", "STS", "SHFL", "ATOMG", "ATOM", "RED", "REDG"))
    return bool(loads >= 5 and 6 <= stores <= 16 and stores >= loads and shared == 0)


def _share(counts: np.ndarray, *names: str) -> float:
    return float(sum(counts[COLUMN[name]] for name in names) / max(counts[0], 1.0))
