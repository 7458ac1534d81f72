"""Celltypes: the vectors of Seamless 1.x to the byte, what reads back, and what is refused with a sentence."""
import collections
import enum
import io
import json
import math
import pathlib
import random
import subprocess
import sys

import pytest

from seamless_lite.celltypes import (
    CELLTYPES, DEEP, deep_checksums, deserialize, pack_deep, plain_dumps, plain_loads, serialize, unpack_deep)
from seamless_lite.celltypes import Buffer
from seamless_lite.checksum import Checksum
from seamless_lite.errors import CacheMissError, CelltypeError
from seamless_lite.folder import MemoryBuffers
from seamless_lite.values import read_value

ROOT = pathlib.Path(__file__).resolve().parent.parent
VECTORS = json.loads((pathlib.Path(__file__).parent / "vectors.json").read_text(encoding="utf-8"))
#: Vectors that Seamless 1.x gets wrong, and what happens here instead.
NOT_MATCHED = {"A052": "of an array of text only the first element survives in Seamless 1.x; it is refused here, "
                       "see test_an_array_of_text_is_refused_because_seamless_loses_data"}

try:
    import numpy as np
except ImportError:
    np = None
needs_numpy = pytest.mark.skipif(np is None, reason="numpy is not installed")


def refused(value, celltype, *words):
    with pytest.raises(CelltypeError) as caught:
        serialize(value, celltype)
    message = str(caught.value)
    assert isinstance(caught.value, TypeError) and "\n" not in message
    for word in words:
        assert word in message
    return message


def there_and_back(value, celltype="mixed"):
    return deserialize(serialize(value, celltype), celltype)


# --- vectors -----------------------------------------------------------------------------------

@pytest.mark.parametrize("vector", [v for v in VECTORS["values"] if v["id"] not in NOT_MATCHED],
                         ids=lambda v: "%s-%s" % (v["id"], v["celltype"]))
def test_a_value_has_the_buffer_and_checksum_of_seamless(vector):
    if np is None and ("np." in vector["value"] or vector["celltype"] == "binary"):
        pytest.skip("numpy is not installed")
    value = eval(vector["value"], {"np": np})
    if "error" in vector:
        with pytest.raises(CelltypeError) as caught:
            serialize(value, vector["celltype"])
        assert vector["error"] == "TypeError" and isinstance(caught.value, TypeError)
    else:
        data = serialize(value, vector["celltype"])
        assert data.hex() == vector["buffer_hex"]
        assert Checksum.of(data) == vector["checksum"]


def test_every_vector_is_either_matched_or_listed_with_a_reason():
    assert len(VECTORS["values"]) == 96
    assert set(NOT_MATCHED) < {v["id"] for v in VECTORS["values"]}


@pytest.mark.parametrize("vector", [v for v in VECTORS["functions"] if "transformation_buffer" in v], ids=lambda v: v["id"])
def test_a_transformation_dict_has_the_buffer_of_seamless(vector):
    assert plain_dumps(vector["transformation"]).decode() == vector["transformation_buffer"]
    assert plain_loads(vector["transformation_buffer"].encode()) == vector["transformation"]


# --- plain -------------------------------------------------------------------------------------

STRINGS = ["", "a", "é☃\U0001f600", '"\\/', "\x00\x1f\x7f\x80\u2028\u2029\ufeff", "\r\n\t\b\f", "1" * 19, "e999", "NaN"]


def random_float(rng):
    return rng.choice([rng.uniform(-10, 10), 10.0 ** rng.randint(-8, 20), -rng.random() * 10.0 ** rng.randint(-310, 308),
                       float(rng.randint(-2**60, 2**60)), -0.0, 5e-324, sys.float_info.max, 9.5e-05, 123456e-10])


def random_plain(rng, depth=0):
    kind = rng.randrange(7 if depth < 5 else 5)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.choice([rng.randint(-20, 20), rng.randint(-2**63, 2**64 - 1), 2**64 - 1, -2**63])
    if kind == 2:
        return random_float(rng)
    if kind in (3, 4):
        return "".join(rng.choice(STRINGS) for _ in range(rng.randrange(3)))
    items = [random_plain(rng, depth + 1) for _ in range(rng.randrange(5))]
    return items if kind == 5 else {rng.choice(STRINGS) + str(rng.randrange(20)): item for item in items}


