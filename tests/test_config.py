import dataclasses
import json
import math
import re

import pytest

from capi.config import (
    PRESETS,
    ClusteringConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    config_of,
    load_config,
    micro_batch_size,
    to_yaml,
)
from capi.config_check import check_config
from capi.masking import check_masking
from capi.metrics import entropy_floor


def test_defaults_of_the_code_are_the_papers_vitl14() -> None:
    options = ["--run.output_dir", "runs/capi", "--run.micro_batch_size", "null"]
    assert load_config(["--config", "vitl14", *options]) == Config()


def test_micro_batches_hold_what_a_gpu_of_the_paper_held() -> None:
    for world_size, size in ((1, 512), (32, 512), (64, 256)):
        config = load_config(["--config", "vitl14", "--data.source", "folder:images"])
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
    config = load_config(["--config", preset, "--data.source", "folder:images"])
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


@pytest.mark.parametrize("preset", ["vits14", "vitb14"])
def test_a_dense_preset_differs_in_its_predictions_alone(preset) -> None:
    changed = ["--masking.prediction_subsampling", "0.2", "--run.output_dir", f"runs/{preset}_dense"]
    dense = load_config(["--config", f"{preset}_dense"])
    assert dense == load_config(["--config", preset, *changed])
    check_masking(dense.masking, (16, 16))


def test_the_short_preset_follows_from_the_papers() -> None:
    """By the rules of docs/schedules.md."""
    paper, short = (load_config(["--config", preset]) for preset in ("vits14_dense", "vits14_short"))
    batch, steps = short.optim.batch_size, short.optim.steps
    lr = paper.optim.lr.base * math.sqrt(batch / paper.optim.batch_size)
    changed = ["--optim.steps", steps, "--optim.batch_size", batch, "--clustering.n_prototypes", batch]
    changed += ["--data.num_workers", 16, "--run.output_dir", "runs/vits14_short"]
    for schedule, base in (("lr", lr), ("momentum", 1 - lr), ("clustering_lr", lr / 2)):
        changed += [f"--optim.{schedule}.base", base, f"--optim.{schedule}.warmup_steps", steps // 10]
    assert short == load_config(["--config", "vits14_dense", *map(str, changed)])


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
        (
            ["--config", "vitL14"],
            "(tiny, vitb14, vitb14_dense, vitl14, vits14, vits14_dense, vits14_short), got vitL14",
        ),
        (["--config", "."], "--config takes a YAML file or a preset"),
        (["--optim.step", "5"], "--optim.step"),
        (["--optim.lr", "1e-3"], "for its peak set optim.lr.base 1e-3"),
        (["--optim.momentum=0.9"], "for its peak set optim.momentum.base 0.9"),
        (["--optim.lr", "{base: 0.1, base: 0.2}"], "optim.lr.base is given twice"),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "optim:\n  steps: 3\ndata:\n  hflip: true\noptim:\n  betas: [0.9, 0.9]\n",
            "optim is given twice, in lines 1 and 5",
        ),
        ("optim:\n  steps: 3\n  steps: 4\n", "optim.steps is given twice, in lines 2 and 3"),
        ("optim:\n  lr:\n    base: 0.1\n    base: 0.1\n", "optim.lr.base is given twice, in lines 3 and 4"),
        ("optim: {lr: {base: 0.1}, lr: {final: 0.1}}\n", "optim.lr is given twice, in lines 1 and 1"),
        ("optim:\n  lr: 1e-3\n", "for its peak set optim.lr.base 1e-3"),
        ("optim: [1\n", "cannot be read as YAML"),
        ("optim: &again\n  lr: *again\n", "an alias stands within what it names"),
        ("optim: " + "[" * 5000, "it is nested too deep"),
        (
            "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 10 * (i > 0)}]\n" for i in range(500)),
            "at most 10000 values, got more",
        ),
        ("model: {patch_size: null}\n", "model.patch_size must have a value, got null"),
        ("run:\n  seed:\n", "run.seed must have a value, got null"),
    ],
)
def test_a_file_that_says_two_things_stops_with_the_place(text, message, tmp_path, capsys) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit):
        load_config(["--config", str(tmp_path / "bad.yaml")])
    error = capsys.readouterr().err
    assert message in error
    assert "bad.yaml" in error or "peak" in error or "null" in error


def test_one_default_may_serve_two_schedules(tmp_path) -> None:
    """An alias is no second key."""
    (tmp_path / "shared.yaml").write_text("optim:\n  lr: &same {base: 0.1, warmup_steps: 7}\n  clustering_lr: *same\n")
    optim = load_config(["--config", str(tmp_path / "shared.yaml")]).optim
    assert optim.lr == optim.clustering_lr == ScheduleConfig(base=0.1, warmup_steps=7)


