"""Every BatchNorm model of timm and torchvision through every conversion method, check by check."""
