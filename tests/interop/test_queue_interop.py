"""The queue file is one format: what either package submits, the other runs."""
import sys

import pytest

from real_seamless import ROOT

pytestmark = [pytest.mark.interop, pytest.mark.slow]
COMMANDS = (["-c", "sort a.txt > x.txt"],
            ["-i", "a.txt", "-cp", "q:b", "-cp", ":out.txt", "--metavar", "N=3", "-c", "cp a.txt q; echo $N"],
            ["-nd", "-c", "sort -r a.txt > z.txt"])


def program(lab, who, name):
    return [lab.real.bin / name] if who == "theirs" else [sys.executable, ROOT / "bin" / name]


def submit(lab, who, argv):
    done = lab.run(who, [*program(lab, who, "seamless-run"), "--qsubmit", *argv])
    assert done.code == 0, done


def run_queue(lab, who, finisher):
    queue = lab.start(who, program(lab, who, "seamless-queue"))
    done = lab.run(finisher, program(lab, finisher, "seamless-queue-finish"))
    out, err = queue.communicate(timeout=60)
    assert (done.code, queue.returncode) == (0, 0) and not (lab.work / ".seamless-queue").exists(), (done, out, err)
    return err


def check(lab, said):
    assert (lab.work / "x.txt").exists(), said
    assert (lab.work / "x.txt").read_text() == "a\nb\n" and (lab.work / "b").read_text() == "b\na\n"
    assert (lab.work / "out.txt").read_text() == "3\n"
    assert (lab.work / "z.txt.CHECKSUM").exists() and not (lab.work / "z.txt").exists()


def test_what_they_submit_we_run(lab):
    (lab.work / "a.txt").write_text("b\na\n")
    for argv in COMMANDS:
        submit(lab, "theirs", argv)
    check(lab, run_queue(lab, "ours", "theirs"))


def test_what_we_submit_they_run(lab):
    (lab.work / "a.txt").write_text("b\na\n")
    said = []
    for argv in COMMANDS:           # one by one: their queue changes its working folder while a command runs, and writes results there
        submit(lab, "ours", argv)
        said.append(run_queue(lab, "theirs", "theirs"))
    check(lab, said)
