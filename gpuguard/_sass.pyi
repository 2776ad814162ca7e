import numpy as np
from numpy.typing import NDArray

BLOCK_INSTRUCTIONS: int
LOOP_INSTRUCTIONS_MIN: int
KERNEL_INSTRUCTIONS_MAX: int

class Decoder:
    """The decoder of one architecture.

    `mnemonics` and `flags` have 4096 entries, `luts` 256; the last name is of what has none.
    """

    columns: int
    def __init__(
        self, mnemonics: NDArray[np.uint16], flags: NDArray[np.uint8], luts: NDArray[np.uint8],
        small: NDArray[np.uint16], names: int, split_offset: bool,
    ) -> None: ...
    def decode(
        self, text: bytes | memoryview, parts: bool = True,
    ) -> tuple[
        int, NDArray[np.uint32], NDArray[np.uint16], NDArray[np.uint16], NDArray[np.uint32], NDArray[np.uint32],
        dict[int, int],
    ]:
        """Return (instructions, kernel, windows, loops, spans, words, unknown) of one kernel's code.

        `instructions` is how many there are without the NOPs behind the end. `kernel` is uint32[columns], names then
        DERIVED; `windows` and `loops` are uint16[rows, columns], saturated, window i begins at instruction 96 i;
        `spans` is uint32[loops, 2], first instruction and length. `words` are the distinct immediates that are large
        or that a known table may have; `unknown` maps opcodes without a name to counts. Without `parts` windows and
        loops are empty. Raise ValueError for a broken instruction and above KERNEL_INSTRUCTIONS_MAX.
        """

def known_words(words: NDArray[np.uint32], every: NDArray[np.uint32], low: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return which of ``every``, in order, are among ``words``: their indexes, in order.

    ``low`` has a bit for the lower half of each of ``every``: 8,192 bytes that turn most words away.
    """

def literals(text: bytes | memoryview) -> NDArray[np.uint32]:
    """Return the numbers of a text from 4,096 on, in order, as uint32 words: of one above 32 bits both halves.

    A number is a run of decimal digits, or of hexadecimal ones behind "0x"; a minus before it counts. Longer ones than
    64 bits are cut to these.
    """

def plain_table(text: bytes | memoryview, width: int) -> bytes | None:
    """Return the numbers of a list as they lie in memory, little-endian, each of ``width`` bytes and cut to them.

    None where the text is more than decimal digits, commas and white space. Raise ValueError for a width that is none.
    """