def test_any_plain_value_reads_back_equal():
    rng = random.Random(1)
    for _ in range(3000):
        value = random_plain(rng)
        assert repr(plain_loads(plain_dumps(value))) == repr(json.loads(json.dumps(value, sort_keys=True)))


def test_plain_is_what_orjson_writes_and_reads():
    orjson = pytest.importorskip("orjson", reason="orjson, the writer of Seamless 1.x, is not installed")
    if tuple(int(part) for part in orjson.__version__.split(".")) < (3, 11, 7):
        pytest.skip("orjson before 3.11.7 writes exponents without a plus sign")
    option = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    rng = random.Random(2)
    for value in [random_plain(rng) for _ in range(3000)] + [random_float(rng) for _ in range(3000)]:
        data = plain_dumps(value)
        assert data == orjson.dumps(value, option=option)
        assert repr(plain_loads(data)) == repr(orjson.loads(data))
    nested = []
    for _ in range(253):
        nested = [nested]
    assert plain_dumps(nested) == orjson.dumps(nested, option=option)
    refused([nested], "plain", "254 levels")
    with pytest.raises(TypeError):
        orjson.dumps([nested], option=option)


def test_mixed_json_is_what_the_json_module_writes():
    rng = random.Random(3)
    values = [random_plain(rng) for _ in range(2000)] + [
        10**100, [math.inf, -math.inf], {1: 1, 10: 2, 9: 3}, {None: 1}, {True: 1, False: 2}, {2.5: 0, 1e-05: 1},
        ["\ud800"], (1, (2,)), {"a": (), "b": [], "c": {}}]
    for value in values:
        assert serialize(value, "mixed") == json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"
    assert math.isnan(there_and_back([math.nan])[0])


@pytest.mark.parametrize("text, value", [
    (b"18446744073709551615", 2**64 - 1), (b"-9223372036854775808", -2**63),
    (b"18446744073709551616\n\n", 1.8446744073709552e19), (b"-9223372036854775809", -9.223372036854775809e18),
    (b'["1234567890123456789", 7]', ["1234567890123456789", 7]), (b"1e-400", 0.0), (b"[1e+100]", [1e100])])
def test_numbers_in_plain_read_as_orjson_reads_them(text, value):
    assert repr(plain_loads(text)) == repr(value)


@pytest.mark.parametrize("text", [b"", b"\n", b"NaN", b"[Infinity]", b"1e999", b"9" * 400, b"{'a': 1}", b"[1,]", b"1 2",
                                  b"\xff", b"\xef\xbb\xbf1", b'"\t"', b"[" * 100000])
def test_what_is_not_json_is_refused_and_the_message_names_the_buffer(text):
    with pytest.raises(CelltypeError, match=Checksum.of(text)):
        plain_loads(text)


class Color(enum.Enum):
    RED = 1


class Number(enum.IntEnum):
    ONE = 1


class Word(str, enum.Enum):
    HI = "hi"


@pytest.mark.parametrize("celltype", ["plain", "mixed"])
@pytest.mark.parametrize("value", [{1}, 1j, object(), Color.RED, Number.ONE, Word.HI, bytearray(b"x"), range(3), int],
                         ids=lambda v: type(v).__name__)
def test_a_value_without_a_place_in_json_is_refused_where_it_is(value, celltype):
    refused(value, celltype, celltype)
    refused({"a": [0, (1, value)]}, celltype, "['a'][1][1]")
    if celltype == "mixed":
        refused({"a": [b"x", (1, value)]}, celltype, "['a'][1][1]")


def test_subclasses_of_dict_list_tuple_str_and_int_are_written_as_these():
    Point = collections.namedtuple("Point", "x y")
    value = collections.OrderedDict(b=Point(1, 2), a=Checksum("AB" * 32))
    for celltype in ("plain", "mixed"):
        assert json.loads(serialize(value, celltype)) == {"b": [1, 2], "a": "ab" * 32}


