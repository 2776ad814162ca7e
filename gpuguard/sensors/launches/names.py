"""Which kernel a handle is, and of which code: what the ring's events say, joined."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuguard.core.bounded import BoundedTable
from gpuguard.core.records import KernelName

if TYPE_CHECKING:
    from gpuguard.core.subjects import ProcessId

HANDLES_MAX = 65_536
#: Names that wait for the digest of their module, which is read within moments.
MODULES_WAITING_MAX, NAMES_PER_MODULE_MAX = 256, 2_048


class KernelNames:
    """Handles to names to code: what the ring's events say, joined. Pure, and bounded."""

    def __init__(self) -> None:
        #: (name, module, when it was looked up)
        self._names: BoundedTable[tuple[ProcessId, int], tuple[str, int, int]] = BoundedTable(HANDLES_MAX)
        self._unloaded: BoundedTable[tuple[ProcessId, int], int] = BoundedTable(HANDLES_MAX)
        self._code: BoundedTable[tuple[ProcessId, int], str] = BoundedTable(HANDLES_MAX)
        self._waiting: BoundedTable[tuple[ProcessId, int], list[tuple[int, str]]] = BoundedTable(MODULES_WAITING_MAX)

    def loaded(self, process: ProcessId, module: int) -> None:
        """A module was loaded; its code is not read yet."""
        self._code.pop((process, module))
        self._waiting[process, module] = []

    def unloaded(self, time_ns: int, process: ProcessId, module: int) -> None:
        """A module is gone: whoever is given one of its kernels' handles from now on is another kernel."""
        self._code.pop((process, module))
        self._waiting.pop((process, module))
        self._unloaded[process, module] = time_ns

    def looked_up(self, time_ns: int, process: ProcessId, handle: int, module: int, name: str) -> KernelName:
        """A kernel was looked up by name in a module or library."""
        self._names[process, handle] = (name, module, time_ns)
        waiting = self._waiting.get((process, module))
        if waiting is not None and len(waiting) < NAMES_PER_MODULE_MAX:
            waiting.append((handle, name))
        return KernelName(time_ns, process, handle, name, self._code.get((process, module)) or "")

    def asked(self, time_ns: int, process: ProcessId, handle: int, name: str) -> KernelName | None:
        """The driver said what a handle is called; None where that is known."""
        known = self._known(process, handle)
        return None if known and known[0] == name else self.looked_up(time_ns, process, handle, 0, name)

    def knows(self, process: ProcessId, handle: int) -> bool:
        """Return whether this handle's name is known."""
        return self._known(process, handle) is not None

    def forget(self, process: ProcessId, handle: int) -> bool:
        """Drop a name that is known no longer; return whether there was one."""
        return self._known(process, handle) is None and self._names.pop((process, handle)) is not None

    def _known(self, process: ProcessId, handle: int) -> tuple[str, int, int] | None:
        known = self._names.get((process, handle))
        return known if known and known[2] > (self._unloaded.get((process, known[1])) or 0) else None

    def aliased(self, time_ns: int, process: ProcessId, handle: int, original: int) -> KernelName | None:
        """The same kernel, or the same module, was given out under another handle."""
        known = self._known(process, original)
        if known:
            return self.looked_up(time_ns, process, handle, known[1], known[0])
        code = self._code.get((process, original))
        if code:
            self._code[process, handle] = code
        return None

    def read(self, time_ns: int, process: ProcessId, module: int, sha256: str) -> list[KernelName]:
        """The code of a module was read: name again what was looked up in it meanwhile."""
        self._code[process, module] = sha256
        waiting = self._waiting.pop((process, module)) or []
        return [KernelName(time_ns, process, handle, name, sha256) for handle, name in waiting]
