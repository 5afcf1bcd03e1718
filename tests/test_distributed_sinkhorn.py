"""Images spread over processes against one process that has them all: CPU ops, and kernels in the interpreter."""

import inspect
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from interpreter import hasten
from numerics import assert_as_accurate, assert_draws_as_accurate, least_exact
from ranks import run_ranks
from torch import Tensor
from torch.distributed import ReduceOp, all_gather, all_reduce, get_rank, get_world_size, group

from capi_kernels import Potentials, clustering_head, reference, sinkhorn_positionwise

POSITIONS, IMAGES, PROTOTYPES, DIM = 5, 10, 9, 4  # positions that the chunks in flight cannot share evenly
TEMPERATURE = 0.1


def images_of(rank: int, world_size: int) -> slice:
    """Every rank has another number of images: 3 and 7, or 1, 2, 3 and 4."""
    sizes = {2: (3, 7), 4: (1, 2, 3, 4)}[world_size]
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (POSITIONS, IMAGES, DIM), (PROTOTYPES, DIM), (PROTOTYPES,)
    features, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return features, weight, bias


def results(loss: Tensor, potentials: Potentials, dweight: Tensor, dbias: Tensor) -> dict[str, Tensor]:
    """Of the potentials, whose factors may move, what is defined: the products [positions, images, prototypes]."""
    product = potentials.column.unsqueeze(-2) * potentials.row.unsqueeze(-1)
    product = product.reshape(POSITIONS, -1, PROTOTYPES)
    return {"loss": loss.detach(), "product": product, "dweight": dweight, "dbias": dbias}


def heads_of(features: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, positionwise: bool) -> dict:
    features, (weight, bias) = features.to(dtype), (x.to(dtype, copy=True).requires_grad_() for x in (weight, bias))
    head = reference.clustering_head(features, weight, bias, positionwise=positionwise, process_group=None)
    head.loss.backward()
    return results(*head, weight.grad, bias.grad)


def head_on_cpu(features: Tensor, weight: Tensor, bias: Tensor, positionwise: bool) -> dict:
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    head = clustering_head(features, weight, bias, positionwise=positionwise, position_chunk=2)
    head.loss.backward()
    return results(*head, weight.grad, bias.grad)


def head_on_kernels(features: Tensor, weight: Tensor, bias: Tensor, positionwise: bool) -> dict:
    from capi_kernels.heads import clustering_head_triton

    rank, world_size = get_rank(), get_world_size()
    most = max(images_of(rank, world_size).stop - images_of(rank, world_size).start for rank in range(world_size))
    # The first rank, which has the fewest images, has memory for two positions of the most.
    clustering_head_triton.logits_bytes = lambda device: 4 * PROTOTYPES * (2 * most + rank * 100)
    assert clustering_head_triton.default_position_chunk(features, PROTOTYPES, torch.float32, group.WORLD) == 2
    assert clustering_head_triton.default_position_chunk(features, PROTOTYPES, torch.float32, None) > 2
    head = clustering_head_triton.clustering_head(
        features, weight, bias, 0.06, 0.12, 3, 1e-8, positionwise, None, group.WORLD, torch.float32
    )
    return results(*head)


