"""The same again: many times, from many threads, from inside its own backward, of a copy; nothing is left over."""

from __future__ import annotations

import copy
import gc
import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sonic
from sonic.routing import CapacityDropping, ExpertChoiceRouter, HashRouter, TokenRounding, TopKRouter
from tests.helpers import in_threads
from tests.robustness import fuzz
from tests.robustness.cases import KINDS, random_case

ROOT = Path(__file__).resolve().parents[2]
T, D, N, E, K = 37, 12, 10, 5, 2


def routers() -> dict[str, Callable[[], nn.Module]]:
    """One of every kind, without randomness but that of torch's generator."""

    def topk(**options: Any) -> TopKRouter:
        return TopKRouter(D, E, K, aux_loss_coeff=0.01, z_loss_coeff=0.001, **options)

    return {
        "top-k": topk,
        "bias": lambda: topk(score_function="sigmoid", enable_expert_bias=True, norm_topk_prob=True),
        "rounding": lambda: TokenRounding(topk(), tile_rows=4),
        "stochastic": lambda: TokenRounding(topk(), rule="stochastic", tile_rows=4),
        "capacity": lambda: CapacityDropping(topk(), capacity_factor=0.8),
        "expert choice": lambda: ExpertChoiceRouter(D, E, K),
        "hash": lambda: HashRouter(D, E, K, vocab_size=50),
    }


def layer_of(router: str = "top-k", **options: Any) -> sonic.MoE:
    return sonic.MoE(D, N, E, K, router=routers()[router](), bias=True, shared_intermediate_size=7, **options)


def inputs(router: str) -> dict[str, Any]:
    """What a router wants besides the tokens."""
    return {"token_ids": torch.arange(T) % 50} if router == "hash" else {}


def step(layer: sonic.MoE, x: Tensor, dy: Tensor, **more: Any) -> dict[str, Tensor]:
    """The output and every gradient; no ``.grad`` is touched."""
    x = x.detach().requires_grad_()
    y = layer(x, **more)
    leaves = {"x": x, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype), allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name in want:
        assert torch.equal(got[name], want[name]), f"{name} differs"


# ---------------------------------------------------------------- many times


@pytest.mark.usefixtures("poison_empty")
class TestFifty:
    @pytest.mark.parametrize("kind", KINDS)
    def test_reference(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fuzz, "REPEATS", 50)
        for number in range(2):
            fuzz.check(random_case(21, number, (kind,)))

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
    @pytest.mark.skipif(torch.cuda.is_available(), reason="about Triton's interpreter")
    @pytest.mark.parametrize("kind", KINDS)
    def test_triton(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fuzz, "REPEATS", 50)
        case = random_case(22, 0, (kind,), triton_share=1.0)
        fuzz.check(type(case)(**{**vars(case), "T": 3, "D": 5, "N": 5, "poison": ""}))

    def test_with_two_threads(self) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            layer = sonic.MoE(64, 48, 4, 2, router=TokenRounding(TopKRouter(64, 4, 2), tile_rows=16))
            x, dy = torch.randn(96, 64), torch.randn(96, 64)
            want = step(layer, x, dy)
            for _ in range(49):
                assert_bits(step(layer, x, dy), want)
        finally:
            torch.set_num_threads(before)


# ---------------------------------------------------------------- many threads


class TestThreads:
    @pytest.mark.parametrize("router", ["top-k", "rounding", "capacity", "expert choice", "hash"])
    @pytest.mark.parametrize("is_shared", [True, False], ids=["one layer", "a layer each"])
    def test_same_bits_as_alone(self, router: str, is_shared: bool) -> None:
        layers = [layer_of(router)] * 4 if is_shared else [layer_of(router) for _ in range(4)]
        data = [(torch.randn(T, D), torch.randn(T, D)) for _ in layers]
        want = [step(layer, x, dy, **inputs(router)) for layer, (x, dy) in zip(layers, data, strict=True)]

        def job(number: int) -> None:
            for _ in range(8):
                assert_bits(step(layers[number], *data[number], **inputs(router)), want[number])

        in_threads([lambda number=number: job(number) for number in range(4)])

    def test_autocast_is_of_one_thread(self) -> None:
        layer = layer_of()
        x, dy = torch.randn(T, D), torch.randn(T, D)
        plain = step(layer, x, dy)
        with torch.autocast("cpu", torch.bfloat16):
            cast = step(layer, x, dy)
        assert cast["y"].dtype == torch.bfloat16 and plain["y"].dtype == torch.float32

        def job(is_cast: bool) -> None:
            for _ in range(8):
                with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
                    assert_bits(step(layer, x, dy), cast if is_cast else plain)

        in_threads([lambda is_cast=is_cast: job(is_cast) for is_cast in (True, False, True, False)])

    def test_gradients_that_are_summed(self) -> None:
        """``backward`` of several threads into one layer: each gradient arrives once."""
        layer = layer_of()
        data = [(torch.randn(T, D), torch.randn(T, D)) for _ in range(4)]
        want = [step(layer, *pair) for pair in data]
        outputs = [layer(x) for x, _ in data]
        in_threads([lambda y=y, dy=dy: y.backward(dy) for y, (_, dy) in zip(outputs, data, strict=True)])
        for name, parameter in layer.named_parameters():
            total = sum(grads[name].double() for grads in want)
            assert isinstance(total, Tensor) and parameter.grad is not None
            assert torch.allclose(parameter.grad.double(), total, rtol=1e-5, atol=1e-5), name


