/*
 * A stand-in libnvidia-ml.so.1 for machines without a GPU: it plays a scripted device to the real pynvml and to nvitop.
 *
 * Signatures, struct layouts and return codes are those of NVIDIA's nvml.h as the nvidia-ml-py binding declares them.
 * Every other nvml* name that the binding knows is built as a weak symbol that answers NVML_ERROR_NOT_SUPPORTED (see
 * build.py); what is defined here overrides it. It measures nothing and is never used by the product.
 *
 * GPUGUARD_STANDIN_NVML_SCRIPT names the script, read again whenever the file changes. One statement a line, times in
 * seconds, '#' starts a comment:
 *
 *   driver 580.95.05                   driver version                 cuda 13000             CUDA version of the driver
 *   start 1760000000.5                 Unix time of second 0; without it, when the script was last written
 *   device 0 uuid GPU-1f memory_mib 81559 power_limit_w 700 sm_mhz_max 1980 loop_s 5 name NVIDIA H100 80GB HBM3
 *                                      further: architecture 9 gpm 1 nvlinks 18 sms 132 mig 1 virtualization 2
 *                                      accounting 1 power_max_w 700 power_default_w 700 part 900-21 vbios 96.00
 *   device 2 parent 0 gi 1 ci 0 uuid MIG-1 ...
 *                                      a MIG instance of device 0; those come after all boards
 *   cc 1                               confidential computing is on; devtools 1: its development mode too
 *   at 0 device 0 gpu 98 memory 30 used_mib 900 power_w 430 temperature 51 sm_mhz 1755 mem_mhz 2619 tx_kbs 10 rx_kbs 10
 *                                      holds from then on; what is not named stays; loop_s repeats the device's times
 *                                      further: power_now_w capped encoder decoder mem_temperature nvtx_kibs nvrx_kibs;
 *                                      in percent for GPM: sm occupancy integer tensor dfma hmma dmma imma dram fp64
 *                                      fp32 fp16; switches (context switches a second)
 *   process device 0 pid 123 used_mib 512 sm 97 memory 20 from 3 until 60
 *   process device 0 pid_file PATH ... every pid in the file (white space between them), read at each call
 *   process device 0 pid_env NAME  ... the pid in an environment variable
 *   not_supported nvmlDeviceGetPowerUsage [device 0]
 *   refuse nvmlGpmSampleGet no_permission [device 0]
 *                                      the same with another error; field_186 and gpm_172 name one field or metric,
 *                                      gpm_call_172 every call that asks for this metric among others
 *   garbage nvmlDeviceGetPowerUsage [device 0]
 *                                      success, and numbers that no device has
 *   fail 20 gpu_lost [device 0] [until 30]     or driver_dead, unknown, no_permission, timeout, mismatch
 *
 * GPUGUARD_STANDIN_NVML_CLOCK names a file with the second to play, read at each call: for tests without waiting.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, TIMEOUT = 10, FUNCTION_NOT_FOUND = 13, GPU_IS_LOST = 15,
    LIB_RM_VERSION_MISMATCH = 18, NO_DATA = 21, ARGUMENT_VERSION_MISMATCH = 25, UNKNOWN = 999,
    GARBAGE = 10000, /* not of nvml.h: success, with contents that make no sense */
};

enum { DEVICES = 16, SEGMENTS = 64, ENTRIES = 64, PIDS = 256, REFUSALS = 64, FAILURES = 16, SAMPLES = 2048 };

#define MIB (1024ULL * 1024ULL)
/* A driver keeps a short ring of samples by process; these two are its shape here. */
#define SAMPLE_US 200000ULL
#define SAMPLES_KEPT_US 5000000ULL
#define API __attribute__((visibility("default")))

typedef int nvmlReturn_t;
typedef struct device *nvmlDevice_t;

struct levels {
    double at, gpu, memory, used_mib, power_w, temperature, sm_mhz, mem_mhz, tx_kbs, rx_kbs, throttle;
    double power_now_w, capped, encoder, decoder, mem_temperature, nvtx_kibs, nvrx_kibs;
    double sm, occupancy, integer, tensor, dfma, hmma, dmma, imma, dram, fp64, fp32, fp16, switches;
};
static const struct levels idle = {.power_w = 70, .temperature = 30, .sm_mhz = 345, .mem_mhz = 2619};

struct device {
    int present;
    char uuid[96], name[96];
    char part[32], vbios[32];
    double memory_mib, power_limit_w, power_max_w, power_default_w, sm_mhz_max, loop_s, architecture, gpm, nvlinks, sms;
    double mig, virtualization, accounting, parent, gi, ci;
    int segments;
    struct levels segment[SEGMENTS];
};
struct entry {
    int device;
    unsigned pid;
    char pid_file[256], pid_env[64];
    double used_mib, sm, memory, encoder, from, until;
};
struct refusal { char name[80]; int device, code; };
struct failure { double from, until; int device, code; };

static struct {
    char driver[80];
    int cuda, devices, entries, refusals, failures, cc, devtools;
    double start;
    struct device device[DEVICES];
    struct entry entry[ENTRIES];
    struct refusal refusal[REFUSALS];
    struct failure failure[FAILURES];
} script;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int users;
static struct stat seen;

/* ---- the script -------------------------------------------------------------------------------------------------- */

struct key { const char *name; double *number; char *text; size_t size; };

/* Read "key value" pairs; a key named "name" takes the rest of the line. Anything unknown is the script's mistake. */
static void pairs(char *line, const struct key *keys)
{
    char *word, *save = line;
    while ((word = strsep(&save, " \t\n"))) {
        if (!*word)
            continue;
        const struct key *key = keys;
        while (key->name && strcmp(key->name, word))
            key++;
        char *value = key->name && !strcmp(key->name, "name") ? strsep(&save, "\n") : strsep(&save, " \t\n");
        if (!key->name || !value) {
            fprintf(stderr, "nvml stand-in: cannot read '%s' in %s\n", word, getenv("GPUGUARD_STANDIN_NVML_SCRIPT"));
            exit(2);
        }
        if (key->text)
            snprintf(key->text, key->size, "%s", value);
        else
            *key->number = strtod(value, NULL);
    }
}

