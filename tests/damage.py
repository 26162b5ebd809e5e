"""Ways to damage an adapter's folder, each a seeded function of its bytes: what test_damage.py and the benchmark run on."""
from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tsugiki.formats import FIELDS, _self_hash
from tsugiki.formats.disk import CONFIG, MANIFEST, TENSORS

Files = dict[str, Any]                                # file name -> bytes, or "dir", or "link"
Tensors = dict[str, tuple[str, list[int], bytes]]     # name -> (dtype, shape, bytes)
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def unpack(data: bytes) -> Tensors:
    """A safetensors file, read plainly."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8:8 + size]), data[8 + size:]
    return {n: (t["dtype"], t["shape"], body[slice(*t["data_offsets"])]) for n, t in header.items() if n != "__metadata__"}


def pack(tensors: Tensors) -> bytes:
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def numbers(tensor: tuple[str, list[int], bytes]) -> torch.Tensor:
    return torch.frombuffer(bytearray(tensor[2]), dtype=TYPES[tensor[0]]).reshape(tensor[1])


def stored(tensor: torch.Tensor, dtype: str | None = None) -> tuple[str, list[int], bytes]:
    dtype = dtype or next(k for k, v in TYPES.items() if v == tensor.dtype)
    return dtype, list(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass
class Case:
    """An adapter's folder, and what a damage may draw from."""
    draw: random.Random
    files: Files
    other: Files                                      # the same method's, of other numbers
    stranger: Files                                   # another method's
    base: str = ""                                    # "weights" or "shapes": load it on another base
    about: tuple[str, ...] = ()                       # a refusal must name one of these

    def config(self, change: Callable[[dict], Any]) -> None:
        config = json.loads(self.files[CONFIG])
        change(config)
        self.files[CONFIG] = json.dumps(config).encode()

    def settings(self) -> dict[str, Any]:
        config = json.loads(self.files[CONFIG])
        return config.get("settings", config)

    def set(self, key: str, value: Any) -> None:
        self.config(lambda c: c.get("settings", c).update({key: value}))
        self.about = (key,)

    def tensors(self, change: Callable[[Tensors], Any]) -> None:
        tensors = unpack(self.files[TENSORS])
        change(tensors)
        self.files[TENSORS] = pack(tensors)

    def name(self, where: Callable[[tuple], bool] = lambda t: True) -> str | None:
        names = sorted(n for n, t in unpack(self.files[TENSORS]).items() if where(t))
        found = self.draw.choice(names) if names else None
        self.about = (found or "",)
        return found

    def field(self, where: Callable[[Any], bool]) -> str | None:
        names = sorted(k for k, v in self.settings().items() if where(v) and k not in ("base_model_name_or_path", "inference_mode"))
        return self.draw.choice(names) if names else None


DAMAGES: dict[str, Callable[[Case], Any]] = {}        # each returns False where it does not apply


def damage(change: Callable[[Case], Any]) -> Callable[[Case], Any]:
    DAMAGES[change.__name__.replace("_", " ")] = change
    return change


def each_file(words: str, change: Callable[[Case, str], Any], files: tuple[str, ...] = (CONFIG, TENSORS, MANIFEST)) -> None:
    for file in files:
        DAMAGES[f"{file} {words}"] = lambda case, file=file: change(case, file) if file in case.files else False


def put(case: Case, file: str, value: Any) -> None:
    case.files[file] = value


def _flip(case: Case, file: str) -> None:
    data = bytearray(case.files[file])
    data[case.draw.randrange(len(data))] ^= 1 << case.draw.randrange(8)
    case.files[file] = bytes(data)


def each_text(words: str, change: Callable[[str], str | bytes]) -> None:
    def run(case: Case, file: str) -> None:
        new = change(case.files[file].decode())
        case.files[file] = new if isinstance(new, bytes) else new.encode()
    each_file(words, run, (CONFIG, MANIFEST))


for _n in range(3):
    each_file("truncated" + " again" * _n, lambda c, f: put(c, f, c.files[f][:c.draw.randrange(len(c.files[f]))]))
    each_file("with a flipped bit" + " again" * _n, _flip)
