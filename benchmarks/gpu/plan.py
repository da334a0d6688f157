"""The stages of `make gpu`, in the order of their worth, and the command line. Imports no torch: it starts at once."""

import argparse
from pathlib import Path

# Minutes that a stage may take at most if it is not named alone, in the order in which a short visit should spend them.
STAGES = {
    "machine": 2.0,  # device, versions, rates that all else is judged by
    "tests": 6.0,  # correct before fast
    "models": 6.0,
    "kernels": 8.0,
    "speed": 6.0,
    "training": 4.0,
    "conversion": 6.0,
    "profiles": 3.0,  # of the worst rows of kernels and models
    "moretests": 6.0,
}
ABOUT = {
    "machine": "device, driver, versions, copy and product rates",
    "tests": "the tests that run kernels on the device",
    "models": "decode and prefill of whole models of random weights, locked against original",
    "kernels": "every MLP shape, chain and token count, with the error gate",
    "speed": "the same models by `bench model`: transformers' generate, and vLLM where it is installed",
    "training": "a training step of whole models against an inference pass, by every strategy",
    "conversion": "all layers of a model locked at ascending cost: loss, KL and flips as a curve",
    "profiles": "where the time of the worst row of the kernels and of the models goes",
    "moretests": "the other tests of kernels and benchmark",
}
MODULES = {"moretests": "tests"}  # of the stages that have none of their own name
AGAIN = 75  # exit status of a stage that is to go on in a fresh process
SILENCE = 120.0  # seconds without a newer file, after which a stage hangs
GRACE = 20.0  # seconds between the end of a stage's time and the end of its process
LEAST = 45.0  # seconds that are not worth beginning a stage for
SMOKE_MINUTES = 3.0
SMOKE_OUT = Path(__file__).resolve().parents[2] / "build" / "gpu-smoke"


def parser(prog: str) -> argparse.ArgumentParser:
    """The arguments that the command and each of its stages understand."""
    stages = "\n".join(f"  {name:<11} {ABOUT[name]}" for name in STAGES)
    made = argparse.ArgumentParser(
        prog=prog,
        description="Measures all there is to measure on a GPU, a JSON file a stage.",
        epilog=f"stages, in the order in which they run:\n{stages}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--stage", default="all", help="all, or names such as kernels,models")
    made.add_argument("--minutes", type=float, help="of all stages together (25; with --smoke 3)")
    made.add_argument("--out", type=Path, help="folder of the files, instead of the device's under results")
    made.add_argument("--again", action="store_true", help="measure finished stages once more")
    made.add_argument("--smoke", action="store_true", help="the same stages on a CPU at tiny sizes")
    made.add_argument("--model", type=Path, help="to convert, instead of SmolLM2: a folder or a .gguf file")
    made.add_argument("--data", type=Path, help="calibration text of the conversion")
    return made


def chosen(names: str) -> list[str]:
    """The stages that a list names, in their order; raises ValueError on another name."""
    if names == "all":
        return list(STAGES)
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in STAGES:
            raise ValueError(f"unknown stage {name!r}; all, or some of {', '.join(STAGES)}")
    return [name for name in STAGES if name in wanted]
