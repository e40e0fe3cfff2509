"""Which loaders, epilogue and schedule each kernel is made of: from a key of scalars to a function and its arguments.

=====================  ==================  ======================  ==============  =====================================
op                     left                right                   schedule        epilogue
=====================  ==================  ======================  ==============  =====================================
up_proj                X, gathered         W1, k-major             variable rows   bias, activation; H and A
down_proj              A                   W2, k-major             variable rows   bias, score; Y
down_proj_bwd_input    dO, gathered        W2, mn-major            variable rows   H, derivative, score; dH, s A, dS
up_proj_bwd_input      dH                  W1, mn-major            variable rows   dX rows
down_proj_bwd_weight   dO, gathered        s A                     contraction     dW2, or added to a main grad
up_proj_bwd_weight     dH                  X, gathered             contraction     dW1, or added to a main grad
=====================  ==================  ======================  ==============  =====================================
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Int32, cute
from cutlass.cute.nvgpu import OperandMajorMode
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from sonic.kernels.cute import epilogues as ep
from sonic.kernels.cute import loaders
from sonic.kernels.cute.gemm import GroupedGemm
from sonic.kernels.cute.keys import KernelKey
from sonic.kernels.cute.schedule import VariableContraction, VariableRows

__all__ = ["build"]

DTYPES = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16, "float32": cutlass.Float32}


def build(key: KernelKey) -> tuple[GroupedGemm, tuple[Any, ...]]:
    """The function of a key, and what stands for its arguments while it is compiled."""
    dtype, config = DTYPES[key.dtype], key.config
    is_contraction = key.op.endswith("_bwd_weight")
    index = _vector(Int32) if key.gathers else None
    left: loaders.Operand
    right: loaders.Operand
    if is_contraction:
        gathers_left = key.gathers and key.op == "down_proj_bwd_weight"
        gathers_right = key.gathers and key.op == "up_proj_bwd_weight"
        left = (loaders.GatheredAlongK if gathers_left else loaders.RowsAlongK)(config.tile_m, dtype)
        right = (loaders.GatheredAlongK if gathers_right else loaders.RowsAlongK)(config.tile_n, dtype)
        schedule: VariableRows | VariableContraction = VariableContraction()
        operands = ((_rows(dtype), index if gathers_left else None), (_rows(dtype), index if gathers_right else None))
    else:
        left = (loaders.GatheredRows if key.gathers else loaders.TileRows)(config.tile_m, dtype)
        major = OperandMajorMode.MN if "_bwd" in key.op else OperandMajorMode.K
        halves = key.glu_layout if key.op == "up_proj" else None
        right = loaders.Weight(config.tile_n, dtype, major, config.cluster_m, halves)
        schedule = VariableRows(config.tile_m * config.cluster_m, config.group_m)
        operands = ((_rows(dtype), index), (_weight(dtype), None))
    epilogue, tensors = _epilogue(key)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    sizes = (Int32(1), Int32(1), Int32(1), Int32(1))
    gemm = GroupedGemm(config, dtype, left, right, epilogue, schedule)
    return gemm, (*operands, tensors, _vector(Int32), sizes, Int32(1), stream)


def _epilogue(key: KernelKey) -> tuple[ep.Epilogue, tuple[Any, ...]]:
    dtype, config = DTYPES[key.dtype], key.config
    bias = _weight_vector(dtype) if "bias" in key.flags else None
    scores = _vector(cutlass.Float32) if "scores" in key.flags else None
    if key.op == "up_proj":
        assert key.activation is not None, "the up projection has an activation"
        units = config.tile_n // 2 if key.glu_layout else config.tile_n
        stores_h = "h" in key.flags
        tensors: tuple[Any, ...] = (_rows(dtype) if stores_h else None, _rows(dtype), bias)
        return ep.ActivationPair(dtype, units, key.activation, key.glu_layout, stores_h), tensors
    if key.op == "down_proj_bwd_input":
        assert key.activation is not None, "its derivative needs an activation"
        blocks = config.blocks_per_warpgroup
        parts = make_fake_tensor(
            cutlass.Float32, (cute.sym_int(), cute.sym_int()), stride=(cute.sym_int64(), 1), assumed_align=4
        )
        tensors = (_rows(dtype), _rows(dtype), _rows(dtype), scores, parts)
        return ep.DerivativePair(dtype, config.tile_n, key.activation, key.glu_layout, blocks), tensors
    if key.op.endswith("_bwd_weight"):
        out = DTYPES[key.out_dtype or key.dtype]
        return ep.StoreWeight(out, config.tile_n, "adds" in key.flags), (_weight(out),)
    return ep.Store(dtype, config.tile_n), (_rows(dtype), bias, scores)


def _vector(dtype: Any) -> Any:
    return make_fake_tensor(dtype, (cute.sym_int(),), stride=(1,), assumed_align=4)


def _rows(dtype: Any) -> Any:
    """(rows, columns) in whole chunks of 16 bytes, as TMA wants it."""
    width, align = cute.sym_int(divisibility=8), 8
    return make_fake_tensor(
        dtype, (cute.sym_int(), width), stride=(cute.sym_int64(divisibility=align), 1), assumed_align=16
    )


def _weight(dtype: Any) -> Any:
    """(E, rows, columns), likewise."""
    shape = (cute.sym_int(), cute.sym_int(), cute.sym_int(divisibility=8))
    stride = (cute.sym_int64(divisibility=8), cute.sym_int64(divisibility=8), 1)
    return make_fake_tensor(dtype, shape, stride=stride, assumed_align=16)


def _weight_vector(dtype: Any) -> Any:
    """(E, columns)."""
    return make_fake_tensor(dtype, (cute.sym_int(), cute.sym_int()), stride=(cute.sym_int64(), 1), assumed_align=2)
