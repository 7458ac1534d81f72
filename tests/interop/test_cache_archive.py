"""What seamless-export wrote, unpacked with tar, is a store of the real package; its stores can be exported and checked."""
import subprocess

import pytest

from real_seamless import Lab
from seamless_lite.resulttable import ResultTable

pytestmark = pytest.mark.interop
COMMAND = ("-i", "d", "-c", "cat a.txt; date +%s%N")


def folder(lab):
    (lab.work / "d").mkdir()
    (lab.work / "d" / "x.txt").write_text("in a folder\n")
    (lab.work / "a.txt").write_text("an input\n")


@pytest.mark.parametrize("first, second", [("ours", "theirs"), ("theirs", "ours"), ("theirs", "theirs")])
def test_an_archive_unpacked_with_tar_is_a_store_with_a_hit(lab, tmp_path, first, second):
    folder(lab)
    done = lab.program(first, "seamless-run", *COMMAND)
    assert done.code == 0 and lab.ran() == 1, done
    lab.close()
    checked = lab.program("ours", "seamless-fsck", "--json")
    assert checked.code == 0 and '"damage": true' not in checked.out, checked
    [(name,)] = ResultTable(lab.table).query('SELECT "checksum" FROM "transformation"')
    archive = tmp_path / "x.tar"
    assert lab.program("ours", "seamless-export", name, "-o", archive).code == 0
    with Lab(lab.real, tmp_path / "other") as other:
        folder(other)
        other.store.mkdir()
        subprocess.run(["tar", "-xf", archive, "-C", other.store], check=True)
        again = other.program(second, "seamless-run", *COMMAND)
        assert again.code == 0 and again.out == done.out, again
        assert other.ran() == 0, "it is a hit"