# ---------------------------------------------------------------- from inside itself


class TestFromInside:
    def test_a_hook_that_trains_the_layer_in_its_own_backward(self) -> None:
        layer = layer_of()
        x, dy = torch.randn(T, D), torch.randn(T, D)
        want = step(layer, x, dy)
        inner: list[dict[str, Tensor]] = []

        def again(grad: Tensor) -> None:
            if len(inner) < 3:
                mine: dict[str, Tensor] = {}
                inner.append(mine)  # first, so that the inner ones stop
                with torch.enable_grad():
                    mine.update(step(layer, x, dy))

        handle = layer.w2.register_hook(again)
        assert_bits(step(layer, x, dy), want)
        handle.remove()
        assert len(inner) == 3
        for one in inner:
            assert_bits(one, want)

    def test_a_router_that_calls_another_layer(self) -> None:
        class Asking(TopKRouter):
            other = None

            def forward(self, x_TD: Tensor, **more: Any) -> Any:
                assert self.other is not None
                return super().forward(x_TD + self.other(x_TD), **more)

        layer, other = sonic.MoE(D, N, E, K, router=Asking(D, E, K)), layer_of()
        object.__setattr__(layer.router, "other", other)
        x = torch.randn(T, D)
        plain = sonic.MoE(D, N, E, K)
        plain.load_state_dict(layer.state_dict())
        with torch.no_grad():
            routing = plain.router(x + other(x))
            want = sonic.moe_mlp(x, plain.w1, plain.w2, routing.scores, routing.plan)
            assert torch.equal(layer(x), want)

    def test_one_graph_twice_after_another(self) -> None:
        """Backward of an old graph after newer ones of the same layer."""
        layer = layer_of()
        x, dy = torch.randn(T, D), torch.randn(T, D)
        want = step(layer, x, dy)
        old = layer(x)
        for _ in range(3):
            step(layer, torch.randn(5, D), torch.randn(5, D))
        for _ in range(2):
            grads = torch.autograd.grad(old, list(layer.parameters()), dy, retain_graph=True)
            assert_bits(dict(zip(dict(layer.named_parameters()), grads, strict=True)), {
                name: grad for name, grad in want.items() if name not in ("x", "y")
            })  # fmt: skip


# ---------------------------------------------------------------- nothing is left over

