"""The benchmarks' own parts: counts, peers, the official step, the race."""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import assert_as_accurate
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

pytest.importorskip("pytest_benchmark")

from benchmarks import costs, measure, official_code, official_model, official_step, peers
from benchmarks.attention import AttentionCase
from benchmarks.heads import HeadCase, enter_sinkhorn, enter_student_loss
from benchmarks.measure import OURS, Compiled, Failed, Measurement, compilation, race
from benchmarks.official_step import OfficialStep, cast_parameters
from benchmarks.shapes import Logits
from benchmarks.timing import Contestant, Unavailable
from benchmarks.train_step import configuration, draw_batch, our_step
from capi.distributed import World
from capi.step import Trainer

CPU = torch.device("cpu")
peers_rotate = peers._rotate
ONE_BLOCK_EACH = ("--model.encoder_depth", "1", "--model.predictor_depth", "1")
H200 = costs.Ceilings(4300.0, 790.0, 1 << 30)


# The figures of the floors: bytes, FLOP and microseconds on one H200, batch 512, 16 heads of 64, bf16.
@pytest.mark.parametrize(
    ("queries", "keys", "direction", "megabytes", "gigaflop", "microseconds"),
    [
        (106, 106, "forward", 448, 23.6, 104),
        (106, 106, "backward", 782, 58.9, 182),
        (272, 272, "forward", 1150, 155, 267),
        (8, 106, "forward", 239, None, 56),
        (8, 106, "backward", 470, None, 109),
        (166, 106, "forward", None, None, 133),
        (166, 106, "backward", None, None, 225),
    ],
)
def test_attention_moves_and_computes_what_the_shapes_say(
    queries: int,
    keys: int,
    direction: str,
    megabytes: float | None,
    gigaflop: float | None,
    microseconds: float,
) -> None:
    cost = costs.attention(512, queries, keys, 16, 64, 2, direction)
    if megabytes is not None:
        assert cost.bytes / 1e6 == pytest.approx(megabytes, rel=0.002)
    if gigaflop is not None:
        assert cost.flop / 1e9 == pytest.approx(gigaflop, rel=0.005)
    assert cost.floor_seconds(H200) * 1e6 == pytest.approx(microseconds, rel=0.01)


def test_the_head_moves_ten_bytes_an_element_and_its_products_take_longer() -> None:
    """Three reads, then a row pass that reads and writes: 10.1 bytes with what else is small."""
    cost = costs.clustering_head(256, 512, 16384, 3, 1024, 2)
    assert cost.bytes / 2**31 == pytest.approx(10.1, abs=0.1)
    assert cost.bytes / (0.9 * 4.8e12) == pytest.approx(5.0e-3, rel=0.01)
    assert cost.flop == 2 * 2 * 256 * 512 * 1024 * 16384
    assert cost.floor_seconds(H200) == pytest.approx(cost.flop / 790e12)
    assert costs.sinkhorn_positionwise(256, 512, 16384, 3, 2).bytes == cost.bytes


def test_a_floor_is_the_longer_of_the_two_times() -> None:
    ceilings = costs.Ceilings(1000.0, 1.0, 1 << 30)
    assert costs.Cost(10**12, 10**11).floor_seconds(ceilings) == 1.0
    assert costs.Cost(10**11, 3 * 10**12).floor_seconds(ceilings) == 3.0
    assert costs.Cost(None, 3 * 10**12).floor_seconds(ceilings) == 3.0
    assert costs.Cost(None, None).floor_seconds(ceilings) is None
    assert costs.Cost(10**12, 10**11).floor_seconds(None) is None


@pytest.mark.parametrize("name", [OURS, "sdpa"])
@pytest.mark.parametrize("queries", [None, 3])
def test_attention_entrants_compute_the_definition(name: str, queries: int | None) -> None:
    """Entering checks output and gradients; both directions then run."""
    case = AttentionCase(5, queries, 29, 2, 8, CPU, torch.float32)
    for direction in ("forward", "backward"):
        contestant = case.enter(name, direction)
        contestant.run(*contestant.operands(0))


@pytest.mark.parametrize("queries", [None, 3])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_definition(queries: int | None) -> None:
    """Forward only: on a CPU it has no gradient."""
    case = AttentionCase(5, queries, 29, 2, 8, CPU, torch.float32)
    q, k, v, _, *tables = case.inputs()[0]
    same_dtype, oracle = case.references()
    assert_as_accurate(case.implementation("flex_attention")(q, k, v, *tables), same_dtype[0], oracle[0])


