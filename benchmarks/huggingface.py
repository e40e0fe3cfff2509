"""Models of Hugging Face transformers with the experts of this library: ``python -m benchmarks.huggingface``.

For each type of model in ``benchmarks/huggingface_models.py``, small and random, in float32:

* "logits" and "gradients": the largest difference from transformers' own "eager" experts over the largest value of the
  same tensor, and of gradients the worst over all parameters; once for ``set_experts_implementation("sonic")``, once
  for ``sonic.huggingface.replace_moe``, and for transformers' own "grouped_mm", which shows what another order of the
  same sums makes of it;
* "generation": whether 64 tokens, chosen greedily, are the same;
* "saved": bytes that one experts module keeps for backward (saved-tensor hooks, every storage once, the tokens
  included, the weights not), against "grouped_mm" and "eager".

Then, for models that store their weights transposed, the bytes that one forward and backward copy to have them in the
order that kernels read, before and after ``sonic.huggingface.align_weights``. Then the bytes that a whole block of
Qwen3-MoE, router included, keeps in bf16 at sizes where tokens and experts are the bulk. Last, with ``--classes``,
every experts class of the installed transformers by itself: the error of its output and gradients, or why it is
refused.

``--json`` writes::

    {"benchmark": "huggingface", "command": str, "machine": {...}, "missing": {}, "transformers": str,
     "cells": [{"model": str, "num_layers": int, "activation": str,
                "errors": {implementation: {"logits": float, "gradients": float, "worst": str}},
                "not_replaced": str | null, "same_generation": bool,
                "saved_bytes": {"eager": int, "grouped_mm": int, "sonic": int},
                "copied_bytes": {"weights": int, "before": int, "after": int} | null,
                "targets": {"logits": {"value", "target", "passed"}, "gradients": {...}, "generation": {...},
                            "saved": {...}}}],
     "block": {"shape": {"T", "D", "N", "E", "K"}, "saved_bytes": {implementation: int}},
     "classes": [{"kind": str, "activation": str | null, "refused": str | null, "error": float | null}]}
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sonic
from benchmarks import measure
from benchmarks.huggingface_models import MODELS, batch, build_model, experts_classes, experts_of
from benchmarks.report import Section, new_report, target, write_files

__all__ = [
    "block_bytes",
    "copied_bytes",
    "errors",
    "generate",
    "main",
    "measure_class",
    "measure_model",
    "saved_bytes",
    "step",
]

LARGEST_ERROR = 2e-6
LARGEST_SHARE = 0.5  # of the bytes of grouped_mm
# What "grouped_mm" itself differs from "eager" by: a parameter whose gradient is a small difference of large sums
# cannot be asked for more.
TIMES_GROUPED_MM = 4.0
NEW_TOKENS = 64


def step(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Logits, and the gradients of all parameters of a fixed weighting of them, by name."""
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def errors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Any]:
    """The relative errors of two results of :func:`step`.

    Raises:
        ValueError: they have gradients of different parameters.
    """
    if found.keys() != wanted.keys():
        raise ValueError(f"benchmarks.huggingface.errors: found is of {sorted(found)}, expected {sorted(wanted)}")
    each = {name: _error(found[name], wanted[name]) for name in wanted}
    worst = max((name for name in each if name != "logits"), key=each.__getitem__)
    return {"logits": each["logits"], "gradients": each[worst], "worst": worst}


def generate(model: Any, ids: Tensor) -> Tensor:
    """The prompts (B, S) with 64 tokens more each, chosen greedily."""
    out: Tensor = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return out


def saved_bytes(experts: Any, num_tokens: int = 256) -> int:
    """Bytes that one experts module keeps for backward, with random tokens, experts and scores."""
    generator = torch.Generator().manual_seed(2)
    x_TD = torch.randn(num_tokens, 32, generator=generator).requires_grad_()
    top_k = 2
    expert_TK = torch.rand(num_tokens, experts.num_experts, generator=generator).topk(top_k).indices
    scores_TK = torch.rand(num_tokens, top_k, generator=generator).requires_grad_()
    return measure.saved_bytes(lambda: experts(x_TD, expert_TK, scores_TK), exclude=experts.parameters()).total


def copied_bytes(model: nn.Module, ids: Tensor) -> int:
    """Bytes of three-dimensional tensors that are copied in one forward and backward."""

    class Count(TorchDispatchMode):
        copied = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.clone.default and args[0].shape in shapes:
                self.copied += args[0].nbytes
            return func(*args, **(kwargs or {}))

    shapes = {p.transpose(1, 2).shape for experts in experts_of(model) for p in experts.parameters() if p.ndim == 3}
    model.zero_grad()
    with Count() as count:
        model(ids, use_cache=False).logits.square().sum().backward()
    return count.copied