@pytest.mark.parametrize("value", [{1: 2}, {"a": 1, 2: 3}, {None: 0}, {("a",): 1}], ids=repr)
def test_plain_keys_must_be_str(value):
    refused([value], "plain", "key", "[0]")


@pytest.mark.parametrize("value", [{"a": 1, 2: 3}, {("a",): 1}, {("a",): b""}, {b"a": 1}, {1: b"", "1": 2}], ids=repr)
def test_mixed_keys_must_be_of_one_kind(value):
    refused([value], "mixed", "key")


@pytest.mark.parametrize("value", ["\ud800", ["a", "\udfff"], {"\ud800": 1}], ids=ascii)
def test_a_lone_surrogate_is_refused_in_plain(value):
    refused(value, "plain", "surrogate")


def test_integers_have_64_bits_in_plain_and_any_size_in_mixed():
    for value in (2**64, -2**63 - 1):
        refused([value], "plain", "mixed", "[0]")
        refused(value, "int")
        assert there_and_back(value) == value


@pytest.mark.parametrize("celltype", sorted(CELLTYPES & {"plain", "mixed", "deepcell", "checksum", "module"}))
def test_a_value_that_contains_itself_is_refused(celltype):
    loop = [[]]
    loop[0].append(loop)
    knot = {}
    knot["a"] = knot["b"] = {"c": knot}
    for value in (loop, knot):
        refused(value, celltype)
        if celltype == "mixed":
            refused([b"x", value], celltype, "itself")
    with pytest.raises(CelltypeError):
        pack_deep(loop, "deepcell")


@pytest.mark.parametrize("leaf", [1, b"x"])
def test_a_value_may_be_nested_254_levels_deep(leaf):
    nested = leaf
    for _ in range(254):
        nested = [nested]
    result = there_and_back(nested)
    for _ in range(254):
        result = result[0]
    assert result == leaf
    refused([nested], "mixed", "254 levels")


def test_a_changed_list_gets_a_new_buffer():
    value = [1]
    assert serialize(value, "mixed") == b"[\n  1\n]\n"
    value.append(2)
    assert serialize(value, "mixed") == b"[\n  1,\n  2\n]\n"


# --- the small celltypes -----------------------------------------------------------------------

@pytest.mark.parametrize("celltype, value, back", [
    ("str", "é\n", "é\n"), ("str", True, "True"), ("str", 2.5, "2.5"), ("int", "12", 12), ("int", b"12", 12),
    ("float", 5, 5.0), ("float", 1e-05, 1e-05), ("bool", 0, False), ("bool", "False", True),
    ("text", "a\n\n", "a"), ("text", "\n\ra", "\n\ra"), ("text", None, "None"), ("text", bytearray(b"a\n"), "a"),
    ("python", "a = 1", "a = 1"), ("ipython", "%timeit x", "%timeit x"), ("yaml", "a: [1]\n", "a: [1]"),
    ("bytes", b"a\n", b"a\n"), ("bytes", "a\n", b"a"), ("bytes", bytearray(b"\0"), b"\0"), ("bytes", memoryview(b"ab"), b"ab"),
    ("checksum", "AB" * 32, "ab" * 32), ("checksum", {"a": ["ab" * 32]}, {"a": ["ab" * 32]}),
    ("deepcell", {"a": ["ab" * 32]}, {"a": ["ab" * 32]}), ("folder", {}, {}), ("module", {"code": "x"}, {"code": "x"})])
def test_a_value_reads_back(celltype, value, back):
    result = there_and_back(value, celltype)
    assert result == back and isinstance(result, type(back))


@pytest.mark.parametrize("celltype, data, back", [
    ("int", b"true", True), ("int", b"5.9", 5), ("int", b'"7"', 7), ("float", b"5", 5.0), ("bool", b"0", False),
    ("str", b"null", "None"), ("checksum", b"AB" * 32 + b"\n", "ab" * 32)])
def test_a_buffer_of_another_type_is_converted(celltype, data, back):
    result = deserialize(data, celltype)
    assert result == back and type(result) in (type(back), Checksum)


