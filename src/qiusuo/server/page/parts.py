"""What the page's routes stand on, made with the first request and kept beside the house."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from qiusuo.server.api.auth import house_of
from qiusuo.server.page.conversations import Conversations
from qiusuo.server.page.engines import Engines
from qiusuo.server.page.live import Watches
from qiusuo.server.page.runs import Runs
from qiusuo.server.page.trainings import Trainings


@dataclass
class Parts:
    conversations: Conversations
    runs: Runs
    trainings: Trainings
    watches: Watches
    engines: Engines


async def parts(request: Request) -> Parts:
    # No await: whoever asks first makes them, and only once.
    state = request.app.state
    if not hasattr(state, "page"):
        house = house_of(request)
        desk, runs = house.desk, Runs(house.settings.runs)
        state.page = Parts(
            conversations=Conversations(house.database),
            runs=runs,
            trainings=Trainings(runs, house.settings.recipes, house.settings.device),
            watches=Watches(runs, lambda: desk.closing),
            engines=Engines(house.registry, lambda: desk.closing),
        )
    return cast(Parts, state.page)


PartsDep = Annotated[Parts, Depends(parts)]