LEAKS = """
import gc, sys
import torch
from tests.robustness.test_repeated import D, T, inputs, layer_of, routers

torch.set_num_threads(1)
layers = {name: layer_of(name, save=save) for name, save in zip(routers(), ["preactivation", "input"] * 4)}
optimizers = {name: torch.optim.SGD(layer.parameters(), lr=1e-3) for name, layer in layers.items()}
data = [torch.randn(size, D) for size in (T, 25, 30)]

def train(steps):
    for number in range(steps):
        name = list(layers)[number % len(layers)]
        x = data[0 if name == "hash" else number // len(layers) % len(data)]
        optimizers[name].zero_grad()
        layers[name](x, **inputs(name)).square().mean().backward()
        optimizers[name].step()

def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def tensors():
    gc.collect()
    return sum(isinstance(item, torch.Tensor) for item in gc.get_objects())

train(1200)  # allocators and free lists fill their pools, mostly in the first few hundred
live, resident, blocks = tensors(), rss(), sys.getallocatedblocks()
train(1000)
found = tensors() - live, sys.getallocatedblocks() - blocks, rss() - resident
print(*found)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's account of memory")
def test_a_thousand_steps_leave_nothing() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-W", "ignore", "-c", LEAKS]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    live, blocks, resident = map(int, done.stdout.split())
    print(f"1,000 steps: {live:+} tensors, {blocks:+} blocks of Python objects, {resident:+} bytes resident")
    assert live == 0
    assert blocks <= 500  # an object that stays after every step would be 1,000
    assert resident <= 2**20


def test_what_a_failed_call_held_is_freed() -> None:
    layer = layer_of()
    x = torch.randn(T, D)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(item, Tensor) for item in gc.get_objects())

    def fail() -> None:
        with pytest.raises(ValueError):
            layer(x.double())
        with pytest.raises(ValueError):
            layer(torch.randn(T, D - 1))
        y = layer(x)
        del y  # a graph that is never gone through

    fail()
    before = tensors()
    for _ in range(20):
        fail()
    assert tensors() <= before


# ---------------------------------------------------------------- copies


class TestCopies:
    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    @pytest.mark.parametrize("router", list(routers()))
    def test_a_copy_computes_the_same_and_is_its_own(self, router: str, how: str, tmp_path: Path) -> None:
        layer, more = layer_of(router), inputs(router)
        x, dy = torch.randn(T, D), torch.randn(T, D)
        layer(x, **more).backward(dy)
        layer.zero_grad()
        if how == "deepcopy":
            other = copy.deepcopy(layer)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(layer))
        else:
            torch.save(layer, tmp_path / "layer.pt")
            other = torch.load(tmp_path / "layer.pt", weights_only=False)
        torch.manual_seed(3)
        want = step(layer, x, dy, **more)
        torch.manual_seed(3)
        assert_bits(step(other, x, dy, **more), want)
        assert repr(other) == repr(layer) and other.state_dict().keys() == layer.state_dict().keys()
        with torch.no_grad():
            for tensor in (*other.parameters(), *other.buffers()):
                tensor.zero_()
        torch.manual_seed(3)
        assert_bits(step(layer, x, dy, **more), want)

    def test_what_is_shared_stays_shared(self) -> None:
        first = layer_of()
        model = nn.Sequential(first, sonic.MoE(D, N, E, K, router=first.router))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other[0].router is other[1].router is not first.router

    def test_plans_and_routings(self) -> None:
        layer, x = layer_of(), torch.randn(T, D)
        with torch.no_grad():
            _, routing = layer(x, return_routing=True)
        for other in (copy.deepcopy(routing), pickle.loads(pickle.dumps(routing))):
            y = sonic.moe_mlp(x, layer.w1, layer.w2, other.scores, other.plan)
            assert torch.equal(y, sonic.moe_mlp(x, layer.w1, layer.w2, routing.scores, routing.plan))
            assert other.plan.expert_offset_E1.data_ptr() != routing.plan.expert_offset_E1.data_ptr()


# ---------------------------------------------------------------- transforms


class TestTransforms:
    """Compilers take any router and any number of tokens; those of functorch are refused, not computed wrongly."""

    @pytest.mark.slow
    @pytest.mark.parametrize("router", [name for name in routers() if name != "stochastic"])
    def test_compile_for_any_number_of_tokens(self, router: str) -> None:
        torch._dynamo.reset()
        layer = layer_of(router)
        compiled = torch.compile(layer, dynamic=True, backend="aot_eager")
        sizes = (T, 20, 8, 33) if router != "hash" else (T,)
        for size in sizes:
            x, dy = torch.randn(size, D), torch.randn(size, D)
            state = copy.deepcopy(layer.state_dict())
            want = step(layer, x, dy, **inputs(router))
            layer.load_state_dict(state)
            assert_bits(step_of(compiled, layer, x, dy, router), want)
        torch._dynamo.reset()

    def test_an_exported_program_is_saved_and_loaded(self, tmp_path: Path) -> None:
        layer = layer_of().eval()
        tokens = torch.export.Dim("tokens", min=2)
        program = torch.export.export(layer, (torch.randn(T, D),), dynamic_shapes={"x": {0: tokens}})
        torch.export.save(program, tmp_path / "layer.pt2")
        loaded = torch.export.load(tmp_path / "layer.pt2").module()
        for size in (T, 2, 90):
            x = torch.randn(size, D)
            assert torch.equal(loaded(x), layer(x)), size

    @pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "vmap", "jacrev", "hessian", "forward mode"])
    @pytest.mark.parametrize("entry", ["layer", "moe_mlp", "expert_mlp"])
    def test_functorch_is_refused(self, entry: str, transform: str) -> None:
        layer, x = layer_of(), torch.randn(T, D)
        plan = sonic.RoutingPlan.from_topk(torch.rand(T, E).argsort(1)[:, :K], E)
        scores, counts = torch.rand(T, K), torch.tensor([9, 0, 9, 9, 10])
        call: Callable[[Tensor], Tensor] = {
            "layer": layer,
            "moe_mlp": lambda x: sonic.moe_mlp(x, layer.w1, layer.w2, scores, plan),
            "expert_mlp": lambda x: sonic.expert_mlp(x, layer.w1, layer.w2, counts),
        }[entry]
        func, fwd = torch.func, torch.autograd.forward_ad

        def forward_mode() -> Tensor:
            with fwd.dual_level():
                return call(fwd.make_dual(x, x))

        tries: dict[str, Callable[[], object]] = {
            "grad": lambda: func.grad(lambda x: call(x).sum())(x),
            "vjp": lambda: func.vjp(call, x),
            "jvp": lambda: func.jvp(call, (x,), (x,)),
            "vmap": lambda: func.vmap(call)(torch.randn(3, T, D)),
            "jacrev": lambda: func.jacrev(call)(x),
            "hessian": lambda: func.hessian(lambda x: call(x).sum())(x),
            "forward mode": forward_mode,
        }
        with pytest.raises((RuntimeError, NotImplementedError), match="setup_context|jvp function"):
            tries[transform]()
        assert torch.isfinite(call(x)).all()


def step_of(compiled: Any, layer: sonic.MoE, x: Tensor, dy: Tensor, router: str) -> dict[str, Tensor]:
    """:func:`step` of a compiled layer, whose parameters go by the names of the layer's own."""
    x = x.detach().requires_grad_()
    y = compiled(x, **inputs(router))
    leaves = {"x": x, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}
