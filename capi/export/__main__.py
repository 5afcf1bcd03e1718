"""`python -m capi.export ENCODER --format official|safetensors|hub|onnx --output PATH`."""

import argparse
import sys
from collections.abc import Sequence

from capi.export.files import FORMATS, export


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m capi.export", description="Writes an encoder for other programs.")
    parser.add_argument(
        "encoder",
        metavar="ENCODER",
        help="a run folder, finished or not, a checkpoint, an encoder file, or an official name",
    )
    parser.add_argument("--format", required=True, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--output", required=True, metavar="PATH", help="the file, or with hub the folder")
    parser.add_argument("--weights", default="ema", help="ema, or of a checkpoint the student; ema by default")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    arguments = parser.parse_args(argv)
    try:
        written = export(
            arguments.encoder,
            arguments.format,
            arguments.output,
            weights=arguments.weights,
            overwrite=arguments.overwrite,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return 130
    print("\n".join(f"wrote {path}" for path in written))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