static void read_device(char *rest)
{
    int index = strtol(rest, &rest, 10);
    if (index < 0 || index >= DEVICES)
        return;
    struct device *d = &script.device[index];
    *d = (struct device){
        .present = 1, .memory_mib = 81559, .power_limit_w = 700, .power_max_w = 700, .power_default_w = 700,
        .sm_mhz_max = 1980, .architecture = 9, .sms = 132, .parent = -1};
    snprintf(d->name, sizeof d->name, "NVIDIA stand-in");
    snprintf(d->uuid, sizeof d->uuid, "GPU-00000000-0000-0000-0000-%012d", index);
    struct key keys[] = {
        {"uuid", NULL, d->uuid, sizeof d->uuid}, {"name", NULL, d->name, sizeof d->name},
        {"memory_mib", &d->memory_mib}, {"power_limit_w", &d->power_limit_w},
        {"sm_mhz_max", &d->sm_mhz_max}, {"loop_s", &d->loop_s}, {"power_max_w", &d->power_max_w},
        {"power_default_w", &d->power_default_w}, {"architecture", &d->architecture}, {"gpm", &d->gpm},
        {"nvlinks", &d->nvlinks}, {"sms", &d->sms}, {"mig", &d->mig}, {"virtualization", &d->virtualization},
        {"accounting", &d->accounting}, {"parent", &d->parent}, {"gi", &d->gi}, {"ci", &d->ci},
        {"part", NULL, d->part, sizeof d->part}, {"vbios", NULL, d->vbios, sizeof d->vbios}, {0}};
    pairs(rest, keys);
    if (d->parent < 0 && index >= script.devices)
        script.devices = index + 1;
}

static void read_segment(char *rest)
{
    struct levels l = {.at = -1};
    double at = strtod(rest, &rest), index = -1;
    char *device = strstr(rest, "device ");
    if (device)
        index = strtod(device + 7, NULL);
    if (index < 0 || index >= DEVICES || script.device[(int)index].segments == SEGMENTS)
        return;
    struct device *d = &script.device[(int)index];
    l = d->segments ? d->segment[d->segments - 1] : idle;
    l.at = at;
    struct key keys[] = {
        {"device", &index}, {"gpu", &l.gpu}, {"memory", &l.memory}, {"used_mib", &l.used_mib}, {"power_w", &l.power_w},
        {"temperature", &l.temperature}, {"sm_mhz", &l.sm_mhz}, {"mem_mhz", &l.mem_mhz}, {"tx_kbs", &l.tx_kbs},
        {"rx_kbs", &l.rx_kbs}, {"throttle", &l.throttle}, {"power_now_w", &l.power_now_w}, {"capped", &l.capped},
        {"encoder", &l.encoder}, {"decoder", &l.decoder}, {"mem_temperature", &l.mem_temperature},
        {"nvtx_kibs", &l.nvtx_kibs}, {"nvrx_kibs", &l.nvrx_kibs}, {"sm", &l.sm}, {"occupancy", &l.occupancy},
        {"integer", &l.integer}, {"tensor", &l.tensor}, {"dfma", &l.dfma}, {"hmma", &l.hmma}, {"dmma", &l.dmma},
        {"imma", &l.imma}, {"dram", &l.dram}, {"fp64", &l.fp64}, {"fp32", &l.fp32}, {"fp16", &l.fp16},
        {"switches", &l.switches}, {0}};
    pairs(rest, keys);
    d->segment[d->segments++] = l;
}

static void read_process(char *rest)
{
    if (script.entries == ENTRIES)
        return;
    struct entry *e = &script.entry[script.entries++];
    double device = 0, pid = 0;
    *e = (struct entry){.until = 1e18};
    struct key keys[] = {
        {"device", &device}, {"pid", &pid}, {"pid_file", NULL, e->pid_file, sizeof e->pid_file},
        {"pid_env", NULL, e->pid_env, sizeof e->pid_env}, {"used_mib", &e->used_mib}, {"sm", &e->sm},
        {"memory", &e->memory}, {"encoder", &e->encoder}, {"from", &e->from}, {"until", &e->until}, {0}};
    pairs(rest, keys);
    e->device = (int)device;
    e->pid = (unsigned)pid;
}

static int code_of(const char *word)
{
    static const struct { const char *word; int code; } codes[] = {
        {"gpu_lost", GPU_IS_LOST}, {"driver_dead", DRIVER_NOT_LOADED}, {"no_permission", NO_PERMISSION},
        {"timeout", TIMEOUT}, {"mismatch", LIB_RM_VERSION_MISMATCH}, {"unknown", UNKNOWN},
        {"function_not_found", FUNCTION_NOT_FOUND}, {"invalid_argument", INVALID_ARGUMENT}, {"no_data", NO_DATA}};
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
        if (!strcmp(codes[i].word, word))
            return codes[i].code;
    return UNKNOWN;
}

static void read_refusal(char *rest, const char *kind)
{
    if (script.refusals == REFUSALS)
        return;
    struct refusal *r = &script.refusal[script.refusals++];
    double device = -1;
    char *name = strsep(&rest, " \t\n");
    snprintf(r->name, sizeof r->name, "%s", name);
    r->code = !strcmp(kind, "garbage") ? GARBAGE : NOT_SUPPORTED;
    if (!strcmp(kind, "refuse"))
        r->code = code_of(strsep(&rest, " \t\n"));
    struct key keys[] = {{"device", &device}, {0}};
    if (rest)
        pairs(rest, keys);
    r->device = (int)device;
}

static void read_failure(char *rest)
{
    if (script.failures == FAILURES)
        return;
    struct failure *f = &script.failure[script.failures++];
    double device = -1;
    *f = (struct failure){.until = 1e18};
    f->from = strtod(rest, &rest);
    while (*rest == ' ')
        rest++;
    f->code = code_of(strsep(&rest, " \t\n"));
    struct key keys[] = {{"device", &device}, {"until", &f->until}, {0}};
    if (rest)
        pairs(rest, keys);
    f->device = (int)device;
}

