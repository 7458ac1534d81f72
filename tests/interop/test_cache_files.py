"""Files and folders: what one of the packages uploads, the other downloads, from one folder of buffers; and scratch results."""
import gzip
import json
import pathlib
import shutil

import pytest

pytestmark = pytest.mark.interop
FUNCTIONS = pathlib.Path(__file__).parent / "functions"
PACKAGES = {"theirs": "seamless", "ours": "seamless_lite"}
BOTH = pytest.mark.parametrize("first, second", [("theirs", "ours"), ("ours", "theirs")], ids=["from theirs", "from ours"])
FILES = {"text.txt": b"text\n", "empty": b"", "raw.dat": bytes(range(256)) * 50, "packed.txt.gz": gzip.compress(b"packed\n", mtime=0),
         "my file é.txt": b"name\n", "folder/a.txt": b"a\n", "folder/.hidden": b"h\n", "folder/sub/b": b"", "folder/sub/c.gz": gzip.compress(b"c\n")}
PLAIN = {"text.txt": b"text\n", "empty": b"", "raw.dat": FILES["raw.dat"], "packed.txt": b"packed\n", "my file é.txt": b"name\n"}
FOLDER = {"a.txt": b"a\n", ".hidden": b"h\n", "sub/b": b"", "sub/c": b"c\n"}
TOP = ["text.txt", "empty", "raw.dat", "packed.txt.gz", "my file é.txt", "folder"]


def make(folder):
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sidecars(folder):
    return {name: data.strip() for name, data in contents(folder).items() if name.endswith((".CHECKSUM", ".INDEX"))}


@BOTH
def test_what_one_uploads_the_other_downloads(lab, first, second):
    source = make(lab.work / "source")
    done = lab.program(first, "seamless-upload", "-y", *TOP, cwd=source)
    assert done.code == 0, done
    target = lab.work / "target"
    target.mkdir()
    for name in sidecars(source):
        shutil.copy(source / name, target / name)
    names = [*PLAIN, "folder"]
    done = lab.program(second, "seamless-download", "-y", *names, cwd=target)
    assert done.code == 0, done
    found = {name: data for name, data in contents(target).items() if not name.endswith((".CHECKSUM", ".INDEX"))}
    assert found == {**PLAIN, **{"folder/" + name: data for name, data in FOLDER.items()}}
    # Their content is an input, too, without the files.
    shutil.copytree(target, lab.work / "again", ignore=lambda folder, names: [name for name in names if name in TOP])
    done = lab.program(second, "seamless-run", "cat", "text.txt", cwd=lab.work / "again")
    assert done.code == 0 and done.out == "text\n", done


def test_sidecars_are_the_same(lab):
    found = {}
    for who in PACKAGES:
        source, other = make(lab.work / who), make(lab.work / (who + " without upload"))
        assert lab.program(who, "seamless-upload", "-y", *TOP, cwd=source).code == 0
        done = lab.many(who, [("seamless-checksum-file", [name], other) for name in TOP[:-1]]
                        + [("seamless-checksum-index", ["folder"], other), ("seamless-checksum", ["packed.txt.gz"], other)])
        assert [one.code for one in done] == [0] * len(done), done
        found[who] = sidecars(source)
        assert sidecars(other) == found[who] and done[-1].out.strip().encode() == found[who]["packed.txt.CHECKSUM"]
    assert found["ours"] == found["theirs"] and len(found["ours"]) == 7


SCRATCH = '''\
import importlib, sys
package = sys.argv[1]
importlib.import_module(package + ".config").init()
api = importlib.import_module("seamless.transformer" if package == "seamless" else package)


def make(n):
    open(__import__("os").environ["LEDGER"], "a").write("ran\\n")
    return "scratch " * n


tf = api.delayed(make)
tf.scratch = True
tf = tf(int(sys.argv[2]))
tf.compute()
print('["%s", "%s"]' % (tf.transformation_checksum, tf.result_checksum))
if package == "seamless":
    importlib.import_module(package).close()        # else the end of the program may lose buffers
'''


@BOTH
def test_a_scratch_result_of_one_is_made_again_by_the_other(lab, first, second):
    (lab.work / "scratch.py").write_text(SCRATCH)
    _, result = lab.script(first, lab.work / "scratch.py", PACKAGES[first], 3)
    assert lab.ran() == 1 and not (lab.store / result[:2] / result).exists()
    done = lab.program(second, "seamless-fingertip", result)
    assert done.code == 0 and json.loads(done.out) == "scratch scratch scratch ", done
    assert lab.ran() == 1
