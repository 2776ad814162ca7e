# cython: language_level=3
"""Load the process-event programs (broker), and read their rings (guard); both go by bpf.pxi."""

from libc.errno cimport errno
from libc.stdint cimport uint32_t

include "bpf.pxi"

cdef extern from "bpf/libbpf.h" nogil:
    cdef struct bpf_link:
        pass
    bpf_program *bpf_object__find_program_by_name(const bpf_object *, const char *)
    int bpf_program__set_autoload(bpf_program *, bint)
    bint bpf_program__autoload(const bpf_program *)
    bpf_link *bpf_program__attach(const bpf_program *)
    int bpf_link__destroy(bpf_link *)

cdef enum:
    PROGRAMS_MAX = 8


cdef class Programs:
    """The loaded, attached programs; they run until `close` or until this process ends.

    Where the kernel does not take those that hear who dials, the others run without it: ``undialled`` says why, and
    ``connects_fd`` is -1.
    """

    cdef bpf_object *_object
    cdef bpf_link *_links[PROGRAMS_MAX]
    cdef int _attached
    cdef readonly int ring_fd
    cdef readonly int ring_bytes
    cdef readonly int connects_fd
    cdef readonly int connects_bytes
    cdef readonly str undialled

    def __cinit__(self, str path, unsigned int pid_namespace):
        cdef libbpf_print_fn_t before = libbpf_set_print(NULL)
        self.undialled = ""
        try:
            self._open(path, pid_namespace, True)
        except OSError as error:
            self._release()
            self.undialled = error.strerror or str(error)
            try:
                self._open(path, pid_namespace, False)
            except OSError:
                self._release()
                raise
        finally:
            libbpf_set_print(before)

    cdef _open(self, str path, uint32_t pid_namespace, bint dials):
        cdef bpf_program *program
        cdef bpf_link *link
        self._object = _opened(path, pid_namespace)
        for name in (b"on_state", b"on_state_within"):
            program = bpf_object__find_program_by_name(self._object, name)
            if program == NULL:
                raise OSError(f"{path}: not the object that this module was built with")
            bpf_program__set_autoload(program, dials)
        if bpf_object__load(self._object):
            raise _error("loading the process programs", errno)
        self.ring_fd, self.ring_bytes = self._ring(b"events")
        self.connects_fd, self.connects_bytes = self._ring(b"connects") if dials else (-1, 0)
        program = bpf_object__next_program(self._object, NULL)
        while program != NULL and self._attached < PROGRAMS_MAX:
            if bpf_program__autoload(program):
                link = bpf_program__attach(program)
                if link == NULL or libbpf_get_error(link):
                    raise _error("attaching the process programs", errno)
                self._links[self._attached] = link
                self._attached += 1
            program = bpf_object__next_program(self._object, program)

    cdef _ring(self, bytes name):
        cdef bpf_map *found = bpf_object__find_map_by_name(self._object, name)
        return bpf_map__fd(found), <int>bpf_map__max_entries(found)

    cdef void _release(self):
        while self._attached > 0:
            self._attached -= 1
            bpf_link__destroy(self._links[self._attached])
        if self._object != NULL:
            bpf_object__close(self._object)
        self._object = NULL
        self.ring_fd = self.connects_fd = -1

    def close(self):
        """Detach and unload."""
        self._release()

    def __dealloc__(self):
        self._release()