each_file("empty", lambda c, f: put(c, f, b""))
each_file("is a folder", lambda c, f: put(c, f, "dir"))
each_file("is a link to nowhere", lambda c, f: put(c, f, "link"))
each_file("of zeros", lambda c, f: put(c, f, bytes(len(c.files[f]))))
each_file("of another adapter", lambda c, f: put(c, f, c.other[f]))
each_file("of another method", lambda c, f: put(c, f, c.stranger.get(f, b"{}")))
each_file("missing", lambda c, f: None if c.files.pop(f) else False, (CONFIG, TENSORS))
each_text("with a BOM", lambda t: "\ufeff" + t)
each_text("in UTF-16", lambda t: t.encode("utf-16"))
each_text("with NUL", lambda t: t[:20] + "\0" + t[20:])
each_text("with white space", lambda t: t + "\n \n")
each_text("with NaN", lambda t: t.rstrip()[:-1] + ', "nan": NaN}')
each_text("nested deeply", lambda t: t.rstrip()[:-1] + ', "deep": ' + "[" * 400 + "]" * 400 + "}")
each_text("with a key twice", lambda t: t.rstrip()[:-1] + "," + t.strip()[1:-1].strip().split(",")[0] + "}")
each_text("with a line end in a key", lambda t: t.rstrip()[:-1] + ', "a\\nb": 3}')
each_text("with half a surrogate pair", lambda t: t.rstrip()[:-1] + ', "s": "\\ud800"}')
each_text("with a number too long", lambda t: t.rstrip()[:-1] + ', "n": ' + "9" * 5000 + "}")
each_text("is a list", lambda t: f"[{t}]")


# The tensors

def numbers_of(dtype: str, size: int) -> Callable[[Case], Any]:
    def run(c: Case) -> None:
        name = c.name()
        c.tensors(lambda t: t.update({name: (dtype, t[name][1], bytes(size * math.prod(t[name][1])))}))
    return run


for _name, _type, _size in (("whole numbers", "I32", 4), ("bytes", "U8", 1), ("truth values", "BOOL", 1), ("float8", "F8_E4M3", 1),
                            ("complex numbers", "C64", 8), ("no known type", "F13", 2)):
    DAMAGES[f"tensor of {_name}"] = numbers_of(_type, _size)


def reshaped(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Case], Any]:
    def run(c: Case) -> None:
        name = c.name()
        c.tensors(lambda t: t.update({name: stored(change(numbers(t[name])))}))
    return run


