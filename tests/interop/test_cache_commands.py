"""Shell commands: what one of the packages has computed is a hit for the other, with the same files left behind."""
import gzip
import os
import pathlib
import shutil

import pytest

from real_seamless import Lab

pytestmark = pytest.mark.interop
ORDERS = [("theirs", "ours"), ("ours", "theirs")]
FILES = {
    "a.txt": b"beta\nalpha\n", "b.txt": b"gamma\n", "my file.txt": b"m\n", "d/x.txt": b"1\n", "d/sub/.hidden": b"h\n", "d/sub/é.txt": b"e\n",
    "packed.txt.gz": gzip.compress(b"packed\n"), "p/one.txt.gz": gzip.compress(b"1\n"), "p/two.txt": b"2\n", "raw.dat": bytes(range(256)),
    "tools/mytool": b"#!/bin/sh\nsort \"$1\"\n", "list.txt": b"d/x.txt\na.txt\n", "run.sh": b"cat a.txt\n", "empty": b"", "n.txt": b"\n\nlines\n\n\n",
}
#: name -> arguments; each in a folder of its own with FILES.  No results but files and text: see the test of the rest.
COMMANDS = {
    "several targets": ["-i", "a.txt", "-cp", "r1", "-cp", "s/r2:local.txt", "-c", "mkdir s; sort a.txt > r1; wc -l < a.txt > s/r2; true"],
    "folder captured": ["-i", "d", "-cp", "out", "-c", "cp -r d out"],
    "stdout captured": ["--capture", ":text.txt", "sort", "a.txt"],
    "binary target": ["-c", "head -c 200 raw.dat | tail -c 100 > o.bin"],
    "no suffix": ["-g2", "-c", "cat empty a.txt > e.txt"],
    "gz": ["-c", "zcat packed.txt.gz"],
    "gz renamed": ["-mx", "-c", "zcat packed.txt.gz | cat - b.txt"],
    "folder as input": ["-i", "p", "-g1", "-c", "ls p; cat p/one.txt p/two.txt"],
    "space": ["-c", "cat 'my file.txt' > 'o.txt'"],
    "variables": ["--var", "X=1", "--var", "Y=hello  wörld", "-c", "echo \"$X $Y\"; cat Y"],
    "metavar": ["--metavar", "THREADS=4", "--metavar", "TMP_NAME=a b", "-c", "sort a.txt"],
    "executable": ["./tools/mytool", "a.txt"],
    "executable on PATH": ["mytool", "b.txt"],
    "script": ["bash", "run.sh", "a.txt"],
    "names stripped": ["-ms", "cat", "d/x.txt", "a.txt"],
    "names by extension": ["-mx", "cat", "d/x.txt", "a.txt"],
    "prologue": ["--prologue", "export LC_ALL=C", "--prologue", "set -o pipefail", "-c", "sort a.txt | uniq"],
    "appended": ["-c", "cat a.txt >> app.txt"],
    "both streams": ["-c", "cat a.txt &> both.txt"],
    "stderr aside": ["-c", "sort a.txt 2> /dev/null"],
    "group": ["-i", "b.txt", "-c", "( sort a.txt; cat b.txt ) > g.txt"],
    "pipeline": ["-c", "cat a.txt b.txt | tr a-z A-Z | sort -r | head -n 2"],
    "numbers": ["seq", "-f", "%g", "0.5", "1", "3.5"],
    "words": ["echo", "café", "*", "a.txt"],
    "workdir": ["-w", "..", "cat", "a.txt"],
    "not downloaded": ["-nd", "-c", "sort a.txt > nd.txt"],
    "folder not downloaded": ["-nd", "-i", "a.txt", "-cp", "res", "-c", "mkdir res; cp a.txt res/x"],
    "blank lines": ["cat", "n.txt"],
    "quotes": ["-c", "awk '{ print \"<\" $1 \">\", NR }' a.txt | sed 's/a/\\t/g'"],
    "substitution": ["-c", "echo $(wc -l < /dev/null) `echo x` ${HOME:+home}"],
    "loop": ["-g1", "-i", "a.txt", "-i", "b.txt", "-c", "for f in a b; do cat $f.txt; done"],
    "long": ["-c", "seq 20000 > long.txt"],
    "tee": ["-g1", "-cp", "t.txt", "-c", "cat a.txt | tee t.txt"],
    "list of inputs": ["-I", "list.txt", "-c", "true; cat d/x.txt a.txt"],
    "second part": ["-i", "b.txt", "-c", "cat a.txt && cat b.txt"],
    "assignment": ["-c", "LC_ALL=C sort -r ./d/../a.txt"],
    "unicode name": ["-c", "cat d/sub/é.txt > ü.txt"],
}


