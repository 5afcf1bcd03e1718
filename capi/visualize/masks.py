"""What a student sees of pictures, which positions it is asked for, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from numpy import ndarray
from PIL import Image, ImageDraw
from torch import Tensor

from capi import pretrained
from capi.checkpoint import is_checkpoint, load_checkpoint, load_newest_checkpoint
from capi.config import Config, MaskingConfig, config_of
from capi.masking import check_masking, sample_masks
from capi.model import CAPI, normalize_images
from capi.seeding import Purpose, generator
from capi.visualize.clusters import colours_of
from capi.visualize.sheet import Panel, bytes_of, sheet

_SIDE = 224
_HIDDEN, _NOT_ASKED = 150, 238  # Greys.


@dataclass
class Answers:
    """Of one picture, patch by patch, in its grid of rows and columns."""

    visible: Bool[Tensor, "rows columns"]
    asked: Bool[Tensor, "rows columns"]
    teacher: Int[Tensor, "rows columns"]
    """The prototype that the teacher, who sees everything, gives the patch."""
    student: Int[Tensor, "rows columns"]
    """The prototype that the student predicts; -1 where it is not asked."""

    @property
    def agreeing(self) -> Bool[Tensor, "rows columns"]:
        return self.student == self.teacher


def load_model(name: str) -> tuple[CAPI, Config]:
    """The model of a training checkpoint, or of the newest one of a run's folder, frozen, and the run's configuration.

    Raises:
        ValueError: there is no such path, no checkpoint in it, or it holds an encoder alone.
        OSError: the checkpoint cannot be read.
    """
    expected = "expected a training checkpoint, or the folder of a run with one"
    path = Path(name).expanduser()
    if path.is_dir():
        inside = path.parent if path.name == "checkpoints" else path
        content = load_checkpoint(path, "model.") if is_checkpoint(path) else load_newest_checkpoint(inside, "model.")
        if content is None:
            raise ValueError(f"{name} has no checkpoints/step_*, and students are in these alone; {expected}")
    elif not path.is_file():
        raise ValueError(f"{expected}, got {name}")
    elif (weights := pretrained.read(name)).run_config is None:
        raise ValueError(f"{name} is {weights.kind} without the student that answers; {expected}")
    else:
        content = load_checkpoint(weights.path)
    config = config_of(content["config"])
    model = CAPI(config.model, config.clustering)
    model.load_state_dict(content["trainer"]["model"])
    return model.eval().requires_grad_(False), config


@torch.no_grad()
def ask(
    model: CAPI, pictures: UInt8[Tensor, "images 3 height width"], masking: MaskingConfig, seed: int
) -> list[Answers]:
    """Draws a mask of each picture and asks the student, as in training, but for the teacher's balancing.

    Raises:
        ValueError: the sides are no multiples of the patch, or no mask of so few patches hides and shows some.
    """
    size = model.student.backbone.config.patch_size
    if any(side % size for side in pictures.shape[2:]):
        raise ValueError(f"sides must be multiples of the patch size {size}, got {tuple(pictures.shape[2:])}")
    grid = pictures.shape[2] // size, pictures.shape[3] // size
    check_masking(masking, grid)
    device, layer = next(model.parameters()).device, model.teacher["head"].layer
    prototypes = pretrained.Prototypes(layer.weight, layer.bias)
    answers = []
    for i, picture in enumerate(pictures):
        masks = sample_masks(masking, grid, [generator(Purpose.MASK, seed, i)])
        images = normalize_images(picture[None].to(device))
        teacher = pretrained.clusters(model.teacher_features(images)[0], prototypes).cpu()
        student = torch.full_like(teacher, -1)
        student[masks.predict_indices] = model.student(images, masks.to(device)).argmax(-1).cpu()
        visible, asked = torch.zeros(2, len(teacher), dtype=torch.bool)
        visible[masks.visible_indices] = True
        asked[masks.predict_indices] = True
        answers.append(Answers(*(x.unflatten(0, grid) for x in (visible, asked, teacher, student))))
    return answers


def draw_masks(
    pictures: UInt8[Tensor, "images 3 height width"],
    answers: Sequence[Answers],
    *,
    names: Sequence[str],
    encoder: str = "",
) -> Image.Image:
    """Draws of every picture what the student sees, the teacher's clusters where it is asked, and its answers."""
    groups = []
    for picture, answer, name in zip(pictures, answers, names, strict=True):
        patch = max(1, round(_SIDE / max(answer.asked.shape)))
        height, width = (patch * n for n in answer.asked.shape)
        resized = np.asarray(Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((width, height)))
        n_agreeing, n_asked = int(answer.agreeing.sum()), int(answer.asked.sum())
        groups.append(
            [
                Panel(resized, f"{name}, {answer.visible.numel()} patches"),
                Panel(_seen(resized, answer, patch), f"sees {int(answer.visible.sum())}, is asked for {n_asked}"),
                Panel(_coloured(answer.teacher, answer, patch), "the teacher's clusters"),
                Panel(_coloured(answer.student, answer, patch, crossed=True), f"answers: {n_agreeing} agree"),
            ]
        )
    asked_for = torch.cat([answer.teacher[answer.asked] for answer in answers])
    n_agreeing, n_asked = sum(int(answer.agreeing.sum()) for answer in answers), len(asked_for)
    constant = asked_for.bincount().max().item() / n_asked
    note = (
        f"The student sees the patches that are not grey, and says of each framed position which cluster the teacher, "
        f"which sees everything, gives it. Its answer agrees at {n_agreeing} of {n_asked} positions "
        f"({100 * n_agreeing / n_asked:.0f} %; the commonest cluster everywhere: {100 * constant:.0f} %); crosses mark "
        "other answers. A colour is a prototype; the teacher's is that of its largest logit, without the balancing."
    )
    return sheet("What the student sees, is asked, and answers", f"{encoder}{note}", groups)


def _seen(pixels: UInt8[ndarray, "height width 3"], answer: Answers, patch: int) -> UInt8[ndarray, "height width 3"]:
    hidden = (~answer.visible).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    image = Image.fromarray(np.where(hidden[..., None].numpy(), np.uint8(_HIDDEN), pixels))
    draw = ImageDraw.Draw(image)
    for row, column in answer.asked.nonzero().tolist():
        box = (column * patch + 1, row * patch + 1, (column + 1) * patch - 2, (row + 1) * patch - 2)
        draw.rectangle(box, outline="white", width=max(1, patch // 10))
    return np.asarray(image)


def _coloured(
    clusters: Int[Tensor, "rows columns"], answer: Answers, patch: int, *, crossed: bool = False
) -> UInt8[ndarray, "height width 3"]:
    colours = colours_of(clusters.where(answer.asked, 0))
    pixels = bytes_of(colours.where(answer.asked[..., None], _NOT_ASKED / 255).repeat_interleave(patch, 0))
    image = Image.fromarray(pixels.repeat(patch, axis=1))
    draw = ImageDraw.Draw(image)
    for row, column in (answer.asked & ~answer.agreeing).nonzero().tolist() if crossed else ():
        left, top = column * patch, row * patch
        near, far = round(patch * 0.3), round(patch * 0.7)
        width = max(1, patch // 10)
        for ends in ((near, near, far, far), (near, far, far, near)):
            x0, y0, x1, y1 = ends
            draw.line((left + x0, top + y0, left + x1, top + y1), fill="black", width=width)
    return np.asarray(image)
