"""Measure training, evaluation and memory on a GPU, as JSON and as a table for docs/benchmarks.md; under 8 minutes, no network.

`--device cpu --tiny` runs the same code with tiny sizes. A part that fails is a row with its error, and the others still run.
All data are synthetic.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark_prediction import synthetic_study
from benchmark_training import bare_step, benchmark_config, pack_noise, recipe_of, train

from prostate_seg.common.progress import map_cases
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import workspace_of
from prostate_seg.data.cases import discover_cases
from prostate_seg.data.loading import load_case
from prostate_seg.imaging.image_io import read_volume, write_volume
from prostate_seg.imaging.preprocessing import preprocess_study
from prostate_seg.imaging.regions import predicted_labels
from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.segmentation.devices import choose_device
from prostate_seg.segmentation.inference.inference import Predictor, network_probabilities
from prostate_seg.segmentation.inference.network_input import measure_intensity, normalise
from prostate_seg.segmentation.inference.settings import Usage
from prostate_seg.segmentation.networks.networks import build_network
from prostate_seg.segmentation.training.cuda_graph import NUM_STEPS_BEFORE, capture, new_stream, run_on
from prostate_seg.segmentation.training.history import Epoch
from prostate_seg.segmentation.training.packing import PackedSet
from prostate_seg.stages.evaluate import case_evaluator
from prostate_seg.steps.evaluation import Evaluation

Row = dict[str, Any]
NETWORKS = {
    "unet": (),
    "unet, channels 32-512, batch 32": ("model.channels=[32,64,128,256,512]", "train.batch_size=32"),
    "attention_unet": ("model=attention_unet",),
    "resunet_a": ("model=resunet_a",),
    "dynunet": ("model=dynunet",),
    "segresnet": ("model=segresnet",),
    "unet3d, batch 2": ("model=unet3d", "train.batch_size=2"),
}
NUM_STUDIES = 10


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Device, and whether sizes are tiny."""

    device: torch.device
    tiny: bool

    def config(self, *overrides: str) -> Config:
        """Return a config whose inputs have 160 pixels, and networks of two levels and inputs of 32 pixels if tiny."""
        size = ["preprocess.image_size=32"] if self.tiny else ["preprocess.image_size=160"]
        cfg = benchmark_config(f"machine.device={self.device.type}", *overrides, *size)
        if not self.tiny:
            return cfg
        num_levels = 3 if cfg.model.name == "dynunet" else 2
        model = replace(
            cfg.model,
            channels=[8, 16, 32][:num_levels],
            strides=cfg.model.strides[: num_levels - 1],
            dilations=cfg.model.dilations and cfg.model.dilations[:num_levels],
        )
        return replace(cfg, model=model)

    @property
    def num_steps(self) -> int:
        """Steps per timed epoch."""
        return 4 if self.tiny else 100

    def wait(self) -> None:
        """Wait until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    """Run the parts, write the JSON after each, and print the table."""
    parts: dict[str, Callable[[Machine], list[Row]]] = {
        "steps": step_rows,
        "overhead": overhead_rows,
        "evaluation": evaluation_rows,
        "memory": memory_rows,
        "dice": dice_rows,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--output", type=Path, default=Path("bench_gpu.json"))
    arguments = parser.parse_args()
    machine = Machine(device=choose_device(arguments.device), tiny=arguments.tiny)
    name = torch.cuda.get_device_name() if machine.device.type == "cuda" else "CPU"
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "cores": os.cpu_count(), "parts": {}}
    for part in arguments.parts:
        start = time.perf_counter()
        try:
            rows = parts[part](machine)
        except Exception as error:
            rows = [{"row": part, "error": f"{type(error).__name__}: {error}"}]
        result["parts"][part] = {"seconds": round(time.perf_counter() - start, 1), "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print("\n".join(markdown(row) for row in rows), flush=True)


def markdown(row: Row) -> str:
    """Return a row of a Markdown table: its name, then every number with its name."""
    values = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items() if key != "row"}
    return f"| {row['row']} | " + ", ".join(f"{key} {value}" for key, value in values.items()) + " |"


def step_rows(machine: Machine) -> list[Row]:
    """Time steps of training, of the bare step, and of the bare step as a replayed CUDA graph, for each network."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        packed = pack_noise(Path(folder) / "packed", num_cases=20, size=32 if machine.tiny else 160)
        for name, overrides in NETWORKS.items():
            for free in (False, True) if name.startswith("unet,") else (False,):
                extra = (f"train.deterministic={str(not free).lower()}",)
                try:
                    row = step_row(machine, machine.config(*overrides, *extra), packed)
                except RuntimeError as error:
                    row = {"error": str(error).splitlines()[0]}
                rows.append({"row": name + (", deterministic=false" if free else ""), **row})
                print(markdown(rows[-1]), file=sys.stderr, flush=True)
    return rows


