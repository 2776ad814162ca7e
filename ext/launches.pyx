# cython: language_level=3
"""Load the launch programs and place their probes (broker); read rows and ring (guard).

The broker's half is `Programs`: it goes through libbpf, except for what libbpf 1.1 lacks, a uprobe_multi link
(linux/bpf.h of 6.6: BPF_TRACE_UPROBE_MULTI = 48, union bpf_attr.link_create.uprobe_multi), which is one bpf(2) call
here. All sites of a library are one link. On kernels before 6.6 each site is a perf uprobe with a link of its own
(perf_event_open(2), BPF_PERF_EVENT of 5.15): as quick when hit, but 24 of them take seconds to detach.

The guard's half works on passed descriptors: `Ring` (bpf.pxi), and `read_rows`, which is BPF_MAP_LOOKUP_BATCH on a
descriptor that can only read.
"""

import os

from libc.errno cimport ENOENT, ENOSPC, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t

include "bpf.pxi"

cdef extern from "bpf/launches.h":
    cdef struct launch_key:
        pass
    cdef struct launch_value:
        pass
    cdef struct launch_event:
        pass
    cdef struct quota:
        uint64_t start_ticks
        uint64_t interval_ns
        uint64_t due_ns
        uint64_t launches
        uint64_t stops
        uint64_t mode
    cdef struct share_key:
        uint64_t start_ns
        uint64_t pid
    cdef struct share:
        uint64_t rows
        uint64_t second
        uint64_t events
    int COUNTERS
    int QUOTAS_MAX
    int PROCESSES_MAX

cdef extern from "bpf/libbpf.h" nogil:
    bpf_program *bpf_object__find_program_by_name(const bpf_object *, const char *)
    int bpf_program__set_expected_attach_type(bpf_program *, int)
    int bpf_program__fd(const bpf_program *)

cdef extern from "bpf/bpf.h" nogil:
    int bpf_map_lookup_elem(int fd, const void *key, void *value)
    int bpf_map_update_elem(int fd, const void *key, const void *value, uint64_t flags)
    int bpf_map_delete_elem(int fd, const void *key)
    int bpf_map_get_next_key(int fd, const void *key, void *next_key)
    int bpf_map_lookup_batch(int fd, void *in_batch, void *out_batch, void *keys, void *values, uint32_t *count,
                             const void *opts)

cdef extern from *:
    """
    #include <fcntl.h>
    #include <linux/bpf.h>
    #include <linux/perf_event.h>
    #include <string.h>
    #include <sys/ioctl.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* linux/bpf.h of kernel 6.6; older headers lack it. */
    struct uprobe_multi_attr {
        __u32 prog_fd, target_fd, attach_type, flags;
        __u64 path, offsets, ref_ctr_offsets, cookies;
        __u32 cnt, multi_flags, pid;
    };

    static int attach_multi(int program, const char *path, const unsigned long *offsets, const unsigned long *cookies,
                            unsigned count, unsigned returning) {
        struct uprobe_multi_attr attr;
        memset(&attr, 0, sizeof attr);
        attr.prog_fd = program;
        attr.attach_type = 48;
        attr.path = (__u64)(unsigned long)path;
        attr.offsets = (__u64)(unsigned long)offsets;
        attr.cookies = (__u64)(unsigned long)cookies;
        attr.cnt = count;
        attr.multi_flags = returning ? 1 : 0;
        return syscall(SYS_bpf, BPF_LINK_CREATE, &attr, sizeof attr);
    }

    static int attach_single(int program, unsigned type, const char *path, unsigned long offset, unsigned long cookie,
                             unsigned returning) {
        struct perf_event_attr event;
        union bpf_attr attr;
        int fd, link;
        memset(&event, 0, sizeof event);
        event.size = sizeof event;
        event.type = type;
        event.config = returning ? 1 : 0; /* format/retprobe: config:0 */
        event.uprobe_path = (__u64)(unsigned long)path;
        event.probe_offset = offset;
        fd = syscall(SYS_perf_event_open, &event, -1, 0, -1, PERF_FLAG_FD_CLOEXEC);
        if (fd < 0)
            return -1;
        memset(&attr, 0, sizeof attr);
        attr.link_create.prog_fd = program;
        attr.link_create.target_fd = fd;
        attr.link_create.attach_type = BPF_PERF_EVENT;
        attr.link_create.perf_event.bpf_cookie = cookie;
        link = syscall(SYS_bpf, BPF_LINK_CREATE, &attr, sizeof attr);
        if (link >= 0 && ioctl(fd, PERF_EVENT_IOC_ENABLE, 0) < 0) {
            close(link);
            link = -1;
        }
        close(fd); /* the link holds the event */
        return link;
    }

    static int open_below(int root, const char *path) {
        /* struct open_how of linux/openat2.h; RESOLVE_NO_MAGICLINKS, RESOLVE_IN_ROOT, RESOLVE_CACHED. */
        struct { __u64 flags, mode, resolve; } how = {O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0,
                                                     0x02 | 0x10 | 0x20};
        return syscall(437, root, path, &how, sizeof how);
    }

    static int wait_for_readers(void) {
        return syscall(SYS_membarrier, 1, 0, 0);
    }

    static int narrowed(int map) {
        struct bpf_map_info info;
        union bpf_attr attr;
        memset(&info, 0, sizeof info);
        memset(&attr, 0, sizeof attr);
        attr.info.bpf_fd = map;
        attr.info.info_len = sizeof info;
        attr.info.info = (__u64)(unsigned long)&info;
        if (syscall(SYS_bpf, BPF_OBJ_GET_INFO_BY_FD, &attr, sizeof attr) < 0)
            return -1;
        memset(&attr, 0, sizeof attr);
        attr.map_id = info.id;
        attr.open_flags = BPF_F_RDONLY;
        return syscall(SYS_bpf, BPF_MAP_GET_FD_BY_ID, &attr, sizeof attr);
    }
    """
    int attach_multi(int program, const char *path, const unsigned long *offsets, const unsigned long *cookies,
                     unsigned count, unsigned returning) nogil
    int attach_single(int program, unsigned type, const char *path, unsigned long offset, unsigned long cookie,
                      unsigned returning) nogil
    int narrowed(int map) nogil
    int wait_for_readers() nogil
    int open_below(int root, const char *path) nogil

