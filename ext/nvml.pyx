# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Rounds of driver calls, made without the interpreter: ten looks a second at eight GPUs.

What is asked of a device at each tick is the same each time: a list of functions with their arguments, and a row of
memory that their answers are written to. So the list is written down once, in Python, and a second's worth of rounds is
made here on the sensor's own thread: it sleeps, calls and keeps the rows, and wakes nobody. What the rows tell is read
once a second (nvml_answers.pxi). `tests/reference_nvml.py` is the same written for the eye.

Why: of the 400 us that a round of eight devices took in Python, 50 were the calls; a core that has just woken takes
twice that for either, and each round woke a second thread besides.

Every function of NVML takes up to four numbers or pointers and returns an int. On x86-64 and arm64 such arguments go in
registers, and a function that takes fewer leaves the others alone: one signature calls them all.

Floor: the driver's own time, and one wake-up a round.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINTR
from libc.math cimport NAN, isfinite
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef extern from "<time.h>" nogil:
    int TIMER_ABSTIME
    int clock_nanosleep(int clock, int flags, const timespec *until, timespec *left)

cdef enum:
    ARGUMENTS = 4
    TURNS = 2
    CALLS_MAX = 64
    ROW_BYTES_MAX = 1 << 16
    SCRATCH_BYTES = 1 << 16
    DEVICES_MAX = 256
    ROUNDS_MAX = 64
    CODES = 64

cdef int64_t SECOND_NS = 1_000_000_000
ANSWER_BYTES_MAX = SCRATCH_BYTES

ctypedef int (*Function)(uint64_t, uint64_t, uint64_t, uint64_t) noexcept nogil

cdef struct Call:
    Function function
    uint64_t arguments[ARGUMENTS]
    int place           # which argument is the address of the answer, -1 for none
    int offset          # where in the row the answer is kept
    int size
    int needs           # the call that must have succeeded, -1 for none

cdef struct Device:
    Call *calls[TURNS]
    char *blanks[TURNS]
    Py_ssize_t row_bytes
    int count
    int first           # the turn that comes first
    int made            # how many rounds had a row of it
    bint gone


@cython.final
cdef class Calls:
    """What one device is asked in a round, in two turns that are taken one after the other.

    A turn is ``(blank, calls)``: the row before it is answered, and of each call its address, up to four arguments,
    which of them is to be the address of its answer (-1: none), where in the row that is and how long, and the call,
    counted from 0, without whose success it is not made (-1: none). Of a row the first 8 bytes become the time of the
    round, ns of CLOCK_MONOTONIC, and the next 8 for each call what it returned, all int64. Raises ValueError where that
    does not fit, OverflowError where an argument is no unsigned number of 64 bits.
    """

    cdef Call calls[TURNS][CALLS_MAX]
    cdef tuple blanks
    cdef readonly int count
    cdef readonly Py_ssize_t row_bytes

    def __init__(self, turns):
        if len(turns) != TURNS or len({(len(blank), len(calls)) for blank, calls in turns}) != 1:
            raise ValueError("two turns of the same shape are wanted")
        self.row_bytes, self.count = len(turns[0][0]), len(turns[0][1])
        if self.count > CALLS_MAX or not 8 * (1 + self.count) <= self.row_bytes <= ROW_BYTES_MAX:
            raise ValueError(f"{self.count} calls and a row of {self.row_bytes} bytes")
        self.blanks = tuple(bytes(blank) for blank, _ in turns)
        for turn in range(TURNS):
            for index in range(self.count):
                self.put(&self.calls[turn][index], index, turns[turn][1][index])

    cdef put(self, Call *call, int index, wanted):
        address, arguments, place, offset, size, needs = wanted
        if not address or len(arguments) > ARGUMENTS or not -1 <= place < len(arguments) or not -1 <= needs < index:
            raise ValueError(f"call {index} cannot be made: {wanted}")
        if place >= 0 and not 8 * (1 + self.count) <= offset <= offset + size <= self.row_bytes:
            raise ValueError(f"call {index} has its answer outside the row: {wanted}")
        call.function = <Function><size_t>address
        for at in range(ARGUMENTS):
            call.arguments[at] = arguments[at] if at < len(arguments) else 0
        call.place, call.offset, call.size, call.needs = place, offset, size, needs

    def read(self, bytes row):
        """Return when the device was asked, and of each call what it returned and what it answered, b"" for nothing.

        Raises ValueError for a row of another length.
        """
        cdef:
            const char *start = PyBytes_AS_STRING(row)
            const int64_t *head = <const int64_t *>start
            Call *call
        if len(row) != self.row_bytes:
            raise ValueError(f"a row of {len(row)} bytes, not {self.row_bytes}")
        codes, answers = [], []
        for index in range(self.count):
            call = &self.calls[0][index]
            codes.append(head[1 + index])
            answers.append(PyBytes_FromStringAndSize(start + call.offset, call.size) if call.place >= 0 else b"")
        return head[0], codes, answers


