"""What a run leaves for its reader: the encoder, pictures of how far it is, and the comparison on held-out scenes."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path

import torch
import yaml

from capi.atomic import write_atomically
from capi.background import in_background
from capi.checkpoint import export_checkpoint, save_encoder, save_heads
from capi.data import evaluation_images
from capi.evaluate import evaluate_synthetic, format_table
from capi.model import CAPI
from capi.step import Trainer
from capi.visualize import draw_pca, feature_map, plot_curves

logger = logging.getLogger(__name__)

_N_PICTURES = 8
# Seconds that a run waits for a source that is slow to give the images of the pictures: on its way, and at its end.
_PATIENCE = 10.0
_PATIENCE_AT_THE_END = 600.0


class Results:
    """Writes them to the run folder: encoder and pictures as often as wanted, the comparison at the end."""

    def __init__(self, trainer: Trainer, run_dir: Path):
        self._trainer, self._run_dir = trainer, run_dir
        self._encoder, self._heads = run_dir / "encoder.safetensors", run_dir / "heads.safetensors"
        self._images: Future | None = None

    def write(self, model: CAPI) -> list[Path]:
        """Writes, at the end, the encoder and, with `run.evaluate`, the pictures.

        Args:
            model: the trainer's, as `whole_average` gives it.

        Returns:
            The files written.

        Raises:
            OSError: the encoder or the heads could not be written.
        """
        save_encoder(self._encoder, model.student_ema, self._trainer.config.model)
        save_heads(self._heads, model)
        return [self._encoder, self._heads, *self.draw(model, at_the_end=True)]

    def export(self, checkpoint: Path) -> None:
        """Writes the encoder of a checkpoint, from its files: in any thread. Raises OSError as `write`."""
        export_checkpoint(checkpoint, self._encoder, self._heads, self._trainer.config.model)

    def draw(self, model: CAPI, *, at_the_end: bool = False) -> list[Path]:
        """Draws the pictures with `run.evaluate`, and returns those drawn; one may fail, with a line in the log.

        The model is as for `write`.
        """
        if not self._trainer.config.run.evaluate:
            return []
        patience = _PATIENCE_AT_THE_END if at_the_end else _PATIENCE
        return [
            *self._draw("curves.png", lambda png: plot_curves([self._run_dir], png)),
            *self._draw("features.png", lambda png: self._plot_features(model, png, patience)),
        ]

    def compare(self, model: CAPI) -> None:
        """Prints how the encoder compares with the untrained one and with pixels; `evaluation.yaml` keeps it."""
        config, ema = self._trainer.config, model.student_ema.to(self._trainer.world.device).eval()
        if config.data.source != "synthetic":
            logger.info("no k-NN table: labels are known for the synthetic scenes only")
            return
        torch.manual_seed(config.run.seed)
        untrained = CAPI(config.model, config.clustering).init_weights().student.backbone
        backbones = {"trained": ema.backbone, "untrained": untrained.to(self._trainer.world.device).eval()}
        results = evaluate_synthetic(config, backbones)
        write_atomically(self._run_dir / "evaluation.yaml", lambda file: file.write_text(yaml.safe_dump(results)))
        print(format_table(results))  # noqa: T201

    def _draw(self, name: str, plot: Callable[[Path], None]) -> list[Path]:
        try:
            write_atomically(self._run_dir / name, plot)
        except Exception as error:  # whatever goes wrong: a picture is not worth a run
            logger.warning("no new %s: %s", name, str(error).partition("\n")[0])
            return []
        return [self._run_dir / name]

    def _plot_features(self, model: CAPI, png: Path, patience: float) -> None:
        if self._images is None:
            self._images = in_background(lambda: evaluation_images(self._trainer.config, _N_PICTURES))
        try:
            images = self._images.result(timeout=patience)
        except TimeoutError as error:
            raise TimeoutError(f"the source gave no images within {patience:.0f} s") from error
        backbone = model.student_ema.to(self._trainer.world.device).eval().backbone
        compile_ = self._trainer.config.run.compile
        compiled = compile_ == "on" or (compile_ == "auto" and self._trainer.world.device.type == "cuda")
        patch_size = self._trainer.config.model.patch_size
        # As fine as this many passes over each image make it: the maps of small images have but few patches.
        finer = next(n for n in (4, 3, 2, 1) if patch_size % n == 0)
        # Nothing is compiled anew for these few images. (To say so takes seconds.)
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            pictures = list(images)
            maps = [feature_map(backbone, picture, patch_size, finer=finer) for picture in pictures]
        encoder = f"Encoder of {self._run_dir}. "
        draw_pca(pictures, maps, cell=patch_size // finer, encoder=encoder).save(png, format="PNG")