def block_bytes() -> dict[str, Any]:
    """The entry ``block``: one layer's block of a model with that layer alone, its sizes as in a model of 1,024."""
    shape = {"T": 1024, "D": 1024, "N": 384, "E": 64, "K": 8}
    config = {"num_experts_per_tok": shape["K"], "moe_intermediate_size": shape["N"]}
    config |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), shape["E"])
    model = build_model("qwen3_moe", num_hidden_layers=1, hidden_size=shape["D"], norm_topk_prob=True, **config)
    block = model.to(torch.bfloat16).model.layers[0].mlp
    x = torch.randn(1, shape["T"], shape["D"], generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)
    sonic.huggingface.enable("sonic, save=input", save="input")
    saved = {}
    for name in ("eager", "grouped_mm", "sonic", "sonic, save=input", "replace_moe"):
        if name == "replace_moe":
            sonic.huggingface.replace_moe(model)
        else:
            model.set_experts_implementation(name)
        saved[name] = measure.saved_bytes(lambda: block(x.requires_grad_()), exclude=block.parameters()).total
    return {"shape": shape, "saved_bytes": saved}


def measure_model(model_type: str) -> dict[str, Any]:
    """One entry of ``cells``."""
    model, ids = build_model(model_type), batch()
    report = next(iter(sonic.huggingface.explain(model).values()))
    results, saved, generated = {}, {}, {}
    for name in ("eager", "grouped_mm", "sonic"):
        model.set_experts_implementation(name)
        results[name] = step(model, ids)
        saved[name] = saved_bytes(experts_of(model)[0])
        if name != "grouped_mm":
            generated[name] = generate(model, ids[:, :8])
    same = torch.equal(generated["sonic"], generated["eager"])
    copied = None
    if report.copies:
        copied = {"weights": sum(p.nbytes for e in experts_of(model) for p in e.parameters() if p.ndim == 3)}
        copied["before"] = copied_bytes(model, ids)
        sonic.huggingface.align_weights(model)
        copied["after"] = copied_bytes(model, ids)
    not_replaced = None
    try:
        sonic.huggingface.replace_moe(model, sonic.routing.TokenRounding)
    except ValueError as error:
        not_replaced = str(error)
    else:
        results["replace_moe"] = step(model, ids)
    found = {name: errors(result, results["eager"]) for name, result in results.items() if name != "eager"}
    ours = [found[name] for name in ("sonic", "replace_moe") if name in found]
    limit = max(LARGEST_ERROR, TIMES_GROUPED_MM * found["grouped_mm"]["gradients"])
    logits, gradients = (max(error[key] for error in ours) for key in ("logits", "gradients"))
    share = saved["sonic"] / saved["grouped_mm"]
    return {
        "model": model_type,
        "num_layers": len(experts_of(model)),
        "activation": report.activation,
        "errors": found,
        "not_replaced": not_replaced,
        "same_generation": same,
        "saved_bytes": saved,
        "copied_bytes": copied,
        "targets": {
            "logits": target(logits, LARGEST_ERROR, logits <= LARGEST_ERROR),
            "gradients": target(gradients, limit, gradients <= limit),
            "generation": target(float(same), 1.0, same),
            "saved": target(share, LARGEST_SHARE, share <= LARGEST_SHARE),
        },
    }


