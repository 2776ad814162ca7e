"""Recorded counters as the records of the sensor: CSV, gzipped or not, and Parquet; any subset of columns, any rate.

Columns are known by the names that DCGM exports, nvidia-smi and the public sets use; a column that is not known is
passed over, one that is missing is not told. Everything here may be hostile: rows, devices and bytes are bounded, what
is no number is missing, and a ratio outside 0..1 is no ratio.
"""

from __future__ import annotations

import math
from array import array
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpuguard.core.records import Device, DeviceSample, Gpm
from gpuguard.counters.table import COLUMNS_MAX, Table, Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SECOND_NS = 1_000_000_000
ROWS_MAX = 20_000_000
#: Numbers held at once, of 8 bytes each: a day of 8 GPUs at 10 Hz with every column is 200 million.
VALUES_MAX = 250_000_000
DEVICES_MAX = 256
TEXT_MAX = 128
#: A row group of Parquet may be unpacked as a whole.
GROUP_BYTES_MAX = 2 * 1024**3
#: Rows that become records at once: the objects of all would be several times what is read.
ROWS_AT_ONCE = 8_192
TIME_NS_MAX = 6.3e18

#: Fields of DCGM, as dcgm-exporter writes them: what each holds, what to multiply by, and its names, of which the last
#: is that of DCGM 4.6 and later where they were renamed (dcgm_fields.py).
_DCGM: tuple[tuple[str, float, *tuple[str, ...]], ...] = (
    ("power_w", 1, "dev_power_usage", "dev_board_power_watts"),
    ("power_limit_w", 1, "dev_enforced_power_limit", "dev_board_power_limit_enforced_watts"),
    ("energy_j", 1e-3, "dev_total_energy_consumption"),
    ("temperature_c", 1, "dev_gpu_temp", "dev_gpu_temp_celsius"),
    ("gpu_ratio", 0.01, "dev_gpu_util", "dev_gpu_util_ratio"),
    ("gpu_ratio", 1, "prof_gr_engine_active", "prof_gr_engine_util_ratio"),
    ("memory_ratio", 0.01, "dev_mem_copy_util"),
    ("memory_used_bytes", 2**20, "dev_fb_used"),
    ("memory_bytes", 2**20, "dev_fb_total"),
    ("memory_free_bytes", 2**20, "dev_fb_free"),
    ("memory_reserved_bytes", 2**20, "dev_fb_reserved"),
    ("sm_clock_hz", 1e6, "dev_sm_clock"),
    ("memory_clock_hz", 1e6, "dev_mem_clock"),
    ("throttle_reasons", 1, "dev_clock_throttle_reasons", "dev_clocks_event_reasons"),
    ("pcie_tx_bytes_per_s", 1, "prof_pcie_tx_bytes"),
    ("pcie_rx_bytes_per_s", 1, "prof_pcie_rx_bytes"),
    ("nvlink_tx_bytes_per_s", 1, "prof_nvlink_tx_bytes"),
    ("nvlink_rx_bytes_per_s", 1, "prof_nvlink_rx_bytes"),
    ("sm_ratio", 1, "prof_sm_active", "prof_sm_util_ratio"),
    ("occupancy_ratio", 1, "prof_sm_occupancy", "prof_sm_occupancy_ratio"),
    ("integer_ratio", 1, "prof_pipe_int_active", "prof_int_util_ratio"),
    ("fp64_ratio", 1, "prof_pipe_fp64_active", "prof_fp64_util_ratio"),
    ("fp32_ratio", 1, "prof_pipe_fp32_active", "prof_fp32_util_ratio"),
    ("fp16_ratio", 1, "prof_pipe_fp16_active", "prof_fp16_util_ratio"),
    ("tensor_ratio", 1, "prof_pipe_tensor_active", "prof_tensor_util_ratio"),
    ("tensor_hmma_ratio", 1, "prof_pipe_tensor_hmma_active", "prof_hmma_util_ratio"),
    ("tensor_imma_ratio", 1, "prof_pipe_tensor_imma_active", "prof_imma_util_ratio"),
    ("dram_ratio", 1, "prof_dram_active", "prof_dram_util_ratio"),
)
#: What a column holds, by its name in lower case, without a unit in brackets: the field, and what to multiply by.
COLUMNS: dict[str, tuple[str, float]] = {
    "power_w": ("power_w", 1), "power_draw_w": ("power_w", 1), "power": ("power_w", 1), "average_power": ("power_w", 1),
    "power_limit_w": ("power_limit_w", 1), "energy_mj": ("energy_j", 1e-3),
    "temp_c": ("temperature_c", 1), "temperature_c": ("temperature_c", 1),
    "mem_used_mib": ("memory_used_bytes", 2**20), "memory_used_mib": ("memory_used_bytes", 2**20),
    "memory_used_bytes": ("memory_used_bytes", 1), "mem_total_mib": ("memory_bytes", 2**20),
    "memory_total_mib": ("memory_bytes", 2**20), "memory_bytes": ("memory_bytes", 1),
    "gpu_util_pct": ("gpu_ratio", 0.01), "utilization_gpu": ("gpu_ratio", 0.01), "gpu_ratio": ("gpu_ratio", 1),
    "mem_util_pct": ("memory_ratio", 0.01), "utilization_memory": ("memory_ratio", 0.01),
    "memory_ratio": ("memory_ratio", 1),
    "sm_clock_mhz": ("sm_clock_hz", 1e6), "memory_clock_mhz": ("memory_clock_hz", 1e6),
    "core_frequency": ("sm_clock_hz", 1e6), "memory_frequency": ("memory_clock_hz", 1e6),
    "pcie_tx_bytes_s": ("pcie_tx_bytes_per_s", 1), "pcie_rx_bytes_s": ("pcie_rx_bytes_per_s", 1),
    "nvlink_tx_bytes_s": ("nvlink_tx_bytes_per_s", 1), "nvlink_rx_bytes_s": ("nvlink_rx_bytes_per_s", 1),
    "throttle_reasons": ("throttle_reasons", 1),
    # nvidia-smi --query-gpu
    "power.draw": ("power_w", 1), "power.draw.instant": ("power_w", 1), "power.draw.average": ("power_w", 1),
    "power.limit": ("power_limit_w", 1), "enforced.power.limit": ("power_limit_w", 1),
    "temperature.gpu": ("temperature_c", 1),
    "memory.used": ("memory_used_bytes", 2**20), "memory.total": ("memory_bytes", 2**20),
    "memory.free": ("memory_free_bytes", 2**20), "memory.reserved": ("memory_reserved_bytes", 2**20),
    "utilization.gpu": ("gpu_ratio", 0.01), "utilization.memory": ("memory_ratio", 0.01),
    "clocks.sm": ("sm_clock_hz", 1e6), "clocks.current.sm": ("sm_clock_hz", 1e6),
    "clocks.mem": ("memory_clock_hz", 1e6), "clocks.current.memory": ("memory_clock_hz", 1e6),
    **{f"dcgm_fi_{name}": (field, scale) for field, scale, *names in _DCGM for name in names},
    **{name: (field, 1.0) for field, names in {
        "sm_ratio": ("sm_active", "sm_ratio", "smact"),
        "occupancy_ratio": ("sm_occupancy", "occupancy", "smocc"),
        "integer_ratio": ("int_active", "integer_active", "integer_ratio", "pipe_int_active"),
        "fp64_ratio": ("fp64_active", "fp64_ratio", "fp64a"),
        "fp32_ratio": ("fp32_active", "fp32_ratio", "fp32a"),
        "fp16_ratio": ("fp16_active", "fp16_ratio", "fp16a"),
        "tensor_ratio": ("tensor_active", "tensor_ratio", "tenso"),
        "tensor_hmma_ratio": ("hmma_active", "tensor_hmma_active", "tensor_hmma_ratio"),
        "tensor_imma_ratio": ("imma_active", "tensor_imma_active", "tensor_imma_ratio"),
        "dram_ratio": ("dram_active", "dram_ratio", "drama"),
    }.items() for name in names},
}
TIMES = ("timestamp", "time_ns", "time_s")
DEVICES = ("uuid", "gpu_uuid", "gpu", "device", "index")
MODELS = ("gpu_model", "gpu_name", "modelname", "name")
RATES = frozenset(("pcie_tx_bytes_per_s", "pcie_rx_bytes_per_s", "nvlink_tx_bytes_per_s", "nvlink_rx_bytes_per_s"))
WHOLE = RATES | {"memory_used_bytes", "sm_clock_hz", "memory_clock_hz", "throttle_reasons"}
#: A ratio that is a little above 1 was measured so.
RATIO_MAX = 1.05
GPM = frozenset(name for name in Gpm.__struct_fields__ if name.endswith("_ratio"))
#: What is asked of a board once, and is no counter.
LIMITS = ("power_limit_w", "memory_bytes", "memory_free_bytes", "memory_reserved_bytes")

