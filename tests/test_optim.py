import pytest
import torch

from capi.config import ClusteringConfig, ModelConfig, OptimConfig, ScheduleConfig
from capi.model import CAPI
from capi.optim import all_finite, allocate_states, build_optimizers, schedule_value, set_learning_rates, update_ema

SHAPE = ModelConfig(patch_size=4, embed_dim=16, num_heads=2, encoder_depth=1, predictor_depth=1, n_registers=4)


@pytest.fixture
def model() -> CAPI:
    torch.manual_seed(0)
    return CAPI(SHAPE, ClusteringConfig(n_prototypes=8)).init_weights()


def test_every_parameter_gets_its_learning_rate_and_weight_decay(model) -> None:
    config = OptimConfig()
    student, clustering = build_optimizers(model, config)
    set_learning_rates(student, clustering, 1e-3, 5e-4)
    settings = {
        parameter: (group["lr"], group["weight_decay"])
        for group in student.param_groups
        for parameter in group["params"]
    }
    expected = {
        "backbone.mask_token": (1e-3, 0.1),
        "backbone.registers": (1e-3, 0.1),
        "backbone.patch_embed.weight": (2e-4, 0.1),
        "backbone.patch_embed.bias": (2e-4, 0.0),
        "head.last_layer.weight_g": (1e-3, 0.1),
        "head.last_layer.weight_v": (1e-3, 0.1),
    }
    for part in ("encoder", "decoder"):
        block = f"backbone.{part}.blocks.0."
        for weight in ("q_proj", "k_proj", "v_proj", "proj"):
            expected[f"{block}residual1.fn.{weight}.weight"] = (1e-3, 0.1)
        for weight in ("fc1", "fc2"):
            expected[f"{block}residual2.fn.{weight}.weight"] = (1e-3, 0.1)
        for residual in ("residual1", "residual2"):
            expected[f"{block}{residual}.norm.weight"] = (1e-3, pytest.approx(0.01))
    trained = {name: p for name, p in model.student.named_parameters() if "rope" not in name}
    assert trained.keys() == expected.keys()
    for name, parameter in trained.items():
        assert settings[parameter] == expected[name], name
    assert len(settings) == len(trained)  # the rotary frequencies are in no group
    (group,) = clustering.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (5e-4, 0.01, (0.9, 0.95))
    assert len(group["params"]) == 2


def test_the_clustering_has_settings_of_its_own_or_those_of_the_student(model) -> None:
    def settings(**options) -> list[tuple]:
        optimizers = build_optimizers(model, OptimConfig(betas=(0.8, 0.9), eps=1e-6, **options))
        return [(optimizer.defaults["betas"], optimizer.defaults["eps"]) for optimizer in optimizers]

    assert settings() == [((0.8, 0.9), 1e-6)] * 2
    own = settings(clustering_betas=(0.0, 0.5), clustering_eps=0.0)
    assert own == [((0.8, 0.9), 1e-6), ((0.0, 0.5), 0.0)]


def test_ema_moves_by_one_minus_momentum_and_leaves_the_frequencies_alone(model) -> None:
    before = {name: tensor.clone() for name, tensor in model.student_ema.state_dict().items()}
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter += 1.0
    update_ema(model, 0.75)
    for name, tensor in model.student_ema.state_dict().items():
        moved = 0.0 if "freqs" in name else 0.25
        torch.testing.assert_close(tensor, before[name] + moved, rtol=1e-6, atol=1e-6)


def test_schedule_edges() -> None:
    schedule = ScheduleConfig(base=2.0, final=0.5, start=1.0, warmup_steps=4, truncate=1.0)
    values = [schedule_value(schedule, step, 14) for step in range(16)]
    assert values[:5] == [1.0, pytest.approx(4 / 3), pytest.approx(5 / 3), 2.0, 2.0]
    assert values[9] == pytest.approx(1.25)
    assert values[13] > 0.5
    assert values[14:] == [0.5, 0.5]
    assert schedule_value(ScheduleConfig(base=1.0, start=0.5, warmup_steps=1), 0, 10) == 0.5
    assert schedule_value(ScheduleConfig(base=1.0, warmup_steps=0), 0, 10) == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [1, 2])
def test_one_bad_value_among_all_is_found(bad, place) -> None:
    half = torch.full((2, 3), 3e38, dtype=torch.bfloat16)
    tensors = [torch.ones(5), torch.full((2, 3), 3e38), half, torch.empty(1, 0, 4), torch.zeros(())]
    assert all_finite(tensors)
    tensors[place][1, 0] = bad
    assert not all_finite(tensors)


def test_states_made_ahead_are_those_of_no_step(model) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, _ = build_optimizers(model, OptimConfig())
    allocate_states(optimizer)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None, name
    assert len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups)
    for state in optimizer.state.values():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert not any(x.any() for x in state.values())