def step_row(machine: Machine, cfg: Config, packed: PackedSet) -> Row:
    """Return the milliseconds of a step in each way, and the rate of training relative to the fastest graph."""
    row: Row = {}
    num_steps = machine.num_steps
    for precision in ("fp32", "bf16"):
        bare = bare_step(replace(cfg, train=replace(cfg.train, precision=precision)), packed)  # type: ignore[arg-type]
        with deterministic(cfg.train.deterministic):
            row[f"eager_{precision}_ms"] = 1000 * seconds_per_call(bare, machine, num_steps)
            replayed = as_graph(bare, machine)
            row[f"graph_{precision}_ms"] = 1000 * seconds_per_call(replayed, machine, num_steps)
    epochs: list[Epoch] = []
    with utilisation(machine) as busy:
        train(cfg, packed, num_steps=num_steps, num_epochs=6, on_epoch_end=epochs.append)
    ends = [epoch.seconds for epoch in epochs]
    lengths = [end - begin for begin, end in itertools.pairwise(ends)]  # the first has warm-up and capture
    row["training_ms"] = 1000 * statistics.median(lengths) / num_steps
    row["of_graph"] = min(row["graph_fp32_ms"], row["graph_bf16_ms"]) / row["training_ms"]
    row["busy_percent"] = busy()
    return row


@contextlib.contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Use deterministic algorithms as training does."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def as_graph(step: Callable[[], torch.Tensor], machine: Machine) -> Callable[[], torch.Tensor]:
    """Return a step as a replayed CUDA graph; on a CPU the step itself."""
    if machine.device.type == "cpu":
        return step
    stream = new_stream(machine.device)
    for _ in range(NUM_STEPS_BEFORE):
        run_on(stream, step)
    return capture(step, stream=stream, generators=[])


def seconds_per_call(function: Callable[[], object], machine: Machine, num_calls: int) -> float:
    """Return the median seconds of a call over three rounds, after a warm-up."""
    rounds = []
    for _ in range(4):
        machine.wait()
        start = time.perf_counter()
        for _ in range(num_calls):
            function()
        machine.wait()
        rounds.append((time.perf_counter() - start) / num_calls)
    return statistics.median(rounds[1:])


@contextlib.contextmanager
def utilisation(machine: Machine) -> Iterator[Callable[[], float | None]]:
    """Yield a function that returns the median percent of time in which a kernel ran, from nvidia-smi; None without it."""
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
    percents: list[float] = []
    try:
        process = None if machine.device.type == "cpu" else subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        process = None
    try:
        yield lambda: statistics.median(percents) if finish(process, percents) else None
    finally:
        finish(process, percents)


