"""Learning from drawings: small recipes on pictures that Debian ships, under k-NN and a linear probe.

`python -m experiments.drawings [--sets emoji] [--arms NAME ...]` writes the pictures (see pictures.py) below
runs/drawings, trains the arms of drawings.yaml on three quarters of all sets together, and has `capi.evaluate` tell the
class of the others, set by set, from frozen features: results/drawings.jsonl, and the table results/drawings.md.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from capi import pretrained
from capi.evaluate.labelled import open_labelled
from capi.evaluate.probes import Grid
from capi.evaluate.protocol import evaluate_labelled
from experiments.pictures import SETS, write_pictures
from experiments.runs import (
    Options,
    Record,
    Run,
    append,
    chosen,
    command,
    exit_status,
    last_excess,
    made,
    of_arms,
    perform,
    read_records,
    read_sweep,
    seeds_of,
    spread,
    write_table,
)

SWEEP = Path(__file__).parent / "drawings.yaml"
PIXELS = "raw pixels"
# On the middle of the pictures, as k-NN. Of a thousand images these are a hundred epochs, and small features want more
# than the authors' largest rate: with crops and their rates the probe of raw pixels falls from .6 to .4.
_GRID = Grid(iterations=1000, learning_rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
_FEATURES = ("global", "patch mean", "global + patch mean")
_ALL = "all patches"
_COLUMNS = {
    f"{probe} of {features}": f"{key}, {features}"
    for probe, key, kinds in (("k-NN", "knn", (*_FEATURES, _ALL)), ("linear probe", "linear", _FEATURES))
    for features in kinds
}


class Pixels(nn.Module):
    """An encoder that encodes nothing: an image's pixels are its global vector, and those of its only patch.

    Less each channel's mean over the image, without which neighbours are worse.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("none", nn.Parameter(torch.zeros(1)))  # It says which device does the work.

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        pixels = (images - images.mean((2, 3), keepdim=True)).flatten(1)
        return pixels, None, pixels[:, None, None]


class AllPatches(nn.Module):
    """An encoder whose only vector is its whole map of features: it tells where things are, as raw pixels do."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        everything = self.encoder(images)[2].flatten(1)
        return everything, None, everything[:, None, None]


def evaluate(encoder: nn.Module, image_size: int, pictures: Path, sets: Sequence[str]) -> dict[str, float]:
    """Accuracy on the test pictures by set, probe and kind of features."""
    scores = {}
    for name in sets:
        train, test = (open_labelled(f"folder:{pictures / part / name}", part) for part in ("train", "test"))
        of = partial(evaluate_labelled, train=train, test=test, image_size=image_size, crops=0)
        results = of(encoder.eval(), grid=_GRID)["results"]
        everything = of(AllPatches(encoder).eval(), probes=("knn",))["results"][0]  # Its kinds of features are one.
        results.append(everything | {"features": _ALL})
        scores |= {f"{name}: {result['probe']}, {result['features']}": result["accuracy"] for result in results}
    return scores


def score(run_dir: Path, pictures: Path, sets: Sequence[str]) -> dict[str, float]:
    """What `evaluate` gives of a run's encoder."""
    weights = pretrained.read(run_dir)
    image_size = pretrained.configuration_of(weights).data.image_size
    return evaluate(pretrained.build(weights), image_size, pictures, sets)


def runs(sweep: Mapping[str, Options], seeds: Sequence[int], pictures: Path, sets: Sequence[str]) -> list[Run]:
    """Of every arm on the pictures of these sets together, whose names lead those of the arms."""
    source = pictures / "train" / sets[0] if len(sets) == 1 else pictures / "train"
    places = {"data.source": f"folder:{source}"}
    return [Run(f"{'+'.join(sets)}/{arm}", seed, options, places) for seed in seeds for arm, options in sweep.items()]


def table(records: Sequence[Record]) -> str:
    """A row for each arm and set that it is scored on."""
    names = ["trained on", "arm", "seeds", "scored on", *_COLUMNS, "position's information over chance (nats)"]
    lines = [f"| {' | '.join(names)} |", f"| --- | --- | --- | --- |{' ---: |' * (len(names) - 4)}"]
    for name, of_arm in of_arms(records).items():
        sets, _, arm = name.rpartition("/")
        trained = [record for record in of_arm if "series" in record and arm != "untrained"]
        information = spread([last_excess(record) for record in trained]) if trained else "-"
        for scored in dict.fromkeys(key.partition(": ")[0] for key in of_arm[0]["scores"]):
            keys = [f"{scored}: {key}" for key in _COLUMNS.values()]
            scores = [spread([r["scores"][key] for r in of_arm]) if key in of_arm[0]["scores"] else "-" for key in keys]
            lines.append(f"| {' | '.join([sets or '-', arm, seeds_of(of_arm), scored, *scores, information])} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command(__doc__, "drawings")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="to train on together (all)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="of drawings.yaml (all)")
    parser.add_argument("--share", type=Path, default=Path("/usr/share"), help="of the packages (%(default)s)")
    arguments = parser.parse_args(argv)
    sweep, sets = read_sweep(SWEEP), [name for name in SETS if name in arguments.sets]
    if len(sets) not in (1, len(SETS)):
        parser.error(f"argument --sets: expected one of {', '.join(SETS)}, or all, got {', '.join(sets)}")
    if not arguments.report:
        pictures = arguments.folder / "pictures"
        for name in sets:
            write_pictures(name, arguments.share, pictures)
        wanted = runs(chosen(sweep, arguments.arms), arguments.seeds, pictures, sets)
        of_run = partial(score, pictures=pictures, sets=sets)
        perform(wanted, arguments.results, arguments.folder, arguments.jobs, of_run)
        known = of_arms(read_records(arguments.results)).get(PIXELS, [{"scores": {}}])[0]["scores"]
        missing = [name for name in sets if not any(key.startswith(f"{name}: ") for key in known)]
        if missing:
            scores = evaluate(Pixels(), 48, pictures, missing)
            append(arguments.results, {"arm": PIXELS, "seed": 0, "options": {}, "scores": scores, **made()})
    order = [PIXELS, *sweep]
    records = sorted(read_records(arguments.results), key=lambda record: order.index(record["arm"].rpartition("/")[-1]))
    write_table(arguments.results, "drawings", records, table(records))


if __name__ == "__main__":
    sys.exit(exit_status(main))
