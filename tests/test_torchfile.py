"""PyTorch checkpoints are read without unpickling: the right tensors or one line, whatever the file says, and nothing runs."""
import io
import pickle
import random
import sys
import time
import zipfile

import pytest
import torch
from tokenizers_tiny import data_dir
from torch import nn

from tsugiki.errors import UserError
from tsugiki.formats import opcodes
from tsugiki.formats.torchfile import read, state_dict

FORMS = {"zip": {}, "stream": {"_use_new_zipfile_serialization": False}}
form = pytest.mark.parametrize("form", FORMS)


def made() -> dict:
    """What trainers save: views, every common type, parameters, empty tensors, nests, and a module's own state_dict."""
    torch.manual_seed(0)
    whole = torch.randn(6, 4)
    kinds = {str(t): torch.arange(5).to(t) for t in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                                                     torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64)}
    return kinds | {"view": whole[1:5:2, ::2], "turned": whole.T, "parameter": nn.Parameter(torch.ones(2)),
                    "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "n": 3, "big": 2**40,
                    "t": (1, -2.0, None, True, [torch.ones(1)], torch.Size([1, 2])), "type": torch.float16,
                    "layer": nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()}


def same(a, b) -> bool:
    if isinstance(b, torch.Tensor):
        b = b.detach()
        return type(a) is torch.Tensor and a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b) and not a.requires_grad
    if isinstance(b, dict):
        return type(a) is dict and list(a) == list(b) and all(same(a[k], b[k]) for k in b)
    if isinstance(b, (list, tuple)):
        return isinstance(a, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def bits(t: torch.Tensor) -> bytes:
    return torch.empty(t.shape, dtype=t.dtype).copy_(t).flatten().view(torch.uint8).numpy().tobytes() if t.numel() else b""


def refused(path, *words: str) -> str:
    """Reading ends in one line with these words, and soon."""
    start = time.monotonic()
    with pytest.raises(UserError) as e:
        read(path)
    line = str(e.value)
    assert line.startswith(f"{path}: ") and len(line.splitlines()) == 1 and len(line) < 500 and line.isascii()
    assert all(w in line for w in words), line
    assert time.monotonic() - start < 10
    return line


@form
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves_is_read_to_the_same_bits(form, protocol, tmp_path):
    torch.save(made(), tmp_path / "a.pt", pickle_protocol=protocol, **FORMS[form])
    theirs = torch.load(tmp_path / "a.pt", weights_only=False)
    assert same(read(tmp_path / "a.pt"), theirs) and same(theirs["layer"]["0.weight"], made()["layer"]["0.weight"])


def test_the_types_that_only_the_newer_form_holds_are_read(tmp_path):
    types = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
    new = {str(t): torch.arange(1, 4).to(t) for t in types}
    torch.save(new, tmp_path / "a.pt")
    assert same(read(tmp_path / "a.pt"), new)


@form
def test_what_was_tied_stays_tied(form, tmp_path):
    weight = torch.randn(8, 8)
    torch.save({"a": weight, "b": weight, "c": weight[2:]}, tmp_path / "a.pt", **FORMS[form])
    found = read(tmp_path / "a.pt")
    assert found["a"] is found["b"] and found["c"].untyped_storage().data_ptr() == found["a"].untyped_storage().data_ptr()


def test_a_real_checkpoint_is_read_to_the_bits_that_torch_reads():
    path = data_dir("loralib", "roberta_base_lora_mnli.bin")
    found = state_dict(path)
    assert len(found) == 52 and same(found, torch.load(path, weights_only=True, map_location="cpu"))


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model", None])
def test_named_tensors_are_found_where_trainers_put_them(key, tmp_path):
    inner = nn.Linear(2, 3).state_dict()
    torch.save({key: inner, "step": 7} if key else inner, tmp_path / "a.pt")
    assert same(state_dict(tmp_path / "a.pt"), dict(inner))


@pytest.mark.parametrize("value, words", [({"a": 3}, "'a' holds a int"), ({}, "no tensor"), ({0: torch.ones(1)}, "0 holds")])
def test_a_file_without_named_tensors_says_so(value, words, tmp_path):
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(UserError, match=words):
        state_dict(tmp_path / "a.pt")


# Damage

def spoiled(data: bytes, draw: random.Random) -> bytes:
    new = bytearray(data if draw.random() < 0.8 else data[:draw.randrange(len(data))])
    for _ in range(draw.choice([1, 1, 1, 2, 5]) if new else 0):
        new[draw.randrange(len(new))] ^= 1 << draw.randrange(8)
    return bytes(new)


def outcome(path, data: bytes, original: dict, checked: bool) -> str:
    """"refused", or "read" to the right tensors: the original's, or (the older form has no checksum) what torch reads."""
    path.write_bytes(data)
    try:
        found = read(path)
    except UserError as e:
        assert str(e).startswith(f"{path}: ") and len(str(e).splitlines()) == 1
        return "refused"
    if not same(found, original):
        assert not checked, "damage went unnoticed"
        assert same(found, torch.load(path, weights_only=True, map_location="cpu"))
    return "read"


@form
@pytest.mark.parametrize("seed", range(3))
def test_damage_ends_in_one_line_or_in_the_right_tensors(form, seed, tmp_path):
    torch.save(made(), buffer := io.BytesIO(), **FORMS[form])
    data, draw = buffer.getvalue(), random.Random(seed)
    original = torch.load(io.BytesIO(data), weights_only=True)
    seen = [outcome(tmp_path / "a.pt", spoiled(data, draw), original, form == "zip") for _ in range(400)]
    assert seen.count("refused") > 100 and seen.count("read") > 5


@pytest.mark.parametrize("seed", range(2))
def test_opcodes_changed_under_a_whole_checksum_end_in_one_line_or_in_what_torch_reads(seed, tmp_path):
    torch.save(made(), buffer := io.BytesIO())
    parts, draw = zipfile.ZipFile(buffer), random.Random(seed)
    original, seen = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True), []
    for _ in range(300):
        with zipfile.ZipFile(changed := io.BytesIO(), "w") as z:
            for name in parts.namelist():
                z.writestr(name, spoiled(parts.read(name), draw) if name.endswith("data.pkl") else parts.read(name))
        seen.append(outcome(tmp_path / "a.pt", changed.getvalue(), original, False))
    assert seen.count("refused") > 100 and seen.count("read") > 5


