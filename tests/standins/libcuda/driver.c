/* STAND-IN, not NVIDIA's driver: it computes nothing. It gives programs of the CUDA driver API handles, accepts their
 * launches and counts them, so that what watches launches can be run on a machine without a GPU. Names, argument order
 * and structures are those of cuda.h 12; errors are CUresult values.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "exports.h"

#define API __attribute__((visibility("hidden"))) int

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, INVALID_IMAGE = 200, NOT_FOUND = 500 };

typedef struct { const void *image; } Module;
typedef struct { Module *module; char name[256]; } Function;
typedef struct { unsigned grid[3], block[3], shared; void *stream; void *attributes; unsigned count; } LaunchConfig;

static int initialised;
static uint64_t launches;

#define STUB_OF(name) extern char name[];
EXPORTS(STUB_OF)

static const struct { const char *name; void *address; } exports[] = {
#define ENTRY(name) {#name, name},
    EXPORTS(ENTRY)
};

/* As drivers do, cuInit loads the library that CUDA_INJECTION64_PATH names and calls its InitializeInjection. */
API standin_cuInit(unsigned flags) {
    const char *path = getenv("CUDA_INJECTION64_PATH");
    void *library = path && !initialised ? dlopen(path, RTLD_NOW) : NULL;
    int (*begin)(void) = library ? (int (*)(void))dlsym(library, "InitializeInjection") : NULL;
    initialised = 1;
    if (begin) begin();
    return flags ? INVALID_VALUE : SUCCESS;
}
API standin_cuDriverGetVersion(int *version) { *version = 12020; return SUCCESS; }
API standin_cuGetErrorName(int error, const char **text) {
    *text = error ? "CUDA_ERROR_UNKNOWN" : "CUDA_SUCCESS";
    return SUCCESS;
}
API standin_cuGetErrorString(int error, const char **text) {
    *text = error ? "unknown error" : "no error";
    return SUCCESS;
}

API standin_cuGetProcAddress_v2(const char *symbol, void **address, int version, uint64_t flags, int *status) {
    char wanted[128];
    (void)version;
    /* Flag 2 asks for the per-thread default stream twin; versioned names resolve to their newest. */
    const char *suffixes[] = {flags == 2 ? "_ptsz" : "", "_v2", ""};
    for (unsigned s = 0; s < 3; s++) {
        snprintf(wanted, sizeof wanted, "%s%s", symbol, suffixes[s]);
        for (unsigned i = 0; i < sizeof exports / sizeof *exports; i++)
            if (!strcmp(exports[i].name, wanted)) {
                *address = exports[i].address;
                if (status) *status = 0;
                return SUCCESS;
            }
    }
    *address = NULL;
    if (status) *status = 1;
    return NOT_FOUND;
}
API standin_cuGetProcAddress(const char *symbol, void **address, int version, uint64_t flags) {
    return standin_cuGetProcAddress_v2(symbol, address, version, flags, NULL);
}

API standin_cuDeviceGetCount(int *count) { *count = 1; return initialised ? SUCCESS : NOT_INITIALIZED; }
API standin_cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal ? INVALID_VALUE : SUCCESS; }
API standin_cuDeviceGetName(char *name, int size, int device) {
    (void)device;
    snprintf(name, size, "GPUGuard stand-in GPU");
    return SUCCESS;
}
API standin_cuDeviceGetUuid(uint8_t *uuid, int device) { (void)device; memset(uuid, 0x5a, 16); return SUCCESS; }
API standin_cuDeviceGetUuid_v2(uint8_t *uuid, int device) { return standin_cuDeviceGetUuid(uuid, device); }
API standin_cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    /* CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT 16, COMPUTE_CAPABILITY_MAJOR 75, MINOR 76. */
    *value = attribute == 16 ? 132 : attribute == 75 ? 9 : attribute == 76 ? 0 : 1;
    return SUCCESS;
}
API standin_cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = (size_t)80 << 30; return SUCCESS; }
API standin_cuDeviceGetPCIBusId(char *id, int size, int device) {
    (void)device;
    snprintf(id, size, "0000:00:00.0");
    return SUCCESS;
}

