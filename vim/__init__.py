"""Vision Mamba (Vim) backbones for timm."""
