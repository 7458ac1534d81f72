"""Scratch results, transformations by checksum and buffers by checksum: the same tools of both packages agree on one store."""
import hashlib
import sys

import pytest

pytestmark = pytest.mark.interop
SCRIPT = """\
import {package}.config
{package}.config.init()
from {package}{module} import delayed
@delayed
def word(n):
    return "x" * n
@delayed
def twice(text):
    return text + text
word.scratch = twice.scratch = True
tf = twice(word({n}))
tf.compute()
print(tf.result_checksum, tf.transformation_checksum)
"""


def tool(lab, who, name, *words):
    argv = [sys.executable, "-m", "seamless_lite", name] if who == "ours" else [lab.real.bin / ("seamless-" + name)]
    return lab.run(who, [*argv, *words])


def test_a_scratch_chain_of_either_is_made_again_by_the_other(lab):
    for n, who, other in ((7, "theirs", "ours"), (8, "ours", "theirs")):
        text = SCRIPT.format(n=n, **({"package": "seamless", "module": ".transformer"} if who == "theirs"
                                     else {"package": "seamless_lite", "module": ""}))
        (lab.work / "script.py").write_text(text)
        done = lab.run(who, [sys.executable if who == "ours" else lab.real.python, "script.py"])
        result, transformation = done.out.split()[-2:]
        data = '"%s"\n' % ("x" * 2 * n)
        assert result == hashlib.sha256(data.encode()).hexdigest()
        for buffer in (lab.store / result[:2]).glob("*"):
            assert buffer.name != result        # it is scratch
        for package in (other, who):
            assert tool(lab, package, "resolve", result).code == 1
            found = tool(lab, package, "fingertip", result)
            assert (found.code, found.out) == (0, data), found
        for package in (other, who):
            found = tool(lab, package, "run-transformation", transformation)
            assert (found.code, found.out.split()) == (0, [result]), found
        for package in (other, who):
            found = tool(lab, package, "resolve", result)
            assert (found.code, found.out) == (0, data), found


def test_nothing_to_cancel_is_said_alike(lab):
    found = [tool(lab, who, "cancel", "a" * 64) for who in ("theirs", "ours")]
    assert [(done.code, done.out) for done in found] == [(2, "process: not-running\n")] * 2, found