@pytest.mark.parametrize("celltype, data", [
    ("int", b'"x"'), ("int", b"[1]"), ("float", b"null"), ("str", b"x"), ("text", b"\xff"), ("python", b"a = = 1"),
    ("python", b"a\0b"), ("binary", b"\xff"), ("binary", b"5\n"), ("binary", b'"a"'),
    ("binary", b"\x93NUMPY"), ("mixed", b"\xff"), ("checksum", b'"ab"'), ("deepcell", b'{"a": 5}'),
    ("folder", b'"%s"' % (b"ab" * 32)), ("mixed", b"1" * 5000), ("python", b"(" * 5000)])
def test_a_buffer_that_does_not_hold_its_celltype_is_refused(celltype, data):
    if data[:1] == b"1" and not hasattr(sys, "get_int_max_str_digits"):
        pytest.skip("this Python reads integers of any length")
    with pytest.raises(CelltypeError) as caught:
        deserialize(data, celltype)
    assert repr(celltype) in str(caught.value) and Checksum.of(data) in str(caught.value)


@pytest.mark.parametrize("celltype, value", [("int", "x"), ("int", None), ("int", math.nan), ("float", []), ("int", b"\xff"),
                                             ("text", b"\xff"), ("text", "\ud800"), ("bytes", "\ud800"), ("checksum", "ab"),
                                             ("str", "\ud800"), ("checksum", None)])
def test_a_value_that_a_celltype_cannot_hold_is_refused(celltype, value):
    refused(value, celltype)


@pytest.mark.parametrize("celltype, near", [("flaot", "float"), ("Bytes", "bytes"), ("deepfoldr", "deepfolder"), ("txt", "text"),
                                            ("cson", ""), (None, ""), (int, "int"), (["plain"], "plain")], ids=repr)
def test_an_unknown_celltype_is_refused_with_the_nearest_one(celltype, near):
    for call in (serialize, deserialize, pack_deep):
        with pytest.raises(CelltypeError) as caught:
            call(b"1", celltype)
        assert ("did you mean %r" % near if near else "the celltypes are binary, bool,") in str(caught.value)


def test_bytes_are_read_as_a_buffer():
    buffer = deserialize(b"abc", "bytes")
    assert type(buffer) is Buffer and buffer.checksum == Checksum.of(b"abc") and buffer.get_value("text") == "abc"
    assert deserialize(bytearray(b"5"), "int") == deserialize(memoryview(b"5"), "int") == 5


# --- deep celltypes ----------------------------------------------------------------------------

@pytest.mark.parametrize("name, value", [("deepcell-result", {"k": 5, "l": [1, {"z": "v"}]}),
                                         ("folder-result", {"f": b"abc", "d/g": b"xx"})])
def test_a_deep_result_has_the_index_of_seamless(name, value):
    vector = next(v for v in VECTORS["functions"] if v["id"] == name)
    celltype = vector["celltypes"]["result"]
    index, leaves = pack_deep(value, celltype)
    assert index.hex() == vector["result_buffer_hex"]
    assert Checksum.of(index) == vector["result_checksum"]
    assert all(Checksum.of(data) == checksum for checksum, data in leaves.items())
    assert set(deep_checksums(index)) == set(leaves)
    assert unpack_deep(index, celltype, leaves.get) == value


def test_a_leaf_that_is_a_checksum_stays_one():
    known = Checksum.of(b"1\n")
    for leaf in (known, str(known).upper()):
        index, leaves = pack_deep({"a": leaf, "b": "x" * 64, "c": [], "d": 1}, "deepcell")
        assert json.loads(index)["a"] == known and known in leaves        # by "d", whose buffer is the same
        assert json.loads(index)["c"] == []
        assert unpack_deep(index, "deepcell", leaves.get) == {"a": 1, "b": "x" * 64, "c": [], "d": 1}


def test_the_leaves_of_a_deepcell_are_checksums_to_whoever_reads_the_index():
    index, leaves = pack_deep([1, [2]], "deepcell")
    value = deserialize(index, "deepcell")
    assert type(value[1][0]) is Checksum and leaves[value[1][0]] == b"2\n"


