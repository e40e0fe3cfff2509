"""The letters and names of the whole library, and the one form of an error about an argument.

Upper-case suffixes on local tensors name logical dimensions (never the sharding, and never on parameters or buffers,
whose names are checkpoint keys). Lower-case letters belong to the inside of GEMM kernels; in plain torch a lower-case
``r`` is a block of the rows R.

======  ======================================================================================  =====================
letter  meaning                                                                                 public argument
======  ======================================================================================  =====================
T       tokens in this call (batch x sequence, flat)
D       width of the model                                                                      ``hidden_size``
N       width of one expert                                                                     ``intermediate_size``
U       rows of the up projection: 2N with a gated activation, else N
E       experts (those on this rank)                                                            ``num_experts``
K       experts per token                                                                       ``top_k``
P       slots: (token, expert) pairs in the order of the caller's scores; T*K for top-K
R       routed rows, grouped by expert: P, unless a caller brings padding rows of its own
M       row tile of a grouped GEMM                                                              ``tile_rows``
C       columns of the load that top-K counts: one per run of tokens, and a spare one
======  ======================================================================================  =====================

A trailing 1 is "plus one": ``expert_offset_E1`` has E + 1 entries, the first is 0.

Index arrays say their direction:

====================  ===============================================================================================
``token_of_row_R``    row -> token
``slot_of_row_R``     row -> flat index into the scores that the plan was built with (token * K + k for top-K)
``row_by_token_R``    the rows, token by token; token t has ``[token_offset_T1[t] : token_offset_T1[t + 1]]`` of them
``expert_offset_E1``  rows of expert e are ``[expert_offset_E1[e] : expert_offset_E1[e + 1]]``
====================  ===============================================================================================

A path through one layer, in names::

    x_TD -> logits_TE -> scores_TK, expert_TK -> plan -> h_RU (kept for backward), a_RN -> y_RD -> out_TD
    dout_TD -> dh_RU, scaled_a_RN, dscores_R -> dw2_EDN;  dx_RD -> dx_TD;  dw1_EUD
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = [
    "argument_error",
    "check_choice",
    "check_dtype",
    "check_integer",
    "check_positive",
    "check_same",
    "check_shape",
    "load_columns",
    "tokens_per_run",
]


def argument_error(where: str, argument: str, was: object, wanted: str) -> ValueError:
    """Build the ``ValueError`` that every check of the library raises: where, which argument, what it was, what was
    wanted.

    Args:
        where: the public name that was called, such as ``"sonic.moe_mlp"``.
        argument: the argument's name.
        was: what the caller gave; printed as it is.
        wanted: what would have been right.
    """
    return ValueError(f"{where}: {argument} is {was}, expected {wanted}")


def check_shape(where: str, argument: str, tensor: Tensor, **dims: int | None) -> None:
    """Refuse a tensor whose shape is not ``dims``, given in order as letter=size; ``None`` leaves that size free.

    Raises:
        ValueError: ``sonic.moe_mlp: w1 is (8, 512, 1000), expected (E, U, D) = (8, 512, 1024)``.
    """
    if not isinstance(tensor, Tensor):
        raise argument_error(where, argument, f"a {type(tensor).__name__}", f"a tensor of shape ({', '.join(dims)})")
    shape = tensor.shape
    if len(shape) == len(dims) and all(
        want is None or have == want for have, want in zip(shape, dims.values(), strict=True)
    ):
        return
    letters = ", ".join(dims) + ("," if len(dims) == 1 else "")
    sizes = ", ".join(letter if want is None else str(want) for letter, want in dims.items()) + (
        "," if len(dims) == 1 else ""
    )
    wanted = f"({letters})" if all(want is None for want in dims.values()) else f"({letters}) = ({sizes})"
    raise argument_error(where, argument, tuple(shape), wanted)


def check_dtype(where: str, argument: str, tensor: Tensor, allowed: Iterable[torch.dtype]) -> None:
    """Refuse a tensor whose dtype is not one of ``allowed``.

    Raises:
        ValueError: naming the dtype that came and those that are served.
    """
    allowed = tuple(allowed)
    if tensor.dtype not in allowed:
        names = " or ".join(_short(dtype) for dtype in allowed)
        raise argument_error(where, argument, _short(tensor.dtype), names)


def check_integer(where: str, argument: str, tensor: Tensor) -> None:
    """Refuse an index tensor that is not of an integer dtype (float indices and masks are mistakes, not indices).

    Raises:
        ValueError: naming the dtype that came.
    """
    if not isinstance(tensor, Tensor):
        raise argument_error(where, argument, f"a {type(tensor).__name__}", "an integer tensor")
    check_dtype(where, argument, tensor, (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))


def check_same(
    where: str, reference: tuple[str, Tensor], others: Iterable[tuple[str, Tensor | None]], *, dtype: bool = True
) -> None:
    """Refuse tensors that are not on the device (and, unless told otherwise, of the dtype) of ``reference``; ``None``
    is passed over.

    Raises:
        ValueError: naming both arguments and what they are.
    """
    name, tensor = reference
    for other_name, other in others:
        if other is None:
            continue
        if other.device != tensor.device:
            raise argument_error(where, other_name, f"on {other.device}", f"on {tensor.device} like {name}")
        if dtype and other.dtype != tensor.dtype:
            raise argument_error(where, other_name, _short(other.dtype), f"{_short(tensor.dtype)} like {name}")


def check_positive(where: str, **sizes: int) -> None:
    """Refuse sizes that are no positive integers.

    Raises:
        ValueError: naming the argument and its value.
    """
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < 1:
            raise argument_error(where, name, repr(value), "a positive integer")


def check_choice(where: str, argument: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of the named choices.

    Raises:
        ValueError: listing the choices.
    """
    if value not in choices:
        raise argument_error(where, argument, repr(value), "one of " + ", ".join(repr(choice) for choice in choices))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tokens_per_run(top_k: int) -> int:
    """Tokens of a run in which top-K counts the load of the experts: the largest power of two within 256 / K, or 1.

    A stable parallel sort has to know where the rows of each run begin, for which a sum over all tokens does not do. A
    run has as many slots as one program can place; it is a power of two, so that sequences are whole runs.
    """
    return 1 << (max(256 // top_k, 1).bit_length() - 1)


def load_columns(num_tokens: int, top_k: int) -> int:
    """C: a column for each run of tokens, and one that stays zero.

    So there are never less than two of them where there is a token, and whoever traces with a symbolic number of tokens
    need not ask whether it fills a single run.
    """
    run = tokens_per_run(top_k)
    return (num_tokens + run - 1) // run + 1
