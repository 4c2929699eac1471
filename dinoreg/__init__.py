"""DINO-Reg: training-free registration of 3D medical images with frozen DINOv2 features."""

__version__ = "0.1.0"
