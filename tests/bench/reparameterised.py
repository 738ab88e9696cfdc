"""What is left of architectures with parallel branches, beside the deploy form that timm has for them.

    python -m tests.bench.reparameterised [NAMES]

An architecture of each of timm's families of which `timm.utils.reparameterize_model` makes another form, with lively statistics, exported
to ONNX twice: as it is trained, which bnfold folds, and in its deploy form. In each column the operators of the trained, the deploy and the
folded form. Status 1 where the folded form has more convolutions, BatchNorms or sums than the deploy form.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

import onnx
import torch

import bnfold
from tests.architectures.list import lively
from tests.power.models import exported
from tests.vision import package

COUNTED = ("Conv", "BatchNormalization", "Add")
SMALL = ("mobileone", "repvgg", "repghost", "ghostnet", "lcnet")  # these take any size
NAMES = """
mobileone_s0 mobileone_s1 repvgg_a0 repvgg_b0 fastvit_t8 fastvit_mci0 repghostnet_050 ghostnetv3_050 repvit_m0_9 levit_128s
efficientvit_m0 efficientvim_m1 efficientvim_m1_dist tiny_vit_5m_224 shvit_s1 lcnetv2_small iformer_t nextvit_small
""".split()  # noqa: SIM905 - a list of names reads best without quotes


def forms(name: str) -> tuple[onnx.ModelProto, onnx.ModelProto, onnx.ModelProto]:
    """As it is trained, its deploy form, and what bnfold makes of the first."""
    timm = package("timm")
    torch.manual_seed(0)
    module = lively(timm.create_model(name)).eval()
    shape = (3, 64, 64) if name.startswith(SMALL) else module.default_cfg["input_size"]
    trained, deployed = (exported(each, shape, torch.float32) for each in (module, timm.utils.model.reparameterize_model(module)))
    return trained, deployed, bnfold.fuse(trained, check=False)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    print(f"| architecture | {' | '.join(COUNTED)} |\n|---|{'---|' * len(COUNTED)}")
    more = []
    for name in parser.parse_args().names:
        counts = [Counter(node.op_type for node in form.graph.node) for form in forms(name)]
        print(f"| {name} | {' | '.join(' / '.join(str(count[op]) for count in counts) for op in COUNTED)} |", flush=True)
        if any(counts[2][op] > counts[1][op] for op in COUNTED):
            more.append(name)
    print("more than the deploy form: " + (", ".join(more) or "none"))
    return 1 if more else 0


if __name__ == "__main__":
    sys.exit(main())
