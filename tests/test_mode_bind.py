"""``seamless-mode-bind.sh`` in a real interactive bash, typed at through a pseudo-terminal."""
import os
import pathlib
import pty
import re
import select
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROMPT = "@ready@"
PATIENCE_S = 30


class Bash:
    """An interactive bash at a terminal."""

    def __init__(self, folder, home):
        self.main, terminal = pty.openpty()
        env = {"HOME": str(home), "PATH": os.pathsep.join([str(ROOT / "bin"), os.environ["PATH"]]), "TERM": "dumb", "PS1": PROMPT,
               "LANG": "C.UTF-8", "HISTFILE": str(home / "history")}
        self.process = subprocess.Popen(["bash", "--norc", "--noprofile", "-i"], stdin=terminal, stdout=terminal, stderr=terminal,
                                        cwd=folder, env=env, start_new_session=True)
        os.close(terminal)
        self.wait(PROMPT)
        self.type("bind 'set enable-bracketed-paste off'")

    def wait(self, text):
        """What is shown until ``text`` has come."""
        shown, end = "", time.monotonic() + PATIENCE_S
        while not re.search(re.escape(text) + r"\Z", shown):
            assert time.monotonic() < end, "not shown: %r, but: %r" % (text, shown)
            if select.select([self.main], [], [], 0.5)[0]:
                shown += os.read(self.main, 65536).decode("utf-8", "replace")
        return shown.replace("\r", "")

    def type(self, text, until=PROMPT):
        os.write(self.main, text.encode() + b"\r")
        return self.wait(until)

    def press(self, keys):
        os.write(self.main, keys)
        return self.wait(PROMPT)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.main)


@pytest.fixture
def bash(home, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    terminal = Bash(tmp_path, home)
    terminal.type(". seamless-mode-bind.sh")
    yield terminal
    terminal.close()


def test_what_is_typed_is_run_by_seamless_run_while_the_mode_is_on(bash, tmp_path):
    def stamp():
        return re.findall(r"\n(\d{15,})\n", bash.type("head -n 1 a.txt; date +%s%N"))[0]
    assert "seamless mode is on" in bash.press(b"\x15u")
    assert stamp() == stamp(), "the second time it was no hit"
    assert "three" in bash.type("sort -r a.txt > sorted.txt && cat sorted.txt") and not (tmp_path / "sorted.txt.CHECKSUM").exists()
    bash.type("sort a.txt > plain.txt")
    assert (tmp_path / "plain.txt.CHECKSUM").exists()
    assert "seamless mode is off" in bash.press(b"\x15u")
    assert stamp() != stamp(), "it is a plain shell again"


def test_the_value_of_a_shell_variable_counts(bash, tmp_path):
    bash.press(b"\x15u")
    bash.type("n=1")
    assert "\none\n" in bash.type('head -n "$n" a.txt')
    bash.type("n=2")
    assert "\none\ntwo\n" in bash.type('head -n "$n" a.txt')
    bash.type("words='two words'")
    assert "\n<two words>\n" in bash.type("""/usr/bin/printf '<%s>\\n' "$words" """)


def test_builtins_functions_quotes_and_many_lines_are_left_alone_or_quoted(bash, tmp_path):
    bash.press(b"\x15u")
    (tmp_path / "below").mkdir()
    bash.type("cd below")
    assert str(tmp_path / "below") in bash.type("pwd")
    bash.type("cd ..")
    assert "\nit's\n" in bash.type("""grep -o "it's" <<< "it's" """)
    assert "2 a.txt" not in bash.type("f() { wc -l a.txt; }") and "3 a.txt" in bash.type("f")
    bash.type("for i in 1 2; do", until="> ")
    bash.type("cat a.txt", until="> ")
    assert bash.type("done").count("three") == 2
    assert "\none\n" in bash.type("head -n 1 a.txt"), "after many lines it goes on"
    shown = bash.type("history")
    assert re.search(r"\d  head -n 1 a\.txt\n", shown) and "seamless-run" not in shown


def test_options_come_from_the_environment(bash, tmp_path):
    bash.type("export SEAMLESS_MODE_OPTS=-v")
    assert "(options: -v)" in bash.press(b"\x15u")
    assert "transformation" in bash.type("head -n 2 a.txt")


def test_a_script_is_told_that_it_needs_a_terminal(tmp_path):
    done = subprocess.run(["bash", "-c", ". %s/bin/seamless-mode-bind.sh" % ROOT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1 and b"this is not an interactive bash" in done.stderr
