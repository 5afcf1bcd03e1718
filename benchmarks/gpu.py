"""Everything that a GPU is needed for, in one command and in stages: `make gpu`, or `python -m benchmarks.gpu`.

- `tests`: GPU tests, in parallel processes; meanwhile the steps compile in others and wait at a gate.
- `steps`: once all that is over, each training step alone, with a profile of four steps.
- `heads`, `attention`: operations and their peers, the most important shapes first.
- `report`: tables of all that was measured.

Each process saves its results before the next begins; what fails or is cut off stops none of the others, and the exit
status tells. Nothing is installed. What the machine's python3 needs beside PyTorch with CUDA: triton, numpy, pytest,
pytest-benchmark, einops, jaxtyping, PyYAML and jsonargparse with docstring_parser and typeshed_client; for the tests of
the trainer what setup.py names, pytest-xdist for more than one process of them; matplotlib for the roofline. What it
lacks can be carried there in a folder (`make carried`) that PYTHONPATH names; so can xformers, with
nvidia-cuda-runtime-cu12 where PyTorch has CUDA 13.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks import report, shapes
from benchmarks.gate import Gate

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("tests", "steps", "heads", "attention", "report")
FILES = {
    "heads": ("test_sinkhorn.py", "test_clustering_head.py", "test_student_loss.py"),
    "attention": ("test_visible_attention.py", "test_masked_cross_attention.py"),
}
PEERS = ("official_compiled", "official_recomputed")
STEPS = tuple(f"{preset}-{name}" for preset in ("vits14", "vitl14") for name in ("ours", *PEERS))
PYTEST = (sys.executable, "-m", "pytest")
# Of the time: when the last step must have compiled, when the last must be timed, when the heads must be through.
COMPILED_BY, STEPPED_BY, HEADS_BY = 0.55, 0.75, 0.86
GRACE = 10.0  # Seconds that an interrupted process has for saving what it found.


@dataclass
class Task:
    """One process whose output goes to a file."""

    name: str
    process: subprocess.Popen
    log: Path
    status: int | None = None

    def is_over(self) -> bool:
        if self.status is None:
            self.status = self.process.poll()
        return self.status is not None

    def wait(self, until: float) -> None:
        """Until it is over; from the moment `until` on (of time.monotonic) it is interrupted, then killed."""
        for moment, signum in ((until, signal.SIGINT), (until + GRACE, signal.SIGKILL)):
            while not self.is_over() and time.monotonic() < moment:
                time.sleep(0.05)
            self.signal(signum)
        if self.status is None:
            self.status = self.process.wait()

    def signal(self, signum: int) -> None:
        """To the process and all that it started, unless it is over."""
        if not self.is_over():
            os.killpg(self.process.pid, signum)


class Run:
    """The stages, their deadline and what became of them."""

    def __init__(self, out: Path, seconds: float, machine: str):
        self.out, self.seconds, self.machine = out, seconds, machine
        self.began = time.monotonic()
        self.failures: list[str] = []
        out.mkdir(parents=True, exist_ok=True)

    def at(self, share: float) -> float:
        """The moment at which this share of the time has passed."""
        return self.began + share * self.seconds

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self.began:5.0f} s] {line}", flush=True)

    def start(self, name: str, command: tuple[str, ...], **variables: str) -> Task:
        log = self.out / f"{self.machine}.{name}.log"
        with log.open("wb") as file:
            environment = {**os.environ, "CAPI_BENCH_OUT": str(self.out.resolve()), **variables}
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.say(f"{name}: started")
        return Task(name, process, log)

    def finish(self, task: Task, until: float) -> None:
        """Waits, says what became of it and notes a failure."""
        task.wait(until)
        lines = task.log.read_text(errors="replace").strip().splitlines() or ["no output"]
        self.say(f"{task.name}: {'passed' if task.status == 0 else f'status {task.status}'}: {lines[-1]}")
        if task.status != 0:
            self.failures.append(task.name)
            print("\n".join(f"    {line}" for line in lines[-15:-1]), flush=True)

    def benchmark(self, name: str, *arguments: str) -> tuple[str, ...]:
        """The command that measures and saves <machine>.<name>.json."""
        raw = self.out / f"{self.machine}.{name}.json"
        return *PYTEST, "--benchmark-only", "--benchmark-json", str(raw.resolve()), *arguments


def gpu_test_command(processes: int) -> tuple[str, ...]:
    """The test files that hold GPU tests, so that no other's imports are needed."""
    files = sorted(str(path) for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text())
    parallel = ("-n", str(processes)) if processes > 1 and find_spec("xdist") is not None else ()
    return (
        *PYTEST,
        "-p",
        "no:benchmark",
        "-m",
        "gpu",
        "--continue-on-collection-errors",
        "--durations=10",
        *parallel,
        *files,
    )