static char context[1];
API standin_cuDevicePrimaryCtxRetain(void **ctx, int device) { (void)device; *ctx = context; return SUCCESS; }
API standin_cuDevicePrimaryCtxRelease_v2(int device) { (void)device; return SUCCESS; }
API standin_cuCtxCreate_v2(void **ctx, unsigned flags, int device) {
    (void)flags;
    (void)device;
    *ctx = context;
    return initialised ? SUCCESS : NOT_INITIALIZED;
}
API standin_cuCtxDestroy_v2(void *ctx) { (void)ctx; return SUCCESS; }
API standin_cuCtxSetCurrent(void *ctx) { (void)ctx; return SUCCESS; }
API standin_cuCtxGetCurrent(void **ctx) { *ctx = context; return SUCCESS; }
API standin_cuCtxSynchronize(void) { return SUCCESS; }

API standin_cuModuleLoadData(void **module, const void *image) {
    if (!image) return INVALID_IMAGE;
    Module *made = malloc(sizeof *made);
    made->image = image;
    *module = made;
    return SUCCESS;
}
API standin_cuModuleLoadDataEx(void **module, const void *image, unsigned count, void *options, void **values) {
    (void)count; (void)options; (void)values;
    return standin_cuModuleLoadData(module, image);
}
API standin_cuModuleLoadFatBinary(void **module, const void *image) { return standin_cuModuleLoadData(module, image); }
API standin_cuModuleLoad(void **module, const char *path) { (void)path; return standin_cuModuleLoadData(module, ""); }
API standin_cuModuleUnload(void *module) { free(module); return SUCCESS; }
API standin_cuModuleGetFunction(void **function, void *module, const char *name) {
    if (!name || strlen(name) >= sizeof ((Function *)0)->name) return NOT_FOUND;
    Function *made = calloc(1, sizeof *made);
    made->module = module;
    strcpy(made->name, name);
    *function = made;
    return SUCCESS;
}
API standin_cuModuleGetGlobal_v2(uint64_t *address, size_t *bytes, void *module, const char *name) {
    (void)module; (void)name;
    *address = 0; *bytes = 0;
    return NOT_FOUND;
}
API standin_cuLibraryLoadData(void **library, const void *code, void *jit, void **jit_values, unsigned jit_count,
                              void *options, void **values, unsigned count) {
    (void)jit; (void)jit_values; (void)jit_count; (void)options; (void)values; (void)count;
    return standin_cuModuleLoadData(library, code);
}
API standin_cuLibraryLoadFromFile(void **library, const char *path) { return standin_cuModuleLoad(library, path); }
API standin_cuLibraryUnload(void *library) { return standin_cuModuleUnload(library); }
API standin_cuLibraryGetKernel(void **kernel, void *library, const char *name) {
    return standin_cuModuleGetFunction(kernel, library, name);
}
API standin_cuFuncGetName(const char **name, void *function) { *name = ((Function *)function)->name; return SUCCESS; }
API standin_cuKernelGetName(const char **name, void *kernel) { return standin_cuFuncGetName(name, kernel); }
API standin_cuKernelGetFunction(void **function, void *kernel) {
    return standin_cuModuleGetFunction(function, ((Function *)kernel)->module, ((Function *)kernel)->name);
}

static int launched(void *function) {
    if (!function) return INVALID_VALUE;
    __atomic_add_fetch(&launches, 1, __ATOMIC_RELAXED);
    return SUCCESS;
}
#define LAUNCH_ARGUMENTS void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, \
                         unsigned shared, void *stream, void **parameters
#define UNUSED_ARGUMENTS \
    (void)gx, (void)gy, (void)gz, (void)bx, (void)by, (void)bz, (void)shared, (void)stream, (void)parameters
