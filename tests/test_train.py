import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from numerics import peak_allocation
from ranks import train_ranks
from tiny_runs import assert_equal_states, load_tiniest, metrics_of, tiniest

from capi import pretrained
from capi.checkpoint import load_newest_checkpoint
from capi.config import Config, load_config
from capi.data import ImageStream
from capi.data.prefetch import DevicePrefetcher
from capi.distributed import World
from capi.masking import Masks, sample_masks
from capi.model import normalize_images
from capi.step import Trainer
from capi.train import main


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    return tiniest(tmp_path)


def test_a_run_writes_its_folder(arguments, tmp_path, capsys) -> None:
    assert main([*arguments, "--run.evaluate", "true"]) == 0
    run_dir = tmp_path / "run"
    lines = metrics_of(run_dir)
    assert [line["step"] for line in lines] == list(range(6))
    keys = "loss clustering_loss target_entropy target_entropy_floor positional_mi positional_mi_floor dead_prototypes "
    keys += "positional_excess positional_alarm "
    keys += "images_per_second flops_per_second peak_memory_bytes lr momentum clustering_lr data_wait time"
    for line in lines:
        assert set(keys.split()) <= line.keys()
        assert all(value is not None for value in line.values())
        assert 0 <= line["data_wait"] <= 1
        # Chance alone is far larger here, with 19 tokens or so for 16 positions and as many clusters.
        assert line["positional_alarm"] == 0
        assert "device_wait" not in line  # There is no GPU to wait for.
    excesses = [line["positional_mi"] - line["positional_mi_floor"] for line in lines]
    assert lines[-1]["positional_excess"] == pytest.approx(sum(excesses[-5:]) / 5)
    assert lines[0]["target_entropy_floor"] == pytest.approx(0.6931, abs=1e-4)
    assert lines[0]["target_entropy"] > 0.69
    assert lines[0]["positional_mi"] > 0  # Of so few tokens even by chance, unless all stood at one position.
    resolved = load_config(["--config", str(run_dir / "config.yaml")])
    assert resolved.optim.batch_size == 8
    assert (run_dir / "curves.png").read_bytes()[:4] == (run_dir / "features.png").read_bytes()[:4] == b"\x89PNG"
    assert list(run_dir.glob("events.out.tfevents.*"))
    with torch.no_grad():
        global_vector, _, feature_map = pretrained.load(run_dir / "encoder.safetensors")(torch.randn(1, 3, 16, 16))
    assert global_vector.shape == (1, 16)
    assert feature_map.shape == (1, 4, 4, 16)
    results = yaml.safe_load((run_dir / "evaluation.yaml").read_text())
    table = capsys.readouterr().out
    for name in ("trained", "untrained", "raw pixels"):
        assert name in table
    assert results


def test_two_runs_are_bitwise_equal_and_another_seed_is_not(arguments, tmp_path) -> None:
    states = []
    for name, seed in [("a", "0"), ("b", "0"), ("c", "1")]:
        assert main([*arguments, "--run.output_dir", str(tmp_path / name), "--run.seed", seed]) == 0
        states.append(load_newest_checkpoint(tmp_path / name)["trainer"])
    assert_equal_states(states[0], states[1])
    with pytest.raises(AssertionError):
        assert_equal_states(states[0], states[2])


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_checkpoints_and_exits_and_the_run_resumes_bit_for_bit(
    arguments, tmp_path, signum, monkeypatch
) -> None:
    whole = tmp_path / "whole"
    assert main([*arguments, "--run.output_dir", str(whole)]) == 0

    original = Trainer.step

    def step_with_signal(self, batches, step, *launched):
        if step == 1:
            os.kill(os.getpid(), signum)
        return original(self, batches, step, *launched)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", step_with_signal)
        assert main(arguments) == 128 + signum
    stopped = load_newest_checkpoint(tmp_path / "run")
    assert stopped is not None
    assert stopped["step"] == 2
    assert main(arguments) == 0
    assert_equal_states(load_newest_checkpoint(tmp_path / "run")["trainer"], load_newest_checkpoint(whole)["trainer"])
    exact = ("step", "loss", "clustering_loss", "target_entropy", "lr", "momentum")
    once, resumed = metrics_of(whole), metrics_of(tmp_path / "run")
    assert [[line[key] for key in exact] for line in resumed] == [[line[key] for key in exact] for line in once]