@pytest.mark.parametrize(
    "wrong",
    [lambda q, k, *tables: (q, k), lambda q, k, *tables: peers_rotate(q, 2 * k - k.detach(), *tables)],
    ids=["no rotary embedding", "twice the gradient of k"],
)
def test_a_wrong_peer_does_not_enter(monkeypatch: pytest.MonkeyPatch, wrong: Callable) -> None:
    case = AttentionCase(2, None, 7, 2, 8, CPU, torch.float32)
    monkeypatch.setattr(peers, "_rotate", wrong)
    with pytest.raises(AssertionError, match="above the budget"):
        case.enter("sdpa", "forward")


@pytest.mark.parametrize("keys", [8, 9])
def test_the_document_mask_visits_the_blocks_that_hold_pairs_of_one_image(keys: int) -> None:
    mask = peers.document_mask(peers.Layout(images=7, queries=5, keys=keys, device=CPU), block=16)
    image_of_query, image_of_key = (np.arange(7).repeat(n) for n in (5, keys))
    pairs = np.zeros((48, 64), dtype=bool)
    pairs[:35, : 7 * keys] = image_of_query[:, None] == image_of_key
    expected = pairs.reshape(3, 16, 4, 16).any(axis=(1, 3))
    assert (mask.to_dense()[0, 0].bool().numpy() == expected).all()
    assert mask.mask_mod(0, 0, torch.tensor(34), torch.tensor(7 * keys - 1))
    assert not mask.mask_mod(0, 0, torch.tensor(34), torch.tensor(6 * keys - 1))


def test_peers_that_need_a_gpu_say_so() -> None:
    layout = peers.Layout(2, 3, 3, CPU)
    for name in ("varlen_attn", "xformers"):
        with pytest.raises(Unavailable, match=r"GPU only|not installed|has no"):
            peers.attention(name, layout)