def finish(process: "subprocess.Popen[str] | None", percents: list[float]) -> bool:
    """Stop nvidia-smi and add the samples of the second half, and return whether there are any."""
    if process is not None and process.poll() is None:
        process.terminate()
        lines = process.communicate()[0].split()
        percents += [float(line) for line in lines[len(lines) // 2 :] if line.isdigit()]
    return bool(percents)


PROBE = """
import runpy, sys, time
started = time.time()
import prostate_seg.callback, prostate_seg.cli, prostate_seg.stages.train
from prostate_seg.segmentation.training import training
times = {"import": time.time() - started}
take = training._with_fitting_micro_batches
def timed(*arguments):
    loss = take(*arguments)
    times.setdefault("first_step", time.time())
    times["last_step"] = time.time()
    return loss
training._with_fitting_micro_batches = timed
try:
    runpy.run_module("prostate_seg", run_name="__main__")
finally:
    with open("times.txt", "w") as file:
        print(times["import"], times["first_step"], times["last_step"], file=file)
"""


def overhead_rows(machine: Machine) -> list[Row]:
    """Time stage=train on a packed set from the command to the first step, and from the last step to the exit."""
    with pipeline(machine, "experiment=tiny") as (folder, arguments):
        rows = []
        for name in ("first training, packs the set", "second training"):
            start = time.time()
            command = [sys.executable, "-c", PROBE, "stage=train", "fold.index=0", *arguments]
            subprocess.run(command, check=True, capture_output=True, cwd=folder)
            end = time.time()
            imports, first, last = (float(word) for word in (folder / "times.txt").read_text().split())
            times = {"import_s": imports, "to_first_step_s": first - start - imports, "from_last_step_s": end - last}
            rows.append({"row": name, **times})
    return rows


@contextlib.contextmanager
def pipeline(machine: Machine, *overrides: str) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder with a prepared phantom, and the arguments of further stages."""
    with tempfile.TemporaryDirectory() as name:
        arguments = [*overrides, f"machine.device={machine.device.type}", "mlflow=off"]
        command = [sys.executable, "-m", "prostate_seg", "-m", "stage=fetch,preprocess,prepare", *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=name)
        yield Path(name), arguments


class Ellipsoid(torch.nn.Module):
    """A network that takes the time of another one, and returns the bright ellipsoid of the synthetic study."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits of [B, slices, Y, X]."""
        middle = inputs.shape[1] // 2
        return 1e-9 * self.network(inputs) + 8 * (inputs[:, middle : middle + 1] - 1.5)


def evaluation_rows(machine: Machine) -> list[Row]:
    """Time the evaluation of studies of 384x384x19 against reading, resampling and the network, and against two cores."""
    cfg = machine.config("evaluate.tta=false")
    num_studies = 2 if machine.tiny else NUM_STUDIES
    with tempfile.TemporaryDirectory() as name:
        folder, study = Path(name), synthetic_study()
        mask = study.with_mask((study.array > 450).astype("uint8"))
        for index in range(num_studies):
            write_volume(folder / "data" / "images" / f"s{index}.nii.gz", study)
            write_volume(folder / "data" / "masks" / f"s{index}.nii.gz", mask)
        cases, _ = discover_cases(folder / "data", patient_pattern="(.+)", exclude=[])
        predictor = predictor_on(machine.device, cfg)
        regions = {WHOLE_GLAND: cfg.data.whole_gland_labels}
        evaluation = Evaluation(
            cfg=cfg,
            workspace=workspace_of(cfg),
            folds={},
            verdict={},
            dataset={},
            regions=regions,
            predicted_regions=predicted_labels(regions),
        )

        def evaluate(case: Any, predictor: Predictor) -> None:
            loaded, quality = load_case(case, labels=cfg.data.whole_gland_labels)
            assert loaded is not None, quality.findings
            case_evaluator(evaluation, predictor, folder=folder / "out", name="fold0")(case, loaded, ("", ""))

        def alone() -> None:
            image = preprocess_study(
                read_volume(cases[0].image), None, settings=predictor.recipe.preprocess
            ).image.array
            normalised = normalise(image, intensity=measure_intensity(image, clip=False))
            network_probabilities(torch.from_numpy(normalised), predictor=predictor)

        def all_cases(predictor: Predictor, num_workers: int | None) -> None:
            work = partial(evaluate, predictor=predictor)
            map_cases(work, cases, num_workers=num_workers, label="evaluate")

        one, floor = (timed(function) for function in (partial(evaluate, cases[0], predictor), alone))
        ours = timed(partial(all_cases, predictor, None))
        on_cpu = replace(predictor_on(torch.device("cpu"), cfg), num_threads=2)
        two_cores = timed(partial(all_cases, on_cpu, 2))
    return [
        {"row": "evaluation of a study", "seconds": one, "reading_resampling_network_s": floor, "ratio": one / floor},
        {"row": f"evaluation of {num_studies} studies", "seconds": ours, "two_cores_without_gpu_s": two_cores},
    ]


def predictor_on(device: torch.device, cfg: Config) -> Predictor:
    """Return an untrained network on a device."""
    return Predictor(
        networks=[Ellipsoid(build_network(cfg.model)).to(device).eval()],
        recipe=recipe_of(cfg),
        usage=Usage(threshold=cfg.evaluate.threshold, largest_component=True, tta=False, precision="auto"),
        device=device,
    )


def timed(function: Callable[[], object]) -> float:
    """Return the median seconds of three calls after a first one."""
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def memory_rows(machine: Machine) -> list[Row]:
    """Train in a small part of the GPU's memory, with a batch that does not fit, and then with all of it."""
    cfg = machine.config("model.channels=[32,64,128,256,512]", "train.batch_size=128", "train.precision=fp32")
    if machine.device.type == "cpu":
        return [{"row": "out of memory", "skipped": "needs a GPU"}]
    epochs: list[Epoch] = []
    with tempfile.TemporaryDirectory() as folder:
        packed = pack_noise(Path(folder) / "packed", num_cases=20, size=32 if machine.tiny else 160)
        _, total = torch.cuda.mem_get_info()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(4 * 2**30 / total)
        try:
            train(cfg, packed, num_steps=10, num_epochs=2, on_epoch_end=epochs.append)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    name = "batch of 128 of channels 32-512 in 4 GiB"
    return [{"row": name, "micro_batch": epochs[-1].batch_size, "loss": epochs[-1].loss}]


def dice_rows(machine: Machine) -> list[Row]:
    """Train fold 0 of the phantom with experiment=gpu for its two minutes, and for a third of them; evaluate both."""
    experiment, minutes = ("tiny", (0.05,)) if machine.tiny else ("gpu", (2.0, 0.67))
    rows = []
    with pipeline(machine, f"experiment={experiment}") as (folder, arguments):
        for limit in minutes:
            seconds = []
            for stage in ("train", "evaluate"):
                start = time.perf_counter()
                command = [sys.executable, "-m", "prostate_seg", f"stage={stage}", "fold.index=0", *arguments]
                limited = [f"train.max_minutes={limit}"] if stage == "train" else []
                subprocess.run([*command, *limited], check=True, capture_output=True, cwd=folder)
                seconds.append(time.perf_counter() - start)
            summary = json.loads((folder / "model" / "fold0" / "summary.json").read_text())
            test = json.loads((folder / "evaluation" / "summary.json").read_text())["test"]
            numbers = {
                "val_dice": summary["val_dice"],
                "best_epoch": summary["best_epoch"],
                "epochs": summary["num_epochs"],
            }
            times = {"train_s": seconds[0], "evaluate_s": seconds[1]}
            name = f"experiment={experiment}, train.max_minutes={limit:g}"
            rows.append({"row": name, "test_dice": test["dice"], **numbers, **times})
    return rows


if __name__ == "__main__":
    main()
