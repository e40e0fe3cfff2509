"""Existing decoders with ladder wiring: their names, their numbers, their checkpointing."""

from __future__ import annotations

import copy
import functools
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from sonic.parallel.ladderize import ladderize
from sonic.parallel.wiring import Wiring
from tests.distributed import run_ranks
from tests.ladder_models import differences, recorded

WIDTH, HEADS, LAYERS = 16, 4, 4

# ---------------------------------------------------------------- a decoder, with the interfaces of transformers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head_dim = WIDTH // HEADS
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(
        self, hidden_states: Tensor, position_embeddings: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = q * position_embeddings
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, is_causal=attention_mask is None)
        return self.o_proj(y.transpose(1, 2).flatten(2)), None


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 24, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GradientCheckpointingLayer(nn.Module):
    gradient_checkpointing = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(functools.partial(super().__call__, **kwargs), *args)
        return super().__call__(*args, **kwargs)


class DecoderLayer(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = MLP()
        self.input_layernorm = nn.RMSNorm(WIDTH)
        self.post_attention_layernorm = nn.RMSNorm(WIDTH)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        return residual + hidden_states


class OldDecoderLayer(DecoderLayer):
    """As before version 5: a tuple."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return (super().forward(hidden_states, *args, **kwargs),)


class CheckpointsForward(nn.Module):
    """As later versions of transformers have it: in the class of every subclass."""

    gradient_checkpointing = False

    def __init_subclass__(cls) -> None:
        forward = cls.forward

        def checkpointing(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.gradient_checkpointing and self.training and type(self).forward is checkpointing:
                return self._gradient_checkpointing_func(functools.partial(forward, self, **kwargs), *args)
            return forward(self, *args, **kwargs)

        cls.forward = functools.wraps(forward)(checkpointing)  # type: ignore[method-assign]


class LaterDecoderLayer(CheckpointsForward, DecoderLayer):
    forward = DecoderLayer.forward


class Decoder(nn.Module):
    def __init__(self, layer: type = DecoderLayer) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=LAYERS)
        self.embed_tokens = nn.Embedding(32, WIDTH)
        self.layers = nn.ModuleList(layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden_states = self.embed_tokens(tokens)
        positions = torch.linspace(1, 2, tokens.shape[1])[:, None].to(hidden_states.dtype)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(hidden_states, attention_mask=None, position_embeddings=positions)
            if isinstance(hidden_states, tuple):
                hidden_states = hidden_states[0]
        return self.norm(hidden_states)


class CausalLM(nn.Module):
    def __init__(self, layer: type = DecoderLayer) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=LAYERS)
        self.model = Decoder(layer)
        self.lm_head = nn.Linear(WIDTH, 32, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.model(tokens))


def causal_lm(layer: type = DecoderLayer) -> CausalLM:
    torch.manual_seed(3)
    return CausalLM(layer).double()


def wired(model: CausalLM, *args: Any, **kwargs: Any) -> CausalLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return ladderize(model, *args, **kwargs)


TOKENS = torch.arange(24).view(2, 12) * 7 % 32


def results(model: nn.Module) -> dict[str, Tensor]:
    y = model(TOKENS)
    model.zero_grad()
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"output": y.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def by_hand(model: CausalLM, wiring: Wiring, streams: list[Tensor] | None = None) -> Tensor:
    """Standard and ladder layers, as the published model for conversion has them; the stream after each layer."""
    x = before = model.model.embed_tokens(TOKENS)
    positions = torch.linspace(1, 2, TOKENS.shape[1])[:, None].double()
    for layer, name in zip(model.model.layers, wiring, strict=True):
        a = layer.self_attn(layer.input_layernorm(before if name == "ladder" else x), positions)[0]
        m = layer.mlp(layer.post_attention_layernorm(x if name == "ladder" else x + a))
        before, x = x + a, x + a + m
        if streams is not None:
            streams.append(x)
    return model.lm_head(model.model.norm(x))


@pytest.mark.parametrize("layer", [DecoderLayer, OldDecoderLayer])
@pytest.mark.parametrize("layers", ["upper_half", "all", [1], [0, 2]], ids=str)
def test_ladder_is_the_equations(layer: type, layers: Any) -> None:
    wanted = by_hand(causal_lm(layer), Wiring.build(LAYERS, "ladder", layers))
    torch.testing.assert_close(wired(causal_lm(layer), layers)(TOKENS), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", [DecoderLayer, OldDecoderLayer])
def test_no_layer_means_the_same_model_bitwise(layer: type) -> None:
    before, after = results(causal_lm(layer)), results(wired(causal_lm(layer), []))
    assert before.keys() == after.keys()
    assert all(after[name].equal(value) for name, value in before.items())


def test_checkpoints_fit_both_ways() -> None:
    plain, ladder = causal_lm(), wired(causal_lm())
    assert plain.state_dict().keys() == ladder.state_dict().keys()
    torch.manual_seed(5)
    other = CausalLM().double()
    ladder.load_state_dict(other.state_dict())
    plain.load_state_dict(ladder.state_dict())
    assert all(value.equal(other.state_dict()[name]) for name, value in plain.state_dict().items())
    assert plain(TOKENS).equal(other(TOKENS)) and not plain(TOKENS).equal(ladder(TOKENS))


def test_a_layer_alone_is_what_it_was() -> None:
    plain, ladder = causal_lm(), wired(causal_lm(), "all")
    x, positions = torch.randn(2, 12, WIDTH, dtype=torch.float64), torch.ones(12, 1, dtype=torch.float64)
    ladder(TOKENS)
    for one, other in zip(plain.model.layers, ladder.model.layers, strict=True):
        assert other(x, None, positions).equal(one(x, None, positions))
    with pytest.raises(RuntimeError):
        ladder(TOKENS + 100.0)  # a forward that fails leaves nothing behind
    assert ladder.model.layers[1](x, None, positions).equal(plain.model.layers[1](x, None, positions))


@pytest.mark.parametrize("layer_class", [DecoderLayer, LaterDecoderLayer])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool, layer_class: type) -> None:
    wanted = results(wired(causal_lm(layer_class)))
    model = wired(causal_lm(layer_class))
    for layer in model.model.layers:  # as fully_shard does
        layer.__class__ = type(f"FSDP{type(layer).__name__}", (type(layer),), {})
    calls = []

    def counted(function: Any, *args: Any) -> Any:
        calls.append(function)
        return checkpoint(function, *args, use_reentrant=use_reentrant)

    for layer in model.model.layers:
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, counted
    got = results(model)
    assert len(calls) == 2 * LAYERS
    assert max(differences(got, wanted).values()) < 1e-12


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_transformers(use_reentrant: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=32
    )
    plain = transformers.AutoModelForCausalLM.from_config(config).train()
    grads = []
    for options in (None, {"use_reentrant": use_reentrant}):
        model = wired(copy.deepcopy(plain), "all")
        if options is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        model(TOKENS, labels=TOKENS).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert max(differences(grads[1], grads[0]).values()) < 1e-5


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("layers", [[0], [2], [LAYERS - 1], range(LAYERS)], ids=str)
def test_checkpointing_whole_layers_is_refused(layers: Any, hooked: bool, use_reentrant: bool) -> None:
    """Run again in backward, alone, a layer would compute something else: wrong gradients, without a word."""
    model = wired(causal_lm(), "all")
    for index in layers:
        layer = model.model.layers[index]
        forward = layer.forward

        def checkpointed(x: Any, forward: Any = forward, **inputs: Any) -> Any:
            return checkpoint(functools.partial(forward, **inputs), x, use_reentrant=use_reentrant)

        layer.forward = checkpointed
    for layer in model.model.layers:
        if hooked:
            layer.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(ValueError, match=r"layer \d is run .*, expected its attention and MLP to be checkpointed"):
        results(model)
    model.eval()
    with torch.no_grad():  # nothing is wrong without gradients
        assert model(TOKENS).equal(wired(causal_lm(), "all").eval()(TOKENS))


@pytest.mark.parametrize("order", ["seqnr", "early"])
def test_hooks_see_complete_streams(order: str) -> None:
    model = wired(causal_lm(), backward_order=order)
    wanted = model(TOKENS)
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    assert model(TOKENS).equal(wanted)
    streams: list[Tensor] = []
    by_hand(causal_lm(), Wiring.build(LAYERS), streams)
    for one, stream in zip(seen, streams, strict=True):
        torch.testing.assert_close(one, stream, rtol=1e-12, atol=1e-12)


def test_copies_are_independent() -> None:
    model = wired(causal_lm(), "all")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert copied(TOKENS).equal(wired(causal_lm(), "all")(TOKENS))


def test_config_is_told_and_read() -> None:
    model = wired(causal_lm(), 2)
    assert (model.config.wiring, model.config.ladder_layers) == ("ladder", [2, 3])
    again = causal_lm()
    again.config = model.config
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # trained with it, as far as the config says
        assert ladderize(again, None)(TOKENS).equal(model(TOKENS))


def test_conversion_warns() -> None:
    with pytest.warns(UserWarning, match="2 of 4 layers are wired as 'ladder' now"):
        ladderize(causal_lm())


class Strange(DecoderLayer):
    def __init__(self) -> None:
        super().__init__()
        self.post_feedforward_layernorm = nn.RMSNorm(WIDTH)


class Scaled(DecoderLayer):
    residual_multiplier = 0.5


def test_bad_input() -> None:
    def refused(message: str, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(ValueError, match=message):
            ladderize(model, *args, **kwargs)

    refused("model is without such a list, expected one with a ModuleList", nn.Linear(2, 2))
    refused("model is without such a list", causal_lm(), attn="attention")
    refused(r"children of model.layers\[0\] is .*post_feedforward_layernorm.*, expected exactly", causal_lm(Strange))
    refused(r"model.layers\[0\].residual_multiplier is 0.5, expected 1", causal_lm(Scaled))
    refused("wired already", wired(causal_lm()))
    refused("ladder_layers is 5, expected", causal_lm(), 5)
    refused("layers is None, expected layers to choose", causal_lm(), None)
    refused("model is one with 2: ", nn.ModuleList([causal_lm(), causal_lm()]))
    refused(
        "wiring is 'farskip', expected 'standard', 'parallel' or 'ladder': the MLP of layer .",
        causal_lm(),
        wiring="farskip",
    )


# ---------------------------------------------------------------- on two ranks


def tensor_parallel(rank: int) -> list[tuple[float, str]]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))["tp"]
    found = []
    for layers in ("upper_half", "all", []):
        wanted = results(wired(causal_lm(), layers))
        for options in ({}, {"backward_order": "early"}, {"overlap": "off"}, {"sequence_parallel": True}):
            model = wired(causal_lm(), layers, tp_mesh=mesh, **options)
            with recorded() as log:
                got = results(model)
            got = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in got.items()}
            found.append((max(differences(got, wanted).values()), " ".join(log.events["backward"])))
        x = torch.randn(2, 12, WIDTH, dtype=torch.float64)
        positions = torch.ones(12, 1, dtype=torch.float64)
        alone = model.model.layers[1](x, None, positions)
        error = (alone - causal_lm().model.layers[1](x, None, positions)).abs().max()
        found.append((float(error), ""))
    return found


def misnamed_linears(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))["tp"]
    for message, names in (
        ("self_attn.o_proj is in neither column nor row", {"row": ["down_proj"]}),
        (
            "self_attn is without linears of row, expected some of column",
            {"column": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ladderize(causal_lm(), tp_mesh=mesh, **names)


def test_misnamed_linears_are_refused() -> None:
    run_ranks(misnamed_linears, 2)


def test_ladderize_over_two_ranks() -> None:
    for found in run_ranks(tensor_parallel, 2):
        assert [error for error, _ in found if not error < 1e-10] == []
        assert found[5][1] == "I0 I1 W0 I2 W1 I3 W2 I4 W3 I5 W4 I6 W5 I7 W6 W7"