#: Power limits that a file does not tell, by the words of what the driver calls the board: NVIDIA's data sheets.
POWER_LIMITS_W = {
    "B200": 1000.0, "H200": 700.0, "H200 NVL": 600.0, "H100 80GB HBM3": 700.0, "H100 PCIE": 350.0, "H100 NVL": 400.0,
    "A100 SXM4": 400.0, "A100 SXM 80GB": 400.0, "A100 PCIE 40GB": 250.0, "A100 PCIE 80GB": 300.0, "V100 SXM2": 300.0,
    "V100 PCIE": 250.0, "P100 SXM2": 300.0, "P100 PCIE": 250.0, "T4": 70.0, "A2": 60.0, "A10": 150.0, "A10G": 300.0,
    "A30": 165.0, "A40": 300.0, "L4": 72.0, "L40": 300.0, "L40S": 350.0, "RTX A6000": 300.0, "RTX 6000 ADA": 300.0,
    "RTX 3080": 320.0, "RTX 3090": 350.0, "RTX 4080": 320.0, "RTX 4090": 450.0, "RTX 5090": 575.0,
}
#: Boards of these words run at whatever their maker chose.
OTHER_LIMITS = {"LAPTOP", "MAX", "TI", "SUPER", "D"}


def power_limit_w(model: str) -> float | None:
    """Return the power limit that a board of this name is sold with, None where that is not known."""
    words = set(model.upper().replace("-", " ").split())
    fitting = [name for name in POWER_LIMITS_W if words.issuperset(name.split())]
    return POWER_LIMITS_W[max(fitting, key=len)] if fitting and words.isdisjoint(OTHER_LIMITS) else None


