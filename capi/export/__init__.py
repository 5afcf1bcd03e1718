"""An encoder for other programs: the official layout, safetensors, a Hugging Face repository, ONNX."""

from capi.export.files import FORMATS, export

__all__ = ["FORMATS", "export"]
