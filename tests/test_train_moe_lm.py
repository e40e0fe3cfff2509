"""The training job: its text, its checkpoints, its resuming, and that its comparison is fair."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import matplotlib.image

from examples import train_moe_lm as job
from examples.lm import checkpoint, display
from examples.lm.data import heldout_of, heldout_windows, load_corpus, training_batch
from examples.lm.errors import JobError
from examples.lm.model import LanguageModel, ModelConfig, flops_per_token, parameter_counts
from examples.lm.trainer import learning_rate

ROOT = Path(__file__).resolve().parents[1]
STEPS, MORE_STEPS = 24, 60
SIZES = (
    "--hidden-size 32 --layers 2 --heads 2 --experts 4 --top-k 2 --expert-size 16 --seq-len 32 --batch-size 8 "
    "--lr 0.01 --device cpu --eval-every 12 --eval-windows 8 --save-every 8 --sample-length 20"
).split()
MODEL = ModelConfig("moe", 32, 2, 2, experts=4, top_k=2, expert_size=16, aux_loss_coeff=0.01, z_loss_coeff=0.001)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 40 files of made-up sentences in two subfolders: about 60 kB."""
    folder = tmp_path_factory.mktemp("text")
    words = "the a router sends every token to an expert and back with some weight of its own".split()
    for index in range(40):
        stream = random.Random(index)
        path = folder / f"part{index % 2}" / f"{index}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(" ".join(stream.choice(words) for _ in range(300)) + f"\nfile {index}\n")
    return folder


def train(text: Path, out: Path, *more: str, steps: int = STEPS) -> int:
    """Run the job in this process; returns its exit code."""
    return job.main(["--text", str(text), "--out", str(out), "--steps", str(steps), *SIZES, *more])


def start(text: Path, out: Path, *more: str, steps: int = STEPS, **environment: str) -> subprocess.Popen[str]:
    """Run the job in a process of its own, with as many threads as this one: another number rounds otherwise."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment}
    command = [sys.executable, "-m", "examples.train_moe_lm", "--text", str(text), "--out", str(out)]
    command += ["--steps", str(steps), *SIZES, *more]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for_lines(process: subprocess.Popen[str], path: Path, count: int) -> None:
    """Wait until a growing file has so many lines."""
    deadline = time.monotonic() + 300
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, f"the job ended with {process.returncode} too early: {process.stdout.read()}"
        assert time.monotonic() < deadline, f"{path} did not get {count} lines"
        time.sleep(0.005)


def steps_of(out: Path, model: str = "moe") -> list[dict[str, Any]]:
    """The metrics log of a run, without the clock."""
    rows = [json.loads(line) for line in (out / model / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def unbroken(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, with its dense rival, that nothing stopped."""
    out = tmp_path_factory.mktemp("unbroken")
    assert train(text, out, "--compare", "dense") == 0
    return out


