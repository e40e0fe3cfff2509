"""The routing plan: index maps that fit together, for any routing, built without asking an accelerator for a value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from sonic import RoutingPlan
from sonic.kernels import ops
from sonic.kernels.reference.routing import build_plan, topk_softmax
from sonic.routing import RoutingMetrics
from sonic.shapes import tokens_per_run

ARRAYS = ("expert_offset_E1", "token_of_row_R", "slot_of_row_R", "row_by_token_R", "token_offset_T1")
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# (T, E, K) that the test suites of other MoE libraries take, decode batches to large ones.
GRID = [
    (10, 8, 2),
    (236, 16, 4),
    (1024, 128, 8),
    (8192, 64, 4),
    (1000, 96, 7),
    (50, 384, 3),
    (2048, 512, 10),
]


# ---------------------------------------------------------------- what a plan has to be


def random_topk(num_tokens: int, num_experts: int, top_k: int, skew: str = "even") -> Tensor:
    """(T, K) distinct experts per token: all alike, few of them ever used, or one that every token takes."""
    liking_TE = torch.rand(num_tokens, num_experts)
    if skew == "few":
        liking_TE[:, min(top_k, num_experts - 1) + 1 :] -= 1
    elif skew == "one":
        liking_TE[:, num_experts // 2] += 1
    return liking_TE.argsort(dim=1, descending=True)[:, :top_k]


def load_of(expert_TK: Tensor, num_experts: int) -> Tensor:
    """What ``topk_softmax`` counts: (E, C), as a sum over the pairs one by one."""
    run = tokens_per_run(expert_TK.shape[1])
    load_EC = torch.zeros(num_experts, -(-expert_TK.shape[0] // run) + 1, dtype=torch.int32)
    for token, experts in enumerate(expert_TK.tolist()):
        load_EC[experts, token // run] += 1
    return load_EC


def pairs_of(expert_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of a (T, K) table, slot by slot."""
    num_tokens, top_k = expert_TK.shape
    return torch.arange(num_tokens).repeat_interleave(top_k), expert_TK.reshape(-1).long()


def check_plan(plan: RoutingPlan, token_P: Tensor, expert_P: Tensor, num_tokens: int, num_experts: int) -> None:
    """Hold every array of a plan against the pairs that it was built from."""
    num_rows = token_P.shape[0]
    token_P, expert_P = token_P.long(), expert_P.long()
    assert (plan.num_tokens, plan.num_experts, plan.num_rows) == (num_tokens, num_experts, num_rows)
    for name in ARRAYS:
        array = getattr(plan, name)
        assert array.dtype == torch.int32 and array.is_contiguous() and array.device == plan.device, name
    offset_E1, token_R, slot_R, row_by_token_R, token_offset_T1 = (getattr(plan, name).long() for name in ARRAYS)

    # rows are a permutation of the slots, and say their own token
    assert torch.equal(slot_R.sort().values, torch.arange(num_rows))
    assert torch.equal(token_R, token_P[slot_R])

    # offsets: 0 first, R last, never falling, as far apart as there are rows
    count_E = torch.bincount(expert_P, minlength=num_experts)
    assert offset_E1.shape == (num_experts + 1,) and offset_E1[0] == 0 and offset_E1[-1] == num_rows
    assert torch.equal(offset_E1.diff(), count_E)
    assert plan.tokens_per_expert().dtype == torch.int32
    assert torch.equal(plan.tokens_per_expert().long(), count_E)

    # the rows of expert e are its pairs, tokens ascending
    expert_R = torch.arange(num_experts).repeat_interleave(count_E)
    assert torch.equal(expert_P[slot_R], expert_R)
    key_R = expert_R * max(num_tokens, 1) + token_R
    assert (key_R.diff() > 0).all()

    # by token: every row once, those of token t between its offsets, experts ascending
    assert torch.equal(row_by_token_R.sort().values, torch.arange(num_rows))
    token_count_T = torch.bincount(token_P, minlength=num_tokens)
    assert token_offset_T1.shape == (num_tokens + 1,) and token_offset_T1[0] == 0
    assert torch.equal(token_offset_T1.diff(), token_count_T)
    assert torch.equal(token_R[row_by_token_R], torch.arange(num_tokens).repeat_interleave(token_count_T))


shapes = st.tuples(st.integers(0, 40), st.integers(1, 23), st.integers(1, 23), st.sampled_from(("even", "few", "one")))


