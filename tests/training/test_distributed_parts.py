"""The parts of training in several processes, each by itself, in one process."""

from __future__ import annotations

import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.training_state import SHARDS, load_state, save_shards
from qiusuo.kernels.experts import experts_reference
from qiusuo.model.moe import Routing
from qiusuo.training.life import _Stop
from qiusuo.training.parallel.experts import visit
from qiusuo.training.parallel.limits import check_shared
from qiusuo.training.parallel.matrices import MatrixExchange, own_part
from qiusuo.training.parallel.sharding import held_like
from qiusuo.training.parallel.world import ALONE, World
from qiusuo.training.recipe import RecipeError, parse_recipe
from tests.training import lives, tasks


class Thread(World):
    """One of some processes that are threads here."""

    def __init__(
        self, rank: int, size: int, table: dict[int, Any], gate: threading.Barrier
    ) -> None:
        self.rank, self.size, self.table, self.gate = rank, size, table, gate

    def exchange(self, parts: list[Tensor], counts: list[int]) -> list[Tensor]:
        self.table[self.rank] = parts
        self.gate.wait()
        taken = [self.table[rank][self.rank] for rank in range(self.size)]
        self.gate.wait()
        assert [len(part) for part in taken] == counts
        return taken


def in_threads(size: int, work: Callable[[World], Any]) -> list[Any]:
    table: dict[int, Any] = {}
    gate = threading.Barrier(size, timeout=20)
    found: dict[int, Any] = {}

    def one(rank: int) -> None:
        try:
            found[rank] = work(Thread(rank, size, table, gate))
        except BaseException:
            gate.abort()
            raise

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_matrices_go_whole_to_one_owner_and_rows_come_back(size: int) -> None:
    shapes = [(7, 3), (2, 9), (1, 4), (10, 10), (5, 1), (4, 6)]
    generator = torch.Generator().manual_seed(3)
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]

    def work(world: World) -> tuple[list[int], list[Tensor]]:
        rows = []
        for matrix in matrices:  # dealt out as fully_shard does
            chunks = matrix.chunk(world.size)
            rows.append(chunks[world.rank] if world.rank < len(chunks) else matrix[:0])
        exchange = MatrixExchange(world, matrices)
        whole = exchange.gather(rows)
        for place, matrix in zip(exchange.owned, whole, strict=True):
            assert torch.equal(matrix, matrices[place])
        back = exchange.scatter([2 * matrix for matrix in whole], rows, torch.float32)
        for was, now in zip(rows, back, strict=True):
            assert torch.equal(2 * was, now)
        return exchange.owned, back

    answers = in_threads(size, work)
    assert sorted(place for owned, _ in answers for place in owned) == list(range(len(shapes)))


