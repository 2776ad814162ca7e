// SPDX-License-Identifier: Apache-2.0 OR BSD-2-Clause OR GPL-2.0-only
/* Kernel launches, counted where they are made.
 *
 * on_entry sits on every launch export of every libcuda (and of the loaders of OpenCL and Vulkan), and with on_return
 * on the calls that give out handles for names and for code.
 * It runs for each launch of each GPU process, so it adds to one row and leaves; only names and images travel through
 * the ring, and there only the first bytes of an image.
 *
 * Probed at symbol+0xa (or at another place that sensors/launches/libcuda.py found safe), arguments are still where the
 * caller left them: registers, and the stack from the return address on. Layouts are those of cuda.h 12 on x86-64.
 *
 * Who launches is told by the kernel itself: pid as seen from the namespace `pid_namespace` (0: the first one), and
 * start_boottime, from which field 22 of /proc/PID/stat is made (fs/proc/array.c). So a row is never given to a process
 * that took the pid over. The kernel's own type information (BTF) finds these fields.
 */
#include <stdbool.h>

#include <linux/bpf.h>
#include <asm/ptrace.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "launches.h"
#include "pids.h"

#define NO_PREALLOC 1 /* BPF_F_NO_PREALLOC */
#define EEXIST 17
#define SIGKILL 9
#define SIGSTOP 19
#define TICK_NS 10000000ull /* USER_HZ is 100 in asm-generic/param.h, and on x86-64 */
#define DEVICES_MAX 64 /* CU_MAX_DEVICES and then some: what a caller claims beyond is no launch */
#define SUBMISSIONS_MAX 4096
#define FATBIN_WRAPPER 0x466243b1 /* __fatBinC_Wrapper_t: magic, version, data, filename_or_fatbins */

struct task_struct {
	unsigned long long start_boottime;
	struct pid *thread_pid;
	struct task_struct *group_leader;
} CO_RE;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, ROWS_MAX);
	__uint(map_flags, NO_PREALLOC);
	__type(key, struct launch_key);
	__type(value, struct launch_value);
} rows SEC(".maps");

struct call { __u64 first; __u64 second; __u64 third; __u64 fifth; __u64 sixth; };

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, CALLS_MAX);
	__type(key, __u64);
	__type(value, struct call);
} calls SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, RING_BYTES);
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, QUOTAS_MAX);
	__uint(map_flags, NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct quota);
} quotas SEC(".maps");

/* How many rows `quotas` has: while it has none, a launch pays nothing for it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} quotas_held SEC(".maps");

/* Kernels that a thread has launched into a capture; and how many threads ever began one, while none of it is over. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, CAPTURES_MAX);
	__type(key, __u64);
	__type(value, __u64);
} captures SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} capturing SEC(".maps");

struct graph { __u64 start_ns; __u64 handle; __u64 pid; };

/* Kernels of a graph. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, GRAPHS_MAX);
	__type(key, struct graph);
	__type(value, __u64);
} graphs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, PROCESSES_MAX);
	__type(key, struct share_key);
	__type(value, struct share);
} shares SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} rows_held SEC(".maps");

const volatile __u32 pid_namespace = 0;

static __always_inline void count(__u32 which)
{
	__u64 *counter = bpf_map_lookup_elem(&counters, &which);

	if (counter)
		__sync_fetch_and_add(counter, 1);
}

/* The pid that /proc of our namespace shows; 0 where it shows none. */
static __always_inline __u32 pid_here(struct task_struct *leader)
{
	if (!pid_namespace)
		return bpf_get_current_pid_tgid() >> 32;
	return number_in(BPF_CORE_READ(leader, thread_pid), pid_namespace);
}

static __always_inline __u32 log2_of(__u64 value)
{
	__u32 bits = 0;

	if (value >> 32) { bits += 32; value >>= 32; }
	if (value >> 16) { bits += 16; value >>= 16; }
	if (value >> 8) { bits += 8; value >>= 8; }
	if (value >> 4) { bits += 4; value >>= 4; }
	if (value >> 2) { bits += 2; value >>= 2; }
	return bits + (__u32)(value >> 1);
}