@given(shape=shapes, dtype=st.sampled_from(INDEX_DTYPES), seed=st.integers(0, 2**31))
def test_from_topk(shape: tuple[int, int, int, str], dtype: torch.dtype, seed: int) -> None:
    num_tokens, num_experts, top_k, skew = shape
    torch.manual_seed(seed)
    expert_TK = random_topk(num_tokens, num_experts, min(top_k, num_experts), skew)
    plan = RoutingPlan.from_topk(expert_TK.to(dtype), num_experts)
    assert plan.scores_shape == expert_TK.shape and plan.top_k == expert_TK.shape[1]
    check_plan(plan, *pairs_of(expert_TK), num_tokens, num_experts)
    # the map back from slot to row lists the rows token by token, in the order of their slots
    row_of_slot_P = torch.empty(plan.num_rows, dtype=torch.int64)
    row_of_slot_P[plan.slot_of_row_R.long()] = torch.arange(plan.num_rows)
    assert torch.equal(plan.slot_of_row_R.long()[row_of_slot_P], torch.arange(plan.num_rows))
    assert torch.equal(plan.row_by_token_R.long(), row_of_slot_P)


@st.composite
def pair_sets(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    """Distinct pairs in random order; tokens may have any number of experts, and experts no token."""
    num_tokens, num_experts = draw(st.integers(0, 30)), draw(st.integers(1, 17))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    chosen_TE = torch.rand(num_tokens, num_experts) < draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    token_P, expert_P = chosen_TE.nonzero(as_tuple=True)
    order_P = torch.randperm(token_P.shape[0])
    return token_P[order_P], expert_P[order_P], num_tokens, num_experts


@given(pairs=pair_sets(), token_dtype=st.sampled_from(INDEX_DTYPES), expert_dtype=st.sampled_from(INDEX_DTYPES))
def test_from_pairs(
    pairs: tuple[Tensor, Tensor, int, int], token_dtype: torch.dtype, expert_dtype: torch.dtype
) -> None:
    token_P, expert_P, num_tokens, num_experts = pairs
    plan = RoutingPlan.from_pairs(token_P.to(token_dtype), expert_P.to(expert_dtype), num_tokens, num_experts)
    assert plan.scores_shape == (token_P.shape[0],) and plan.top_k is None
    check_plan(plan, token_P, expert_P, num_tokens, num_experts)


@given(pairs=pair_sets(), seed=st.integers(0, 2**31))
def test_order_of_pairs_changes_only_the_slots(pairs: tuple[Tensor, Tensor, int, int], seed: int) -> None:
    token_P, expert_P, num_tokens, num_experts = pairs
    order_P = torch.randperm(token_P.shape[0], generator=torch.Generator().manual_seed(seed))
    first = RoutingPlan.from_pairs(token_P, expert_P, num_tokens, num_experts)
    second = RoutingPlan.from_pairs(token_P[order_P], expert_P[order_P], num_tokens, num_experts)
    for name in ("expert_offset_E1", "token_of_row_R", "token_offset_T1"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert torch.equal(order_P[second.slot_of_row_R.long()], first.slot_of_row_R.long())


@given(shape=shapes, seed=st.integers(0, 2**31))
def test_topk_and_its_pairs_give_the_same_plan(shape: tuple[int, int, int, str], seed: int) -> None:
    num_tokens, num_experts, top_k, skew = shape
    torch.manual_seed(seed)
    expert_TK = random_topk(num_tokens, num_experts, min(top_k, num_experts), skew)
    from_topk = RoutingPlan.from_topk(expert_TK, num_experts)
    from_pairs = RoutingPlan.from_pairs(*pairs_of(expert_TK), num_tokens, num_experts)
    for name in ARRAYS:
        assert torch.equal(getattr(from_topk, name), getattr(from_pairs, name)), name


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), GRID)
def test_grid_of_the_field(num_tokens: int, num_experts: int, top_k: int) -> None:
    expert_TK = random_topk(num_tokens, num_experts, top_k)
    check_plan(RoutingPlan.from_topk(expert_TK, num_experts), *pairs_of(expert_TK), num_tokens, num_experts)


