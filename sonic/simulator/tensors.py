"""CPU tensors that stand for device tensors, and the memory that kernels may touch.

CuTe-DSL compiles a CPU tensor to a generic pointer, other code than on a GPU; and TVM-FFI refuses it where a kernel
wants a device. So tensors are handed over with a device type of CUDA written into their DLPack capsule.
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from typing import Any

import torch

from sonic.simulator.errors import SimulatorError
from sonic.simulator.kernel_launch import Region

_DLPACK_CUDA = 2

# struct DLTensor {void *data; struct {int32_t type, id;} device; ...}, first in a DLManagedTensor.
_DEVICE_TYPE_OFFSET = ctypes.sizeof(ctypes.c_void_p)

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)

# Storages, by the address of their Python object, for as long as they live.
_regions: dict[int, tuple[weakref.ref, Region]] = {}


class DeviceTensor:
    """A CPU tensor that says of itself, by the DLPack protocol, that it lies on the first GPU.

    Attributes:
        tensor: the tensor whose memory it shares.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor."""
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        """The type of its elements."""
        return self.tensor.dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_DLPACK_CUDA, 0)

    def __dlpack__(self, **_: Any) -> Any:
        # the options of the protocol (stream, versions, copy) ask for nothing that matters in one memory
        capsule = self.tensor.detach().__dlpack__()
        address = _capsule_pointer(capsule, b"dltensor")
        ctypes.c_int32.from_address(address + _DEVICE_TYPE_OFFSET).value = _DLPACK_CUDA
        return capsule

    def __repr__(self) -> str:
        return f"DeviceTensor({self.tensor!r})"


def tensor(cpu_tensor: torch.Tensor | DeviceTensor, name: str | None = None) -> DeviceTensor:
    """Wrap a CPU tensor for ``from_dlpack`` or a TVM-FFI function, and let kernels touch its memory.

    All of its storage may be touched, not only the elements of a view. The permission ends with the storage's life.

    Args:
        cpu_tensor: any strides; it shares its memory with what the kernel sees.
        name: what reports call its memory; ``None`` for the next of ``arg 0``, ``arg 1``, … or the name it has.
    """
    if isinstance(cpu_tensor, DeviceTensor):
        cpu_tensor = cpu_tensor.tensor
    if cpu_tensor.device.type != "cpu":
        raise SimulatorError(f"sonic.simulator.tensor: tensor is on {cpu_tensor.device}, expected a CPU tensor")
    register(cpu_tensor, name)
    return DeviceTensor(cpu_tensor)


def register(cpu_tensor: torch.Tensor, name: str | None = None) -> Region:
    """Let kernels touch the memory of a CPU tensor for as long as its storage lives; see `tensor`."""
    storage = cpu_tensor.untyped_storage()
    key = id(storage)
    known = _regions.get(key)
    address, num_bytes = storage.data_ptr(), storage.nbytes()
    if known is not None:
        region = known[1]
        # a storage may have been resized since
        if (region.address, region.num_bytes) == (address, num_bytes) and name in (None, region.name):
            return region
        name = name or region.name
    region = Region(address, num_bytes, name or _next_name())
    _regions[key] = (weakref.ref(storage, lambda _: _regions.pop(key, None)), region)
    return region


def _next_name() -> str:
    taken = {region.name for _, region in list(_regions.values())}
    return next(name for name in map("arg {}".format, itertools.count()) if name not in taken)


def regions() -> list[Region]:
    """The memory that kernels may touch now, by address; storages without bytes are left out."""
    living = [(reference(), region) for reference, region in list(_regions.values())]
    found = [
        Region(storage.data_ptr(), storage.nbytes(), region.name) for storage, region in living if storage is not None
    ]
    return sorted((region for region in found if region.num_bytes), key=lambda region: region.address)