@pytest.mark.parametrize(("size", "used"), [(1, 6), (2, 6), (3, 6), (3, 3), (6, 1)])
def test_tokens_visit_experts_and_come_home(size: int, used: int) -> None:
    """As if all tokens and all experts were in one place; of six experts only the first ``used``
    are asked, so that to some processes nobody comes."""
    generator = torch.Generator().manual_seed(size)
    gate_up_EGD = torch.randn(6, 8, 5, generator=generator, requires_grad=True)
    down_EDF = torch.randn(6, 5, 4, generator=generator, requires_grad=True)
    chosen = min(2, used)
    given = []
    for rank in range(size):
        x_MD = torch.randn(rank + 3, 5, generator=generator, requires_grad=True)
        weights_MK = torch.rand(rank + 3, chosen, generator=generator, requires_grad=True)
        scores_ME = torch.rand(rank + 3, used, generator=generator)
        given.append((x_MD, weights_MK, scores_ME.topk(chosen).indices))
    wanted, grads = [], []
    for x_MD, weights_MK, indices_MK in given:
        out_MD = experts_reference(x_MD, weights_MK, indices_MK, gate_up_EGD, down_EDF)
        wanted.append(out_MD)
        grads.append(torch.randn(out_MD.shape, generator=generator))
    inputs = [x for x, _, _ in given] + [weights for _, weights, _ in given]
    both = torch.autograd.grad(wanted, [*inputs, gate_up_EGD, down_EDF], grads)

    def work(world: World) -> tuple[Tensor, ...]:
        x_MD, weights_MK, indices_MK = given[world.rank]
        own = SimpleNamespace(
            gate_up_proj=gate_up_EGD.detach().chunk(size)[world.rank].requires_grad_(),
            down_proj=down_EDF.detach().chunk(size)[world.rank].requires_grad_(),
        )
        routing = Routing(torch.empty(0), indices_MK, weights_MK)
        out_MD = visit(own, world, x_MD, routing)  # type: ignore[arg-type]
        leaves = [x_MD, weights_MK, own.gate_up_proj, own.down_proj]
        return out_MD, *torch.autograd.grad(out_MD, leaves, grads[world.rank])

    answers = in_threads(size, work)
    for rank, (out_MD, grad_x_MD, grad_weights_MK, _, _) in enumerate(answers):
        torch.testing.assert_close(out_MD, wanted[rank])
        torch.testing.assert_close(grad_x_MD, both[rank])
        torch.testing.assert_close(grad_weights_MK, both[size + rank])
    torch.testing.assert_close(torch.cat([answer[3] for answer in answers]), both[-2])
    torch.testing.assert_close(torch.cat([answer[4] for answer in answers]), both[-1])


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """A world of one process that is a real process group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group(backend="gloo")
    dist.destroy_process_group()


@pytest.fixture
def content(group: dist.ProcessGroup) -> dict[str, Any]:
    mesh = dist.init_device_mesh("cpu", (1,))
    weight = distribute_tensor(torch.arange(12.0).view(4, 3), mesh, [Shard(0)])
    moment = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    state = {0: {"step": torch.tensor(5.0), "moment": moment}}
    return {"step": 5, "model": {"w": weight, "bias": torch.zeros(2)}, "optimizers": [state]}


def test_shards_are_of_the_moment_they_were_saved(
    tmp_path: Path, group: dist.ProcessGroup, content: dict[str, Any], monkeypatch: Any
) -> None:
    """The writer is held up until the weights have moved on."""
    may_write = threading.Event()
    write = dcp.FileSystemWriter.write_data

    def wait_and_write(self: Any, *args: Any) -> Any:
        assert may_write.wait(20)
        return write(self, *args)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", wait_and_write)
    writing = save_shards(tmp_path, content, group, leads=True)
    own_part(content["model"]["w"]).fill_(-1)
    assert not writing.done()
    may_write.set()
    writing.result(20)
    whole = load_state(tmp_path)
    assert torch.equal(whole["model"]["w"], torch.arange(12.0).view(4, 3))
    assert whole["step"] == 5
    assert whole["optimizers"][0][0]["step"] == 5
    sharded = load_state(tmp_path, content["model"]["w"].device_mesh)
    assert isinstance(sharded["model"]["w"], DTensor)
    assert torch.equal(sharded["optimizers"][0][0]["moment"].to_local(), torch.ones(4, 3))
    assert not isinstance(sharded["model"]["bias"], DTensor)


class Malice:
    def __reduce__(self) -> Any:
        return print, ("executed",)


@pytest.mark.parametrize("harm", ["pickle", "short", "missing"])
def test_damaged_shards_are_named_and_nothing_in_them_runs(
    tmp_path: Path,
    group: dist.ProcessGroup,
    content: dict[str, Any],
    harm: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_shards(tmp_path, content, group, leads=True).result(20)
    shards = tmp_path / SHARDS
    if harm == "pickle":
        (shards / ".metadata").write_bytes(pickle.dumps(Malice()))
    elif harm == "short":
        (shards / ".metadata").write_bytes((shards / ".metadata").read_bytes()[:40])
    else:
        next(shards.glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read as a training state"):
        load_state(tmp_path)
    assert "executed" not in capsys.readouterr().out


def test_a_whole_tensor_is_held_as_shards_are(content: dict[str, Any]) -> None:
    held = held_like(torch.ones(4, 3), content["model"]["w"])
    assert isinstance(held, DTensor)
    assert torch.equal(held.to_local(), torch.ones(4, 3))
    step = torch.tensor(1.0)
    assert held_like(step, content["model"]["w"]) is step
    assert held_like(step, torch.zeros(3)) is step


def test_one_process_is_a_world_that_does_nothing() -> None:
    numbers = torch.tensor([1.0, 2.0])
    assert ALONE.sum(numbers) is numbers
    assert ALONE.total_norm(numbers[0]) == 1
    assert ALONE.share(7) == slice(0, 7)
    assert ALONE.leads
    with ALONE.together(), ALONE.in_turn():
        assert ALONE.first("word") == "word"


def test_what_cannot_be_shared_is_refused(corpus: Path) -> None:
    recipe = lives.recipe_for(corpus)
    check_shared(recipe, recipe.stages, 2)
    with pytest.raises(RecipeError, match="3 processes cannot share batch_size 8 evenly"):
        check_shared(recipe, recipe.stages, 3)
    compiled = lives.recipe_for(corpus, compile=True)
    check_shared(compiled, compiled.stages, 1)
    with pytest.raises(RecipeError, match="compile = true needs one process"):
        check_shared(compiled, compiled.stages, 2)
    table = lives.recipe_table(corpus)
    adapted = parse_recipe(table | {"adapter": {"kind": "lora"}})
    with pytest.raises(RecipeError, match=r"an adapter \(lora\) trains in one process"):
        check_shared(adapted, adapted.stages, 2)
    table["stages"].append(tasks.rl())
    tried = parse_recipe(table)
    check_shared(tried, tried.stages[:1], 2)
    with pytest.raises(RecipeError, match="stage rl is of kind rl, which trains in one process"):
        check_shared(tried, tried.stages, 2)


def test_one_of_several_may_be_told_to_stop_twice() -> None:
    """By its launcher, and by who told the launcher and all others. One alone is in haste."""
    world = Thread(1, 2, {}, threading.Barrier(2))
    with _Stop(world) as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert stop.asked
    with _Stop(ALONE):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