def test_a_missing_leaf_is_a_cache_miss_that_names_it():
    index, leaves = pack_deep({"a/b": b"x"}, "deepfolder")
    with pytest.raises(CacheMissError, match="a/b"):
        unpack_deep(index, "deepfolder", {}.get)


@pytest.mark.parametrize("celltype", ["deepcell", "deepfolder", "folder"])
@pytest.mark.parametrize("value", [5, "abc", {"a": [1]}, [Checksum.of(b"x"), "abc"]])
def test_an_input_that_is_no_index_is_refused_by_name(celltype, value):
    with pytest.raises(CelltypeError, match="^the input 'x' of f: the buffer .* cannot be read as celltype '%s'" % celltype):
        read_value(MemoryBuffers(), plain_dumps(value), celltype, None, "the input 'x' of f")


def test_a_folder_as_an_input_has_the_shape_of_its_index_and_a_missing_file_is_named():
    store = MemoryBuffers()
    index = plain_dumps({"a": [store.put(b"x"), store.put(b"")], "b/c": Checksum.of(b"gone")})
    with pytest.raises(CacheMissError, match=r"^the input 'x' of f: .*\['b/c'\] of a folder"):
        read_value(store, index, "folder", None, "the input 'x' of f")
    store.put(b"gone")
    assert read_value(store, index, "folder", None, "the input 'x' of f") == {"a": [b"x", b""], "b/c": b"gone"}


def test_a_module_has_no_leaves():
    value = {"code": "x = 1", "language": "python", "type": "interpreted"}
    index, leaves = pack_deep(value, "module")
    assert (index, leaves) == (plain_dumps(value), {}) and "module" in DEEP
    assert unpack_deep(index, "module", None) == value


@pytest.mark.parametrize("celltype, value, word", [
    ("folder", [b"x"], "path"), ("deepfolder", b"x", "path"), ("folder", {"d": {"f": b"x"}}, "folder/file"),
    ("deepcell", 5, "dict or a list"), ("deepcell", {"a": {1}}, "['a']"), ("deepcell", {1: 2}, "key"), ("plain", {}, "not deep")])
def test_what_has_no_index_is_refused(celltype, value, word):
    with pytest.raises(CelltypeError) as caught:
        pack_deep(value, celltype)
    assert word in str(caught.value)


# --- arrays ------------------------------------------------------------------------------------

def same(a, b):
    """Equal, with equal types: numpy scalars inside containers come back as Python numbers."""
    if isinstance(a, bytes):
        return isinstance(b, np.ndarray) and b.shape == () and b.tobytes() == (a or b"\0")
    if isinstance(a, (list, tuple)):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (np.ndarray, np.void)):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    return a == b and type(a) is type(b)


def arrays():
    struct = np.dtype([("a", "i1"), ("b", "f8"), ("c", [("x", "u1"), ("y", "S3"), ("z", "i2")], (2,))], align=True)
    plain = np.arange(24, dtype="i4").reshape(2, 3, 4)
    filled = np.frombuffer(bytes(range(2 * struct.itemsize)), struct)
    return {"plain": plain, "fortran": np.asfortranarray(plain), "turned": plain.transpose(1, 0, 2), "strided": plain[:, ::2, ::-1],
            "bool": plain > 3, "half": plain.astype("f2"), "bytes": np.array([[b"a", b"bcd"]]), "empty": np.zeros((2, 0, 3)),
            "one": np.ones((1, 1)), "struct": filled, "struct0": filled[1], "fortran-struct": np.asfortranarray([[filled[0]] * 2] * 2)}


@needs_numpy
def test_an_array_is_the_file_that_numpy_saves():
    for name, array in arrays().items():
        array = np.asarray(array)
        data = serialize(array, "mixed")
        if array.dtype.names is None:
            file = io.BytesIO()
            np.save(file, array, allow_pickle=False)
            assert data == file.getvalue(), name
        assert np.array_equal(np.load(io.BytesIO(data)), array), name


