"""Products in 8 bits, and a teacher that computes with them."""

import pytest
import torch
from tiny_runs import FIXED, draw_batches, load_tiniest, tiniest
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import fp8_teacher
from capi import fp8
from capi.casting import cast_weights
from capi.distributed import World
from capi.fp8 import fp8_linear, fp8_obstacle, quantized
from capi.step import Trainer
from capi.train import main

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FP8 = ("--run.teacher_precision", "fp8")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different sizes, the first of zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, shape[0]).unsqueeze(1)
    x[0] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_has_its_own_scale(dtype) -> None:
    x = draw(20, 64, dtype=dtype)
    found = quantized(x)
    assert found.values.dtype == torch.float8_e4m3fn
    assert found.scale.shape == (20, 1)
    assert (found.scale.frexp().mantissa == 0.5).all()
    reached = found.values[1:].float().abs().amax(1)
    assert ((reached >= 128) & (reached <= 256)).all()
    back = found.dequantized()
    assert not back[0].any()
    largest = x.float().abs().amax(1, keepdim=True)
    # Half of the last of three bits; below 2^-6 of the scale, of the smallest.
    assert ((back - x.float()).abs() <= x.float().abs() / 16 * 1.001 + largest / 128 * 2**-10 * 1.001).all()


def test_no_rounding_of_a_scale_decides_how_ties_are_rounded() -> None:
    """Rows with a largest value of 7 / 4 n had values midway between two of 8 bits wherever the scale was exact."""
    largest = torch.tensor([1.75, 1.3125, 1.0, 256.0, 448.0, 3.0])
    ties = torch.tensor([17, 19, 21, 23, 25, 27, 29, 31]) / 16
    x = torch.cat([largest[:, None], largest[:, None] * ties / 64], dim=1)
    found = quantized(x)
    exact = x.double() / found.scale.double()
    assert torch.equal(found.values, exact.to(torch.float8_e4m3fn))
    assert torch.equal(exact * found.scale.double(), x.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_quantised_factors(dtype) -> None:
    x, weight = draw(20, 64, dtype=dtype), quantized(draw(32, 64).flip(0))
    out = fp8_linear(x, weight)
    assert out.dtype == dtype
    expected = quantized(x).dequantized().double() @ weight.dequantized().double().mT
    eps = torch.finfo(dtype).eps
    sizes = quantized(x).dequantized().double().abs() @ weight.dequantized().double().abs().mT
    assert ((out - expected).abs() <= 8 * eps * sizes).all()


def test_what_a_gpu_is_asked_for_is_a_product_scaled_by_row() -> None:
    """PyTorch checks the shapes, strides and types of fake tensors as it does those of a GPU."""
    with FakeTensorMode():
        weight = quantized(torch.empty(32, 64, device=GPU))
        out = fp8_linear(torch.empty(21, 64, dtype=torch.bfloat16, device=GPU), weight)
        assert (out.shape, out.dtype, out.device.type) == ((21, 32), torch.bfloat16, "cuda")
        with pytest.raises(RuntimeError, match="Invalid scaling configuration"):
            fp8_linear(torch.empty(21, 64, device=GPU), weight._replace(scale=weight.scale.mT))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(20, 64, 32), (1000, 384, 1152), (777, 4096, 1024)])
def test_a_gpu_computes_what_a_cpu_emulates(shape, compiled) -> None:
    if torch.cuda.get_device_capability() < fp8.SINCE:
        pytest.skip("no products in 8 bits")
    tokens, width, dim = shape
    x, w = draw(tokens, width, dtype=torch.bfloat16), torch.randn(dim, width) * width**-0.5
    expected = fp8_linear(x.float(), quantized(w))
    function = torch.compile(fp8_linear) if compiled else fp8_linear
    out = function(x.to(GPU), quantized(w.to(GPU))).cpu().float()
    assert not out[0].any()
    assert ((out - expected).norm(dim=1) <= 0.01 * expected.norm(dim=1)).all()


def test_the_teacher_alone_computes_in_8_bits(tmp_path) -> None:
    trainers = [Trainer(load_tiniest(tmp_path, *FIXED, *options), World(0, 1, CPU)) for options in ((), FP8)]
    batches = draw_batches(trainers[0].config, 0)
    plain, in_8_bits = (trainer.step(batches, 3) for trainer in trainers)
    assert plain.clustering_loss != in_8_bits.clustering_loss
    assert float(plain.clustering_loss) == pytest.approx(float(in_8_bits.clustering_loss), rel=0.1)
    trainer = trainers[1]
    encoder = trainer.teacher_modules()
    images, masks = batches[0]
    logits = trainer.model.student(images, masks)
    with torch.no_grad(), cast_weights(encoder, torch.float32):
        features = trainer.model.teacher_features(images)
    with torch.no_grad(), cast_weights(encoder, torch.float32, fp8=True):
        changed = trainer.model.teacher_features(images)
        assert torch.equal(trainer.model.student(images, masks), logits)
        trainer.model.student_ema.backbone.encoder.in_place = True
        assert torch.equal(trainer.model.teacher_features(images), changed)
    assert 0.001 < float((changed - features).norm() / features.norm()) < 0.1
    with torch.no_grad():
        assert torch.equal(trainer.model.teacher_features(images), features)


def test_where_there_are_no_products_in_8_bits(tmp_path, monkeypatch, capsys) -> None:
    config = load_tiniest(tmp_path)
    assert fp8_obstacle(config, World(0, 1, CPU)) is None
    for capability, obstacle in (
        ((8, 0), "the GPU is of compute capability 8.0, expected 8.9 or later"),
        ((8, 9), None),
        ((12, 0), None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert fp8_obstacle(config, World(0, 1, GPU)) == obstacle
    assert main([*tiniest(tmp_path), *FP8, "--model.embed_dim", "24"]) == 1
    message = "error: run.teacher_precision is fp8, but model.embed_dim 24 is no multiple of 16; expected auto"
    assert message in capsys.readouterr().err


def test_a_run_keeps_its_teachers_precision(tmp_path, capsys) -> None:
    assert main([*tiniest(tmp_path), "--optim.steps", "3", *FP8]) == 0
    assert main([*tiniest(tmp_path), "--optim.steps", "3"]) == 1
    assert "run.teacher_precision" in capsys.readouterr().err


def test_the_script_compares_both(tmp_path, capsys) -> None:
    config = load_tiniest(tmp_path)
    fp8_teacher.run(config, World(0, 1, CPU), 1)
    head, _, row = capsys.readouterr().out.splitlines()
    assert head.startswith("| steps | same cluster | entropy | entropy, fp8 |")
    values = [float(x) for x in row.strip("| ").split(" | ")]
    assert len(values) == head.count("|") - 1 == 8
    assert values[0] == 1
    assert 0.5 <= values[1] <= 1
    assert values[6] != values[7]
