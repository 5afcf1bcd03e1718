"""Registers, spills and shared memory of every default kernel configuration, compiled for GPUs that need not be here.

    python -m benchmarks.compile_report                       # writes benchmarks/results/compile.md
    python -m benchmarks.compile_report --check sm_90 gfx942  # writes nothing; fails on a spill

The configurations are those of `benchmarks/compile_cases`.
"""

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    raise RuntimeError("the kernels cannot be compiled with TRITON_INTERPRET set")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from capi_kernels._capability import AMD, TARGETS, launch_options

FAMILIES = ("heads", "attention", "optimizer")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ARCHITECTURES = (*(f"sm_{target}" for target in TARGETS if target != AMD), "gfx942", "gfx950")
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64, "gfx950": 160}  # Of a program; others have 99.
REPORT = Path(__file__).parent / "results/compile.md"


class Usage(NamedTuple):
    registers: int
    spilled_bytes: int
    shared_bytes: int


def capability_of(architecture: str) -> int:
    return int(architecture[3:]) if architecture.startswith("sm_") else AMD


def usage(kernel, arguments: dict, options: dict, architecture: str) -> Usage:
    """Compile one configuration and read what the assembler says of it."""
    assert list(arguments) == kernel.arg_names, f"expected {kernel.arg_names}, got {list(arguments)}"
    signature, constexprs, attributes = {}, {}, {}

    def type_of(value: object, *path: int) -> str | tuple:
        """That of an argument, or those of a named tuple of some."""
        if isinstance(value, tuple):
            return type(value)(*(type_of(x, *path, i) for i, x in enumerate(value)))
        if not isinstance(value, str):
            constexprs[path] = value
            return "constexpr"
        if not value.endswith("?") and not value.startswith("fp"):
            attributes[path] = [["tt.divisibility", 16]]
        return value.removesuffix("?")

    for i, (name, value) in enumerate(arguments.items()):
        signature[name] = type_of(value, i)
    source = ASTSource(kernel, signature, constexprs, attributes)
    amd = capability_of(architecture) == AMD
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", capability_of(architecture), 32)
    # Kernels ask the driver what they are compiled for.
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    compiled = triton.compile(source, target=target, options=launch_options(options, amd))
    if amd:
        registers, scratch = (
            int(re.search(rf"\.{name}:\s*(\d+)", compiled.asm["amdgcn"])[1])
            for name in ("vgpr_count", "private_segment_fixed_size")
        )
        return Usage(registers, scratch, compiled.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        dump = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], check=True, capture_output=True, text=True).stdout
    fields = dict(field.split(":") for field in dump.splitlines()[-2 if not dump.splitlines()[-1] else -1].split())
    return Usage(int(fields["REG"]), int(fields["STACK"]), compiled.metadata.shared)


def chosen(families: list[str], targets: list[str], sample: bool, match: str = "") -> dict[tuple[str, int], list[str]]:
    """The architectures for which to compile each case, (family, index).

    A sample is one of each kernel and type of data: the last for the first target, the median for others. Each is for
    one target, and the types of a kernel are for different ones.
    """
    cases = {}
    for family in families:
        kinds = {}
        for index, (name, kernel, _, _, *only) in enumerate(cases_of(family)):
            if not re.search(match, f"{kernel.__name__} {name}"):
                continue
            kind = kinds.setdefault(kernel, {}).setdefault(name.split()[0] if sample else index, {})
            for target in targets:
                if not only or capability_of(target) in only[0]:
                    kind.setdefault(target, []).append(index)
        for first, types in enumerate(kinds.values()):
            for turn, kind in enumerate(filter(None, types.values()), first):
                for target in [list(kind)[turn % len(kind)]] if sample else kind:
                    index = kind[target][-1 if target == targets[0] else (len(kind[target]) - 1) // 2]
                    cases.setdefault((family, index), []).append(target)
    return {case: cases[case] for case in sorted(cases, key=lambda case: (families.index(case[0]), case[1]))}


def cases_of(family: str) -> list[tuple]:
    return importlib.import_module(f"benchmarks.compile_cases.{family}").CASES


def row(family: str, index: int, wanted: list[str], targets: list[str]) -> tuple[str, list[str]]:
    """A line of the table, and what is wrong in it."""
    name, kernel, arguments, options, *_ = cases_of(family)[index]
    cells, faults = [], []
    for target in targets:
        if target not in wanted:
            cells.append("")
            continue
        used = usage(kernel, arguments, options, target)
        cells.append(f"{used.registers} / {used.spilled_bytes} / {used.shared_bytes / 1024:.1f}")
        limit = SHARED_KIB.get(target, 99)
        where = f"{kernel.__name__} ({name}) on {target}"
        if used.spilled_bytes:
            faults.append(f"{where} spills {used.spilled_bytes} bytes")
        if used.shared_bytes > 1024 * limit:
            faults.append(f"{where} needs {used.shared_bytes / 1024:.1f} of {limit} KiB of shared memory")
    return f"| {kernel.__name__} | {name} | {options['num_warps']} | " + " | ".join(cells) + " |", faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=ARCHITECTURES, metavar="ARCHITECTURE", help="as sm_90 or gfx942")
    parser.add_argument("--check", action="store_true", help="write no report")
    parser.add_argument("--families", nargs="+", default=FAMILIES, help="files of benchmarks/compile_cases")
    parser.add_argument(
        "--sample", action="store_true", help="one configuration of each kernel and type, for one target"
    )
    parser.add_argument("--match", default="", metavar="REGEX", help="of a row's kernel and configuration")
    arguments = parser.parse_args()

    lines = [
        "# Compiled offline",
        "",
        f"Triton {triton.__version__}; registers a thread / bytes spilled a thread / KiB of shared memory a program.",
        f"Made by `{shlex.join(['python', '-m', 'benchmarks.compile_report', *sys.argv[1:]])}`.",
        "",
        "| kernel | configuration | warps | " + " | ".join(arguments.targets) + " |",
        "|---|---|---|" + "---|" * len(arguments.targets),
    ]
    faults = []
    with ProcessPoolExecutor() as pool:
        cases = chosen(arguments.families, arguments.targets, arguments.sample, arguments.match)
        rows = [pool.submit(row, *case, wanted, arguments.targets) for case, wanted in cases.items()]
        for future in rows:
            line, wrong = future.result()
            lines.append(line)
            faults += wrong
            print(line, flush=True)
    if not arguments.check:
        REPORT.write_text("\n".join(lines) + "\n")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
