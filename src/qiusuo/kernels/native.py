"""The library of native kernels (sources in ``native/``): found, loaded once, called with tensors.

It is plain C behind ctypes: no Python or PyTorch headers, so one build serves every Python. Nothing
happens at import; the first ``native()`` loads. The library's loops run on the threads of the
OpenMP that PyTorch uses: a pool of its own would fight that one, which waits for work spinning.

Where there is no library (no compiler at the install) ``native()`` is None and callers take the
PyTorch reference. ``QIUSUO_KERNELS`` forces one of CHOICES, to measure or to find a fault.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qiusuo.kernels.signatures import AT, INT, SIGNATURES, SIZE

# M rows of x, O out, I in, K experts per token, E experts, D hidden, F expert width, G = 2F.
# I', D', F': in codes, as wide as low_bit.code_shapes says; scales have a column for each block.

VARIABLE = "QIUSUO_KERNELS"
# As the library numbers them; 0 is the best there is.
CHOICES = {"portable": 1, "avx2": 2, "avx512": 3, "neon": 4, "amx": 5}
REFERENCE = "reference"
FOLDER = Path(__file__).parent
_AGAIN = (
    "install Qiusuo once more: in a checkout `pip install -e .`, else `pip install "
    "--force-reinstall --no-deps --no-cache-dir` with the name or address it was installed by"
)
REMEDY = (
    "get a C++ compiler (Debian, Ubuntu: apt-get install g++; macOS: xcode-select --install) and "
    f"{_AGAIN}"
)

KINDS = {torch.float32: 0, torch.bfloat16: 1}
_BITS = {torch.int8: 8, torch.uint8: 4, torch.bfloat16: 16}


class KernelError(RuntimeError):
    """A kernel was asked for by name that is not to be had, or the library is a broken one."""


@dataclass(frozen=True)
class Native:
    """The loaded library with one instruction set. Tensors must lie in the CPU's memory, without
    gaps; ValueError for what does not fit together. The library itself checks nothing.

    ``codes`` tell their bits by type: int8, uint8 (4 bits), or bfloat16 (then without scales)."""

    library: ctypes.CDLL
    instruction_set: int
    instructions: str
    shares_threads: bool

    @property
    def has_tiles(self) -> bool:
        """Whether many rows are multiplied by AMX. Then a row of bfloat16 may come out otherwise
        rounded when there are many of them than alone."""
        return self.instructions.startswith("amx")

    def without_tiles(self) -> Native:
        """The same, in which no row depends on how many there are."""
        if not self.has_tiles:
            return self
        number = CHOICES["avx512"]
        name = self.library.qiusuo_instructions(number).decode()
        return replace(self, instruction_set=number, instructions=name)

    def linear(
        self, x_MI: Tensor, codes: Tensor, scales: Tensor | None, bias_O: Tensor | None = None
    ) -> Tensor:
        """x Wᵀ + b [M, O] in x's type (float32 or bfloat16); ``bias_O`` float32."""
        (rows, columns), width = x_MI.shape, len(codes)
        bits = _check_weight("the weight", codes, scales, (width,), columns)
        check("x", x_MI, (rows, columns), *KINDS)
        if bias_O is not None:
            check("the bias", bias_O, (width,), torch.float32)
        out_MO = x_MI.new_empty(rows, width)
        self.run(
            "qiusuo_linear", bits, at(x_MI), KINDS[x_MI.dtype], at(codes), at(scales),
            at(bias_O), at(out_MO), rows, 1, width, columns,
        )  # fmt: skip
        return out_MO

    def heads(self, x_MHI: Tensor, codes: Tensor, scales: Tensor | None) -> Tensor:
        """Every head's rows times its own weight [H, O, I], transposed: [M, H, O]."""
        (M, H, columns), width = x_MHI.shape, codes.shape[1]
        bits = _check_weight("the weights", codes, scales, (H, width), columns)
        check("x", x_MHI, (M, H, columns), *KINDS)
        out_MHO = x_MHI.new_empty(M, H, width)
        self.run(
            "qiusuo_linear", bits, at(x_MHI), KINDS[x_MHI.dtype], at(codes), at(scales),
            None, at(out_MHO), M, H, width, columns,
        )  # fmt: skip
        return out_MHO

    def experts(
        self,
        x_MD: Tensor,
        weights_MK: Tensor | None,
        indices_MK: Tensor | None,
        gate_up: tuple[Tensor, Tensor | None],
        down: tuple[Tensor, Tensor | None],
    ) -> Tensor:
        """A token's experts, weighted and added up [M, D]; codes and scales of ``gate_up`` begin
        with [E, G], those of ``down`` with [E, D]. ``indices_MK`` int64 within E, ``weights_MK``
        float32; both None for the one expert of a dense MLP."""
        (M, D), (E, G) = x_MD.shape, gate_up[0].shape[:2]
        K = 1 if indices_MK is None else indices_MK.shape[1]
        bits = _check_weight("gate and up", *gate_up, (E, G), D)
        if _check_weight("down", *down, (E, D), G // 2) != bits or G % 2:
            raise ValueError("gate, up and down must be of the same bits, gate as wide as up")
        check("x", x_MD, (M, D), *KINDS)
        if indices_MK is not None and weights_MK is not None:
            check("the experts' indices", indices_MK, (M, K), torch.int64)
            check("the experts' weights", weights_MK, (M, K), torch.float32)
        elif E != 1 or indices_MK is not weights_MK:
            raise ValueError(f"which of {E} experts, and with which weights? Both are needed")
        out_MD = torch.empty_like(x_MD)
        self.run(
            "qiusuo_experts", bits, at(x_MD), KINDS[x_MD.dtype], at(indices_MK),
            at(weights_MK), at(gate_up[0]), at(gate_up[1]), at(down[0]), at(down[1]),
            at(out_MD), M, K, E, D, G // 2,
        )  # fmt: skip
        return out_MD

    def dequantize(self, codes: Tensor, scales: Tensor, columns: int, out_OI: Tensor) -> None:
        """The numbers meant, in bfloat16, written to ``out_OI`` (that is what a prefill multiplies:
        the caller keeps one buffer for all matrices)."""
        bits = _check_weight("the weight", codes, scales, (len(codes),), columns)
        check("out", out_OI, (len(codes), columns), torch.bfloat16)
        self.run("qiusuo_dequantize", bits, at(codes), at(scales), at(out_OI), len(codes), columns)

    def quantize(
        self, rows_OI: Tensor, codes: Tensor, scales: Tensor, importance_I: Tensor | None = None
    ) -> None:
        """Choose codes and scales as ``low_bit.quantize`` does. All of it must be finite."""
        rows, columns = rows_OI.shape
        bits = _check_weight("the weight", codes, scales, (rows,), columns)
        check("rows", rows_OI, (rows, columns), *KINDS)
        if importance_I is not None:
            check("importance", importance_I, (columns,), torch.float32)
        self.run(
            "qiusuo_quantize", bits, at(rows_OI), KINDS[rows_OI.dtype], at(importance_I),
            at(codes), at(scales), rows, columns,
        )  # fmt: skip

    def keep_rows(self, rows_NZ: Tensor, entries_SW: Tensor, slots_N: Tensor, rounded: int) -> None:
        """See ``kernels/cached_rows.py``; ``slots`` must be rows of the cache."""
        (N, Z), width = rows_NZ.shape, entries_SW.shape[1]
        check("rows", rows_NZ, (N, Z), *KINDS)
        check("the cache", entries_SW, tuple(entries_SW.shape), torch.uint8)
        check("slots", slots_N, (N,), torch.int64)
        self.run(
            "qiusuo_keep_rows", at(rows_NZ), KINDS[rows_NZ.dtype], at(entries_SW), at(slots_N),
            N, rounded, Z - rounded, width,
        )  # fmt: skip

    def unpack_rows(
        self, entries_NW: Tensor, rounded: int, exact: int, dtype: torch.dtype
    ) -> Tensor:
        """The numbers [N, Z] of rows of the cache, in ``dtype``."""
        N, width = entries_NW.shape
        check("the cache's rows", entries_NW, (N, width), torch.uint8)
        rows_NZ = torch.empty(N, rounded + exact, dtype=dtype)
        self.run(
            "qiusuo_unpack_rows", at(entries_NW), at(rows_NZ), KINDS[dtype], N, rounded, exact,
            width,
        )  # fmt: skip
        return rows_NZ

    def walks_pages(self, width: int, latent: int, page_tokens: int) -> bool:
        """Whether ``latent_attention`` takes rows of ``width`` numbers, ``latent`` of them values,
        in pages of so many."""
        number = self.instruction_set
        return bool(self.library.qiusuo_walks_pages(number, width, latent, page_tokens))

    def latent_attention(
        self,
        q_NHE: Tensor,
        entries_psW: Tensor,
        table_Np: Tensor,
        lengths_N: Tensor,
        latent: int,
        scale: float,
    ) -> Tensor:
        """See ``kernels/latent_attention.py``; only where ``walks_pages``."""
        (N, H, E), (_, size, _) = q_NHE.shape, entries_psW.shape
        bits = 16 if entries_psW.dtype is torch.bfloat16 else 8
        check("queries", q_NHE, (N, H, E), torch.bfloat16)
        check("the cache", entries_psW, tuple(entries_psW.shape), torch.bfloat16, torch.uint8)
        check("the page table", table_Np, (N, table_Np.shape[1]), torch.int64)
        check("lengths", lengths_N, (N,), torch.int64)
        out_NHC = q_NHE.new_empty(N, H, latent)
        self.begin()
        self.library.qiusuo_latent_attention(
            at(q_NHE), at(entries_psW), bits, at(table_Np), table_Np.shape[1], at(lengths_N),
            at(out_NHC), N, H, E, latent, size, scale,
        )  # fmt: skip
        return out_NHC

    def choose_experts(
        self,
        logits_ME: Tensor,
        bias_E: Tensor | None,
        replayed_MK: Tensor | None,
        groups: int,
        kept_groups: int,
        per_token: int,
        sigmoid: bool,
        normalized: bool,
        scaling: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, indices and weights; see ``kernels/routing.py``."""
        M, E = logits_ME.shape
        check("logits", logits_ME, (M, E), torch.float32)
        if bias_E is not None:
            check("the experts' bias", bias_E, (E,), torch.float32)
        if replayed_MK is not None:
            check("experts to replay", replayed_MK, (M, per_token), torch.int64)
        scores_ME = torch.empty_like(logits_ME)
        indices_MK = logits_ME.new_empty(M, per_token, dtype=torch.int64)
        weights_MK = logits_ME.new_empty(M, per_token)
        self.begin()
        self.library.qiusuo_choose_experts(
            at(logits_ME), at(bias_E), at(replayed_MK), E, groups, kept_groups, per_token, sigmoid,
            normalized, scaling, at(scores_ME), at(indices_MK),
            at(weights_MK), M,
        )  # fmt: skip
        return scores_ME, indices_MK, weights_MK

    def begin(self) -> None:
        # PyTorch sets OpenMP's number of threads for each thread of Python's when first asked.
        torch.get_num_threads()

    def run(self, name: str, *rest: int | float | None) -> None:
        """Call a function that begins with the instruction set (``signatures.py``)."""
        self.begin()
        getattr(self.library, name)(self.instruction_set, *rest)


def native_for(x: Tensor) -> Native | None:
    """``native()`` where it reads x: float32 or bfloat16 on the CPU, and no gradient is wanted (as
    inside of an autograd Function). Not while PyTorch compiles: it could not see the call."""
    if x.device.type != "cpu" or x.dtype not in KINDS or torch.is_grad_enabled():
        return None
    return None if torch.compiler.is_compiling() else native()


@cache
def native() -> Native | None:
    """The library with the best instruction set of this processor, or with the one that
    QIUSUO_KERNELS names; None for the reference. KernelError where the named one is not to be had.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted != REFERENCE and wanted not in CHOICES:
        names = ", ".join((REFERENCE, *CHOICES))
        raise KernelError(f"{VARIABLE} is {wanted!r}, not one of {names} (unset: the best)")
    if wanted == REFERENCE:
        return None
    file = built_library()
    if file is None:
        if wanted:
            raise KernelError(
                f"{VARIABLE} asks for {wanted}, but the native library was not built: {REMEDY}"
            )
        return None
    library = _load(file)
    number = CHOICES.get(wanted, 0)
    instructions = library.qiusuo_instructions(number).decode()
    if not instructions:
        best = library.qiusuo_instructions(0).decode()
        raise KernelError(
            f"{VARIABLE} asks for {wanted}, which this processor does not have; unset it for {best}"
        )
    return Native(library, number, instructions, _share_threads(library))


def built_library() -> Path | None:
    """The library's file, which the install placed beside this one."""
    files = (*FOLDER.glob("_native*.so"), *FOLDER.glob("_native*.pyd"))
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


def openmp() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP that PyTorch itself is linked to (there may be
    others in the process: wheels bring their own); None where PyTorch has another kind."""
    folder = Path(torch.__file__).parent / "lib"
    for file in (folder / "libtorch_cpu.so", folder / "libtorch_cpu.dylib"):
        if file.exists():
            # Loaded long ago; its symbols are looked for in what it depends on, too.
            function = getattr(ctypes.CDLL(str(file)), "GOMP_parallel", None)
            return ctypes.cast(function, AT).value if function else None
    return None


def _share_threads(library: ctypes.CDLL) -> bool:
    address = openmp()
    if address is not None:
        library.qiusuo_use_threads(address)
    return address is not None


def _load(file: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(file))
        library.qiusuo_instructions.argtypes = [INT]
        library.qiusuo_instructions.restype = ctypes.c_char_p
        library.qiusuo_use_threads.argtypes = [AT]
        library.qiusuo_use_threads.restype = None
        library.qiusuo_walks_pages.argtypes = [INT, *[SIZE] * 3]
        library.qiusuo_sort_pairs.argtypes = [AT, *[SIZE] * 2, INT, *[AT] * 3]
        for name, arguments in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
    except (OSError, AttributeError) as error:
        raise KernelError(
            f"{file} cannot be used ({error}): it was built for another system or from other "
            f"sources. Delete it and {_AGAIN}; {VARIABLE}={REFERENCE} does without"
        ) from error
    return library


def _check_weight(
    what: str, codes: Tensor, scales: Tensor | None, lead: tuple[int, ...], columns: int
) -> int:
    """Bits of a weight, when codes and scales have the shapes that these imply."""
    bits, blocks = _BITS.get(codes.dtype, 0), -(-columns // 32)
    if bits == 16 and scales is None:
        check(what, codes, (*lead, columns), torch.bfloat16)
        return bits
    if bits not in (4, 8) or scales is None:
        raise ValueError(f"{what}: int8 or uint8 codes with scales, or bfloat16 without")
    check(f"codes of {what}", codes, (*lead, blocks * 4 * bits), codes.dtype)
    check(f"scales of {what}", scales, (*lead, blocks), torch.float16)
    return bits


def check(what: str, tensor: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes:
        raise ValueError(
            f"{what}: expected {shape} of {' or '.join(map(str, dtypes))}, "
            f"not {tuple(tensor.shape)} of {tensor.dtype}"
        )
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"{what}: must lie in the CPU's memory without gaps")


def at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
