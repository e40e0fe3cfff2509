"""Device meshes: the ranks of one axis, and which part of a dimension each of them holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from sonic.shapes import argument_error

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Ranks", "joint_mesh", "part_offsets", "ranks_of"]


class Ranks:
    """The ranks of a one-dimensional mesh.

    Attributes:
        mesh: the mesh, None: this rank alone.
        group: its process group; None for this rank alone.
        size: how many.
        rank: this one's place among them.
    """

    def __init__(self, mesh: DeviceMesh | None) -> None:
        self.mesh = mesh
        self.group: dist.ProcessGroup | None = None if mesh is None else mesh.get_group()
        self.size: int = 1 if mesh is None else mesh.size()
        self.rank: int = 0 if mesh is None else mesh.get_local_rank()

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """Process groups are shared, never copied."""
        return self

    def __repr__(self) -> str:
        return f"Ranks({self.rank} of {self.size})"


def ranks_of(where: str, argument: str, mesh: DeviceMesh | None) -> Ranks:
    """The ranks of a one-dimensional mesh, such as ``mesh["ep"]``; None: this rank alone.

    Raises:
        ValueError: no mesh, or one with several dimensions.
    """
    from torch.distributed.device_mesh import DeviceMesh  # at call time: importing sonic stays cheap

    if mesh is None:
        return Ranks(None)
    if not isinstance(mesh, DeviceMesh):
        raise argument_error(where, argument, f"a {type(mesh).__name__}", "a one-dimensional DeviceMesh or None")
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names or tuple(f"dim {dim}" for dim in range(mesh.ndim))
        wanted = f"one-dimensional, such as mesh[{names[-1]!r}]"
        raise argument_error(where, argument, f"a mesh of {mesh.ndim} dimensions {tuple(names)}", wanted)
    return Ranks(mesh)


def part_offsets(size: int, num_parts: int) -> list[int]:
    """Where the parts of a dimension begin, and where the last ends: ``num_parts + 1`` numbers.

    All parts have ``ceil(size / num_parts)`` entries until nothing is left, as ``torch.chunk`` and DTensor's ``Shard``
    cut; the last parts may be smaller, or empty.
    """
    step = -(-size // num_parts)
    return [min(part * step, size) for part in range(num_parts + 1)]


def joint_mesh(where: str, meshes: dict[str, DeviceMesh | None]) -> DeviceMesh:
    """The mesh whose dimensions are these one-dimensional ones, in the order that they have in their common root.

    Args:
        where: the public name to blame.
        meshes: argument -> mesh; None is passed over, at least one is given.

    Raises:
        ValueError: several meshes that are not named slices of one mesh.
    """
    given = {argument: mesh for argument, mesh in meshes.items() if mesh is not None}
    if len(given) == 1:
        return next(iter(given.values()))
    roots = [_root_of(mesh) for mesh in given.values()]
    names = {argument: (mesh.mesh_dim_names or ("",))[0] for argument, mesh in given.items()}
    root_names = roots[0].mesh_dim_names or ()
    wanted = 'slices of one mesh by name, such as mesh["ep"] and mesh["tp"]'
    if any(root != roots[0] for root in roots[1:]) or not all(name in root_names for name in names.values()):
        arguments = " and ".join(given)
        raise argument_error(where, arguments, f"dimensions {tuple(names.values())} of different meshes", wanted)
    return roots[0][tuple(name for name in root_names if name in names.values())]


def _root_of(mesh: DeviceMesh) -> DeviceMesh:
    if hasattr(mesh, "_get_root_mesh"):
        root: DeviceMesh = mesh._get_root_mesh()
        return root
    from torch.distributed import device_mesh  # torch before 2.10

    root = device_mesh._mesh_resources.get_root_mesh(mesh)  # type: ignore[attr-defined]
    return root
