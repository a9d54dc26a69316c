"""The library's functions as C declares them (``native/entry.cpp`` and the files it names)."""

from __future__ import annotations

import ctypes

INT, SIZE, AT, FLOAT = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class View(ctypes.Structure):
    """A tensor [batch, heads, rows, width] in memory: address, and distances in elements."""

    _fields_ = (("at", AT), ("batch", SIZE), ("head", SIZE), ("row", SIZE))


class TrainingMlp(ctypes.Structure):
    """``TrainingMlp`` of native/amx_training_mlp.h."""

    _fields_ = (
        ("x", AT), ("x_kind", INT), ("gate", AT), ("up", AT), ("down", AT), ("weight_kind", INT),
        ("gate_stride", SIZE), ("down_stride", SIZE), ("starts", AT), ("pair", AT),
        ("weights", AT), ("K", SIZE), ("E", SIZE), ("D", SIZE), ("F", SIZE),
    )  # fmt: skip


class TrainingHead(ctypes.Structure):
    """``TrainingHead`` of native/amx_training_head.h."""

    _fields_ = (
        ("x", AT), ("x_kind", INT), ("head", AT), ("head_kind", INT), ("labels", AT), ("M", SIZE),
        ("D", SIZE), ("W", SIZE),
    )  # fmt: skip


class Projection(ctypes.Structure):
    """``Projection`` of native/amx_training_linear.h."""

    _fields_ = (("weight", AT), ("O", SIZE), ("y", AT), ("grad_weight", AT))


class TrainingLinear(ctypes.Structure):
    """``TrainingLinear`` of native/amx_training_linear.h."""

    _fields_ = (
        ("x", AT), ("x_kind", INT), ("weight_kind", INT), ("M", SIZE), ("D", SIZE),
        ("count", SIZE), ("layers", ctypes.POINTER(Projection)),
    )  # fmt: skip


VIEW, MLP = ctypes.POINTER(View), ctypes.POINTER(TrainingMlp)
HEAD = ctypes.POINTER(TrainingHead)
LINEAR = ctypes.POINTER(TrainingLinear)
SIGNATURES = {
    "qiusuo_linear": [INT, INT, AT, INT, *[AT] * 4, *[SIZE] * 4],
    "qiusuo_experts": [INT, INT, AT, INT, *[AT] * 7, *[SIZE] * 5],
    "qiusuo_dequantize": [INT, INT, *[AT] * 3, *[SIZE] * 2],
    "qiusuo_quantize": [INT, INT, AT, INT, *[AT] * 3, *[SIZE] * 2],
    "qiusuo_keep_rows": [INT, AT, INT, *[AT] * 2, *[SIZE] * 4],
    "qiusuo_unpack_rows": [INT, *[AT] * 2, INT, *[SIZE] * 4],
    "qiusuo_latent_attention": [*[AT] * 2, INT, AT, SIZE, *[AT] * 2, *[SIZE] * 5, FLOAT],
    "qiusuo_attend": [*[VIEW] * 5, AT, INT, *[SIZE] * 7, FLOAT],
    "qiusuo_attend_backward": [*[VIEW] * 5, AT, *[VIEW] * 4, *[SIZE] * 7, FLOAT],
    "qiusuo_training_mlp": [MLP, AT],
    "qiusuo_training_mlp_backward": [MLP, *[AT] * 6],
    "qiusuo_training_head": [HEAD, *[AT] * 3],
    "qiusuo_training_head_backward": [HEAD, *[AT] * 3],
    "qiusuo_training_linear": [LINEAR],
    "qiusuo_training_linear_backward": [LINEAR, AT],
    "qiusuo_swiglu": [INT, INT, *[AT] * 2, SIZE, *[AT] * 2, *[SIZE] * 2, AT],
    "qiusuo_swiglu_backward": [INT, INT, *[AT] * 2, SIZE, *[AT] * 2, *[SIZE] * 2, *[AT] * 5],
    "qiusuo_gather": [INT, AT, INT, AT, SIZE, AT, INT, *[SIZE] * 2],
    "qiusuo_sum_choices": [INT, AT, INT, AT, SIZE, AT, *[SIZE] * 2],
    "qiusuo_rms_norm": [INT, AT, INT, SIZE, AT, INT, AT, INT, AT, *[SIZE] * 2, FLOAT],
    "qiusuo_add_rms_norm": [
        INT, *[AT, INT, SIZE] * 2, AT, INT, *[AT] * 2, INT, AT, *[SIZE] * 2, FLOAT,
    ],
    "qiusuo_rms_norm_backward": [
        INT, AT, INT, AT, INT, SIZE, AT, INT, *[AT] * 5, *[SIZE] * 2,
    ],
    "qiusuo_rotate": [INT, AT, INT, AT, SIZE, *[INT] * 2, AT, *[SIZE] * 5],
    "qiusuo_cross_entropy": [INT, AT, INT, *[AT] * 2, *[SIZE] * 2],
    "qiusuo_choose_experts": [
        *[AT] * 3, *[SIZE] * 4, *[INT] * 2, FLOAT, *[AT] * 3, SIZE,
    ],
    "qiusuo_choose_experts_backward": [
        *[AT] * 2, *[SIZE] * 2, *[INT] * 2, FLOAT, *[AT] * 3, SIZE,
    ],
    "qiusuo_balance": [AT, *[SIZE] * 4, *[AT] * 2],
}  # fmt: skip
