"""One pass over the parameters does what PyTorch's AdamW, the moving average and the casts do apart."""

import copy

import pytest
import torch
from tiny_runs import FIXED, draw_batches, load_tiniest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from capi import fused_update_triton
from capi.casting import WeightCopies, cast_weights
from capi.config import ClusteringConfig, ModelConfig, OptimConfig
from capi.distributed import World
from capi.fused_update_triton import FusedUpdate
from capi.model import CAPI
from capi.optim import build_optimizers, set_learning_rates, update_ema
from capi.step import Trainer

CPU = torch.device("cpu")
SHAPE = ModelConfig(patch_size=4, embed_dim=20, num_heads=1, encoder_depth=1, predictor_depth=1, n_registers=4)
MOMENTA = (1.0, 0.9, 0.999, 0.0, 0.3)


class Case:
    """A model and its optimisers, and gradients for them; the update of every step is PyTorch's, or fused."""

    def __init__(self, fused: bool, n_prototypes: int, device: torch.device, copies: torch.dtype | None):
        torch.manual_seed(0)
        self.model = CAPI(SHAPE, ClusteringConfig(n_prototypes=n_prototypes)).init_weights().to(device)
        own = {"eps": 1e-6, "clustering_betas": (0.7, 0.99), "clustering_eps": 1e-3}
        self.optimizers = build_optimizers(self.model, OptimConfig(**own))
        self.device, self.fused, self.dtype = device, fused, copies
        self.build()

    def build(self) -> None:
        self.copies = None
        if self.dtype is not None:
            self.copies = WeightCopies([self.model.student, self.model.student_ema.backbone.encoder], self.dtype)
        self.update = FusedUpdate(self.model, self.optimizers, self.copies) if self.fused else None

    def step(self, i: int, found_inf: bool = False, shift: int = 0, half: bool | None = None) -> None:
        """Gradients of weights that have copies are rounded to the type of these, and given so or cast (`half`)."""
        set_learning_rates(*self.optimizers, lr=1e-3 * (i + 1), clustering_lr=5e-4)
        for j, p in enumerate(self.model.parameters()):
            if p.requires_grad:
                draws = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * i + j)) * 10.0 ** (j % 5 - 4)
                if half is not None and p in self.copies.parts:
                    draws = draws.to(self.dtype)
                p.grad, p.grad_dtype = None, draws.dtype if half else torch.float32
                gradient = torch.empty(p.numel() + shift, device=self.device, dtype=p.grad_dtype)
                p.grad = gradient[shift:].view_as(p).copy_(draws)
                if found_inf and j % 3 == 0:
                    p.grad.flatten()[0] = torch.nan
        bad = torch.tensor(float(found_inf), device=self.device)
        if self.fused:
            self.update(MOMENTA[i % 5], bad)
            return
        for optimizer in self.optimizers:
            optimizer.found_inf = bad
            optimizer.step()
        update_ema(self.model, MOMENTA[i % 5])

    def state(self) -> dict[str, Tensor]:
        named = dict(self.model.state_dict())
        for i, optimizer in enumerate(self.optimizers):
            for j, state in optimizer.state_dict()["state"].items():
                named |= {f"{i}.{j}.{key}": x for key, x in state.items()}
        return {name: x.detach().clone() for name, x in named.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To rounding, a few units in the last place of the tensor's largest value."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype, name
        error = (actual[name] - x).abs().max() if x.numel() else torch.zeros(())
        assert error <= 4e-7 * x.abs().max(), (name, float(error))


def compare(device: torch.device, n_prototypes: int, shift: int, copies: torch.dtype | None) -> None:
    expected, actual = (Case(fused, n_prototypes, device, copies if fused else None) for fused in (False, True))
    for i, found_inf in enumerate((False, True, False, False, True, False)):
        before = actual.state()
        for case in (expected, actual):
            case.step(i, found_inf, shift)
        assert_same(actual.state(), expected.state())
        if found_inf:
            moved = {name for name, x in actual.state().items() if not torch.equal(x, before[name])}
            assert all(name.startswith("student_ema") for name in moved)
    aligned = [group.table()[1] for group in actual.update.groups]
    assert all(aligned) == (shift == 0 and n_prototypes % 4 == 0)
    assert any(aligned) == (shift == 0)
    if copies is not None:
        for weight, part in actual.copies.parts.items():
            assert torch.equal(part, weight.to(copies))


CASES = [(8, 0), (6, 0), (8, 1)]  # All aligned; not the tensors of so many prototypes; no gradient.


@pytest.mark.parametrize(("n_prototypes", "shift"), CASES)
@pytest.mark.parametrize("copies", [None, torch.float16])  # The interpreter's bfloat16 is not rounded.
def test_one_pass_is_pytorchs_updates(n_prototypes, shift, copies) -> None:
    compare(CPU, n_prototypes, shift, copies)


@pytest.mark.gpu
@pytest.mark.parametrize(("n_prototypes", "shift"), CASES)
@pytest.mark.parametrize("copies", [None, torch.float16, torch.bfloat16])
def test_one_pass_is_pytorchs_updates_on_a_gpu(n_prototypes, shift, copies) -> None:
    compare(torch.device("cuda"), n_prototypes, shift, copies)


@pytest.mark.parametrize("shift", [0, 1])
def test_gradients_in_half_precision_are_their_casts(shift) -> None:
    """To the bit; they need not be of one type in every step."""
    cases = [Case(True, 8, CPU, torch.float16) for _ in range(2)]
    for i, found_inf in enumerate((False, True, False)):
        cases[0].step(i, found_inf, shift, half=False)
        cases[1].step(i, found_inf, shift, half=i != 2)
        dtypes = {p.grad.dtype for p in cases[1].model.parameters() if p.grad is not None}
        assert dtypes == {torch.float32, *[torch.float16] * (i != 2)}
    cast, half = (case.state() for case in cases)
    assert all(torch.equal(x, half[name]) for name, x in cast.items())


def test_the_same_bits_twice_and_the_average_at_its_ends() -> None:
    cases = [Case(True, 8, CPU, None) for _ in range(2)]
    for i in range(3):
        for case in cases:
            case.step(i)
    first, second = (case.state() for case in cases)
    assert all(torch.equal(first[name], second[name]) for name in first)
    average = cases[0].model.student_ema.state_dict()
    cases[0].step(5)  # Momentum 1.
    assert all(torch.equal(x, average[name]) for name, x in cases[0].model.student_ema.state_dict().items())
    cases[0].step(3)  # Momentum 0.
    student = cases[0].model.student.state_dict()
    assert all(torch.equal(x, student[name]) for name, x in cases[0].model.student_ema.state_dict().items())


class ReadsNothing(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op is not torch.ops.aten._local_scalar_dense.default, "a value was read"
        return op(*args, **(kwargs or {}))


def test_the_host_reads_no_value_of_the_device(monkeypatch) -> None:
    """It would wait for the whole step."""
    case = Case(True, 8, CPU, None)
    case.step(0)
    monkeypatch.setattr(fused_update_triton, "adamw_", lambda *_, **__: None)  # The interpreter reads.
    with ReadsNothing():
        case.update(0.9, torch.zeros(()))


def test_a_state_goes_from_one_form_to_the_other() -> None:
    """Checkpoints are those of torch.optim.AdamW, and a loaded state is found where it then lies."""
    cases = [Case(fused, 8, CPU, None) for fused in (False, True)]
    for i in range(2):
        for case in cases:
            case.step(i)
    plain, fused = ([copy.deepcopy(x.state_dict()) for x in case.optimizers] for case in cases)
    for a, b in zip(plain, fused, strict=True):
        assert a["param_groups"] == b["param_groups"]
        assert a["state"].keys() == b["state"].keys()
        assert {key: x.shape for key, x in a["state"][0].items()} == {key: x.shape for key, x in b["state"][0].items()}
    for case, states in zip(cases, (fused, plain), strict=True):
        for optimizer, state in zip(case.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        case.step(2)
    assert_same(cases[1].state(), cases[0].state())


def test_addresses_are_sent_where_they_change() -> None:
    case = Case(True, 8, CPU, None)
    case.step(0)
    tables = [group.table()[0] for group in case.update.groups]
    assert all(group.table()[0] is table for group, table in zip(case.update.groups, tables, strict=True))
    case.model.student.backbone.mask_token.grad = torch.zeros(1, SHAPE.embed_dim)
    changed = [group.table()[0] is not table for group, table in zip(case.update.groups, tables, strict=True)]
    assert sum(changed) == 1


def test_kept_copies_are_the_casts_and_pass_the_same_gradients_on(tmp_path) -> None:
    config = load_tiniest(tmp_path, *FIXED, "--run.precision", "bf16")
    trainer = Trainer(config, World(0, 1, CPU))
    model, (batch,) = trainer.model.student, draw_batches(config, 0)
    copies = WeightCopies([model], torch.bfloat16)
    with torch.no_grad():
        for weight in copies.parts:
            weight.mul_(1.5)
    copies.refresh()
    found = []
    for kept, passes in ((None, 2), (copies, 2), (None, 1), (copies, 1)):
        model.zero_grad()
        copies.set_gradient_dtype(torch.bfloat16 if kept and passes == 1 else torch.float32)
        with cast_weights(model, torch.bfloat16, kept):
            for _ in range(passes):
                out = model(*batch)
                out.float().square().sum().backward()
        found.append([out, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert {x.data_ptr() for x in copies.parts.values()}.isdisjoint(p.data_ptr() for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    # Of one pass they need no cast.
    assert all(weight.grad.dtype == torch.bfloat16 for weight in copies.parts)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(*found[2:], strict=True))


def test_steps_with_fused_updates_are_the_steps(tmp_path) -> None:
    """Over six steps, one of which has no finite loss; weights come from a checkpoint halfway."""
    states = []
    for fused in (False, True):
        config = load_tiniest(tmp_path, *FIXED)
        trainer = Trainer(config, World(0, 1, CPU))
        trainer.compute_dtype = torch.float16
        if fused:
            trainer.fuse_updates()
        saved = copy.deepcopy(trainer.state_dict())
        for step in range(3):
            trainer.step(draw_batches(config, step), step)
        images, masks = draw_batches(config, 3)[0]
        trainer.step([(images.float().fill_(torch.nan), masks)], 3)
        assert int(trainer.bad_steps) == 1
        trainer.load_state_dict(saved)
        for step in range(2):
            trainer.step(draw_batches(config, step, 2), step)
        states.append({name: x.clone() for name, x in trainer.model.state_dict().items()})
    for name, x in states[0].items():
        torch.testing.assert_close(states[1][name], x, rtol=1e-4, atol=1e-4, msg=name)
