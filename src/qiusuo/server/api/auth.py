"""Who is asking: a key in the header, or somebody at this machine while there are no keys.

Without a key made, only loopback is served. A browser is at this machine too, and so is every page
that it shows; so an open server also wants to be called by a loopback name (or else a page could
point a name of its own here) and by no page of another site.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated, cast
from urllib.parse import SplitResult, urlsplit

from fastapi import Depends, Request

from qiusuo.server.accounts import LOCAL
from qiusuo.server.api.errors import ApiError
from qiusuo.server.house import House
from qiusuo.server.question import Caller


def house_of(request: Request) -> House:
    return cast(House, request.app.state.house)


async def house(request: Request) -> House:
    return house_of(request)  # a dependency that is no coroutine would be called in a thread


async def caller(request: Request) -> Caller:
    """ApiError 401 without a key that counts."""
    keys = house_of(request).keys  # a look-up takes less than going to a thread
    secret = _secret(request)
    if secret:
        key = keys.find(secret)
        if key is not None:
            return Caller(key, key.account)
    if keys.any():
        raise ApiError(401, "Authentication Fails: no such API key" if secret else _MISSING)
    check_open(request)
    return Caller(None, LOCAL)


async def admin(caller: Annotated[Caller, Depends(caller)]) -> Caller:
    """ApiError 403 for a key that is no administrator's."""
    if not caller.admin:
        raise ApiError(403, "this needs an administrator's key")
    return caller


HouseDep = Annotated[House, Depends(house)]
CallerDep = Annotated[Caller, Depends(caller)]
AdminDep = Annotated[Caller, Depends(admin)]

_MISSING = "Authentication Fails: give an API key, as in `Authorization: Bearer sk-...`"


def _secret(request: Request) -> str:
    scheme, _, word = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and word.strip():
        return word.strip()
    return request.headers.get("x-api-key", "").strip()


def check_open(request: Request) -> None:
    """ApiError 403 unless a server without keys is asked from this machine, by its own name."""
    if request.client is not None and not is_loopback(request.client.host):
        raise ApiError(403, "no API key was made: this server answers its own machine only")
    host = request.headers.get("host", "")
    if not is_loopback(_parts(f"//{host}").hostname or ""):
        raise ApiError(403, f"no API key was made: ask for localhost, not for {host[:80]}")
    origin = request.headers.get("origin")
    if (
        origin
        and _parts(origin).netloc != host
        and origin not in house_of(request).settings.origins
    ):
        raise ApiError(403, f"pages of {origin[:80]} may not use this server")


def _parts(address: str) -> SplitResult:
    """Empty ones for what is no address at all."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
