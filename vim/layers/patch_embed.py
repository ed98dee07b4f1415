"""Images to patch tokens: by one convolution, whose patches may overlap, or by a stack of them."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import ConvNormAct, resample_patch_embed, to_2tuple
from torch import Tensor, nn

__all__ = ["EMBED_LAYERS", "ConvStem", "PatchEmbed"]

torch.fx.wrap("_checked")  # symbolic tracing keeps the call, whose answer depends on the image


class PatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel's size, as one matrix product where it is that.

    cuDNN's convolution of 16 x 16 patches takes nine times as long as the product (H100, bf16, 224
    px). Parameters and result are those of `nn.Conv2d`: (B, C, H, W) -> (B, D, H', W').
    """

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.kernel_size
        if (rows, columns) != self.stride:
            return self._conv_forward(x, self.weight, self.bias)
        height, width = x.shape[2] // rows, x.shape[3] // columns
        x = x[:, :, : height * rows, : width * columns]
        x = x.reshape(x.shape[0], x.shape[1], height, rows, width, columns)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(x, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Image to patch tokens: (B, C, H, W) -> (B, H' * W', D), row by row.

    Like timm's layer of this name, with a stride of its own: H' = (H - patch) / stride + 1.

    Args:
        img_size: side, or (height, width), in pixels.
        patch_size: side or (height, width) of a patch.
        patch_stride: distance of neighbouring patches; None is the patch size, no overlap.
        in_chans: C channels of the image.
        embed_dim: D features.
        strict_img_size: whether only images of `img_size` are taken.
        dynamic_img_pad: whether an image that patches do not cover exactly is padded with zeros
            at the bottom and the right.

    Raises:
        ValueError: at construction or on the image's size, saying what would fit.
        TypeError: an image that is not floating point.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        patch_stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        embed_dim: int = 768,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.patch_size = to_2tuple(patch_size)
        self.patch_stride = to_2tuple(patch_stride or patch_size)
        self.in_chans = in_chans
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self._set_img_size(img_size)
        self.stem = nn.Identity()
        self.proj = PatchProjection(
            in_chans, embed_dim, self.patch_size, self.patch_stride, device=device, dtype=dtype
        )

    def _set_img_size(self, img_size: int | tuple[int, int]) -> None:
        self.img_size = to_2tuple(img_size)
        _check_size(*self.img_size, self.patch_size, self.patch_stride, self.dynamic_img_pad)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        patch_stride: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the size of images, patches or strides, resampling the projection's weights.

        A new patch size brings an equal stride unless one is given, where patches did not overlap.
        """
        overlaps = self.patch_stride != self.patch_size
        patch_size = to_2tuple(patch_size or self.patch_size)
        if patch_stride is None:
            patch_stride = self.patch_stride if overlaps else patch_size
        old = self.proj
        weight = old.weight
        if patch_size != self.patch_size:
            weight = resample_patch_embed(weight.detach(), list(patch_size))
        patch_stride = to_2tuple(patch_stride)
        img_size = to_2tuple(img_size or self.img_size)
        _check_size(*img_size, patch_size, patch_stride, self.dynamic_img_pad)
        self.patch_size, self.patch_stride = patch_size, patch_stride
        self._set_img_size(img_size)
        self.proj = PatchProjection(
            old.in_channels,
            old.out_channels,
            self.patch_size,
            self.patch_stride,
            device=weight.device,
            dtype=weight.dtype,
        )
        self.proj.weight = nn.Parameter(weight.detach(), old.weight.requires_grad)
        self.proj.bias = old.bias
        self.proj.train(old.training)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Return the distance of neighbouring tokens in pixels."""
        return max(self.patch_stride) if as_scalar else self.patch_stride

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return the grid (H', W') of an image of this size, padding included."""
        height = img_size[0] - self.patch_size[0]
        width = img_size[1] - self.patch_size[1]
        if self.dynamic_img_pad:
            height = height + self.patch_stride[0] - 1
            width = width + self.patch_stride[1] - 1
        return height // self.patch_stride[0] + 1, width // self.patch_stride[1] + 1

    def forward(self, x: Tensor) -> Tensor:
        x = _checked(
            x,
            self.in_chans,
            self.img_size,
            self.patch_size,
            self.patch_stride,
            self.strict_img_size,
            self.dynamic_img_pad,
        )
        if self.dynamic_img_pad:
            rows, columns = self.dynamic_feat_size((x.shape[2], x.shape[3]))
            bottom = (rows - 1) * self.patch_stride[0] + self.patch_size[0] - x.shape[2]
            right = (columns - 1) * self.patch_stride[1] + self.patch_size[1] - x.shape[3]
            x = F.pad(x, (0, right, 0, bottom))
        return self.proj(self.stem(x)).flatten(2).transpose(1, 2)

    @torch.jit.ignore
    def embed_chunk(self, x: Tensor) -> Tensor:
        """Return what `forward` does, of a part of an image of any size that patches cover."""
        sizes = (self.img_size, self.patch_size, self.patch_stride)
        x = _checked(x, self.in_chans, *sizes, False, False)
        return self.proj(self.stem(x)).flatten(2).transpose(1, 2)


class ConvStem(PatchEmbed):
    """Image to patch tokens by overlapping convolutions: (B, C, H, W) -> (B, H' * W', D).

    ::

        log2(patch_size) times: 3x3 convolution of stride 2, norm, activation
        1x1 convolution to D channels

    The channels double from one 3x3 convolution to the next and end at D. On small data sets it
    learns faster and further than one large convolution (Xiao et al. 2021, "Early Convolutions
    Help Transformers See Better", arXiv:2106.14881, section 4).

    Args:
        img_size, in_chans, strict_img_size, dynamic_img_pad: see `PatchEmbed`.
        patch_size: distance of neighbouring tokens, a power of two; a token sees twice as far.
        patch_stride: None, or the same: tokens overlap already.
        embed_dim: D features.
        bias: whether the last convolution has one.
        norm_layer, act_layer: after each 3x3 convolution.

    Raises:
        ValueError: a patch size or stride that such convolutions do not make.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        patch_stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        act_layer: Callable[..., nn.Module] = nn.ReLU,
        device=None,
        dtype=None,
    ) -> None:
        side, other = to_2tuple(patch_size)
        if side != other or side < 2 or side & (side - 1):
            raise ValueError(
                f"the convolutional stem halves the image some times: patch_size must be a power "
                f"of two from 2 on, got {patch_size}"
            )
        if patch_stride is not None and to_2tuple(patch_stride) != (side, side):
            raise ValueError(
                f"the convolutional stem's tokens overlap already: patch_stride must be None or "
                f"{side}, got {patch_stride}"
            )
        halvings = side.bit_length() - 1
        if embed_dim % 2 ** (halvings - 1):
            raise ValueError(
                f"embed_dim must be a multiple of {2 ** (halvings - 1)}, since channels halve from "
                f"convolution to convolution; got {embed_dim}"
            )
        super().__init__(
            img_size,
            side,
            None,
            in_chans,
            embed_dim,
            strict_img_size=strict_img_size,
            dynamic_img_pad=dynamic_img_pad,
            device="meta",  # its projection is replaced below
        )
        dd = {"device": device, "dtype": dtype}
        widths = [in_chans, *(embed_dim >> i for i in reversed(range(halvings)))]
        self.stem = nn.Sequential(
            *(
                ConvNormAct(
                    before, after, 3, stride=2, norm_layer=norm_layer, act_layer=act_layer, **dd
                )
                for before, after in pairwise(widths)
            )
        )
        self.proj = nn.Conv2d(embed_dim, embed_dim, 1, bias=bias, **dd)

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        patch_stride: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the size of images; that of patches is made by the layers, and stays."""
        for name, size in (("patch_size", patch_size), ("patch_stride", patch_stride)):
            if size is not None and to_2tuple(size) != self.patch_size:
                raise ValueError(
                    f"the convolutional stem has {name} {self.patch_size[0]}: it cannot change to "
                    f"{size}"
                )
        if img_size is not None:
            self._set_img_size(img_size)

    @torch.jit.ignore
    def embed_chunk(self, x: Tensor) -> Tensor:
        """Return what `forward` does: the stem sees over patches' borders, so not of a part."""
        if x.shape[2:] != self.img_size:
            raise ValueError(
                f"the convolutional stem sees beyond a chunk's borders: give whole images of "
                f"{self.img_size[0]}x{self.img_size[1]}, got {list(x.shape)}, or build the model "
                "with embed_layer='patch'"
            )
        return self(x)


EMBED_LAYERS: dict[str, type[PatchEmbed]] = {"patch": PatchEmbed, "conv": ConvStem}


def _checked(
    x: Tensor,
    in_chans: int,
    img_size: tuple[int, int],
    patch_size: tuple[int, int],
    patch_stride: tuple[int, int],
    strict: bool,
    pad: bool,
) -> Tensor:
    """Return the image, or raise where the model cannot take it."""
    if not x.is_floating_point():
        raise TypeError(
            f"images must be floating point, got {x.dtype}: scale to [0, 1] and normalise, "
            "as timm.data.create_transform does"
        )
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(
            f"images must be (B, C, H, W) with C = {in_chans}, got {list(x.shape)}: convert them, "
            "or build the model with in_chans=C"
        )
    height, width = x.shape[2], x.shape[3]
    if strict and (height != img_size[0] or width != img_size[1]):
        raise ValueError(
            f"the image is {height}x{width}, the model takes {img_size[0]}x{img_size[1]}: resize "
            "the image, call set_input_size, or build the model with img_size=(H, W) or "
            "dynamic_img_size=True"
        )
    _check_size(height, width, patch_size, patch_stride, pad)
    return x


def _check_size(
    height: int,
    width: int,
    patch_size: tuple[int, int],
    patch_stride: tuple[int, int],
    pad: bool,
) -> None:
    """Raise where patches do not cover an image of this size exactly."""
    if height < patch_size[0] or width < patch_size[1]:
        if not pad or height < 1 or width < 1:
            raise ValueError(
                f"the image size {height}x{width} is smaller than a patch of "
                f"{patch_size[0]}x{patch_size[1]}: use larger images or a smaller patch_size"
            )
    elif not pad:
        rest = (height - patch_size[0]) % patch_stride[0]
        rest_width = (width - patch_size[1]) % patch_stride[1]
        if rest != 0 or rest_width != 0:
            raise ValueError(
                f"patches of {patch_size[0]}x{patch_size[1]} with stride "
                f"{patch_stride[0]}x{patch_stride[1]} do not cover an image size of "
                f"{height}x{width} exactly: resize to {height - rest}x{width - rest_width}, or "
                "build the model with dynamic_img_size=True and dynamic_img_pad=True"
            )