@pytest.mark.parametrize("num_experts", [65_535, 65_536, 65_537, 131_073])
def test_more_experts_than_sixteen_bits_count(num_experts: int) -> None:
    """Expert ids on both sides of multiples of 65,536, whose low 16 bits alone would sort wrongly."""
    candidates = [0, 1, 2, 65_534, 65_535, 65_536, 65_537, 131_071, 131_072]
    candidate_C = torch.tensor([expert for expert in candidates if expert < num_experts])
    expert_TK = candidate_C[torch.rand(50, len(candidate_C)).argsort(dim=1)[:, :3]]
    check_plan(RoutingPlan.from_topk(expert_TK, num_experts), *pairs_of(expert_TK), 50, num_experts)


def test_more_tokens_than_sixteen_bits_count() -> None:
    num_tokens = 140_000
    token_P = torch.cat(
        (torch.randperm(num_tokens)[:500], torch.arange(65_530, 65_545), torch.tensor([num_tokens - 1]))
    )
    expert_P = torch.randint(5, token_P.shape)
    pair_P = torch.unique(token_P * 5 + expert_P)
    pair_P = pair_P[torch.randperm(pair_P.shape[0])]
    plan = RoutingPlan.from_pairs(pair_P // 5, pair_P % 5, num_tokens, 5)
    check_plan(plan, pair_P // 5, pair_P % 5, num_tokens, 5)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [(0, 4, 2), (0, 1, 1), (1, 1, 1), (7, 1, 1), (1, 7, 7), (5, 7, 7), (9, 13, 1), (6, 13, 5)],
)
def test_edges_of_topk(num_tokens: int, num_experts: int, top_k: int) -> None:
    for skew in ("even", "few", "one"):
        expert_TK = random_topk(num_tokens, num_experts, top_k, skew)
        check_plan(RoutingPlan.from_topk(expert_TK, num_experts), *pairs_of(expert_TK), num_tokens, num_experts)


def test_one_expert_takes_all() -> None:
    plan = RoutingPlan.from_topk(torch.full((6, 1), 2), 4)
    assert plan.expert_offset_E1.tolist() == [0, 0, 0, 6, 6]
    assert plan.token_of_row_R.tolist() == plan.slot_of_row_R.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(0, 1), (0, 5), (4, 3)])
def test_no_pairs(num_tokens: int, num_experts: int) -> None:
    none_P = torch.zeros(0, dtype=torch.int64)
    check_plan(RoutingPlan.from_pairs(none_P, none_P, num_tokens, num_experts), none_P, none_P, num_tokens, num_experts)


def test_strided_indices() -> None:
    expert_TK = random_topk(9, 6, 3)
    wanted = RoutingPlan.from_topk(expert_TK, 6)
    strided = RoutingPlan.from_topk(expert_TK.t().contiguous().t(), 6)
    token_P, expert_P = pairs_of(expert_TK)
    every_second = RoutingPlan.from_pairs(token_P.repeat_interleave(2)[::2], expert_P.repeat_interleave(2)[1::2], 9, 6)
    for name in ARRAYS:
        assert torch.equal(getattr(strided, name), getattr(wanted, name)), name
        assert torch.equal(getattr(every_second, name), getattr(wanted, name)), name


def test_a_plan_does_not_follow_its_indices() -> None:
    expert_TK = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)
    plan = RoutingPlan.from_topk(expert_TK, 3)
    before = [getattr(plan, name).clone() for name in ARRAYS]
    expert_TK.fill_(0)
    assert all(torch.equal(getattr(plan, name), array) for name, array in zip(ARRAYS, before, strict=True))


# ---------------------------------------------------------------- what is refused


@given(pairs=pair_sets(), data=st.data())
def test_a_pair_that_comes_twice_is_refused(pairs: tuple[Tensor, Tensor, int, int], data: st.DataObject) -> None:
    token_P, expert_P, num_tokens, num_experts = pairs
    if token_P.shape[0] == 0:
        return
    again = data.draw(st.integers(0, token_P.shape[0] - 1))
    place = data.draw(st.integers(0, token_P.shape[0]))
    token, expert = int(token_P[again]), int(expert_P[again])
    token_P = torch.cat((token_P[:place], token_P[again : again + 1], token_P[place:]))
    expert_P = torch.cat((expert_P[:place], expert_P[again : again + 1], expert_P[place:]))
    with pytest.raises(ValueError, match=rf"a duplicate \(token {token} goes to expert {expert} more than once\)"):
        RoutingPlan.from_pairs(token_P, expert_P, num_tokens, num_experts)