def measure_class(experts: Any) -> dict[str, Any]:
    """One entry of ``classes``."""
    (report,) = sonic.huggingface.explain(nn.ModuleDict({"experts": experts})).values()
    entry = {"kind": report.kind, "activation": report.activation, "refused": report.refused, "error": None}
    if report.refused is not None:
        return entry
    generator = torch.Generator().manual_seed(4)
    x_TD, dout_TD = torch.randn(2, 20, 8, generator=generator)
    expert_TK = torch.rand(20, 4, generator=generator).topk(2).indices
    scores_TK = torch.rand(20, 2, generator=generator)
    results = []
    for name in ("eager", "sonic"):
        experts.config._experts_implementation = name
        leaves = [x_TD.clone().requires_grad_(), scores_TK.clone().requires_grad_(), *experts.parameters()]
        out_TD = experts(leaves[0], expert_TK, leaves[1])
        results.append([out_TD.detach(), *torch.autograd.grad(out_TD, leaves, dout_TD)])
    return {**entry, "error": max(_error(ours, theirs) for theirs, ours in zip(*results, strict=True))}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns 1 if a target is missed."""
    arguments = _parser().parse_args(argv)
    import transformers

    transformers.logging.set_verbosity_error()
    sonic.huggingface.enable()
    report = new_report("huggingface", sys.argv[1:] if argv is None else argv, {})
    report["transformers"] = transformers.__version__
    print(f"transformers {transformers.__version__}")
    for model_type in arguments.models:
        report["cells"].append(measure_model(model_type))
        print(
            f"  {model_type}: " + ", ".join(f"{k} {v['value']:.2g}" for k, v in report["cells"][-1]["targets"].items())
        )
    report["classes"] = [measure_class(experts) for experts in experts_classes()] if arguments.classes else []
    report["block"] = block_bytes()
    sections = [_models_section(report["cells"]), _copies_section(report["cells"]), _block_section(report["block"])]
    sections.append(_classes_section(report["classes"]))
    sections = [section for section in sections if section.rows]
    print("\n" + "\n\n".join(section.text() for section in sections))
    preface = (
        f"transformers {report['transformers']}, float32, small random models. Errors are relative to the largest "
        'value of the tensor, against "eager"; saved bytes are those of one experts module, 256 tokens of width 32.'
    )
    title = "Models of Hugging Face transformers"
    write_files(report, title, preface, sections, json_path=arguments.json, save=arguments.save)
    missed = [
        f"{name} of {cell['model']}"
        for cell in report["cells"]
        for name, goal in cell["targets"].items()
        if not goal["passed"]
    ]
    missed += [entry["kind"] for entry in report["classes"] if (entry["error"] or 0) > LARGEST_ERROR]
    if missed:
        print("missed: " + "; ".join(missed))
    return 1 if missed else 0


def _models_section(cells: Sequence[Mapping[str, Any]]) -> Section:
    head = [
        *("model", "activation", "logits", "gradients", "replaced: logits", "gradients", "grouped_mm: gradients"),
        *("64 tokens", "saved KiB", "/ grouped_mm", "/ eager"),
    ]
    rows = []
    for cell in cells:
        row = [cell["model"], cell["activation"]]
        for name in ("sonic", "replace_moe"):
            error = cell["errors"].get(name)
            row += [f"{error[key]:.1e}" if error else "refused" for key in ("logits", "gradients")]
        saved = cell["saved_bytes"]
        row += [f"{cell['errors']['grouped_mm']['gradients']:.1e}", "same" if cell["same_generation"] else "DIFFER"]
        row += [f"{saved['sonic'] / 1024:.0f}"]
        row += [f"{saved['sonic'] / saved[name]:.2f}" for name in ("grouped_mm", "eager")]
        rows.append(row)
    passed = [all(goal["passed"] for goal in cell["targets"].values()) for cell in cells]
    notes = [
        f"{sum(passed)} of {len(cells)} models within {LARGEST_ERROR:g} (or {TIMES_GROUPED_MM:g} times what grouped_mm "
        f"differs by), with the same tokens, in at most {LARGEST_SHARE:g} of grouped_mm's bytes"
    ]
    notes += [
        f"{cell['model']}: worst gradient {cell['errors']['sonic']['worst']}"
        for cell in cells
        if cell["targets"]["gradients"]["value"] > LARGEST_ERROR
    ]
    return Section("Against transformers' own experts", head, rows, notes)


def _copies_section(cells: Sequence[Mapping[str, Any]]) -> Section:
    rows = []
    for cell in cells:
        copied = cell["copied_bytes"]
        if copied is not None:
            rows.append([cell["model"], *(f"{copied[key] / 1024:.0f}" for key in ("weights", "before", "after"))])
    head = ["model", "expert weights KiB", "copied KiB", "after align_weights"]
    return Section("Weights stored transposed: copied in one forward and backward", head, rows, [])


def _block_section(block: Mapping[str, Any]) -> Section:
    saved, sizes = block["saved_bytes"], " ".join(f"{letter}={size}" for letter, size in block["shape"].items())
    rows = [[name, f"{size / 2**20:.1f}", f"{size / saved['grouped_mm']:.2f}"] for name, size in saved.items()]
    return Section(f"Kept by a whole block of Qwen3-MoE, bf16, {sizes}", ["", "MiB", "/ grouped_mm"], rows, [])


def _classes_section(classes: Sequence[Mapping[str, Any]]) -> Section:
    rows = []
    for activation in sorted({entry["activation"] for entry in classes if entry["activation"]}):
        served = [entry for entry in classes if entry["activation"] == activation]
        worst = max(entry["error"] for entry in served)
        rows.append([activation, str(len(served)), f"{worst:.1e}", " ".join(entry["kind"] for entry in served)])
    refused = [entry for entry in classes if entry["refused"]]
    notes = [f"{len(classes) - len(refused)} of {len(classes)} classes are served"]
    notes += [entry["refused"].removeprefix("sonic.huggingface: ") for entry in refused]
    return Section("Every experts class", ["activation", "classes", "largest error", ""], rows, notes)


def _error(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max().clamp(min=1e-30)).item()


def _parser() -> argparse.ArgumentParser:
    summary = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.huggingface", description=summary)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="TYPE")
    parser.add_argument("--classes", action="store_true", help="also every experts class by itself")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report to this file")
    parser.add_argument(
        "--save", action="store_true", help="write the report as JSON and Markdown to benchmarks/results/"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
