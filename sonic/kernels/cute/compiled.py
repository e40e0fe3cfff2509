import functools, sys
from typing import Any
from cutlass import cute
from sonic.kernels.cute.kernels import KernelKey, build
_functions: dict = {}
def compiled(key: KernelKey, simulated: bool) -> Any:
    k = (key, simulated)
    if k not in _functions:
        gemm, fakes = build(key)
        _functions[k] = cute.compile(gemm, *fakes, options="--enable-tvm-ffi")
    return _functions[k]
