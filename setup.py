from setuptools import find_packages, setup

setup(
    name="capi",
    version="0.1.0",
    description="CAPI (Cluster and Predict Latent Patches): Triton kernels, and a lean model and trainer on top",
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["capi", "capi.*", "capi_kernels", "capi_kernels.*"]),
    package_data={"capi": ["presets/*.yaml"]},
    install_requires=[
        "torch>=2.10",
        # Not on every platform; without it everything runs in plain PyTorch.
        'triton; platform_system == "Linux"',
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
        "dev": ["beartype", "pytest", "pytest-benchmark", "ruff"],
    },
)
