"""Our step launched by the host against the same step as a CUDA graph: `python -m benchmarks.step_graph [PRESET ...]`.

For each preset: milliseconds a step, the host's share of them, busy and idle time and launches by profile, and the peak
of memory, of both; and whether losses, gradients and weights are the same to the bit over seven steps, of which the
graph is replayed in four. With `--fp8` the graph of a step whose teacher computes in 8 bits is timed as well. The
presets compile side by side and are timed one after the other; what fails is printed and stops nothing else. Profiles
go to the folder `--out`.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from statistics import median

import torch

from benchmarks import step_profile
from benchmarks.gate import Gate
from benchmarks.timing import Contestant
from benchmarks.train_step import configuration, draw_batch
from capi.distributed import World
from capi.step import Trainer

BATCHES = {"tiny": 256, "vits14": 512, "vitb14": 512, "vitl14": 256}
COMPARED, TIMED, PROFILED = 7, 12, 4


class Case:
    """One preset, whose batches are on the GPU already."""

    def __init__(self, preset: str, out: Path, device: torch.device, fp8: bool = False):
        self.preset, self.out, self.device, self.fp8 = preset, out, device, fp8
        self.config = configuration(preset, BATCHES[preset], self.device, torch.bfloat16)
        self.batches = [[draw_batch(self.config, seed, self.device)] for seed in range(2)]
        self.first_step = self.config.optim.lr.warmup_steps // 2  # Where the learning rates are not zero.

    def say(self, line: str) -> None:
        print(f"[{self.preset}] {line}", flush=True)

    def trainer(self, graphs: str, teacher_precision: str = "auto") -> Trainer:
        self.config.run.cuda_graphs, self.config.run.teacher_precision = graphs, teacher_precision
        return Trainer(self.config, World(0, 1, self.device))

    def step(self, trainer: Trainer, i: int) -> tuple[torch.Tensor, ...]:
        result = trainer.step(self.batches[i % 2], self.first_step + i)
        return result.loss, result.clustering_loss, result.target_entropy, result.clusters

    def compared(self, trainer: Trainer) -> dict[str, torch.Tensor]:
        """Losses of some steps, and what they leave, on the host."""
        found = {}
        for i in range(COMPARED):
            names = ("loss", "clustering loss", "entropy", "clusters")
            found |= {
                f"{name} of step {i}": x.to("cpu", copy=True)
                for name, x in zip(names, self.step(trainer, i), strict=True)
            }
        for name, parameter in trainer.model.named_parameters():
            found[name] = parameter.detach().to("cpu", copy=True)
            if parameter.grad is not None:
                found[f"gradient of {name}"] = parameter.grad.to("cpu", copy=True)
        return found

    def timed(self, trainer: Trainer, name: str) -> None:
        """Prints how long steps take, of which one after another is launched without a wait, and their profile."""

        def run(n: int = PROFILED) -> None:
            for i in range(n):
                self.step(trainer, COMPARED + i)

        run(2)
        seconds, host = [], []
        torch.cuda.synchronize()
        for i in range(TIMED):
            start = time.perf_counter()
            self.step(trainer, COMPARED + i)
            host.append(time.perf_counter() - start)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        run(TIMED)
        torch.cuda.synchronize()
        in_a_row = (time.perf_counter() - start) / TIMED
        self.say(
            f"{name}: {in_a_row * 1e3:.1f} ms a step in a row ({BATCHES[self.preset] / in_a_row:.0f} images/s), "
            f"{median(seconds) * 1e3:.1f} alone, host {median(host) * 1e3:.1f}"
        )
        path = self.out / f"step_graph_{self.preset}_{name}.txt"
        self.say(f"{name}: {step_profile.inspect(Contestant(run, calls=PROFILED), in_a_row, path)}")
        if path.exists():
            self.say(f"{name}: " + "\n    ".join(path.read_text().splitlines()[:16]))

    def memory(self, name: str) -> None:
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
        self.say(f"{name}: peak {peak / 2**30:.2f} GiB, reserved now {reserved / 2**30:.2f} GiB")

    def compile(self) -> None:
        for precision in ("auto", "fp8")[: 1 + self.fp8]:
            began = time.perf_counter()
            try:
                self.step(self.trainer("off", precision), 0)
                torch.cuda.synchronize()
                self.say(f"teacher {precision}: compiled in {time.perf_counter() - began:.0f} s")
            except Exception:
                self.say(f"teacher {precision}: does not compile")
                traceback.print_exc(limit=-12)

    def one(self, name: str, *given: str) -> dict[str, torch.Tensor]:
        trainer = self.trainer(*given)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found = self.compared(trainer)
        self.memory(name)
        self.timed(trainer, name)
        return found

    def run(self, gate: Gate) -> bool:
        found = {}
        self.compile()
        gate.wait()
        cases = {"eager": ("off",), "graph": ("on",)} | ({"graph_fp8": ("on", "fp8")} if self.fp8 else {})
        for name, given in cases.items():
            try:
                found[name] = self.one(name, *given)
            except Exception:
                self.say(f"{name} failed")
                traceback.print_exc(limit=-12)
        if not {"eager", "graph"} <= found.keys():
            return False
        if "graph_fp8" in found:
            plain, in_8_bits = (found[name]["clusters of step 0"] for name in ("graph", "graph_fp8"))
            self.say(f"in 8 bits {(plain == in_8_bits).float().mean():.2%} of the most likely clusters are the same")
        differing = [key for key, x in found["eager"].items() if not torch.equal(x, found["graph"][key])]
        for key in differing[:12]:
            a, b = found["eager"][key].double(), found["graph"][key].double()
            self.say(f"{key} differs by {(a - b).abs().max():.3g} of {a.abs().max():.3g}")
        keys = len(found["eager"])
        self.say(f"{keys - len(differing)} of {keys} tensors are equal to the bit" + " (FAILED)" * bool(differing))
        return not differing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="*", default=["vits14", "vitl14"], metavar="PRESET")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--seconds", type=float, default=240.0, help="after which what still runs is ended")
    parser.add_argument("--fp8", action="store_true", help="the graph with a teacher in 8 bits as well")
    parser.add_argument("--alone", action="store_true", help="one preset, in this process")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.alone:
        (preset,) = arguments.presets
        return int(not Case(preset, arguments.out, torch.device("cuda"), arguments.fp8).run(Gate(preset)))
    until = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        threads = str(max(1, (os.cpu_count() or 1) // len(arguments.presets)))
        environment = {**os.environ, "CAPI_GATE": folder, "TORCHINDUCTOR_COMPILE_THREADS": threads}
        command = [sys.executable, "-m", "benchmarks.step_graph", "--alone", "--out", str(arguments.out)]
        command += ["--fp8"] * arguments.fp8
        cases = {
            preset: (subprocess.Popen([*command, preset], env=environment), Gate(preset, folder))
            for preset in arguments.presets
        }
        # All have compiled before the first is timed, if they do in time.
        while time.monotonic() < until - 0.4 * arguments.seconds:
            if all(gate.is_ready() or process.poll() is not None for process, gate in cases.values()):
                break
            time.sleep(0.1)
        for preset, (process, gate) in sorted(cases.items(), key=lambda case: not case[1][1].is_ready()):
            gate.open()
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(f"[{preset}] did not end in time", flush=True)
                process.kill()
        return max(process.wait() != 0 for process, _ in cases.values())


if __name__ == "__main__":
    sys.exit(main())
