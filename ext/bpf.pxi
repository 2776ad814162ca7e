# What launches.pyx and processes.pyx share: an eBPF object opened by libbpf (broker), and its ring read (guard).
#
# The two halves share nothing but a descriptor of the ring. The guard's half makes no bpf(2) call: it maps the ring as
# the kernel lays it out (kernel/bpf/ringbuf.c: a consumer page, a producer page, the data mapped twice), so it works
# without privileges and under a seccomp filter.

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

cdef extern from *:
    unsigned long __atomic_load_n(const unsigned long *, int) nogil
    void __atomic_store_n(unsigned long *, unsigned long, int) nogil
    int ACQUIRE "__ATOMIC_ACQUIRE"
    int RELEASE "__ATOMIC_RELEASE"

cdef enum:
    RECORD_HEADER_BYTES = 8
    RECORD_BYTES_MAX = 1024

# BPF_RINGBUF_BUSY_BIT and BPF_RINGBUF_DISCARD_BIT of linux/bpf.h
cdef uint32_t BUSY = 1u << 31
cdef uint32_t DISCARD = 1u << 30


cdef OSError _error(str what, long code):
    return OSError(code, f"{what}: {os.strerror(code)}")


cdef bpf_object *_opened(str path, uint32_t pid_namespace) except NULL:
    """Return the object, not loaded yet, its one constant set: whose pids are wanted."""
    cdef bpf_map *constants
    cdef bpf_object *found = bpf_object__open(path.encode())
    if found == NULL or libbpf_get_error(found):
        raise _error(path, errno)
    constants = bpf_object__find_map_by_name(found, b".rodata")
    if constants == NULL or bpf_map__set_initial_value(constants, &pid_namespace, sizeof(pid_namespace)):
        bpf_object__close(found)
        raise OSError(f"{path}: not the object that this module was built with")
    return found


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
        mapped = mmap(NULL, self._page + 2 * ring_bytes, PROT_READ, MAP_SHARED, fd, <long>self._page)
        if mapped == MAP_FAILED:
            raise _error("mapping the ring", errno)
        self._producer = <uint8_t *>mapped

    def read(self, int records_max):
        """Return up to ``records_max`` records; fewer where no more are there."""
        cdef list taken = []
        cdef unsigned long consumed, produced
        cdef const uint8_t *record
        cdef uint32_t header, size
        if self._producer == NULL:
            raise ValueError("the ring is closed")
        consumed = __atomic_load_n(<unsigned long *>self._consumer, ACQUIRE)
        produced = __atomic_load_n(<unsigned long *>self._producer, ACQUIRE)
        while consumed < produced and len(taken) < records_max:
            record = self._producer + self._page + (consumed & (self._bytes - 1))
            # The length and its flags are the low half of the aligned header word.
            header = <uint32_t>__atomic_load_n(<unsigned long *>record, ACQUIRE)
            if header & BUSY:
                break
            size = header & ~(BUSY | DISCARD)
            if not header & DISCARD and size <= RECORD_BYTES_MAX:
                taken.append((<const char *>record)[RECORD_HEADER_BYTES:RECORD_HEADER_BYTES + size])
            consumed += (size + RECORD_HEADER_BYTES + 7) & ~7ul
            __atomic_store_n(<unsigned long *>self._consumer, consumed, RELEASE)
        return taken

    def close(self):
        """Unmap."""
        if self._consumer != NULL:
            munmap(self._consumer, self._page)
        if self._producer != NULL:
            munmap(self._producer, self._page + 2 * self._bytes)
        self._consumer = NULL
        self._producer = NULL

    def __dealloc__(self):
        self.close()
