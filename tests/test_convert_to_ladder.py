"""Conversion of a trained standard model to a ladder: what is kept, what is measured, what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from examples import convert_to_ladder as job
from examples import train_moe_lm, train_parallel
from examples.lm.checkpoint import newest_checkpoint
from examples.lm.parallel_source import read_source
from tests.test_train_parallel import Ranks, curve, differences

pytestmark = pytest.mark.long


SHAPE = (
    "--hidden-size 16 --layers 4 --heads 2 --experts 4 --top-k 2 --expert-size 8 --seq-len 16 --batch-size 8 --lr 0.02 "
    "--steps 30 --eval-every 30 --eval-windows 16 --save-every 15 --device cpu"
).split()
ON = "--device cpu --eval-windows 16 --steps 12 --lr 0.01 --eval-every 6 --save-every 6".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 30 files of made-up sentences, which are easy to learn."""
    folder = tmp_path_factory.mktemp("text")
    words = "the a router sends every token to an expert".split()
    for index in range(30):
        stream = random.Random(index)
        (folder / f"{index}.txt").write_text(" ".join(stream.choice(words) for _ in range(300)) + f"\nfile {index}\n")
    return folder


@pytest.fixture(scope="module")
def sources(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of standard models, trained by either job."""
    folder = tmp_path_factory.mktemp("sources")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    common = ["--text", str(text), *SHAPE]
    assert train_moe_lm.main([*common, "--out", str(folder / "lm"), "--sample-length", "5"]) == 0
    options = "--wiring standard --shared-size 0 --dtype fp64".split()
    assert train_parallel.main([*common, *options, "--out", str(folder / "parallel")]) == 0
    torch.set_num_threads(threads)
    return {"train_moe_lm": folder / "lm/moe", "train_parallel": folder / "parallel"}


def convert(source: Path, text: Path, out: Path, *more: str) -> dict[str, Any]:
    assert job.main(["--from", str(source), "--text", str(text), "--out", str(out), *ON, *more]) == 0
    return json.loads((out / "conversion.json").read_text())


def last_heldout(source: Path) -> float:
    """What the job that trained the model measured at its end."""
    return json.loads((source / "metrics.jsonl").read_text().splitlines()[-1])["heldout_bits_per_byte"]


def test_both_jobs_train_one_model(sources: dict[str, Path]) -> None:
    """One process, wired standard: train_parallel is train_moe_lm, up to the rounding of fp32."""
    fp32, fp64 = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in sources.values()
    )
    for one, other in zip(fp32[:6], fp64, strict=False):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5) and one["lr"] == other["lr"]
        assert one["aux_loss"] == pytest.approx(other["aux_loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["train_moe_lm", "train_parallel"])
def test_before_right_after_and_after_training(
    kind: str, sources: dict[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = convert(sources[kind], text, tmp_path / "out")
    bits = found["heldout_bits_per_byte"]
    assert bits["before"] == pytest.approx(last_heldout(sources[kind]), rel=1e-5)  # the model that was trained
    assert bits["converted"] > bits["before"] + 1e-4  # another function
    assert bits["adapted"] < bits["converted"]
    assert found["layers"] == [2, 3] and found["wiring"] == "ladder"
    said = capsys.readouterr().out
    assert "warning: layers [2, 3] of 4 are wired as ladder now" in said
    assert "the model needs the following 12 steps of training, or more" in said
    assert f"{bits['before']:.4f} as it was, {bits['converted']:.4f} right after the conversion" in said
    config = json.loads((tmp_path / "out/step_00000012/run.json").read_text())["config"]
    assert config["wiring"] == ["standard", "standard", "ladder", "ladder"]


def test_the_layers_are_those_that_were_asked_for(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    source = sources["train_parallel"]
    none = convert(source, text, tmp_path / "none", "--ladder-layers", "none", "--steps", "1")
    assert none["heldout_bits_per_byte"]["converted"] == none["heldout_bits_per_byte"]["before"]
    first = convert(source, text, tmp_path / "some", "--ladder-layers", "0,2", "--steps", "1")
    assert first["layers"] == [0, 2]
    last = convert(source, text, tmp_path / "last", "--ladder-layers", "1", "--wiring", "parallel", "--steps", "1")
    assert last["layers"] == [3] and last["wiring"] == "parallel"


def test_two_ranks_convert_as_one_does(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    source = sources["train_parallel"]
    alone = convert(source, text, tmp_path / "alone", "--steps", "4")
    options = ["--from", str(source), "--text", str(text), *ON, "--steps", "4"]
    out = tmp_path / "tp"
    ranks = Ranks(
        tmp_path / "said", 2, [[*options, "--tp", "2", "--out", str(out)]], main="examples.convert_to_ladder:main"
    )
    assert ranks.wait() == [0, 0], [ranks.said(rank) for rank in range(2)]
    assert not differences(curve(out), curve(tmp_path / "alone"))
    found = json.loads((out / "conversion.json").read_text())
    assert found["heldout_bits_per_byte"] == pytest.approx(alone["heldout_bits_per_byte"], rel=1e-9)


def test_weights_are_read_as_they_were_written(sources: dict[str, Path]) -> None:
    path = newest_checkpoint(sources["train_moe_lm"], warn=pytest.fail)
    assert path is not None
    wanted = torch.load(path, weights_only=True)
    found = read_source(path)
    assert found.step == 30 and found.weights.keys() == wanted["model"].keys()
    assert all(torch.equal(found.weights[name], weight) for name, weight in wanted["model"].items())
    sharded = read_source(sources["train_parallel"])
    assert sharded.weights.keys() == found.weights.keys() and sharded.recipe.model == found.recipe.model
    assert all(weight.abs().sum() > 0 for weight in sharded.weights.values())


def test_going_on_after_a_stop(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    source, out = sources["train_parallel"], tmp_path / "out"
    whole = convert(source, text, out)
    rows = curve(out)
    (out / "step_00000012").rename(out / "step_00000012.tmp")
    again = convert(source, text, out, "--resume")
    assert not differences(curve(out), rows)
    assert again["heldout_bits_per_byte"] == pytest.approx(whole["heldout_bits_per_byte"], rel=1e-9)


def test_what_cannot_be_converted_is_refused(
    sources: dict[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(source: Path, *more: str) -> str:
        assert job.main(["--from", str(source), "--text", str(text), "--out", str(tmp_path / "out"), *ON, *more]) == 2
        return capsys.readouterr().err

    converted = tmp_path / "converted"
    convert(sources["train_parallel"], text, converted, "--steps", "2")
    capsys.readouterr()
    assert "wired as standard, ladder, expected a model wired as standard" in refusal(converted)
    assert "which does not exist, expected a checkpoint of train_moe_lm" in refusal(tmp_path / "nowhere")
    assert "without a whole checkpoint, expected a checkpoint" in refusal(text)
    assert "0.txt, no checkpoint or a damaged one, expected a checkpoint" in refusal(text / "0.txt")
    assert "--ladder-layers is 5, expected a number of layers from 0 to 4" in refusal(
        sources["train_parallel"], "--ladder-layers", "5"
    )
    with pytest.raises(SystemExit):
        job.parse(["--from", "x", "--wiring", "standard"])
    with pytest.raises(SystemExit):
        job.parse([])