static __always_inline void add(struct launch_value *row, __u64 now_ns, __u64 launches)
{
	__u64 last_ns = row->last_ns;
	__u32 bucket = log2_of(now_ns > last_ns ? now_ns - last_ns : 0);

	row->last_ns = now_ns;
	__sync_fetch_and_add(&row->launches, launches);
	if (bucket >= GAP_BUCKETS)
		bucket = GAP_BUCKETS - 1;
	__sync_fetch_and_add(&row->gaps_log2[bucket], 1);
}

static __always_inline int read_user(void *to, __u32 bytes, __u64 from)
{
	int error = bpf_probe_read_user(to, bytes, (void *)from);

	if (error)
		count(COUNT_UNREADABLE);
	return error;
}

/* OpenCL counts work-items where CUDA counts blocks. The local size may be left to the driver: 0 then. */
static __always_inline void range(struct pt_regs *ctx, struct launch_key *key)
{
	__u64 dimensions = (__u32)PT_REGS_PARM3(ctx), items[3] = {}, local[3] = {};

	if (dimensions < 1 || dimensions > 3)
		return;
	for (__u32 i = 0; i < 3; i++) {
		if (i >= dimensions)
			break;
		if (read_user(&items[i], 8, ctx->r8 + 8 * i))
			return;
		if (ctx->r9 && read_user(&local[i], 8, ctx->r9 + 8 * i))
			return;
	}
	for (__u32 i = 0; i < 3; i++) {
		key->grid[i] = i >= dimensions ? 1 : local[i] ? items[i] / local[i] : items[i];
		key->block[i] = local[i];
	}
}

static __always_inline __u64 at_most(__u32 claimed, __u32 bound)
{
	return claimed < bound ? claimed : bound;
}

/* Fill what was launched; return how many launches this call makes. */
static __always_inline __u64 arguments(struct pt_regs *ctx, __u32 form, struct launch_key *key)
{
	__u32 six[7];

	switch (form) {
	case FORM_REGISTERS:
		key->kernel = PT_REGS_PARM1(ctx);
		key->grid[0] = PT_REGS_PARM2(ctx);
		key->grid[1] = PT_REGS_PARM3(ctx);
		key->grid[2] = ctx->rcx;
		key->block[0] = ctx->r8;
		key->block[1] = ctx->r9;
		/* Stack: return address, block z, shared; each in 8 bytes. */
		if (!read_user(six, 16, PT_REGS_SP(ctx) + 8)) {
			key->block[2] = six[0];
			key->shared_bytes = six[2];
		}
		return 1;
	case FORM_CONFIG:
	case FORM_LIST: {
		__u64 from = PT_REGS_PARM1(ctx);
		key->kernel = PT_REGS_PARM2(ctx);
		if (form == FORM_LIST) {
			if (read_user(&key->kernel, 8, from))
				key->kernel = 0;
			from += 8;
		}
		if (!read_user(six, sizeof(six), from)) {
			for (int i = 0; i < 3; i++) {
				key->grid[i] = six[i];
				key->block[i] = six[i + 3];
			}
			key->shared_bytes = six[6];
		}
		return form == FORM_LIST ? at_most(PT_REGS_PARM2(ctx), DEVICES_MAX) : 1;
	}
	case FORM_RANGE:
		key->kernel = PT_REGS_PARM2(ctx);
		range(ctx, key);
		return 1;
	case FORM_SUBMIT:
		key->kernel = PT_REGS_PARM1(ctx);
		return at_most(PT_REGS_PARM2(ctx), SUBMISSIONS_MAX);
	case FORM_HANDLE_GRID:
		key->grid[0] = PT_REGS_PARM2(ctx);
		key->grid[1] = PT_REGS_PARM3(ctx);
		key->grid[2] = 1;
		/* fall through */
	default:
		key->kernel = PT_REGS_PARM1(ctx);
		return 1;
	}
}

/* Return whether the process is ahead of its rate, and let it pay for these launches. */
static __always_inline bool ahead(struct quota *quota, __u64 launches, __u64 now_ns)
{
	__u64 due_ns = quota->due_ns;

	if (due_ns + QUOTA_BEHIND_NS < now_ns)
		__sync_val_compare_and_swap(&quota->due_ns, due_ns, now_ns - QUOTA_BEHIND_NS);
	due_ns = __sync_fetch_and_add(&quota->due_ns, launches * quota->interval_ns);
	return due_ns > now_ns + QUOTA_AHEAD_NS;
}