cdef enum:
    UPROBE_MULTI = 48
    SITES_MAX = 128
    BATCH_ROWS = 1024

KEY_BYTES = sizeof(launch_key)
VALUE_BYTES = sizeof(launch_value)
EVENT_BYTES = sizeof(launch_event)


cdef class Programs:
    """The loaded programs and their maps; nothing is probed before `attach`.

    Parameters
    ----------
    path
        The compiled object.
    pid_namespace
        Inode number of the pid namespace whose pids are wanted; 0 for the first one.
    single
        Place perf uprobes, one by one, for kernels without uprobe_multi.
    """

    cdef bpf_object *_object
    cdef readonly int rows_fd
    cdef readonly int ring_fd
    cdef readonly int counters_fd
    cdef readonly int quotas_fd
    cdef readonly int quotas_held_fd
    cdef readonly int shares_fd
    cdef readonly int rows_held_fd
    cdef readonly int ring_bytes
    cdef readonly int rows_max
    cdef readonly bint single

    def __cinit__(self, str path, unsigned int pid_namespace, bint single=False):
        cdef libbpf_print_fn_t before = libbpf_set_print(NULL)
        self.single = single
        try:
            self._open(path, pid_namespace)
        except OSError:
            self.close()
            raise
        finally:
            libbpf_set_print(before)

    cdef _open(self, str path, uint32_t pid_namespace):
        cdef bpf_program *program
        self._object = _opened(path, pid_namespace)
        program = NULL if self.single else bpf_object__next_program(self._object, NULL)
        while program != NULL:
            bpf_program__set_expected_attach_type(program, UPROBE_MULTI)
            program = bpf_object__next_program(self._object, program)
        if bpf_object__load(self._object):
            raise _error("loading the launch programs", errno)
        self.rows_fd = self._map(b"rows", &self.rows_max)
        self.counters_fd = self._map(b"counters", NULL)
        self.quotas_fd = self._map(b"quotas", NULL)
        self.quotas_held_fd = self._map(b"quotas_held", NULL)
        self.shares_fd = self._map(b"shares", NULL)
        self.rows_held_fd = self._map(b"rows_held", NULL)
        self.ring_fd = self._map(b"events", &self.ring_bytes)

    cdef int _map(self, bytes name, int *size) except -1:
        cdef bpf_map *found = bpf_object__find_map_by_name(self._object, name)
        if found == NULL:
            raise OSError(f"the launch object has no map {name.decode()}")
        if size != NULL:
            size[0] = <int>bpf_map__max_entries(found)
        return bpf_map__fd(found)

    def attach(self, str program, bytes path, list offsets, list cookies, bint returning=False):
        """Probe all ``offsets`` (in the file) of one library; return the descriptors of the links that hold them."""
        cdef bpf_program *found
        cdef unsigned long places[SITES_MAX]
        cdef unsigned long marks[SITES_MAX]
        cdef int link
        cdef Py_ssize_t i
        if self._object == NULL:
            raise ValueError("closed")
        if not 0 < len(offsets) == len(cookies) <= SITES_MAX:
            raise ValueError(f"{len(offsets)} offsets, {len(cookies)} cookies")
        found = bpf_object__find_program_by_name(self._object, program.encode())
        if found == NULL:
            raise ValueError(program)
        for i in range(len(offsets)):
            places[i] = offsets[i]
            marks[i] = cookies[i]
        if self.single:
            return self._attach_each(bpf_program__fd(found), path, offsets, cookies, returning)
        link = attach_multi(bpf_program__fd(found), path, places, marks, len(offsets), returning)
        if link < 0:
            raise _error("attaching uprobe_multi (kernel 6.6 or later)", errno)
        return [link]

    cdef list _attach_each(self, int program, bytes path, list offsets, list cookies, bint returning):
        cdef int link
        cdef uint32_t kind
        with open("/sys/bus/event_source/devices/uprobe/type") as stream:
            kind = int(stream.read())
        links = []
        for offset, cookie in zip(offsets, cookies):
            link = attach_single(program, kind, path, offset, cookie, returning)
            if link < 0:
                error = _error("attaching a perf uprobe", errno)
                for one in links:
                    os.close(one)
                raise error
            links.append(link)
        return links

    def has_multi(self):
        """Return whether this kernel knows uprobe_multi: one that does misses the file, one that does not the type."""
        cdef unsigned long nowhere = 0
        cdef bpf_program *found = bpf_object__next_program(self._object, NULL)
        cdef int link = attach_multi(bpf_program__fd(found), b"/proc/self/no such file", &nowhere, &nowhere, 1, 0)
        if link >= 0:
            raise OSError("a link to no file")
        return errno == ENOENT

    def close(self):
        """Unload; links are their holders' to close."""
        if self._object != NULL:
            bpf_object__close(self._object)
        self._object = NULL

    def __dealloc__(self):
        self.close()


