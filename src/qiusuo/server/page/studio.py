"""/api/runs and /api/recipes: trainings on this machine, watched, started and stopped."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import Field

from qiusuo.runs.durable import to_json
from qiusuo.server.api.auth import AdminDep, CallerDep, HouseDep
from qiusuo.server.api.errors import ApiError
from qiusuo.server.house import House
from qiusuo.server.page.chats import Body
from qiusuo.server.page.live import HEADERS
from qiusuo.server.page.parts import Parts, PartsDep
from qiusuo.server.page.trainings import Setting
from qiusuo.server.registry import run_of

# A report holds what a model wrote: it may show its pictures and do nothing else.
REPORT_POLICY = (
    "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'; font-src data:"
)
Byte = Annotated[int | None, Query(ge=0, lt=2**53)]
Kind = Annotated[str | None, Query(pattern=r"^[a-z_]{1,40}$")]
Word = Annotated[str, Field(min_length=1, max_length=2000)]
router = APIRouter(prefix="/api", tags=["page: studio"])


class NewRun(Body):
    recipe: Annotated[str, Field(min_length=1, max_length=200)]
    set: dict[str, Setting] = Field(default_factory=dict, max_length=64)
    name: Annotated[str, Field(min_length=1, max_length=80)] | None = None


@router.get("/recipes")
def list_recipes(caller: CallerDep, parts: PartsDep) -> list[dict[str, Any]]:
    """Those of the package and of the recipes folder; `minutes` is null for one by steps."""
    return parts.trainings.recipes()


@router.get("/runs")
def list_runs(caller: CallerDep, house: HouseDep, parts: PartsDep) -> list[dict[str, Any]]:
    """The latest first."""
    served = _served(house)
    return [_with_served(parts, served, run) for run in parts.runs.summaries()]


@router.post("/runs", status_code=202)
async def start_run(
    body: NewRun, caller: AdminDep, house: HouseDep, parts: PartsDep
) -> dict[str, Any]:
    """Start a training as a process of its own. Answers when its run folder is there, or with the
    reason why there will be none."""
    name = await parts.trainings.start(body.recipe, body.set, body.name)
    return await asyncio.to_thread(_summary, house, parts, name)


@router.get("/runs/{run}")
def get_run(run: str, caller: CallerDep, house: HouseDep, parts: PartsDep) -> dict[str, Any]:
    return _with_served(parts, _served(house), parts.runs.details(run))


@router.get("/runs/{run}/records")
def get_records(
    run: str,
    caller: CallerDep,
    parts: PartsDep,
    kind: Kind = None,
    every: Annotated[int, Query(ge=1, le=10**9)] = 1,
    after: Byte = None,
) -> dict[str, Any]:
    """Records of the log as they stand there, of the kind `sample` from their own file. Curves are
    thinned to about 2,000 points: the first, the last and every extreme stay. `next` is where the
    live stream goes on."""
    records, following = parts.runs.index(run, kind).records(kind, every, after or 0)
    return {"records": to_json(records), "next": following}


@router.get("/runs/{run}/rollouts")
def get_rollouts(
    run: str,
    caller: CallerDep,
    parts: PartsDep,
    first: Byte = None,
    last: Byte = None,
    worth: Literal["right", "wrong"] | None = None,
    task: Annotated[str | None, Query(max_length=200)] = None,
    start: Byte = None,
    most: Annotated[int, Query(ge=1, le=200)] = 30,
) -> dict[str, Any]:
    """Answers of steps `first` (if not given: the last with any) to `last` of reinforcement, in
    their order, those of one "task" or "task/difficulty" if it is named. `next`, given as `start`,
    is where the next page begins; `steps` are the first and last step of which there are any."""
    right = None if worth is None else worth == "right"
    return parts.runs.rollouts(run, first, last, right, task, start, most)


@router.get("/runs/{run}/live", response_class=StreamingResponse)
async def watch_run(
    run: str, caller: CallerDep, parts: PartsDep, after: Byte = None, samples_after: Byte = None
) -> StreamingResponse:
    """Events: `record` for each line that is appended after those bytes (by default: from now on),
    `state` when the run's summary changes, `reset` when the log was rewritten."""
    parts.runs.path(run)  # 404 before anything is sent
    events = parts.watches.stream(run, after, samples_after)
    return StreamingResponse(events, media_type="text/event-stream", headers=HEADERS)


@router.post("/runs/{run}/stop", status_code=202)
async def stop_run(run: str, caller: AdminDep, parts: PartsDep) -> dict[str, Literal[True]]:
    """Ask a training to save and to end after the step it is in."""
    await asyncio.to_thread(parts.trainings.stop, run)
    return {"stopping": True}


@router.post("/runs/{run}/resume", status_code=202)
async def resume_run(
    run: str, caller: AdminDep, house: HouseDep, parts: PartsDep
) -> dict[str, Any]:
    """Go on from the last checkpoint."""
    await parts.trainings.resume(run)
    return await asyncio.to_thread(_summary, house, parts, run)


@router.get("/runs/{run}/report", response_class=FileResponse)
def get_report(run: str, caller: CallerDep, parts: PartsDep) -> FileResponse:
    """The run's report.html, in a sandbox."""
    path = parts.runs.path(run) / "report.html"
    if not path.is_file():
        raise ApiError(404, f"{run} has no report yet: it is drawn when the run ends")
    headers = {"content-security-policy": REPORT_POLICY, "cache-control": "no-cache"}
    return FileResponse(path, media_type="text/html; charset=utf-8", headers=headers)


@router.post("/runs/{run}/serve")
async def serve_run(run: str, caller: AdminDep, house: HouseDep, parts: PartsDep) -> dict[str, str]:
    """Load the run's finished model; answers when it can be talked to."""
    path = parts.runs.path(run)
    if not (path / "model" / "config.json").is_file():
        raise ApiError(409, f"{run} has no finished model yet: let it train to its end")
    served = _served(house).get(path.resolve())
    if served is None:
        # Shielded: a model half loaded helps nobody, and the next one to ask finds it.
        served = (await asyncio.shield(house.registry.add(path, run))).name
    return {"id": served}


def _summary(house: House, parts: Parts, run: str) -> dict[str, Any]:
    return _with_served(parts, _served(house), parts.runs.summary(run))


def _served(house: House) -> dict[Path, str]:
    """Which runs' models are served, by folder, and under which name."""
    found = {}
    for model in list(house.registry.models.values()):
        run = run_of(model.source)
        if run is not None:
            found[run.resolve()] = model.name
    return found


def _with_served(parts: Parts, served: dict[Path, str], run: dict[str, Any]) -> dict[str, Any]:
    return run | {"served_as": served.get((parts.runs.root / run["id"]).resolve())}
