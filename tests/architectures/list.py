"""The architectures of the sweep: where each comes from, and the shape of its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vision import package

SIDES: dict[str, int] = {
    **dict.fromkeys(("inception_v3", "inception_v4", "nasnetalarge"), 96),
    **dict.fromkeys(("levit_128s", "efficientformer_l1", "efficientformerv2_s0", "visformer_tiny"), 224),
}
SIDE = 64
FADING = {"efficientnet_b0", "efficientnet_v2_s", "deeplabv3_mobilenet_v3_large", "convmixer_768_32", "inception_v4"}

TORCHVISION = """
resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 googlenet inception_v3 mobilenet_v2 mobilenet_v3_small
mobilenet_v3_large mnasnet0_5 mnasnet1_0 shufflenet_v2_x0_5 shufflenet_v2_x1_0 efficientnet_b0 efficientnet_v2_s regnet_y_400mf
regnet_x_400mf vgg11_bn
""".split()  # noqa: SIM905 - a list of names reads best without quotes
VIDEO = ["r3d_18", "mc3_18", "r2plus1d_18"]
SEGMENTATION = ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"]
TIMM = """
resnet10t resnet14t resnet26d resnetv2_50 seresnet50 skresnet18 res2net50_26w_4s resnest14d dpn68b hrnet_w18_small dla34
ghostnet_100 ghostnetv2_100 repvgg_a0 mobileone_s0 mobileone_s1 fastvit_t8 levit_128s efficientformer_l1 efficientformerv2_s0
convmixer_768_32 cspresnet50 cspdarknet53 darknet53 tf_efficientnet_b0 tf_efficientnet_lite0 mixnet_s tinynet_e lcnet_050
hardcorenas_a spnasnet_100 fbnetc_100 rexnet_100 selecsls42b ese_vovnet19b_dw xception41 inception_v4 gernet_s hgnet_tiny
hgnetv2_b0 regnetz_b16 repghostnet_050 repvit_m0_9 mobilenetv3_small_050 mobilenetv4_conv_small visformer_tiny mobilevit_xs
nasnetalarge
""".split()  # noqa: SIM905 - a list of names reads best without quotes
OWN: dict[str, tuple[int, ...]] = {"unet": (3, 32, 32), "tabular": (13,), "crepe": (256,), "recurrent": (8, 20), "pointnet": (3, 40)}
NAMES = [*TORCHVISION, *VIDEO, *SEGMENTATION, "resnet50_frozen", *TIMM, *OWN]


def make(name: str, seed: int = 0) -> tuple[nn.Module, tuple[int, ...]]:
    """The network in evaluation mode with lively statistics, and the shape of one sample. seed: of all weights and statistics."""
    torch.manual_seed(seed)
    side = SIDES.get(name, SIDE)
    shape: tuple[int, ...] = (3, side, side)
    if name in OWN:
        from . import own

        module, shape = getattr(own, name)(), OWN[name]
    elif name in TIMM:
        module = package("timm").create_model(name)
    elif name in VIDEO:
        module, shape = package("torchvision").models.get_model(name), (3, 8, 32, 32)
    elif name in SEGMENTATION:
        module = package("torchvision").models.get_model(name, weights_backbone=None)
    elif name == "resnet50_frozen":
        vision = package("torchvision")
        module = vision.models.resnet50(norm_layer=vision.ops.FrozenBatchNorm2d)
    else:
        # Their auxiliary heads run in training alone, so that no file and no program holds them.
        heads = {"init_weights": False, "aux_logits": False}
        more: dict[str, Any] = heads if name in ("googlenet", "inception_v3") else {}
        module = package("torchvision").models.get_model(name, **more)
    module = lively(module, seed).eval()
    return (measured(module, shape) if name in FADING else module), shape


def measured(module: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """With the statistics of a random batch: with random ones the signal dies on its way through a deep network of Swish and gates."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for each in norms:
        each.train()
        each.momentum = 1.0
    with torch.no_grad():
        module(torch.randn(8, *shape, generator=torch.Generator().manual_seed(3)))
    return module.eval()


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and coefficients as trained networks have them: none is 0 or 1, most gammas are positive, a few are not."""
    generator = torch.Generator().manual_seed(seed + 1)
    for each in module.modules():
        if not isinstance(getattr(each, "running_var", None), Tensor):
            continue
        with torch.no_grad():
            each.running_mean.normal_(0, 0.1, generator=generator)
            each.running_var.uniform_(0.5, 2.0, generator=generator)
            if isinstance(each.weight, Tensor):
                each.weight.uniform_(0.5, 1.5, generator=generator)
                each.weight[::16] *= -1
                each.bias.normal_(0, 0.1, generator=generator)
    return module
