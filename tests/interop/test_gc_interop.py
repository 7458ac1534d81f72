"""``seamless-gc`` on a store that Seamless 1.x uses, too."""
import os
import pathlib
import shutil
import sys
import time

import pytest

pytestmark = pytest.mark.interop
FUNCTIONS = pathlib.Path(__file__).parent / "functions"
PACKAGES = {"theirs": "seamless", "ours": "seamless_lite"}


def age(store, days=100):
    """As if nothing had been used for so long."""
    for path in store.rglob("*"):
        if len(path.name) == 64 and ".pins" not in path.parts:
            os.utime(path, (time.time() - days * 86400,) * 2)


def gc(lab, *options):
    done = lab.program("ours", "seamless-gc", "--destination", lab.store, *options)
    assert done.code == 0, done
    return done.out


def test_what_is_deleted_seamless_computes_again_and_what_is_pinned_it_finds(lab):
    (lab.work / "a.txt").write_text("kept\n")
    (lab.work / "b.txt").write_text("deleted\n")
    for name in "ab":
        assert lab.program("theirs", "seamless-run", "-c", "cat %s.txt > %s.out.txt" % (name, name)).code == 0
    gc(lab, "--pin", lab.work / "a.out.txt.CHECKSUM")
    age(lab.store)
    lab.ran()
    assert "deleted" in gc(lab, "--max-size", "0kB")
    for name, text, ran in (("a", "kept\n", 0), ("b", "deleted\n", 1)):
        (lab.work / ("%s.out.txt" % name)).unlink()
        done = lab.program("theirs", "seamless-run", "-c", "cat %s.txt > %s.out.txt" % (name, name))
        assert done.code == 0 and (lab.work / ("%s.out.txt" % name)).read_text() == text, done
        assert lab.ran() == ran


def test_processes_of_both_lose_nothing_while_all_that_is_old_is_deleted(lab):
    shutil.copy(FUNCTIONS / "crowd.py", lab.work)
    python = {"theirs": lab.real.python, "ours": sys.executable}
    for _ in range(2):
        crowd = [lab.start(who, [python[who], lab.work / "crowd.py", PACKAGES[who], 0, 60]) for who in ("theirs", "ours")]
        deleted = [gc(lab, "--max-size", "0kB")] if (lab.store / "seamless.db").exists() else []
        while any(process.poll() is None for process in crowd):
            if (lab.store / "seamless.db").exists():
                deleted.append(gc(lab, "--max-size", "0kB"))
        for process in crowd:
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0, err.decode()[-2000:]
        age(lab.store)
    assert any("deleted 0 buffers" not in text for text in deleted)
