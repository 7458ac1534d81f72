"""references.py: what buffers refer to."""
import pytest

from seamless_lite.celltypes import plain_dumps, serialize
from seamless_lite.checksum import Checksum
from seamless_lite.folder import Folder, MemoryBuffers
from seamless_lite.references import closure, index_leaves, recipe_of
from seamless_lite.resulttable import MemoryResults
from seamless_lite.transformation import Recipe


def refers(data):
    recipe = recipe_of(data)
    return [] if recipe is None else recipe.inputs()


def made(store, output="mixed"):
    """A transformation with a plain input and two directories (one as commands have them)."""
    leaves = [store.put(b"leaf %d" % n) for n in range(4)]
    first = store.put(plain_dumps({"a": leaves[0], "sub/b": leaves[1]}))
    second = store.put(plain_dumps({"c": leaves[2]}))
    x, code = store.put(serialize(7, "int")), store.put(b"def f(x):\n    return x\n")
    pins = {"code": ("python", "transformer", code), "x": ("int", None, x), "none": ("mixed", None, None),
            "one": ("deepfolder", None, first), "two": ("mixed", None, second)}
    recipe = Recipe("python", pins, ("result", output, None), {"__format__": {"two": {"celltype": "deepfolder"}}})
    store.put(recipe.buffer)
    return recipe, [x, code, first, second], leaves


@pytest.fixture(params=["memory", "folder"])
def store(request, tmp_path):
    return MemoryBuffers() if request.param == "memory" else Folder(tmp_path / "buffers")


def test_a_transformation_refers_to_its_pins_and_an_index_to_its_leaves(store):
    recipe, pins, leaves = made(store)
    assert set(refers(recipe.buffer)) == set(pins)
    assert index_leaves(store.get(pins[2])) == leaves[:2]


@pytest.mark.parametrize("data", [
    b"", b"{", b"{}", b"\xff{", b'"__language__" "__output__"', b'{"__language__": 1, "__output__": 2}',
    b'{"__language__": "python", "__output__": [], "x": [[], null, null]}',
    b'{"__language__": "python", "__output__": ["result", {}, null]}',
    b'{"__language__": "python", "__output__": ["result", "int", null], "x": [[], null, null]}',
    b'{"__language__": "python", "__output__": ["result", "int", null], "x": ["int", null, "abc"]}',
    b"[" * 100000, b'{"a": 1}', b'{"a": "xyz"}'])
def test_other_buffers_refer_to_nothing(data):
    assert recipe_of(data) is None
    assert refers(data) == [] == index_leaves(data)


def test_the_closure_has_code_inputs_leaves_and_the_result_with_its_leaves(store):
    recipe, pins, leaves = made(store, "deepcell")
    result = store.put(plain_dumps([leaves[3]]))
    results = MemoryResults()
    results.put(recipe.checksum, result)
    assert closure([recipe.checksum], store).checksums == {recipe.checksum, *pins, *leaves[:3]}
    found = closure([recipe.checksum], store, results)
    assert found.checksums == {recipe.checksum, result, *pins, *leaves}
    assert found.transformations == {recipe.checksum} and found.results == {recipe.checksum: result}
    assert not found.missing


def test_what_is_missing_is_listed_and_a_row_without_its_transformation_still_has_a_result(store):
    gone, leaf = Checksum.of(b"gone"), Checksum.of(b"gone leaf")
    index = store.put(plain_dumps({"x": leaf}))
    results = MemoryResults()
    results.put(gone, index)
    found = closure([gone], store, results)
    assert found.checksums == {gone, index, leaf} and found.missing == {gone, leaf} and found.incomplete == {index}
    assert found.transformations == set()


def test_a_buffer_that_is_first_a_plain_input_and_then_a_deep_one_is_looked_into(store):
    leaf = store.put(b"leaf")
    index = store.put(plain_dumps([leaf]))
    names = []
    for celltype in ("plain", "deepcell"):
        recipe = Recipe("python", {"x": (celltype, None, index)})
        names.append(store.put(recipe.buffer))
    assert leaf not in closure(names[:1], store).checksums
    assert leaf in closure(names, store).checksums
    assert closure([index], store).checksums == {index, leaf}, "a root is looked into"


def test_more_roots_than_one_batch(store):
    names = [Checksum.of(b"%d" % n) for n in range(2500)]
    assert closure(iter(names), store).missing == set(names)
