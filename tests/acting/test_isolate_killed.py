"""SIGKILL of whoever isolated: the rule goes with him, and the journal lets the next one bring the tree back."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess

import pytest
from click.testing import CliRunner

from gpuguard import proctree
from gpuguard.broker import boxes
from gpuguard.cli.commands import release
from tests.acting.test_isolate import grows, network, stands_still  # noqa: F401 a fixture

pytestmark = [
    pytest.mark.privileged,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: network namespaces and nftables"),
    pytest.mark.skipif(not all(map(shutil.which, ("ip", "nft", "nsenter"))), reason="needs ip, nft and nsenter"),
]

ISOLATE = """
import sys, time
from gpuguard import paths
from gpuguard.broker.enforcement import Enforcement
from tests.acting.tools import act
one = Enforcement(paths.make_dir(paths.state_dir()), paths.make_dir(paths.log_dir()), enforcing=True)
print(one.act(act(int(sys.argv[1]), "isolate"), "guard").outcome, flush=True)
time.sleep(600)
"""


def test_killed_he_leaves_no_rule_and_the_tree_comes_back(folders, spawn, network, park):  # noqa: F811
    target, path = network.client("target", tree=True)
    pids = [one.pid for one in proctree.tree([target.pid])]
    home = park(*pids)
    holder = spawn(ISOLATE, target.pid, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"done\n"
    assert stands_still(path, ["tcp", "udp"], path)
    holder.send_signal(signal.SIGKILL)
    assert holder.wait() == -signal.SIGKILL
    assert network.inside(network.near, "nft", "list", "ruleset") == "", "the table went with its owner"
    listed = CliRunner().invoke(release.command, ["--list"])
    assert "isolate" in listed.output
    done = CliRunner().invoke(release.command, ["--all"])
    assert done.exit_code == 0, done.output
    assert {proctree.cgroup_of(pid) for pid in pids} == {home}
    assert [one for one in boxes.folder(home).iterdir() if one.is_dir()] == []
    grows(path, ["tcp", "udp", "lo"])
    assert CliRunner().invoke(release.command, ["--list"]).output == "nothing is in force\n"
