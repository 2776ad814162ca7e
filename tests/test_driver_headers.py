"""Layouts, numbers and signatures that are written down here are those of nvml.h and cuda.h, as a compiler sees them.

Headers come with the toolkit and with NVIDIA's wheels (nvidia-nvml-dev, nvidia-cuda-runtime). They are looked for in
the folders that GPUGUARD_CUDA_INCLUDE names (separated by colons), the toolkit, and what `make check-ptx` installs.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from gpuguard.sensors.nvml import calls, fields, gpm

ROOT = Path(__file__).parent.parent
PLACES = [
    *filter(None, os.environ.get("GPUGUARD_CUDA_INCLUDE", "").split(":")),
    *(str(Path(os.environ[name], "include")) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)),
    "/usr/local/cuda/include", *map(str, sorted(ROOT.glob("build/ptx/lib*/python3*/site-packages/nvidia/*/include"))),
]

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def folders(header: str) -> list[str]:
    return sorted({place for place in PLACES if Path(place, header).exists()})


def each(header: str) -> pytest.MarkDecorator:
    found = folders(header)
    skip = pytest.mark.skip(reason=f"no {header} here: GPUGUARD_CUDA_INCLUDE may name a folder that has it")
    return pytest.mark.parametrize("include", found or [pytest.param("", marks=skip)])


def holds(include: str, header: str, text: str) -> None:
    """Assert that a C file compiles without a complaint."""
    told = subprocess.run(["cc", "-fsyntax-only", "-Wall", "-Werror", "-Wno-unused", "-Wno-deprecated-declarations",
                           f"-I{include}", "-xc", "-"], input=f"#include <stddef.h>\n#include <{header}>\n{text}",
                          capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr


def same(values: dict[str, int]) -> str:
    """Return C that compiles only where each expression has its value; a name that the header lacks is passed over."""
    return "\n".join(f'_Static_assert(({one}) == {value}LL, "{one}");' for one, value in values.items())


def laid_out(name: str, layout: struct.Struct, *members: str) -> dict[str, int]:
    """Return where the members of a C structure lie, as our form of it says: each that is unpacked has a name."""
    starts, at = [], 0
    for code in re.findall(r"\d+x|[A-Za-z]", layout.format.removeprefix("<")):
        if not code.endswith("x"):
            starts.append(at)
        at += struct.calcsize(f"<{code}")
    return {f"sizeof({name})": layout.size} | {
        f"offsetof({name}, {member})": at for member, at in zip(members, starts, strict=True)}


@each("nvml.h")
def test_structures_of_nvml(include):
    layouts = {
        **laid_out("nvmlFieldValue_t", calls.FIELD, "fieldId", "scopeId", "timestamp", "latencyUsec", "valueType",
                   "nvmlReturn", "value"),
        **laid_out("nvmlGpmMetric_t", calls.METRIC, "metricId", "nvmlReturn", "value"),
        **laid_out("nvmlProcessInfo_t", calls.PROCESS, "pid", "usedGpuMemory", "gpuInstanceId", "computeInstanceId"),
        **laid_out("nvmlProcessUtilizationSample_t", calls.USE, "pid", "timeStamp", "smUtil", "memUtil", "encUtil",
                   "decUtil"),
        **laid_out("nvmlAccountingStats_t", calls.ACCOUNT, "gpuUtilization", "memoryUtilization", "maxMemoryUsage",
                   "time", "startTime", "isRunning"),
        "offsetof(nvmlGpmMetricsGet_t, numMetrics)": 4, "offsetof(nvmlGpmMetricsGet_t, sample1)": 8,
        "offsetof(nvmlGpmMetricsGet_t, sample2)": 16,
        "offsetof(nvmlGpmMetricsGet_t, metrics)": calls.METRICS_HEAD.size,
        "sizeof(nvmlMemory_t)": 24, "sizeof(nvmlMemory_v2_t)": 40, "nvmlMemory_v2": fields.MEMORY_V2,
        "offsetof(nvmlMemory_v2_t, total)": 8, "offsetof(nvmlMemory_v2_t, used)": 32,
        "offsetof(nvmlMemory_t, used)": 16,
    }
    text = f'{same(layouts)}\n_Static_assert(sizeof(nvmlGpmMetricsGet_t) <= {calls.METRICS_BYTES}, "room");'
    holds(include, "nvml.h", text)


@each("nvml.h")
def test_numbers_of_nvml(include):
    """Ids that a header is too old for are no error of it: a driver of that age refuses them."""
    known = set(re.findall(r"\bNVML_\w+", Path(include, "nvml.h").read_text()))
    metrics = {
        1: "GRAPHICS_UTIL", 2: "SM_UTIL", 3: "SM_OCCUPANCY", 4: "INTEGER_UTIL", 5: "ANY_TENSOR_UTIL",
        6: "DFMA_TENSOR_UTIL", 7: "HMMA_TENSOR_UTIL", 8: "DMMA_TENSOR_UTIL", 9: "IMMA_TENSOR_UTIL", 10: "DRAM_BW_UTIL",
        11: "FP64_UTIL", 12: "FP32_UTIL", 13: "FP16_UTIL", 20: "PCIE_TX_PER_SEC", 21: "PCIE_RX_PER_SEC",
        60: "NVLINK_TOTAL_RX_PER_SEC", 61: "NVLINK_TOTAL_TX_PER_SEC", 172: "GR0_CTXSW_REQUESTS",
        174: "GR0_CTXSW_ACTIVE_PCT", 248: "SM_CYCLES_ELAPSED", 249: "SM_CYCLES_ACTIVE", 250: "MMA_CYCLES_ACTIVE",
        251: "DMMA_CYCLES_ACTIVE", 252: "HMMA_CYCLES_ACTIVE", 253: "IMMA_CYCLES_ACTIVE", 254: "DFMA_CYCLES_ACTIVE",
        257: "INTEGER_CYCLES_ACTIVE", 258: "FP64_CYCLES_ACTIVE", 259: "FP32_CYCLES_ACTIVE", 260: "FP16_CYCLES_ACTIVE",
    }
    assert set(metrics) == set(gpm.NAMES)
    wanted = {f"NVML_GPM_METRIC_{name}": one for one, name in metrics.items()}
    names = {"energy": "TOTAL_ENERGY_CONSUMPTION", "average power": "POWER_AVERAGE", "instant power": "POWER_INSTANT",
             "power cap counter": "PERF_POLICY_POWER", "PCIe bytes sent": "PCIE_COUNT_TX_BYTES",
             "PCIe bytes received": "PCIE_COUNT_RX_BYTES", "NVLink bytes sent": "NVLINK_THROUGHPUT_DATA_TX",
             "NVLink bytes received": "NVLINK_THROUGHPUT_DATA_RX", "memory temperature": "MEMORY_TEMP"}
    wanted |= {f"NVML_FI_DEV_{names[what]}": one for what, one, _, _ in fields.WANTED}
    errors = ("UNINITIALIZED", "INVALID_ARGUMENT", "NOT_SUPPORTED", "NO_PERMISSION", "NOT_FOUND", "INSUFFICIENT_SIZE",
              "DRIVER_NOT_LOADED", "LIBRARY_NOT_FOUND", "FUNCTION_NOT_FOUND", "GPU_IS_LOST", "RESET_REQUIRED",
              "LIB_RM_VERSION_MISMATCH", "ARGUMENT_VERSION_MISMATCH", "DEPRECATED")
    wanted |= {f"NVML_ERROR_{name}": getattr(calls, name) for name in errors}
    wanted |= {
        "NVML_FI_DEV_NVLINK_LINK_COUNT": fields.NVLINK_COUNT, "NVML_CLOCK_SM": fields.CLOCK_SM,
        "NVML_CLOCK_MEM": fields.CLOCK_MEMORY, "NVML_TEMPERATURE_GPU": fields.TEMPERATURE_GPU,
        "NVML_PCIE_UTIL_TX_BYTES": fields.PCIE_TX, "NVML_PCIE_UTIL_RX_BYTES": fields.PCIE_RX,
        "NVML_VALUE_TYPE_DOUBLE": 0, "NVML_VALUE_TYPE_UNSIGNED_INT": 1, "NVML_VALUE_TYPE_SIGNED_LONG_LONG": 4,
        "NVML_VALUE_TYPE_SIGNED_INT": 5, "NVML_VALUE_TYPE_UNSIGNED_SHORT": 6,
        "NVML_VALUE_TYPE_UNSIGNED_LONG": min(calls.WIDE), "NVML_VALUE_TYPE_UNSIGNED_LONG_LONG": max(calls.WIDE),
        "NVML_GPM_METRICS_GET_VERSION": calls.METRICS_VERSION,
    }
    assert len(known & set(wanted)) > 45
    text = same({name: value for name, value in wanted.items() if name in known})
    holds(include, "nvml.h", f'{text}\n_Static_assert(NVML_GPM_METRIC_MAX <= {calls.METRICS_MAX}, "room");')


#: As ext/bpf/launches.bpf.c and ext/inject/shim.c read the arguments of these calls.
SIGNATURES = """
static CUresult (*a)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,
                     void **, void **) = cuLaunchKernel;