def test_xformers_is_given_the_runtime_that_it_is_linked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a PyTorch of CUDA 13 it would else find no operator."""
    library = tmp_path / "nvidia" / "cuda_runtime" / "lib" / "libcudart.so.12"
    library.parent.mkdir(parents=True)
    library.touch()
    loaded: list[str] = []
    monkeypatch.setattr(peers.ctypes, "CDLL", lambda path, mode: loaded.append(path))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        peers._load_cuda_12()
    finally:
        sys.modules.pop("nvidia", None)
    assert str(library) in loaded


@pytest.mark.parametrize("name", [OURS, "official_eager"])
def test_head_entrants_compute_the_definition(name: str) -> None:
    shape = Logits(3, 5, 40, 3, 8)
    enters = (
        lambda: enter_sinkhorn(name, shape, CPU, torch.float32),
        lambda: HeadCase(shape, CPU, torch.float32).enter(name),
        lambda: enter_student_loss(name, shape, CPU, torch.float32),
    )
    for enter in enters:
        contestant = enter()
        contestant.run(*contestant.operands(0))


def test_a_copy_of_the_official_code_is_of_no_known_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of that of the repository that it lies in."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for arguments in ("init -q", "-c user.name=a -c user.email=b commit -q --allow-empty -m c"):
        subprocess.run(["git", "-C", tmp_path, *arguments.split()], check=True)
    monkeypatch.setenv("CAPI_OFFICIAL", str(copy))
    assert official_code.source() == "facebookresearch/capi of an unknown commit"
    monkeypatch.setenv("CAPI_OFFICIAL", str(tmp_path))
    assert len(official_code.source()) == len("facebookresearch/capi ") + 40


def test_the_official_head_gives_our_targets() -> None:
    case = HeadCase(Logits(3, 5, 40, 3, 8), CPU, torch.float32)
    ours, theirs = (case.enter(name) for name in (OURS, "official_eager"))
    torch.testing.assert_close(ours.run(*ours.arguments(0))[0], theirs.run(*theirs.arguments(0))[0])


def test_the_official_step_is_ours() -> None:
    """The same losses for three steps, so the same updates: restated, or with CAPI_OFFICIAL the code itself."""
    options = ["--model.drop_path_rate", "0", "--masking.prediction_subsampling", "0.3"]
    config = configuration("tiny", 6, CPU, torch.float32, *options)
    config.model.embed_dim, config.model.n_registers = 32, 8
    trainer = Trainer(config, World(0, 1, CPU))
    official = OfficialStep(config, trainer.model.state_dict(), CPU, torch.float32, backend=None)
    for step in range(100, 103):
        images, masks = draw_batch(config, step, CPU)
        ours = our_step(trainer, images, masks, step)
        theirs = official(official.prepare(images), masks, step)
        for our_loss, their_loss in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our_loss.double(), their_loss.double(), rtol=1e-5, atol=0)


def test_the_restated_step_groups_parameters_as_ours() -> None:
    config = configuration("tiny", 6, CPU, torch.float32)
    model, trainer = official_model.build_model(config), Trainer(config, World(0, 1, CPU))

    def multipliers(student: torch.nn.Module, groups: list[dict], decay: str) -> dict[str, tuple[float, float]]:
        names = {parameter: name for name, parameter in student.named_parameters()}
        return {names[x]: (group["lr_multiplier"], group[decay]) for group in groups for x in group["params"]}

    ours = multipliers(trainer.model.student, trainer.optimizers[0].param_groups, "weight_decay")
    ours = {name: (lr, pytest.approx(decay / config.optim.weight_decay)) for name, (lr, decay) in ours.items()}
    theirs = multipliers(model["student"], official_model.parameter_groups(model["student"], config), "wd_multiplier")
    assert {lr for name, (lr, _) in theirs.items() if "rope" in name} == {0.0}
    assert {name: x for name, x in theirs.items() if "rope" not in name} == ours


def test_cast_parameters_compute_in_another_type_and_keep_their_own() -> None:
    layer = torch.nn.Linear(3, 2)
    weight = layer.weight
    cast_parameters(layer, torch.bfloat16)
    out = layer(torch.ones(1, 3, dtype=torch.bfloat16))
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert weight.dtype == weight.grad.dtype == torch.float32


def test_a_race_alternates_and_leaves_out_what_cannot_run() -> None:
    calls = []

    def entrant(name: str) -> Contestant:
        if name == "absent":
            raise Unavailable("not installed")
        return Contestant(calls.append, lambda round_number: ((name, round_number),))

    names = ("ours", "absent", "peer")
    results = race({name: lambda name=name: entrant(name) for name in names}, CPU, 4, 60)
    assert str(results["absent"]) == "not installed"
    assert [len(results[name].seconds) for name in ("ours", "peer")] == [4, 4]
    timed = [(name, i) for i in range(4) for name in ("ours", "peer")]
    assert calls == [("ours", 0), ("peer", 0), *timed]  # First for the memory.


def test_a_race_ends_early_but_not_before_three_rounds() -> None:
    results = race({"ours": lambda: Contestant(lambda: None)}, CPU, 9, 0.0)
    assert len(results["ours"].seconds) == 3


def test_a_race_measures_the_peak_of_a_call() -> None:
    results = race({"ours": lambda: Contestant(lambda: torch.zeros(1000).sum())}, CPU, 3, 60)
    assert 4000 <= results["ours"].peak_memory_bytes < 4200


@pytest.mark.parametrize("error", [AssertionError("wrong result"), RuntimeError("wrong result")], ids=repr)
@pytest.mark.parametrize("wrong", ["ours", "peer"])
def test_nothing_fails_quietly_on_a_cpu_nor_stops_the_others(wrong: str, error: Exception) -> None:
    def enter(name: str) -> Contestant:
        if name == wrong:
            raise error
        return Contestant(lambda: None)

    results = race({name: lambda name=name: enter(name) for name in ("ours", "peer")}, CPU, 3, 60)
    assert isinstance(results.pop(wrong), Failed)
    (other,) = results.values()
    assert len(other.seconds) == 3


def test_a_run_that_fails_in_its_rounds_is_left_out_of_those_that_follow() -> None:
    calls = []

    def run(round_number: int) -> None:
        calls.append(round_number)
        assert round_number < 2, "wrong in the third round"

    entrants = {"ours": lambda: Contestant(run, lambda i: (i,)), "peer": lambda: Contestant(lambda: None)}
    results = race(entrants, CPU, 5, 60)
    assert str(results["ours"]) == "AssertionError: wrong in the third round"
    assert len(results["peer"].seconds) == 5
    assert calls == [0, 0, 1, 2]


# Graph breaks


def compiled_step(recompute: bool, dtype: torch.dtype, *options: str) -> tuple[OfficialStep, tuple]:
    config = configuration("tiny", 6, CPU, torch.float32, *options)
    state = Trainer(config, World(0, 1, CPU)).model.state_dict()
    step = OfficialStep(config, state, CPU, dtype, backend="eager", recompute=recompute)
    images, masks = draw_batch(config, 0, CPU)
    return step, (step.prepare(images), masks, 100)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    with torch._dynamo.config.patch(ignore_logging_functions=set()):
        torch.compiler.reset()
        yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("recompute", "dtype"), [(False, torch.float32), (True, torch.bfloat16)], ids=str)
def test_the_official_step_compiles_into_two_graphs_without_a_break(recompute: bool, dtype: torch.dtype) -> None:
    """With CAPI_OFFICIAL the code itself, whose log lines would break the graphs."""
    step, arguments = compiled_step(recompute, dtype)

    def enter() -> Contestant:
        step(*arguments)
        return Contestant(lambda: None)

    assert race({"official_compiled": enter}, CPU, 3, 0.0)["official_compiled"].compiled == Compiled(graphs=2)


@pytest.mark.usefixtures("fresh_compiler")
def test_log_lines_break_no_graph_of_the_official_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The official code has some, which is restated without."""
    monkeypatch.delenv("CAPI_OFFICIAL", raising=False)
    logger, do_student = logging.getLogger("official"), official_model.do_student

    def talkative(*arguments: object) -> torch.Tensor:
        logger.debug(f"a step of {len(arguments)} arguments")
        return do_student(*arguments)

    monkeypatch.setattr(official_model, "do_student", talkative)
    step, arguments = compiled_step(False, torch.float32, *ONE_BLOCK_EACH)
    torch._dynamo.utils.counters.clear()
    step(*arguments)
    assert compilation() == Compiled(graphs=2)