API standin_cuLaunchKernel(LAUNCH_ARGUMENTS, void **extra) { UNUSED_ARGUMENTS; (void)extra; return launched(function); }
API standin_cuLaunchKernel_ptsz(LAUNCH_ARGUMENTS, void **extra) {
    UNUSED_ARGUMENTS;
    (void)extra;
    return launched(function);
}
API standin_cuLaunchCooperativeKernel(LAUNCH_ARGUMENTS) { UNUSED_ARGUMENTS; return launched(function); }
API standin_cuLaunchCooperativeKernel_ptsz(LAUNCH_ARGUMENTS) { UNUSED_ARGUMENTS; return launched(function); }
API standin_cuLaunchKernelEx(const LaunchConfig *config, void *function, void **parameters, void **extra) {
    (void)parameters; (void)extra;
    return config ? launched(function) : INVALID_VALUE;
}
API standin_cuLaunchKernelEx_ptsz(const LaunchConfig *config, void *function, void **parameters, void **extra) {
    return standin_cuLaunchKernelEx(config, function, parameters, extra);
}
API standin_cuLaunchCooperativeKernelMultiDevice(void **list, unsigned count, unsigned flags) {
    (void)flags;
    return list && count ? launched(list[0]) : INVALID_VALUE;
}
API standin_cuLaunch(void *function) { return launched(function); }
API standin_cuLaunchGrid(void *function, int width, int height) {
    (void)width;
    (void)height;
    return launched(function);
}
API standin_cuLaunchGridAsync(void *function, int width, int height, void *stream) {
    (void)width;
    (void)height;
    (void)stream;
    return launched(function);
}
API standin_cuFuncSetBlockShape(void *function, int x, int y, int z) {
    (void)function;
    (void)x;
    (void)y;
    (void)z;
    return SUCCESS;
}

API standin_cuGraphCreate(void **graph, unsigned flags) { (void)flags; *graph = malloc(1); return SUCCESS; }
API standin_cuGraphInstantiateWithFlags(void **exec, void *graph, uint64_t flags) {
    (void)graph;
    (void)flags;
    *exec = malloc(1);
    return SUCCESS;
}
API standin_cuGraphAddKernelNode_v2(void **node, void *graph, void *on, size_t count, const void *parameters) {
    (void)on; (void)count; (void)parameters;
    *node = malloc(1);
    return graph ? SUCCESS : INVALID_VALUE;
}
API standin_cuGraphAddChildGraphNode(void **node, void *graph, void *on, size_t count, void *child) {
    (void)on; (void)count;
    *node = malloc(1);
    return graph && child ? SUCCESS : INVALID_VALUE;
}
API standin_cuGraphClone(void **clone, void *graph) { *clone = malloc(1); return graph ? SUCCESS : INVALID_VALUE; }
API standin_cuStreamBeginCapture_v2(void *stream, int mode) { (void)stream; (void)mode; return SUCCESS; }
static void *captured_into;
API standin_cuStreamBeginCaptureToGraph(void *stream, void *graph, const void *on, const void *edges, size_t count,
                                        int mode) {
    (void)stream; (void)on; (void)edges; (void)count; (void)mode;
    captured_into = graph;
    return SUCCESS;
}
API standin_cuStreamEndCapture(void *stream, void **graph) {
    (void)stream;
    *graph = captured_into ? captured_into : malloc(1);
    captured_into = NULL;
    return SUCCESS;
}
API standin_cuLinkComplete(void *state, void **image, size_t *bytes) {
    /* Here a linker's state is the finished image with its size before it. */
    *bytes = *(size_t *)state;
    *image = (char *)state + sizeof(size_t);
    return SUCCESS;
}
API standin_cuGraphLaunch(void *exec, void *stream) { (void)stream; return launched(exec); }
API standin_cuGraphLaunch_ptsz(void *exec, void *stream) { (void)stream; return launched(exec); }
API standin_cuGraphDestroy(void *graph) { free(graph); return SUCCESS; }

API standin_cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    static uint64_t next = (uint64_t)1 << 40;
    *address = next;
    next += bytes;
    return SUCCESS;
}
API standin_cuMemFree_v2(uint64_t address) { (void)address; return SUCCESS; }
API standin_cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes) {
    (void)to;
    (void)from;
    (void)bytes;
    return SUCCESS;
}
API standin_cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes) { (void)from; memset(to, 0, bytes); return SUCCESS; }
API standin_cuMemGetInfo_v2(size_t *left, size_t *total) {
    *left = (size_t)79 << 30;
    *total = (size_t)80 << 30;
    return SUCCESS;
}
API standin_cuStreamCreate(void **stream, unsigned flags) { (void)flags; *stream = malloc(1); return SUCCESS; }
API standin_cuStreamDestroy_v2(void *stream) { free(stream); return SUCCESS; }
API standin_cuStreamSynchronize(void *stream) { (void)stream; return SUCCESS; }
API standin_cuStreamSynchronize_ptsz(void *stream) { (void)stream; return SUCCESS; }