def one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        t.reshape(-1)[len(t.reshape(-1)) // 2] = value
        return t
    return change


DAMAGES |= {f"tensor {words}": reshaped(change) for words, change in {
    "transposed": lambda t: t.mT if t.dim() > 1 else t[:, None], "cut": lambda t: t[:-1] if len(t) > 1 else t[..., :-1],
    "padded": lambda t: torch.cat([t, t[:1]]), "with one dimension more": lambda t: t[None], "flat": lambda t: t.reshape(1, -1)[0],
    "of no dimension": lambda t: t.reshape(-1)[0], "without numbers": lambda t: t[:0], "with NaN": one(math.nan),
    "with infinity": one(-math.inf), "with minus zero": one(-0.0), "with another number": one(0.5),
    "in float64": lambda t: t.double(),
    "in float16": lambda t: t.half(), "in bfloat16": lambda t: t.bfloat16()}.items()}


@damage
def tensor_missing(c: Case) -> None:
    name = c.name()
    c.tensors(lambda t: t.pop(name))


@damage
def tensor_renamed(c: Case) -> None:
    name = c.name()
    c.about = (name, name + "x")
    c.tensors(lambda t: t.update({name + "x": t.pop(name)}))


@damage
def tensor_renamed_to_no_name(c: Case) -> None:
    name, new = c.name(), c.draw.choice(["a\nb", "", "x" * 5000, "\u2028"])
    c.about = (name, "is no name of a tensor")
    c.tensors(lambda t: t.update({new: t.pop(name)}))


@damage
def tensor_extra(c: Case) -> None:
    name = c.name()
    c.about = (new := c.draw.choice(["hello", name.replace(".0.", ".7."), "x." + name, "base_model.model.lm_head.weight"]),)
    c.tensors(lambda t: t.update({new: t[name] if new != name else t.pop(name)}))


@damage
def tensors_exchanged(c: Case) -> Any:
    """Two of one shape."""
    t = unpack(c.files[TENSORS])
    pairs = [(a, b) for a in sorted(t) for b in sorted(t) if a < b and t[a][1] == t[b][1] and t[a][2] != t[b][2]]
    if not pairs:
        return False
    a, b = c.about = c.draw.choice(pairs)
    return c.tensors(lambda t: t.update({a: t[b], b: t[a]}))


@damage
def tensors_of_one_site_exchanged(c: Case) -> Any:
    """lora_A <-> lora_B, prompt <-> gate, ..."""
    t = unpack(c.files[TENSORS])
    pairs = [(a, b) for a in sorted(t) for b in sorted(t) if a < b and t[a][1] != t[b][1]]
    if not pairs:
        return False
    a, b = c.about = min(pairs, key=lambda p: (-next((i for i, (x, y) in enumerate(zip(*p, strict=False)) if x != y), 0), p))
    return c.tensors(lambda t: t.update({a: t[b], b: t[a]}))


@damage
def tensor_offsets_overlap(c: Case) -> Any:
    data = c.files[TENSORS]
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    name = sorted(header.keys() - {"__metadata__"})[-1]
    header[name]["data_offsets"][1] += c.draw.choice([-4, 4, 1 << 40])
    text = json.dumps(header).encode()
    put(c, TENSORS, struct.pack("<Q", len(text)) + text + data[8 + size:])


@damage
def tensors_with_a_huge_header_length(c: Case) -> None:
    put(c, TENSORS, struct.pack("<Q", c.draw.choice([1 << 63, (1 << 64) - 1, 1 << 40, 100_000_001])) + c.files[TENSORS][8:])


@damage
def tensors_with_bytes_behind(c: Case) -> None:
    put(c, TENSORS, c.files[TENSORS] + b"\0\0\0\0")


# The config

def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def on_field(where: Callable[[Any], bool], new: Callable[[Case, Any], Any]) -> Callable[[Case], Any]:
    def run(c: Case) -> Any:
        if (key := c.field(where)) is None:
            return False
        return c.set(key, new(c, c.settings()[key]))
    return run


DAMAGES |= {f"config: {words}": on_field(where, new) for words, where, new in (
    ("a number one more", is_number, lambda c, v: v + 1), ("a number one less", is_number, lambda c, v: v - 1),
    ("a number doubled", is_number, lambda c, v: v * 2), ("a number negative", is_number, lambda c, v: -v - 1),
    ("a number huge", is_number, lambda c, v: c.draw.choice([10 ** 9, 10 ** 30, 10 ** 400, 1e300, 2 ** 63])),
    ("a number as text", is_number, lambda c, v: str(v)), ("a number halved", is_number, lambda c, v: v / 2),
    ("a switch flipped", lambda v: type(v) is bool, lambda c, v: not v), ("null", lambda v: v is not None, lambda c, v: None),
    ("a switch as text", lambda v: type(v) is bool, lambda c, v: str(v).lower()),
    ("another kind", lambda v: True, lambda c, v: c.draw.choice([[1], {"a": 1}, {"a": {"b": [[]]}}, "x", "", [], {}, -3, 0.5, True,
                                                                 False, "x" * 100_000, list(range(9999))])),
    ("something where nothing was", lambda v: v in (None, False, [], {}),
     lambda c, v: c.draw.choice([True, 1, ["q_proj"], {"q": 2}])))}


@damage
def config_field_missing(c: Case) -> Any:
    key = c.field(lambda v: True)
    c.about = (key,)
    c.config(lambda d: d.get("settings", d).pop(key))


def sets(words: str, key: str, *values: Any, only: bool = True) -> None:
    """Set a field; `only`: where the config has it."""
    def run(c: Case) -> Any:
        return c.set(key, c.draw.choice(values)) if not only or key in c.settings() else False
    DAMAGES[f"config: {words}"] = run


BOMBS = ["(.+)+_never", "((.*)*)*x", "(a|a)*" * 20 + "x", ".*" * 40 + "x", "(.?)" * 40 + "x{40}", "(.*)\\1x", "(" * 500, "[",
         "(m|m)(o|o)(d|d)(e|e)(l|l)" + "(.|.)" * 60 + "x"]
for _key in ("target_modules", "targets"):
    sets(f"{_key}: another", _key, ["embed_tokens"], ["lm_head"], ["gate_proj"], "gate_proj", ["self_attn"], "model", ["layers.0"])
    sets(f"{_key}: nothing", _key, [], "", None, ["nothing"], [""], [1], [None], [["q_proj"]])
    sets(f"{_key}: a bomb", _key, *BOMBS)
    sets(f"{_key}: every linear", _key, "all-linear", "linear", ".*", ".*_proj", ".*layers.*(q_proj|down_proj)")
sets("rank pattern: a bomb", "rank_pattern", *({b: 4} for b in BOMBS), only=False)
sets("alpha pattern: a bomb", "alpha_pattern", *({b: 4.0} for b in BOMBS), only=False)
sets("rank pattern", "rank_pattern", {"q_proj": 2}, {"q_proj": "2"}, ["q_proj"], {"q_proj": {"q": 2}}, only=False)
sets("layers", "layers_to_transform", [0], 0, [1], "0", only=False)
sets("rslora", "use_rslora", True, only=False)
sets("dora", "use_dora", True, only=False)
sets("fan in", "fan_in_fan_out", True, 1, "no", only=False)
sets("unknown field", "use_magic", True, 1, "yes", {"a": 1}, only=False)
sets("another method", "peft_type", "LORA", "IA3", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "LOHA", "VBLORA",
     "NOPE", 3, None, ["LORA"])
sets("trained modules beside it", "modules_to_save", ["lm_head"], [], "lm_head", False, only=False)


@damage
def config_targets_twice(c: Case) -> Any:
    key = next((k for k in ("target_modules", "targets") if isinstance(c.settings().get(k), list)), None)
    return c.set(key, c.settings()[key] * 2) if key else False


@damage
def config_one_target_less(c: Case) -> Any:
    key = next((k for k in ("target_modules", "targets") if isinstance(c.settings().get(k), list)), None)
    if not key or len(c.settings()[key]) < 2:
        return False
    c.set(key, c.settings()[key][1:])
    c.about = (key,)
    return None


# The manifest, changed by someone who can seal it again; the base

def resealed(change: Callable[[Case, dict], Any]) -> Callable[[Case], Any]:
    def run(c: Case) -> Any:
        if MANIFEST not in c.files:
            return False
        manifest = json.loads(c.files[MANIFEST])
        c.about = (change(c, manifest) or MANIFEST,)
        c.files[MANIFEST] = json.dumps(manifest | {"self": _self_hash(manifest)}).encode()
        return None
    return run


def _kind(c: Case, m: dict) -> str:
    m[key := c.draw.choice(sorted(FIELDS.keys() - {"self"}))] = c.draw.choice([3.5, "x", [["y"]], {"z": [1]}])
    return key if key != "base" else MANIFEST


def _less(c: Case, m: dict) -> str:
    m.pop(key := c.draw.choice(sorted(FIELDS.keys() - {"self"})))
    return key


def _setting(c: Case, m: dict) -> None:
    key = c.draw.choice(sorted(k for k, v in m["settings"].items() if is_number(v) and v) or [""])
    m["settings"][key] = m["settings"].get(key, 1) * 2


DAMAGES |= {"manifest resealed with another kind": resealed(_kind), "manifest resealed without a field": resealed(_less),
            "manifest resealed with another setting": resealed(_setting),
            "manifest resealed without tensors": resealed(lambda c, m: m.update(tensors={}))}


@damage
def another_base(c: Case) -> None:
    c.base = "weights"


@damage
def a_base_of_other_shapes(c: Case) -> None:
    c.base = "shapes"


def write(files: Files, folder: Path) -> None:
    folder.mkdir()
    for name, data in files.items():
        path = folder / name
        if data == "dir":
            path.mkdir()
        elif data == "link":
            path.symlink_to(folder / "nowhere")
        else:
            path.write_bytes(data)


def read(folder: Path) -> Files:
    return {p.name: p.read_bytes() for p in folder.iterdir()}
