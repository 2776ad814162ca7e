"""Types of ext/processes.pyx."""

class Programs:
    """The loaded, attached programs; they run until `close` or until this process ends.

    Where the kernel does not take the one that hears who dials, the others run without it: ``undialled`` says why, and
    ``connects_fd`` is -1.
    """

    ring_fd: int
    ring_bytes: int
    connects_fd: int
    connects_bytes: int
    undialled: str
    def __init__(self, path: str, pid_namespace: int) -> None: ...
    def close(self) -> None:
        """Detach and unload."""

class Ring:
    """A mapped BPF ring; the descriptor may be closed once this exists."""

    def __init__(self, fd: int, ring_bytes: int) -> None: ...
    def read(self, records_max: int) -> list[bytes]:
        """Return up to ``records_max`` records; fewer where no more are there."""

    def close(self) -> None:
        """Unmap."""
