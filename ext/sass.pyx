# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Machine code of Volta and later: one pass from bytes to counts, per kernel, window and innermost loop.

An instruction is 16 bytes, a little-endian pair (lo, hi): opcode lo[0:12], of which lo[9:12] is the form of the second
operand (2 and 4: a 32-bit immediate in lo[32:64]), Ra lo[24:32], Rc hi[0:8], truth table of LOP3 hi[8:16], offset of a
branch lo[34:64] and hi[0:18], followed from sm_90 on by lo[16:24]. What the 12 bits mean is told by the caller, per
architecture: this file knows shapes, `gpuguard/code/decode.py` knows names. `tests/reference_sass.py` is the same
written for the eye; the two must agree on every input.

The bytes are hostile. Nothing of them is used as an index without a bound; loops are kept disjoint, so that code made
of overlapping branches costs no more than any other; the hash of immediates has a random multiplier.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset

import os

import numpy as np

# What an opcode asks of the decoder beyond being counted; decode.py sets these bits.
cdef enum:
    IMMEDIATE = 1     # an integer instruction with a 32-bit immediate
    CONTROL = 2       # ends a straight run
    BRANCH = 4        # has a relative offset
    LOGIC = 8         # LOP3
    SHIFT = 16        # SHF
    PERMUTE = 32      # PRMT with an immediate selector
    MULTIPLY = 64     # IMAD
    UNKNOWN = 128

# The derived counts, in the order of decode.DERIVED.
cdef enum:
    ROT = 7
    PRMT_ROT = 8
    PRMT_SWAP = 9
    IMAD_MOV = 10
    IMM_BIG = 11
    N_CTRL = 12
    SUMMED = 13            # up to here a part's count is the sum over its instructions
    IMM_BIG_DISTINCT = 13
    MAXRUN = 14
    DISTINCT_OP = 15
    DERIVED = 16

cdef enum:
    BLOCK = 96             # a window is two blocks
    LOOP_MIN = 16
    KERNEL_MAX = 1 << 22   # 64 MiB of code: what the counts of its windows take is bounded by this
    RZ = 255

BLOCK_INSTRUCTIONS = BLOCK
LOOP_INSTRUCTIONS_MIN = LOOP_MIN
KERNEL_INSTRUCTIONS_MAX = KERNEL_MAX

# Where control flow breaks a straight run: enough to join neighbours.
cdef struct Run:
    uint32_t head          # from the start up to the first break, it included
    uint32_t best
    uint32_t tail          # after the last break
    uint8_t broken

cdef struct Span:
    uint32_t first
    uint32_t end

cdef struct Found:         # one immediate that counts, or that a known table has
    uint32_t at
    uint32_t word          # index into the distinct words


cdef inline uint64_t load(const uint8_t *at) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, at, 8)
    return value


