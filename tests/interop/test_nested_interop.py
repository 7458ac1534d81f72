"""Functions of Seamless 1.x that call others in their bodies, run by ours."""
import json
import sqlite3
import sys

import pytest

pytestmark = pytest.mark.interop
SCRIPT = """\
import seamless, seamless.config
seamless.config.init()
from seamless.transformer import direct
@direct
def outer(n):
    from seamless.transformer import direct
    @direct
    def inner(a):
        return a * 2
    return inner(n) + 1
print(outer(4))
seamless.close()
"""


def rows(lab, then=""):
    with sqlite3.connect(str(lab.store / "seamless.db")) as table:
        found = dict(table.execute("SELECT checksum, result FROM 'transformation'"))
        table.execute(then) if then else None
    table.close()
    return found


def test_a_function_of_theirs_that_calls_others_runs_here_and_both_results_are_theirs(lab):
    (lab.work / "script.py").write_text(SCRIPT)
    done = lab.run("theirs", [lab.real.python, "script.py"])
    assert done.out.split()[-1] == "9", done
    theirs = rows(lab, "DELETE FROM 'transformation'")
    assert len(theirs) == 2 and not rows(lab)
    outer = next(name for name in theirs if b"def outer" in (lab.store / pin(lab, name)[:2] / pin(lab, name)).read_bytes())
    done = lab.run("ours", [sys.executable, "-m", "seamless_lite", "run-transformation", outer])
    assert (done.code, done.out.split()) == (0, [theirs[outer]]), done
    assert rows(lab) == theirs
    assert lab.run("theirs", [lab.real.python, "script.py"]).out.split()[-1] == "9"


def pin(lab, name):
    """The checksum of the code of a transformation."""
    return json.loads((lab.store / name[:2] / name).read_text())["code"][2]
