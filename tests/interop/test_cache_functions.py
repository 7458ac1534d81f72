"""Python functions: what one of the packages has computed is a hit for the other, in one store and one ``seamless.db``."""
import pathlib
import shutil
import sqlite3

import pytest

from real_seamless import Lab

pytestmark = pytest.mark.interop
pytest.importorskip("numpy")

CASES = pathlib.Path(__file__).parent / "functions"
PACKAGES = {"theirs": "seamless", "ours": "seamless_lite"}
#: What the real package cannot run, though it reads the result: it has no value None for an argument, ...
NOT_RUN_THERE = {"argument None"}
#: ... and refuses this celltype for a result.
NOT_THERE = {"deepfolder result"}
ORDERS = [("theirs", "ours"), ("ours", "theirs")]


@pytest.fixture(scope="module")
def runs(real, tmp_path_factory):
    """(where, who computes) -> (what the first found, what the second found in its store, the lab)."""
    labs, found = [], {}

    def get(where, first):
        if (where, first) not in found:
            lab = Lab(real, tmp_path_factory.mktemp("functions") / "lab")
            labs.append(lab)
            if where == "cluster":
                lab.configure("mixed", "sub/project")
            shutil.copytree(CASES, lab.work, dirs_exist_ok=True)       # the configuration is read beside the script
            found[where, first] = [lab.script(who, lab.work / "cases.py", PACKAGES[who]) for who in (first, *(PACKAGES.keys() - {first}))] + [lab]
        return found[where, first]

    yield get
    for lab in labs:
        lab.close()


@pytest.mark.parametrize("where", ["cache", "cluster"])
@pytest.mark.parametrize("first, second", ORDERS, ids="computed by {0[0]}".format)
def test_what_one_computes_is_a_hit_for_the_other(runs, where, first, second):
    computed, hit, lab = runs(where, first)
    assert computed.keys() == hit.keys() and len(computed) > 240
    for name in computed.keys() - NOT_THERE - (NOT_RUN_THERE if first == "theirs" else set()):
        assert computed[name].get("error") is None and computed[name]["ran"] == 1, (name, computed[name])
        assert hit[name] == dict(computed[name], ran=0), name
    assert _check(lab.table) == "ok"


def test_both_compute_the_same_results(runs):
    theirs, ours = runs("cache", "theirs")[0], runs("cache", "ours")[0]
    assert {name: (ours[name], theirs[name]) for name in theirs.keys() - NOT_THERE - NOT_RUN_THERE
            if ours[name] != theirs[name]} == {}


def test_what_the_real_package_refuses_is_what_the_readme_says(runs):
    theirs = runs("cache", "theirs")[0]
    assert {name for name in theirs if theirs[name].get("error")} == NOT_THERE | NOT_RUN_THERE


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_either_leaves_the_same_rows(runs, first):
    """One transformation row, one rev row and one record with the same keys for each result."""
    computed, _, lab = runs("cache", first)
    with sqlite3.connect("file:%s?mode=ro" % lab.table, uri=True) as db:
        rows = dict(db.execute('SELECT "checksum", "result" FROM "transformation"'))
        reverse = db.execute('SELECT "checksum", "result" FROM "rev_transformation"').fetchall()
        records = {row[0]: row[1:] for row in db.execute('SELECT "checksum", "result", "metadata" FROM "meta_data"')}
    for name, one in computed.items():
        if not one.get("error"):
            assert rows[one["transformation"]] == one["result"], name
            assert (one["transformation"], one["result"]) in reverse, name
            assert records[one["transformation"]][0] == one["result"], name
    assert sorted(reverse) == sorted(rows.items())


CHECKSUMS = """\
import importlib, json, sys, warnings
warnings.simplefilter("ignore")
api = importlib.import_module("seamless.transformer" if sys.argv[1] == "seamless" else sys.argv[1])
modules = [importlib.import_module("odd_" + kind) for kind in ("lf", "crlf", "bom", "latin")]
print(json.dumps([str(api.delayed(getattr(module, name))(5).construct()) for module in modules for name in "abcdefghijklmnopqrst"]))
"""


def test_functions_in_unusual_source_text_have_the_same_identity(lab):
    text = (CASES / "odd_source.txt").read_text(encoding="utf-8")
    for kind, written in {"lf": text.encode(), "crlf": text.replace("\n", "\r\n").encode(), "bom": text.encode("utf-8-sig"),
                          "latin": ("# coding: latin-1\n" + text).encode("latin-1")}.items():
        (lab.work / ("odd_%s.py" % kind)).write_bytes(written)
    (lab.work / "checksums.py").write_text(CHECKSUMS)
    theirs, ours = (lab.script(who, lab.work / "checksums.py", PACKAGES[who]) for who in ("theirs", "ours"))
    assert ours == theirs and len(ours) == 80 and len(set(ours)) == 20       # whatever the encoding


def test_their_programs_show_what_we_computed(runs, tmp_path):
    computed, _, lab = runs("cache", "ours")
    text, deep, array = (computed[name] for name in ("text 'é\\r\\nx\\n\\n'", "folder result", "array i8"))
    done = lab.many("theirs", [
        ("seamless-resolve", [text["result"]], lab.work),
        ("seamless-resolve", [array["result"], "--output", tmp_path / "array.npy"], lab.work),
        ("seamless-fingertip", [text["result"]], lab.work),
        ("seamless-run-transformation", [text["transformation"]], lab.work),
        ("seamless-download", [deep["result"], "--directory", "-o", tmp_path / "folder"], lab.work),
    ])
    assert [one.code for one in done] == [0] * 5, done
    assert done[0].out.split() == done[2].out.split() == ["é", "x"]
    assert (tmp_path / "array.npy").read_bytes() == (lab.store / array["result"][:2] / array["result"]).read_bytes()
    assert done[3].out.strip() == text["result"]
    assert (tmp_path / "folder" / "d" / "2.txt").read_bytes() == b"file 2\n"


def _check(table):
    with sqlite3.connect("file:%s?mode=ro" % table, uri=True) as db:
        return db.execute("PRAGMA integrity_check").fetchone()[0]
