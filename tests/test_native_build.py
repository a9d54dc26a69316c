"""The native library in every way it is built: packed, without a compiler, watched, elsewhere.

``native/check`` holds every kernel to plain loops, without Python. Here it runs with sanitizers, on
older processors' instructions and on another architecture's (qemu).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "c++")
NO_COMPILER = "no C++ compiler"


def run(*words: str | Path, cwd: Path, **variables: str) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(
        words,
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "QIUSUO_KERNELS"}
        | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout[-6000:]}"
    return done.stdout


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (CONTRIBUTING.md says what `test-all` wants)")


# Packed


def packed(folder: Path, **variables: str) -> Path:
    """A wheel, made from a source package as a registry would hold it."""
    checkout = folder / "checkout"
    ignored = shutil.ignore_patterns("_native*", "*.egg-info", "__pycache__")
    for name in ("src", "native"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    make = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    run(sys.executable, "-c", make, cwd=checkout)
    (source,) = folder.glob("*.tar.gz")
    shutil.rmtree(checkout)
    run(
        *(sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation"),
        *("--no-index", "--wheel-dir", folder),
        cwd=folder,
        **variables,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def installed(wheel: Path, folder: Path) -> Path:
    """Where the programs are of a new environment with this wheel; torch and the like are taken
    from the present one, but not the checkout that is installed there."""
    venv.create(folder / "venv", with_pip=False)
    programs = folder / "venv" / "bin"
    run(
        *(sys.executable, "-m", "pip", "--python", programs / "python", "install", wheel),
        *("--no-deps", "--no-index"),
        cwd=folder,
    )
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "present.pth").write_text(sysconfig.get_path("purelib"))
    where = run(programs / "python", "-c", "import qiusuo; print(qiusuo.__file__)", cwd=folder)
    assert Path(where.strip()).is_relative_to(packages)
    return programs


COMPUTE = """
import torch
from qiusuo.kernels.low_bit import low_bit_linear, quantize
from qiusuo.kernels.native import native
torch.manual_seed(0)
weight, x = torch.randn(40, 96), torch.randn(2, 96)
with torch.inference_mode():
    found, expected = low_bit_linear(x, quantize(weight, 8)), x @ weight.T
assert (found - expected).norm() < 0.02 * expected.norm()
print(native() and native().instructions)
"""


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=NO_COMPILER)
def test_a_wheel_brings_the_kernels(tmp_path: Path) -> None:
    wheel = packed(tmp_path)
    assert "-cp311-abi3-" in wheel.name  # one for every Python from 3.11 on
    programs = installed(wheel, tmp_path)
    name = run(programs / "python", "-c", COMPUTE, cwd=tmp_path).strip()
    assert name != "None"
    doctor = run(programs / "qiusuo", "doctor", cwd=tmp_path)
    assert doctor.startswith(f"✓ Kernels: native, {name}, ")


def test_without_a_compiler_the_install_succeeds(tmp_path: Path) -> None:
    programs = installed(packed(tmp_path, CC="/bin/false", CXX="/bin/false"), tmp_path)
    assert run(programs / "python", "-c", COMPUTE, cwd=tmp_path).strip() == "None"
    doctor = run(programs / "qiusuo", "doctor", cwd=tmp_path)
    assert doctor.startswith("! Kernels: reference (PyTorch alone): the native ones were not built")
    assert "apt-get install g++" in doctor
    assert doctor.count("\n") == 1


# Watched, and elsewhere


def checker(folder: Path, compiler: str, *flags: str) -> Path:
    """The program of ``native/check``, compiled; as many files at a time as there are cores."""

    def compile(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        run(compiler, "-std=c++17", "-ffp-contract=off", *flags, "-c", source, "-o", made, cwd=ROOT)
        return made

    sources = [*(ROOT / "native").glob("*.cpp"), *(ROOT / "native" / "check").glob("*.cpp")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, sources))
    program = folder / "check"
    run(compiler, *flags, *objects, "-pthread", "-o", program, cwd=ROOT)
    return program


def checked(*command: str | Path, cwd: Path) -> list[str]:
    """The instruction sets that a run of the program went through, with four threads."""
    *each, last = run(*command, cwd=cwd, OMP_NUM_THREADS="4").splitlines()
    assert last.endswith(" numbers compared, 0 wrong")
    told = [line.partition(": ") for line in each]
    return sorted(name for number, _, name in told if number.isdigit())  # qemu has warnings


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=NO_COMPILER)
@pytest.mark.parametrize("kind", ["address,undefined", "thread"])
def test_sanitizers_have_nothing_to_say(tmp_path: Path, kind: str) -> None:
    flags = ("-O1", "-g", f"-fsanitize={kind}", "-fno-sanitize-recover=all")
    trial = tmp_path / "trial.cpp"
    trial.write_text("int main() {}\n")
    command = (COMPILER, *flags, trial, "-o", tmp_path / "trial")
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"{COMPILER} cannot link -fsanitize={kind} here")
    assert "portable" in checked(checker(tmp_path, COMPILER, *flags), cwd=tmp_path)


def test_neon_computes_the_same(tmp_path: Path) -> None:
    """On a processor with everything there is, and on an early one without dot products."""
    need("aarch64-linux-gnu-g++", "qemu-aarch64")
    program = checker(tmp_path, "aarch64-linux-gnu-g++", "-O3", "-static")
    found = {
        processor: checked("qemu-aarch64", "-cpu", processor, program, cwd=tmp_path)
        for processor in ("max", "cortex-a57")
    }
    assert all(any("neon" in name for name in names) for names in found.values())


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=NO_COMPILER)
def test_older_processors_meet_no_foreign_instruction(tmp_path: Path) -> None:
    """One compiled inline in a file for AVX, and taken by the linker for all, would be such."""
    need("qemu-x86_64")
    if os.uname().machine != "x86_64":
        pytest.skip("for x86 processors")
    program = checker(tmp_path, COMPILER, "-O3", "-static")
    for processor, expected in (("Nehalem", ["portable"]), ("Haswell", ["avx2", "portable"])):
        assert checked("qemu-x86_64", "-cpu", processor, program, cwd=tmp_path) == expected
