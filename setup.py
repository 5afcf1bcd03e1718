import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="capi",
    version=re.search(r'^__version__ = "(.+)"$', (ROOT / "capi_kernels/__init__.py").read_text(), re.MULTILINE)[1],
    description="CAPI (Cluster and Predict Latent Patches): Triton kernels, and a lean model and trainer on top",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={
        "Paper": "https://arxiv.org/abs/2502.08769",
        "Code of the paper's authors": "https://github.com/facebookresearch/capi",
    },
    keywords=["self-supervised learning", "masked image modeling", "vision transformer", "Triton", "Sinkhorn-Knopp"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["capi", "capi.*", "capi_kernels", "capi_kernels.*"]),
    package_data={"capi": ["presets/*.yaml", "py.typed"], "capi_kernels": ["py.typed"]},
    install_requires=[
        # On a machine with a GPU it brings the Triton that it was built for; without Triton all runs in plain PyTorch.
        "torch>=2.10",
        "einops",
        "jaxtyping",
        "numpy",
        "jsonargparse[signatures]",
        "matplotlib",
        "pillow",
        "pyyaml",
        "safetensors",
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        "data": ["braceexpand", "datasets", "fsspec[http]"],
        "bench": ["pytest", "pytest-benchmark", "torchvision", "xformers"],
        "hub": ["huggingface_hub"],
        "mlflow": ["mlflow-skinny"],
        "onnx": ["onnx", "onnxscript"],
        "wandb": ["wandb"],
        "dev": [
            "beartype",
            "huggingface_hub",
            "hypothesis",
            "mlflow-skinny",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "ruff",
            "wandb",
            # Its interpreter runs the kernels in the tests of a machine without a GPU; it is not on every platform.
            'triton; platform_system == "Linux"',
        ],
    },
)
