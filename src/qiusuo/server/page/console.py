"""/api/console: keys, accounts, prices, usage and the engines, for those who run the server."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from qiusuo.server.accounts import Account
from qiusuo.server.api.auth import AdminDep, CallerDep, HouseDep
from qiusuo.server.api.errors import ApiError
from qiusuo.server.database import now
from qiusuo.server.house import House
from qiusuo.server.keys import MAIN, Key
from qiusuo.server.money import amount, told
from qiusuo.server.page.chats import Body, Name, owner
from qiusuo.server.page.live import HEADERS
from qiusuo.server.page.parts import PartsDep
from qiusuo.server.prices import Listed, Price, per_million, told_per_million
from qiusuo.server.question import Caller
from qiusuo.server.usage import Sums, as_csv
from qiusuo.server.windows import window_from, window_table

Count = Annotated[int, Field(ge=1, lt=2**31)]
Money = Annotated[str, Field(max_length=40)]  # a decimal of the server's currency, as text
Models = Annotated[list[Name], Field(max_length=100)]
Seconds = Annotated[float, Field(ge=0, lt=2**33)]  # since 1970
router = APIRouter(prefix="/api/console", tags=["page: console"])


class ChangedKey(Body):
    """Of what is null there is no limit."""

    name: Name = ""
    models: Models | None = None
    rpm: Count | None = None
    tpm: Count | None = None
    concurrency: Count | None = None
    budget: Money | None = None
    admin: bool = False

    def limits(self) -> dict[str, Any]:
        given = self.given()
        if given.get("budget") is not None:
            given["budget"] = amount(given["budget"])
        if given.get("models") is not None:
            given["models"] = tuple(given["models"])
        return given


class NewKey(ChangedKey):
    name: Name
    account: Name = MAIN


class Movement(Body):
    """Money for an account, paid for or granted; an ``amount`` below zero takes it out again.
    ``token``: the same one again moves nothing. ``open``: whether the account may go below zero."""

    account: Name
    amount: Money = "0"
    granted: bool = False
    note: Name = ""
    token: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    open: bool | None = None


class WindowTable(Body):
    start: Name
    end: Name
    factor: Name = "2"
    timezone: Name = "Asia/Shanghai"
    weekdays: list[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]] = Field(
        default=["mon", "tue", "wed", "thu", "fri"], max_length=7
    )
    excluded: list[date] = Field(default=[], max_length=1000)


class PriceList(Body):
    """Prices of a million tokens; ``from`` is in seconds since 1970, by default now."""

    model: Name
    hit: Money
    miss: Money
    output: Money
    windows: list[WindowTable] = Field(default=[], max_length=24)
    begins: Annotated[Seconds | None, Field(alias="from")] = None


class Prices(Body):
    prices: list[PriceList] = Field(max_length=200)
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] | None = None


# -- keys ---------------------------------------------------------------------------------------


@router.get("/keys")
def list_keys(caller: AdminDep, house: HouseDep) -> list[dict[str, Any]]:
    """All, the oldest first; revoked ones too."""
    return [_key(key) for key in house.keys.list()]


@router.post("/keys", status_code=201)
def make_key(body: NewKey, caller: AdminDep, house: HouseDep, parts: PartsDep) -> dict[str, Any]:
    """A new key with its `secret`, which is never shown again. The first takes over what was said
    here before there were keys."""
    if caller.key is None and not body.admin:
        raise ApiError(
            400, "the first key must be an administrator's: from then on this page wants one"
        )
    limits = body.limits()
    name, account = limits.pop("name"), limits.pop("account", MAIN)
    key, secret = house.keys.make(name, account, **limits)
    if caller.key is None:
        parts.conversations.hand_over(owner(caller), owner(Caller(key, key.account)))
    return _key(key) | {"secret": secret}


@router.patch("/keys/{key}")
def change_key(key: str, body: ChangedKey, caller: AdminDep, house: HouseDep) -> dict[str, Any]:
    """What is named becomes so, from the next request on."""
    limits = body.limits()
    _known(house, key)
    if limits.get("admin") is False:
        _refuse_last_admin(house, key)
    return _key(house.keys.change(key, **limits))


@router.delete("/keys/{key}", status_code=204)
def revoke_key(key: str, caller: AdminDep, house: HouseDep) -> None:
    """For good. What it is asking goes on, and is charged."""
    _known(house, key)
    _refuse_last_admin(house, key)
    house.keys.revoke(key)


def _known(house: House, id: str) -> None:
    if all(key.id != id for key in house.keys.list()):
        raise ApiError(404, f"there is no key {id[:80]!r}")


def _refuse_last_admin(house: House, id: str) -> None:
    admins = [key.id for key in house.keys.list() if key.admin and key.revoked is None]
    if admins == [id]:
        raise ApiError(409, "this is the last administrator's key: make another one first")


def _key(key: Key) -> dict[str, Any]:
    return asdict(key) | {
        "models": None if key.models is None else list(key.models),
        "budget": None if key.budget is None else told(key.budget),
        "spent": told(key.spent),
        "reserved": told(key.reserved),
        "created": key.created.timestamp(),
        "revoked": None if key.revoked is None else key.revoked.timestamp(),
    }


# -- accounts -----------------------------------------------------------------------------------


@router.get("/accounts")
def list_accounts(caller: AdminDep, house: HouseDep) -> list[dict[str, Any]]:
    """By name. An `open` one needs no balance."""
    return [_account(one) for one in house.ledger.accounts()]


@router.post("/accounts")
def move_money(body: Movement, caller: AdminDep, house: HouseDep) -> dict[str, Any]:
    """Top up an account, made if need be; it as it is then, and whether anything was `moved`."""
    nano, moved = amount(body.amount), False
    if body.open is not None:
        house.ledger.open_account(body.account, open=body.open)
    if nano:
        move = house.ledger.top_up if nano > 0 else house.ledger.take_back
        token = body.token or secrets.token_hex(16)
        moved = move(body.account, abs(nano), granted=body.granted, note=body.note, token=token)
    elif body.open is None:
        raise ApiError(400, "give an amount other than 0")
    account = Account(body.account, house.ledger.balance(body.account))
    return _account(account) | {"moved": moved}


def _account(account: Account) -> dict[str, Any]:
    balance = account.balance
    return {
        "name": account.name,
        "open": balance.open,
        "total": told(balance.total),
        "granted": told(balance.granted),
        "topped_up": told(balance.topped_up),
        "reserved": told(balance.reserved),
    }


# -- prices -------------------------------------------------------------------------------------


@router.get("/prices")
def list_prices(caller: CallerDep, house: HouseDep) -> dict[str, Any]:
    """The lists in force, in units for a million tokens; those that `follow` begin later."""
    current, moment = house.prices.current(), now()
    following = [one for one in house.prices.history() if one.holds_from > moment]
    return {
        "currency": house.prices.currency,
        "prices": [_prices(listed) for listed in current],
        "follow": [_prices(listed) for listed in following],
    }


@router.put("/prices")
def set_prices(body: Prices, caller: AdminDep, house: HouseDep) -> dict[str, Any]:
    """Add lists, all or none, each in force from its moment on. Nothing that was is changed: old
    requests keep what they cost. The model "*" is for those without a list of their own."""
    house.prices.add([_listed(entry) for entry in body.prices], body.currency)
    return list_prices(caller, house)


def _listed(entry: PriceList) -> Listed:
    price = Price(*(per_million(text) for text in (entry.hit, entry.miss, entry.output)))
    windows = tuple(window_from(window.model_dump()) for window in entry.windows)
    begins = now() if entry.begins is None else datetime.fromtimestamp(entry.begins, UTC)
    return Listed(entry.model, price, windows, begins)


def _prices(listed: Listed) -> dict[str, Any]:
    price = listed.price
    return {
        "model": listed.model,
        "hit": told_per_million(price.hit),
        "miss": told_per_million(price.miss),
        "output": told_per_million(price.output),
        "windows": [window_table(window) for window in listed.windows],
        "from": listed.holds_from.timestamp(),
    }


# -- usage --------------------------------------------------------------------------------------


@router.get("/usage")
def get_usage(
    caller: CallerDep,
    house: HouseDep,
    by: Literal["day", "model", "key"] = "day",
    first: Annotated[date | None, Query(alias="from")] = None,
    last: Annotated[date | None, Query(alias="to")] = None,
    timezone: Annotated[str | None, Query(max_length=80)] = None,
    format: Literal["json", "csv"] = "json",
) -> Any:
    """Sums by day, model or key, from one day to another, both included; of all for an
    administrator, else of the caller's own key."""
    key = None if caller.admin or caller.key is None else caller.key.id
    sums = house.usage.report(by, first, last, timezone, key=key)
    currency = house.prices.currency
    if format == "csv":
        headers = {"content-disposition": f'attachment; filename="usage-by-{by}.csv"'}
        return Response(
            as_csv(sums, by, currency), headers=headers, media_type="text/csv; charset=utf-8"
        )
    total = house.usage.total(first, last, timezone, key=key)
    rows = [_sums(one) for one in sums]
    return {"by": by, "currency": currency, "rows": rows, "total": _sums(total)}


def _sums(sums: Sums) -> dict[str, Any]:
    return asdict(sums) | {"amount": told(sums.amount)}


# -- engines ------------------------------------------------------------------------------------


@router.get("/engine")
async def get_engines(caller: AdminDep, parts: PartsDep) -> list[dict[str, Any]]:
    """Each model's queue, cache, speed and drafts, and the models on their way."""
    return parts.engines.look()


@router.get("/engine/live", response_class=StreamingResponse)
async def watch_engines(caller: AdminDep, parts: PartsDep) -> StreamingResponse:
    """The same each second, as `engine` events."""
    events = parts.engines.stream()
    return StreamingResponse(events, media_type="text/event-stream", headers=HEADERS)