static CUresult (*b)(const CUlaunchConfig *, CUfunction, void **, void **) = cuLaunchKernelEx;
static CUresult (*c)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,
                     void **) = cuLaunchCooperativeKernel;
static CUresult (*d)(CUgraphExec, CUstream) = cuGraphLaunch;
static CUresult (*e)(CUfunction *, CUmodule, const char *) = cuModuleGetFunction;
static CUresult (*f)(CUkernel *, CUlibrary, const char *) = cuLibraryGetKernel;
static CUresult (*g)(CUfunction *, CUkernel) = cuKernelGetFunction;
static CUresult (*h)(CUmodule *, const void *) = cuModuleLoadData;
static CUresult (*i)(CUmodule *, const char *) = cuModuleLoad;
static CUresult (*j)(CUlibrary *, const void *, CUjit_option *, void **, unsigned, CUlibraryOption *, void **,
                     unsigned) = cuLibraryLoadData;
static CUresult (*k)(CUlinkState, void **, size_t *) = cuLinkComplete;
static CUresult (*l)(CUgraphExec *, CUgraph, unsigned long long) = cuGraphInstantiate;
static CUresult (*m)(CUgraphExec *, CUgraph, CUDA_GRAPH_INSTANTIATE_PARAMS *) = cuGraphInstantiateWithParams;
static CUresult (*n)(CUstream, CUgraph *) = cuStreamEndCapture;
static CUresult (*o)(CUgraphNode *, CUgraph, const CUgraphNode *, size_t, CUgraph) = cuGraphAddChildGraphNode;
static CUresult (*p)(CUgraph *, CUgraph) = cuGraphClone;
"""
#: Not in the oldest headers, or in the newest by another name.
LATER = {
    "cuFuncGetName": "static CUresult (*q)(const char **, CUfunction) = cuFuncGetName;",
    "cuKernelGetName": "static CUresult (*r)(const char **, CUkernel) = cuKernelGetName;",
    "cuGraphAddNode_v2": """static CUresult (*s)(CUgraphNode *, CUgraph, const CUgraphNode *, const CUgraphEdgeData *,
                            size_t, CUgraphNodeParams *) = cuGraphAddNode_v2;""",
    "CUgraphNodeParams": '_Static_assert(offsetof(CUgraphNodeParams, type) == 0, "type");',
    "CUDA_LAUNCH_PARAMS": '_Static_assert(sizeof(CUDA_LAUNCH_PARAMS) == 56, "list");' + same({
        "offsetof(CUDA_LAUNCH_PARAMS, function)": 0, "offsetof(CUDA_LAUNCH_PARAMS, gridDimX)": 8,
        "offsetof(CUDA_LAUNCH_PARAMS, sharedMemBytes)": 32, "offsetof(CUDA_LAUNCH_PARAMS, hStream)": 40}),
}


@each("cuda.h")
def test_launches_of_cuda(include):
    known = set(re.findall(r"\bcu\w+|\bCU\w+", Path(include, "cuda.h").read_text()))
    layout = same({"offsetof(CUlaunchConfig, gridDimX)": 0, "offsetof(CUlaunchConfig, blockDimX)": 12,
                   "offsetof(CUlaunchConfig, blockDimZ)": 20, "offsetof(CUlaunchConfig, sharedMemBytes)": 24,
                   "CU_GRAPH_NODE_TYPE_KERNEL": 0, "CUDA_SUCCESS": 0})
    holds(include, "cuda.h", "\n".join([layout, SIGNATURES, *(text for name, text in LATER.items() if name in known)]))