def steps_beside_tests(
    run: Run, tests: tuple[str, ...] | None, steps: dict[str, tuple[str, ...]], threads: int
) -> None:
    """Tests beside steps that compile; when all is quiet, the steps one by one, in this order."""
    with tempfile.TemporaryDirectory() as folder:
        few = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
        tested = None if tests is None else run.start("tests", tests, **few)
        compiling = {
            name: (run.start(f"step-{name}", command, CAPI_GATE=folder, **few), Gate(name, folder))
            for name, command in steps.items()
        }
        if tested is not None:
            run.finish(tested, run.at(COMPILED_BY))
        while time.monotonic() < run.at(COMPILED_BY):
            if all(gate.is_ready() or task.is_over() for task, gate in compiling.values()):
                break
            time.sleep(0.05)
        waiting = [(task, gate) for task, gate in compiling.values() if gate.is_ready() and not task.is_over()]
        others = [task for task, gate in compiling.values() if (task, gate) not in waiting]
        for task in others:
            task.signal(signal.SIGINT)  # Its compilation took too long, unless it failed before.
        for task in others:
            run.finish(task, time.monotonic())
        for task, gate in waiting:
            run.say(f"{task.name}: alone")
            gate.open()
            run.finish(task, run.at(STEPPED_BY))


def operations(run: Run, stage: str, until: float) -> None:
    left = until - time.monotonic()
    if left < 15:
        run.say(f"{stage}: left out, {left:.0f} s were left")
        run.failures.append(stage)
        return
    files = (f"benchmarks/{file}" for file in FILES[stage])
    task = run.start(stage, run.benchmark(stage, *files), CAPI_BENCH_SECONDS=f"{left - GRACE:.0f}")
    run.finish(task, until)


def remark(run: Run) -> None:
    """Says of each raw file what failed, and why what is absent is."""
    for path in sorted(run.out.glob(f"{run.machine}.*.json")):
        try:
            content = json.loads(path.read_text())
        except json.JSONDecodeError:
            run.say(f"{path.name}: cut off")
            continue
        for kind in ("failed", "absent"):
            for entry in content.get(kind, []):
                run.say(f"{kind}: {entry['implementation']} of {entry['op']}: {entry['reason'][:200]}")


def main(argv: list[str] | None = None) -> int:
    """Runs the stages; the exit status is 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="which stages, whatever the order")
    parser.add_argument("--steps", nargs="+", default=STEPS, metavar="PRESET-IMPLEMENTATION", help="which steps")
    parser.add_argument("--tests", default="90", help="how many GPU tests of all kinds, or `all`")
    parser.add_argument("--processes", type=int, default=6, help="that the tests run in")
    parser.add_argument("--seconds", type=float, default=400.0, help="after which nothing more is begun")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of all that is written")
    arguments = parser.parse_args(argv)
    if not shapes.GPU:
        parser.error("expected a CUDA device, got none")
    run = Run(arguments.out, arguments.seconds, shapes.MACHINE)
    os.environ["CAPI_GPU_TESTS"] = arguments.tests
    cores = os.cpu_count() or 1
    steps = {name: step(run, name) for name in arguments.steps} if "steps" in arguments.stages else {}
    tests = gpu_test_command(min(arguments.processes, cores)) if "tests" in arguments.stages else None
    steps_beside_tests(run, tests, steps, threads=max(1, cores // 4))
    for stage, share in (("heads", HEADS_BY), ("attention", 1.0)):
        if stage in arguments.stages:
            operations(run, stage, run.at(share))
    remark(run)
    if "report" in arguments.stages and list(run.out.glob(f"{run.machine}.*json")):
        report.write_reports({(run.out, run.machine): None})
    run.say(f"failed: {', '.join(run.failures)}" if run.failures else "all passed")
    return int(bool(run.failures))


def step(run: Run, name: str) -> tuple[str, ...]:
    """The command that times one implementation of the step of one preset."""
    preset, _, implementation = name.partition("-")
    return run.benchmark(f"step-{name}", "benchmarks/test_train_step.py", "-k", f"{preset} and {implementation}")


if __name__ == "__main__":
    sys.exit(main())