cdef class Decoder:
    """The decoder of one architecture.

    `mnemonics` and `flags` have 4096 entries, `luts` 256; the last name is of what has none.
    """

    cdef uint32_t opcodes[4096]    # mnemonic << 8 | flags
    # What a truth table adds to 7 counters of 8 bits; the first half is for what is no LOP3 and adds nothing.
    cdef uint64_t luts[512]
    cdef uint8_t small[8192]  # low halves of the words near 0 that some table has
    cdef readonly int columns
    cdef int names
    cdef uint64_t seed
    # Of the code at hand.
    cdef Found *found
    cdef size_t found_count, found_room
    cdef uint32_t *words
    cdef uint32_t *stamps          # per word: the last part that has it
    cdef uint32_t stamp
    cdef size_t words_count, words_room
    cdef uint32_t *slots
    cdef size_t slots_mask
    cdef Span *loops
    cdef size_t loops_count, loops_room
    cdef int64_t innermost
    cdef bint failed, split_offset

    def __cinit__(self, const uint16_t[::1] mnemonics, const uint8_t[::1] flags, const uint8_t[::1] luts,
                  const uint16_t[::1] small, int names, bint split_offset):
        if mnemonics.shape[0] != 4096 or flags.shape[0] != 4096 or luts.shape[0] != 256 or names < 1:
            raise ValueError("tables of another size")
        cdef int i
        for i in range(4096):
            if mnemonics[i] >= names:
                raise ValueError("an opcode without a name")
            self.opcodes[i] = <uint32_t> mnemonics[i] << 8 | flags[i]
        for i in range(256):
            self.luts[i] = 0
            self.luts[256 + i] = <uint64_t> 1 << (8 * luts[i]) if luts[i] < ROT else 0
        memset(self.small, 0, sizeof(self.small))
        for i in range(small.shape[0]):
            self.small[small[i] >> 3] |= <uint8_t> (1 << (small[i] & 7))
        self.names = names
        self.split_offset = split_offset
        self.columns = names + DERIVED
        self.seed = int.from_bytes(os.urandom(8), "little") | 1

    def __dealloc__(self):
        self.forget()

    cdef void forget(self) noexcept:
        free(self.found)
        free(self.words)
        free(self.stamps)
        free(self.slots)
        free(self.loops)
        self.found = NULL
        self.words = self.stamps = self.slots = NULL
        self.loops = NULL
        self.found_room = self.words_room = self.loops_room = 0

    def decode(self, const uint8_t[::1] text, bint parts=True):
        """Return (instructions, kernel, windows, loops, spans, words, unknown) of one kernel's code.

        `instructions` is how many there are without the NOPs behind the end. `kernel` is uint32[columns], names then
        DERIVED; `windows` and `loops` are uint16[rows, columns], saturated, window i begins at instruction 96 i;
        `spans` is uint32[loops, 2], first instruction and length. `words` are the distinct immediates that are large
        or that a known table may have; `unknown` maps opcodes without a name to counts. Without `parts` windows and
        loops are empty.
        """
        if text.shape[0] % 16:
            raise ValueError(f"{text.shape[0]} bytes are no whole number of instructions")
        if text.shape[0] >> 4 > KERNEL_MAX:
            raise ValueError(f"{text.shape[0]} bytes are more code than a kernel may have")
        cdef const uint8_t *code = &text[0] if text.shape[0] else NULL
        cdef uint32_t n = <uint32_t> (text.shape[0] >> 4)
        while n and (load(code + 16 * <size_t> (n - 1)) & 0xFFF) == 0x918:
            n -= 1
        cdef size_t blocks = (n + BLOCK - 1) // BLOCK
        kernel = np.zeros(self.columns, np.uint32)
        windows = np.empty((max(1, blocks - 1) if parts and n else 0, self.columns), np.uint16)
        # Two blocks in 16 bits, a loop in 32.
        cdef uint32_t *sums = <uint32_t *> calloc(2 * self.columns, 4)
        cdef Run *runs = <Run *> calloc(max(1, blocks), sizeof(Run))
        cdef bint held = sums != NULL and runs != NULL and self.start()
        try:
            if held:
                held = self.straight(code, n, kernel, windows, sums, runs)
            if not held:
                raise MemoryError
            loops, spans = windows[:0], np.empty((0, 2), np.uint32)
            if parts:
                loops, spans = self.bodies(code, windows, sums, runs)
        finally:
            free(sums)
            free(runs)
        words = np.empty(self.words_count, np.uint32)
        cdef uint32_t[::1] word = words
        if self.words_count:
            memcpy(&word[0], self.words, 4 * self.words_count)
        return n, kernel, windows, loops, spans, words, self.unknown(code, n) if kernel[self.names - 1] else {}

    cdef bint straight(self, const uint8_t *code, uint32_t n, uint32_t[::1] kernel, uint16_t[:, ::1] windows,
                       uint32_t *sums, Run *runs) except -1:
        """Count the kernel and its windows; False when memory ended."""
        cdef size_t size = self.columns
        cdef uint16_t *old = <uint16_t *> sums
        cdef uint16_t *new = old + size
        cdef uint16_t *swap
        cdef uint16_t *window
        cdef uint32_t first = 0, end, begin
        cdef Run whole = Run(0, 0, 0, 0), run = whole, before = whole
        with nogil:
            while first < n:
                end = min(first + BLOCK, n)
                swap = old
                old = new
                new = swap
                before = run
                memset(new, 0, 2 * size)
                self.scan(code, first, end, new, &run, True)
                self.add(&kernel[0], new)
                runs[first // BLOCK] = run
                whole = joined(whole, run)
                # A window is a block and the one after it; code of one block is a window too.
                if windows.shape[0] and (first or end == n):
                    begin = first - BLOCK if first else 0
                    window = &windows[begin // BLOCK, 0]
                    window[self.names + DISTINCT_OP] = self.pair(window, old, new)
                    window[self.names + IMM_BIG_DISTINCT] = <uint16_t> self.distinct(begin, end)
                    window[self.names + MAXRUN] = <uint16_t> longest(joined(before, run))
                first = end
            if n:
                self.finish(&kernel[0], whole, 0, n)
        return not self.failed

    cdef tuple bodies(self, const uint8_t *code, uint16_t[:, ::1] windows, uint32_t *sums, const Run *runs):
        """Return the counts of the innermost loops, and where they are."""
        loops = np.empty((self.loops_count, self.columns), np.uint16)
        spans = np.empty((self.loops_count, 2), np.uint32)
        cdef uint16_t[:, ::1] count = loops
        cdef uint32_t[:, ::1] span = spans
        cdef uint16_t *block = <uint16_t *> (sums + self.columns)
        cdef uint32_t at, end, until
        cdef Run run, more
        cdef size_t i
        with nogil:
            for i in range(self.loops_count):
                at = self.loops[i].first
                end = self.loops[i].end
                span[i, 0] = at
                span[i, 1] = end - at
                memset(sums, 0, 4 * <size_t> self.columns)
                run = Run(0, 0, 0, 0)
                while at < end:
                    if at % BLOCK == 0 and at + 2 * BLOCK <= end:
                        # Two whole blocks are a window, which is counted already.
                        self.add(sums, &windows[at // BLOCK, 0])
                        run = joined(joined(run, runs[at // BLOCK]), runs[at // BLOCK + 1])
                        at += 2 * BLOCK
                        continue
                    until = min(end, (at // BLOCK + 1) * BLOCK)
                    memset(block, 0, 2 * <size_t> self.columns)
                    self.scan(code, at, until, block, &more, False)
                    self.add(sums, block)
                    run = joined(run, more)
                    at = until
                self.finish(sums, run, span[i, 0], end)
                self.narrow(&count[i, 0], sums)
        return loops, spans

    cdef dict unknown(self, const uint8_t *code, uint32_t n):
        cdef uint32_t seen[4096]
        cdef uint32_t i, opcode
        memset(seen, 0, sizeof(seen))
        with nogil:
            for i in range(n):
                opcode = <uint32_t> (load(code + 16 * <size_t> i) & 0xFFF)
                if self.opcodes[opcode] & UNKNOWN:
                    seen[opcode] += 1
        return {opcode: seen[opcode] for opcode in range(4096) if seen[opcode]}

    cdef bint start(self) noexcept nogil:
        """Forget the code before, keep its memory; False when there is none."""
        self.found_count = self.words_count = self.loops_count = 0
        self.stamp = 0
        self.innermost = -1
        self.failed = False
        if self.slots == NULL:
            self.slots_mask = 1023
            self.slots = <uint32_t *> malloc(4 * (self.slots_mask + 1))
            if self.slots == NULL:
                return False
        memset(self.slots, 0, 4 * (self.slots_mask + 1))
        return True

    cdef void add(self, uint32_t *to, const uint16_t *what) noexcept nogil:
        cdef int i
        for i in range(self.names + SUMMED):
            to[i] += what[i]

    cdef uint16_t pair(self, uint16_t *to, const uint16_t *one, const uint16_t *other) noexcept nogil:
        """Add two blocks; return how many mnemonics they have."""
        cdef int i
        cdef uint16_t different = 0
        for i in range(self.names + SUMMED):
            to[i] = <uint16_t> (one[i] + other[i])
        for i in range(self.names):
            different = <uint16_t> (different + (to[i] != 0))
        return different

    cdef void narrow(self, uint16_t *to, const uint32_t *what) noexcept nogil:
        cdef int i
        for i in range(self.columns):
            to[i] = <uint16_t> min(what[i], 65535U)

    cdef void scan(self, const uint8_t *code, uint32_t first, uint32_t end, uint16_t *counts, Run *run,
                   bint note) noexcept nogil:
        """Count up to BLOCK instructions, [first, end); with `note` their immediates and loops are kept too.

        What one instruction is cannot be predicted from the one before, and a wrong guess costs as much as ten
        instructions. So what is common is arithmetic on every instruction, and only what is rare is a branch.
        """
        cdef uint16_t *derived = counts + self.names
        cdef uint32_t i, kind, word, big, near, ends, straight = 0, best = 0, head = 0, broken = 0
        cdef uint32_t rotations = 0, moves = 0, large = 0, breaks = 0, ra, rc
        cdef uint64_t lo, hi, logic = 0
        for i in range(first, end):
            lo = load(code + 16 * <size_t> i)
            hi = load(code + 16 * <size_t> i + 8)
            kind = self.opcodes[lo & 0xFFF]
            counts[kind >> 8] += 1
            logic += self.luts[(kind & LOGIC) << 5 | (hi >> 8) & 255]
            ra = (lo >> 24) & 255
            rc = hi & 255
            rotations += (kind >> 4) & (ra == rc) & (rc != RZ)
            moves += (kind >> 6) & (ra == RZ)
            word = <uint32_t> (lo >> 32)
            big = kind & is_big(word)
            large += big
            near = kind & (self.small[(word & 0xFFFF) >> 3] >> (word & 7))
            if note and (big | near) & 1:
                self.keep(i, word)
            straight += 1
            ends = (kind >> 1) & 1
            breaks += ends
            best = max(best, straight)
            head = head if broken else straight
            broken |= ends
            straight = straight & (ends - 1)
            if kind & (PERMUTE | BRANCH):
                if kind & PERMUTE:
                    derived[PRMT_SWAP] += word == 0x0123
                    derived[PRMT_ROT] += is_byte_rotation(word)
                elif note:
                    self.branch(i, lo, hi)
        for i in range(ROT):
            derived[i] += <uint16_t> (logic >> (8 * i) & 255)
        derived[ROT] += <uint16_t> rotations
        derived[IMAD_MOV] += <uint16_t> moves
        derived[IMM_BIG] += <uint16_t> large
        derived[N_CTRL] += <uint16_t> breaks
        run[0] = Run(head, best, straight, <uint8_t> broken)

    cdef void keep(self, uint32_t at, uint32_t word) noexcept nogil:
        """Note a word, and give it a number when it is new."""
        cdef size_t slot = <size_t> ((word * self.seed) >> 32) & self.slots_mask
        cdef size_t room
        cdef void *grown
        while self.slots[slot] and self.words[self.slots[slot] - 1] != word:
            slot = (slot + 1) & self.slots_mask
        if self.slots[slot] == 0:
            if self.words_count == self.words_room:
                room = max(256, 2 * self.words_room)
                grown = realloc(self.words, 4 * room)
                if grown == NULL:
                    self.failed = True
                    return
                self.words = <uint32_t *> grown
                grown = realloc(self.stamps, 4 * room)
                if grown == NULL:
                    self.failed = True
                    return
                self.stamps = <uint32_t *> grown
                self.words_room = room
            self.words[self.words_count] = word
            self.stamps[self.words_count] = 0
            self.words_count += 1
            self.slots[slot] = <uint32_t> self.words_count
        if self.found_count == self.found_room:
            room = max(1024, 2 * self.found_room)
            grown = realloc(self.found, sizeof(Found) * room)
            if grown == NULL:
                self.failed = True
                return
            self.found = <Found *> grown
            self.found_room = room
        self.found[self.found_count] = Found(at, self.slots[slot] - 1)
        self.found_count += 1
        if 2 * self.words_count > self.slots_mask:
            self.rehash()

    cdef void rehash(self) noexcept nogil:
        cdef size_t mask = 2 * self.slots_mask + 1, i, slot
        cdef uint32_t *slots = <uint32_t *> calloc(mask + 1, 4)
        if slots == NULL:
            self.failed = True
            return
        for i in range(self.words_count):
            slot = <size_t> ((self.words[i] * self.seed) >> 32) & mask
            while slots[slot]:
                slot = (slot + 1) & mask
            slots[slot] = <uint32_t> i + 1
        free(self.slots)
        self.slots = slots
        self.slots_mask = mask

    cdef void branch(self, uint32_t at, uint64_t lo, uint64_t hi) noexcept nogil:
        """Keep [target, branch] if it is an innermost loop.

        Branches come in order of their address, so a loop is innermost when no target so far lies behind its own. Two
        branches to one target are one loop, and so are two that overlap without nesting.
        """
        # Counted in units of 4 bytes from the next instruction, 48 bits wide. From sm_90 on 8 more stand apart.
        cdef int64_t offset = <int64_t> (((hi & 0x3FFFF) << 30 | lo >> 34) << 16) >> 16
        cdef int64_t target
        cdef size_t room
        cdef void *grown
        if offset >= 0:
            return
        if self.split_offset:
            if offset < -KERNEL_MAX:
                return
            offset = offset * 256 + <int64_t> ((lo >> 16) & 255)
        if offset & 3:
            return
        target = <int64_t> at + 1 + (offset >> 2)
        # A tiny loop is none: it says nothing, and must not hide the one around it.
        if target < 0 or target < self.innermost or at + 1 - target < LOOP_MIN:
            return
        if self.loops_count and target < self.loops[self.loops_count - 1].end:
            self.loops[self.loops_count - 1].end = at + 1
            self.innermost = max(target, self.innermost)
            return
        if self.loops_count == self.loops_room:
            room = max(64, 2 * self.loops_room)
            grown = realloc(self.loops, sizeof(Span) * room)
            if grown == NULL:
                self.failed = True
                return
            self.loops = <Span *> grown
            self.loops_room = room
        self.loops[self.loops_count] = Span(<uint32_t> target, at + 1)
        self.loops_count += 1
        self.innermost = target

    cdef void finish(self, uint32_t *counts, Run run, uint32_t first, uint32_t end) noexcept nogil:
        """Fill in what is no sum: distinct immediates, longest run, distinct mnemonics."""
        cdef uint32_t different = 0
        cdef int i
        for i in range(self.names):
            different += counts[i] != 0
        counts[self.names + IMM_BIG_DISTINCT] = self.distinct(first, end)
        counts[self.names + MAXRUN] = longest(run)
        counts[self.names + DISTINCT_OP] = different

    cdef uint32_t distinct(self, uint32_t first, uint32_t end) noexcept nogil:
        """Return how many different large immediates there are in [first, end)."""
        cdef uint32_t distinct = 0, word
        cdef size_t low = 0, high = self.found_count, middle
        self.stamp += 1
        while low < high:
            middle = (low + high) // 2
            if self.found[middle].at < first:
                low = middle + 1
            else:
                high = middle
        while low < self.found_count and self.found[low].at < end:
            word = self.found[low].word
            if self.stamps[word] != self.stamp:
                self.stamps[word] = self.stamp
                distinct += is_big(self.words[word])
            low += 1
        return distinct


cdef inline uint32_t longest(Run run) noexcept nogil:
    return max(run.best, max(run.head, run.tail))


cdef inline bint is_big(uint32_t word) noexcept nogil:
    """Whether a word is far from 0 on either side: what is near is an offset or a mask, as -4 or 0xffff0000."""
    return word - 0x10000U < 0xFFFE0000U


cdef inline uint32_t is_byte_rotation(uint32_t selector) noexcept nogil:
    """Whether PRMT takes four bytes in a row of its eight, or of its first four, and turns them."""
    return (selector == 0x0321 or selector == 0x1032 or selector == 0x2103 or selector == 0x4321
            or selector == 0x5432 or selector == 0x6543)


cdef inline Run joined(Run one, Run other) noexcept nogil:
    """Two neighbours as one."""
    cdef uint32_t across = one.tail + other.head
    if not one.broken and not other.broken:
        return Run(across, across, across, 0)
    if not one.broken:
        return Run(across, other.best, other.tail, 1)
    if not other.broken:
        return Run(one.head, one.best, across, 1)
    return Run(one.head, max(max(one.best, other.best), across), other.tail, 1)


def known_words(const uint32_t[::1] words, const uint32_t[::1] every, const uint8_t[::1] low):
    """Return which of ``every``, in order, are among ``words``: their indexes, in order.

    ``low`` has a bit for the lower half of each of ``every``: 8,192 bytes that turn most words away.
    """
    if low.shape[0] != 8192:
        raise ValueError("a table of another size")
    cdef Py_ssize_t i, below, above, middle, hits = 0, count = every.shape[0]
    cdef uint32_t word, half
    cdef uint8_t *seen = <uint8_t *> calloc(max(1, count), 1)
    if seen == NULL:
        raise MemoryError
    with nogil:
        for i in range(words.shape[0]):
            word = words[i]
            half = word & 0xFFFF
            if not (low[half >> 3] >> (half & 7)) & 1:
                continue
            below = 0
            above = count
            while below < above:
                middle = (below + above) // 2
                if every[middle] < word:
                    below = middle + 1
                else:
                    above = middle
            if below < count and every[below] == word:
                hits += seen[below] == 0
                seen[below] = 1
    found = np.empty(hits, np.int64)
    cdef int64_t[::1] at = found
    hits = 0
    for i in range(count):
        if seen[i]:
            at[hits] = i
            hits += 1
    free(seen)
    return found


cdef inline uint8_t digit(uint8_t letter) noexcept nogil:
    """Return the value of a hexadecimal digit, 16 for anything else."""
    if 48 <= letter <= 57:
        return letter - 48
    letter |= 32
    return letter - 87 if 97 <= letter <= 102 else 16


def literals(const uint8_t[::1] text):
    """Return the numbers of a text from 4,096 on, in order, as uint32 words: of one above 32 bits both halves.

    A number is a run of decimal digits, or of hexadecimal ones behind "0x"; a minus before it counts. Longer ones than
    64 bits are cut to these.
    """
    cdef Py_ssize_t i = 0, n = text.shape[0], size = 0, room = 1024
    cdef uint32_t *words = <uint32_t *> malloc(4 * room)
    cdef void *grown
    cdef uint64_t value, base
    cdef uint32_t high
    cdef bint negative, failed = False
    if words == NULL:
        raise MemoryError
    with nogil:
        while i < n:
            if text[i] < 48 or text[i] > 57:
                i += 1
                continue
            negative = i > 0 and text[i - 1] == 45
            base = 10
            if text[i] == 48 and i + 2 < n and text[i + 1] | 32 == 120 and digit(text[i + 2]) < 16:
                base = 16
                i += 2
            value = 0
            while i < n and digit(text[i]) < base:
                value = value * base + digit(text[i])
                i += 1
            if value > 0xFFF and size + 2 > room:
                grown = realloc(words, 8 * room)
                failed = grown == NULL
                if failed:
                    break
                words = <uint32_t *> grown
                room *= 2
            if value > 0xFFF:
                if negative:
                    value = ~value + 1
                words[size] = <uint32_t> value
                size += 1
                high = <uint32_t> (value >> 32)
                if high and high != 0xFFFFFFFFU:
                    words[size] = high
                    size += 1
    if failed:
        free(words)
        raise MemoryError
    found = np.empty(size, np.uint32)
    cdef uint32_t[::1] out = found
    if size:
        memcpy(&out[0], words, 4 * size)
    free(words)
    return found


def plain_table(const uint8_t[::1] text, int width):
    """Return the numbers of a list as they lie in memory, little-endian, each of ``width`` bytes and cut to them.

    None where the text is more than decimal digits, commas and white space.
    """
    if width not in (1, 2, 4, 8):
        raise ValueError(f"numbers of {width} bytes")
    cdef Py_ssize_t i = 0, n = text.shape[0], size = 0
    cdef uint8_t *data = <uint8_t *> malloc(width * (n // 2 + 1))  # between two numbers stands something
    cdef uint64_t value
    cdef bint plain = True
    if data == NULL:
        raise MemoryError
    with nogil:
        while i < n:
            if text[i] < 48 or text[i] > 57:
                if text[i] != 44 and text[i] != 32 and not 9 <= text[i] <= 13:
                    plain = False
                    break
                i += 1
                continue
            value = 0
            while i < n and 48 <= text[i] <= 57:
                value = value * 10 + (text[i] - 48)
                i += 1
            memcpy(data + size, &value, width)
            size += width
    try:
        return (<char *> data)[:size] if plain else None
    finally:
        free(data)
