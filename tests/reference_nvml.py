"""What `ext/nvml.pyx` does, written for the eye: the calls of a round by ctypes, one after the other."""

from __future__ import annotations

import ctypes
import struct
import time

FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_uint64] * 4)
SCRATCH_BYTES = 1 << 16


class Calls:
    def __init__(self, turns):
        self.turns = turns

    def make(self, turn):
        """Return the row of one round, and every code in it."""
        blank, calls = self.turns[turn & 1]
        row, codes = bytearray(blank), []
        row[:8] = struct.pack("<q", time.monotonic_ns())
        for index, (address, arguments, place, offset, size, needs) in enumerate(calls):
            if needs >= 0 and codes[needs] != 0:
                codes.append(struct.unpack_from("<q", row, 8 * (1 + index))[0])
                continue
            scratch = ctypes.create_string_buffer(bytes(row[offset : offset + size]), SCRATCH_BYTES)
            given = [*arguments, 0, 0, 0, 0][:4]
            if place >= 0:
                given[place] = ctypes.addressof(scratch)
            codes.append(FUNCTION(address)(*given))
            if place >= 0:
                row[offset : offset + size] = scratch.raw[:size]
            row[8 * (1 + index) : 8 * (2 + index)] = struct.pack("<q", codes[-1])
        return bytes(row), codes


class Rounds:
    def __init__(self, gone):
        self.gone = set(gone)
        self.stopped = False

    def stop(self):
        self.stopped = True

    def run(self, devices, turns, rounds, first_ns, period_ns, until_ns):
        made, lost, next_ns = [], set(), first_ns
        while len(made) < rounds and next_ns <= until_ns and not self.stopped:
            time.sleep(max(0, next_ns - time.monotonic_ns()) / 1e9)
            next_ns = max(next_ns, time.monotonic_ns()) + period_ns
            rows = []
            for at, device in enumerate(devices):
                if at in lost:
                    rows.append(b"")
                    continue
                row, codes = device.make(turns[at] + len(made))
                rows.append(row)
                if self.gone & set(codes):
                    lost.add(at)
            made.append(rows)
        return made
