"""Keys: who may call, compared in constant time; and whether a browser was led here under another name."""
from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tsugiki.errors import UserError
from tsugiki.serve.refusal import Refusal

SHORTEST = 16                       # characters of a key; what can be guessed is no key
MAKE = "python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def read_keys(file: str | None, variable: str, flag: str) -> tuple[bytes, ...]:
    """Keys from a file, one a line, and from an environment variable. Raises UserError that never shows one."""
    found: list[bytes] = []
    places = [(f"{variable}", os.environ.get(variable, ""))]
    if file is not None:
        try:
            places.append((f"{flag} {file}", Path(file).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{flag} {file}: cannot be read: {getattr(e, 'strerror', None) or 'is not UTF-8'}") from None
    for where, text in places:
        lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        if not lines and where != variable:
            raise UserError(f"{where}: holds no key; {MAKE}")
        for n, line in lines:
            if not re.fullmatch(r"[!-~]+", line):
                raise UserError(f"{where}: line {n}: a key is of printable ASCII without spaces")
            if len(line) < SHORTEST:
                raise UserError(f"{where}: line {n}: a key has at least {SHORTEST} characters; {MAKE}")
            found.append(line.encode())
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Keys:
    """The keys of users and of administrators. No key of one opens the other. Raises UserError for a key that is both."""

    user: tuple[bytes, ...] = ()
    admin: tuple[bytes, ...] = ()

    def __post_init__(self):
        if set(self.user) & set(self.admin):
            raise UserError("keys: the same key is the users' and the administrators'; they must differ")


def matches(given: bytes, keys: Iterable[bytes]) -> bool:
    """Whether `given` is one of the keys, in a time that depends on neither."""
    digest = hashlib.sha256(given).digest()
    return any([hmac.compare_digest(digest, hashlib.sha256(key).digest()) for key in keys])      # a list: no early end


def bearer(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The key of the one Authorization header; None where there is none, or not one."""
    values = [value for name, value in headers if name.lower() == b"authorization"]
    scheme, _, key = values[0].strip().partition(b" ") if len(values) == 1 else (b"", b"", b"")
    return key.strip() if scheme.lower() == b"bearer" and key.strip() else None


def authorise(path: str, headers: list[tuple[bytes, bytes]], keys: Keys) -> None:
    """Raise Refusal unless the request may go on: /health is open, /admin is for its own keys alone, the rest for users."""
    if path == "/health":
        return
    admin = path == "/admin" or path.startswith("/admin/")
    wanted = keys.admin if admin else keys.user
    if admin and not wanted:
        raise Refusal(403, "there is no admin key, so nothing is administered over HTTP (tsugiki serve --admin-key-file)")
    if not wanted:
        return
    given = bearer(headers)
    if given is None or not matches(given, wanted):
        what = "no key was given" if given is None else "the key is not known"
        whose = "this route has its own, the admin key" if admin else "send it as 'Authorization: Bearer KEY'"
        raise Refusal(401, f"{what}; {whose}", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def known_host(headers: list[tuple[bytes, bytes]], allowed: Iterable[str]) -> None:
    """Raise Refusal unless the Host header names this machine: a page elsewhere may have pointed its own name here."""
    hosts = [value.decode("latin-1") for name, value in headers if name.lower() == b"host"]
    name = re.sub(r":\d*$", "", hosts[0]).strip("[]").lower() if len(hosts) == 1 else ""
    if name not in allowed:
        raise Refusal(403, "the Host header does not name this server; without a key it answers as localhost only")
