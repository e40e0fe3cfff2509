"""Residual blocks whose communication overlaps: the modules around :mod:`sonic.parallel.ladder`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sonic.parallel.compilers import outside_compilers
from sonic.parallel.early import Lane
from sonic.parallel.ladder import LadderState, Parts, Schedule
from sonic.parallel.mesh import ranks_of
from sonic.parallel.wiring import WIRINGS, Wiring
from sonic.shapes import argument_error, check_choice

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["LadderBlock", "LadderStack"]


class LadderBlock(nn.Module):
    """A decoder layer: two norms and two cores. Alone it is a standard layer; a :class:`LadderStack` wires it.

    The cores communicate nothing that the stack should hide. Under tensor parallelism they return this rank's part of a
    sum (column-parallel, then row-parallel linears with ``reduce="none"``); a core may be compiled, checkpointed or
    wrapped by FSDP-2, since no collective of the stack is inside.
    """

    def __init__(self, attention_norm: nn.Module, attention: nn.Module, mlp_norm: nn.Module, mlp: nn.Module) -> None:
        """
        Args:
            attention_norm, mlp_norm: (..., D) -> (..., D).
            attention: (..., D) -> (..., D), or a tuple that begins with it.
            mlp: the same; with a method ``begin``, as :class:`sonic.MoE` has it, it is run in parts.
        """
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def parts(self, wiring: str) -> Parts:
        """The four modules, to be run as ``wiring`` says."""
        return Parts(self.attention_norm, self.attention, self.mlp_norm, self.mlp, wiring)

    def forward(self, x: Tensor, *, mlp_inputs: Mapping[str, Any] | None = None, **attention_inputs: Any) -> Tensor:
        """The layer as ``standard``, on one rank: (..., D) -> (..., D)."""
        state = LadderState(x)
        Schedule(None).run_layer(self.parts("standard"), state, None, attention_inputs, mlp_inputs or {})
        return state.flush()


class LadderStack(nn.Module):
    """Layers, their wiring, and the schedule of their communication.

    Attributes:
        blocks: the layers; their parameters have the names and shapes that they have without a stack.
        wiring: what reads what; part of the model, to be kept in its config (:meth:`Wiring.to_config`).
        schedule: when what is sent; no part of the model, and free to change at any time.
    """

    def __init__(
        self,
        blocks: Iterable[LadderBlock],
        wiring: Wiring | str = "ladder",
        *,
        tp_mesh: DeviceMesh | None = None,
        overlap: str = "full",
        backward_order: str = "seqnr",
        sequence_parallel: bool = False,
        sequence_dim: int = -2,
        compute_dtype: torch.dtype | None = None,
        lane: Lane | None = None,
    ) -> None:
        """
        Args:
            blocks: from the embedding to the head.
            wiring: of each layer; a name means that one for all.
            tp_mesh: one-dimensional; its ranks hold the parts of each core. None: one rank.
            overlap, backward_order, sequence_parallel, sequence_dim, compute_dtype, lane: see
                :class:`sonic.parallel.ladder.Schedule`.

        Raises:
            ValueError: names or lengths that do not fit, or a layer that cannot be wired so.
        """
        super().__init__()
        where = "sonic.parallel.LadderStack"
        self.blocks = nn.ModuleList(blocks)
        if isinstance(wiring, str):
            check_choice(where, "wiring", wiring, WIRINGS)
            wiring = Wiring((wiring,) * len(self.blocks))
        if len(wiring) != len(self.blocks):
            wanted = f"one for the {len(self.blocks)} blocks of this stack"
            raise argument_error(where, "wiring", f"for {len(wiring)} layers", wanted)
        for index, (block, name) in enumerate(zip(self.blocks, wiring, strict=True)):
            if not isinstance(block, LadderBlock):
                raise argument_error(where, f"blocks[{index}]", f"a {type(block).__name__}", "a LadderBlock")
            if name in ("farskip", "shortcut") and not block.parts(name).is_moe:
                wanted = "'standard', 'parallel' or 'ladder': the MLP of this block is no sonic.MoE"
                raise argument_error(where, f"wiring[{index}]", repr(name), wanted)
        self.wiring = wiring
        self.schedule = Schedule(
            ranks_of(where, "tp_mesh", tp_mesh).group,
            overlap=overlap,
            backward_order=backward_order,
            sequence_parallel=sequence_parallel,
            sequence_dim=sequence_dim,
            compute_dtype=compute_dtype,
            lane=lane,
        )

    @outside_compilers
    def forward(self, x: Tensor, *, mlp_inputs: Mapping[str, Any] | None = None, **attention_inputs: Any) -> Tensor:
        """Run all layers.

        ``torch.compile`` of a model leaves this method alone and compiles what is around it; compile the cores
        themselves (``block.mlp.compile()``).

        Args:
            x: (..., S, D), equal on all tensor-parallel ranks.
            mlp_inputs: keyword arguments of every MLP.
            attention_inputs: those of every attention.

        Returns:
            The stream after the last layer, of the same shape, complete and equal on all tensor-parallel ranks.
        """
        parts = [cast(LadderBlock, block).parts(name) for block, name in zip(self.blocks, self.wiring, strict=True)]
        state = self.schedule.begin(x)
        for index, layer in enumerate(parts):
            following = parts[index + 1] if index + 1 < len(parts) else None
            self.schedule.run_layer(layer, state, following, attention_inputs, mlp_inputs or {})
        return self.schedule.end(state)

    def extra_repr(self) -> str:
        """Wiring and overlap."""
        return f"wiring={self.wiring.to_config()}, overlap={self.schedule.overlap!r}"