def read_only(int map_fd):
    """Return a new descriptor of the same map that can look up and do no more (BPF_F_RDONLY)."""
    cdef int fd = narrowed(map_fd)
    if fd < 0:
        raise _error("narrowing a map", errno)
    return fd


def read_counters(int fd):
    """Return the counters of `enum counter` in launches.h, in its order."""
    cdef uint64_t value
    cdef uint32_t i
    read = []
    for i in range(<uint32_t>COUNTERS):
        if bpf_map_lookup_elem(fd, &i, &value):
            raise _error("reading counters", errno)
        read.append(value)
    return tuple(read)


def read_rows(int fd, uint8_t[::1] keys, uint8_t[::1] values):
    """Read every row of the launch map into the two buffers; return how many rows there are.

    The buffers hold ``struct launch_key`` and ``struct launch_value``, and must be as large as the map. A row that is
    made meanwhile may be missed: it is there the next time.
    """
    cdef uint64_t position[2]
    cdef uint32_t count
    cdef Py_ssize_t got = 0, room = min(keys.shape[0] // <Py_ssize_t>sizeof(launch_key),
                                        values.shape[0] // <Py_ssize_t>sizeof(launch_value))
    cdef int failed, code
    cdef bint first = True
    cdef uint32_t batch = BATCH_ROWS
    while got < room:
        count = <uint32_t>min(<Py_ssize_t>batch, room - got)
        failed = bpf_map_lookup_batch(fd, NULL if first else &position[0], &position[0],
                                      &keys[got * <Py_ssize_t>sizeof(launch_key)],
                                      &values[got * <Py_ssize_t>sizeof(launch_value)], &count, NULL)
        code = errno
        if failed and code == ENOSPC:
            # One bucket holds more rows than we have room for.
            if batch >= <uint32_t>room:
                raise _error("reading launch rows", code)
            batch *= 2
            continue
        if failed and code != ENOENT:
            raise _error("reading launch rows", code)
        got += count
        first = False
        if failed:
            break
    return got


def write_row(int fd, bytes key, bytes value):
    """Write one row; for the test that a passed descriptor cannot."""
    if len(key) != sizeof(launch_key) or len(value) != sizeof(launch_value):
        raise ValueError("not a row")
    if bpf_map_update_elem(fd, <const uint8_t *>key, <const uint8_t *>value, 0):
        raise _error("writing a launch row", errno)


def delete_rows(int fd, bytes keys):
    """Delete the rows of these keys, one after another; return how many were there."""
    cdef const uint8_t *key = keys
    cdef Py_ssize_t i
    cdef int deleted = 0
    for i in range(len(keys) // <Py_ssize_t>sizeof(launch_key)):
        if bpf_map_delete_elem(fd, key + i * <Py_ssize_t>sizeof(launch_key)) == 0:
            deleted += 1
        elif errno != ENOENT:
            raise _error("deleting launch rows", errno)
    return deleted


def set_rows(int fd, uint64_t start_ns, uint64_t pid, uint64_t rows):
    """Set right how many rows a process holds; what else is in its share stays, and who has no share gets none."""
    cdef share_key key
    cdef share value
    key.start_ns, key.pid = start_ns, pid
    if bpf_map_lookup_elem(fd, &key, &value) == 0:
        value.rows = rows
        if bpf_map_update_elem(fd, &key, &value, 0):
            raise _error("setting a share", errno)


def shares_of(int fd):
    """Return (start_ns, pid) of every process that has a share."""
    cdef share_key key, before
    cdef bint first = True
    found = []
    for _ in range(2 * PROCESSES_MAX):
        if bpf_map_get_next_key(fd, NULL if first else &before, &key):
            if errno != ENOENT:
                raise _error("reading shares", errno)
            break
        found.append((key.start_ns, key.pid))
        before = key
        first = False
    return found


def set_quota(int fd, uint32_t pid, uint64_t start_ticks, uint64_t mode, uint64_t interval_ns, uint64_t due_ns):
    """Give a process a quota, in the place of one that it has."""
    cdef quota value
    value.start_ticks, value.interval_ns, value.due_ns = start_ticks, interval_ns, due_ns
    value.launches, value.stops, value.mode = 0, 0, mode
    if bpf_map_update_elem(fd, &pid, &value, 0):
        raise _error("giving a process a quota", errno)


def delete_quota(int fd, uint32_t pid):
    """Take a process's quota away; return whether it had one."""
    if bpf_map_delete_elem(fd, &pid) == 0:
        return True
    if errno != ENOENT:
        raise _error("taking a quota away", errno)
    return False


def read_quotas(int fd):
    """Return (pid, start_ticks, mode, interval_ns, due_ns, launches, stops) of every row, by pid."""
    cdef uint32_t pid = 0
    cdef uint32_t[1] before
    cdef quota value
    cdef bint first = True
    rows = []
    # Bounded: a row that is deleted while we are at it makes the kernel begin anew.
    for _ in range(2 * QUOTAS_MAX):
        if bpf_map_get_next_key(fd, NULL if first else &before[0], &pid):
            if errno != ENOENT:
                raise _error("reading quotas", errno)
            break
        if bpf_map_lookup_elem(fd, &pid, &value) == 0:
            rows.append((pid, value.start_ticks, value.mode, value.interval_ns, value.due_ns, value.launches,
                         value.stops))
        before[0] = pid
        first = False
    return sorted(set(rows))


def open_in_root(int root, bytes path):
    """Open a file for reading below ``root`` as if that were / (openat2(2), RESOLVE_IN_ROOT).

    By names that the kernel holds already (RESOLVE_CACHED): whoever serves a file system cannot let us wait here.
    """
    cdef int fd = open_below(root, path)
    if fd < 0:
        raise _error(os.fsdecode(path), errno)
    return fd


def synchronise():
    """Wait until every program that runs now has ended (membarrier(2): MEMBARRIER_CMD_GLOBAL is synchronize_rcu).

    Returns whether the kernel could; with nohz_full it cannot.
    """
    return wait_for_readers() == 0


def say_held(int fd, uint64_t count):
    """Tell the programs how many rows a table has: with no quota they need not look for one."""
    cdef uint32_t zero = 0
    if bpf_map_update_elem(fd, &zero, &count, 0):
        raise _error("saying how many rows there are", errno)
