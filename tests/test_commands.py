"""All commands: their help, their wrong words, and the completion of both shells."""
import os
import pathlib
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import pytest

from seamless_lite.__main__ import COMMANDS, main

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETUP = (ROOT / "setup.cfg").read_text()
#: What compat/cli.md asks of each, or our own papers do.
OPTIONS = {
    "run": "-v -q --project --stage -g1 -g2 -w -W -ms -mx -c -cp --capture -i --input -I --input-file --var --metavar --prologue --primary "
           "-y --yes -n --no -nd --no-download --scratch --docker --conda --conda-env --conda-environment --node --fingertip --undo "
           "--direct-print --local --dry --dry-run -j --write-job --upload --write-remote-job --qsubmit --qsub --why --verify",
    "run-transformation": "--project --stage --direct-print --verbose --scratch --fingertip --strict --output --dunder",
    "cancel": "--project --stage --verbose", "resolve": "--project --stage --verbose --output",
    "fingertip": "--project --stage --verbose --output", "checksum": "", "checksum-file": "", "checksum-index": "",
    "upload": "-v -q --project --stage -y -n -m --move --destination --copy --hardlink --symlink --incremental --dest-skip --dest-verify "
              "--dest-repair",
    "download": "-o --output --stdout --directory --index --destination --copy --hardlink --softlink --symlink --dest-skip --dest-verify "
                "--dest-repair --dest-rm --incremental --compression --project --stage -y -n -v",
    "init": "--stage", "queue": "-q --quiet --workers", "queue-finish": "",
    "hashserver": "--writable --port --port-range --host --layout --hash-algorithm --extra-dirs --lock-timeout --status-file --timeout",
    "database": "--writable --port --port-range --host --status-file --timeout",
    "jobserver": "--workers --port --port-range --host --status-file --timeout",
    "service-resolve": "--service --cluster --project --subproject --stage --substage --mode --queue --frontend-name --workdir",
    "service-ps": "--client --server --all-clusters --status --persistent --json", "service-inspect": "--service", "service-logs": "--tail",
    "service-stop": "--service --cluster", "service-rm": "--client --server", "service-clear": "--service",
    "gc": "--project --stage", "fsck": "--repair", "export": "-o", "import": ""}


def run(name, *words, **options):
    return subprocess.run([sys.executable, "-m", "seamless_lite", name, *words], cwd=options.pop("cwd", ROOT), stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60, **options)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_help_is_complete(name, capsys):
    try:
        code = main([name, "--help"])
    except SystemExit as exc:               # argparse, in the services
        code = exc.code
    text, err = capsys.readouterr()
    assert code == 0 and err == ""
    assert text.startswith("usage: seamless-" + name) and "-h, --help" in text
    assert re.search(r"exit codes:\s+(0|the command's own)", text), text
    assert "130 interrupted" in text or name in ("hashserver", "database", "jobserver", "daskserver")
    for option in OPTIONS.get(name, "").split():
        assert re.search(r"(?<![\w-])%s(?![\w-])" % re.escape(option), text), "%s is not in the help" % option
    described = [line for line in text.splitlines() if re.match(r"  -", line)]
    assert described and not [line for line in text.splitlines() if len(line) > 160]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_an_unknown_option_is_exit_code_2_and_says_what_there_is(name, capsys):
    try:
        code = main([name, "--no-such-option"])
    except SystemExit as exc:               # argparse, in the services
        code = exc.code
    shown = capsys.readouterr()
    assert code == 2 and shown.out == "" and "seamless-" + name in shown.err and "Traceback" not in shown.err


def test_no_program_is_forgotten():
    known = {"seamless-" + name for name in COMMANDS} | {"seamless-mode-bind.sh"}
    assert {path.name for path in (ROOT / "bin").iterdir()} == known == set(re.findall(r"^    bin/(.*)$", SETUP, re.M))


# --- completion

@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh"):
        (folder / shell).write_bytes(run("completion", shell).stdout)
    return folder


def completed(scripts, *words):
    """What bash offers for the last word."""
    code = ". %s/bash; COMP_WORDS=(%s); COMP_CWORD=%d; _seamless; printf '%%s\\n' \"${COMPREPLY[@]}\"" % (
        scripts, " ".join("'%s'" % word for word in words), len(words) - 1)
    done = subprocess.run(["bash", "--norc", "--noprofile", "-c", code], cwd=scripts, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    assert done.stderr == b"", done.stderr.decode()
    return done.stdout.decode().split()


def test_bash_completes_options_values_stages_commands_and_files(scripts):
    (scripts / "data.txt").write_text("")
    (scripts / "seamless.yaml").write_text("- project: p\n- stage gpu:\n    - execution: remote\n- stage big:\n")
    assert completed(scripts, "seamless-run", "--dir") == ["--direct-print"]
    assert completed(scripts, "seamless-download", "--compression", "") == ["zst", "gz"]
    assert completed(scripts, "seamless-run", "--stage", "") == ["gpu", "big"]
    assert completed(scripts, "seamless-run", "--var", "a=1", "bas").count("bash") >= 1
    assert completed(scripts, "seamless-run", "wc", "da") == ["data.txt"]
    assert completed(scripts, "seamless-run", "wc", "--dir") == [], "options of the command are not ours"
    assert completed(scripts, "/somewhere/seamless-upload", "da") == ["data.txt"]
    assert "database" in completed(scripts, "seamless-service-logs", "--service", "")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh here")
def test_zsh_completes_the_same(scripts, home):
    main, terminal = pty.openpty()
    process = subprocess.Popen(["zsh", "-f", "-i"], stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, cwd=scripts,
                               env={"HOME": str(home), "PATH": os.environ["PATH"], "TERM": "dumb", "PS1": "> "})
    try:
        shown, end = "", time.monotonic() + 30
        os.write(main, b". ./zsh && echo loa''ded\r")
        while "--direct-print" not in shown:
            assert time.monotonic() < end, shown
            if select.select([main], [], [], 0.3)[0]:
                shown += os.read(main, 65536).decode("utf-8", "replace")
            if "loaded" in shown:
                os.write(main, b"seamless-run --dir\t")
                shown = shown.replace("loaded", "")
    finally:
        process.kill()
        process.wait()
        os.close(main)
        os.close(terminal)