@pytest.mark.parametrize(("preset", "steps"), [("tiny", 4), ("vits14", 1000)])
def test_a_short_run_needs_its_number_of_steps_alone(preset, steps, caplog) -> None:
    config = load_config(["--config", preset, "--optim.steps", str(steps), "--data.source", "synthetic"])
    check_config(config)
    schedules = (config.optim.lr, config.optim.momentum, config.optim.clustering_lr)
    assert {schedule.warmup_steps for schedule in schedules} == {steps // 10}
    (record,) = caplog.records
    assert f"optim.steps {steps} is too short for the warm-up of optim.lr (" in record.message
    assert load_config(["--config", preset]).optim.lr.warmup_steps in (100, 50_000)


def test_a_warm_up_that_an_option_states_is_not_shortened() -> None:
    config = load_config(["--optim.steps", "40", "--optim.momentum.warmup_steps=50"])
    assert (config.optim.lr.warmup_steps, config.optim.momentum.warmup_steps) == (4, 50)
    with pytest.raises(ValueError, match=r"optim.momentum: 0 frozen and 50 warm-up steps do not fit in optim.steps 40"):
        check_config(config)


@pytest.mark.parametrize("preset", ["vits14", "vitb14", "vitl14"])
def test_a_large_model_is_not_trained_on_scenes_by_oversight(preset) -> None:
    with pytest.raises(ValueError, match=r"data.source must name the images \(folder:PATH, .*\), got none"):
        check_config(load_config(["--config", preset]))
    check_config(load_config(["--config", preset, "--data.source", "synthetic"]))
    check_config(load_config([]))


def test_a_configuration_that_a_run_kept_is_read_or_refused_in_one_line() -> None:
    config = load_config(["--config", "vitb14", "--masking.mask_ratio", "[0.5, 0.7]"])
    kept = json.loads(json.dumps(dataclasses.asdict(config)))
    assert config_of(kept) == config
    for group, field, value in (("model", "swiglu", True), ("optim", "steps", "many")):
        with pytest.raises(ValueError, match=field) as refusal:
            config_of({**kept, group: {**kept[group], field: value}})
        assert "\n" not in str(refusal.value)
    endless: dict = {"model": {}}
    endless["model"]["patch_size"] = endless
    with pytest.raises(ValueError, match="it is nested too deep, or an alias stands within what it names"):
        config_of(endless)


def test_help_explains_every_field(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        load_config(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    text = re.sub(r", --(\S+)\+ \S+", "", text)  # the form that appends to a list

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
        (Config(model=ModelConfig(patch_size=0)), "model.patch_size must be at least 1, got 0"),
        (Config(run=RunConfig(seed=-1)), r"run.seed must lie in \[0, 2\^63\), got -1"),
        (Config(data=DataConfig(crop_scale=(0.8, 0.6))), "crop_scale must be an ascending range"),
        (Config(optim=OptimConfig(batch_size=6)), "optim.batch_size must be a positive multiple of the 4 processes"),
        (Config(optim=OptimConfig(betas=(0.9, 1.0))), r"optim.betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
        (Config(optim=OptimConfig(clustering_betas=(-0.1, 0.9))), "optim.clustering_betas must lie in"),
        (Config(optim=OptimConfig(clustering_eps=-1e-8)), "optim.clustering_eps must not be negative, got -1e-08"),
        (
            Config(clustering=ClusteringConfig(ema_head=True)),
            "ema_head needs clustering.bias false, .* got True, 1024 for 1024, and none",
        ),
        (Config(model=ModelConfig(rope_min_frequency=8.0)), "not above model.rope_max_frequency 7.0, got 8.0"),
        (Config(model=ModelConfig(rope_min_frequency=0.0)), "rope_min_frequency must be positive"),
        (Config(optim=OptimConfig(steps=10)), "warm-up steps do not fit in optim.steps 10"),
        (Config(optim=OptimConfig(lr=ScheduleConfig(warmup_steps=-1))), "must not be negative"),
        (Config(run=RunConfig(log_every=0)), "run.log_every must be at least 1, got 0"),
        (
            Config(optim=OptimConfig(lr=ScheduleConfig(base=math.nan))),
            "optim.lr.base must be finite in float32, got nan",
        ),
        (Config(optim=OptimConfig(weight_decay=1e39)), "optim.weight_decay must be finite in float32, got 1e.39"),
        (
            Config(optim=OptimConfig(momentum=ScheduleConfig(base=1.5))),
            "optim.momentum.base must not be above 1, got 1.5",
        ),
        (Config(optim=OptimConfig(lr=ScheduleConfig(base=-0.1))), "optim.lr.base must not be negative, got -0.1"),
    ],
)
def test_values_that_do_not_fit_together(config, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(config, world_size=4)


def test_entropy_floor_is_that_of_uniform_rows_over_their_share_of_prototypes() -> None:
    assert entropy_floor(64, 1024) == pytest.approx(math.log(16))
    assert entropy_floor(2048, 1024) == 0