def with_a_policy_that_is_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recomputed(torch.nn.Module):
        def __init__(self, block: torch.nn.Module):
            super().__init__()
            self.block = block

        @classmethod
        def policy(cls, *arguments: object, **options: object) -> CheckpointPolicy:
            return official_step._policy(*arguments, **options)

        def forward(self, *arguments: torch.Tensor, **options: torch.Tensor | None) -> torch.Tensor:
            contexts = partial(create_selective_checkpoint_contexts, self.policy)
            return checkpoint(self.block, *arguments, use_reentrant=False, context_fn=contexts, **options)

    monkeypatch.setattr(official_step, "_Recomputed", Recomputed)


def with_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    do_student = official_model.do_student

    def broken(*arguments: object) -> torch.Tensor:
        torch._dynamo.graph_break()
        return do_student(*arguments)

    monkeypatch.setattr(official_model, "do_student", broken)
    monkeypatch.delenv("CAPI_OFFICIAL", raising=False)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Of what a break leaves over.
@pytest.mark.parametrize("plant", [with_a_policy_that_is_a_method, with_a_break])
def test_a_peer_whose_graph_breaks_has_failed(plant: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would run in part without the compiler."""
    plant(monkeypatch)
    step, arguments = compiled_step(True, torch.float32, *ONE_BLOCK_EACH)

    def enter() -> Contestant:
        step(*arguments)
        return Contestant(lambda: None)

    results = race({"official_compiled": enter, "ours": lambda: Contestant(lambda: None)}, CPU, 3, 0.0)
    assert isinstance(results["official_compiled"], Failed)
    assert "expected 0 graph breaks, got " in str(results["official_compiled"])
    assert results["ours"].compiled == Compiled(), "breaks are counted for each apart"


def test_inputs_rotate_past_the_cache_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = type("Properties", (), {"L2_cache_size": 1000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    for numbers, copies in ((25, 16), (100, 6), (500, 2), (600, 1)):
        inputs = measure.rotated(
            lambda seed, numbers=numbers: (torch.full((numbers,), float(seed)),), torch.device("cuda")
        )
        expected = [[i] * numbers for i in range(copies)]
        assert [x.tolist() for (x,) in inputs] == expected
    assert len(measure.rotated(lambda seed: (torch.zeros(1),), CPU)) == 1


def test_the_deadline_leaves_out_what_needs_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPI_BENCH_SECONDS", "100")
    deadline = measure.Deadline()
    deadline.check(50)
    with pytest.raises(Unavailable, match="it needs 200"):
        deadline.check(200)
    monkeypatch.delenv("CAPI_BENCH_SECONDS")
    measure.Deadline().check(1e9)


def test_measurements_have_a_median() -> None:
    assert Measurement([3.0, 1.0, 2.0], 0).median == 2.0
