"""Images: where they come from, how they are read and cropped, and the batches made of them."""

from capi.data.readable import evaluation_images
from capi.data.stream import Batch, ImageStream

__all__ = ["Batch", "ImageStream", "evaluation_images"]
