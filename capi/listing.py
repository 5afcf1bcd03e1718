"""What the sources of images share: which files are images, and the error that a source raises."""

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"})


class SourceError(ValueError):
    """A data source that is missing, empty, or has no readable image."""
