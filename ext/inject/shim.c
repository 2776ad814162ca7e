// SPDX-License-Identifier: Apache-2.0
/* The cooperative tier: a process that a scheduler gave this library tells of its own launches, at tens of ns each.
 *
 * Loaded by the driver (CUDA_INJECTION64_PATH names it, cuInit calls InitializeInjection) or by LD_PRELOAD, which then
 * sets that variable for the driver. It subscribes to nothing (CUPTI has room for one subscriber) and rewrites no code:
 * every launch export of libcuda goes on through a slot (`jmp *slot(%rip)`, since R580 `call *slot(%rip)`), and we put
 * our function into the slot and go on to what was there. So pointers that were given out by cuGetProcAddress are
 * covered too. An export of another shape is left alone and counted.
 *
 * Records go into a bounded ring in a file of our own in $GPUGUARD_CAPTURE_DIR, else in gpuguard/capture below
 * $XDG_RUNTIME_DIR; a full ring drops and counts. Nothing here may fail the program: where there is no ring, nothing is
 * wrapped.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "capture.h"

#define EXPORT __attribute__((visibility("default")))
enum { API_KERNEL, API_EX, API_COOPERATIVE, API_MULTI_DEVICE, API_GRAPH, API_LAUNCH, API_GRID, API_GRID_ASYNC };

static struct capture_header *header;
static struct capture_record *records;

static struct capture_record *claim(uint64_t *index) {
	uint64_t head = __atomic_load_n(&header->head, __ATOMIC_RELAXED);

	do {
		if (head - __atomic_load_n(&header->tail, __ATOMIC_ACQUIRE) >= CAPTURE_SLOTS) {
			__atomic_fetch_add(&header->lost, 1, __ATOMIC_RELAXED);
			return NULL;
		}
	} while (!__atomic_compare_exchange_n(&header->head, &head, head + 1, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
	*index = head;
	return &records[head % CAPTURE_SLOTS];
}

static uint64_t now_ns(void) {
	struct timespec now;

	clock_gettime(CLOCK_BOOTTIME, &now);
	return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static void tell(uint32_t api, void *kernel, const unsigned *grid, const unsigned *block, unsigned shared) {
	uint64_t index;
	struct capture_record *record = claim(&index);

	if (!record)
		return;
	record->time_ns = now_ns();
	record->handle = (uint64_t)kernel;
	record->kind = CAPTURE_LAUNCH;
	record->api = api;
	for (int i = 0; i < 3; i++) {
		record->grid[i] = grid ? grid[i] : 0;
		record->block[i] = block ? block[i] : 0;
	}
	record->shared_bytes = shared;
	__atomic_store_n(&record->sequence, index + 1, __ATOMIC_RELEASE);
}

static void name(uint32_t kind, const void *handle, const void *text, size_t bytes) {
	uint64_t index;
	struct capture_record *record = claim(&index);

	if (!record)
		return;
	record->time_ns = now_ns();
	record->handle = (uint64_t)handle;
	record->kind = kind;
	memset(record->text, 0, CAPTURE_TEXT_BYTES);
	memcpy(record->text, text, bytes < CAPTURE_TEXT_BYTES ? bytes : CAPTURE_TEXT_BYTES - 1);
	__atomic_store_n(&record->sequence, index + 1, __ATOMIC_RELEASE);
}

/* -- the calls, as cuda.h 12 declares them -------------------------------------------------------------------------*/

#define GEOMETRY unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared
#define PASSED gx, gy, gz, bx, by, bz, shared
#define TELL(api) tell(api, f, (unsigned[]){gx, gy, gz}, (unsigned[]){bx, by, bz}, shared)

typedef struct { unsigned grid[3], block[3], shared; } LaunchConfig;
typedef struct { void *function; unsigned grid[3], block[3], shared; void *stream, *parameters; } LaunchParameters;