@given(shape=shapes, wrong=st.sampled_from(("-1", "E", "far")), seed=st.integers(0, 2**31))
def test_an_expert_out_of_range_is_refused(shape: tuple[int, int, int, str], wrong: str, seed: int) -> None:
    num_tokens, num_experts, top_k, skew = shape
    torch.manual_seed(seed)
    expert_TK = random_topk(num_tokens + 1, num_experts, min(top_k, num_experts), skew)
    value = {"-1": -1, "E": num_experts, "far": 2**40}[wrong]
    expert_TK[torch.randint(num_tokens + 1, ()), torch.randint(expert_TK.shape[1], ())] = value
    with pytest.raises(ValueError, match=rf"expert_index is out of range \({value}\)"):
        RoutingPlan.from_topk(expert_TK, num_experts)
    with pytest.raises(ValueError, match=rf"expert_index is out of range \({value}\)"):
        RoutingPlan.from_pairs(*pairs_of(expert_TK), num_tokens + 1, num_experts)


@pytest.mark.parametrize("token", [-1, 5, 2**33])
def test_a_token_out_of_range_is_refused(token: int) -> None:
    with pytest.raises(ValueError, match=rf"token_index is out of range \({token}\), expected 0 <= token_index < 5"):
        RoutingPlan.from_pairs(torch.tensor([0, token, 1]), torch.tensor([0, 1, 2]), 5, 3)


def test_pairs_for_no_token_are_refused() -> None:
    with pytest.raises(ValueError, match="token_index is out of range"):
        RoutingPlan.from_pairs(torch.tensor([0]), torch.tensor([0]), 0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.complex64])
def test_indices_that_are_no_integers_are_refused(dtype: torch.dtype) -> None:
    good, bad = torch.zeros(1, dtype=torch.int64), torch.zeros(1).to(dtype)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"from_topk: expert_index is {name}"):
        RoutingPlan.from_topk(bad[:, None], 3)
    with pytest.raises(ValueError, match=f"from_pairs: token_index is {name}"):
        RoutingPlan.from_pairs(bad, good, 1, 3)
    with pytest.raises(ValueError, match=f"from_pairs: expert_index is {name}"):
        RoutingPlan.from_pairs(good, bad, 1, 3)


