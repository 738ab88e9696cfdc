"""The architectures that are swept: see `tests.architectures` for where they come from.

LIGHT: files that the onnx package holds for its own tests, with the architecture of a trained network and one number for all weights of a
layer. The reference's sums are nearly exact there, and a right fold's aren't. They meet right folds only: where all weights are the same,
many a defect is none. (Those of the package that end in a Softmax answer the same to everything, so there is nothing to judge; and what
is left of the data in the outputs of the others is less than float32 tells, so of FUSES, whose operators have no coefficients to compare,
`verify` says rightly that it can't judge them.)
"""

NAMES = """
tabular crepe pointnet unet resnet18 mobilenet_v2 shufflenet_v2_x0_5 ghostnet_100 repvgg_a0 regnet_y_400mf efficientnet_b0 mobileone_s0
densenet121 googlenet
light_densenet121
""".split()  # noqa: SIM905 - a list of names reads best without quotes
FUSES = {"ONNX Runtime, extended"}
LIGHT = {name for name in NAMES if name.startswith("light_")}
IN_HALF = {"tabular", "crepe", "pointnet", "unet", "mobilenet_v2", "shufflenet_v2_x0_5", "ghostnet_100", "regnet_y_400mf"}
AS_MODULES = {"tabular", "crepe", "pointnet", "unet", "shufflenet_v2_x0_5", "mobilenet_v2"}  # torch.export takes long on the others