@needs_numpy
def test_npy_headers_of_any_length_are_padded_as_numpy_2_pads_them():
    if int(np.__version__.split(".")[0]) < 2:
        pytest.skip("this numpy pads in another way")
    for length in range(1, 130):
        array = np.zeros((3, 12345), np.dtype([("f" * length, "i2")], align=True))[:, :2]
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        assert serialize(array, "mixed") == file.getvalue()


@needs_numpy
def test_arrays_read_back_alone_and_inside_containers():
    cases = arrays()
    for name, array in cases.items():
        back = there_and_back(array)
        assert same(array, back), name
        assert serialize(back, "mixed") == serialize(array, "mixed"), name
        assert back.flags.writeable == bool(back.dtype.names) or isinstance(back, np.generic)
    value = {"z": cases, "b": [1, None, 2.5, "é", True, b"xyz", b"", [], {}, {"q": {"r": [cases["plain"]] * 3}}], "a": (1, b"x")}
    assert same(value, there_and_back(value))
    assert there_and_back({10: np.arange(2), 9: np.arange(3)})["9"].shape == (3,)
    assert isinstance(there_and_back(np.array(2.5, "f4")), np.float32)


@needs_numpy
def test_arrays_in_a_container_may_be_written_to_and_go_back_as_they_came():
    """As in Seamless, where each is a copy made by ``numpy.empty``: the strides of one without elements are hashed."""
    value = {"a": np.arange(3), "0-d": np.array(3.5), "empty": np.zeros((0, 3)), "f": np.zeros((2, 3), order="F")}
    back = there_and_back(value)
    back["a"][0], back["0-d"][()] = 7, 1.5
    assert back["0-d"].shape == () and back["empty"].strides == np.empty((0, 3)).strides
    assert serialize(there_and_back(back), "mixed") == serialize(back, "mixed")


def test_a_checksum_inside_a_printed_value_looks_like_its_digits():
    assert repr({"k": Checksum("ab" * 32)}) == repr({"k": "ab" * 32})


@needs_numpy
def test_numpy_numbers_are_numbers_in_mixed():
    value = {"i": np.uint8(3), "f": [np.float16(0.5), np.float64(1e-5), np.longdouble(2)]}
    assert serialize(value, "mixed") == serialize({"i": 3, "f": [0.5, 1e-5, 2.0]}, "mixed")
    for odd in (np.bool_(True), np.complex64(1), np.datetime64("2020-01-01"), np.timedelta64(1)):
        refused(odd, "mixed", "numpy.")
    for number in (np.int64(1), np.float64(1.0), np.arange(3)):
        refused(number, "plain", "mixed")


@needs_numpy
def test_the_padding_of_structs_is_zero():
    dtype = np.dtype([("a", "i1"), ("b", [("c", "i1"), ("d", "i4")])], align=True)
    garbage = np.frombuffer(b"\xff" * dtype.itemsize, dtype)
    for value in (garbage, garbage[0], [garbage]):
        assert serialize(value, "mixed").endswith(b"\xff\0\0\0\xff\0\0\0\xff\xff\xff\xff")


@needs_numpy
def test_an_array_of_text_is_refused_because_seamless_loses_data():
    for value in (np.array(["ab", "cd"]), np.array("ab"), [np.array(["ab"])]):
        refused(value, "mixed", "list of str")
    for value in ("ab", ["ab", "cd"]):
        refused(value, "binary", "list of str")


@needs_numpy
@pytest.mark.parametrize("array, word", [
    ("np.array([1j])", "imaginary"), ("np.array([{}])", "numeric"), ("np.array(['2020'], 'M8[D]')", "integers"),
    ("np.zeros(2, '>i4')", "newbyteorder"), ("np.zeros(2, np.longdouble)", "64 bits"), ("np.ma.array([1], mask=[1])", "mask"),
    ("np.zeros(2, [('a', 'i4')])", "align=True"), ("np.zeros(1, np.dtype([('\\u2603', 'i4')], align=True))", "Latin-1"),
    ("np.void(b'abc')", "aligned structs")])
def test_an_array_that_others_could_not_read_is_refused_with_a_cure(array, word):
    value = eval(array, {"np": np})
    refused(value, "mixed", word)
    if "Latin-1" not in word:
        refused({"x": [value]}, "mixed", word, "['x'][0]")