def test_damage_to_a_real_checkpoint_ends_in_one_line_or_in_the_right_tensors(tmp_path):
    data, draw = data_dir("loralib", "roberta_base_lora_mnli.bin").read_bytes(), random.Random(9)
    original = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    cases = [spoiled(data[:7300], draw) + data[7300:] if i % 2 else spoiled(data, draw) for i in range(40)]     # opcodes; all
    assert [outcome(tmp_path / "a.pt", case, original, True) for case in cases].count("refused") > 30


@form
def test_every_cut_is_noticed(form, tmp_path):
    torch.save({"a": torch.randn(3), "b": torch.ones(2, 2)}, buffer := io.BytesIO(), **FORMS[form])
    data = buffer.getvalue()
    for end in range(0, len(data), 3 if form == "zip" else 1):
        (tmp_path / "a.pt").write_bytes(data[:end])
        refused(tmp_path / "a.pt")


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x02", b"hello", b"\x80\x02}.", b"\x93NUMPY", bytes(100), b"{}"])
def test_what_is_no_checkpoint_says_so(data, tmp_path):
    (tmp_path / "a.pt").write_bytes(data)
    refused(tmp_path / "a.pt", "not a")


def test_a_missing_file_and_a_folder_say_so(tmp_path):
    refused(tmp_path / "none.pt", "no such file")
    refused(tmp_path, "no such file")


# Hostile files

def text(s: str) -> bytes:
    return b"X" + len(s.encode()).to_bytes(4, "little") + s.encode()


