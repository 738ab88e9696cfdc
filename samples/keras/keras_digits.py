"""A Keras network, trained in Keras on PyTorch, recalibrated, folded and saved as the Keras model that it is.

    pip install 'keras>=3.15' torch scikit-learn
    python samples/keras/keras_digits.py

In Keras, a BatchNorm's momentum is the share of the old statistics, 0.99 unless told otherwise: where training is short, they are still
near to what they began with. Takes half a minute or so.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")
import keras
import torch
from keras import layers

import bnfold

sys.path.append(str(Path(__file__).resolve().parents[1] / "digits"))
from train import digits

EPOCHS = 4


def network() -> keras.Model:
    """Images (N, 8, 8, 1) to logits: depthwise-separable convolutions as MobileNet has them."""
    given = keras.Input((8, 8, 1))
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(16, 3, padding="same", use_bias=False)(given)))
    for width, stride in ((32, 2), (32, 1)):
        y = layers.DepthwiseConv2D(3, stride, padding="same", use_bias=False)(x)
        y = layers.ReLU()(layers.BatchNormalization()(y))
        y = layers.BatchNormalization()(layers.Conv2D(width, 1, use_bias=False)(y))
        x = layers.ReLU()(y if stride == 2 else layers.Add()([x, y]))
    return keras.Model(given, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def main() -> tuple[float, ...]:
    """Accuracy as trained, recalibrated, and folded and read back from the file."""
    keras.utils.set_random_seed(0)
    x, y, x_test, y_test = (part.movedim(1, -1) if part.ndim == 4 else part for part in digits())
    model = network()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x.numpy(), y.numpy(), batch_size=32, epochs=EPOCHS, verbose=0)
    model.eval()  # PyTorch's word for what Keras says in each call
    fresh, _ = bnfold.recalibrate(model, x)
    folded, report = bnfold.fuse(fresh, example=x[:2])
    print(report)
    with tempfile.TemporaryDirectory() as folder:
        folded.save(Path(folder) / "folded.keras")
        loaded = keras.models.load_model(Path(folder) / "folded.keras").eval()
    with torch.no_grad():
        scores = tuple(float((each(x_test).argmax(1) == y_test).float().mean()) for each in (model, fresh, loaded))
    print("accuracy as trained {:.1%}, recalibrated {:.1%}, folded and read back {:.1%}".format(*scores))
    return scores


if __name__ == "__main__":
    main()
