# What a device answered, read into numbers: included by nvml.pyx. A second of eight devices looked at ten times is
# eighty rows of some thirty numbers each, and reading them was more than half of what the eye cost. Layouts are those
# of nvml.h; `gpuguard/sensors/nvml` says which metrics and fields there are and in which unit.
# `tests/reference_nvml.py` is the same written for the eye. Floor: the numbers as Python objects, and the two records
# that they are put into.

cdef enum:
    METRICS_HEAD_BYTES = 24     # of nvmlGpmMetricsGet_t
    METRIC_IDS = 1024
    FIELDS_MAX = 64

cdef enum Kind:
    NO_METRIC, RATIO, RATE, REQUESTS, COUNT

cdef struct Metric:         # nvmlGpmMetric_t
    uint32_t id
    uint32_t code
    double value
    uint64_t texts[3]

cdef struct FieldValue:     # nvmlFieldValue_t
    uint32_t id
    uint32_t scope
    int64_t time_us
    int64_t latency_us
    uint32_t kind
    uint32_t code
    uint64_t bits

cdef struct Known:
    Kind kind
    int place
    double highest

cdef double MIB = 1 << 20
#: A share of time may come out a little above 1: two clocks.
cdef double CAPPED_RATIO_MAX = 1.05


@cython.final
cdef class Metrics:
    """Reads the metrics of a GPM window into the fields of a record, in order.

    ``tables`` has four times {metric id: (place in the record, highest)}: of percentages, MiB a second, counts of the
    window, and counts. The record has ``places`` fields, the first the length of the window. Raises ValueError where
    that does not fit.
    """

    cdef Known known[METRIC_IDS]
    cdef int places

    def __init__(self, tables, int places):
        self.places = places
        for kind, table in enumerate(tables, start=1):
            for one, (place, highest) in table.items():
                if not 0 <= one < METRIC_IDS or not 0 < place < places or kind > COUNT:
                    raise ValueError(f"metric {one} has no place {place}")
                self.known[one] = Known(kind, place, highest)

    def read(self, bytes answer, int64_t period_ns):
        """Return the record of an nvmlGpmMetricsGet_t: ratios, bytes and requests a second, counts.

        None is what was not told, or is no measurement.
        """
        cdef:
            list record = [None] * self.places
            Py_ssize_t at = METRICS_HEAD_BYTES
            Metric metric
            Known *known
        record[0] = period_ns
        while at + <Py_ssize_t>sizeof(Metric) <= len(answer):
            memcpy(&metric, PyBytes_AS_STRING(answer) + at, sizeof(Metric))
            at += sizeof(Metric)
            if metric.code or metric.id >= METRIC_IDS:
                continue
            known = &self.known[metric.id]
            # NaN is neither above nor below anything.
            if known.kind == NO_METRIC or not 0 <= metric.value <= known.highest:
                continue
            if known.kind == RATIO:
                record[known.place] = metric.value / 100 if metric.value < 100 else 1.0
            elif known.kind == REQUESTS:
                record[known.place] = metric.value * SECOND_NS / period_ns
            else:
                record[known.place] = int(metric.value * MIB if known.kind == RATE else metric.value)
        return record


@cython.final
cdef class FieldValues:
    """Reads the field values of one device: levels as they are, counters as rates since they were read before.

    ``wanted`` has of each its words, the name of its value, what one count of a counter is (None for a level), and what
    to divide a level by.
    """

    cdef list wanted
    cdef list before
    cdef int64_t before_us[FIELDS_MAX]

    def __init__(self, wanted):
        self.wanted = [tuple(one) for one in wanted]
        if len(self.wanted) > FIELDS_MAX:
            raise ValueError(f"{len(self.wanted)} fields")
        self.before = [0] * len(self.wanted)

    def take(self, bytes answer, dict values):
        """Put what nvmlFieldValue_t tell into ``values``; return the nvmlReturn of what cannot be told, by its words.

        They are the first of what was wanted, or all. NaN is a number of no type that nvml.h knows.
        """
        cdef:
            dict failed = {}
            FieldValue field
            Py_ssize_t index, count = len(answer) // <Py_ssize_t>sizeof(FieldValue)
            tuple wanted
            object value, before
            int64_t before_us
        if count > len(self.wanted):
            raise ValueError(f"{count} fields were answered")
        for index in range(count):
            memcpy(&field, PyBytes_AS_STRING(answer) + index * sizeof(FieldValue), sizeof(FieldValue))
            wanted = <tuple>self.wanted[index]
            if field.code:
                failed[wanted[0]] = field.code
                continue
            value = decode_value(field.kind, field.bits)
            if value is None:
                values[wanted[1]] = NAN
            elif wanted[2] is None:
                values[wanted[1]] = value / wanted[3]
            else:
                before, before_us = self.before[index], self.before_us[index]
                self.before[index], self.before_us[index] = value, field.time_us
                # A counter that went back has wrapped or was reset: the difference says nothing.
                if 0 < before_us < field.time_us and value >= before:
                    values[wanted[1]] = as_rate((value - before) / (field.time_us - before_us), wanted[2])
        return failed


cpdef object as_rate(double per_us, double unit):
    """Return counts per microsecond in a unit a second: whole bytes, or where it is below 1 a share of time."""
    cdef double rate = per_us * 1_000_000 * unit, share = per_us / 1_000
    if unit >= 1:
        return int(rate) if isfinite(rate) else rate
    return 1.0 if 1 < share <= CAPPED_RATIO_MAX else share


cpdef object decode_value(uint32_t kind, uint64_t bits):
    """Return the member of nvmlValue_t that nvmlValueType_t names, None for a type or a number that is none."""
    cdef double number
    if kind == 2 or kind == 3:
        return bits
    if kind == 1:
        return <uint32_t>bits
    if kind == 0:
        memcpy(&number, &bits, sizeof(number))
        return number if isfinite(number) else None
    if kind == 4:
        return <int64_t>bits
    if kind == 5:
        return <int32_t>bits
    if kind == 6:
        return <uint16_t>bits
    return None


def beyond(dict values, dict highest):
    """Return the names of values that are not in 0 to the highest of that name; None is no value."""
    found = []
    for name, value in values.items():
        if value is not None and not 0 <= value <= highest[name]:
            found.append(name)
    return found
