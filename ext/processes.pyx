# cython: language_level=3
"""Load the process-event programs (broker), and read their ring (guard).

The two halves share nothing but a descriptor of the ring. The guard's half makes no bpf(2) call: it maps the ring as
the kernel lays it out (kernel/bpf/ringbuf.c: a consumer page, a producer page, the data mapped twice), so it works
without privileges and under a seccomp filter.
"""

import os

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport _SC_PAGESIZE, sysconf

cdef extern from "bpf/libbpf.h" nogil:
    ctypedef void *libbpf_print_fn_t
    cdef struct bpf_object:
        pass
    cdef struct bpf_program:
        pass
    cdef struct bpf_map:
        pass
    cdef struct bpf_link:
        pass
    libbpf_print_fn_t libbpf_set_print(libbpf_print_fn_t)
    long libbpf_get_error(const void *)
    bpf_object *bpf_object__open(const char *)
    int bpf_object__load(bpf_object *)
    void bpf_object__close(bpf_object *)
    bpf_program *bpf_object__next_program(const bpf_object *, bpf_program *)
    bpf_map *bpf_object__find_map_by_name(const bpf_object *, const char *)
    int bpf_map__set_initial_value(bpf_map *, const void *, size_t)
    uint32_t bpf_map__max_entries(const bpf_map *)
    int bpf_map__fd(const bpf_map *)
    bpf_link *bpf_program__attach(const bpf_program *)
    int bpf_link__destroy(bpf_link *)

cdef extern from *:
    unsigned long __atomic_load_n(const unsigned long *, int) nogil
    void __atomic_store_n(unsigned long *, unsigned long, int) nogil

cdef extern from *:
    int ACQUIRE "__ATOMIC_ACQUIRE"
    int RELEASE "__ATOMIC_RELEASE"

cdef enum:
    HEADER_BYTES = 8
    PROGRAMS_MAX = 8

cdef uint32_t BUSY = 1u << 31
cdef uint32_t DISCARD = 1u << 30

cdef enum:
    RECORD_BYTES_MAX = 1024


cdef OSError _error(str what, long code):
    return OSError(code, f"{what}: {os.strerror(code)}")


cdef class Programs:
    """The loaded, attached programs; they run until `close` or until this process ends."""

    cdef bpf_object *_object
    cdef bpf_link *_links[PROGRAMS_MAX]
    cdef int _attached
    cdef readonly int ring_fd
    cdef readonly int ring_bytes

    def __cinit__(self, str path, unsigned int pid_namespace):
        cdef libbpf_print_fn_t before = libbpf_set_print(NULL)
        try:
            self._open(path.encode(), pid_namespace)
        except OSError:
            self._release()
            raise
        finally:
            libbpf_set_print(before)

    cdef _open(self, bytes path, uint32_t pid_namespace):
        cdef bpf_map *found
        cdef bpf_program *program = NULL
        cdef bpf_link *link
        self._object = bpf_object__open(path)
        if self._object == NULL or libbpf_get_error(self._object):
            self._object = NULL
            raise _error(path.decode(), errno)
        found = bpf_object__find_map_by_name(self._object, b".rodata")
        if found == NULL or bpf_map__set_initial_value(found, &pid_namespace, sizeof(pid_namespace)):
            raise OSError(f"{path.decode()}: not the object that this module was built with")
        if bpf_object__load(self._object):
            raise _error("loading the process programs", errno)
        found = bpf_object__find_map_by_name(self._object, b"events")
        self.ring_fd = bpf_map__fd(found)
        self.ring_bytes = <int>bpf_map__max_entries(found)
        program = bpf_object__next_program(self._object, NULL)
        while program != NULL and self._attached < PROGRAMS_MAX:
            link = bpf_program__attach(program)
            if link == NULL or libbpf_get_error(link):
                raise _error("attaching the process programs", errno)
            self._links[self._attached] = link
            self._attached += 1
            program = bpf_object__next_program(self._object, program)

    cdef void _release(self):
        while self._attached > 0:
            self._attached -= 1
            bpf_link__destroy(self._links[self._attached])
        if self._object != NULL:
            bpf_object__close(self._object)
        self._object = NULL
        self.ring_fd = -1

    def close(self):
        """Detach and unload."""
        self._release()

    def __dealloc__(self):
        self._release()


cdef class Ring:
    """A mapped BPF ring; the descriptor may be closed once this exists."""

    cdef uint8_t *_consumer
    cdef uint8_t *_producer
    cdef size_t _page
    cdef size_t _bytes

    def __cinit__(self, int fd, size_t ring_bytes):
        cdef void *mapped
        self._page = <size_t>sysconf(_SC_PAGESIZE)
        if ring_bytes < self._page or ring_bytes & (ring_bytes - 1):
            raise ValueError(f"ring of {ring_bytes} bytes")
        self._bytes = ring_bytes
        mapped = mmap(NULL, self._page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        if mapped == MAP_FAILED:
            raise _error("mapping the ring", errno)
        self._consumer = <uint8_t *>mapped
        mapped = mmap(NULL, self._page + 2 * ring_bytes, PROT_READ, MAP_SHARED, fd, self._page)
        if mapped == MAP_FAILED:
            munmap(self._consumer, self._page)
            self._consumer = NULL
            raise _error("mapping the ring", errno)
        self._producer = <uint8_t *>mapped

    def read(self, int records_max):
        """Return up to ``records_max`` records; fewer where no more are there."""
        if self._consumer == NULL:
            raise ValueError("the ring is closed")
        cdef list out = []
        cdef unsigned long consumed = __atomic_load_n(<unsigned long *>self._consumer, ACQUIRE)
        cdef unsigned long produced = __atomic_load_n(<unsigned long *>self._producer, ACQUIRE)
        cdef uint8_t *head
        cdef uint32_t flagged, size
        cdef int taken = 0
        while consumed < produced and taken < records_max:
            head = self._producer + self._page + (consumed & (self._bytes - 1))
            # The length and its flags are the low half of the aligned header word.
            flagged = <uint32_t>__atomic_load_n(<unsigned long *>head, ACQUIRE)
            if flagged & BUSY:
                break
            size = flagged & ~(BUSY | DISCARD)
            if not flagged & DISCARD and size <= RECORD_BYTES_MAX:
                out.append((<char *>head + HEADER_BYTES)[:size])
                taken += 1
            consumed += (size + HEADER_BYTES + 7) & ~<unsigned long>7
        __atomic_store_n(<unsigned long *>self._consumer, consumed, RELEASE)
        return out

    def close(self):
        """Unmap."""
        if self._consumer != NULL:
            munmap(self._consumer, self._page)
            munmap(self._producer, self._page + 2 * self._bytes)
        self._consumer = NULL
        self._producer = NULL

    def __dealloc__(self):
        self.close()
