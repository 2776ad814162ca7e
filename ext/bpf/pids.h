/* SPDX-License-Identifier: Apache-2.0 OR BSD-2-Clause OR GPL-2.0-only */
/* The pid that /proc of a pid namespace shows: struct upid holds a number for each namespace that sees the task
 * (kernel/pid.c, pid_nr_ns). A task that the namespace does not see has no number in its /proc either.
 * bpf_get_ns_current_pid_tgid would serve less: it refuses tasks in namespaces below the one asked for, which is every
 * container.
 */
#ifndef GPUGUARD_PIDS_H
#define GPUGUARD_PIDS_H

#include <linux/types.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#define LEVELS_MAX 32 /* MAX_PID_NS_LEVEL, linux/pid_namespace.h */
#define CO_RE __attribute__((preserve_access_index))

struct ns_common { unsigned int inum; } CO_RE;
struct pid_namespace { struct ns_common ns; } CO_RE;
struct upid { int nr; struct pid_namespace *ns; } CO_RE;
struct pid { unsigned int level; struct upid numbers[1]; } CO_RE;

/* `namespace` is the inode number of one; 0 where that does not see the task. */
static __always_inline __u32 number_in(struct pid *pid, __u32 namespace)
{
	__u32 level = BPF_CORE_READ(pid, level);
	__u32 stride = bpf_core_type_size(struct upid);
	void *numbers = (void *)pid + bpf_core_field_offset(struct pid, numbers);

	for (__u32 i = 0; i < LEVELS_MAX; i++) {
		if (i > level)
			break;
		struct upid *one = numbers + i * stride;
		struct pid_namespace *ns = BPF_CORE_READ(one, ns);
		if (BPF_CORE_READ(ns, ns.inum) == namespace)
			return BPF_CORE_READ(one, nr);
	}
	return 0;
}

#endif