static void read_line(char *line)
{
    line[strcspn(line, "#\n")] = 0;
    char *rest = line, *word = strsep(&rest, " \t");
    if (!rest)
        return;
    while (*rest == ' ')
        rest++;
    if (!strcmp(word, "driver"))
        snprintf(script.driver, sizeof script.driver, "%s", rest);
    else if (!strcmp(word, "cuda"))
        script.cuda = atoi(rest);
    else if (!strcmp(word, "start"))
        script.start = strtod(rest, NULL);
    else if (!strcmp(word, "device"))
        read_device(rest);
    else if (!strcmp(word, "at"))
        read_segment(rest);
    else if (!strcmp(word, "process"))
        read_process(rest);
    else if (!strcmp(word, "cc"))
        script.cc = atoi(rest);
    else if (!strcmp(word, "devtools"))
        script.devtools = atoi(rest);
    else if (!strcmp(word, "not_supported") || !strcmp(word, "refuse") || !strcmp(word, "garbage"))
        read_refusal(rest, word);
    else if (!strcmp(word, "fail"))
        read_failure(rest);
    else {
        fprintf(stderr, "nvml stand-in: cannot read '%s'\n", word);
        exit(2);
    }
}

/* Return whether there is a script; a machine without one has no driver. */
static int refresh(void)
{
    const char *path = getenv("GPUGUARD_STANDIN_NVML_SCRIPT");
    struct stat now;
    if (!path || stat(path, &now))
        return 0;
    if (now.st_ino == seen.st_ino && now.st_size == seen.st_size && now.st_mtim.tv_sec == seen.st_mtim.tv_sec
        && now.st_mtim.tv_nsec == seen.st_mtim.tv_nsec)
        return 1;
    FILE *file = fopen(path, "re");
    if (!file)
        return 0;
    memset(&script, 0, sizeof script);
    snprintf(script.driver, sizeof script.driver, "580.95.05");
    script.cuda = 13000;
    script.start = now.st_mtim.tv_sec + now.st_mtim.tv_nsec * 1e-9;
    char line[1024];
    while (fgets(line, sizeof line, file))
        read_line(line);
    fclose(file);
    seen = now;
    return 1;
}

static double unix_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static double second(void)
{
    const char *path = getenv("GPUGUARD_STANDIN_NVML_CLOCK");
    double value = 0;
    FILE *file = path ? fopen(path, "re") : NULL;
    if (!file)
        return unix_now() - script.start;
    if (fscanf(file, "%lf", &value) != 1)
        value = 0;
    fclose(file);
    return value;
}

/* The driver's own clock, in microseconds of Unix time. */
static uint64_t driver_us(double t) { return (uint64_t)((script.start + t) * 1e6); }

static struct levels level(const struct device *d, double t)
{
    struct levels now = idle;
    if (d->loop_s > 0 && t > 0)
        t -= d->loop_s * (double)(long)(t / d->loop_s);
    for (int i = 0; i < d->segments && d->segment[i].at <= t; i++)
        now = d->segment[i];
    return now;
}

static double once(const struct device *d, double t, size_t offset)
{
    double sum = 0, from = 0, value = *(const double *)((const char *)&idle + offset);
    for (int i = 0; i < d->segments && d->segment[i].at < t; i++) {
        double at = d->segment[i].at > 0 ? d->segment[i].at : 0;
        sum += value * (at - from);
        from = at;
        value = *(const double *)((const char *)&d->segment[i] + offset);
    }
    return sum + value * (t - from);
}

/* The integral of one level from second 0 to t: what the energy and PCIe byte counters count. */
static double integral(const struct device *d, double t, size_t offset)
{
    if (t <= 0)
        return 0;
    if (d->loop_s <= 0)
        return once(d, t, offset);
    double loops = (double)(long)(t / d->loop_s);
    return loops * once(d, d->loop_s, offset) + once(d, t - loops * d->loop_s, offset);
}

/* ---- calling ----------------------------------------------------------------------------------------------------- */

static int failure(const char *name, int device, double t)
{
    for (int i = 0; i < script.failures; i++) {
        const struct failure *f = &script.failure[i];
        if (t >= f->from && t < f->until && (f->device < 0 || f->device == device))
            return f->code;
    }
    for (int i = 0; i < script.refusals; i++) {
        const struct refusal *r = &script.refusal[i];
        if (r->code != GARBAGE && !strcmp(r->name, name) && (r->device < 0 || r->device == device))
            return r->code;
    }
    return SUCCESS;
}

/* Whether the script wants contents of this call that make no sense. */
static int garbage(const char *name, const struct device *d)
{
    for (int i = 0; i < script.refusals; i++) {
        const struct refusal *r = &script.refusal[i];
        if (r->code == GARBAGE && !strcmp(r->name, name) && (r->device < 0 || r->device == d - script.device))
            return 1;
    }
    return 0;
}

/* Every device call has the same beginning and end; the body works on `d` and `t` and sets `result`. */
#define DEVICE_CALL(NAME, ...)                                                                                        \
    pthread_mutex_lock(&lock);                                                                                        \
    nvmlReturn_t result = SUCCESS;                                                                                    \
    double t = refresh() ? second() : 0;                                                                              \
    if (!users)                                                                                                       \
        result = UNINITIALIZED;                                                                                       \
    else if (d < script.device || d >= script.device + DEVICES || !d->present)                                        \
        result = INVALID_ARGUMENT;                                                                                    \
    else if ((result = failure(NAME, (int)(d - script.device), t)) == SUCCESS) {                                      \
        __VA_ARGS__                                                                                                   \
    }                                                                                                                 \
    pthread_mutex_unlock(&lock);                                                                                      \
    return result