/* Stop or end the process before this launch reaches the driver, if it has no right to it. The signal is taken on the
 * way back to the program, so a stopped launch goes on once the process is continued. Returns whether there will be
 * no launch at all.
 */
static __always_inline bool enforce(const struct launch_key *key, __u64 launches, __u64 now_ns)
{
	__u32 zero = 0, pid = key->pid;
	__u64 *held = bpf_map_lookup_elem(&quotas_held, &zero);
	struct quota *quota;

	if (!held || !*held)
		return false;
	quota = bpf_map_lookup_elem(&quotas, &pid);
	if (!quota || quota->start_ticks != key->start_ns / TICK_NS)
		return false;
	__sync_fetch_and_add(&quota->launches, launches);
	if (quota->mode == QUOTA_KILL) {
		bpf_send_signal(SIGKILL);
		return true;
	}
	if (quota->mode == QUOTA_RATE && !ahead(quota, launches, now_ns))
		return false;
	bpf_send_signal(SIGSTOP);
	/* Afterwards: who sees it grow may continue the process, and the signal is not still to come. */
	__sync_fetch_and_add(&quota->stops, 1);
	return false;
}

static __always_inline void capture(__u64 launches)
{
	__u32 zero = 0;
	__u64 thread, *begun = bpf_map_lookup_elem(&capturing, &zero), *captured;

	if (!begun || !*begun)
		return;
	thread = bpf_get_current_pid_tgid();
	captured = bpf_map_lookup_elem(&captures, &thread);
	if (captured)
		*captured += launches;
}

static __always_inline struct share *share_of(__u64 start_ns, __u32 pid)
{
	struct share_key key = {start_ns, pid};
	struct share none = {}, *share = bpf_map_lookup_elem(&shares, &key);

	if (share)
		return share;
	bpf_map_update_elem(&shares, &key, &none, BPF_NOEXIST);
	return bpf_map_lookup_elem(&shares, &key);
}

/* Begin a row; false where there is no room. */
static __always_inline bool begin(const struct launch_key *key, __u64 launches, __u64 now_ns, struct share *share)
{
	struct launch_value first = {.launches = launches, .first_ns = now_ns, .last_ns = now_ns}, *row;
	__u32 zero = 0;
	__u64 *held = bpf_map_lookup_elem(&rows_held, &zero);
	int error = bpf_map_update_elem(&rows, key, &first, BPF_NOEXIST);

	if (!error) {
		__sync_fetch_and_add(&share->rows, 1);
		if (held)
			__sync_fetch_and_add(held, 1);
		count(COUNT_BEGUN);
		return true;
	}
	/* Another thread was first. */
	row = error == -EEXIST ? bpf_map_lookup_elem(&rows, key) : NULL;
	if (row)
		add(row, now_ns, launches);
	return row != NULL;
}

/* Count what has no row yet: in one of its own, or without its geometry, or without its kernel. See ROWS_EACH. */
static __always_inline void count_new(struct launch_key *key, __u64 launches, __u64 now_ns)
{
	__u32 zero = 0;
	__u64 *held = bpf_map_lookup_elem(&rows_held, &zero), each;
	struct share *share = share_of(key->start_ns, key->pid);
	struct launch_value *row;

	if (!share || !held) {
		count(COUNT_ROWS_FULL);
		return;
	}
	each = *held > ROWS_MAX / 4 * 3 ? ROWS_EACH_FULL : ROWS_EACH;
	if (share->rows >= each) {
		count(COUNT_COARSE);
		__builtin_memset(key->grid, 0, sizeof(key->grid));
		__builtin_memset(key->block, 0, sizeof(key->block));
		key->shared_bytes = 0;
		if (share->rows >= 2 * each)
			key->kernel = 0;
		row = bpf_map_lookup_elem(&rows, key);
		if (row) {
			add(row, now_ns, launches);
			return;
		}
	}
	if (!begin(key, launches, now_ns, share))
		count(COUNT_ROWS_FULL);
}

static __always_inline int on_launch(struct pt_regs *ctx, __u64 cookie)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct task_struct *leader = BPF_CORE_READ(task, group_leader);
	struct launch_key key = {};
	struct launch_value *row;
	__u64 launches, now_ns;

	key.pid = pid_here(leader);
	if (!key.pid) {
		count(COUNT_FOREIGN);
		return 0;
	}
	key.start_ns = BPF_CORE_READ(leader, start_boottime);
	key.api = cookie & 0xff;
	launches = arguments(ctx, cookie >> 8, &key);
	now_ns = bpf_ktime_get_boot_ns();
	if (enforce(&key, launches, now_ns))
		return 0;
	capture(launches);
	row = bpf_map_lookup_elem(&rows, &key);
	if (row)
		add(row, now_ns, launches);
	else
		count_new(&key, launches, now_ns);
	return 0;
}

