"""What there is: GET /models, /user/balance and /health."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter

from qiusuo.server.api.auth import CallerDep, HouseDep
from qiusuo.server.api.errors import ApiError
from qiusuo.server.money import told
from qiusuo.server.registry import ServedModel

router = APIRouter(tags=["listing"])


@router.get("/models")
async def models(house: HouseDep, caller: CallerDep) -> dict[str, Any]:
    """The models that this key may use, in OpenAI's shape."""
    served = house.registry.models.values()
    listed = [_model(model) for model in served if caller.may_use(model.name)]
    return {"object": "list", "data": listed}


@router.get("/models/{name:path}")
async def model(name: str, house: HouseDep, caller: CallerDep) -> dict[str, Any]:
    served = house.registry.models.get(name)
    if served is None or not caller.may_use(name):
        raise ApiError(404, f"Model Not Exist: {name!r}")
    return _model(served)


def _model(model: ServedModel) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "qiusuo"}


@router.get("/user/balance")
async def balance(house: HouseDep, caller: CallerDep) -> dict[str, Any]:
    """Money as decimal strings; what running answers have reserved is not there to be spent."""
    has = await asyncio.to_thread(house.ledger.balance, caller.account)
    return {
        "is_available": has.open or has.total > 0,
        "balance_infos": [
            {
                "currency": house.prices.currency,
                "total_balance": told(has.total),
                "granted_balance": told(has.granted),
                "topped_up_balance": told(has.topped_up),
            }
        ],
    }


@router.get("/health")
async def health(house: HouseDep) -> dict[str, Any]:
    """200 while questions are taken, 503 once the server is shutting down."""
    if house.desk.closing:
        raise ApiError(503, "the server is shutting down")
    loading = [name for name, one in house.registry.loading.items() if one.error is None]
    return {"status": "ok", "models": list(house.registry.models), "loading": loading}
