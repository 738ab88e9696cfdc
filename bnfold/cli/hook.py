"""For pre-commit: a model whose BatchNorms would fold isn't ready to be committed. `python -m bnfold.cli.hook FILE...`"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bnfold.text import visible

from . import _explain


def main(paths: Sequence[str]) -> int:
    """0 where no BatchNorm of any of the models would fold, 1 where one would, else the status of the first that can't be read."""
    from bnfold import api

    statuses = []
    for path in paths:
        try:
            layers = api.inspect(api.load(path)).layers
        except Exception as error:
            statuses.append(_explain(error))
            continue
        if count := sum(layer.verdict == "folded" for layer in layers):
            print(visible(f"{path}: {count} BatchNorm{'s' * (count != 1)} would fold: bnfold fuse {path} -o fused.onnx"))
            statuses.append(1)
    return 1 if 1 in statuses else next(iter(statuses), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
