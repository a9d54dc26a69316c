"""The native library's loader: found or not, forced or not, on PyTorch's threads, never misused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qiusuo.doctor import Mark, kernels_in_use
from qiusuo.kernels import native as loader
from qiusuo.kernels.low_bit import dequantize, quantize
from qiusuo.kernels.native import CHOICES, VARIABLE, KernelError, Native, built_library, native
from tests.commands import asker, refused

ROOT = Path(__file__).parents[1]
# With a compiler there must be a library: a build that fails is not to go unseen.
needs_library = pytest.mark.skipif(
    built_library() is None and shutil.which("c++") is None,
    reason="no C++ compiler, so no native library",
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    native.cache_clear()
    yield
    native.cache_clear()


def loaded() -> Native:
    library = native()
    assert library is not None, "a compiler is here, but no library: pip install -e . -v says why"
    return library


def run(code: str, **variables: str) -> str:
    """What another Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Which one


@needs_library
def test_the_best_is_chosen_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    best = loaded()
    assert best.instruction_set == 0
    names = {}
    for choice, number in CHOICES.items():
        name = best.library.qiusuo_instructions(number).decode()
        native.cache_clear()
        monkeypatch.setenv(VARIABLE, choice)
        if name:
            names[choice] = loaded().instructions
            assert (names[choice], loaded().instruction_set) == (name, number)
        else:
            with pytest.raises(KernelError, match=f"{choice}, which this processor does not have"):
                native()
    assert "portable" in names
    assert best.instructions in names.values()
    assert len(names) < len(CHOICES)  # none has AVX and NEON


def test_the_reference_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "reference")
    assert native() is None


def test_a_wrong_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "avx1024")
    message = "QIUSUO_KERNELS is 'avx1024', not one of reference, portable, avx2, avx512, neon, amx"
    with pytest.raises(KernelError, match=message):
        native()
    assert message in refused(asker(monkeypatch, capsys)("doctor"))


def test_importing_loads_nothing() -> None:
    assert run(
        "import qiusuo.kernels.native, ctypes, sys;"
        "print(qiusuo.kernels.native.native.cache_info().currsize)"
    ) == "0"  # fmt: skip


