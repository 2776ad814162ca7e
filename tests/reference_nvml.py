"""What `ext/nvml.pyx` does, written for the eye: the calls of a round by ctypes, and what their answers tell."""

from __future__ import annotations

import ctypes
import math
import struct
import time

from gpuguard.sensors.nvml.calls import FIELD, METRIC, METRICS_HEAD, WIDE

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

    def read(self, row):
        """Return when the device was asked, and of each call what it returned and answered."""
        _, calls = self.turns[0]
        time_ns, *codes = struct.unpack_from(f"<{1 + len(calls)}q", row)
        return time_ns, codes, [row[offset : offset + size] if place >= 0 else b""
                                for _, _, place, offset, size, _ in calls]


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


RATIOS, RATES, REQUESTS, COUNTS = range(4)
MIB, SECOND_NS = 1 << 20, 1_000_000_000


class Metrics:
    def __init__(self, tables, places):
        self.known = {one: (table, *known) for table, of in enumerate(tables) for one, known in of.items()}
        self.places = places

    def read(self, answer, period_ns):
        record = [period_ns] + [None] * (self.places - 1)
        for one, code, value in METRIC.iter_unpack(answer[METRICS_HEAD.size :]):
            if code or one not in self.known:
                continue
            table, place, highest = self.known[one]
            if not 0 <= value <= highest:  # NaN is neither above nor below anything
                continue
            if table == RATIOS:
                record[place] = value / 100 if value < 100 else 1.0
            elif table == REQUESTS:
                record[place] = value * SECOND_NS / period_ns
            else:
                record[place] = int(value * MIB) if table == RATES else int(value)
        return record


class FieldValues:
    def __init__(self, wanted):
        self.wanted = wanted
        self.before = [(0, 0)] * len(wanted)

    def take(self, answer, values):
        failed = {}
        for index, (_, _, time_us, _, kind, code, bits) in enumerate(FIELD.iter_unpack(answer)):
            what, name, unit, divisor = self.wanted[index]
            value = decode_value(kind, bits)
            if code:
                failed[what] = code
            elif value is None:
                values[name] = math.nan
            elif unit is None:
                values[name] = value / divisor
            else:
                before_us, before = self.before[index]
                self.before[index] = time_us, value
                # A counter that went back has wrapped or was reset: the difference says nothing.
                if 0 < before_us < time_us and value >= before:
                    values[name] = as_rate((value - before) / (time_us - before_us), unit)
        return failed


def as_rate(per_us, unit):
    if unit >= 1:
        rate = per_us * 1_000_000 * unit
        return int(rate) if math.isfinite(rate) else rate
    share = per_us / 1_000
    return 1.0 if 1 < share <= 1.05 else share


def decode_value(kind, bits):
    if kind in WIDE:
        return bits
    match kind:
        case 1:
            return bits & 0xFFFFFFFF
        case 0:
            number = struct.unpack("<d", bits.to_bytes(8, "little"))[0]
            return number if math.isfinite(number) else None
        case 4:
            return bits - (bits >> 63 << 64)
        case 5:
            return (bits & 0xFFFFFFFF) - ((bits >> 31 & 1) << 32)
        case 6:
            return bits & 0xFFFF
    return None