def test_a_step_that_fails_of_a_signal_ends_the_run_without_a_traceback(arguments, caplog, monkeypatch) -> None:
    """As when Ctrl-C ends a compiler's process; what fails without a signal still raises."""

    def fail(self, *_) -> None:
        if interrupted:
            os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("a compiler's process was ended")

    monkeypatch.setattr(Trainer, "step", fail)
    interrupted = True
    assert main(arguments) == 128 + signal.SIGINT
    assert "stopped by SIGINT within a step (RuntimeError)" in caplog.text
    interrupted = False
    with pytest.raises(RuntimeError, match="a compiler's process"):
        main(arguments)


def test_the_command_line_stops_on_sigterm_and_goes_on(arguments, tmp_path) -> None:
    command = [sys.executable, "-m", "capi.train", *arguments, "--optim.steps", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not metrics.exists() or not metrics.read_text().count("\n"):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "stopped by SIGTERM after step" in errors
    assert "Traceback" not in errors
    stopped = load_newest_checkpoint(tmp_path / "run")
    assert stopped is not None
    assert f"after step {stopped['step']};" in errors


def test_training_needs_no_triton(arguments, tmp_path) -> None:
    program = (
        "import sys\n"
        "sys.modules['triton'] = None\n"  # importing it raises ImportError
        "import capi_kernels\n"
        "from capi.train import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True, timeout=120)
    state = load_newest_checkpoint(tmp_path / "run")
    assert state is not None
    assert state["step"] == 6


def test_a_finished_run_is_not_trained_again(arguments, tmp_path, caplog) -> None:
    assert main(arguments) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    caplog.set_level("INFO")
    assert main(arguments) == 0
    assert "all 6 steps are done already" in caplog.text
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_losses_that_stay_nan_stop_the_run_and_leave_a_good_checkpoint(
    arguments, tmp_path, capsys, monkeypatch
) -> None:
    original = Trainer.step

    def poisoned(self, batches, step, *launched):
        if step >= 4:
            batches = [(images * float("nan"), masks) for images, masks in batches]
        return original(self, batches, step, *launched)

    monkeypatch.setattr(Trainer, "step", poisoned)
    status = main([*arguments, "--optim.steps", "20", "--run.max_nan_steps", "4", "--run.checkpoint_every", "3"])
    assert status == 1
    message = capsys.readouterr().err
    assert re.search(r"not finite for 4 steps in a row.*last good checkpoint: .*step_000000003", message)
    good = load_newest_checkpoint(tmp_path / "run")
    assert good is not None
    assert good["step"] == 3
    assert all(t.isfinite().all() for t in good["trainer"]["model"].values())


def test_one_nan_step_changes_no_trained_weight(tmp_path) -> None:
    config = load_tiniest(tmp_path)
    trainer = Trainer(config, World(0, 1, torch.device("cpu")))
    batches = iter(ImageStream(config))
    batch = next(batches)
    trainer.step([(batch.images, batch.masks)], 2)
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.step([(normalize_images(batch.images) * float("nan"), batch.masks)], 3)
    assert int(trainer.bad_steps) == 1
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name
    trainer.step([(batch.images, batch.masks)], 4)
    assert int(trainer.bad_steps) == 0
    assert not torch.equal(trainer.model.student.head.last_layer.weight_v, before["student.head.last_layer.weight_v"])


@pytest.mark.parametrize("name", ["student.backbone.registers", "teacher.head.layer.bias"])
def test_a_nan_gradient_under_a_finite_loss_changes_no_trained_weight(name, tmp_path) -> None:
    config = load_tiniest(tmp_path)
    trainer = Trainer(config, World(0, 1, torch.device("cpu")))
    parameter = dict(trainer.model.named_parameters())[name]
    hook = parameter.register_hook(lambda gradient: gradient.index_fill(-1, torch.tensor([0]), torch.nan))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    for bad_steps in (1, 2):
        result = trainer.step([batch_of(config, range(8))], 2)
        assert result.loss.isfinite()
        assert result.clustering_loss.isfinite()
        assert int(trainer.bad_steps) == bad_steps
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    hook.remove()
    trainer.step([batch_of(config, range(8))], 2)
    assert int(trainer.bad_steps) == 0
    assert trainer.not_finite() is None


def test_a_state_that_is_not_finite_is_never_saved(arguments, tmp_path, capsys, monkeypatch) -> None:
    original = Trainer.step

    def overflowing(self, batches, step, *launched):
        result = original(self, batches, step, *launched)
        if step == 4:
            next(iter(self.optimizers[0].state.values()))["exp_avg_sq"].view(-1)[0] = torch.inf
        return result

    monkeypatch.setattr(Trainer, "step", overflowing)
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert re.search(
        r"student_optimizer.state.0.exp_avg_sq is not finite after step 6; .*good checkpoint: .*step_000000003", message
    )
    assert load_newest_checkpoint(tmp_path / "run")["step"] == 3


def test_a_state_whose_update_broke_off_is_of_no_step(tmp_path, monkeypatch) -> None:
    trainer = Trainer(load_tiniest(tmp_path), World(0, 1, torch.device("cpu")))
    trainer.step([batch_of(trainer.config, range(8))], 1)
    assert trainer.steps_done == 2
    monkeypatch.setattr("capi.step.update_ema", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.step([batch_of(trainer.config, range(8))], 2)
    assert trainer.steps_done is None


def test_the_loss_falls_on_one_batch(tmp_path) -> None:
    config = load_tiniest(tmp_path, "--optim.steps", "60", "--model.drop_path_rate", "0", "--optim.lr.base", "1e-2")
    trainer = Trainer(config, World(0, 1, torch.device("cpu")))
    batch = next(iter(ImageStream(config)))
    losses = [float(trainer.step([(batch.images, batch.masks)], step).loss) for step in range(60)]
    assert losses[-1] < losses[0] - 0.3


def test_a_warning_when_the_sinkhorn_batch_is_smaller_than_the_prototypes(arguments, caplog) -> None:
    assert main(arguments) == 0
    assert "the Sinkhorn batch of 8 is smaller than the 16 prototypes" in caplog.text
    assert "0.69 nats" in caplog.text
    caplog.clear()
    assert main([*arguments, "--run.resume", "false", "--clustering.positionwise", "false"]) == 0
    assert "smaller than" not in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.image_size", "18"], "data.image_size must be a multiple of model.patch_size 4, got 18"),
        (["--data.source", "folder:/no/such/place"], "/no/such/place"),
        (["--data.source", "flder:/tmp"], "flder"),
        (["--run.device", "cuda"], "PyTorch sees no GPU"),
        (["--run.stop_timeout", "-1"], "run.stop_timeout must not be negative, got -1"),
        (["--masking.mask_ratio", "0.05"], "at least one predicted patch"),
    ],
)
def test_wrong_inputs_stop_with_a_message(arguments, options, message, capsys) -> None:
    if options[0] == "--run.device" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main([*arguments, *options]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors


def test_a_missing_extra_is_named(arguments, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main([*arguments, "--data.source", "hf:anything"]) == 1
    assert "error: hf:anything needs Hugging Face datasets: pip install '.[data]'" in capsys.readouterr().err


@pytest.mark.parametrize("micro_batch_size", ["null", "2"])
def test_two_processes_train_as_one(arguments, micro_batch_size, tmp_path) -> None:
    """The same global batches, Sinkhorn over all of them, and one mean over all predictions: equal to fp32 rounding.

    Mask ratios are drawn, so that ranks and micro-batches predict different numbers of patches.
    """
    options = ["--model.drop_path_rate", "0"]
    assert main([*arguments, *options, "--run.output_dir", str(tmp_path / "one")]) == 0
    of_two = [*arguments, *options, "--run.output_dir", str(tmp_path / "two"), "--run.micro_batch_size"]
    if micro_batch_size == "null":  # Once by torchrun, which takes ten seconds.
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
        command += ["--standalone", "-m", "capi.train", *of_two, "null"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        ended = [(run.returncode, run.stderr)]
    else:
        ended = train_ranks(tmp_path, [[*of_two, micro_batch_size]] * 2)
    for status, errors in ended:
        assert status == 0, errors
    one = load_newest_checkpoint(tmp_path / "one")["trainer"]["model"]
    two = load_newest_checkpoint(tmp_path / "two")["trainer"]["model"]
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    for a, b in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        for key in ("loss", "clustering_loss", "target_entropy", "positional_mi", "dead_prototypes"):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-12), key
        assert a["assigned_tokens"] == b["assigned_tokens"]


def batch_of(config: Config, images: range) -> tuple[torch.Tensor, Masks]:
    """Images and masks that depend on the image's number alone."""
    side = config.data.image_size // config.model.patch_size
    pixels = [
        torch.randint(0, 256, (3, config.data.image_size, config.data.image_size), generator=generator)
        for generator in (torch.Generator().manual_seed(i) for i in images)
    ]
    masks = sample_masks(config.masking, (side, side), [np.random.default_rng((0, i)) for i in images])
    return torch.stack(pixels).to(torch.uint8), masks


@pytest.mark.parametrize("positionwise", [True, False])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_make_the_step_of_the_whole_batch(positionwise, micro_batch_size, tmp_path) -> None:
    """Losses, entropy, clusters, every gradient and every updated weight."""
    config = load_tiniest(tmp_path, "--model.drop_path_rate", "0", "--clustering.positionwise", str(positionwise))
    whole = [batch_of(config, range(8))]
    parts = [batch_of(config, range(i, i + micro_batch_size)) for i in range(0, 8, micro_batch_size)]
    assert len({len(masks.predict_indices) for _, masks in parts}) > 1
    one, other = (Trainer(config, World(0, 1, torch.device("cpu"))) for _ in range(2))
    for trainer in (one, other):  # In float64: AdamW divides rounding errors of small gradients by their size.
        trainer.model.double()
        trainer.compute_dtype = torch.float64
    for step in (2, 3):
        result, accumulated = one.step(whole, step), other.step(parts, step)
        for key in ("loss", "clustering_loss", "target_entropy"):
            assert float(getattr(result, key)) == pytest.approx(float(getattr(accumulated, key)), rel=1e-12), key
        assert torch.equal(result.clusters, accumulated.clusters)
        for (name, p), q in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_micro_batches_take_less_memory(tmp_path) -> None:
    config = load_tiniest(tmp_path, "--model.encoder_depth", "6", "--optim.batch_size", "64")
    peaks = []
    for size in (64, 8):
        trainer = Trainer(config, World(0, 1, torch.device("cpu")))
        batches = [batch_of(config, range(i, i + size)) for i in range(0, 64, size)]
        trainer.step(batches, 2)  # The optimisers' states are there from then on.
        peaks.append(peak_allocation(lambda trainer=trainer, batches=batches: trainer.step(batches, 3)))
    assert peaks[1] < 0.4 * peaks[0]


def test_a_batch_balanced_in_parts_would_be_another_step(tmp_path) -> None:
    """What the test above would miss if its batches were too easy: Sinkhorn of each micro-batch alone."""
    config = load_tiniest(tmp_path, "--model.drop_path_rate", "0")
    whole, half = (
        Trainer(config, World(0, 1, torch.device("cpu"))).step([batch_of(config, range(n))], 2) for n in (8, 4)
    )
    assert abs(float(whole.clustering_loss) - float(half.clustering_loss)) > 1e-2


def test_an_averaged_head_assigns_by_the_cosines_of_the_moving_average(tmp_path) -> None:
    options = ("--clustering.ema_head", "true", "--clustering.bias", "false")
    trainer = Trainer(load_tiniest(tmp_path, *options), World(0, 1, torch.device("cpu")))
    features, ema, head = torch.randn(5, 16), trainer.model.student_ema.head, trainer.model.teacher["head"]
    weights = []
    for step in (None, 2, 3):
        if step is not None:
            trainer.step([batch_of(trainer.config, range(8))], step)
        cosines = F.normalize(features, dim=-1) @ head.layer.weight.T
        torch.testing.assert_close(cosines, ema(features))
        weights.append(head.layer.weight.clone())
    assert not weights[0].equal(weights[1])
    assert not weights[1].equal(weights[2])


def test_recomputing_activations_changes_no_bit_and_takes_less_memory(tmp_path) -> None:
    deep = ["--model.encoder_depth", "6", "--model.predictor_depth", "4", "--optim.batch_size", "64"]
    states, peaks = [], []
    for flag in ("false", "true"):
        config = load_tiniest(tmp_path, *deep, "--run.checkpoint_activations", flag)
        trainer, batch = Trainer(config, World(0, 1, torch.device("cpu"))), batch_of(config, range(64))
        trainer.step([batch], 2)  # The optimisers' states are there from then on.
        peaks.append(peak_allocation(lambda trainer=trainer, batch=batch: trainer.step([batch], 3)))
        states.append(trainer.state_dict())
    assert_equal_states(*states)
    assert peaks[1] < 0.6 * peaks[0]


COMPILED = """
import sys
from functools import partial
import numpy as np
import torch
from torch._dynamo.utils import counters
from capi.config import load_config
from capi.distributed import World
from capi.masking import sample_masks
from capi.step import Trainer

# Of the compiler all but the code that it writes: that takes minutes.
torch.compile = partial(torch.compile, backend="aot_eager")
for ratio, precision, tolerance in (("0.6", "fp32", 1e-5), ("[0.5,0.7]", "bf16", 1e-3)):
    options = "--masking.mask_ratio", ratio, "--run.precision", precision
    options += "--run.checkpoint_activations", str(precision == "bf16")
    torch.compiler.reset()
    counters.clear()
    results = []
    for compile in ("off", "on"):
        config = load_config([*sys.argv[1:], *options, "--run.compile", compile])
        trainer = Trainer(config, World(0, 1, torch.device("cpu")))
        results.append([])
        for step in range(10):
            # So many that with a range of ratios they do not all keep equally many patches, another case to compile.
            images = torch.randint(0, 256, (24, 3, 16, 16), generator=torch.Generator().manual_seed(step))
            rngs = [np.random.default_rng((step, i)) for i in range(24)]
            masks = (sample_masks(config.masking, (4, 4), part) for part in (rngs[:12], rngs[12:]))
            result = trainer.step(list(zip(images.to(torch.uint8).split(12), masks)), step)
            results[-1].append([float(x) for x in (result.loss, result.clustering_loss, result.target_entropy)])
            if step == 2:
                warm = counters["stats"]["unique_graphs"]
    assert (warm > 0) and counters["stats"]["unique_graphs"] == warm, (warm, counters["stats"])
    # Patches and blocks of teacher and student, the predictor's blocks and its head.
    assert warm == 6 or isinstance(config.masking.mask_ratio, tuple), warm
    assert not counters["graph_break"], counters["graph_break"]
    np.testing.assert_allclose(*results, rtol=tolerance)
"""


def test_compiled_steps_are_the_same_and_compile_no_more_once_warm(tmp_path) -> None:
    # In a process of its own: the type checks of these tests are not for the compiler.
    command = [sys.executable, "-c", COMPILED, *tiniest(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr


def test_a_step_does_not_depend_on_which_images_share_a_batch_position(tmp_path) -> None:
    """Permuting the images of a batch, masks and all, changes no loss beyond rounding."""
    config = load_tiniest(tmp_path, "--model.drop_path_rate", "0")
    batch = next(iter(ImageStream(config)))
    order = [3, 1, 0, 2, 7, 6, 5, 4]

    def permuted(indices: torch.Tensor, counts: tuple[int, ...]) -> tuple[torch.Tensor, tuple[int, ...]]:
        parts = indices.split(counts)
        return torch.cat([parts[j] + 16 * (i - j) for i, j in enumerate(order)]), tuple(counts[j] for j in order)

    visible, visible_counts = permuted(batch.masks.visible_indices, batch.masks.visible_counts)
    predicted, predict_counts = permuted(batch.masks.predict_indices, batch.masks.predict_counts)
    shuffled = Masks(visible, predicted, visible_counts, predict_counts)
    once = Trainer(config, World(0, 1, torch.device("cpu"))).step([(batch.images, batch.masks)], 3)
    again = Trainer(config, World(0, 1, torch.device("cpu"))).step([(batch.images[order], shuffled)], 3)
    for key in ("loss", "clustering_loss", "target_entropy"):
        assert float(getattr(once, key)) == pytest.approx(float(getattr(again, key)), rel=1e-5), key


def steps_on(device: str, tmp_path: Path, *options: str) -> tuple[Trainer, list[list[float]]]:
    """Four steps, all on the same images, and their losses."""
    config = load_tiniest(tmp_path, "--run.device", "auto", "--model.embed_dim", "64", *options)
    trainer = Trainer(config, World(0, 1, torch.device(device)))
    images, masks = batch_of(config, range(8))
    batches = [(images.to(device), masks.to(device))]
    results = [trainer.step(batches, step) for step in range(4)]
    return trainer, [[float(x) for x in (r.loss, r.clustering_loss, r.target_entropy)] for r in results]


@pytest.mark.gpu
@pytest.mark.parametrize("drop_path_rate", ["0", "0.3"])
def test_a_gpu_takes_the_steps_of_a_cpu(drop_path_rate, tmp_path) -> None:
    """fp32, plain and compiled, to the rounding of sums in other orders; bf16 near it."""
    options = ["--model.drop_path_rate", drop_path_rate, "--run.precision"]
    _, expected = steps_on("cpu", tmp_path, *options, "fp32")
    for compile_ in ("off", "on"):
        trainer, actual = steps_on("cuda", tmp_path, *options, "fp32", "--run.compile", compile_)
        np.testing.assert_allclose(actual, expected, rtol=2e-4)
        _, again = steps_on("cuda", tmp_path, *options, "fp32", "--run.compile", compile_)
        assert actual == again, "two runs differ"
        assert trainer.compute_dtype == torch.float32
    trainer, actual = steps_on("cuda", tmp_path, *options, "bf16")
    assert trainer.compute_dtype == torch.bfloat16
    np.testing.assert_allclose(actual, expected, rtol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["off", "on"])
def test_a_step_does_not_wait_for_the_gpu(graphs, tmp_path) -> None:
    options = ("--run.micro_batch_size", "4", "--masking.mask_ratio", "0.6", "--run.cuda_graphs", graphs)
    config = load_tiniest(tmp_path, "--run.device", "auto", *options)
    trainer = Trainer(config, World(0, 1, torch.device("cuda")))
    with DevicePrefetcher(ImageStream(config), torch.device("cuda")) as batches:
        for step in range(5):
            micro_batches = next(batches)
            torch.cuda.set_sync_debug_mode("error" if step == 4 else "default")  # Once everything is compiled.
            try:
                trainer.step(micro_batches, step, batches.prefetch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
