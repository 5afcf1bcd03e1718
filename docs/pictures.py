"""Makes the pictures of docs/images: a small encoder is trained on six photographs, then drawn with them.

`make pictures` installs the packages that the photographs come with into .photographs, and runs this. Two CPU cores
with nothing else to do take about eight minutes. The encoder has seen these six photographs alone: the pictures show
what is drawn, not what CAPI learns of millions of images.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from capi import train
from capi.visualize.__main__ import main as visualize

# Where they lie in the packages; who made them, and what allows to show them.
PHOTOGRAPHS = {
    "astronaut": "skimage/data/astronaut.png",  # Eileen Collins; NASA, public domain
    "cat": "skimage/data/chelsea.png",  # Chelsea the cat; Stefan van der Walt, CC0
    "coffee": "skimage/data/coffee.png",  # Rachel Michetti, CC0
    "rocket": "skimage/data/rocket.jpg",  # SpaceX, public domain
    "tower": "sklearn/datasets/images/china.jpg",  # danielbuechele, CC BY 2.0
    "flower": "sklearn/datasets/images/flower.jpg",  # vultilion, CC BY 2.0
}
IMAGES = Path(__file__).parent / "images"
_CROPS_OF_EACH, _CROP = 400, 112


def write_crops(photographs: dict[str, Path], folder: Path) -> None:
    """Square crops of every photograph, of sides from `_CROP` pixels to all of it, the same at every call."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, path in photographs.items():
        with Image.open(path) as file:
            image = file.convert("RGB")
        for i in range(_CROPS_OF_EACH):
            side = round(np.exp(rng.uniform(np.log(_CROP), np.log(min(image.size)))))
            left, top = (int(rng.integers(length - side + 1)) for length in image.size)
            box = (left, top, left + side, top + side)
            crop = image.resize((_CROP, _CROP), Image.Resampling.BICUBIC, box)
            crop.save(folder / f"{name}-{i:03d}.jpg", quality=92)


def main(packages: str, run: str = "runs/pictures") -> int:
    """Trains into `run`, if that is not done, and draws; returns the exit status."""
    photographs = {name: Path(packages) / path for name, path in PHOTOGRAPHS.items()}
    crops = Path(run).with_name("pictures-crops")
    write_crops(photographs, crops)
    options = {
        "data.source": f"folder:{crops}",
        "data.image_size": 96,
        "data.num_workers": 1,
        "model.embed_dim": 128,
        "model.encoder_depth": 4,
        "clustering.n_prototypes": 64,
        "optim.batch_size": 64,
        "optim.steps": 500,
        "run.output_dir": run,
    }
    status = train.main([f"--{name}={value}" for name, value in options.items()])
    for kind, *names in (
        ("pca", "cat", "coffee", "tower", "flower", "--per-image", "--size=208", "--finer=4", "--window=12"),
        ("clusters", "cat", "coffee", "tower", "flower", "--size=176", "--window=12", "--nearest=4"),
        ("masks", "cat", "coffee", "tower", "flower"),
    ):
        png = IMAGES / f"{kind}.png"
        arguments = [str(photographs.get(name, name)) for name in names]
        status = status or visualize([kind, run, *arguments, "--output", str(png)])
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