#define SYSTEM_CALL(NAME, ...)                                                                                        \
    pthread_mutex_lock(&lock);                                                                                        \
    nvmlReturn_t result = refresh() ? SUCCESS : DRIVER_NOT_LOADED;                                                    \
    if (result == SUCCESS && !users)                                                                                  \
        result = UNINITIALIZED;                                                                                       \
    if (result == SUCCESS && (result = failure(NAME, -2, second())) == SUCCESS) {                                     \
        __VA_ARGS__                                                                                                   \
    }                                                                                                                 \
    pthread_mutex_unlock(&lock);                                                                                      \
    return result

API nvmlReturn_t nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    pthread_mutex_lock(&lock);
    nvmlReturn_t result = refresh() ? failure("nvmlInitWithFlags", -2, second()) : DRIVER_NOT_LOADED;
    if (result == SUCCESS)
        users++;
    pthread_mutex_unlock(&lock);
    return result;
}

API nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

API nvmlReturn_t nvmlShutdown(void)
{
    pthread_mutex_lock(&lock);
    nvmlReturn_t result = users ? SUCCESS : UNINITIALIZED;
    users -= users > 0;
    pthread_mutex_unlock(&lock);
    return result;
}

API const char *nvmlErrorString(nvmlReturn_t code)
{
    switch (code) {
    case SUCCESS: return "The operation was successful";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case TIMEOUT: return "Timeout";
    case GPU_IS_LOST: return "GPU is lost";
    case LIB_RM_VERSION_MISMATCH: return "Driver/library version mismatch";
    default: return "Unknown Error";
    }
}

static nvmlReturn_t copy(char *to, unsigned size, const char *text)
{
    if (strlen(text) + 1 > size)
        return INSUFFICIENT_SIZE;
    strcpy(to, text);
    return SUCCESS;
}

API nvmlReturn_t nvmlSystemGetDriverVersion(char *text, unsigned size)
{
    SYSTEM_CALL("nvmlSystemGetDriverVersion", result = copy(text, size, script.driver););
}

API nvmlReturn_t nvmlSystemGetNVMLVersion(char *text, unsigned size)
{
    SYSTEM_CALL("nvmlSystemGetNVMLVersion", {
        char version[96];
        snprintf(version, sizeof version, "%d.%s", script.cuda / 1000, script.driver);
        result = copy(text, size, version);
    });
}

API nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    SYSTEM_CALL("nvmlSystemGetCudaDriverVersion_v2", *version = script.cuda;);
}

API nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

API nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count)
{
    SYSTEM_CALL("nvmlDeviceGetCount_v2", *count = (unsigned)script.devices;);
}

API nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *handle)
{
    nvmlDevice_t d = &script.device[index < DEVICES ? index : 0];
    DEVICE_CALL("nvmlDeviceGetHandleByIndex_v2", {
        *handle = d;
        if (index >= (unsigned)script.devices)
            result = INVALID_ARGUMENT;
    });
}

API nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *handle)
{
    SYSTEM_CALL("nvmlDeviceGetHandleByUUID", {
        result = NOT_FOUND;
        for (int i = 0; i < script.devices; i++)
            if (!strcmp(script.device[i].uuid, uuid)) {
                *handle = &script.device[i];
                result = failure("nvmlDeviceGetHandleByUUID", i, second());
            }
    });
}

static void bus_id(const struct device *d, char *text, size_t size)
{
    snprintf(text, size, "%08X:%02X:00.0", 0, (unsigned)(d - script.device) + 1);
}

API nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *id, nvmlDevice_t *handle)
{
    SYSTEM_CALL("nvmlDeviceGetHandleByPciBusId_v2", {
        result = NOT_FOUND;
        for (int i = 0; i < script.devices; i++) {
            char own[32];
            bus_id(&script.device[i], own, sizeof own);
            if (!strcmp(own, id)) {
                *handle = &script.device[i];
                result = SUCCESS;
            }
        }
    });
}

/* ---- what a device is -------------------------------------------------------------------------------------------- */

struct pci { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; };

API nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t d, struct pci *pci)
{
    DEVICE_CALL("nvmlDeviceGetPciInfo_v3", {
        *pci = (struct pci){.bus = (unsigned)(d - script.device) + 1, .id = 0x233010de};
        bus_id(d, pci->bus_id, sizeof pci->bus_id);
        snprintf(pci->legacy, sizeof pci->legacy, "0000:%02X:00.0", pci->bus);
    });
}

API nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t d, unsigned *index)
{
    DEVICE_CALL("nvmlDeviceGetIndex", *index = (unsigned)(d - script.device););
}

API nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t d, char *text, unsigned size)
{
    DEVICE_CALL("nvmlDeviceGetName", result = copy(text, size, d->name););
}

API nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t d, char *text, unsigned size)
{
    DEVICE_CALL("nvmlDeviceGetUUID", result = copy(text, size, d->uuid););
}

API nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t d, int *major, int *minor)
{
    DEVICE_CALL("nvmlDeviceGetCudaComputeCapability", *major = 9; *minor = 0;);
}

API nvmlReturn_t nvmlDeviceGetArchitecture(nvmlDevice_t d, unsigned *architecture)
{
    DEVICE_CALL("nvmlDeviceGetArchitecture", *architecture = (unsigned)d->architecture;);
}

API nvmlReturn_t nvmlDeviceGetBoardPartNumber(nvmlDevice_t d, char *text, unsigned size)
{
    DEVICE_CALL("nvmlDeviceGetBoardPartNumber", result = d->part[0] ? copy(text, size, d->part) : NOT_SUPPORTED;);
}

API nvmlReturn_t nvmlDeviceGetVbiosVersion(nvmlDevice_t d, char *text, unsigned size)
{
    DEVICE_CALL("nvmlDeviceGetVbiosVersion", result = d->vbios[0] ? copy(text, size, d->vbios) : NOT_SUPPORTED;);
}

API nvmlReturn_t nvmlDeviceGetVirtualizationMode(nvmlDevice_t d, unsigned *mode)
{
    DEVICE_CALL("nvmlDeviceGetVirtualizationMode", *mode = (unsigned)d->virtualization;);
}

API nvmlReturn_t nvmlDeviceGetPowerManagementLimitConstraints(nvmlDevice_t d, unsigned *min_mw, unsigned *max_mw)
{
    DEVICE_CALL("nvmlDeviceGetPowerManagementLimitConstraints", {
        *min_mw = 100000;
        *max_mw = (unsigned)(d->power_max_w * 1000);
    });
}