def lines_for(top):
    """(name, arguments, folder) of all commands; makes their files."""
    for name, argv in COMMANDS.items():
        folder = top / name
        for path, data in FILES.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        (folder / "tools" / "mytool").chmod(0o755)
        yield name, argv, folder


def run_all(lab, who):
    """name -> (exit code, stdout, files afterwards, whether a bash ran)."""
    top = lab.folder / ("by-" + who)
    names, lines = [], []
    for name, argv, folder in lines_for(top):
        names.append((name, folder))
        path = "%s%s%s" % (folder / "tools", os.pathsep, lab.environment(who)["PATH"])
        lines.append(("seamless-run", argv, folder, {"LEDGER": str(top / (name + ".ran")), "PATH": path}))
        if lab.project != "__TOPLEVEL__":
            shutil.copy(lab.work / "seamless.yaml", folder)
    found = {}
    for (name, folder), done in zip(names, lab.many(who, lines)):
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        found[name] = (done.code, done.out, files, (top / (name + ".ran")).exists(), done.err)
    return found


@pytest.fixture(scope="module")
def runs(real, tmp_path_factory):
    """who computes -> (what the first found, what the second found, the lab)."""
    labs, found = [], {}

    def get(first, second):
        if first not in found:
            lab = Lab(real, tmp_path_factory.mktemp("commands") / "lab")
            labs.append(lab)
            if first == "ours":             # once with SEAMLESS_CACHE, once with a cluster
                lab.configure("mixed", "shell")
            found[first] = run_all(lab, first), run_all(lab, second), lab
        return found[first]

    yield get
    for lab in labs:
        lab.close()


@pytest.mark.parametrize("first, second", ORDERS, ids=["computed by theirs", "computed by ours"])
def test_what_one_computes_is_a_hit_for_the_other(runs, first, second):
    computed, hit, lab = runs(first, second)
    different = {}
    assert computed.keys() == hit.keys() and len(hit) >= len(COMMANDS)
    for name in computed.keys():
        code, out, files, ran, err = computed[name]
        again = hit[name]
        # Theirs drops blank lines, and prints what a job prints that has result files.
        same = any(path.endswith(".CHECKSUM") for path in files) or again[1].strip() == out.strip()
        if code or not ran or again[0] or again[3] or again[2] != files or not same:
            odd = {path for path in files.keys() | again[2].keys() if files.get(path) != again[2].get(path)}
            different[name] = "first: %s\nthen: %s\nfiles that differ: %s" % (
                [code, out, ran, err[-500:]], [*again[:2], *again[3:]], sorted(odd))
    assert not different, "\n".join("%s\n%s" % item for item in different.items())


