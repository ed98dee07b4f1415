"""Patches, by cutting them out one by one; the convolutional stem; and what is refused."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed

from vim.layers import EMBED_LAYERS, ConvStem, PatchEmbed


def make(**kwargs):
    options = {"img_size": 16, "patch_size": 4, "in_chans": 2, "embed_dim": 5} | kwargs
    return PatchEmbed(**options, dtype=torch.float64)


def image(height, width, channels=2):
    return torch.randn(3, channels, height, width, dtype=torch.float64)


def cut(embed, x, grid):
    """Return the tokens of a grid of patches, each projected for itself."""
    (height, width), (down, right) = embed.patch_size, embed.patch_stride
    tokens = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            top, left = row * down, column * right
            patch = x[:, :, top : top + height, left : left + width].flatten(1)
            tokens.append(patch @ embed.proj.weight.flatten(1).T + embed.proj.bias)
    return torch.stack(tokens, dim=1)


GRIDS = {
    "square": ({}, (16, 16), (4, 4)),
    "wide": ({"img_size": (8, 16)}, (8, 16), (2, 4)),
    "tall": ({"img_size": (16, 4)}, (16, 4), (4, 1)),
    "overlap": ({"patch_stride": 2}, (16, 16), (7, 7)),
    "overlap_wide": ({"patch_stride": (2, 4), "img_size": (8, 12)}, (8, 12), (3, 3)),
    "gap": ({"patch_stride": 6}, (16, 16), (3, 3)),
    "oblong_patch": ({"patch_size": (2, 8)}, (16, 16), (8, 2)),
    "one_patch": ({"img_size": 4}, (4, 4), (1, 1)),
}


@pytest.mark.parametrize("case", GRIDS)
def test_patches_row_by_row(case):
    options, size, grid = GRIDS[case]
    embed, x = make(**options), image(*size)
    assert embed.grid_size == grid
    assert embed.num_patches == grid[0] * grid[1]
    assert embed.dynamic_feat_size(size) == grid
    torch.testing.assert_close(embed(x), cut(embed, x, grid))


def test_published_grids():
    assert PatchEmbed(224, 16, device="meta").grid_size == (14, 14)
    assert PatchEmbed(224, 16, 8, device="meta").grid_size == (27, 27)


@pytest.mark.parametrize(
    ("stride", "size", "padded", "grid"),
    [
        (None, (16, 16), (16, 16), (4, 4)),
        (None, (15, 17), (16, 20), (4, 5)),
        (None, (3, 2), (4, 4), (1, 1)),
        (None, (1, 9), (4, 12), (1, 3)),
        (2, (15, 16), (16, 16), (7, 7)),
        (2, (3, 5), (4, 6), (1, 2)),
        (3, (8, 11), (10, 13), (3, 4)),
    ],
    ids=["exact", "both", "under_a_patch", "row", "overlap", "overlap_small", "stride_3"],
)
def test_padding_is_zeros_at_the_bottom_and_right(stride, size, padded, grid):
    embed = make(patch_stride=stride, strict_img_size=False, dynamic_img_pad=True)
    x = image(*size)
    whole = torch.zeros(3, 2, *padded, dtype=torch.float64)
    whole[:, :, : size[0], : size[1]] = x
    assert embed.dynamic_feat_size(size) == grid
    torch.testing.assert_close(embed(x), cut(embed, whole, grid))


def test_other_sizes_where_the_size_is_not_strict():
    embed, x = make(strict_img_size=False), image(8, 20)
    torch.testing.assert_close(embed(x), cut(embed, x, (2, 5)))


class TestSetInputSize:
    def test_image(self):
        embed = make()
        weight = embed.proj.weight.detach().clone()
        embed.set_input_size((8, 20))
        assert (embed.img_size, embed.grid_size, embed.num_patches) == ((8, 20), (2, 5), 10)
        assert torch.equal(embed.proj.weight, weight)
        x = image(8, 20)
        torch.testing.assert_close(embed(x), cut(embed, x, (2, 5)))
        with pytest.raises(ValueError, match="the image is 16x16, the model takes 8x20"):
            embed(image(16, 16))

    @pytest.mark.parametrize(
        ("stride", "given", "expected"),
        [(None, None, (8, 8)), (2, None, (2, 2)), (None, 4, (4, 4))],
        ids=["follows", "kept_where_overlapping", "given"],
    )
    def test_patch_resamples_the_projection(self, stride, given, expected):
        embed = make(patch_stride=stride)
        weight = resample_patch_embed(embed.proj.weight.detach(), [8, 8])
        embed.set_input_size(patch_size=8, patch_stride=given)
        assert (embed.patch_size, embed.patch_stride) == ((8, 8), expected)
        torch.testing.assert_close(embed.proj.weight, weight)
        side = (16 - 8) // expected[0] + 1
        x = image(16, 16)
        torch.testing.assert_close(embed(x), cut(embed, x, (side, side)))

    def test_resampled_patches_see_a_smooth_image_alike(self):
        embed, constant = make(), torch.full((1, 2, 16, 16), 0.7, dtype=torch.float64)
        before = embed(constant)[:, :1]
        embed.set_input_size(img_size=32, patch_size=8)
        after = embed(torch.full((1, 2, 32, 32), 0.7, dtype=torch.float64))
        # timm resamples in float32
        torch.testing.assert_close(after, before.expand_as(after), rtol=1e-5, atol=1e-5)

    def test_stride(self):
        embed = make()
        embed.set_input_size(patch_stride=2)
        x = image(16, 16)
        torch.testing.assert_close(embed(x), cut(embed, x, (7, 7)))

    def test_keeps_what_is_frozen_and_the_mode(self):
        embed = make().eval().requires_grad_(False)
        embed.set_input_size(32, 8)
        assert not any(p.requires_grad for p in embed.parameters())
        assert not embed.proj.training

    def test_a_refused_size_changes_nothing(self):
        embed, x = make(), image(16, 16)
        before = embed(x)
        with pytest.raises(ValueError, match="do not cover an image size of 18x16"):
            embed.set_input_size((18, 16))
        assert (embed.img_size, embed.patch_size, embed.grid_size) == ((16, 16), (4, 4), (4, 4))
        assert torch.equal(embed(x), before)

    def test_a_refused_patch_changes_nothing(self):
        embed, x = make(), image(16, 16)
        before = embed(x)
        with pytest.raises(ValueError, match="patches of 5x5 with stride 5x5 do not cover"):
            embed.set_input_size(patch_size=5)
        assert (embed.patch_size, embed.patch_stride) == ((4, 4), (4, 4))
        assert torch.equal(embed(x), before)


@pytest.mark.parametrize(
    ("stride", "expected"), [(None, (4, 4)), (2, (2, 2)), ((2, 3), (2, 3))], ids=str
)
def test_feat_ratio(stride, expected):
    embed = make(patch_stride=stride, dynamic_img_pad=True)
    assert embed.feat_ratio(as_scalar=False) == expected
    assert embed.feat_ratio() == max(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 18}, "size of 18x18 exactly: resize to 16x16, or .*dynamic_img_pad=True"),
        ({"patch_stride": 5}, "stride 5x5 do not cover .* resize to 14x14"),
        ({"img_size": (16, 3)}, "16x3 is smaller than a patch of 4x4: use larger images"),
    ],
    ids=["not_divisible", "stride", "under_a_patch"],
)
def test_bad_sizes_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "x", "error", "message"),
    [
        ({}, torch.zeros(1, 3, 16, 16), ValueError, r"C = 2, got \[1, 3, 16, 16\]: .*in_chans=C"),
        ({}, torch.zeros(2, 16, 16), ValueError, r"\(B, C, H, W\) with C = 2, got \[2, 16, 16\]"),
        ({}, torch.zeros(1, 2, 16, 20), ValueError, "is 16x20, the model takes 16x16: .*resize"),
        (
            {"strict_img_size": False},
            torch.zeros(1, 2, 16, 18),
            ValueError,
            "size of 16x18 exactly: resize to 16x16",
        ),
        ({"strict_img_size": False}, torch.zeros(1, 2, 3, 16), ValueError, "3x16 is smaller"),
        (
            {"strict_img_size": False, "dynamic_img_pad": True},
            torch.zeros(1, 2, 0, 16),
            ValueError,
            "0x16 is smaller",
        ),
        ({}, torch.zeros(1, 2, 16, 16, dtype=torch.uint8), TypeError, r"got torch.uint8: scale"),
    ],
    ids=["channels", "no_batch", "strict", "not_divisible", "small", "empty", "uint8"],
)
def test_bad_images(options, x, error, message):
    with pytest.raises(error, match=message):
        make(**options)(x)


class TestConvStem:
    """Images (B, 2, H, W) to tokens of 8 features, 4 px apart unless said otherwise."""

    @staticmethod
    def make(**kwargs):
        options = {"img_size": 16, "patch_size": 4, "in_chans": 2, "embed_dim": 8} | kwargs
        return ConvStem(**options, dtype=torch.float64)

    def test_is_the_convolutions_one_after_another(self):
        stem, x = self.make().eval(), image(16, 16)
        for layer in stem.stem:
            torch.nn.init.uniform_(layer.bn.running_mean)
            torch.nn.init.uniform_(layer.bn.running_var, 0.5, 2.0)
        expected = x
        for layer, width in zip(stem.stem, (4, 8), strict=True):
            expected = F.conv2d(expected, layer.conv.weight, stride=2, padding=1)
            assert expected.shape[1] == width
            mean, variance = layer.bn.running_mean, layer.bn.running_var
            expected = F.batch_norm(expected, mean, variance, layer.bn.weight, layer.bn.bias)
            expected = expected.relu()
        expected = F.conv2d(expected, stem.proj.weight, stem.proj.bias)
        torch.testing.assert_close(stem(x), expected.flatten(2).transpose(1, 2))

    @pytest.mark.parametrize(("patch", "convolutions"), [(2, 1), (8, 3), (16, 4)])
    def test_tokens_stand_where_patches_would(self, patch, convolutions):
        stem = self.make(img_size=(32, 48), patch_size=patch)
        patches = make(img_size=(32, 48), patch_size=patch, embed_dim=8)
        assert len(stem.stem) == convolutions
        assert stem.grid_size == patches.grid_size
        assert stem.feat_ratio() == patch
        assert stem(image(32, 48)).shape == (3, stem.num_patches, 8)

    def test_tokens_overlap(self):
        stem, x = self.make().eval(), image(16, 16)
        moved = x.clone()
        moved[:, :, :4, 3] += 1  # the last column of the first patch
        changed = (stem(moved) - stem(x)).abs().amax(dim=(0, 2)) > 0
        assert changed[:2].all()

    def test_other_sizes(self):
        stem = self.make(strict_img_size=False, dynamic_img_pad=True).eval()
        x = image(15, 18)
        padded = F.pad(x, (0, 2, 0, 1))
        torch.testing.assert_close(stem(x), stem(padded))
        stem.set_input_size((8, 20))
        assert (stem.img_size, stem.grid_size, stem.num_patches) == ((8, 20), (2, 5), 10)

    def test_the_size_of_patches_stays(self):
        stem = self.make()
        stem.set_input_size(patch_size=4, patch_stride=4)
        for name in ("patch_size", "patch_stride"):
            with pytest.raises(ValueError, match=f"has {name} 4: it cannot change to 8"):
                stem.set_input_size(**{name: 8})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"patch_size": 12}, "a power of two from 2 on, got 12"),
            ({"patch_size": 1}, "a power of two from 2 on, got 1"),
            ({"patch_size": (4, 8)}, r"a power of two from 2 on, got \(4, 8\)"),
            ({"patch_stride": 2}, "patch_stride must be None or 4, got 2"),
            ({"embed_dim": 5}, "embed_dim must be a multiple of 2, .* got 5"),
            ({"img_size": 18}, "size of 18x18 exactly: resize to 16x16"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            self.make(**options)

    def test_serves_timms_vit(self):
        options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_classes": 5}
        model = timm.create_model(
            "deit_tiny_patch16_224", embed_layer=EMBED_LAYERS["conv"], num_heads=2, **options
        )
        assert isinstance(model.patch_embed, ConvStem)
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