# ---------------------------------------------------------------- load figures


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    tile=st.sampled_from((1, 2, 3, 16, 128)),
    data=st.data(),
)
def test_padding_to_tiles(counts: list[int], tile: int, data: st.DataObject) -> None:
    expert_P = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    token_P = torch.cat([torch.arange(count) for count in counts])
    plan = RoutingPlan.from_pairs(token_P, expert_P, 40, len(counts))
    padded = sum(-(-count // tile) * tile for count in counts)
    rows = plan.rows_with_padding(tile)
    assert rows.shape == () and int(rows) == padded
    waste = RoutingMetrics(plan).padding_waste(tile)
    assert waste.shape == () and waste.dtype == torch.float32 and 0 <= float(waste) < 1
    torch.testing.assert_close(waste, torch.tensor(1 - sum(counts) / padded if padded else 0.0))
    load = RoutingMetrics(plan).max_over_mean_load
    torch.testing.assert_close(load, torch.tensor(max(counts) * len(counts) / sum(counts) if sum(counts) else 1.0))


def test_runs_hold_at_most_256_slots_and_divide_sequences() -> None:
    for top_k in range(1, 600):
        run = tokens_per_run(top_k)
        assert run & (run - 1) == 0 and (run * top_k <= 256 < 2 * run * top_k or run == 1)


def test_plans_of_a_load_that_is_known() -> None:
    expert_TK = random_topk(150, 6, 4)
    wanted, load_EC = RoutingPlan.from_topk(expert_TK, 6), load_of(expert_TK, 6)
    plan = RoutingPlan.from_topk(expert_TK, 6, load=load_EC)
    assert all(torch.equal(getattr(plan, name), getattr(wanted, name)) for name in ARRAYS)
    assert torch.equal(plan.tokens_per_expert(), load_EC.sum(1))
    load_EC[:2, 0] += torch.tensor([1, -1])
    with pytest.raises(ValueError, match=r"^sonic\.RoutingPlan: load is not that of expert_index, expected what topk"):
        RoutingPlan.from_topk(expert_TK, 6, load=load_EC)
    with Pretend(), pytest.raises(RuntimeError, match="load is not that of expert_index"):
        build_plan(expert_TK.reshape(-1), None, 150, 6, load_EC, 64)


@pytest.mark.parametrize(
    ("load", "pairs", "message"),
    [
        (torch.zeros(6, 2, dtype=torch.int32), False, r"load_EC is \(6, 2\), expected \(E, C\) = \(6, 4\)"),
        (torch.zeros(5, 4, dtype=torch.int32), False, r"load_EC is \(5, 4\), expected \(E, C\) = \(6, 4\)"),
        (torch.zeros(6, 4), False, "load_EC is float32, expected int32"),
        (torch.zeros(6, 4, dtype=torch.int32, device="meta"), False, "load_EC is on meta, expected on cpu"),
        (torch.zeros(6, 4, dtype=torch.int32), True, "load_EC is a tensor, expected None with token_of_slot_P"),
    ],
)
def test_a_load_of_another_form_is_refused(load: Any, pairs: bool, message: str) -> None:
    expert_P = random_topk(150, 6, 4).reshape(-1)
    token_P = torch.arange(150).repeat_interleave(4) if pairs else None
    with pytest.raises(ValueError, match=f"^sonic.build_plan: {message}"):
        ops.build_plan(expert_P, token_P, 150, 6, load)


@pytest.mark.parametrize(
    ("load", "was"),
    [([0] * 6, "a list"), (torch.zeros(6, dtype=torch.int32), r"\(6,\)"), (torch.zeros(5, 3), r"\(5, 3\)")],
)
def test_from_topk_refuses_what_is_no_load(load: Any, was: str) -> None:
    with pytest.raises(ValueError, match=f"^sonic.RoutingPlan.from_topk: load is {was}, expected "):
        RoutingPlan.from_topk(random_topk(150, 6, 4), 6, load=load)


def test_repr_tells_sizes() -> None:
    plan = RoutingPlan.from_topk(torch.tensor([[0, 1], [1, 2], [3, 0]]), 5)
    assert repr(plan) == "RoutingPlan(num_tokens=3, num_experts=5, num_rows=6, device='cpu')"


# ---------------------------------------------------------------- without looking at the data


class Pretend(TorchFunctionMode):
    """CPU tensors that say they are on another device and, if it is CUDA, fail where it would have to be waited for."""

    SYNCHRONISE = frozenset(
        "item tolist numpy nonzero cpu masked_select unique unique_consecutive equal argwhere bincount "
        "__bool__ __int__ __float__ __index__ __array__ __contains__".split()
    )

    def __init__(self, device: str = "cuda:0") -> None:
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return self.device
        name = getattr(func, "__name__", "")
        if self.device.type == "cuda" and name in self.SYNCHRONISE:
            raise AssertionError(f"{name} waits for the device")
        if self.device.type == "cuda" and name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, Tensor) and part.dtype == torch.bool for part in index):
                raise AssertionError(f"{name} with a mask waits for the device")
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def test_the_pretended_gpu_finds_what_waits() -> None:
    with Pretend():
        tensor = torch.arange(3, device="cuda")
        assert tensor.device.type == "cuda"
        for wait in (
            lambda: bool(tensor.any()),
            lambda: int(tensor[0]),
            lambda: tensor.tolist(),
            lambda: tensor[tensor > 1],
            lambda: tensor.nonzero(),
            lambda: tensor.numpy(),
        ):
            with pytest.raises(AssertionError, match="waits for the device"):
                wait()


@given(shape=shapes, seed=st.integers(0, 2**31))
def test_building_on_a_gpu_waits_for_nothing(shape: tuple[int, int, int, str], seed: int) -> None:
    """The path of accelerators runs to its end without a value of a tensor, and gives what the CPU's path gives."""
    num_tokens, num_experts, top_k, skew = shape
    torch.manual_seed(seed)
    expert_TK = random_topk(num_tokens, num_experts, min(top_k, num_experts), skew)
    token_P, expert_P = pairs_of(expert_TK)
    order_P = torch.randperm(token_P.shape[0])
    token_P, expert_P = token_P[order_P], expert_P[order_P]
    load_EC, run = load_of(expert_TK, num_experts), tokens_per_run(expert_TK.shape[1])
    with Pretend():
        from_topk = build_plan(expert_TK.reshape(-1), None, num_tokens, num_experts)
        from_pairs = build_plan(expert_P, token_P, num_tokens, num_experts)
        by_load = build_plan(expert_TK.reshape(-1), None, num_tokens, num_experts, load_EC, run)
    for arrays, wanted in (
        (by_load, RoutingPlan.from_topk(expert_TK, num_experts)),
        (from_topk, RoutingPlan.from_topk(expert_TK, num_experts)),
        (from_pairs, RoutingPlan.from_pairs(token_P, expert_P, num_tokens, num_experts)),
    ):
        for name, array in zip(ARRAYS, arrays, strict=True):
            assert array.dtype == torch.int32 and torch.equal(array, getattr(wanted, name)), name