class Telemetry(NamedTuple):
    """Samples of all devices in order of time, by column: NaN is missing. ``device`` is an index into ``names``."""

    time_ns: np.ndarray
    device: np.ndarray
    names: list[str]
    models: list[str]
    fields: dict[str, np.ndarray]
    gaps: list[str]


def is_telemetry(columns: Sequence[str]) -> bool:
    """Return whether these look like columns of counters: two, or one and times."""
    known = [_plain(name) for name in columns]
    return sum(name in COLUMNS for name in known) + any(name in TIMES for name in known) >= 2


def _plain(column: str) -> str:
    """Return the name of a column in lower case, without the unit that nvidia-smi adds."""
    return column.partition(" [")[0].strip().lower()


def read_csv(table: Table) -> Telemetry:
    """Read counters from CSV. Raises Unreadable."""
    rows = _Rows(_wanted([_plain(name) for name in table.header]))
    for row in table.rows():
        if not rows.add(row):
            break
    return rows.telemetry(table.broken)


def read_parquet(raw: bytes) -> Telemetry:
    """Read counters from Parquet. Raises Unreadable, also where the extra is not installed."""
    try:
        from pyarrow import ArrowException, BufferReader, parquet
    except ImportError as error:
        raise Unreadable("Parquet needs the extra `parquet`: pip install 'gpuguard[parquet]'") from error
    try:
        schema = parquet.read_schema(BufferReader(raw))
        names = schema.names
        wanted = _wanted([_plain(name) for name in names])
        rows = _Rows(wanted._replace(at={at: i for i, at in enumerate(sorted(wanted.at))}))
        some = [names[at] for at in sorted(wanted.at)]
        if twice := [name for name in some if names.count(name) > 1]:
            raise Unreadable(f"two columns are named {twice[0]}")
        # A text that is written once and told in each row is also held once: as many of it may be more than any memory.
        file = parquet.ParquetFile(BufferReader(raw), read_dictionary=_texts(schema, some))
        groups = (file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
        if (most := max(groups, default=0)) > GROUP_BYTES_MAX:
            raise Unreadable(f"a row group of {most} bytes")
        for batch in file.iter_batches(batch_size=8192, columns=some):
            for row in zip(*map(_listed, batch.columns), strict=True):
                if not rows.add(["" if one is None else one for one in row]):
                    return rows.telemetry()
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise Unreadable(f"not a Parquet file that can be read: {str(error).strip()}") from error
    return rows.telemetry()


def _texts(schema: Any, some: Sequence[str]) -> list[str]:
    """Return which of the columns hold texts; raises Unreadable for one whose values are not single."""
    from pyarrow import types

    kinds = {name: schema.field(name).type for name in some}
    if nested := [name for name, kind in kinds.items() if types.is_nested(kind)]:
        raise Unreadable(f"the column {nested[0]} holds more than one value a row")
    return [name for name, kind in kinds.items() if any(is_text(kind) for is_text in (
        types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_dictionary))]


def _listed(column: Any) -> list[Any]:
    """Return the values of one column of a batch."""
    from pyarrow import timestamp, types

    if types.is_dictionary(column.type):
        values = column.dictionary.to_pylist()
        return [None if at is None else values[at] for at in column.indices.to_pylist()]
    if types.is_timestamp(column.type):  # nanoseconds are more than a datetime holds
        column = column.cast(timestamp("us", column.type.tz), safe=False)
    listed: list[Any] = column.to_pylist()
    return listed


class _Wanted(NamedTuple):
    """Where each column that is wanted stands; ``at`` also says where it is among those that are read."""

    time: int
    device: int | None
    model: int | None
    fields: tuple[tuple[int, str, float], ...]
    at: dict[int, int]


def _wanted(header: Sequence[str]) -> _Wanted:
    if len(header) > COLUMNS_MAX:
        raise Unreadable(f"{len(header)} columns")

    def first(names: Sequence[str]) -> int | None:
        return next((header.index(name) for name in names if name in header), None)

    time = first(TIMES)
    told: dict[str, tuple[int, str, float]] = {}
    for i, name in enumerate(header):
        if name in COLUMNS:
            told.setdefault(COLUMNS[name][0], (i, *COLUMNS[name]))
    shown = ", ".join(header[:8]) or "none"
    if time is None:
        raise Unreadable(f"no column of times ({' or '.join(TIMES)}) among {shown}")
    if not told.keys() - set(LIMITS):
        raise Unreadable(f"no counter among the columns {shown}")
    device, model = first(DEVICES), first(MODELS)
    used = [time, *(one for one in (device, model) if one is not None), *(one[0] for one in told.values())]
    return _Wanted(time, device, model, tuple(told.values()), {at: at for at in used})


class _Rows:
    """Rows as they come, put by in columns of numbers."""

    def __init__(self, wanted: _Wanted) -> None:
        at = wanted.at
        self._time = at[wanted.time]
        self._device = None if wanted.device is None else at[wanted.device]
        self._model = None if wanted.model is None else at[wanted.model]
        self._fields = [(at[i], name, scale) for i, name, scale in wanted.fields]
        self._width = max(at.values()) + 1
        self._times, self._devices = array("q"), array("H")
        self._columns = {name: array("d") for _, name, _ in self._fields}
        self._names: dict[str, int] = {}
        self._models: list[str] = []
        self._rows_max = min(ROWS_MAX, VALUES_MAX // len(self._columns))
        self._skipped = self._foreign = 0
        self._cut = False

    def add(self, row: Sequence[Any]) -> bool:
        """Take one row; return whether there is room for more."""
        time_ns = _time(row[self._time]) if len(row) >= self._width else None
        if time_ns is None:
            self._skipped += 1
            return True
        name = str(row[self._device])[:TEXT_MAX].strip() if self._device is not None else "0"
        index = self._names.get(name)
        if index is None:
            if len(self._names) >= DEVICES_MAX:
                self._foreign += 1
                return True
            index = self._names[name] = len(self._names)
            self._models.append(str(row[self._model])[:TEXT_MAX].strip() if self._model is not None else "")
        self._times.append(time_ns)
        self._devices.append(index)
        for at, field, scale in self._fields:
            self._columns[field].append(_number(row[at]) * scale)
        self._cut = len(self._times) >= self._rows_max
        return not self._cut

    def telemetry(self, broken: str = "") -> Telemetry:
        """Return everything in order of time; ``broken`` says why there is no more of it. Raises Unreadable."""
        if not self._times:
            raise Unreadable(broken or (f"no row with a time among {self._skipped}" if self._skipped else
                                        "no row but the header"))
        gaps = [text for text, said in (
            (f"{broken}; what comes after is left out", broken),
            (f"{self._skipped} rows that were cut short or have no usable time were left out", self._skipped),
            (f"{self._foreign} rows of devices beyond the first {DEVICES_MAX} were left out", self._foreign),
            (f"rows beyond the first {self._rows_max} were left out", self._cut)) if said]
        times = np.frombuffer(self._times, np.int64)
        devices = np.frombuffer(self._devices, np.uint16)
        order = np.argsort(times, kind="stable")
        if twice := _told_twice(times, devices):
            gaps.append(f"{twice} rows are of a device and a time that another row has, and are passed over")
        fields: dict[str, np.ndarray] = {}
        while self._columns:
            name, values = self._columns.popitem()
            fields[name] = np.frombuffer(values, np.float64)[order]
        if _percentages(fields):
            gaps.append("activities above 1 were read as per cent, and so were all of them")
            for name in fields.keys() & GPM:
                fields[name] /= 100
        told = {name for name, values in fields.items() if _plausible(name, values).any()}
        missing = [words for field, words in (
            ("sm_ratio", "SM activity"), ("integer_ratio", "the integer pipe"), ("fp32_ratio", "the FP32 pipe"),
            ("tensor_imma_ratio", "which tensor instructions"), ("pcie_rx_bytes_per_s", "PCIe"), ("power_w", "power"),
        ) if field not in told]
        if missing:
            gaps.append(f"not told: {', '.join(missing)}; what that would have shown weighs nothing")
        if not told & {"sm_ratio", "gpu_ratio"}:
            gaps.append("not told: whether anything ran at all (SM activity or GPU utilisation); nothing is judged")
        return Telemetry(times[order], devices[order], list(self._names), self._models,
                         fields, gaps)


def _told_twice(times: np.ndarray, devices: np.ndarray) -> int:
    """Return how many rows have the device and the time of another."""
    order = np.lexsort((times, devices))
    same = (np.diff(times[order]) == 0) & (np.diff(devices[order]) == 0)
    return int(same.sum())


def _number(value: Any) -> float:
    if isinstance(value, str) and value.endswith((" %", " W", " MiB", " MHz")):
        value = value.rpartition(" ")[0]
    try:
        number = float(value)
    except (ValueError, TypeError):
        return math.nan
    return number if abs(number) < 2**63 else math.nan


def _time(value: Any) -> int | None:
    """Return Unix nanoseconds of seconds, milli-, micro- or nanoseconds, told apart by their size, or of ISO 8601."""
    number = math.nan if isinstance(value, datetime) else _number(value)
    scale = next((scale for scale, above in ((1.0, 1e17), (1e3, 1e14), (1e6, 1e11)) if number > above), 1e9)
    if math.isnan(number):
        try:
            moment = value if isinstance(value, datetime) else datetime.fromisoformat(
                str(value)[:TEXT_MAX].strip().replace("/", "-"))
            number = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            return None
    # Two hundred years from 1970 on: what is added to a time is still one of 64 bits.
    return int(number * scale) if 0 <= number * scale < TIME_NS_MAX else None


def _percentages(fields: dict[str, np.ndarray]) -> bool:
    """Return whether activities, which are ratios, were written as per cent: most values of a pipe are above 1."""
    some = [values[(values > 0) & (values <= 100 * RATIO_MAX)] for name, values in fields.items() if name in GPM]
    return any(len(values) > 0 and float(np.median(values)) > RATIO_MAX for values in some)


def blocks_of(telemetry: Telemetry) -> Iterator[Device | DeviceSample]:
    """Yield what the sensor would have yielded: each device before its first sample."""
    known: set[int] = set()
    names = list(telemetry.fields)
    inside = {name: i for i, name in enumerate(names)}
    own = [(name, i) for name, i in inside.items() if name not in GPM and name not in LIMITS]
    gpm = [(name, i) for name, i in inside.items() if name in GPM]
    most = {name: _most(name) for name in names}
    for time_ns, device, row in _rows(telemetry, names):
        uuid = telemetry.names[device]
        if device not in known:
            known.add(device)
            yield _device(telemetry, device, uuid, time_ns)
        values = {name: int(row[i]) if name in WHOLE else row[i] for name, i in own if 0 <= row[i] <= most[name]}
        pipes = {name: row[i] for name, i in gpm if 0 <= row[i] <= RATIO_MAX}
        yield DeviceSample(time_ns, uuid, gpm=Gpm(period_ns=0, **pipes) if pipes else None, **values)


def _rows(telemetry: Telemetry, names: Sequence[str]) -> Iterator[tuple[int, int, tuple[Any, ...]]]:
    for begin in range(0, len(telemetry.time_ns), ROWS_AT_ONCE):
        some = slice(begin, begin + ROWS_AT_ONCE)
        columns = zip(*(telemetry.fields[name][some].tolist() for name in names), strict=True)
        yield from zip(telemetry.time_ns[some].tolist(), telemetry.device[some].tolist(), columns, strict=True)


def _most(name: str) -> float:
    return RATIO_MAX if name.endswith("_ratio") else 2.0**62


def _plausible(name: str, values: np.ndarray) -> np.ndarray:
    """Return which values can be one of this field."""
    good: np.ndarray = (values >= 0) & (values <= _most(name))
    return good


def _device(telemetry: Telemetry, device: int, uuid: str, time_ns: int) -> Device:
    of_it = telemetry.device == device
    model, memory = telemetry.models[device], _memory_bytes(telemetry.fields, of_it)
    limit_w = _first(telemetry.fields, of_it, "power_limit_w") or power_limit_w(model)
    return Device(time_ns, uuid, device, model, power_limit_w=limit_w,
                  memory_bytes=None if memory is None else int(memory))


def _memory_bytes(fields: dict[str, np.ndarray], of_it: np.ndarray) -> float | None:
    """Return how much memory a device has; DCGM's exporter tells what is used, free and, since 3.1, kept back."""
    whole = _first(fields, of_it, "memory_bytes")
    if whole is not None or not fields.keys() >= {"memory_used_bytes", "memory_free_bytes"}:
        return whole
    used, free = fields["memory_used_bytes"][of_it], fields["memory_free_bytes"][of_it]
    both = _plausible("memory_used_bytes", used) & _plausible("memory_free_bytes", free) & (used + free > 0)
    kept = _first(fields, of_it, "memory_reserved_bytes") or 0.0
    return float((used + free)[both][0]) + kept if both.any() else None


def _first(fields: dict[str, np.ndarray], of_it: np.ndarray, name: str) -> float | None:
    """Return the first value above 0 of a device that can be one, None where there is none."""
    values = fields[name][of_it] if name in fields else np.zeros(0)
    above = values[_plausible(name, values) & (values > 0)]
    return float(above[0]) if len(above) else None
