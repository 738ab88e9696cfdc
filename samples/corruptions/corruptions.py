"""Handwritten digits under ten corruptions: what each loses, and what recalibration on 1 to 512 of the images brings back.

    pip install torch onnx scikit-learn
    python samples/corruptions/corruptions.py [--seeds N]

trains the network of the digits sample once for each seed, measures its BatchNorms afresh on corrupted images without their labels, and
scores it on 540 others. Prints two tables, in about five minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from scipy import ndimage, stats

import bnfold
from bnfold.recalibration.methods import METHODS

sys.path.append(str(Path(__file__).resolve().parents[1] / "digits"))
from recipe import digits, trained
from train import export

Random = np.random.Generator
EPOCHS = 12
SIZES = (1, 8, 32, 128, 512)  # images that the BatchNorms are measured on
SEVERITIES = (1, 2, 3, 4, 5)
MIDDLE = 3
NAMES = tuple(METHODS)


def noisy(x: np.ndarray, random: Random, s: int) -> np.ndarray:
    return x + 0.12 * s * random.normal(size=x.shape)


def shot(x: np.ndarray, random: Random, s: int) -> np.ndarray:
    photons = 16 / 2**s
    return random.poisson(x * photons) / photons


def impulses(x: np.ndarray, random: Random, s: int) -> np.ndarray:
    return np.where(random.random(x.shape) < 0.05 * s, random.integers(0, 2, x.shape), x)


def dropped(x: np.ndarray, random: Random, s: int) -> np.ndarray:
    return x * (random.random(x.shape) >= 0.1 * s)


# Images (N, 1, 8, 8) in [0, 1], a generator and a severity from 1 to 5 to images
CORRUPTIONS: dict[str, Callable[[np.ndarray, Random, int], np.ndarray]] = {
    "contrast": lambda x, random, s: 0.5 + (x - 0.5) * (1 - 0.16 * s),
    "brightness": lambda x, random, s: x + 0.2 * s,
    "gamma": lambda x, random, s: x ** (1 + 0.6 * s),
    "negative, in part": lambda x, random, s: x + 0.15 * s * (1 - 2 * x),
    "blur": lambda x, random, s: ndimage.gaussian_filter(x, (0, 0, 0.25 * s, 0.25 * s)),
    "normal noise": noisy,
    "shot noise": shot,
    "impulse noise": impulses,
    "pixels lost": dropped,
    "rotation": lambda x, random, s: ndimage.rotate(x, 12 * s, (2, 3), reshape=False, order=1),
}


class Scores:
    """The accuracy of one trained network, as it is and with statistics measured afresh."""

    def __init__(self, seed: int) -> None:
        x, y, x_test, y_test = digits()
        with tempfile.TemporaryDirectory() as folder:
            export(trained(seed, x, y, EPOCHS), Path(folder) / "digits.onnx")
            self.model = onnx.load(Path(folder) / "digits.onnx")
        self.random = np.random.default_rng(seed)
        self.images, self.labels, self.test, self.test_labels = (each.numpy() for each in (x, y, x_test, y_test))

    def __call__(self, corrupt: Callable[..., np.ndarray], classes: int, ways: Sequence[tuple[str, int]]) -> list[float]:
        """As it is, and for each (method, number of images), all of them the same random ones; of the first classes alone."""
        images, test, labels = (part[of < classes] for part, of in self._parts())
        images = corrupt(self.random.permutation(images)[: max(SIZES)], self.random).astype(np.float32)
        test = corrupt(test, self.random).astype(np.float32)
        models = [self.model, *(bnfold.recalibrate(self.model, images[:size], method=name)[0] for name, size in ways)]
        return [self._accuracy(model, test, labels) for model in models]

    def _parts(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        return (self.images, self.labels), (self.test, self.test_labels), (self.test_labels, self.test_labels)

    @staticmethod
    def _accuracy(model: onnx.ModelProto, test: np.ndarray, labels: np.ndarray) -> float:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        (logits,) = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"image": test})
        return float((logits.argmax(1) == labels).mean())


Result = dict[tuple[str, int], list[list[float]]]
WAYS = [(name, size) for name in NAMES for size in SIZES]


def experiment(seeds: int) -> tuple[Result, Result]:
    """By corruption and severity, for each seed: as it is and exact on most images. And by corruption, at the middle severity: all WAYS."""
    by_severity: Result = {}
    by_way: Result = {}
    for seed in range(seeds):
        scores = Scores(seed)
        for name, corrupt in CORRUPTIONS.items():
            for severity in SEVERITIES:
                found = scores(partial(corrupt, s=severity), 10, [("exact", max(SIZES))])
                by_severity.setdefault((name, severity), []).append(found)
            by_way.setdefault((name, 10), []).append(scores(partial(corrupt, s=MIDDLE), 10, WAYS))
        for classes in (10, 5):
            by_way.setdefault(("", classes), []).append(scores(lambda x, random: x, classes, WAYS))
    return by_severity, by_way


def interval(values: Sequence[float], form: str = ".1f") -> str:
    """The mean in percent, and half of its 95 % interval over seeds by Student's t."""
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5 if n > 1 else float("nan")
    return f"{100 * np.mean(values):{form}} ± {100 * half:.1f}"


def tables(by_severity: Result, by_way: Result) -> str:
    lines = [f"| corruption | {' | '.join(map(str, SEVERITIES))} |", f"|---|{'--:|' * len(SEVERITIES)}"]
    for name in CORRUPTIONS:
        found = [np.array(by_severity[name, severity]) for severity in SEVERITIES]
        cells = [f"{100 * each[:, 0].mean():.1f}, {interval(each[:, 1] - each[:, 0], '+.1f')}" for each in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"| images | as they are | method | {' | '.join(map(str, SIZES))} |", f"|---|--:|---|{'--:|' * len(SIZES)}"]
    kinds = {
        f"ten corruptions, severity {MIDDLE}": np.mean([by_way[name, 10] for name in CORRUPTIONS], axis=0),
        "uncorrupted": np.array(by_way["", 10]),
        "uncorrupted, digits 0 to 4 alone": np.array(by_way["", 5]),
    }
    for kind, scores in kinds.items():
        for number, name in enumerate(NAMES):
            head = f"{kind} | {interval(scores[:, 0])}" if number == 0 else " | "
            cells = [interval(scores[:, 1 + WAYS.index((name, size))]) for size in SIZES]
            lines.append(f"| {head} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Accuracy of recalibrated networks under corruptions.")
    parser.add_argument("--seeds", type=int, default=5, help="networks that are trained")
    print(tables(*experiment(parser.parse_args().seeds)))
