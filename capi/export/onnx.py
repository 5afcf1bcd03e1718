"""ONNX: one file, for batches and images of any size."""

import logging
import warnings
from pathlib import Path

import torch

from capi.checkpoint import write_atomically
from capi.export.plain import PlainEncoder
from capi.images import IMAGENET_MEAN, IMAGENET_STD
from capi.model import Backbone

_MOST_BYTES = 2**31 - 2**24  # A file of protocol buffers holds 2 GiB.


def write_onnx(path: Path, backbone: Backbone) -> None:
    """Writes a graph from float32 `images` [batch, 3, height, width], normalised, to `global_vector`, `registers`
    and `feature_map` as `Backbone` gives them.

    Both sides must divide by the patch; it and the normalisation stand in the file's metadata.

    Raises:
        ValueError: the packages for it are missing, or the encoder is too large for one file.
        OSError: the file could not be written; `path` is as it was.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"ONNX needs the packages onnx and onnxscript (pip install 'capi[onnx]'): {error}") from error
    parts = (backbone.patch_embed, backbone.encoder, backbone.decoder.blocks[0])
    size = sum(x.numel() * x.element_size() for part in parts for x in part.parameters())
    if size > _MOST_BYTES:
        raise ValueError(f"an ONNX file holds at most 2 GiB of weights, got an encoder of {size / 2**30:.1f} GiB")
    program = _traced(PlainEncoder(backbone).eval(), backbone.patch_size)
    program.model.metadata_props.update(
        patch_size=str(backbone.patch_size), mean=str(list(IMAGENET_MEAN)), std=str(list(IMAGENET_STD))
    )
    write_atomically(path, lambda file: program.save(file, external_data=False))


def _traced(encoder: PlainEncoder, patch_size: int) -> torch.onnx.ONNXProgram:
    """The graph of any number of images, rows and columns, in the opset that this PyTorch recommends."""
    batch, rows, columns = (torch.export.Dim(name) for name in ("batch", "rows", "columns"))
    sizes = {0: batch, 2: patch_size * rows, 3: patch_size * columns}
    # Of its own ways PyTorch warns users: of torchvision, which is not needed, and of names that it uses itself.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            encoder,
            (torch.zeros(2, 3, 3 * patch_size, 5 * patch_size),),
            input_names=["images"],
            output_names=["global_vector", "registers", "feature_map"],
            dynamic_shapes={"images": sizes},
            dynamo=True,
            verbose=False,
        )
