"""Types of ext/processes.pyx."""

class Programs:
    """The loaded, attached programs; they run until `close` or until this process ends."""

    ring_fd: int
    ring_bytes: int
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
