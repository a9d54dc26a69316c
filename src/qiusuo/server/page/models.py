"""/api/me and /api/models: who asks, and what can be talked to."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from qiusuo.data.errors import DataError
from qiusuo.data.hub_reference import find_model_folder
from qiusuo.runs.durable import RunError
from qiusuo.runs.folder import read_recipe
from qiusuo.runs.rollouts import read_rollouts, rollout_steps
from qiusuo.server.api.auth import AdminDep, CallerDep, HouseDep
from qiusuo.server.api.errors import ApiError
from qiusuo.server.house import House
from qiusuo.server.money import told
from qiusuo.server.page.chats import Body, Name
from qiusuo.server.page.parts import PartsDep
from qiusuo.server.page.runs import Runs, is_plain, sample_prompts
from qiusuo.server.prices import told_per_million
from qiusuo.server.registry import OLD_NAMES, ServedModel, run_of
from qiusuo.version import __version__

MOST_EXAMPLES = 6
LONGEST_EXAMPLE = 200  # characters of a problem on a button
# What a model by this name can do; a small one cannot do what is asked of a large one.
EXAMPLES = {
    "smollm": (
        "What is gravity?",
        "Write a short poem about the sea.",
        "Give me three tips for sleeping well.",
        "Explain in two sentences why the sky is blue.",
    ),
}
ANY_CHAT = (
    "用三句话介绍一下你自己。",
    "Explain in three sentences why the sky is blue.",
    "写一首关于秋天的五言绝句。",
    "What is 17 × 23? Show each step.",
)
ModelName = Annotated[str, Field(pattern=r"^\w[\w.:-]{0,99}$")]
router = APIRouter(prefix="/api", tags=["page: models"])


class ModelToLoad(Body):
    source: Name
    name: ModelName | None = None


@router.get("/me")
def me(caller: CallerDep, house: HouseDep) -> dict[str, Any]:
    """`open`: no key was made, and whoever is at this machine may do everything. `balance` is
    null for an account that needs none."""
    return {
        "name": "local" if caller.key is None else caller.key.name,
        "account": caller.account,
        "admin": caller.admin,
        "open": caller.key is None,
        "currency": house.prices.currency,
        "balance": _balance(house, caller.account),
        "version": __version__,
    }


@router.get("/models")
def list_models(caller: CallerDep, house: HouseDep) -> list[dict[str, Any]]:
    """Those that this caller may use."""
    served = list(house.registry.models.values())
    return [
        _told(house, model, first=place == 0, admin=caller.admin)
        for place, model in enumerate(served)
        if caller.may_use(model.name)
    ]


@router.post("/models/load", status_code=202)
async def load_model(
    body: ModelToLoad, caller: AdminDep, house: HouseDep, parts: PartsDep
) -> dict[str, str]:
    """Begin to load a model that was pulled, or the model of a run, by its name; paths are for
    `qiusuo serve`. How far it is: /api/console/engine."""
    source = await asyncio.to_thread(_source, body.source, parts.runs)
    name = house.registry.announce(source, body.name)
    task = asyncio.create_task(_bring(house, name))
    house_tasks.add(task)
    task.add_done_callback(house_tasks.discard)
    return {"id": name}


@router.delete("/models/{model}", status_code=204)
async def remove_model(model: str, caller: AdminDep, house: HouseDep) -> None:
    """End what it is answering, and free its memory."""
    if model in house.registry.models:
        await house.registry.remove(model)
    elif house.registry.loading.get(model) is None or not house.registry.loading[model].error:
        raise ApiError(404, f"there is no model {model[:80]!r}")
    else:
        del house.registry.loading[model]


house_tasks: set[asyncio.Task[None]] = set()  # an event loop keeps no task alive by itself


async def _bring(house: House, name: str) -> None:
    try:
        await house.registry.bring(name)
    except ApiError:
        return  # the registry has logged it, and keeps the reason


def _source(given: str, runs: Runs) -> str:
    """What to load. Nothing from the web is taken for a path of this machine."""
    if is_plain(given) and (runs.root / given / "recipe.toml").is_file():
        return str(runs.root / given)
    if not given.startswith(("/", ".", "~")) and ".." not in given:
        try:
            folder = find_model_folder(given)
        except DataError as error:
            raise ApiError(400, str(error)) from error
        if folder is not None:
            return str(folder)
    raise ApiError(
        400,
        f"{given[:80]!r} is neither a model that was pulled nor a run here: `qiusuo pull` fetches "
        "one, and `qiusuo serve` takes paths",
    )


def _told(house: House, model: ServedModel, first: bool, admin: bool) -> dict[str, Any]:
    """A path on this machine is for its administrator."""
    price = house.prices.price(model.name)
    aliases = [name for name in OLD_NAMES if first and name not in house.registry.models]
    shown = {kind: told_per_million(getattr(price, kind)) for kind in ("hit", "miss", "output")}
    return {
        "id": model.name,
        "aliases": aliases,
        "source": model.source if admin else Path(model.source).name,
        "thinks": model.thinks,
        "tools": model.tools is not None,
        "context": model.context,
        "parameters": sum(one.numel() for one in model.lm.model.parameters()),
        "price": None if price.version is None else shown | {"currency": house.prices.currency},
        "examples": examples(model),
        "kind": model.kind,
    }


def examples(model: ServedModel) -> list[str]:
    """What to begin with: of a run its own sample prompts, or problems that it has solved; else
    what such a model can answer."""
    run = run_of(model.source)
    with suppress(RunError):  # a recipe or a log that was damaged since
        if run is not None:
            recipe = read_recipe(run)
            if prompts := sample_prompts(recipe) or _solved(run):
                return prompts[:MOST_EXAMPLES]
            if recipe.get("base") is None:  # made from nothing: it knows what it was taught alone
                return []
    if model.kind == "text":
        return []
    for word, known in EXAMPLES.items():
        if word in f"{model.name} {Path(model.source).name}".lower():
            return list(known)
    return list(ANY_CHAT)


def _solved(run: Path) -> list[str]:
    """Problems of the last step that kept answers, short ones, each once."""
    file = run / "rollouts.jsonl"
    bounds = rollout_steps(file)
    if bounds is None:
        return []
    right = read_rollouts(file, bounds[1], bounds[1], right=True).rollouts
    prompts = dict.fromkeys(str(one.get("prompt", "")) for one in right)
    return [prompt for prompt in prompts if 0 < len(prompt) <= LONGEST_EXAMPLE]


def _balance(house: House, account: str) -> str | None:
    balance = house.ledger.balance(account)
    return None if balance.open else told(balance.total)