@needs_numpy
def test_binary_takes_what_numpy_makes_an_array_of():
    assert np.array_equal(there_and_back([[1, 2], [3, 4]], "binary"), [[1, 2], [3, 4]])
    assert there_and_back(3, "binary") == 3
    for value in ([[1], [2, 3]], {"a": 1}, None, 2**70, ["a"]):
        refused(value, "binary")
    refused(np.array([{}]), "bytes", "numeric")


@needs_numpy
def test_npy_files_from_elsewhere_are_read_but_never_unpickled():
    def saved(array, version=None):
        file = io.BytesIO()
        np.lib.format.write_array(file, array, version)
        return file.getvalue()
    packed = np.array([(1, 2.5)], [("a", "i1"), ("b", "f8")])
    for version in ((1, 0), (2, 0), (3, 0)):
        back = deserialize(saved(packed, version), "mixed")
        assert back.dtype.isalignedstruct and back["b"][0] == 2.5
        assert there_and_back(back)["a"][0] == 1
    with pytest.raises(CelltypeError, match="pickled"):
        deserialize(saved(np.array([{}])), "mixed")


@needs_numpy
@pytest.mark.parametrize("celltype", ["mixed", "binary"])
def test_text_read_as_mixed_or_binary_is_an_array_of_bytes(celltype):
    value = deserialize(b"some text\n", celltype)
    assert value.dtype == "S10" and value.shape == () and value.item() == b"some text\n"
    assert deserialize(b"", celltype).dtype == "S1"


@needs_numpy
@pytest.mark.filterwarnings("ignore")       # Python's own, about backslashes in damaged headers
def test_a_damaged_array_is_refused_or_read_but_never_a_crash():
    rng = random.Random(4)
    good = [serialize(value, "mixed") for value in (np.arange(6).reshape(2, 3), b"abc", arrays()["struct"],
                                                    {"a": [np.arange(3), b"xyz"], "b": {"c": arrays()["struct0"]}})]
    outcomes = set()
    for _ in range(3000):
        data = bytearray(rng.choice(good))
        if rng.random() < 0.5:
            del data[rng.randrange(len(data)):]
        else:
            data[rng.randrange(min(len(data), 700))] = rng.randrange(256)
        try:
            deserialize(bytes(data), "mixed")
            outcomes.add("read")
        except CelltypeError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
    for data in good:
        for cut in (data[:-1], data + b"x"):
            with pytest.raises(CelltypeError, match="damaged"):
                deserialize(cut, "mixed")


# --- without numpy -----------------------------------------------------------------------------

@pytest.fixture
def no_numpy(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", None)       # an import of it now fails


def test_without_numpy_an_array_is_refused_with_what_to_install(no_numpy):
    for vector in VECTORS["values"]:
        if vector["id"] in ("A040", "A048", "A080"):
            with pytest.raises(CelltypeError, match="pip install numpy"):
                deserialize(bytes.fromhex(vector["buffer_hex"]), "mixed")
    refused(3, "binary", "pip install numpy")
    refused([{1}], "mixed", "set")


def test_without_numpy_bytes_are_written_the_same_and_read_as_bytes(no_numpy):
    for vector in VECTORS["values"]:
        if vector["id"] in ("A036", "A037"):
            assert serialize(eval(vector["value"]), "mixed").hex() == vector["buffer_hex"]
    value = {"b": [b"xyz", 1, b""], "a": {"c": b"\xff"}, "d": [b"x", b"y"]}
    assert there_and_back(value) == value
    assert there_and_back(b"raw\0") == b"raw\0"
    assert deserialize(b"some text\n", "mixed") == deserialize(b"some text\n", "binary") == b"some text\n"


def test_numpy_is_not_imported_for_values_without_arrays():
    code = ("import sys\nfrom seamless_lite.celltypes import serialize, deserialize\n"
            "for value in (1, 'a', [1.5, {'a': None}], b'x', {'a': [b'x']}): serialize(value, 'mixed')\n"
            "deserialize(serialize([1], 'mixed'), 'mixed')\nassert 'numpy' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=str(ROOT), check=True, timeout=60)
