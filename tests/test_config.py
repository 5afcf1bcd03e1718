import dataclasses
import math

import pytest

from capi.config import (
    PRESETS,
    Config,
    DataConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    check_config,
    load_config,
    micro_batch_size,
    to_yaml,
)
from capi.metrics import entropy_floor


def test_defaults_of_the_code_are_the_papers_vitl14() -> None:
    options = ["--run.output_dir", "runs/capi", "--run.micro_batch_size", "null"]
    assert load_config(["--config", "vitl14", *options]) == Config()


def test_micro_batches_hold_what_a_gpu_of_the_paper_held() -> None:
    for world_size, size in ((1, 512), (32, 512), (64, 256)):
        config = load_config(["--config", "vitl14"])
        check_config(config, world_size)
        assert micro_batch_size(config, world_size) == size
    config = load_config(["--optim.batch_size", "12", "--run.micro_batch_size", "5"])
    with pytest.raises(ValueError, match="must divide the 12 images of a rank, got 5"):
        check_config(config)


def test_tiny_is_the_preset_without_a_config() -> None:
    assert load_config([]) == load_config(["--config", "tiny"]) == load_config([f"--config={PRESETS / 'tiny.yaml'}"])


@pytest.mark.parametrize(
    ("preset", "width", "heads", "encoder", "predictor", "lr", "momentum", "clustering_lr"),
    [
        ("vits14", 384, 6, 12, 6, 2e-3, 0.998, 1e-3),
        ("vitb14", 768, 12, 12, 6, 1e-3, 0.999, 5e-4),
        ("vitl14", 1024, 16, 24, 12, 1e-3, 0.999, 5e-4),
    ],
)
def test_presets_hold_the_papers_values(preset, width, heads, encoder, predictor, lr, momentum, clustering_lr) -> None:
    config = load_config(["--config", preset])
    assert (config.model.embed_dim, config.model.num_heads) == (width, heads)
    assert (config.model.encoder_depth, config.model.predictor_depth) == (encoder, predictor)
    assert (config.optim.lr.base, config.optim.momentum.base, config.optim.clustering_lr.base) == (
        lr,
        momentum,
        clustering_lr,
    )
    assert (config.optim.batch_size, config.optim.steps, config.clustering.n_prototypes) == (16384, 500_000, 16384)
    assert config.optim.lr.warmup_steps == 50_000
    check_config(config)


def test_options_override_the_preset_and_the_yaml_reads_back(tmp_path) -> None:
    config = load_config(["--config", "vits14", "--optim.batch_size", "256", "--masking.mask_ratio", "[0.5, 0.7]"])
    assert config.optim.batch_size == 256
    assert config.masking.mask_ratio == (0.5, 0.7)
    assert config.model.embed_dim == 384
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--optim.batchsize", "3"], "optim.batchsize"),
        (["--optim.batch_size", "many"], "optim.batch_size"),
        (["--masking.kind", "stripes"], "masking.kind"),
        (["--config", "no-such-preset"], "no-such-preset"),
    ],
)
def test_a_wrong_option_stops_with_its_name(argv, named, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        load_config(argv)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_an_unknown_key_of_a_file_stops_with_its_name(tmp_path, capsys) -> None:
    (tmp_path / "bad.yaml").write_text("optim:\n  batchsize: 3\n")
    with pytest.raises(SystemExit):
        load_config(["--config", str(tmp_path / "bad.yaml")])
    assert "batchsize" in capsys.readouterr().err


def test_help_explains_every_field(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        load_config(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())

    def check(prefix: str, value: object) -> None:
        for field in dataclasses.fields(value):
            name, child = f"{prefix}{field.name}", getattr(value, field.name)
            if dataclasses.is_dataclass(child):
                check(f"{name}.", child)
            else:
                assert f"--{name} " in text, name
                explanation = text.split(f"--{name} ")[1].split(" --")[0]
                assert len(explanation.split("(type")[0].split()) > 3, f"{name} is not explained"

    check("", Config())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(data=DataConfig(image_size=225)), "data.image_size must be a multiple of model.patch_size 14, got 225"),
        (Config(data=DataConfig(crop_scale=(0.8, 0.6))), "crop_scale must be an ascending range"),
        (Config(optim=OptimConfig(batch_size=6)), "optim.batch_size must be a positive multiple of the 4 processes"),
        (Config(optim=OptimConfig(steps=10)), "warm-up steps do not fit in optim.steps 10"),
        (Config(optim=OptimConfig(lr=ScheduleConfig(warmup_steps=-1))), "must not be negative"),
        (Config(run=RunConfig(log_every=0)), "run.log_every must be at least 1, got 0"),
    ],
)
def test_values_that_do_not_fit_together(config, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(config, world_size=4)


def test_entropy_floor_is_that_of_uniform_rows_over_their_share_of_prototypes() -> None:
    assert entropy_floor(64, 1024) == pytest.approx(math.log(16))
    assert entropy_floor(2048, 1024) == 0
