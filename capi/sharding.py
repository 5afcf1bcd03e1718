"""Weights sharded over the ranks by PyTorch's FSDP2: each rank keeps its rows of every tensor, and a block is gathered
as it computes.

Masters, their gradients' sums over the ranks, moving average and moments are of float32, each rank's own rows. Blocks
are gathered in the type that they compute in. The teacher's clustering is no part of it: of a model of the paper's size
it is a thirtieth, it is read once for every micro-batch, and its gradients are summed while the student computes.
"""

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from capi.distributed import World
from capi.model import CAPI


def shard(model: CAPI, dtype: torch.dtype, world: World) -> None:
    """Leaves each rank its rows of student and moving average, on its device, to be computed with in `dtype`.

    A unit that is gathered at once is a block, the patch embedding or the head. Every rank must come with the same
    weights, of which its own rows stay.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    # Coordinates are among what blocks are called with: none of it is cast.
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    computed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    average = model.student_ema
    for student, root in ((model.student, model.student), (average, average.backbone)):
        backbone = student.backbone
        # Rotary frequencies, which are rounded nowhere, stay whole on every rank.
        frozen = {p for name, p in student.named_parameters() if name.endswith("rope.freqs")}
        # Resharded behind the forward, roots too: the moving average has no backward pass that would do it.
        options = {"mesh": mesh, "ignored_params": frozen, "reshard_after_forward": True}
        for unit in (backbone.patch_embed, *backbone.encoder.blocks, *backbone.decoder.blocks):
            fully_shard(unit, mp_policy=computed, **options)
        fully_shard(student.head, mp_policy=exact, **options)  # The norms of its weights are float32's.
        fully_shard(root, mp_policy=exact, **options)
    register_fsdp_forward_method(average.backbone, "encode")  # All that the teacher computes.


def local(x: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, in its memory; others as they are."""
    return x.to_local() if isinstance(x, DTensor) else x


def full_state_dict(module: nn.Module) -> dict[str, Shaped[Tensor, "..."]]:
    """The module's state dict with whole tensors on rank 0's CPU, {} on the other ranks; all of them call it.

    Gathered tensor by tensor, so that the device holds one of them at a time.
    """
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def whole_average(model: CAPI, world: World) -> CAPI | None:
    """Moving average and clustering for rank 0 to read, None on the other ranks; all of them call it.

    Where nothing is sharded it is the model itself; else a copy on the CPU, whose student has no weights.
    """
    if not any(isinstance(p, DTensor) for p in model.student_ema.parameters()):
        return model if world.is_main else None
    average = full_state_dict(model.student_ema)
    if not world.is_main:
        return None
    with torch.device("meta"):
        whole = CAPI(model.student_ema.backbone.config, model.teacher["head"].config)
    whole.student_ema.load_state_dict(average, assign=True)
    whole.teacher.load_state_dict({name: x.cpu() for name, x in model.teacher.state_dict().items()}, assign=True)
    return whole