@cython.final
cdef class Rounds:
    """Makes rounds of calls. ``gone``: what a call returns of a device that is not to be asked again, each below 64.

    Answers are written to one piece of memory and then copied to their rows: a driver that knows a longer form of a
    struct than was asked for has room up to `ANSWER_BYTES_MAX`. One thread may `run` at a time.
    """

    cdef bint gone[CODES]
    cdef char scratch[SCRATCH_BYTES]
    cdef volatile bint stopped

    def __init__(self, gone):
        for code in gone:
            if not 0 <= code < CODES:
                raise ValueError(f"{code} is no code of a device that is gone")
            self.gone[code] = True

    def stop(self):
        """End a `run` of another thread before its next round, and every later one."""
        self.stopped = True

    def run(self, devices, turns, int rounds, int64_t first_ns, int64_t period_ns, int64_t until_ns):
        """Make up to ``rounds`` rounds, and return of each the row of every device, b"" where it was gone before.

        ``turns`` says which turn of each of ``devices`` comes first. The first round is at ``first_ns`` of
        CLOCK_MONOTONIC, each other no less than ``period_ns`` after the last, none begins after ``until_ns``. Raises
        ValueError and MemoryError.
        """
        cdef:
            int count = len(devices), made = 0, at
            Py_ssize_t size = 0
            Device asked[DEVICES_MAX]
            char *rows
            Calls calls
        devices = tuple(devices)  # each is needed to the end
        if count > DEVICES_MAX or len(turns) != count or not 0 <= rounds <= ROUNDS_MAX:
            raise ValueError(f"{rounds} rounds of {count} devices, {len(turns)} turns")
        for at in range(count):
            calls = devices[at]
            asked[at].row_bytes, asked[at].count, asked[at].first = calls.row_bytes, calls.count, turns[at] & 1
            asked[at].made, asked[at].gone = 0, False
            for turn in range(TURNS):
                asked[at].calls[turn], asked[at].blanks[turn] = calls.calls[turn], PyBytes_AS_STRING(calls.blanks[turn])
            size += calls.row_bytes
        rows = <char *>calloc(max(1, rounds * size), 1)
        if rows == NULL:
            raise MemoryError
        try:
            with nogil:
                made = self.make(asked, count, rows, rounds, first_ns, period_ns, until_ns)
            return [rows_of(asked, count, rows + at * size, at) for at in range(made)]
        finally:
            free(rows)

    cdef int make(self, Device *asked, int count, char *row, int rounds, int64_t first_ns, int64_t period_ns,
                  int64_t until_ns) noexcept nogil:
        """Return how many rounds were made."""
        cdef:
            int64_t next_ns = first_ns
            Device *one
            int made, at
        for made in range(rounds):
            if next_ns > until_ns or self.stopped:
                return made
            sleep_until(next_ns)
            if self.stopped:
                return made
            next_ns = max(next_ns, monotonic_ns()) + period_ns
            for at in range(count):
                one = &asked[at]
                if not one.gone:
                    one.gone = make_calls(one, (one.first + made) & 1, row, self.scratch, self.gone)
                    one.made = made + 1
                row += one.row_bytes
        return rounds


cdef bint make_calls(Device *one, int turn, char *row, char *scratch, const bint *gone) noexcept nogil:
    """Make the calls of one device into ``row``; return whether one of them told that it is gone."""
    cdef:
        Call *call
        int64_t *codes = <int64_t *>row
        uint64_t arguments[ARGUMENTS]
        bint lost = False
        int index, code
    memcpy(row, one.blanks[turn], one.row_bytes)
    codes[0] = monotonic_ns()
    for index in range(one.count):
        call = &one.calls[turn][index]
        if call.needs >= 0 and codes[1 + call.needs]:
            continue
        memcpy(arguments, call.arguments, sizeof(arguments))
        if call.place >= 0:
            memcpy(scratch, row + call.offset, call.size)
            arguments[call.place] = <uint64_t><size_t>scratch
        code = call.function(arguments[0], arguments[1], arguments[2], arguments[3])
        if call.place >= 0:
            memcpy(row + call.offset, scratch, call.size)
        codes[1 + index] = code
        lost |= 0 <= code < CODES and gone[code]
    return lost


cdef list rows_of(const Device *asked, int count, const char *rows, int made):
    """Return the row of each device in one round."""
    cdef:
        list found = []
        int at
    for at in range(count):
        found.append(PyBytes_FromStringAndSize(rows, asked[at].row_bytes) if made < asked[at].made else b"")
        rows += asked[at].row_bytes
    return found


cdef int64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec * SECOND_NS + now.tv_nsec


cdef void sleep_until(int64_t until_ns) noexcept nogil:
    cdef timespec until
    if until_ns <= monotonic_ns():
        return
    until.tv_sec, until.tv_nsec = until_ns // SECOND_NS, until_ns % SECOND_NS
    while clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR:
        pass


include "nvml_answers.pxi"