def written(form: str, path, opcodes: bytes, storages: dict[str, bytes] | None = None):
    """A file of one form whose value is built by these opcodes; its storages hold float32."""
    stored = storages or {}
    if form == "zip":
        with zipfile.ZipFile(path, "w") as z:
            for name, data in ({"data.pkl": opcodes, "version": b"3"} | {f"data/{k}": v for k, v in stored.items()}).items():
                z.writestr(f"archive/{name}", data)
    else:
        info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
        start = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, info))
        numbers = b"".join((len(v) // 4).to_bytes(8, "little") + v for v in stored.values())
        path.write_bytes(start + opcodes + pickle.dumps(list(stored), 2) + numbers)
    return path


class Evil:
    def __init__(self, call, *args):
        self.parts = call, args

    def __reduce__(self):
        return self.parts


def test_a_hostile_file_is_hostile(tmp_path):
    """The payloads below do run under pickle: otherwise that they do not run here would say nothing."""
    mark = tmp_path / "ran"
    pickle.loads(CALLS["GLOBAL"](f"touch {mark}")[0])
    assert mark.exists()


CALLS = {                                             # command -> opcodes that run it, what the refusal names
    "GLOBAL": lambda c: (b"\x80\x02cos\nsystem\n" + text(c) + b"\x85R.", "os.system"),
    "STACK_GLOBAL": lambda c: (b"\x80\x04" + text("os") + text("system") + b"\x93" + text(c) + b"\x85R.", "os.system"),
    "posix": lambda c: (pickle.dumps(Evil(__import__("os").system, c), 2), "posix.system"),
    "subprocess": lambda c: (pickle.dumps(Evil(__import__("subprocess").check_call, c.split()), 5), "subprocess.check_call"),
    "eval": lambda c: (pickle.dumps(Evil(eval, f"__import__('os').system({c!r})"), 2), "eval"),
    "getattr": lambda c: (pickle.dumps(Evil(getattr, "", "upper"), 2), "getattr"),
    "nested": lambda c: (pickle.dumps(Evil(torch.storage._load_from_bytes, b"x"), 2), "torch.storage._load_from_bytes"),
    "load": lambda c: (pickle.dumps(Evil(torch.load, "x"), 2), "torch.serialization.load"),
    "INST": lambda c: (b"(" + text(c) + b"ios\nsystem\n.", "INST 'os system'"),
    "OBJ": lambda c: (b"(cos\nsystem\n" + text(c) + b"o.", "os.system"),
    "OBJ-known": lambda c: (b"(ccollections\nOrderedDict\no.", "OBJ"),
    "NEWOBJ": lambda c: (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
    "NEWOBJ_EX": lambda c: (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "NEWOBJ_EX"),
    "BUILD": lambda c: (b"\x80\x02ccollections\nOrderedDict\n)R}" + text("__class__") + b"Nsb.", "sets the state"),
    "BUILD-dict": lambda c: (b"\x80\x02}}" + text("_metadata") + b"Nsb.", "sets the state"),
    "BUILD-class": lambda c: (b"\x80\x02ccollections\nOrderedDict\n}" + text("_metadata") + b"Nsb.", "sets the state"),
    "dotted": lambda c: (b"\x80\x04" + text("collections") + text("OrderedDict.fromkeys") + b"\x93.", "OrderedDict.fromkeys"),
    "no-text": lambda c: (b"\x80\x04" + text("os") + b"K\x01\x93.", "no text"),
    "arguments": lambda c: (b"\x80\x02ccollections\nOrderedDict\n](" + text(c) + b"e\x85R.", "collections.OrderedDict"),
    "call-a-dict": lambda c: (b"\x80\x02})R.", "calls"),
    "EXT1": lambda c: (b"\x80\x02\x82\x05.", "EXT1"), "EXT2": lambda c: (b"\x80\x02\x83\x05\x00.", "EXT2"),
    "EXT4": lambda c: (b"\x80\x02\x84\x05\x00\x00\x00.", "EXT4"),
    "PERSID": lambda c: (b"Pos.system\n.", "PERSID"), "BINPERSID": lambda c: (text(c) + b"Q.", "not a storage"),
    "buffers": lambda c: (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "newline": lambda c: (b"\x80\x04" + text("o\ns") + text("\x1b[31m") + b"\x93.", "\\n"),
    "surrogate": lambda c: (b"\x80\x04X\x03\x00\x00\x00\xed\xa0\x80" + text("x") + b"\x93.", "ud800"),
}


@form
@pytest.mark.parametrize("name", CALLS)
def test_a_hostile_file_is_refused_and_runs_nothing(form, name, tmp_path):
    mark = tmp_path / "ran"
    code, words = CALLS[name](f"touch {mark}")
    assert "nothing was run" in refused(written(form, tmp_path / "a.pt", code), words)
    (tmp_path / "b.pt").write_bytes(code)          # a bare pickle
    refused(tmp_path / "b.pt", words)
    assert not mark.exists()


def test_a_name_is_not_imported(tmp_path):
    assert "this" not in sys.modules
    refused(written("zip", tmp_path / "a.pt", b"\x80\x02cthis\ns\n."), "asks for this.s: refused")
    assert "this" not in sys.modules


def shared_lists(depth: int) -> bytes:
    """l0 = []; each next list holds the one before twice: 2 ** depth values written out, in a few bytes each."""
    lists = b"".join(b"](h%bh%beq%b" % (bytes([i]), bytes([i]), bytes([i + 1])) for i in range(depth))
    return b"\x80\x02}" + text("a") + b"(]q\x00" + lists + b"ts."


BOMBS = {
    "shared": (shared_lists(40), ""),
    "shared, shallow": (shared_lists(25), "values"),
    "in itself": (b"\x80\x02}q\x00" + text("a") + b"h\x00s.", "in itself"),
    "tuple in itself": (b"\x80\x02}" + text("a") + b"]q\x01(h\x01\x85es.", "in itself"),
    "deep": (b"\x80\x02}" + text("a") + b"]" * 100_000 + b"a" * 99_999 + b"s.", "nested deeper"),
    "deep tuples": (b"\x80\x02}" + text("a") + b")" + b"\x85" * 100_000 + b"s.", "nested deeper"),
    "tuple as key": (b"\x80\x02})" + b"q\x00h\x00\x86" * 200 + b"Ns.", "key"),
    "marks": (b"\x80\x02" + b"(" * 100_000 + b".", "one value"),
    "LONG4": (b"\x80\x02\x8b\x00\x00\x10\x00" + b"\x01" * (1 << 20) + b".", "LONG4"),
    "LONG4 beyond": (b"\x80\x02\x8b\xff\xff\xff\x7f\x01.", ""),
    "LONG4 negative": (b"\x80\x02\x8b\xff\xff\xff\xff\x01.", ""),
    "INT": (b"I" + b"9" * 100_000 + b"\n.", ""),
    "BINBYTES8": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fx.", ""),
    "BINUNICODE8": (b"\x80\x04\x8d" + b"\xff" * 8 + b"x.", ""),
    "BYTEARRAY8": (b"\x80\x05\x96" + b"\xff" * 7 + b"\x0fx.", ""),
    "memo unknown": (b"\x80\x02h\x05.", "has not made"),
    "memo huge": (b"\x80\x02]r\xff\xff\xff\xff.", "a list, not a dict"),
    "empty stack": (b"\x80\x02\x85.", "lacks its values"), "below the mark": (b"\x80\x02N(\x85.", "lacks its values"),
    "no mark": (b"\x80\x02Nt.", "lacks its mark"), "append to nothing": (b"\x80\x02NNa.", "appends to a NoneType"),
    "odd items": (b"\x80\x02}(Nu.", "sets items"), "twice": (b"\x80\x02}(" + (text("a") + b"N") * 2 + b"u.", "twice"),
    "two values": (b"\x80\x02NN.", "one value"), "no STOP": (b"\x80\x02N", ""),
}


@form
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_soon(form, name, tmp_path):
    code, words = BOMBS[name]
    refused(written(form, tmp_path / "a.pt", code), words)


def test_too_many_steps_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(opcodes, "MAX_STEPS", 1000)
    refused(written("zip", tmp_path / "a.pt", b"\x80\x02" + b"N" * 1001 + b"."), "1000 steps")


def test_a_compressed_archive_is_refused_before_it_grows(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data.pkl", b"\x80\x02" + b"N" * (16 << 20) + b".")
    refused(tmp_path / "a.pt")


@pytest.mark.parametrize("more, words", [({"archive/constants.pkl": b"x"}, "TorchScript"), ({"other/data.pkl": b"x"}, "data.pkl"),
                                         ({"archive/byteorder": b"big"}, "big-endian")])
def test_other_archives_are_told_apart(more, words, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as z:
        for name, data in {"archive/data.pkl": b"\x80\x02}."}.items() | more.items():
            z.writestr(name, data)
    refused(tmp_path / "a.pt", words)


# Tensors that are not what they say

def number(n: int) -> bytes:
    data = n.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def sizes(*ns: int) -> bytes:
    return b"(" + b"".join(map(number, ns)) + b"t"


def storage(kind: str = "Float", key: str = "0", count: int = 6) -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"


A = b"\x80\x02}" + text("a")                          # a dict whose "a" is ...
V2, V3 = (b"ctorch._utils\n_rebuild_tensor_v%b\n" % v for v in (b"2", b"3"))


def tensor(offset=0, size=None, stride=None, stored=None, hooks=b"}", grad=b"\x89", end=b"") -> bytes:
    where = (stored or storage()) + number(offset) + (size or sizes(2, 3)) + (stride or sizes(3, 1))
    return A + V2 + b"(" + where + grad + hooks + end + b"tRs."


def test_an_odd_stride_that_says_nothing_is_made_ordinary(tmp_path):
    path = written("zip", tmp_path / "a.pt", tensor(size=sizes(1, 1), stride=sizes(33, 5)), {"0": bytes(24)})
    assert read(path)["a"].stride() == (1, 1)


LIES = {
    "beyond": tensor(size=sizes(3, 3)), "offset": tensor(offset=1), "stride": tensor(stride=sizes(4, 1)),
    "negative size": tensor(size=sizes(-2, 3)),
    "negative stride": tensor(stride=sizes(-3, 1)),
    "negative offset": tensor(offset=-1),
    "repeats": tensor(size=sizes(1 << 30, 1 << 9), stride=sizes(0, 0)),
    "product wraps": tensor(size=sizes(1 << 32, 1 << 32), stride=sizes(0, 0)),
    "huge stride": tensor(stride=sizes(1 << 63, 1)), "huge empty": tensor(size=sizes(0, 1 << 39, 1 << 39), stride=sizes(1, 1, 1)),
    "ranks": tensor(size=sizes(6)), "size no tuple": tensor(size=number(6)), "size of texts": tensor(size=b"(" + text("2") + b"t"),
    "storage too long": tensor(stored=storage(count=7)), "storage too short": tensor(stored=storage(count=5)),
    "storage huge": tensor(stored=storage(count=1 << 60)), "storage negative": tensor(stored=storage(count=-6)),
    "storage elsewhere": tensor(stored=storage(key="../../0")), "storage of another size": tensor(stored=storage("Double")),
    "no storage": tensor(stored=b"N"), "a dict for a storage": tensor(stored=b"}"), "hooks": tensor(hooks=b"}" + text("h") + b"Ns"),
    "hooks no dict": tensor(hooks=b"N"), "marks": tensor(end=b"}" + text("neg") + b"\x88s"), "grad": tensor(grad=b"N"),
    "too few": A + V2 + b")Rs.", "bare storage": A + storage() + b"s.", "bare class": A + b"ctorch\nFloatStorage\ns.",
    "type no type": A + V3 + b"(" + storage() + number(0) + sizes(2) + sizes(1) + b"\x89}]tRs.",
}


@form
def test_a_tensor_written_by_hand_is_read(form, tmp_path):
    """The lies below differ from this in one place."""
    numbers = torch.arange(6.0)
    path = written(form, tmp_path / "a.pt", tensor(), {"0": numbers.numpy().tobytes()})
    assert same(read(path), {"a": numbers.view(2, 3)})
    if form == "zip":                                 # torch's older form has one more field in a storage's name
        assert same(read(path), torch.load(path, weights_only=True))


@form
@pytest.mark.parametrize("name", LIES)
def test_a_tensor_that_does_not_fit_its_storage_is_refused(form, name, tmp_path):
    refused(written(form, tmp_path / "a.pt", LIES[name], {"0": bytes(24)}))


def test_tensors_that_share_a_storage_too_often_are_refused(tmp_path):
    count = 50_000
    view = V2 + b"(" + storage(count=count) + number(0) + sizes(count) + sizes(1) + b"\x89}tR"
    refused(written("zip", tmp_path / "a.pt", A + b"](" + view * 100 + b"es.", {"0": bytes(4 * count)}), "times its own size")
