/* SPDX-License-Identifier: Apache-2.0 */
/* What the launch program (launches.bpf.c) and its reader (ext/launches.pyx, gpuguard/sensors/launches) agree on. The
 * NumPy forms of these structures are KEY and VALUE of rows.py there, and EVENT of sensor.py; a test compares sizes.
 * Times are CLOCK_BOOTTIME, so that they do not stand still while the host sleeps.
 */
#ifndef GPUGUARD_LAUNCHES_H
#define GPUGUARD_LAUNCHES_H

#include <linux/types.h>

#define GAP_BUCKETS 40
#define ROWS_MAX 65536
/* So many rows one process may take, and so many where the table is three quarters full: the rest is for those who have
 * few. What it launches beyond is counted without geometry, in the end without kernel. */
#define ROWS_EACH 8192
#define ROWS_EACH_FULL 64
/* So many events one process may send in a second (of 2^30 ns), and so many where the ring is half full. */
#define EVENTS_EACH 8192
#define EVENTS_EACH_FULL 512
#define PROCESSES_MAX 16384
#define CALLS_MAX 16384
#define RING_BYTES (4 * 1024 * 1024)
#define TEXT_BYTES 384
#define HEADER_BYTES 64

/* A cookie is what | form << 8: which call it is, and where its arguments lie. */
#define COOKIE_CALL 0x10000ull /* it gives something out, and launches nothing */
enum launch_form {
	FORM_REGISTERS = 0,    /* handle, grid x3, block x2 in registers; block z, shared on the stack */
	FORM_CONFIG = 1,       /* CUlaunchConfig *, handle */
	FORM_GRAPH = 2,        /* CUgraphExec */
	FORM_LIST = 3,         /* CUDA_LAUNCH_PARAMS *, devices */
	FORM_HANDLE = 4,       /* handle only: cuLaunch */
	FORM_HANDLE_GRID = 5,  /* handle, grid x2: cuLaunchGrid */
	FORM_RANGE = 6,        /* queue, handle, dimensions, -, const size_t *global, *local: clEnqueueNDRangeKernel */
	FORM_SUBMIT = 7,       /* queue, submissions: vkQueueSubmit */
};

enum call_form {
	CALL_LOOKUP = 0,  /* handle *out, parent, const char *name */
	CALL_ALIAS = 1,   /* handle *out, parent: the same code under another handle */
	CALL_IMAGE = 2,   /* handle *out, const void *image */
	CALL_FILE = 3,    /* handle *out, const char *path */
	CALL_LINK = 4,    /* state, void **image, size_t *bytes: cuLinkComplete */
	/* Graphs are counted in the kernel; only an instantiated one is told, with its kernels in `bytes`. */
	CALL_BEGIN = 5,   /* stream: what this thread launches from now on is captured */
	CALL_END = 6,     /* stream, graph *out */
	CALL_NODE = 7,    /* node *out, graph: cuGraphAddKernelNode */
	CALL_ANY_NODE = 8,     /* node *out, graph, -, -, CUgraphNodeParams *: cuGraphAddNode */
	CALL_ANY_NODE_V2 = 9,  /* node *out, graph, -, -, -, CUgraphNodeParams * */
	CALL_CHILD = 10,  /* node *out, graph, -, -, child graph */
	CALL_CLONE = 11,  /* graph *out, graph */
	CALL_GRAPH = 12,  /* exec *out, graph: cuGraphInstantiate */
	/* These return what they give out, NULL where they failed. */
	CALL_CREATE = 13, /* parent, const char *name: clCreateKernel */
	CALL_POINTER = 14, /* device, const char *name: vkGetDeviceProcAddr, told where it gives out a submission call */
	CALL_UNLOAD = 15,  /* handle: its kernels' handles may be given out again */
	CALL_NAMED = 16,   /* const char **out, handle: cuFuncGetName */
	CALL_EMPTY = 17,   /* graph *out: cuGraphCreate */
	CALL_BEGIN_INTO = 18, /* stream, graph: what is captured is added to this one */
};
#define CAPTURES_MAX 4096
#define GRAPHS_MAX 16384

/* What is done at a launch of a process that has a row in `quotas`. */
enum quota_mode {
	QUOTA_RATE = 0,  /* SIGSTOP when it is ahead of its rate by more than QUOTA_AHEAD_NS */
	QUOTA_STOP = 1,  /* SIGSTOP before the launch reaches the driver */
	QUOTA_KILL = 2,  /* SIGKILL before the launch reaches the driver */
};
#define QUOTAS_MAX 4096
#define QUOTA_AHEAD_NS 20000000ull
/* So much of what was not used may be caught up with: more than a late wake-up, less than a burst to notice. */
#define QUOTA_BEHIND_NS 60000000ull

enum counter {
	COUNT_ROWS_FULL = 0, COUNT_UNREADABLE = 1, COUNT_RING_FULL = 2, COUNT_FOREIGN = 3, COUNT_COARSE = 4,
	COUNT_CALLS_FULL = 5,
	COUNT_BEGUN = 6, /* no loss: rows that were ever begun; while it stands still, an empty table is empty */
	COUNTERS = 7,
};

struct launch_key {
	__u64 start_ns;  /* of the process */
	__u64 kernel;
	__u32 pid;
	__u32 api;
	__u32 grid[3];
	__u32 block[3];
	__u32 shared_bytes;
	__u32 zero;
};

struct launch_value {
	__u64 launches;
	__u64 first_ns;
	__u64 last_ns;
	__u32 gaps_log2[GAP_BUCKETS];
};

struct launch_event {
	__u64 time_ns;
	__u64 start_ns;
	__u64 handle;
	__u64 parent;
	__u64 address;  /* of the image */
	__u64 bytes;    /* of the image, 0 unknown; CALL_GRAPH: kernels */
	__u32 pid;
	__u32 form;     /* enum call_form */
	__u8 text[TEXT_BYTES];  /* a name or path, cut and NUL-ended; or the first HEADER_BYTES of the image */
};

/* What one process has of the table and the ring. The broker sets `rows` right at each sweep; that of pid 0 is how many
 * there are in all. */
struct share_key { __u64 start_ns; __u64 pid; };
struct share { __u64 rows; __u64 second; __u64 events; };

/* Written by the broker, read by the process that wakes the stopped (broker/boundary.py). By pid as the broker sees
 * it. One launch each interval_ns is paid for by moving due_ns on: the virtual scheduling form of the token bucket
 * (GCRA, ITU-T I.371), which needs one atomic addition and no lock. `stops` grows after the signal was sent.
 */
struct quota {
	__u64 start_ticks;  /* field 22 of /proc/PID/stat: whoever takes the pid over has no quota */
	__u64 interval_ns;
	__u64 due_ns;
	__u64 launches;
	__u64 stops;
	__u64 mode;
};

#endif
