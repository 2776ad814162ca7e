// SPDX-License-Identifier: Apache-2.0 OR BSD-2-Clause OR GPL-2.0-only
/* Process events: fork, exec and exit of processes (not of threads), each with enough to name the process even when it
 * is gone before anyone can read its /proc; and who dialled which TCP connection, however short it lives.
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
#define KERNEL_THREAD 0x00200000 /* PF_KTHREAD, linux/sched.h */
#define FIRST_PID_NAMESPACE 0xEFFFFFFC /* PROC_PID_INIT_INO, linux/proc_ns.h */

#define DIALS_MAX 16384    /* connections that wait for their answer at once */
#define DIALLERS_MAX 4096  /* processes that are counted at once */
#define SLICE_SHIFT 28     /* 268 ms: about as long as the reader sleeps */
#define TOLD_PER_SLICE 256 /* connections of one process; those above it are counted only */

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
	unsigned int flags;
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

/* net/tcp_states.h, linux/socket.h */
enum { ESTABLISHED = 1, SYN_SENT = 2, CLOSE = 7, TCP = 6, IPV4 = 2 };

typedef struct { struct net *net; } possible_net_t;
struct in6_addr { __u8 bytes[16]; };
struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	unsigned short skc_family;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
} CO_RE;
struct sock {
	struct sock_common __sk_common;
	__u16 sk_protocol;
	int sk_err;
} CO_RE;
struct inet_sock { struct sock sk; __be16 inet_sport; } CO_RE;

/* Who dialled, as long as nobody answered. */
struct dial {
	__u64 time_ns;
	__u64 start_ns;
	__u32 pid; /* 0: a thread of the kernel, or not visible from the namespace */
};

/* The same process has the same pid and start as long as it lives. */
struct dialler {
	__u64 start_ns;
	__u32 pid;
	__u32 unused;
};

struct tally {
	__u64 slice;
	__u32 told; /* in this slice */
	__u32 dialled;
	__u32 in_vain;
	__u32 withheld;
};

/* Read by gpuguard/sensors/processes/connects.py. */
struct connect {
	__u64 time_ns;  /* CLOCK_BOOTTIME of the dial */
	__u64 start_ns; /* of the process */
	__u64 lost;     /* connects that found the ring or the table of dials full, since the start */
	__u32 pid;
	__u32 netns;
	__u32 dialled;  /* by this process, since it was met first: this one is counted */
	__u32 in_vain;
	__u32 withheld;
	__u16 error;    /* as connect(2) gives it */
	__u16 state;    /* CLOSE: in vain; 0: the process ended, and this is only what it dialled in all */
	__u8 local[16];
	__u8 remote[16];
	__u16 local_port;
	__u16 remote_port;
	__u32 waited_us; /* for its answer; what took longer than fits is said to have waited as long as fits */
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, RING_BYTES);
} connects SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, DIALS_MAX);
	__type(key, __u64); /* the socket's address */
	__type(value, struct dial);
} dials SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, DIALLERS_MAX);
	__type(key, struct dialler);
	__type(value, struct tally);
} diallers SEC(".maps");

__u64 connects_lost = 0;

static __always_inline __u32 pid_here(struct task_struct *task)
{
	struct task_struct *leader = BPF_CORE_READ(task, group_leader);

	return number_in(BPF_CORE_READ(leader, thread_pid), pid_namespace);
}

/* The same of who runs, which is cheap where the namespace is the first. */
static __always_inline __u32 current_pid_here(struct task_struct *task)
{
	if (pid_namespace == FIRST_PID_NAMESPACE)
		return bpf_get_current_pid_tgid() >> 32;
	return pid_here(task);
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

/* Tell what a process that ends dialled in all, where not every connection of it was told. */
static __always_inline void settle(struct task_struct *task)
{
	struct task_struct *leader = BPF_CORE_READ(task, group_leader);
	struct dialler who = {.start_ns = BPF_CORE_READ(leader, start_boottime), .pid = pid_here(task)};
	struct tally *tally = bpf_map_lookup_elem(&diallers, &who);
	struct connect *row;

	if (!tally)
		return;
	row = tally->withheld ? bpf_ringbuf_reserve(&connects, sizeof(*row), 0) : NULL;
	if (row) {
		__builtin_memset(row, 0, sizeof(*row));
		row->time_ns = bpf_ktime_get_boot_ns();
		row->start_ns = who.start_ns;
		row->lost = connects_lost;
		row->pid = who.pid;
		row->dialled = tally->dialled;
		row->in_vain = tally->in_vain;
		row->withheld = tally->withheld;
		bpf_ringbuf_submit(row, BPF_RB_NO_WAKEUP);
	}
	bpf_map_delete_elem(&diallers, &who);
}

/* TP_PROTO(struct task_struct *p, ...), for each thread. do_exit counts signal->live down before it comes here, so
 * the process is gone when none is left; two last threads at once may both say so, and the reader takes the first. */
SEC("raw_tp/sched_process_exit")
int on_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (struct task_struct *)ctx->args[0];

	if (BPF_CORE_READ(task, signal, live.counter) != 0)
		return 0;
	settle(task);
	return report(task, EXIT);
}

static __always_inline int dial(struct sock *sk)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	__u64 key = (__u64)sk;
	struct dial one = {};

	if (!(BPF_CORE_READ(task, flags) & KERNEL_THREAD))
		one.pid = current_pid_here(task);
	one.start_ns = BPF_CORE_READ(task, group_leader, start_boottime);
	one.time_ns = bpf_ktime_get_boot_ns();
	if (bpf_map_update_elem(&dials, &key, &one, BPF_ANY)) {
		bpf_map_delete_elem(&dials, &key); /* better nobody than whoever had this socket before */
		__sync_fetch_and_add(&connects_lost, 1);
	}
	return 0;
}