#define KERNEL(NAME) \
	static int (*next_##NAME)(void *, GEOMETRY, void *, void **, void **); \
	static int NAME(void *f, GEOMETRY, void *s, void **p, void **e) { \
		TELL(API_KERNEL); return next_##NAME(f, PASSED, s, p, e); }
#define EX(NAME) \
	static int (*next_##NAME)(const LaunchConfig *, void *, void **, void **); \
	static int NAME(const LaunchConfig *c, void *f, void **p, void **e) { \
		if (c) tell(API_EX, f, c->grid, c->block, c->shared); \
		return next_##NAME(c, f, p, e); }
#define COOPERATIVE(NAME) \
	static int (*next_##NAME)(void *, GEOMETRY, void *, void **); \
	static int NAME(void *f, GEOMETRY, void *s, void **p) { \
		TELL(API_COOPERATIVE); return next_##NAME(f, PASSED, s, p); }
#define GRAPH(NAME) \
	static int (*next_##NAME)(void *, void *); \
	static int NAME(void *g, void *s) { tell(API_GRAPH, g, NULL, NULL, 0); return next_##NAME(g, s); }
#define LOOKUP(NAME) \
	static int (*next_##NAME)(void **, void *, const char *); \
	static int NAME(void **out, void *m, const char *n) { \
		int result = next_##NAME(out, m, n); \
		if (!result && out && n) name(CAPTURE_NAME, *out, n, strnlen(n, CAPTURE_TEXT_BYTES)); \
		return result; }

KERNEL(cuLaunchKernel) KERNEL(cuLaunchKernel_ptsz)
EX(cuLaunchKernelEx) EX(cuLaunchKernelEx_ptsz)
COOPERATIVE(cuLaunchCooperativeKernel) COOPERATIVE(cuLaunchCooperativeKernel_ptsz)
GRAPH(cuGraphLaunch) GRAPH(cuGraphLaunch_ptsz)
LOOKUP(cuModuleGetFunction) LOOKUP(cuLibraryGetKernel)

static int (*next_cuLaunchCooperativeKernelMultiDevice)(LaunchParameters *, unsigned, unsigned);
static int cuLaunchCooperativeKernelMultiDevice(LaunchParameters *list, unsigned count, unsigned flags) {
	for (unsigned i = 0; list && i < count; i++)
		tell(API_MULTI_DEVICE, list[i].function, list[i].grid, list[i].block, list[i].shared);
	return next_cuLaunchCooperativeKernelMultiDevice(list, count, flags);
}
static int (*next_cuLaunch)(void *);
static int cuLaunch(void *f) { tell(API_LAUNCH, f, NULL, NULL, 0); return next_cuLaunch(f); }
static int (*next_cuLaunchGrid)(void *, int, int);
static int cuLaunchGrid(void *f, int w, int h) {
	tell(API_GRID, f, (unsigned[]){w, h, 1}, NULL, 0);
	return next_cuLaunchGrid(f, w, h);
}
static int (*next_cuLaunchGridAsync)(void *, int, int, void *);
static int cuLaunchGridAsync(void *f, int w, int h, void *s) {
	tell(API_GRID_ASYNC, f, (unsigned[]){w, h, 1}, NULL, 0);
	return next_cuLaunchGridAsync(f, w, h, s);
}
static int (*next_cuKernelGetFunction)(void **, void *);
static int cuKernelGetFunction(void **out, void *kernel) {
	int result = next_cuKernelGetFunction(out, kernel);
	if (!result && out)
		name(CAPTURE_ALIAS, *out, &kernel, sizeof kernel);
	return result;
}

#define WRAPPED(X) X(cuLaunchKernel) X(cuLaunchKernel_ptsz) X(cuLaunchKernelEx) X(cuLaunchKernelEx_ptsz) \
	X(cuLaunchCooperativeKernel) X(cuLaunchCooperativeKernel_ptsz) X(cuLaunchCooperativeKernelMultiDevice) \
	X(cuGraphLaunch) X(cuGraphLaunch_ptsz) X(cuLaunch) X(cuLaunchGrid) X(cuLaunchGridAsync) \
	X(cuModuleGetFunction) X(cuLibraryGetKernel) X(cuKernelGetFunction)

/* -- putting ourselves in ------------------------------------------------------------------------------------------*/

/* How long an instruction is that an export may have before it goes on, 0 for any other: it saves registers, looks
 * whether the driver was torn down, and passes what lies on the stack again. Where a probe sits, 0xcc stands for the
 * first byte: of `cmpl` or `push %rbp` at the very beginning, else of `je`, of which the near one never goes back. */
static size_t stub_step(const unsigned char *at, int first) {
	unsigned char code = *at != 0xcc ? *at : first ? (at[1] == 0x3d ? 0x81 : 0x55) : at[1] == 0x84 ? 0x0f : 0x74;

	switch (code) {
	case 0x50: case 0x55: return 1;                              /* push %rax, %rbp */
	case 0x41: return at[1] >= 0x54 && at[1] <= 0x57 ? 2 : 0;    /* push %r12 to %r15 */
	case 0x48: return at[1] == 0x89 && at[2] == 0xe5 ? 3 :       /* mov %rsp,%rbp */
			  at[1] == 0x83 && at[2] == 0xec ? 4 : 0;    /* sub $n,%rsp */
	case 0x74: return 2;                                         /* je, near and far */
	case 0x0f: return at[1] == 0x84 ? 6 : 0;
	case 0x8b: return at[1] == 0x45 ? 3 : 0;                     /* mov n(%rbp),%eax */
	case 0xff: return at[1] == 0x75 ? 3 : 0;                     /* push n(%rbp) */
	case 0x81: return at[1] == 0x3d ? 10 : 0;                    /* cmpl $n,gate(%rip) */
	}
	return 0;
}

/* The slot through which an export goes on, NULL if this is no such stub. See gpuguard/sensors/launches/libcuda.py. */
static void **slot_of(const unsigned char *stub) {
	const unsigned char *at = stub;
	int gates = 0, steps = 16;
	size_t bytes;
	int32_t away;

	while (steps-- && (bytes = stub_step(at, at == stub))) {
		gates += bytes == 10;
		at += bytes;
	}
	if (gates != 1 || at[0] != 0xff || (at[1] != 0x15 && at[1] != 0x25))
		return NULL;
	memcpy(&away, at + 2, sizeof away);
	return (void **)(at + 6 + away);
}

/* The protection of the page, -1 if it is not mapped. */
static int protection(const void *address) {
	char line[512], mode[5];
	unsigned long start, end;
	int found = -1;
	FILE *maps = fopen("/proc/self/maps", "re");

	while (maps && found < 0 && fgets(line, sizeof line, maps))
		if (sscanf(line, "%lx-%lx %4s", &start, &end, mode) == 3 && (unsigned long)address >= start &&
		    (unsigned long)address < end)
			found = (mode[0] == 'r' ? PROT_READ : 0) | (mode[1] == 'w' ? PROT_WRITE : 0) |
				(mode[2] == 'x' ? PROT_EXEC : 0);
	if (maps)
		fclose(maps);
	return found;
}

static int put(void *library, const char *symbol, void *ours, void **next) {
	const unsigned char *stub = dlsym(library, symbol);
	void **slot = stub ? slot_of(stub) : NULL;
	long page = sysconf(_SC_PAGESIZE);
	void *start = (void *)((uintptr_t)slot & ~(uintptr_t)(page - 1));
	int before;

	if (!stub)
		return 0;
	before = slot ? protection(slot) : -1;
	if (before < 0 || before & PROT_EXEC || !*slot || *slot == ours)
		return -1;
	if (!(before & PROT_WRITE) && mprotect(start, (size_t)page, before | PROT_WRITE))
		return -1;
	*next = *slot;
	__atomic_store_n(slot, ours, __ATOMIC_RELEASE);
	if (!(before & PROT_WRITE))
		mprotect(start, (size_t)page, before);
	return 0;
}

static int folder(char *path, size_t bytes) {
	const char *told = getenv("GPUGUARD_CAPTURE_DIR"), *runtime = getenv("XDG_RUNTIME_DIR");
	struct stat found;

	if (told && *told)
		snprintf(path, bytes, "%s", told);
	else if (runtime && *runtime)
		snprintf(path, bytes, "%s/gpuguard/capture", runtime);
	else
		return -1;
	/* The daemon makes it: where there is none, nobody reads. */
	return lstat(path, &found) || !S_ISDIR(found.st_mode) || found.st_mode & S_IWOTH ? -1 : 0;
}

static int open_ring(void) {
	char path[4096], file[4200];
	size_t bytes = CAPTURE_HEADER_BYTES + (size_t)CAPTURE_SLOTS * sizeof(struct capture_record);
	void *mapped;
	int fd;

	if (folder(path, sizeof path))
		return -1;
	/* Two containers that share the folder may both have this pid. */
	snprintf(file, sizeof file, "%s/%ld-%llx.ring", path, (long)getpid(), (unsigned long long)now_ns());
	fd = open(file, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0)
		return -1;
	mapped = ftruncate(fd, (off_t)bytes) ? MAP_FAILED : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (mapped == MAP_FAILED) {
		unlink(file);
		return -1;
	}
	header = mapped;
	records = (void *)((char *)mapped + CAPTURE_HEADER_BYTES);
	header->pid = (uint64_t)getpid();
	__atomic_store_n(&header->magic, CAPTURE_MAGIC, __ATOMIC_RELEASE);
	return 0;
}

/* A child has the parent's wrappers and must have a ring of its own. Where it gets none it writes into a private page
 * that nobody reads. */
static void in_child(void) {
	size_t bytes = CAPTURE_HEADER_BYTES + (size_t)CAPTURE_SLOTS * sizeof(struct capture_record);
	void *nobody;

	if (!open_ring())
		return;
	nobody = mmap(header, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	if (nobody == MAP_FAILED)
		_exit(127);
}

static void begin(void) {
	void *library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);

	if (!library || open_ring())
		return;
	pthread_atfork(NULL, NULL, in_child);
#define PUT(NAME) \
	if (put(library, #NAME, (void *)NAME, (void **)&next_##NAME)) \
		header->unwrapped++;
	WRAPPED(PUT)
}

EXPORT int InitializeInjection(void) {
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, begin);
	return 1;
}

__attribute__((constructor)) static void preloaded(void) {
	Dl_info own;

	if (dladdr((void *)InitializeInjection, &own) && own.dli_fname)
		setenv("CUDA_INJECTION64_PATH", own.dli_fname, 0);
}