API nvmlReturn_t nvmlDeviceGetPowerManagementDefaultLimit(nvmlDevice_t d, unsigned *mw)
{
    DEVICE_CALL("nvmlDeviceGetPowerManagementDefaultLimit", *mw = (unsigned)(d->power_default_w * 1000););
}

struct cc_state { unsigned environment, feature, devtools; };

API nvmlReturn_t nvmlSystemGetConfComputeState(struct cc_state *state)
{
    SYSTEM_CALL("nvmlSystemGetConfComputeState", {
        *state = (struct cc_state){2, (unsigned)script.cc, (unsigned)script.devtools};
    });
}

/* ---- MIG --------------------------------------------------------------------------------------------------------- */

struct attributes { unsigned sms, copy, decoders, encoders, jpeg, ofa, gi_slices, ci_slices; unsigned long long mb; };

API nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t d, unsigned *current, unsigned *pending)
{
    DEVICE_CALL("nvmlDeviceGetMigMode", *current = *pending = (unsigned)d->mig;);
}

API nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t d, unsigned *count)
{
    DEVICE_CALL("nvmlDeviceGetMaxMigDeviceCount", *count = d->mig ? 7 : 0;);
}

API nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t d, unsigned index, nvmlDevice_t *handle)
{
    DEVICE_CALL("nvmlDeviceGetMigDeviceHandleByIndex", {
        result = NOT_FOUND;
        for (int i = 0; i < DEVICES; i++)
            if (script.device[i].present && script.device[i].parent == d - script.device && !index--) {
                *handle = &script.device[i];
                result = SUCCESS;
                break;
            }
    });
}

API nvmlReturn_t nvmlDeviceGetGpuInstanceId(nvmlDevice_t d, unsigned *id)
{
    DEVICE_CALL("nvmlDeviceGetGpuInstanceId", *id = (unsigned)d->gi;);
}

API nvmlReturn_t nvmlDeviceGetComputeInstanceId(nvmlDevice_t d, unsigned *id)
{
    DEVICE_CALL("nvmlDeviceGetComputeInstanceId", *id = (unsigned)d->ci;);
}

API nvmlReturn_t nvmlDeviceGetAttributes_v2(nvmlDevice_t d, struct attributes *attributes)
{
    DEVICE_CALL("nvmlDeviceGetAttributes_v2", {
        *attributes = (struct attributes){.sms = (unsigned)d->sms, .mb = (unsigned long long)d->memory_mib};
    });
}

/* ---- limits ------------------------------------------------------------------------------------------------------ */

API nvmlReturn_t nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t d, unsigned *mw)
{
    DEVICE_CALL("nvmlDeviceGetEnforcedPowerLimit", *mw = (unsigned)(d->power_limit_w * 1000););
}

API nvmlReturn_t nvmlDeviceGetPowerManagementLimit(nvmlDevice_t d, unsigned *mw)
{
    DEVICE_CALL("nvmlDeviceGetPowerManagementLimit", *mw = (unsigned)(d->power_limit_w * 1000););
}

API nvmlReturn_t nvmlDeviceGetMaxClockInfo(nvmlDevice_t d, int type, unsigned *mhz)
{
    DEVICE_CALL("nvmlDeviceGetMaxClockInfo", *mhz = type == 2 ? 2619 : (unsigned)d->sm_mhz_max;);
}

/* ---- what it does now -------------------------------------------------------------------------------------------- */

struct memory { unsigned long long total, free, used; };
struct memory_v2 { unsigned version; unsigned long long total, reserved, free, used; };
struct utilization { unsigned gpu, memory; };

static struct memory memory_of(const struct device *d, double t)
{
    unsigned long long total = (unsigned long long)d->memory_mib * MIB;
    unsigned long long used = (unsigned long long)(level(d, t).used_mib * MIB);
    return (struct memory){total, total - used, used};
}

API nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t d, struct memory *memory)
{
    DEVICE_CALL("nvmlDeviceGetMemoryInfo", *memory = memory_of(d, t););
}

API nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t d, struct memory_v2 *memory)
{
    DEVICE_CALL("nvmlDeviceGetMemoryInfo_v2", {
        struct memory m = memory_of(d, t);
        if (memory->version != 0x02000028)
            result = ARGUMENT_VERSION_MISMATCH;
        else
            *memory = (struct memory_v2){memory->version, m.total, 0, m.free, m.used};
    });
}

API nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t d, struct utilization *use)
{
    DEVICE_CALL("nvmlDeviceGetUtilizationRates", {
        struct levels l = level(d, t);
        *use = (struct utilization){(unsigned)l.gpu, (unsigned)l.memory};
    });
}

API nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t d, unsigned *mw)
{
    DEVICE_CALL("nvmlDeviceGetPowerUsage", {
        *mw = garbage("nvmlDeviceGetPowerUsage", d) ? ~0U : (unsigned)(level(d, t).power_w * 1000);
    });
}

API nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t d, unsigned long long *mj)
{
    DEVICE_CALL("nvmlDeviceGetTotalEnergyConsumption",
                *mj = (unsigned long long)(integral(d, t, offsetof(struct levels, power_w)) * 1000););
}

API nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t d, int sensor, unsigned *celsius)
{
    (void)sensor;
    DEVICE_CALL("nvmlDeviceGetTemperature", *celsius = (unsigned)level(d, t).temperature;);
}

API nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t d, int type, unsigned *mhz)
{
    DEVICE_CALL("nvmlDeviceGetClockInfo", {
        struct levels l = level(d, t);
        *mhz = (unsigned)(type == 2 ? l.mem_mhz : l.sm_mhz);
    });
}

API nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t d, unsigned long long *reasons)
{
    DEVICE_CALL("nvmlDeviceGetCurrentClocksEventReasons", *reasons = (unsigned long long)level(d, t).throttle;);
}

API nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t d, unsigned long long *reasons)
{
    return nvmlDeviceGetCurrentClocksEventReasons(d, reasons);
}

API nvmlReturn_t nvmlDeviceGetPcieThroughput(nvmlDevice_t d, int counter, unsigned *kbs)
{
    DEVICE_CALL("nvmlDeviceGetPcieThroughput", {
        struct levels l = level(d, t);
        *kbs = (unsigned)(counter ? l.rx_kbs : l.tx_kbs);
    });
}

API nvmlReturn_t nvmlDeviceGetEncoderUtilization(nvmlDevice_t d, unsigned *use, unsigned *period_us)
{
    DEVICE_CALL("nvmlDeviceGetEncoderUtilization", {
        *use = (unsigned)level(d, t).encoder;
        *period_us = 167000;
    });
}

API nvmlReturn_t nvmlDeviceGetDecoderUtilization(nvmlDevice_t d, unsigned *use, unsigned *period_us)
{
    DEVICE_CALL("nvmlDeviceGetDecoderUtilization", {
        *use = (unsigned)level(d, t).decoder;
        *period_us = 167000;
    });
}

struct field {
    unsigned id, scope;
    long long time_us, latency_us;
    unsigned type, result;
    union { double d; unsigned ui; unsigned long long ull; } value;
};

#define INTEGRAL(MEMBER) integral(d, t, offsetof(struct levels, MEMBER))
enum { UNSIGNED_INT = 1, UNSIGNED_LONG_LONG = 3 };

static void wide(struct field *f, double value)
{
    f->type = UNSIGNED_LONG_LONG;
    f->value.ull = (unsigned long long)value;
}

static void narrow(struct field *f, double value)
{
    f->type = UNSIGNED_INT;
    f->value.ui = (unsigned)value;
}

static nvmlReturn_t field_value(const struct device *d, double t, struct field *f)
{
    struct levels l = level(d, t);
    int links = d->nvlinks > 0 && f->scope == ~0U;
    switch (f->id) {
    case 74: wide(f, INTEGRAL(capped) / 100 * 1e9); return SUCCESS;
    case 82: narrow(f, l.mem_temperature); return l.mem_temperature > 0 ? SUCCESS : NOT_SUPPORTED;
    case 83: wide(f, INTEGRAL(power_w) * 1000); return SUCCESS;
    case 91: narrow(f, d->nvlinks); return SUCCESS;
    case 138: wide(f, INTEGRAL(nvtx_kibs)); return links ? SUCCESS : NOT_SUPPORTED;
    case 139: wide(f, INTEGRAL(nvrx_kibs)); return links ? SUCCESS : NOT_SUPPORTED;
    case 185: narrow(f, l.power_w * 1000); return SUCCESS;
    case 186: narrow(f, (l.power_now_w > 0 ? l.power_now_w : l.power_w) * 1000); return SUCCESS;
    case 197: wide(f, INTEGRAL(tx_kbs) * 1000); return SUCCESS;
    case 198: wide(f, INTEGRAL(rx_kbs) * 1000); return SUCCESS;
    }
    return INVALID_ARGUMENT; /* an id that this driver does not know */
}

API nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t d, int count, struct field *fields)
{
    DEVICE_CALL("nvmlDeviceGetFieldValues", {
        for (int i = 0; i < count; i++) {
            struct field *f = &fields[i];
            char name[32];
            snprintf(name, sizeof name, "field_%u", f->id);
            f->time_us = (long long)driver_us(t);
            f->result = (unsigned)failure(name, (int)(d - script.device), t);
            if (f->result == SUCCESS)
                f->result = (unsigned)field_value(d, t, f);
            if (garbage(name, d))
                memset(&f->time_us, 0xfe - i, sizeof *f - offsetof(struct field, time_us)), f->result = SUCCESS;
        }
    });
}

/* ---- GPM --------------------------------------------------------------------------------------------------------- */

struct gpm_support { unsigned version, supported; };
struct gpm_sample { const struct device *device; double t; };
struct gpm_metric { unsigned id, result; double value; const char *texts[3]; };
struct gpm_get { unsigned version, count; struct gpm_sample *first, *second; struct gpm_metric metrics[]; };

static int gpm_samples;

/* For tests alone: how many samples were allocated and not freed. */
API int standin_gpm_samples(void) { return gpm_samples; }

API nvmlReturn_t nvmlGpmQueryDeviceSupport(nvmlDevice_t d, struct gpm_support *support)
{
    DEVICE_CALL("nvmlGpmQueryDeviceSupport", {
        if (support->version != 1)
            result = ARGUMENT_VERSION_MISMATCH;
        else
            support->supported = d->gpm > 0;
    });
}

API nvmlReturn_t nvmlGpmSampleAlloc(struct gpm_sample **sample)
{
    SYSTEM_CALL("nvmlGpmSampleAlloc", {
        *sample = calloc(1, sizeof **sample);
        gpm_samples++;
    });
}

API nvmlReturn_t nvmlGpmSampleFree(struct gpm_sample *sample)
{
    free(sample);
    gpm_samples--;
    return SUCCESS;
}

API nvmlReturn_t nvmlGpmSampleGet(nvmlDevice_t d, struct gpm_sample *sample)
{
    DEVICE_CALL("nvmlGpmSampleGet", {
        if (!d->gpm)
            result = NOT_SUPPORTED;
        else
            *sample = (struct gpm_sample){d, t};
    });
}

API nvmlReturn_t nvmlGpmMigSampleGet(nvmlDevice_t d, unsigned gi, struct gpm_sample *sample)
{
    DEVICE_CALL("nvmlGpmMigSampleGet", {
        result = d->gpm > 0 ? INVALID_ARGUMENT : NOT_SUPPORTED;
        for (int i = 0; i < DEVICES && result == INVALID_ARGUMENT; i++)
            if (script.device[i].parent == d - script.device && script.device[i].present && script.device[i].gi == gi) {
                *sample = (struct gpm_sample){&script.device[i], t};
                result = SUCCESS;
            }
    });
}