/* Count the end of a dial; return whose tally it is, NULL where it is counted only. */
static __always_inline struct tally *count(const struct dial *one, int state, __u64 now_ns)
{
	struct dialler who = {.start_ns = one->start_ns, .pid = one->pid};
	__u64 slice = now_ns >> SLICE_SHIFT;
	struct tally *tally = bpf_map_lookup_elem(&diallers, &who);

	if (!tally) {
		struct tally none = {};
		bpf_map_update_elem(&diallers, &who, &none, BPF_NOEXIST);
		tally = bpf_map_lookup_elem(&diallers, &who);
		if (!tally) {
			__sync_fetch_and_add(&connects_lost, 1);
			return NULL;
		}
	}
	__sync_fetch_and_add(&tally->dialled, 1);
	if (state == CLOSE)
		__sync_fetch_and_add(&tally->in_vain, 1);
	if (tally->slice != slice) {
		tally->slice = slice;
		tally->told = 0;
	}
	if (tally->told < TOLD_PER_SLICE) {
		tally->told++; /* two processors at once may tell one more */
		return tally;
	}
	__sync_fetch_and_add(&tally->withheld, 1);
	return NULL;
}

static __always_inline void map_ipv4(__u8 *address, __be32 from)
{
	__builtin_memset(address, 0, 10);
	__builtin_memset(address + 10, 0xff, 2);
	__builtin_memcpy(address + 12, &from, 4);
}

/* Tell how a dial ended; return whether its beginning was known. */
static __always_inline int answer(struct sock *sk, int state)
{
	__u64 key = (__u64)sk;
	__u16 port = BPF_CORE_READ((struct inet_sock *)sk, inet_sport);
	struct dial *found = bpf_map_lookup_elem(&dials, &key);
	struct connect *row;
	struct tally *tally;
	struct dial one;
	__u64 now_ns = bpf_ktime_get_boot_ns(), waited_us;

	if (!found)
		return 0;
	one = *found;
	if (bpf_map_delete_elem(&dials, &key)) /* pushed out at this moment: what was copied may be another's */
		return 0;
	if (!one.pid || !port) /* no port was free: nothing was sent */
		return 1;
	tally = count(&one, state, now_ns);
	if (!tally)
		return 1;
	row = bpf_ringbuf_reserve(&connects, sizeof(*row), 0);
	if (!row) {
		__sync_fetch_and_add(&connects_lost, 1);
		return 1;
	}
	row->time_ns = one.time_ns;
	row->start_ns = one.start_ns;
	row->lost = connects_lost;
	row->pid = one.pid;
	row->netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	row->dialled = tally->dialled;
	row->in_vain = tally->in_vain;
	row->withheld = tally->withheld;
	row->error = state == CLOSE ? BPF_CORE_READ(sk, sk_err) : 0;
	row->state = state;
	row->local_port = __builtin_bswap16(port);
	row->remote_port = __builtin_bswap16(BPF_CORE_READ(sk, __sk_common.skc_dport));
	waited_us = (now_ns - one.time_ns) / 1000;
	row->waited_us = waited_us < 0xFFFFFFFF ? waited_us : 0xFFFFFFFF;
	if (BPF_CORE_READ(sk, __sk_common.skc_family) == IPV4) {
		map_ipv4(row->local, BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr));
		map_ipv4(row->remote, BPF_CORE_READ(sk, __sk_common.skc_daddr));
	} else {
		BPF_CORE_READ_INTO(&row->local, sk, __sk_common.skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO(&row->remote, sk, __sk_common.skc_v6_daddr);
	}
	bpf_ringbuf_submit(row, BPF_RB_NO_WAKEUP);
	return 1;
}

/* TP_PROTO(const struct sock *sk, const int oldstate, const int newstate), at every change of state of any TCP socket,
 * mostly from softirq, where current is whoever was interrupted. Only the step to SYN_SENT is known to be taken by the
 * caller of connect(2) or of sendto(2) with MSG_FASTOPEN, or by io_uring's worker on its behalf (net/ipv4/tcp_ipv4.c,
 * tcp_v4_connect; net/ipv6/tcp_ipv6.c, tcp_v6_connect). There the local port is not chosen yet: so that step is
 * remembered, and told with the next one of the same socket, which has it.
 */
SEC("raw_tp/inet_sock_set_state")
int on_state(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	int before = ctx->args[1], state = ctx->args[2];

	if ((before != SYN_SENT && state != SYN_SENT) || BPF_CORE_READ(sk, sk_protocol) != TCP)
		return 0;
	if (before != SYN_SENT)
		return dial(sk);
	if (!answer(sk, state)) /* pushed out by later ones, or of before */
		__sync_fetch_and_add(&connects_lost, 1);
	return 0;
}

/* The kernel passes over a program that would interrupt itself (kernel/trace/bpf_trace.c, __bpf_trace_run): so it
 * does with an answer in softirq while a dial, or what a socket's owner brought about, is taken in on the same
 * processor. This one is asked after the one above, and finds what that was not asked for; softirqs do not
 * interrupt each other, so there is no third.
 */
SEC("raw_tp/inet_sock_set_state")
int on_state_within(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	int before = ctx->args[1], state = ctx->args[2];

	if (before == SYN_SENT && BPF_CORE_READ(sk, sk_protocol) == TCP)
		answer(sk, state);
	return 0;
}

/* The kernel lets only programs that are offered under the GPL as well read its memory: hence this file's licences. */
char LICENSE[] SEC("license") = "Dual BSD/GPL";
