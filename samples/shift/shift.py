"""Handwritten digits under a shift: how accuracy falls, and how recalibration brings it back.

    pip install torch scikit-learn matplotlib
    python samples/shift/shift.py [FOLDER] [--repeats N]

trains the network of the digits sample properly (batches of 32, momentum 0.1), and then feeds it images that it was not trained for: with
less contrast, blurred, noisy, or of half of the classes. For each method of recalibration and for 8 to 1,024 of these images, without their
labels, it scores the recalibrated network on 540 others. Prints the table, and draws `shift.svg` into FOLDER (the working one by default),
in a few minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bnfold
from bnfold.recalibration.methods import Exact, IoffeSzegedy, Method, MovingAverage, Precise, Prior

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
SHOWN = (8, 32, 128, 1024)  # in the table
EPOCHS, BATCH, LEARNING_RATE = 12, 32, 0.003
METHODS: dict[str, Method] = {
    "exact": Exact(),
    "precise": Precise(),
    "ioffe-szegedy": IoffeSzegedy(),
    "moving-average": MovingAverage(),
    "prior, N = 16": Prior(strength=16),
    "prior, N = 16, mean shift": Prior(strength=16, mean_shift=True),
}


def contrast(images: Tensor, generator: torch.Generator) -> Tensor:
    """A fifth of the contrast, on a grey ground."""
    return 0.4 + 0.2 * images


def blur(images: Tensor, generator: torch.Generator) -> Tensor:
    """The mean of 3 x 3 pixels, in place of each."""
    return nn.functional.avg_pool2d(nn.functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)


def noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise of deviation 0.35, where pixels go from 0 to 1."""
    return images + 0.35 * torch.randn(images.shape, generator=generator)


def same(images: Tensor, generator: torch.Generator) -> Tensor:
    return images


Shift = Callable[[Tensor, torch.Generator], Tensor]
SHIFTS: dict[str, tuple[Shift, tuple[int, ...]]] = {
    "none": (same, tuple(range(10))),
    "contrast": (contrast, tuple(range(10))),
    "blur": (blur, tuple(range(10))),
    "noise": (noise, tuple(range(10))),
    "digits 0 to 4 alone": (same, tuple(range(5))),
}


def sample() -> Any:
    """The script of the digits sample: its network and its data."""
    path = Path(__file__).resolve().parent.parent / "digits" / "train.py"
    spec = importlib.util.spec_from_file_location("digits_train", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def trained(script: Any, x: Tensor, y: Tensor) -> nn.Module:
    """The network of the digits sample, with the momentum and the batches of a usual recipe."""
    model: nn.Module = script.Network()
    for each in model.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.momentum = 0.1
    steps = EPOCHS * (len(x) // BATCH)
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):
            if len(batch) == BATCH:
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimiser.step()
                schedule.step()
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def experiment(repeats: int) -> dict[str, dict[str, Any]]:
    """For each shift: the accuracy as it is, the number of test images, and the mean accuracy of each method and number of samples."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    script = sample()
    x, y, x_test, y_test = script.digits()
    model = trained(script, x, y)
    found: dict[str, dict[str, Any]] = {}
    for name, (shift, classes) in SHIFTS.items():
        generator = torch.Generator().manual_seed(1)
        ours, theirs = (torch.isin(labels, torch.tensor(classes)) for labels in (y, y_test))
        unlabelled, test, labels = shift(x[ours], generator), shift(x_test[theirs], generator), y_test[theirs]
        rows: dict[str, dict[int, float]] = {method: {} for method in METHODS}
        for size in (size for size in SIZES if size <= len(unlabelled)):
            draws = [unlabelled[torch.randperm(len(unlabelled), generator=generator)[:size]] for _ in range(repeats)]
            for method, how in METHODS.items():
                scores = []
                for draw in draws:
                    fresh, _ = bnfold.recalibrate(model, draw, method=how, batch_size=min(size, BATCH))
                    scores.append(accuracy(fresh, test, labels))
                rows[method][size] = float(np.mean(scores))
        found[name] = {"as it is": accuracy(model, test, labels), "images": len(test), "methods": rows}
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [f"| shift | as it is | method | {' | '.join(f'{size:,}' for size in SHOWN)} |", f"|---|--:|---|{'--:|' * len(SHOWN)}"]
    for shift, result in found.items():
        p, n = result["as it is"], result["images"]
        for number, (method, scores) in enumerate(result["methods"].items()):
            head = f"{shift} | {p:.1%} ± {math.sqrt(p * (1 - p) / n):.1%}" if number == 0 else " | "
            lines.append(f"| {head} | {method} | {' | '.join(f'{scores[s]:.1%}' if s in scores else '' for s in SHOWN)} |")
    return "\n".join(lines)


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(3.2 * len(found), 3.4), sharey=True, squeeze=False, layout="constrained")
    for axis, (shift, result) in zip(axes[0], found.items(), strict=True):
        axis.axhline(result["as it is"], color="black", linestyle=":", label="as it is")
        for method, scores in result["methods"].items():
            axis.plot(list(scores), list(scores.values()), marker=".", label=method)
        axis.set(title=shift, xscale="log", xlabel="images measured on")
        axis.set_xticks(SIZES[::2], labels=[str(size) for size in SIZES[::2]])
        axis.minorticks_off()
    axes[0][0].set_ylabel("accuracy")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of recalibrated networks under a shift.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path())
    parser.add_argument("--repeats", type=int, default=3, help="draws of the images measured on, for each number of them")
    arguments = parser.parse_args()
    found = experiment(arguments.repeats)
    print(table(found))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    draw(found, arguments.folder / "shift.svg")
    print(f"\ndrawn: {arguments.folder / 'shift.svg'}")


if __name__ == "__main__":
    main()