@pytest.fixture(scope="module")
def longer(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is long enough to be stopped on the way, and was not."""
    out = tmp_path_factory.mktemp("longer")
    assert train(text, out, steps=MORE_STEPS) == 0
    return out


# --- text ---------------------------------------------------------------------------------------------------------


def test_the_split_is_by_file_disjoint_and_stays_when_files_come_and_go(text: Path) -> None:
    corpus = load_corpus([text], seq_len=32)
    everything = {path.relative_to(text).as_posix() for path in text.rglob("*.txt")}
    assert set(corpus.train_files) | set(corpus.heldout_files) == everything
    assert not set(corpus.train_files) & set(corpus.heldout_files)
    assert load_corpus([text], seq_len=32).fingerprint == corpus.fingerprint
    for name in corpus.heldout_files:
        content = (text / name).read_bytes()
        assert content in bytes(corpus.heldout.tolist())
        assert content not in bytes(corpus.train.tolist())
    names = [f"folder/{index}.py" for index in range(2000)]
    heldout = heldout_of(names)
    assert 0.07 < len(heldout) / len(names) < 0.13
    assert heldout_of(names[::2]) == heldout & set(names[::2])


def test_a_copy_of_a_file_is_not_on_both_sides(tmp_path: Path) -> None:
    for index in range(30):
        (tmp_path / f"{index}.txt").write_text("copied " * 20 if index % 2 else f"own {index} " * 20)
    corpus = load_corpus([tmp_path], seq_len=8)
    assert len(corpus.train_files) + len(corpus.heldout_files) == 16
    sides = [b"copied" in bytes(side.tolist()) for side in (corpus.train, corpus.heldout)]
    assert sorted(sides) == [False, True]


def test_batches_are_a_function_of_seed_and_step_and_ranks_share_them() -> None:
    text = torch.arange(5000).remainder(251).to(torch.uint8)
    sizes = {"batch_size": 4, "seq_len": 16}
    whole = training_batch(text, seed=3, step=7, **sizes)
    assert whole.shape == (4, 17) and whole.dtype == torch.int64
    halves = [training_batch(text, seed=3, step=7, rank=rank, world_size=2, **sizes) for rank in range(2)]
    assert torch.equal(torch.cat(halves), whole)
    assert not torch.equal(training_batch(text, seed=3, step=8, **sizes), whole)
    assert not torch.equal(training_batch(text, seed=4, step=7, **sizes), whole)
    shortest = torch.arange(17, dtype=torch.uint8)  # one window and its next byte: the only place to start is 0
    assert training_batch(shortest, seed=0, step=0, **sizes).tolist() == [list(range(17))] * 4
    windows = heldout_windows(text, count=5, seq_len=16)
    assert windows[0].tolist() == text[:17].tolist() and windows[-1].tolist() == text[-17:].tolist()


def test_text_that_does_not_do_is_refused_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*paths: Path) -> str:
        assert job.main(["--text", *map(str, paths), "--out", str(tmp_path / "out"), *SIZES]) == 2
        return capsys.readouterr().err

    empty = tmp_path / "empty"
    empty.mkdir()
    one = tmp_path / "one.txt"
    one.write_text("some text " * 100)
    short = tmp_path / "short"
    short.mkdir()
    (short / "a.txt").write_text("a")
    (short / "b.txt").write_text("b")
    binary = tmp_path / "picture.bin"
    binary.write_bytes(b"\x00\x01\x02" * 100)
    assert re.search(r"--text is \S+empty, with 0 non-empty .*, expected 2 such files", refusal(empty))
    assert re.search(r"with 1 non-empty .*, expected 2 such files", refusal(one))
    assert re.search(r"with 2 bytes in the training part .*, expected 33 bytes at least", refusal(short))
    assert "picture.bin, which holds byte 0, expected a text file" in refusal(binary)
    assert "nowhere, which does not exist, expected a file or a folder" in refusal(tmp_path / "nowhere")
    assert not (tmp_path / "out").exists(), "a refused job leaves nothing behind"


def test_without_text_the_standard_library_is_read() -> None:
    corpus = load_corpus([], seq_len=128)
    assert "argparse.py" in corpus.train_files + corpus.heldout_files
    assert not [name for name in corpus.train_files if "site-packages" in name or "idlelib" in name]
    assert 0.05 < len(corpus.heldout_files) / len(corpus.train_files) < 0.2


# --- the models ---------------------------------------------------------------------------------------------------


def test_the_dense_rival_has_the_active_flops_of_the_moe() -> None:
    rival = ModelConfig(**{**vars(MODEL), "mlp": "dense"})
    moe, dense = flops_per_token(MODEL, 32), flops_per_token(rival, 32)
    assert {**moe, "router": 0} == dense
    assert moe["router"] == 2 * 2 * 32 * 4
    models = LanguageModel(MODEL), LanguageModel(rival)
    counts = [parameter_counts(model) for model in models]
    routers = sum(block.mlp.router.weight.numel() for block in models[0].blocks)
    assert counts[0]["active"] - routers == counts[1]["active"] == counts[1]["total"]
    assert counts[0]["total"] - counts[0]["active"] == 2 * (4 - 2) * 3 * 32 * 16  # layers, idle experts, their matrices

    # The formula against torch's own count of every product but attention's, which is a kernel of its own.
    with FlopCounterMode(display=False) as counter:
        models[1](torch.zeros(3, 32, dtype=torch.int64))
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    assert counted == 3 * 32 * (dense["projections"] + dense["mlp"] + dense["head"])


@pytest.mark.parametrize("mlp", ["moe", "dense"])
def test_no_byte_sees_the_future(mlp: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**{**vars(MODEL), "mlp": mlp})).eval()
    torch.nn.init.normal_(model.head.weight)
    for block in model.blocks:
        torch.nn.init.normal_(block.attention.out.weight)
    tokens = torch.randint(1, 256, (1, 20))
    changed = tokens.clone()
    changed[0, 12:] = 0
    with torch.no_grad():
        before, after = model(tokens).logits[0], model(changed).logits[0]
    torch.testing.assert_close(before[:12], after[:12])
    assert not torch.allclose(before[12:], after[12:])


def test_learning_rate_rises_then_falls(text: Path) -> None:
    args = job.parse(["--steps", "100", "--warmup-steps", "10", "--lr", "1.0"])
    recipe = job.recipe_of(args, load_corpus([text], seq_len=32))
    rates = [learning_rate(recipe, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == max(rates) == 1.0
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[-1] == pytest.approx(0.05, abs=0.001)


# --- the job ------------------------------------------------------------------------------------------------------


def test_loss_falls_and_the_report_is_complete(unbroken: Path) -> None:
    rows = steps_of(unbroken)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["bits_per_byte"] == pytest.approx(8.0)
    assert all(sum(layer) == 8 * 32 * 2 for row in rows for layer in row["load"]), "every token goes to two experts"
    summary = json.loads((unbroken / "summary.json").read_text())
    assert set(summary["runs"]) == {"moe", "dense"}
    for name, figures in summary["runs"].items():
        assert figures["heldout_bits_per_byte"] < 4.5
        assert figures["training_seconds"] > 0 and figures["tokens_per_second"] > 0
        assert len(figures["sample"]) > 0
        checkpoints = sorted(path.name for path in (unbroken / name).glob("step_*"))
        assert checkpoints == ["step_00000016.pt", "step_00000024.pt"], "the last two are kept, and nothing else"
    assert summary["runs"]["moe"]["heldout_bits_per_byte"] == rows[-1]["heldout_bits_per_byte"]
    assert summary["config"]["experts"] == 4 and summary["versions"]["torch"] == torch.__version__
    assert summary["kernel_calls"], "the experts ran on sonic's kernels"
    for name in ("loss_curve.png", "expert_load.png"):
        height, width, _ = matplotlib.image.imread(unbroken / name).shape
        assert width > 800 and height > 400


@pytest.mark.parametrize("model", ["moe", "dense"])
def test_a_stopped_run_resumes_bit_for_bit(
    model: str,
    text: Path,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SIGTERM after the tenth step of the MoE, or of its dense rival."""
    update, calls = display.Display.update, []

    def stop(self: display.Display, figures: dict[str, Any]) -> None:
        update(self, figures)
        calls.append(figures["step"])
        if len(calls) == (10 if model == "moe" else STEPS + 10):
            signal.raise_signal(signal.SIGTERM)

    options = ("--compare", "dense")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(display.Display, "update", stop)
        assert train(text, tmp_path, *options) == 128 + signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert "stopped after step 11; the same command with --resume goes on" in capsys.readouterr().out
    assert len(steps_of(tmp_path, model)) == 11, "the step under way is finished, and its checkpoint is written"
    assert train(text, tmp_path, *options) == 2, "a run is not written over by accident"
    assert "holds a run, expected an empty folder, or --resume, or --overwrite" in capsys.readouterr().err
    assert train(text, tmp_path, *options, "--resume") == 0
    assert "going on after step 11 " in capsys.readouterr().out
    for name in ("moe", "dense"):
        assert steps_of(tmp_path, name) == steps_of(unbroken, name)
        one, other = (out / name / f"step_{STEPS:08d}.pt" for out in (tmp_path, unbroken))
        weights, wanted = (torch.load(path, weights_only=True)["model"] for path in (one, other))
        assert all(torch.equal(weights[key], wanted[key]) for key in wanted)


def test_a_killed_run_resumes_bit_for_bit(text: Path, longer: Path, tmp_path: Path) -> None:
    with start(text, tmp_path, steps=MORE_STEPS) as process:
        wait_for_lines(process, tmp_path / "moe" / "metrics.jsonl", 20)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert train(text, tmp_path, "--resume", steps=MORE_STEPS) == 0
    assert steps_of(tmp_path) == steps_of(longer)


@pytest.mark.long
def test_two_processes_learn_what_one_learns_and_stop_together(text: Path, longer: Path, tmp_path: Path) -> None:
    """Two processes train; one of them alone is told to stop, and both do; a single process goes on to the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [start(text, tmp_path, steps=MORE_STEPS, RANK=str(rank), **world) for rank in range(2)]
    try:
        wait_for_lines(ranks[0], tmp_path / "moe" / "metrics.jsonl", 12)
        ranks[1].terminate()
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [128 + signal.SIGTERM] * 2, outputs
    assert "bits/byte" in outputs[0] and "bits/byte" not in outputs[1], "the main process alone shows progress"
    assert 12 <= len(steps_of(tmp_path)) < MORE_STEPS, "stopped on the way"
    assert train(text, tmp_path, "--resume", steps=MORE_STEPS) == 0
    two, one = steps_of(tmp_path), steps_of(longer)
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for a, b in zip(two[:12], one[:12], strict=True):
        # The same windows and the same balancing loss: only the order of additions differs.
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["aux_loss"] == pytest.approx(b["aux_loss"], rel=1e-3)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)
    assert two[-1]["heldout_bits_per_byte"] == pytest.approx(one[-1]["heldout_bits_per_byte"], rel=0.05)


def test_a_finished_run_reports_again_even_without_its_log(text: Path, unbroken: Path, tmp_path: Path) -> None:
    (tmp_path / "moe").mkdir()
    name = f"step_{STEPS:08d}.pt"
    (tmp_path / "moe" / name).write_bytes((unbroken / "moe" / name).read_bytes())
    assert train(text, tmp_path, "--resume") == 0
    figures = [json.loads((out / "summary.json").read_text())["runs"]["moe"] for out in (tmp_path, unbroken)]
    assert figures[0] == figures[1]


def test_a_checkpoint_of_another_recipe_is_refused(
    text: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        (("--lr", "0.02"), r"lr in \S+step_00000024.pt is 0.01, expected 0.02 as in this run"),
        (("--experts", "8"), r"experts in \S+ is 4, expected 8"),
        (("--seed", "5"), r"seed in \S+ is 0, expected 5"),
        (("--steps", "48"), r"steps in \S+ is 24, expected 48"),
        (("--text", str(text / "part0")), r"text in \S+ is [0-9a-f]{16}, expected [0-9a-f]{16}"),
    ]
    before = steps_of(unbroken)
    for options, message in cases:
        assert train(text, unbroken, "--resume", *options) == 2
        assert re.search(message, capsys.readouterr().err), options
    assert steps_of(unbroken) == before, "a refused job changes nothing"


def test_bf16_products_keep_fp32_weights(text: Path, tmp_path: Path) -> None:
    assert train(text, tmp_path, "--dtype", "bf16", steps=6) == 0
    rows = steps_of(tmp_path)
    assert rows[-1]["loss"] < rows[0]["loss"]
    state = torch.load(tmp_path / "moe" / "step_00000006.pt", weights_only=True)
    assert {value.dtype for value in state["model"].values()} == {torch.float32}
    assert train(text, tmp_path, "--overwrite", "--model", "dense", steps=2) == 0, "the dense model alone"
    assert (tmp_path / "dense" / "metrics.jsonl").exists()


# --- checkpoints --------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path: Path) -> None:
    state = {"weight": torch.randn(50, 50)}
    good = checkpoint.save_checkpoint(tmp_path, 8, {"seed": 1}, state)
    whole = good.read_bytes()
    assert checkpoint.newest_checkpoint(tmp_path, warn=pytest.fail) == good
    for name, damaged in {
        "truncated": whole[: len(whole) // 2],
        "one byte short": whole[:-1],
        "empty": b"",
        "a byte changed": whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :],
    }.items():
        bad = tmp_path / "step_00000099.pt"
        bad.write_bytes(damaged)
        warnings: list[str] = []
        assert checkpoint.newest_checkpoint(tmp_path, warn=warnings.append) == good, name
        assert len(warnings) == 1 and bad.name in warnings[0]
        bad.unlink()
    loaded = checkpoint.load_checkpoint(good, {"seed": 1}, torch.device("cpu"))
    assert loaded["step"] == 8 and torch.equal(loaded["weight"], state["weight"])
    with pytest.raises(JobError, match=r"seed in \S+ is 1, expected 2"):
        checkpoint.load_checkpoint(good, {"seed": 2}, torch.device("cpu"))


def test_a_crash_while_writing_leaves_the_checkpoints_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = checkpoint.save_checkpoint(tmp_path, 8, {}, {"weight": torch.zeros(10)})
    before = good.read_bytes()

    def write_half(value: object, file: Any) -> None:
        file.write(before[: len(before) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", write_half)
        for step in (8, 16):
            with pytest.raises(OSError, match="No space left"):
                checkpoint.save_checkpoint(tmp_path, step, {}, {"weight": torch.ones(10)})
    assert sorted(tmp_path.glob("step_*.pt")) == [good] and good.read_bytes() == before
    assert checkpoint.newest_checkpoint(tmp_path, warn=pytest.fail) == good


def test_the_metrics_log_drops_what_the_resumed_run_writes_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    checkpoint.cut_metrics(path, 0)
    assert checkpoint.read_metrics(path) == []
    for step in (1, 2, 3):
        checkpoint.append_metrics(path, {"step": step}, durable=True)
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    assert [row["step"] for row in checkpoint.read_metrics(path)] == [1, 2, 3]
    checkpoint.cut_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


# --- options ------------------------------------------------------------------------------------------------------


def test_options_that_make_no_sense_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in [
        (["--steps", "0"], "argument --steps: is '0', expected a whole number above 0"),
        (["--lr", "nan"], "argument --lr: is 'nan', expected a number of 0 or more"),
        (["--lr", "0"], "argument --lr: is 0, expected a number above 0"),
        (["--top-k", "17"], "argument --top-k: is 17, expected 16"),
        (["--hidden-size", "100", "--heads", "8"], "argument --hidden-size: is 100, expected a multiple of"),
        (["--model", "dense", "--compare", "dense"], "argument --compare"),
        (["--resume", "--overwrite"], "argument --overwrite: not allowed with --resume"),
        (["--preset", "huge"], "argument --preset: invalid choice"),
    ]:
        with pytest.raises(SystemExit) as exit:
            job.parse(options)
        assert exit.value.code == 2
        assert message in capsys.readouterr().err
    assert job.main(["--device", "toaster"]) == 2
    assert "--device is 'toaster', expected 'auto', or a device such as" in capsys.readouterr().err


def test_it_runs_as_a_file_too() -> None:
    command = [sys.executable, str(ROOT / "examples" / "train_moe_lm.py"), "--help"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "--resume" in done.stdout, done.stderr


def test_small_parts_of_the_display() -> None:
    assert [display.duration(seconds) for seconds in (0.4, 59.6, 3661)] == ["0:00", "1:00", "1:01:01"]
    assert display.sparkline([3.0, 2.0, 1.0, 0.0], 2) == "█▁"
    assert display.sparkline([1.0], 10) == "▁"
    memory = display.memory_mib(torch.device("cpu"))
    assert memory is None or memory > 1
