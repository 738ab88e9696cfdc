"""The architectures that are swept: see `tests.architectures` for where they come from."""

NAMES = """
tabular crepe pointnet unet resnet18 mobilenet_v2 shufflenet_v2_x0_5 ghostnet_100 repvgg_a0 regnet_y_400mf efficientnet_b0 mobileone_s0
densenet121 googlenet
""".split()  # noqa: SIM905 - a list of names reads best without quotes
IN_HALF = {"tabular", "crepe", "pointnet", "unet", "mobilenet_v2", "shufflenet_v2_x0_5", "ghostnet_100", "regnet_y_400mf"}
AS_MODULES = {"tabular", "crepe", "pointnet", "unet", "shufflenet_v2_x0_5", "mobilenet_v2"}  # torch.export takes long on the others