def test_figures_on_a_gpu_wait_for_nothing() -> None:
    plan = RoutingPlan.from_topk(random_topk(9, 5, 2), 5)
    with Pretend():
        metrics = RoutingMetrics(plan)
        figures = [*dict(metrics).values(), metrics.padding_waste(16)]
        topk_softmax(torch.randn(3, 4), 2, "softmax", True, False, 1.0, None, 1, 1, 128)
    assert len(figures) == 9


@pytest.mark.parametrize(
    ("expert", "token", "message"),
    [
        ([0, 3], None, "expert_index is out of range, expected 0 <= expert_index < 3"),
        ([0, -1], None, "expert_index is out of range, expected 0 <= expert_index < 3"),
        ([0, 1], [0, 2], "token_index is out of range, expected 0 <= token_index < 2"),
        ([0, 1], [-1, 0], "token_index is out of range, expected 0 <= token_index < 2"),
        ([1, 1], [0, 0], "expert_index has a duplicate, expected each token at most once per expert"),
    ],
)
@pytest.mark.parametrize(
    ("device", "refusal"), [("cuda:0", RuntimeError), ("xpu:0", ValueError)], ids=["cuda: assertion", "xpu: waits"]
)
def test_wrong_indices_on_an_accelerator(
    device: str, refusal: type[Exception], expert: list[int], token: list[int] | None, message: str
) -> None:
    """CUDA has assertions that nobody waits for (and that torch raises at once here); others are waited for."""
    with Pretend(device), pytest.raises(refusal, match=f"^sonic.RoutingPlan: {message}$"):
        build_plan(torch.tensor(expert), None if token is None else torch.tensor(token), 2, 3)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(0, 3, 2), (7, 5, 1), (64, 8, 8)])
def test_plans_of_tensors_without_data(num_tokens: int, num_experts: int, top_k: int, device: str) -> None:
    """Under FakeTensorMode (compilers, memory estimates) a plan has the shapes and dtypes of a real one."""
    expert_TK = random_topk(num_tokens, num_experts, top_k)
    with FakeTensorMode():
        fake_TK = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
        token_P = torch.empty(num_tokens * top_k, dtype=torch.int64, device=device)
        fakes = (
            RoutingPlan.from_topk(fake_TK, num_experts),
            RoutingPlan.from_pairs(token_P, token_P, num_tokens, num_experts),
        )
    real = RoutingPlan.from_topk(expert_TK, num_experts)
    for fake in fakes:
        assert (fake.num_tokens, fake.num_experts, fake.num_rows) == (num_tokens, num_experts, num_tokens * top_k)
        for name in ARRAYS:
            array, wanted = getattr(fake, name), getattr(real, name)
            assert (array.shape, array.dtype, array.device) == (wanted.shape, wanted.dtype, torch.device(device)), name


def test_plans_on_the_meta_device() -> None:
    plan = RoutingPlan.from_topk(torch.empty(6, 2, dtype=torch.int64, device="meta"), 4)
    assert plan.device.type == "meta" and plan.num_rows == 12 and plan.tokens_per_expert().shape == (4,)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), GRID)
def test_building_on_a_real_gpu(num_tokens: int, num_experts: int, top_k: int) -> None:
    expert_TK = random_topk(num_tokens, num_experts, top_k)
    wanted = RoutingPlan.from_topk(expert_TK, num_experts)
    device_TK = expert_TK.cuda()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = RoutingPlan.from_topk(device_TK, num_experts, backend="reference")
    finally:
        torch.cuda.set_sync_debug_mode(before)
    for name in ARRAYS:
        assert torch.equal(getattr(plan, name).cpu(), getattr(wanted, name)), name