static __always_inline int on_call(struct pt_regs *ctx)
{
	__u64 thread = bpf_get_current_pid_tgid();
	struct call call = {PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), PT_REGS_PARM3(ctx), ctx->r8, ctx->r9};

	bpf_map_update_elem(&calls, &thread, &call, BPF_ANY);
	return 0;
}

/* One program for both: each link of a library costs a wait of its own when it goes. */
SEC("uprobe")
int on_entry(struct pt_regs *ctx)
{
	__u64 cookie = bpf_get_attach_cookie(ctx);

	return cookie & COOKIE_CALL ? on_call(ctx) : on_launch(ctx, cookie);
}

static __always_inline void read_image(struct launch_event *event)
{
	if (read_user(event->text, HEADER_BYTES, event->address))
		return;
	if (*(__u32 *)event->text == FATBIN_WRAPPER) {
		event->address = *(__u64 *)(event->text + 8);
		read_user(event->text, HEADER_BYTES, event->address);
	}
}

static __always_inline void describe(struct launch_event *event, const struct call *call)
{
	switch (event->form) {
	case CALL_LOOKUP:
		event->parent = call->second;
		if (bpf_probe_read_user_str(event->text, TEXT_BYTES, (void *)call->third) < 0)
			count(COUNT_UNREADABLE);
		break;
	case CALL_CREATE:
	case CALL_POINTER:
		event->parent = call->first;
		if (bpf_probe_read_user_str(event->text, TEXT_BYTES, (void *)call->second) < 0)
			count(COUNT_UNREADABLE);
		break;
	case CALL_ALIAS:
	case CALL_GRAPH:
		event->parent = call->second;
		break;
	case CALL_UNLOAD:
		event->handle = call->first;
		break;
	case CALL_NAMED: {
		__u64 text = event->handle; /* what was given out is where the name is */
		event->handle = call->second;
		if (bpf_probe_read_user_str(event->text, TEXT_BYTES, (void *)text) < 0)
			count(COUNT_UNREADABLE);
		break;
	}
	case CALL_FILE:
		if (bpf_probe_read_user_str(event->text, TEXT_BYTES, (void *)call->second) < 0)
			count(COUNT_UNREADABLE);
		break;
	case CALL_LINK:
		event->handle = 0;
		read_user(&event->address, 8, call->second);
		read_user(&event->bytes, 8, call->third);
		read_image(event);
		break;
	default:
		event->address = call->second;
		read_image(event);
	}
}

static __always_inline __u64 kernels_of(const struct graph *graph)
{
	__u64 *kernels = bpf_map_lookup_elem(&graphs, graph);

	return kernels ? *kernels : 0;
}

static __always_inline void put_in(struct graph *graph, __u64 kernels)
{
	kernels += kernels_of(graph);
	bpf_map_update_elem(&graphs, graph, &kernels, BPF_ANY);
}

static __always_inline void begin_or_end(struct graph *graph, const struct call *call, __u32 form)
{
	__u64 thread = bpf_get_current_pid_tgid(), before, *captured, *begun;
	__u32 zero = 0;

	begun = bpf_map_lookup_elem(&capturing, &zero);
	if (!begun)
		return;
	if (form != CALL_END) {
		before = form == CALL_BEGIN_INTO ? kernels_of(graph) : 0;
		/* One that failed to end is forgotten: what it held is in no graph. */
		if (!bpf_map_update_elem(&captures, &thread, &before, BPF_NOEXIST))
			__sync_fetch_and_add(begun, 1);
		else
			bpf_map_update_elem(&captures, &thread, &before, BPF_ANY);
		return;
	}
	captured = bpf_map_lookup_elem(&captures, &thread);
	if (!captured || read_user(&graph->handle, 8, call->second))
		return;
	bpf_map_update_elem(&graphs, graph, captured, BPF_ANY);
	bpf_map_delete_elem(&captures, &thread);
	__sync_fetch_and_add(begun, -1);
}