# Without


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(loader, "FOLDER", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("without_library")
def test_without_a_library_the_reference_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native() is None
    found = kernels_in_use()
    assert found.mark is Mark.REMARK
    assert "\n" not in found.text
    assert found.text.startswith("reference (PyTorch alone): the native ones were not built, so ")
    for words in ("int4 weights many times slower", "apt-get install g++", "pip install -e ."):
        assert words in found.text
    native.cache_clear()
    monkeypatch.setenv(VARIABLE, "portable")
    with pytest.raises(KernelError, match=r"asks for portable, but .* not built: get a C\+\+"):
        native()


def test_a_broken_library_is_named(without_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = without_library / "_native.abi3.so"
    file.write_bytes(b"\x7fELF, and then no more")
    with pytest.raises(KernelError, match=f"{file} cannot be used .* built for another system"):
        native()
    monkeypatch.setenv(VARIABLE, "reference")
    assert native() is None


@needs_library
def test_the_doctor_names_the_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = asker(monkeypatch, capsys)
    threads = f"{torch.get_num_threads()} threads"
    answer = ask("doctor")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.startswith(f"✓ Kernels: native, {loaded().instructions}, {threads} ")
    native.cache_clear()
    monkeypatch.setenv(VARIABLE, "reference")
    assert ask("doctor").out == "✓ Kernels: reference, as QIUSUO_KERNELS asks\n"


# One pool of threads

LARGE = """
import os, threading, torch
from qiusuo.kernels.native import native, openmp
torch.set_num_threads(1)
def threads():
    return len(os.listdir("/proc/self/task"))
made = torch.randn(4, 2048), torch.ones(4096, 2048).to(torch.int8), torch.ones(4096, 64).half()
def multiply():
    native().linear(*made)  # nothing of PyTorch's that would compute
def mapped(name):
    lines = open("/proc/self/maps").read().splitlines()
    return [line.split() for line in lines if name in line.rpartition("/")[2]]
"""


@needs_library
@linux
def test_threads_are_those_of_pytorch() -> None:
    """No second OpenMP in the process, and not one thread more than PyTorch made."""
    out = run(
        LARGE + "torch.set_num_threads(3)\n"
        "torch.randn(3000, 3000).exp().sum()\n"
        "before = threads(); multiply(); after = threads()\n"
        "print(before, after, native().shares_threads, *{line[5] for line in mapped('omp')})",
        OMP_NUM_THREADS="3",  # as many would be in a pool of the library's own
    )
    before, after, shares, *files = out.split()
    assert (before, shares) == (after, "True")
    assert len(files) == 1
    assert Path(files[0]).parent == Path(torch.__file__).parent / "lib"


@needs_library
@linux
def test_threads_are_as_many_as_pytorch_may_use() -> None:
    """In a thread that PyTorch has not computed in, too; OpenMP alone would go by its variable."""
    out = run(
        LARGE + "def work():\n"
        "    before = threads(); multiply(); print(threads() - before)\n"
        "native(); thread = threading.Thread(target=work); thread.start(); thread.join()",
        OMP_NUM_THREADS="2",
    )
    assert out == "0"
    before, after = run(
        LARGE + "torch.set_num_threads(4); torch.randn(3000, 3000).exp().sum()\n"
        "before = threads(); multiply(); print(before, threads())"
    ).split()
    assert int(before) == int(after) >= 4


@linux
def test_the_openmp_is_the_one_pytorch_is_linked_to() -> None:
    out = run(
        LARGE + "spans = [[int(end, 16) for end in line[0].split('-')] for line in mapped('omp')]\n"
        "print(any(low <= openmp() < high for low, high in spans))"
    )
    assert out == "True"


# Calls


@needs_library
@pytest.mark.parametrize("bits", [8, 4])
def test_every_function_answers(bits: int) -> None:
    torch.manual_seed(bits)
    weight_OI = torch.randn(24, 70)
    weight = quantize(weight_OI, bits)
    x_MI, bias_O = torch.randn(3, 70), torch.randn(24)
    expected = x_MI @ dequantize(weight).T + bias_O
    found = loaded().linear(x_MI, weight.codes, weight.scales, bias_O)
    assert (found - expected).norm() < 0.02 * expected.norm()

    out_OI = torch.empty(24, 70, dtype=torch.bfloat16)
    loaded().dequantize(weight.codes, weight.scales, 70, out_OI)
    assert torch.equal(out_OI, dequantize(weight, torch.bfloat16))

    codes, scales = torch.empty_like(weight.codes), torch.empty_like(weight.scales)
    loaded().quantize(weight_OI, codes, scales)
    assert (codes == weight.codes).float().mean() > 0.99

    down = quantize(torch.randn(1, 70, 12), bits)
    pair = ((weight.codes[None], weight.scales[None]), (down.codes, down.scales))
    gate, up = (x_MI @ dequantize(weight).T).chunk(2, 1)
    expected = (torch.nn.functional.silu(gate) * up) @ dequantize(down)[0].T
    found = loaded().experts(x_MI, None, None, *pair)
    assert (found - expected).norm() < 0.03 * expected.norm()
    indices_MK = torch.zeros(3, 1, dtype=torch.int64)
    halved = loaded().experts(x_MI, torch.full((3, 1), 0.5), indices_MK, *pair)
    torch.testing.assert_close(halved, found / 2)


@needs_library
def test_what_does_not_fit_together_is_refused() -> None:
    """The library would read elsewhere, or write."""
    library = loaded()
    weight = quantize(torch.randn(6, 64), 8)
    x_MI, codes, scales = torch.randn(2, 64), weight.codes, weight.scales
    wrong = {
        "codes of the weight: expected (6, 96)": (torch.randn(2, 65), codes, scales),
        "scales of the weight: expected (6, 2)": (x_MI, codes, scales[:, :1]),
        "int8 or uint8 codes with scales": (x_MI, codes, None),
        "x: expected (2, 64) of torch.float32 or torch.bfloat16": (x_MI.half(), codes, scales),
        "x: must lie in the CPU's memory": (torch.randn(64, 2).T, codes, scales),
        "the bias: expected (6,)": (x_MI, codes, scales, torch.randn(5)),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            library.linear(*arguments)
    down = quantize(torch.randn(1, 64, 3), 8)
    pair = ((codes[None], scales[None]), (down.codes, down.scales))
    indices_MK, weights_MK = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2)
    with pytest.raises(ValueError, match="the experts' indices: expected"):
        library.experts(x_MI, weights_MK, indices_MK.int(), *pair)
    with pytest.raises(ValueError, match="which of 1 experts"):
        library.experts(x_MI, weights_MK, None, *pair)
    with pytest.raises(ValueError, match="out: expected"):
        library.dequantize(codes, scales, 64, torch.empty(6, 64))
    with pytest.raises(ValueError, match="codes of the weight: expected"):
        library.quantize(torch.randn(5, 64), codes, scales)


# Sources


def test_the_build_knows_every_source() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    names = {
        kind: {f"native/{f.name}" for f in (ROOT / "native").glob(kind)}
        for kind in ("*.cpp", "*.h")
    }
    assert set(extension["sources"]) == names["*.cpp"]
    assert set(extension["depends"]) == names["*.h"]
