// SPDX-License-Identifier: Apache-2.0 OR BSD-2-Clause OR GPL-2.0-only
/* Process events: fork, exec and exit of processes (not of threads), each with enough to name the process even when it
 * is gone before anyone can read its /proc.
 *
 * Pids are those of one pid namespace, `pid_namespace` (pids.h); a task that it does not see is passed over.
 *
 * Fields are found through the kernel's own type information (BTF, CO-RE); without it the object does not load, and
 * the caller takes the proc connector. `start_boottime` is what /proc/PID/stat field 22 is computed from
 * (fs/proc/array.c, do_task_stat), so start ticks need no read of /proc.
 */
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "pids.h"

#define RING_BYTES (1024 * 1024)
#define ARGV_BYTES 512
#define NAME_BYTES 16
#define GROUP_EXIT 4  /* SIGNAL_GROUP_EXIT, linux/sched/signal.h */

enum kind { FORK = 1, EXEC = 2, EXIT = 3 };

struct net { struct ns_common ns; } CO_RE;
struct nsproxy { struct net *net_ns; } CO_RE;
typedef struct { int counter; } atomic_t;
struct signal_struct { atomic_t live; unsigned int flags; int group_exit_code; } CO_RE;
typedef struct { unsigned int val; } kuid_t;
struct cred { kuid_t uid; } CO_RE;
struct mm_struct { unsigned long arg_start, arg_end; } CO_RE;
struct task_struct {
	int pid;
	int tgid;
	int exit_code;
	unsigned long long start_boottime;
	struct pid *thread_pid;
	struct task_struct *real_parent;
	struct task_struct *group_leader;
	struct signal_struct *signal;
	struct nsproxy *nsproxy;
	struct mm_struct *mm;
	const struct cred *cred;
	char comm[NAME_BYTES];
} CO_RE;

/* Read by gpuguard/sensors/processes/bpf.py as "<QQQQQIIIIII16s"; of an exec "II512s" follow. */
struct event {
	__u64 time_ns;          /* CLOCK_BOOTTIME */
	__u64 start_ns;         /* CLOCK_BOOTTIME, 0 never */
	__u64 parent_start_ns;  /* 0: the parent is not visible */
	__u64 cgroup_id;        /* v2 hierarchy */
	__u64 lost;             /* events that found the ring full, since the start */
	__u32 kind;
	__u32 pid;
	__u32 parent_pid;       /* 0: not visible from the namespace */
	__u32 uid;
	__u32 netns;
	__u32 exit_status;      /* as wait(2) gives it */
	char name[NAME_BYTES];
};

/* An exec, with the first of its arguments as they lie in memory: each ended by a NUL. They are in the clear, like
 * /proc/PID/cmdline is to everybody on the host, and redacted by who reads them here. Half of the processes that live
 * for a millisecond are gone before their /proc can be opened. */
struct exec_event {
	struct event event;
	__u32 argv_bytes; /* in all; more than ARGV_BYTES are cut */
	__u32 unused;
	char argv[ARGV_BYTES];
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, RING_BYTES);
} events SEC(".maps");

const volatile __u32 pid_namespace = 0;
__u64 lost = 0;

static __always_inline __u32 pid_here(struct task_struct *task)
{
	struct task_struct *leader = BPF_CORE_READ(task, group_leader);

	return number_in(BPF_CORE_READ(leader, thread_pid), pid_namespace);
}

static __always_inline __u32 exit_status(struct task_struct *task)
{
	struct signal_struct *signal = BPF_CORE_READ(task, signal);

	if (BPF_CORE_READ(signal, flags) & GROUP_EXIT)
		return BPF_CORE_READ(signal, group_exit_code);
	struct task_struct *leader = BPF_CORE_READ(task, group_leader);
	return BPF_CORE_READ(leader, exit_code);
}

static __always_inline void fill(struct event *event, struct task_struct *task, __u32 kind, __u32 pid)
{
	struct task_struct *leader = BPF_CORE_READ(task, group_leader);
	struct task_struct *parent = BPF_CORE_READ(leader, real_parent, group_leader);

	event->time_ns = bpf_ktime_get_boot_ns();
	event->start_ns = BPF_CORE_READ(leader, start_boottime);
	event->parent_pid = pid_here(parent);
	event->parent_start_ns = BPF_CORE_READ(parent, start_boottime);
	event->cgroup_id = bpf_get_current_cgroup_id();
	event->lost = lost;
	event->kind = kind;
	event->pid = pid;
	event->uid = BPF_CORE_READ(task, cred, uid.val);
	event->netns = BPF_CORE_READ(task, nsproxy, net_ns, ns.inum);
	event->exit_status = kind == EXIT ? exit_status(task) : 0;
	bpf_core_read_str(event->name, sizeof(event->name), &leader->comm);
}

static __always_inline int report(struct task_struct *task, __u32 kind)
{
	__u32 pid = pid_here(task);
	struct event *event;

	if (!pid)
		return 0;
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event) {
		__sync_fetch_and_add(&lost, 1);
		return 0;
	}
	fill(event, task, kind, pid);
	bpf_ringbuf_submit(event, 0);
	return 0;
}

/* TP_PROTO(struct task_struct *parent, struct task_struct *child); also for threads. */
SEC("raw_tp/sched_process_fork")
int on_fork(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *child = (struct task_struct *)ctx->args[1];

	if (BPF_CORE_READ(child, pid) != BPF_CORE_READ(child, tgid))
		return 0;
	return report(child, FORK);
}

/* TP_PROTO(struct task_struct *p, pid_t old_pid, struct linux_binprm *bprm); p is current. */
SEC("raw_tp/sched_process_exec")
int on_exec(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (struct task_struct *)ctx->args[0];
	__u32 pid = pid_here(task);
	struct exec_event *event;
	unsigned long start, bytes;

	if (!pid)
		return 0;
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event) {
		__sync_fetch_and_add(&lost, 1);
		return 0;
	}
	fill(&event->event, task, EXEC, pid);
	start = BPF_CORE_READ(task, mm, arg_start);
	bytes = BPF_CORE_READ(task, mm, arg_end) - start;
	event->argv_bytes = bytes;
	event->unused = 0;
	if (bytes > ARGV_BYTES)
		bytes = ARGV_BYTES;
	if (bpf_probe_read_user(event->argv, bytes, (void *)start))
		event->argv_bytes = 0;
	bpf_ringbuf_submit(event, 0);
	return 0;
}

/* TP_PROTO(struct task_struct *p, ...), for each thread. do_exit counts signal->live down before it comes here, so
 * the process is gone when none is left; two last threads at once may both say so, and the reader takes the first. */
SEC("raw_tp/sched_process_exit")
int on_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (struct task_struct *)ctx->args[0];

	if (BPF_CORE_READ(task, signal, live.counter) != 0)
		return 0;
	return report(task, EXIT);
}

/* The kernel lets only programs that are offered under the GPL as well read its memory: hence this file's licences. */
char LICENSE[] SEC("license") = "Dual BSD/GPL";
