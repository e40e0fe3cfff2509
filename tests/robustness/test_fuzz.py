"""Drawn cases of every kind; how any number of them is drawn is in ``tests/robustness/fuzz.py``."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import sonic
from sonic.kernels import ops, reference
from tests.robustness import fuzz
from tests.robustness.cases import GEMMS, KINDS, Case, any_case, random_case

pytestmark = [
    pytest.mark.usefixtures("poison_empty"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of infinities in Triton's interpreter
]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="about CPU tensors: Triton runs on the GPU here"
)

few = settings(max_examples=12, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", KINDS)
def test_drawn(kind: str) -> None:
    @few
    @given(any_case(kinds=(kind,)))
    def holds(case: Case) -> None:
        fuzz.check(case)

    holds()


@pytest.mark.parametrize("kind", KINDS)
def test_numbered(kind: str) -> None:
    """Cases of the command, which draws evenly where hypothesis prefers small values."""
    for number in range(12):
        fuzz.check(random_case(0, number, (kind,)))


@needs_triton
@needs_interpreter
def test_triton() -> None:
    for kind in ("up_proj", "combine", "topk_softmax"):
        fuzz.check(random_case(7, 0, (kind,), triton_share=1.0))


@pytest.mark.slow
@needs_triton
@needs_interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_triton_of_every_kind(kind: str) -> None:
    for number in range(20):
        fuzz.check(random_case(8, number, (kind,), triton_share=1.0))


@pytest.mark.slow
def test_twenty_thousand() -> None:
    counts: Counter[str] = Counter()
    for number in range(20_000):
        case = random_case(9, number)
        counts[case.kind] += 1
        fuzz.check(case)
    assert min(counts[kind] for kind in KINDS) > 1000


def test_a_failure_says_how_to_try_it_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(1, 2)
    assert Case.of_json(case.line().split("'")[1]) == case
    monkeypatch.setitem(fuzz.CHECKS, "combine", lambda case: pytest.fail("broken", pytrace=False))
    monkeypatch.setattr(fuzz, "check", lambda case: 1 / (case.kind != "combine"))
    assert fuzz.main(["--cases", "30", "--kinds", "combine", "plan_topk"]) == 1
    said = capsys.readouterr().out
    assert "FAILED ZeroDivisionError" in said and "python -m tests.robustness.fuzz --case '{" in said
    assert "30 cases" in said and "failures: {'combine'" in said


# ---------------------------------------------------------------- it finds what is planted


def scaled(number: int) -> Callable[[Any], Any]:
    """One of several results, a little wrong."""

    def change(original: Any) -> Any:
        def wrong(*args: Any) -> Any:
            return tuple(value * 1.001 if at == number else value for at, value in enumerate(original(*args)))

        return wrong

    return change


def leaking(original: Any) -> Any:
    """NaN of one token reaches the others, multiplied by zero."""

    def wrong(x: Any, *args: Any) -> Any:
        first, *others = original(x, *args)
        return first + 0 * x.sum(), *others

    return wrong


def without_signs(original: Any) -> Any:
    """Scores lose their signs."""

    def wrong(a: Any, w2: Any, b2: Any, scores: Any, offset: Any) -> Any:
        return original(a, w2, b2, None if scores is None else scores.abs(), offset)

    return wrong


def with_rows_of_nobody(original: Any) -> Any:
    """Rows after the last offset come out as ones."""

    def wrong(*args: Any) -> Any:
        out = original(*args)
        out[int(args[-1][-1]) :] = 1
        return out

    return wrong


def without_a_row(original: Any) -> Any:
    """The first row of all is not summed."""

    def wrong(y: Any, scores: Any, row_by_token: Any, offset: Any, residual: Any = None) -> Any:
        y = y.clone()
        y[:1] = 0
        return original(y, scores, row_by_token, offset, residual)

    return wrong


def changing_its_argument(original: Any) -> Any:
    def wrong(logits: Any, *args: Any) -> Any:
        result = original(logits, *args)
        logits += 1
        return result

    return wrong


def rolled(original: Any) -> Any:
    """The tokens of a plan, one row further."""

    def wrong(*args: Any) -> Any:
        offset, token, *others = original(*args)
        return offset, token.roll(1), *others

    return wrong


@pytest.mark.parametrize(
    ("op", "change", "kinds"),
    [
        ("up_proj", leaking, ("up_proj",)),
        ("experts", leaking, ("moe_mlp", "expert_mlp")),
        ("experts", scaled(0), ("experts", "layer")),
        ("experts_bwd", scaled(1), ("experts_bwd", "moe_mlp")),
        ("down_proj", without_signs, ("down_proj",)),
        ("down_proj", with_rows_of_nobody, ("down_proj",)),
        ("up_proj_bwd_weight", scaled(1), ("up_proj_bwd_weight",)),
        ("down_proj_bwd_input", scaled(2), ("down_proj_bwd_input",)),
        ("combine", without_a_row, ("combine",)),
        ("topk_softmax", scaled(0), ("topk_softmax",)),
        ("topk_softmax", changing_its_argument, ("topk_softmax",)),
        ("best_of_columns", scaled(0), ("best_of_columns",)),
        ("build_plan", rolled, ("plan_topk", "plan_pairs")),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_planted_is_found(
    op: str, change: Callable[[Any], Any], kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, op, change(getattr(reference, op)))
    for kind in kinds:
        found = 0
        for number in range(60):
            try:
                fuzz.check(random_case(3, number, (kind,)))
            except AssertionError:
                found = 1
                break
        assert found, f"{kind}: nothing was found in 60 cases"


def test_every_kind_of_op_is_drawn() -> None:
    tried = {*GEMMS, "experts", "experts_bwd", "topk_softmax", "topk_softmax_bwd", "best_of_columns", "build_plan"}
    assert tried == set(sonic.kernels.dispatch.OPS)


# ---------------------------------------------------------------- what probing by hand found


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


Y, NONE = torch.ones(4, 3), torch.empty(0, dtype=torch.int32)
W1, W2 = torch.ones(1, 4, 3), torch.ones(1, 3, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.build_plan(int32(0, 1), None, -2, 3),
            "sonic.build_plan: num_tokens is -2, expected an integer >= 0",
        ),
        (
            lambda: ops.build_plan(int32(0, 1), int32(0, 1), 2, -1),
            "sonic.build_plan: num_experts is -1, expected an integer >= 0",
        ),
        (
            lambda: ops.build_plan(int32(0, 1), None, 2, 2**31),
            "sonic.build_plan: num_experts is 2147483648, expected below 2**31",
        ),
        (
            lambda: ops.combine(Y, None, int32(0, 1, 2, 3), NONE),
            "sonic.combine: token_offset_T1 is (0,), expected at least one entry, the 0 that comes first",
        ),
        (
            lambda: ops.combine(Y, None, int32(0, 1, 2, 3), int32(0, 4, 2, 4)),
            "sonic.kernels.reference: token_offset_T1 is from 0 to 4, falling on the way, "
            "expected 0 first, then never falling, at most R = 4",
        ),
        (
            lambda: ops.combine(Y, None, int32(0, 1, 2, 3), int32(1, 2, 4)),
            "sonic.kernels.reference: token_offset_T1 is from 1 to 4, "
            "expected 0 first, then never falling, at most R = 4",
        ),
        (
            lambda: ops.combine(Y, None, int32(0, 1, 2, 3), int32(0, 2, 9)),
            "sonic.kernels.reference: token_offset_T1 is from 0 to 9, "
            "expected 0 first, then never falling, at most R = 4",
        ),
        (
            lambda: ops.up_proj_bwd_weight(Y, Y, None, NONE),
            "sonic.up_proj_bwd_weight: expert_offset_E1 is (0,), expected at least one entry, the 0 that comes first",
        ),
        (
            lambda: ops.experts(
                Y, W1, W2, None, None, None, int32(0, 2), int32(0, 3), None, None, "swiglu", "concatenated"
            ),
            "sonic.experts: row_by_token_R is None, expected a tensor, as token_of_row_R: "
            "all three maps of a plan, or none",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        call()
    assert str(refused.value) == message


@pytest.mark.parametrize("wrong", [-1, 4, 2**31 - 1])
def test_an_index_beyond_the_tensor_is_never_followed(wrong: int) -> None:
    """Single ops trust the values of a plan; on a CPU torch's own gathers still refuse what is no row or token."""
    calls: list[Callable[[], object]] = [
        lambda: ops.combine(Y, None, int32(0, 1, 2, wrong), int32(0, 2, 4)),
        lambda: ops.up_proj(Y, W1, None, int32(0, wrong), int32(0, 2), "swiglu", "concatenated"),
        lambda: ops.up_proj_bwd_weight(torch.ones(2, 4), Y, int32(0, wrong), int32(0, 2)),
        lambda: ops.topk_softmax_bwd(torch.ones(2, 1), int32(0, wrong)[:, None], torch.ones(2, 1), None, 3),
    ]
    for call in calls:
        with pytest.raises((IndexError, RuntimeError)):
            call()