/* Keep count of the kernels of a graph; return whether this call was about one and needs no more. */
static __always_inline bool graphed(struct graph *graph, const struct call *call, __u32 form)
{
	__u64 kernels;
	__u32 type;

	graph->handle = call->second;
	switch (form) {
	case CALL_BEGIN:
	case CALL_BEGIN_INTO:
	case CALL_END:
		begin_or_end(graph, call, form);
		return true;
	case CALL_NODE:
		put_in(graph, 1);
		return true;
	case CALL_ANY_NODE:
	case CALL_ANY_NODE_V2:
		/* CUgraphNodeParams begins with its type, 0 is a kernel. */
		if (!read_user(&type, 4, form == CALL_ANY_NODE ? call->fifth : call->sixth) && !type)
			put_in(graph, 1);
		return true;
	case CALL_CHILD:
		graph->handle = call->fifth;
		kernels = kernels_of(graph);
		graph->handle = call->second;
		put_in(graph, kernels);
		return true;
	case CALL_EMPTY:
		/* Its handle may be that of one that was destroyed. */
		kernels = 0;
		if (!read_user(&graph->handle, 8, call->first))
			bpf_map_update_elem(&graphs, graph, &kernels, BPF_ANY);
		return true;
	case CALL_CLONE:
		kernels = kernels_of(graph);
		if (!read_user(&graph->handle, 8, call->first))
			bpf_map_update_elem(&graphs, graph, &kernels, BPF_ANY);
		return true;
	}
	return false;
}

/* Whether the call gave something out that is to be told; the two numbers are "vkQueueS" and "ubmit". */
static __always_inline bool gave(struct pt_regs *ctx, const struct call *call, __u32 form)
{
	__u64 name[2] = {};

	if (form != CALL_CREATE && form != CALL_POINTER)
		return (__u32)PT_REGS_RC(ctx) == 0; /* CUresult: the handle is there */
	if (!PT_REGS_RC(ctx))
		return false;
	if (form == CALL_CREATE)
		return true;
	return !read_user(name, 13, call->second) && name[0] == 0x5365756575516b76 && name[1] == 0x74696d6275;
}

/* Whether this process may send one more: nobody fills the ring alone, or keeps its reader busy. */
static __always_inline bool may_tell(__u64 start_ns, __u32 pid)
{
	struct share *share = share_of(start_ns, pid);
	__u64 second = bpf_ktime_get_boot_ns() >> 30;
	bool half_full = bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA) > RING_BYTES / 2;

	if (!share)
		return true;
	if (share->second != second) {
		share->second = second;
		share->events = 0;
	}
	return __sync_fetch_and_add(&share->events, 1) < (half_full ? EVENTS_EACH_FULL : EVENTS_EACH);
}

SEC("uretprobe")
int on_return(struct pt_regs *ctx)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct task_struct *leader = BPF_CORE_READ(task, group_leader);
	__u64 thread = bpf_get_current_pid_tgid();
	struct call *call = bpf_map_lookup_elem(&calls, &thread);
	struct launch_event *event;
	__u32 pid = pid_here(leader), form = (bpf_get_attach_cookie(ctx) & ~COOKIE_CALL) >> 8;

	if (!call) {
		count(COUNT_CALLS_FULL);
		return 0;
	}
	struct graph graph = {BPF_CORE_READ(leader, start_boottime), 0, pid};
	if (pid && gave(ctx, call, form) && !graphed(&graph, call, form)) {
		event = may_tell(graph.start_ns, pid) ? bpf_ringbuf_reserve(&events, sizeof(*event), 0) : NULL;
		if (event) {
			__builtin_memset(event, 0, sizeof(*event));
			event->time_ns = bpf_ktime_get_boot_ns();
			event->start_ns = BPF_CORE_READ(leader, start_boottime);
			event->pid = pid;
			event->form = form;
			if (form == CALL_CREATE || form == CALL_POINTER)
				event->handle = PT_REGS_RC(ctx);
			else if (form != CALL_UNLOAD)
				read_user(&event->handle, 8, call->first);
			describe(event, call);
			if (event->form == CALL_GRAPH)
				event->bytes = kernels_of(&graph);
			bpf_ringbuf_submit(event, 0);
		} else {
			count(COUNT_RING_FULL);
		}
	}
	bpf_map_delete_elem(&calls, &thread);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
