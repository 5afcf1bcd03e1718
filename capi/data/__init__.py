"""Images: where they come from, how they are read and cropped, and the batches made of them."""

from capi.data.stream import Batch, ImageStream, evaluation_images

__all__ = ["Batch", "ImageStream", "evaluation_images"]