#: Command lines (a text is that of ``-c``) that the real package accepts; in a folder with FILES.
ODD = [
    'cat a.txt|sort|uniq', 'cat   a.txt    b.txt', 'cat a.txt ; cat b.txt', 'cat a.txt;', 'cat a.txt &',
    'cat \'a.txt\' "b.txt"', 'cat a\\.txt', 'cat ./a.txt ././b.txt d//x.txt', 'X=a.txt cat b.txt',
    'if true; then cat a.txt; fi', 'while false; do cat a.txt; done', '{ cat a.txt; cat b.txt; }', '(cat a.txt)',
    '( cat a.txt | sort ) | uniq', 'cat a.txt || true', '! cat a.txt', 'cat a.txt >o3.txt', 'cat a.txt 1> o4.txt',
    'cat a.txt > ./o6.txt', 'cat a.txt > q/o7.txt', 'f() { cat a.txt; }; f', 'cat a.txt # comment', 'cat \\\n a.txt',
    'cat a.txt\n', 'cat a.txt\nsort b.txt', '  cat a.txt  ', ('cat', 'a.txt', '|', 'sort', '>', 'o8.txt'),
    ('echo', '1e5', '-1', '.5', '5.', '1_0', 'nan', 'inf', '0x10'), ('-g1', 'echo', 'x.y'), 'cat a.txt | tee >(wc -l)',
    ('-i', 'd', '-c', 'ls d/sub'), ('-i', 'd/', '-c', 'ls'), ('-i', './d', '-c', 'ls'),
    ('-i', 'd/sub', '-i', 'a.txt', '-c', 'ls'), ('ls', 'd/'), ('ls', 'd'), ('ls', './d'), ('ls', 'd/sub/'),
    ('-cp', 'r:x/y.txt', '-c', 'sort a.txt > r; true'), ('-cp', 'p/q/r', '-c', 'mkdir -p p/q; cp a.txt p/q/r'),
    ('-cp', 'r1', '-cp', 'r1:other', '-c', 'cp a.txt r1'), ('-cp', ':o.txt', '-cp', 'r1', '-c', 'cp a.txt r1'),
    ('-cp', 'r1', '-c', 'cp a.txt r1; cat b.txt > r2.txt'), ('--var', 'A=', '-c', 'echo $A'),
    ('--var', 'A=1', '--var', 'A=1', '-c', 'echo $A'), ('--var', 'A=b=c', '-c', 'echo $A'),
    ('--metavar', 'B=', '-c', 'echo $B'), ('--prologue', 'cd d', '-c', 'cat a.txt'),
    ('--prologue', 'a; b', '-cp', 'x', '-c', 'cat a.txt > x'), ('-ms', '-c', 'cat d/x.txt > d.out'),
    ('-mx', '-c', 'cat d/x.txt my\\ file.txt'), ('-mx', '-c', 'cat packed.txt.gz d'), ('-ms', 'ls', 'd/sub'),
    ('-w', 'd', 'cat', 'd/x.txt'), ('-W', 'cat', 'a.txt'), ('./run.sh', 'a.txt'), ('run.sh', 'a.txt'),
    './run.sh a.txt | ./run.sh b.txt', 'bash ./run.sh', 'cd d; ./../run.sh', 'echo run.sh',
    ('--primary', '1', '-c', 'cat a.txt | sort b.txt'), 'cat a.txt | sort - b.txt', 'cat a.txt | (sort; cat b.txt)',
    'cat d/sub/é.txt', 'printf \'%s\\n\' "a\'b" \'c"d\'', 'echo "$HOME" \'$HOME\' \\$HOME',
    'cat a.txt | head -n 1 | tail -c +2 > o9.txt', 'time_x=1 sort a.txt', '[ -f a.txt ] && cat b.txt',
    'for f in a.txt b.txt; do cat $f; done', 'cat a.txt >| o10.txt', 'cat a.txt &>> o11.txt', 'cat a.txt 3> o12.txt',
    'exec cat a.txt', 'env X=1 cat a.txt', 'xargs cat', 'cat a.txt > o13.txt && cat b.txt', 'cat a.txt > o14.txt; true',
    'cat a.txt > o15.txt | cat', 'cat -- a.txt', ('cat', 'missing'), ('cat', 'empty.d/'), './run.sh a.txt | ./run.sh b.txt',
    ('-i', 'run.sh', '-c', 'export X=1; run.sh a.txt'), ('-i', 'run.sh', '-c', './run.sh a.txt; ./run.sh b.txt'),
    './run.sh a.txt && ./run.sh a.txt', 'cat a.txt | (sort; cat b.txt)', '{ cat a.txt; cat b.txt; } | sort',
    '(cat a.txt; cat b.txt) | sort > o.txt', '(cat a.txt | sort) | (cat; cat b.txt) | uniq',
    'echo x; cat a.txt | (cat; cat b.txt)', ('-mx', '-c', './run.sh a.txt | ./run.sh b.txt'),
    ('-ms', '-c', 'cat d/x.txt | ./run.sh a.txt'), ('-i', 'b.txt', '-c', 'cat a.txt && cat b.txt'),
    'sh run.sh a.txt | run.sh b.txt', '( ./run.sh a.txt; ./run.sh b.txt ) | sort',
    ('-i', 'run.sh', '-c', 'cat a.txt; ./run.sh b.txt | run.sh a.txt'),
]


def test_unusual_command_lines_have_the_same_transformation(lab):
    """Only worked out (``--dry``), not run: some of these commands fail."""
    for path, data in FILES.items():
        (lab.work / path).parent.mkdir(parents=True, exist_ok=True)
        (lab.work / path).write_bytes(data)
    (lab.work / "run.sh").chmod(0o755)
    (lab.work / "empty.d").mkdir()
    made = {}
    for who in "theirs", "ours":
        done = lab.many(who, [("seamless-run", ["--dry", "-j", lab.folder / ("%s %d" % (who, n)),
                                                *(("-c", argv) if isinstance(argv, str) else argv)], lab.work)
                              for n, argv in enumerate(ODD)])
        made[who] = [(lab.folder / ("%s %d" % (who, n)) / "transformation.json").read_bytes() if one.code == 0 else one.err
                     for n, one in enumerate(done)]
    assert [argv for argv, theirs, ours in zip(ODD, made["theirs"], made["ours"]) if ours != theirs] == []
    assert all(isinstance(one, bytes) for one in made["theirs"])
