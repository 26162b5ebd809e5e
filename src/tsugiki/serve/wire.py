"""Bodies in and out: a request's JSON read within limits, an answer's written."""
from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from tsugiki.serve import schema
from tsugiki.serve.refusal import Refusal

if TYPE_CHECKING:
    from tsugiki.serve.engine import AdapterInfo

DRAINED = 8         # a body that is too large is read on up to so many times the limit, so that its sender hears why


async def read_body(request: Request, limits: schema.Limits) -> dict:
    """The JSON object that a request carries. Raises Refusal: 408, 413, 415, or 400."""
    kind = request.headers.get("content-type", "")
    if not re.fullmatch(r"application/json\s*(;.*)?", kind.strip(), re.I):        # a form of another site cannot send this
        raise Refusal(415, "body: must be application/json", code="unsupported_media_type")
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size <= limits.body_bytes:
                    parts.append(part)
                if size > DRAINED * limits.body_bytes:
                    break
    except TimeoutError:
        raise Refusal(408, "body: took too long to arrive", code="timeout", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise Refusal(499, "body: the client left before its end") from None         # nobody reads it; it is counted
    if size > limits.body_bytes:
        raise Refusal(413, f"body: is larger than {limits.body_bytes} bytes", code="body_too_large")
    return schema.parse(b"".join(parts))


def reply(body: dict, status: int = 200, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(body, status, headers=headers)


def described(info: AdapterInfo) -> dict:
    """An adapter as the lists show it."""
    return {"method": info.method, "parameters": info.parameters, "bytes": info.bytes, "version": info.version,
            "resident": info.resident, "kind": info.kind, "score": info.score}
