"""Folders that killed processes left among the temporary files."""
import os
import subprocess
import sys

from seamless_lite import leftovers
from test_architecture import PACKAGE

HOLDER = """
import sys, tempfile, time
from seamless_lite import leftovers
for _ in range(2):
    folder = tempfile.mkdtemp(prefix="seamless-jobs-", dir=sys.argv[1])
    leftovers.hold(folder)
print("ready", flush=True)
time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, cwd=str(PACKAGE.parent))
    with child:
        assert child.stdout.readline() == b"ready\n"
        (tmp_path / "seamless-jobs-new").mkdir()            # not held yet
        (tmp_path / "seamless-jobs-file").write_text("")
        (tmp_path / "other").mkdir()
        before = sorted(os.listdir(str(tmp_path)))
        leftovers.sweep(str(tmp_path))
        assert sorted(os.listdir(str(tmp_path))) == before and len(before) == 5
        child.kill()
    leftovers.sweep(str(tmp_path))
    assert sorted(os.listdir(str(tmp_path))) == ["other", "seamless-jobs-file", "seamless-jobs-new"]


def test_what_another_node_holds_stays_though_its_lock_does_not_count_here(tmp_path):
    folder = tmp_path / "seamless-jobs-far"
    folder.mkdir()
    (folder / "lock").write_text("another-node")
    leftovers.sweep(str(tmp_path))
    assert folder.exists()
