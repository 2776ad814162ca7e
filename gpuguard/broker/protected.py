"""Whom we never act on, whoever asks: the host's own life support, and ourselves.

A name is no identity: a miner may call itself sshd. A daemon is protected when its executable *is* the host's file of
that name: same device and inode as the path shows in our own mount namespace, owned by root, writable by nobody else.
A container that carries a file of such a name is not protected by it; list its cgroup instead.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from msgspec import Struct

from gpuguard import proctree
from gpuguard.proctree import PROC, Member

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gpuguard.config import ActionSettings

DAEMONS = (
    "systemd", "systemd-journald", "systemd-logind", "systemd-udevd", "systemd-networkd", "systemd-resolved", "init",
    "dbus-daemon", "dbus-broker", "sshd", "sshd-session", "sshd-auth", "agetty", "login", "cron", "crond", "auditd",
    "rsyslogd", "chronyd", "multipathd", "NetworkManager",
    "nvidia-persistenced", "nv-hostengine", "nv-fabricmanager", "nvidia-imex", "dcgm-exporter",
    "nvidia-cuda-mps-control", "nvidia-cuda-mps-server",
    "slurmd", "slurmstepd", "slurmctld", "slurmdbd", "munged",
    "kubelet", "containerd", "containerd-shim", "containerd-shim-runc-v2", "dockerd", "docker-proxy", "crio", "conmon",
    "runc", "crun", "podman", "k3s", "raylet", "gcs_server",
)


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """How much may be done, and to whom never. Hand-made acts are not counted."""

    acts_per_hour: int = 12
    kills_per_hour: int = 4
    ttl_s_max: float = 24 * 3600.0
    tree_max: int = 4096
    grace_s: float = 10.0
    launches_per_s: float = 100.0
    protected_executables: tuple[str, ...] = DAEMONS
    protected_cgroups: tuple[str, ...] = ()


def limits_of(settings: ActionSettings) -> Limits:
    """Return the limits that an operator set; what is protected by default stays protected."""
    return Limits(
        acts_per_hour=settings.acts_per_hour,
        kills_per_hour=settings.kills_per_hour,
        ttl_s_max=settings.ttl_s_max,
        grace_s=settings.grace_s,
        launches_per_s=settings.launches_per_s,
        protected_executables=(*DAEMONS, *settings.protected_executables),
        protected_cgroups=settings.protected_cgroups,
    )


def refusal(tree: Iterable[Member], limits: Limits, ours: Iterable[int] = ()) -> str:
    """Return why this tree may not be touched, "" if it may. One protected member protects the whole."""
    own = {os.getpid(), *ours}
    for count, one in enumerate(tree, 1):
        reason = _reason(one, limits, own)
        if reason:
            return f"process {one.pid} {reason}"
        if count > limits.tree_max:
            return f"the tree has more than {limits.tree_max} processes"
    return ""


def _reason(one: Member, limits: Limits, own: set[int]) -> str:
    if one.pid == 1:
        return "is the init process"
    if one.is_kernel_thread or one.pid == 2:
        return "is a kernel thread"
    if one.pid in own:
        return "is GPUGuard itself or the command that asks"
    cgroup = proctree.cgroup_of(one.pid)
    for path in limits.protected_cgroups:
        if cgroup == path or cgroup.startswith(path.rstrip("/") + "/"):
            return f"is in the protected cgroup {path}"
    name = daemon_name(one.pid, limits.protected_executables)
    return f"is the host's {name}" if name else ""


def daemon_name(pid: int, names: tuple[str, ...]) -> str:
    """Return which of these host daemons a process is, "" if none. An unreadable executable is nobody's."""
    link = PROC / str(pid) / "exe"
    try:
        path = link.readlink()
        if path.name not in names:
            return ""
        running, here = link.stat(), path.stat()
    except OSError:
        return ""
    same = (running.st_dev, running.st_ino) == (here.st_dev, here.st_ino)
    safe = here.st_uid == 0 and not here.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return path.name if same and safe else ""
