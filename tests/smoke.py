"""What a fresh installation must do, beside nothing but torch: run it from an empty folder, `python smoke.py`.

No test of pytest: it is for environments that hold a wheel of sonic and nothing else of this project.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import io
import pickle
import subprocess
import sys
from pathlib import Path

import torch

import sonic


def main() -> None:
    """Use each room once; an error ends the process."""
    here = Path(sonic.__file__).parent
    checkout = Path(__file__).parent.parent / "sonic"
    assert here != checkout, f"this is the checkout, {checkout}, not an installation"
    assert importlib.metadata.version("sonic-moe") == sonic.__version__, "metadata and package are of one version"

    torch.manual_seed(0)
    router = sonic.routing.TopKRouter(32, num_experts=8, top_k=2, aux_loss_coeff=0.01)
    router = sonic.routing.TokenRounding(router, tile_rows=8)
    layer = sonic.MoE(32, 16, num_experts=8, top_k=2, router=router, bias=True, shared_intermediate_size=16)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    x, target = torch.randn(2, 64, 32), torch.randn(2, 64, 32)
    losses = []
    for _ in range(20):
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], f"the loss went from {losses[0]} to {losses[-1]}"

    layer.eval()
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y) and torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    layer.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(layer(x), y)

    shape = dict(num_tokens=64, num_experts=8, top_k=2, hidden_size=32, intermediate_size=16)
    assert "reference" in str(sonic.kernels.explain("up_proj", **shape))  # type: ignore[arg-type]
    try:
        sonic.MoE(32, 16, num_experts=2, top_k=3)
    except ValueError as error:
        assert "top_k is 3, expected at most num_experts = 2" in str(error)
    else:
        raise AssertionError("three of two experts were served")
    if importlib.util.find_spec("transformers") is None:
        try:
            sonic.huggingface.enable()
        except ImportError as error:
            assert "sonic-moe[huggingface]" in str(error)
        else:
            raise AssertionError("transformers is missing, and nobody said so")

    for arguments in (
        ["doctor"],
        ["doctor", "--json"],
        ["plan", "--model", "7b", "--gpus", "64"],
        ["convert", "--help"],
    ):
        done = subprocess.run([sys.executable, "-m", "sonic", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, f"sonic {' '.join(arguments)}: {done.stdout}{done.stderr}"
    print(f"sonic {sonic.__version__} works on Python {sys.version.split()[0]} with torch {torch.__version__}")


if __name__ == "__main__":
    main()