#define LEVEL(MEMBER) offsetof(struct levels, MEMBER)
enum { PERCENT, MIB_PER_S, COUNT, CYCLES };
static const struct { unsigned id; int kind; size_t offset; } gpm_table[] = {
    {1, PERCENT, LEVEL(gpu)}, {2, PERCENT, LEVEL(sm)}, {3, PERCENT, LEVEL(occupancy)}, {4, PERCENT, LEVEL(integer)},
    {5, PERCENT, LEVEL(tensor)}, {6, PERCENT, LEVEL(dfma)}, {7, PERCENT, LEVEL(hmma)}, {8, PERCENT, LEVEL(dmma)},
    {9, PERCENT, LEVEL(imma)}, {10, PERCENT, LEVEL(dram)}, {11, PERCENT, LEVEL(fp64)}, {12, PERCENT, LEVEL(fp32)},
    {13, PERCENT, LEVEL(fp16)}, {20, MIB_PER_S, LEVEL(tx_kbs)}, {21, MIB_PER_S, LEVEL(rx_kbs)},
    {60, MIB_PER_S, LEVEL(nvrx_kibs)}, {61, MIB_PER_S, LEVEL(nvtx_kibs)}, {172, COUNT, LEVEL(switches)},
    {174, PERCENT, LEVEL(switches)}, {249, CYCLES, LEVEL(sm)}, {250, CYCLES, LEVEL(tensor)}, {251, CYCLES, LEVEL(dmma)},
    {252, CYCLES, LEVEL(hmma)}, {253, CYCLES, LEVEL(imma)}, {254, CYCLES, LEVEL(dfma)}, {257, CYCLES, LEVEL(integer)},
    {258, CYCLES, LEVEL(fp64)}, {259, CYCLES, LEVEL(fp32)}, {260, CYCLES, LEVEL(fp16)}};

static nvmlReturn_t gpm_value(const struct gpm_sample *a, const struct gpm_sample *b, unsigned id, double *value)
{
    char name[32];
    snprintf(name, sizeof name, "gpm_%u", id);
    nvmlReturn_t refused = failure(name, (int)(b->device - script.device), b->t);
    if (refused)
        return refused;
    if (garbage(name, b->device)) {
        static const double senseless[] = {-1, 1e300, __builtin_nan(""), __builtin_inf()};
        *value = senseless[id % 4];
        return SUCCESS;
    }
    if (id == 248) {
        *value = b->t * 1e9;
        return SUCCESS;
    }
    for (size_t i = 0; i < sizeof gpm_table / sizeof *gpm_table; i++) {
        if (gpm_table[i].id != id)
            continue;
        double since = integral(a->device, a->t, gpm_table[i].offset);
        double until = integral(b->device, b->t, gpm_table[i].offset);
        double mean = (until - since) / (b->t - a->t);
        *value = gpm_table[i].kind == CYCLES ? until / 100 * 1e9 : gpm_table[i].kind == COUNT ? until - since
            : gpm_table[i].kind == MIB_PER_S ? mean / 1024 : mean;
        return SUCCESS;
    }
    return INVALID_ARGUMENT;
}

API nvmlReturn_t nvmlGpmMetricsGet(struct gpm_get *get)
{
    SYSTEM_CALL("nvmlGpmMetricsGet", {
        if (get->version != 1)
            result = ARGUMENT_VERSION_MISMATCH;
        else if (!get->first || !get->second || get->first->device != get->second->device)
            result = INVALID_ARGUMENT;
        for (unsigned i = 0; !result && i < get->count; i++) {
            char name[32];
            snprintf(name, sizeof name, "gpm_call_%u", get->metrics[i].id);
            result = failure(name, (int)(get->second->device - script.device), get->second->t);
        }
        for (unsigned i = 0; !result && i < get->count; i++) {
            struct gpm_metric *m = &get->metrics[i];
            int too_soon = get->second->t - get->first->t < 0.0999;
            m->result = too_soon ? NO_DATA : (unsigned)gpm_value(get->first, get->second, m->id, &m->value);
        }
    });
}

/* ---- processes --------------------------------------------------------------------------------------------------- */

struct running { unsigned pid; const struct entry *entry; };
struct process { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; };
struct sample { unsigned pid; unsigned long long time_us; unsigned sm, memory, encoder, decoder; };
struct sample_v1 { unsigned long long time_us; unsigned pid, sm, memory, encoder, decoder, jpeg, ofa; };
struct samples_v1 { unsigned version, count; unsigned long long since_us; struct sample_v1 *samples; };

static int pids_of(const struct entry *e, unsigned *pids, int room)
{
    const char *value = e->pid_env[0] ? getenv(e->pid_env) : NULL;
    int count = 0;
    if (e->pid && count < room)
        pids[count++] = e->pid;
    if (value && count < room)
        pids[count++] = (unsigned)strtoul(value, NULL, 10);
    FILE *file = e->pid_file[0] ? fopen(e->pid_file, "re") : NULL;
    while (file && count < room && fscanf(file, "%u", &pids[count]) == 1)
        count++;
    if (file)
        fclose(file);
    return count;
}

static int running_on(const struct device *d, double t, struct running *list)
{
    int count = 0;
    for (int i = 0; i < script.entries; i++) {
        const struct entry *e = &script.entry[i];
        unsigned pids[PIDS];
        const struct device *of = &script.device[e->device];
        int here = of == d || (of->present && of->parent == d - script.device);
        if (!here || t < e->from || t >= e->until)
            continue;
        int found = pids_of(e, pids, PIDS - count);
        for (int j = 0; j < found; j++)
            list[count++] = (struct running){pids[j], e};
    }
    return count;
}

static nvmlReturn_t list_processes(const struct device *d, double t, unsigned *count, struct process *list)
{
    struct running running[PIDS];
    unsigned room = *count, found = (unsigned)running_on(d, t, running);
    *count = found;
    if (found > room)
        return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < found; i++) {
        unsigned long long used = (unsigned long long)(running[i].entry->used_mib * MIB);
        const struct device *of = &script.device[running[i].entry->device];
        list[i] = (struct process){running[i].pid, used, ~0U, ~0U};
        if (of->parent >= 0) {
            list[i].gpu_instance = (unsigned)of->gi;
            list[i].compute_instance = (unsigned)of->ci;
        }
        if (garbage("nvmlDeviceGetComputeRunningProcesses_v3", d))
            memset((char *)&list[i] + sizeof list[i].pid, 0xff, sizeof list[i] - sizeof list[i].pid);
    }
    return SUCCESS;
}

API nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t d, unsigned *count, struct process *list)
{
    DEVICE_CALL("nvmlDeviceGetComputeRunningProcesses_v3", result = list_processes(d, t, count, list););
}

API nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice_t d, unsigned *count, struct process *list)
{
    DEVICE_CALL("nvmlDeviceGetComputeRunningProcesses_v2", result = list_processes(d, t, count, list););
}

API nvmlReturn_t nvmlDeviceGetGraphicsRunningProcesses_v3(nvmlDevice_t d, unsigned *count, struct process *list)
{
    (void)list;
    DEVICE_CALL("nvmlDeviceGetGraphicsRunningProcesses_v3", *count = 0;);
}

API nvmlReturn_t nvmlDeviceGetMPSComputeRunningProcesses_v3(nvmlDevice_t d, unsigned *count, struct process *list)
{
    (void)list;
    DEVICE_CALL("nvmlDeviceGetMPSComputeRunningProcesses_v3", *count = 0;);
}

/* The ring of samples newer than `since_us`, oldest first, one row for each process and moment. */
static unsigned samples_since(const struct device *d, double t, uint64_t since_us, struct sample *out)
{
    uint64_t now = driver_us(t), first = now - SAMPLES_KEPT_US;
    unsigned count = 0;
    if (since_us > first)
        first = since_us;
    for (uint64_t at = (first / SAMPLE_US + 1) * SAMPLE_US; at <= now; at += SAMPLE_US) {
        struct running running[PIDS];
        int found = running_on(d, (double)at / 1e6 - script.start, running);
        for (int i = 0; i < found && count < SAMPLES; i++) {
            const struct entry *e = running[i].entry;
            if (e->sm > 0)
                out[count++] = (struct sample){
                    running[i].pid, at, (unsigned)e->sm, (unsigned)e->memory, (unsigned)e->encoder, 0};
        }
    }
    return count;
}

API nvmlReturn_t nvmlDeviceGetProcessUtilization(nvmlDevice_t d, struct sample *list, unsigned *count,
                                                 unsigned long long since_us)
{
    static struct sample all[SAMPLES];
    DEVICE_CALL("nvmlDeviceGetProcessUtilization", {
        unsigned found = samples_since(d, t, since_us, all);
        if (found && garbage("nvmlDeviceGetProcessUtilization", d))
            memset(all, 0xfd, sizeof *all);
        if (!found)
            result = NOT_FOUND;
        else if (!list || *count < found)
            result = INSUFFICIENT_SIZE;
        else
            memcpy(list, all, found * sizeof *all);
        *count = found;
    });
}

API nvmlReturn_t nvmlDeviceGetProcessesUtilizationInfo(nvmlDevice_t d, struct samples_v1 *info)
{
    static struct sample all[SAMPLES];
    DEVICE_CALL("nvmlDeviceGetProcessesUtilizationInfo", {
        unsigned found = samples_since(d, t, info->since_us, all);
        if (info->version != 0x01000018)
            result = ARGUMENT_VERSION_MISMATCH;
        else if (!found)
            result = NOT_FOUND;
        else if (!info->samples || info->count < found)
            result = INSUFFICIENT_SIZE;
        else
            for (unsigned i = 0; i < found; i++)
                info->samples[i] = (struct sample_v1){all[i].time_us, all[i].pid, all[i].sm, all[i].memory, 0, 0, 0, 0};
        info->count = found;
    });
}

/* ---- accounting -------------------------------------------------------------------------------------------------- */

struct account {
    unsigned sm, memory;
    unsigned long long memory_max, active_ms, start_us;
    unsigned running, reserved[5];
};

API nvmlReturn_t nvmlDeviceGetAccountingMode(nvmlDevice_t d, unsigned *mode)
{
    DEVICE_CALL("nvmlDeviceGetAccountingMode", *mode = (unsigned)d->accounting;);
}

API nvmlReturn_t nvmlDeviceGetAccountingBufferSize(nvmlDevice_t d, unsigned *count)
{
    DEVICE_CALL("nvmlDeviceGetAccountingBufferSize", *count = PIDS;);
}

API nvmlReturn_t nvmlDeviceGetAccountingPids(nvmlDevice_t d, unsigned *count, unsigned *pids)
{
    DEVICE_CALL("nvmlDeviceGetAccountingPids", {
        unsigned found = 0;
        for (int i = 0; i < script.entries && found < *count; i++)
            if (script.entry[i].device == d - script.device && script.entry[i].from <= t)
                found += (unsigned)pids_of(&script.entry[i], pids + found, (int)(*count - found));
        *count = found;
    });
}

API nvmlReturn_t nvmlDeviceGetAccountingStats(nvmlDevice_t d, unsigned pid, struct account *account)
{
    DEVICE_CALL("nvmlDeviceGetAccountingStats", {
        result = NOT_FOUND;
        for (int i = 0; i < script.entries && result == NOT_FOUND; i++) {
            const struct entry *e = &script.entry[i];
            unsigned pids[PIDS];
            int found = e->device == d - script.device ? pids_of(e, pids, PIDS) : 0;
            for (int j = 0; j < found && result == NOT_FOUND; j++) {
                if (pids[j] != pid)
                    continue;
                double end = t < e->until ? t : e->until;
                *account = (struct account){
                    (unsigned)e->sm, (unsigned)e->memory, (unsigned long long)(e->used_mib * MIB),
                    (unsigned long long)((end - e->from) * 1000), driver_us(e->from), t < e->until, {0}};
                result = SUCCESS;
            }
        }
        if (garbage("nvmlDeviceGetAccountingStats", d))
            memset(account, 0xff, sizeof *account);
    });
}