def compare_with_one_process(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    for kernels in (False, True) if find_spec("triton") else (False,):
        if kernels and not torch.cuda.is_available():
            hasten()
        compare(rank, world_size, kernels)
    torch.distributed.destroy_process_group()


def compare(rank: int, world_size: int, kernels: bool) -> None:
    features, weight, bias = inputs()
    mine = images_of(rank, world_size)
    logits = F.linear(features, weight, bias)
    logits[:, 0, 5] = 60.0  # the maximum of one rank, far above that of the others
    logits[:, images_of(0, world_size), 6] = -torch.inf  # a prototype of which one rank sees nothing
    oracle = reference.sinkhorn_positionwise(logits.double(), 3, temperature=TEMPERATURE, process_group=None)
    single = reference.sinkhorn_positionwise(logits, 3, temperature=TEMPERATURE, process_group=None)
    if kernels:
        from capi_kernels.sinkhorn.balance_triton import balanced

        out, potentials = balanced(logits[:, mine], 3, 1e-8, TEMPERATURE, group.WORLD, True)
        for part in range(2):  # The potentials of the columns are the same on every rank, to the last bit.
            everywhere = [torch.empty_like(potentials[part]) for _ in range(world_size)]
            all_gather(everywhere, potentials[part])
            assert all(torch.equal(potentials[part], x) for x in everywhere)

        def sinkhorn(x: Tensor) -> Tensor:
            return balanced(x, 3, 1e-8, TEMPERATURE, group.WORLD, True)[0]

    else:

        def sinkhorn(x: Tensor) -> Tensor:
            return sinkhorn_positionwise(x, 3, temperature=TEMPERATURE)

        out = sinkhorn(logits[:, mine])
    assert_as_accurate(out, single[:, mine], oracle[:, mine])
    # Leading axes that can be one on the first rank alone.
    twice = torch.stack([logits[:, mine], logits[:, mine].flip(0)], dim=min(rank, 1)).transpose(0, min(rank, 1))
    assert twice.is_contiguous() == (rank == 0)
    torch.testing.assert_close(sinkhorn(twice), torch.stack([out, out.flip(0)]))
    apart = reference.sinkhorn_positionwise(logits[:, mine], 3, temperature=TEMPERATURE, process_group=None)
    assert not torch.allclose(apart, single[:, mine], atol=1e-2)

    images = mine.stop - mine.start
    head_of = head_on_kernels if kernels else head_on_cpu
    for positionwise in (True, False):
        compared = []
        for seed in range(2 if kernels else 4):  # The loss is one number: several are judged together.
            whole = inputs(seed)
            oracle = heads_of(*whole, torch.float64, positionwise)
            single = least_exact(partial(heads_of, *whole, torch.float32, positionwise), oracle)
            features, *layer = whole
            actual = head_of(features[:, mine], *layer, positionwise)
            product, expected, _ = (x.pop("product") for x in (actual, oracle, single))
            torch.testing.assert_close(product.double(), expected[:, mine], rtol=1e-4, atol=0)
            for name in ("loss", "dweight", "dbias"):  # local means: weighted by their images they make the global one
                actual[name] = actual[name] * (images / IMAGES)
                all_reduce(actual[name], ReduceOp.SUM)
            compared.append([list(x.values()) for x in (actual, single, oracle)])
        assert_draws_as_accurate(compared)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_equal_one(world_size: int, tmp_path: Path) -> None:
    run_ranks(compare_with_one_process, (world_size, tmp_path), world_size)


def compare_over_nccl(rank: int, world_size: int, folder: Path) -> None:
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    logits = torch.randn((8, 64 * world_size, 1024), generator=torch.Generator().manual_seed(0)).cuda()
    alone = sinkhorn_positionwise(logits, temperature=0.06, process_group=None)
    mine = slice(64 * rank, 64 * (rank + 1))
    torch.testing.assert_close(sinkhorn_positionwise(logits[:, mine], temperature=0.06), alone[:, mine])
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpus_equal_one(tmp_path: Path) -> None:
    run_ranks(compare_over_nccl, (torch.cuda.device_count(), tmp_path), torch.cuda.device_count())


def official_sinkhorn_knopp(M: Tensor, n_iterations: int, eps: float = 1e-8) -> Tensor:
    """The official function on one process, restated."""
    M = torch.exp(M - M.amax(-2, keepdim=True) + (0 if M.dtype == torch.float16 else 50))
    for _ in range(n_iterations):
        M = M / (M.sum(-2, keepdim=True) + eps)
        M = M / (M.sum(-1, keepdim=True) + eps)
    return M


def test_the_official_call_means_the_same() -> None:
    """`sinkhorn_knopp(logits / temperature, n_iterations=n)`, of positions first or of all tokens together."""
    parameters = list(inspect.signature(sinkhorn_positionwise).parameters.values())
    official = list(inspect.signature(official_sinkhorn_knopp).parameters.values())
    for ours, theirs in zip(parameters, official, strict=False):
        assert ours.kind == theirs.kind
    assert parameters[1].name == "n_iterations"
    assert (parameters[2].name, parameters[2].default) == ("eps", 1e-8)
    assert all(parameter.kind == parameter.KEYWORD_ONLY for parameter in parameters[3:])
    logits = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for M in (logits, logits.flatten(0, -2)):
        expected = official_sinkhorn_knopp(M / 0.06, 3)
        for actual in (
            sinkhorn_positionwise(M / 0.06, 3),
            sinkhorn_positionwise(M / 0.06, n_iterations=3),
            sinkhorn_positionwise(M, 3, 1e-8, temperature=0.06),
        ):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
        assert (sinkhorn_positionwise(M / 0.06, 3, 0.5) - expected).abs().max() > 1e-2
