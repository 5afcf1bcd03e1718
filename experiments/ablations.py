"""The paper's largest effects, small: masks, registers, prototypes, the share of patches predicted, the balance.

`python -m experiments.ablations [--arms NAME ...]` trains the arms of ablations.yaml on synthetic scenes, and writes
results/ablations.jsonl and the table results/ablations.md, with the paper's figures beside. `--sweep schedules` does so
with schedules.yaml: rates, averages and warm-up for other batches and lengths. Not here is the paper's predictor by
self-attention (ADE20K mIoU 27.9, ImageNet 77.7), in which mask tokens see each other: it would be another model.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.runs import (
    RESULTS,
    Record,
    Run,
    chosen,
    command,
    exit_status,
    last_excess,
    of_arms,
    perform,
    read_records,
    read_sweep,
    seeds_of,
    spread,
    write_table,
)

SWEEPS = {name: Path(__file__).parent / f"{name}.yaml" for name in ("ablations", "schedules")}
_SCORES = {
    "image k-NN": "eval_image_knn",
    "image linear": "eval_image_linear",
    "patch k-NN": "eval_patch_knn",
    "patch mIoU": "eval_patch_miou",
}
# ADE20K mIoU / ImageNet accuracy of its ViT-L/16 after 100,000 steps.
_PAPER = {
    "base": "29.1 / 81.4",
    "random masks": "23.6 / 76.4",
    "block masks": "25.6 / 79.9",
    "inverse-block masks": "27.2 / 80.7",
    "no registers": "25.9 / 79.3",
    "16 registers": "29.1 / 81.4",
    "12 prototypes": "14.9 / 73.8",
    "48 prototypes": "27.5 / 80.7",
    "192 prototypes": "29.1 / 81.4",
    "standard Sinkhorn": "28.5 / 81.3",
    "averaged head": "1.7 / 11.1",
}


def table(records: Sequence[Record], paper: Mapping[str, str]) -> str:
    """A row for each arm, with the paper's figures, if any."""
    columns = ["arm", "seeds", *_SCORES, "loss", "information over chance"]
    columns += ["paper: mIoU / ImageNet"] if paper else []
    lines = [f"| {' | '.join(columns)} |", f"| --- | --- |{' ---: |' * (len(columns) - 2)}"]
    for arm, of_arm in of_arms(records).items():
        cells = [arm, seeds_of(of_arm)]
        cells += [spread([record["scores"][key] for record in of_arm]) for key in _SCORES.values()]
        cells += [spread([record["series"]["loss"][-1][1] for record in of_arm])]
        cells += [spread([last_excess(record) for record in of_arm])]
        cells += [paper.get(arm, "-")] if paper else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command(__doc__, "ablations")
    parser.set_defaults(results=None, folder=None)
    parser.add_argument("--sweep", choices=SWEEPS, default="ablations", help="(%(default)s)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="of the sweep (all)")
    arguments = parser.parse_args(argv)
    name = arguments.sweep
    results, folder = arguments.results or RESULTS / f"{name}.jsonl", arguments.folder or Path("runs") / name
    sweep = read_sweep(SWEEPS[name])
    runs = [
        Run(arm, seed, options) for seed in arguments.seeds for arm, options in chosen(sweep, arguments.arms).items()
    ]
    if not arguments.report:
        perform(runs, results, folder, arguments.jobs)
    order = list(sweep)
    records = sorted(read_records(results), key=lambda record: order.index(record["arm"]))
    write_table(results, f"ablations --sweep {name}", records, table(records, _PAPER if name == "ablations" else {}))


if __name__ == "__main__":
    sys.exit(exit_status(main))
