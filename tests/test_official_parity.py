"""The project against figures and tensors that the authors' code produced (fp32, CPU, no drop-path).

Goldens are found by their names in the folder named by CAPI_GOLDENS, by default `tests/goldens`.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import assert_as_accurate
from safetensors.torch import load_file

import capi_kernels
from capi.config import (
    ClusteringConfig,
    Config,
    DataConfig,
    MaskingConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
)
from capi.distributed import World
from capi.masking import Masks, sample_masks
from capi.optim import schedule_value
from capi.step import Trainer

GOLDENS = Path(os.environ.get("CAPI_GOLDENS", Path(__file__).parent / "goldens"))


def goldens(pattern: str) -> list:
    paths = sorted(GOLDENS.glob(pattern))
    assert paths, f"expected goldens named {pattern} in {GOLDENS}, got none"
    return [pytest.param(path, id=path.stem) for path in paths]


def schedule_config(golden: dict) -> ScheduleConfig:
    return ScheduleConfig(
        base=float(golden["base_value"]),
        final=float(golden["final_value"]),
        start=float(golden.get("start_warmup_value", 0.0)),
        warmup_steps=golden.get("warmup_iters", 0),
        freeze_steps=golden.get("freeze_iters", 0),
        truncate=float(golden.get("truncate_cos", 1.0)),
    )


def merged(shared: dict, own: dict) -> dict:
    block = {**shared.get("block_kwargs", {}), **own.get("block_kwargs", {})}
    return {**shared, **own, "block_kwargs": block}


def config_of(golden: dict) -> Config:
    model, optimizer, schedules = golden["model"], golden["optimizer"], golden["schedules"]
    clustering_optimizer, shared = golden["clustering_optimizer"], model["transformers_kwargs"]
    encoder, decoder = (merged(shared, model[name]) for name in ("encoder_kwargs", "decoder_kwargs"))
    attention = encoder["block_kwargs"]["attn_kwargs"]
    frequencies = attention.get("rope_kwargs", {})
    assert golden["dtype"] == "float32"
    assert optimizer["rope_lr_mult"] == 0
    return Config(
        model=ModelConfig(
            patch_size=model["patch_size"],
            embed_dim=encoder["embed_dim"],
            num_heads=attention["num_heads"],
            encoder_depth=encoder["depth"],
            predictor_depth=decoder["depth"],
            n_registers=model["n_registers"],
            drop_path_rate=golden["drop_path_rate"],
            predictor_dim=decoder["embed_dim"],
            predictor_heads=decoder["block_kwargs"]["attn_kwargs"]["num_heads"],
            register_coordinates=model.get("register_coordinates", "edge"),
            scale_registers=model.get("scale_reg_to_visible", True),
            out_layer=model.get("out_layer", -1),
            rope_max_frequency=frequencies.get("max_freq", 7.0),
            rope_min_frequency=frequencies.get("min_freq", 7e-4),
        ),
        masking=MaskingConfig(mask_ratio=golden["mask_ratio"], prediction_subsampling=golden["prediction_subsampling"]),
        data=DataConfig(image_size=golden["images_size"]),
        clustering=ClusteringConfig(
            n_prototypes=golden["num_clusters"],
            target_temperature=golden["target_temp"],
            prediction_temperature=golden["pred_temp"],
            student_temperature=golden["student_temp"],
            n_sinkhorn_iterations=golden["n_sk_iter"],
            positionwise=golden["positionwise_sk"],
            bias=golden.get("clustering_bias", True),
        ),
        optim=OptimConfig(
            steps=schedules["total_iters"],
            betas=tuple(optimizer["betas"]),
            eps=optimizer.get("eps", 1e-8),
            weight_decay=optimizer["weight_decay"],
            norm_weight_decay_multiplier=optimizer["layernorm_wd_mult"],
            patch_embed_lr_multiplier=optimizer["patch_embed_lr_mult"],
            clustering_weight_decay=clustering_optimizer.get("weight_decay", 0.01),
            clustering_betas=tuple(clustering_optimizer["betas"]),
            clustering_eps=clustering_optimizer.get("eps", 1e-8),
            lr=schedule_config(schedules["lr"]),
            momentum=schedule_config(schedules["momentum"]),
            clustering_lr=schedule_config(schedules["clustering_lr"]),
        ),
    )


def masks_of(tensors: dict, batch: int, n_images: int, n_tokens: int) -> Masks:
    def counts(indices: torch.Tensor) -> tuple[int, ...]:
        return tuple(torch.bincount(indices // n_tokens, minlength=n_images).tolist())

    visible, predicted = tensors[f"batch{batch}.visible_indices"], tensors[f"batch{batch}.predict_indices"]
    return Masks(visible, predicted, counts(visible), counts(predicted))


@pytest.mark.parametrize("path", goldens("*_training_*.json"))
def test_training_replays_the_official_run(path: Path) -> None:
    """Losses and entropies to 2e-6 of a run in float64, or to twice what the official one, in float32, is off by."""
    golden, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    config = config_of(golden["config"])
    trainer = Trainer(config, World(0, 1, torch.device("cpu")))
    model = trainer.model
    frequencies = {name: tensor.clone() for name, tensor in model.state_dict().items() if "freqs" in name}
    init = {key.removeprefix("init."): tensor for key, tensor in tensors.items() if key.startswith("init.")}
    ema = {
        key.replace("student.", "student_ema.", 1): tensor for key, tensor in init.items() if key.startswith("student.")
    }
    model.load_state_dict(init | ema)  # strict: the official names, all of them and no other
    for name, tensor in frequencies.items():
        torch.testing.assert_close(tensor, model.state_dict()[name], msg=lambda m, name=name: f"{name}: {m}")
    wide = Trainer(config, World(0, 1, torch.device("cpu")))
    wide.model.load_state_dict(model.state_dict())
    wide.model.double()
    wide.compute_dtype = torch.float64

    official = {"loss": "capi_loss", "clustering_loss": "clustering_loss", "target_entropy": "target_entropy"}
    errors = {name: [] for name in official}
    for step, expected in enumerate(golden["steps"]):
        images = tensors[f"batch{step}.images"]
        n_tokens = (images.shape[-1] // config.model.patch_size) ** 2
        batch = [(images, masks_of(tensors, step, images.shape[0], n_tokens))]
        result, exact = trainer.step(batch, step), wide.step(batch, step)
        for name, theirs in official.items():
            ours, oracle = (float(getattr(x, name)) for x in (result, exact))
            assert oracle == pytest.approx(expected[theirs], rel=2e-6), (step, name)
            errors[name].append([abs(x / oracle - 1) for x in (ours, expected[theirs])])
        assert result.lr == pytest.approx(expected["lr"], abs=1e-12)
        assert result.momentum == pytest.approx(expected["momentum"], abs=1e-12)
        assert result.clustering_lr == pytest.approx(expected["clustering_lr"], abs=1e-12)
        parameters = dict(model.named_parameters())
        for name, norm in expected["grad_norms"].items():
            if not name.endswith("rope.freqs"):  # never trained: their learning rate is 0
                assert float(parameters[name].grad.norm()) == pytest.approx(norm, rel=1e-5), (step, name)

    for name, of_steps in errors.items():
        ours, theirs = map(max, zip(*of_steps, strict=True))
        assert ours <= max(2e-6, 2 * theirs), name
    final = {key.removeprefix("final."): tensor for key, tensor in tensors.items() if key.startswith("final.")}
    state = model.state_dict()
    assert final.keys() == state.keys()
    for name, tensor in final.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    with torch.no_grad():
        global_vector, registers, feature_map = model.student_ema.backbone(tensors["eval.images"])
    for name, actual in [("global_repr", global_vector), ("registers", registers), ("feature_map", feature_map)]:
        torch.testing.assert_close(actual, tensors[f"eval.{name}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", goldens("*_sinkhorn.json"))
def test_sinkhorn_equals_the_official_one(path: Path) -> None:
    tensors = load_file(path.with_suffix(".safetensors"))
    for case, golden in enumerate(json.loads(path.read_text())):
        logits = tensors[f"case{case}.logits"]
        official = tensors[f"case{case}.assignments"]
        options = {"n_iterations": golden["n_iterations"], "eps": golden["eps"]}
        assert list(logits.shape) == golden["shape"]
        for sinkhorn in (capi_kernels.reference.sinkhorn_positionwise, capi_kernels.sinkhorn_positionwise):
            torch.testing.assert_close(sinkhorn(logits.double(), **options), official, rtol=0, atol=1e-10)
            assert_as_accurate(sinkhorn(logits, **options), tensors[f"case{case}.assignments_fp32"], official)


@pytest.mark.parametrize("path", goldens("*_schedules.json"))
def test_schedules_equal_the_official_ones(path: Path) -> None:
    for golden in json.loads(path.read_text()):
        schedule = schedule_config(golden["kwargs"])
        for step, value in golden["values"].items():
            ours = schedule_value(schedule, int(step), golden["kwargs"]["total_iters"])
            assert ours == pytest.approx(value, abs=1e-12), (golden["kwargs"], step)


@pytest.mark.parametrize("path", goldens("*_masks.json"))
def test_masks_are_distributed_as_the_official_ones(path: Path) -> None:
    golden = json.loads(path.read_text())
    (rows, columns), count = golden["size"], golden["count"]
    n_tokens = rows * columns
    aspects = {key: golden[key] for key in ("min_aspect", "max_aspect") if key in golden}
    masking = MaskingConfig(mask_ratio=golden["mask_ratio"], **aspects)
    masks = sample_masks(masking, (rows, columns), [np.random.default_rng((0, i)) for i in range(count)])
    assert set(masks.visible_counts) == {n_tokens - golden["n_masked"]}
    visible = torch.zeros(count * n_tokens, dtype=torch.bool)
    visible[masks.visible_indices] = True
    visible = visible.view(count, rows, columns)

    masked_share = (~visible).double().mean(0)
    assert float(masked_share.mean()) == pytest.approx(golden["mean_mask_per_cell"], abs=1e-12)
    # Both samples of `count` masks scatter by this much about the same probability.
    scatter = (golden["mean_mask_per_cell"] * (1 - golden["mean_mask_per_cell"]) / count) ** 0.5
    assert float(masked_share.min()) == pytest.approx(golden["cell_mean_min"], abs=3 * scatter)
    assert float(masked_share.max()) == pytest.approx(golden["cell_mean_max"], abs=3 * scatter)
    for axis, key in [(2, "vis_rows_mean"), (1, "vis_cols_mean")]:
        extent = visible.any(axis).double().sum(1)
        scatter = float(extent.std()) * (2 / count) ** 0.5
        assert float(extent.mean()) == pytest.approx(golden[key], abs=4 * scatter), key
