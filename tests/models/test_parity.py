"""Our model against the authors' model, written down here once more in plain float64.

`authors_logits` is made from the paper and the layout of the authors' files alone, and shares no
code with `vim`. The published files hold their names, so weights go to our model in that layout.
"""

import argparse
import logging
import math

import pytest
import timm
import torch
import torch.nn.functional as F

import vim

logger = logging.getLogger(__name__)

SIZES = {"tiny": 192, "small": 384, "base": 768}
D_STATE, D_CONV = 16, 4
EPS = 1e-5

# In float32, as the published logits are; in float64, both models err in the last digits only.
FLOAT32_LIMIT = 1e-4
FLOAT64_LIMIT = 1e-12


def authors_weights(
    embed_dim=32,
    depth=3,
    grid=(4, 4),
    patch_size=8,
    num_classes=10,
    cls_token="middle",
    pos_embed=True,
    norm="rms",
    seed=0,
):
    """Return random weights in the layout of the authors' files, at the scale of trained ones."""
    generator = torch.Generator().manual_seed(seed)
    d_inner, rank = 2 * embed_dim, math.ceil(embed_dim / 16)
    count = {"none": 0, "both_ends": 2}.get(cls_token, 1)

    def normal(*shape, std=1.0, mean=0.0):
        return mean + std * torch.randn(shape, generator=generator)

    def uniform(*shape, low, high):
        return low + (high - low) * torch.rand(shape, generator=generator)

    pixels = 3 * patch_size**2
    weights = {
        "patch_embed.proj.weight": normal(embed_dim, 3, patch_size, patch_size, std=pixels**-0.5),
        "patch_embed.proj.bias": normal(embed_dim, std=0.1),
    }
    for name in {"none": (), "both_ends": ("cls_token_head", "cls_token_tail")}.get(
        cls_token, ("cls_token",)
    ):
        weights[name] = normal(1, 1, embed_dim, std=0.3)
    if pos_embed:
        weights["pos_embed"] = normal(1, grid[0] * grid[1] + count, embed_dim, std=0.3)
    norms = [f"layers.{i}.norm" for i in range(depth)] + ["norm_f"]
    for name in norms:
        weights[f"{name}.weight"] = uniform(embed_dim, low=0.3, high=1.7)
        if norm == "layer":
            weights[f"{name}.bias"] = normal(embed_dim, std=0.3)
    for i in range(depth):
        mixer = f"layers.{i}.mixer."
        weights[f"{mixer}in_proj.weight"] = normal(2 * d_inner, embed_dim, std=embed_dim**-0.5)
        weights[f"{mixer}out_proj.weight"] = normal(embed_dim, d_inner, std=d_inner**-0.5)
        for b in ("", "_b"):
            steps = torch.exp(uniform(d_inner, low=math.log(1e-3), high=math.log(1e-1)))
            weights |= {
                f"{mixer}A{b}_log": torch.arange(1, D_STATE + 1).log()
                + normal(d_inner, D_STATE, std=0.5),
                f"{mixer}D{b}": normal(d_inner, std=0.5, mean=1.0),
                f"{mixer}conv1d{b}.weight": normal(d_inner, 1, D_CONV, std=0.5),
                f"{mixer}conv1d{b}.bias": normal(d_inner, std=0.3),
                f"{mixer}x_proj{b}.weight": normal(
                    rank + 2 * D_STATE, d_inner, std=2 * d_inner**-0.5
                ),
                f"{mixer}dt_proj{b}.weight": normal(d_inner, rank, std=rank**-0.5),
                f"{mixer}dt_proj{b}.bias": torch.log(torch.expm1(steps)),
            }
    weights["head.weight"] = normal(num_classes, embed_dim, std=embed_dim**-0.5)
    weights["head.bias"] = normal(num_classes, std=0.1)
    return weights


def authors_logits(weights, images, stride, cls_token="middle", merge="mean"):
    """Return the authors' model of `weights`, applied to (B, 3, H, W) `images`, in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    depth = len({name.split(".")[1] for name in w if name.startswith("layers.")})

    kernel = w["patch_embed.proj.weight"]
    side = kernel.shape[-1]
    patches = images.double().unfold(2, side, stride).unfold(3, side, stride)
    x = torch.einsum("bchwij,dcij->bhwd", patches, kernel).flatten(1, 2)
    x = x + w["patch_embed.proj.bias"]

    middle = x.shape[1] // 2
    if cls_token == "middle":
        x = torch.cat([x[:, :middle], _each(w["cls_token"], x), x[:, middle:]], dim=1)
    elif cls_token == "first":
        x = torch.cat([_each(w["cls_token"], x), x], dim=1)
    elif cls_token == "last":
        x = torch.cat([x, _each(w["cls_token"], x)], dim=1)
    elif cls_token == "both_ends":
        head, tail = _each(w["cls_token_head"], x), _each(w["cls_token_tail"], x)
        x = torch.cat([head, x, tail], dim=1)
    if "pos_embed" in w:
        x = x + w["pos_embed"]

    hidden, residual = x, torch.zeros_like(x)
    for i in range(depth):
        residual = residual + hidden
        hidden = _norm(w, f"layers.{i}.norm", residual)
        hidden = _mixer(w, f"layers.{i}.mixer.", hidden, merge)
    x = _norm(w, "norm_f", residual + hidden)

    if cls_token == "middle":
        x = x[:, middle]
    elif cls_token == "first":
        x = x[:, 0]
    elif cls_token == "last":
        x = x[:, -1]
    elif cls_token == "both_ends":
        x = (x[:, 0] + x[:, -1]) / 2
    else:
        x = x.mean(dim=1)
    return x @ w["head.weight"].T + w["head.bias"]


def _each(token, x):
    return token.expand(x.shape[0], -1, -1)


def _norm(w, name, x):
    if f"{name}.bias" in w:
        x = x - x.mean(dim=-1, keepdim=True)
    x = x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + EPS) * w[f"{name}.weight"]
    return x + w.get(f"{name}.bias", 0)


def _mixer(w, name, hidden, merge):
    x, z = (hidden @ w[f"{name}in_proj.weight"].T).chunk(2, dim=-1)
    y = _direction(w, name, "", x, z)
    y = y + _direction(w, name, "_b", x.flip(1), z.flip(1)).flip(1)
    if merge == "mean":
        y = y / 2
    return y @ w[f"{name}out_proj.weight"].T


def _direction(w, name, b, x, z):
    length = x.shape[1]
    taps = w[f"{name}conv1d{b}.weight"]
    padded = F.pad(x, (0, 0, D_CONV - 1, 0))
    u = w[f"{name}conv1d{b}.bias"]
    for k in range(D_CONV):
        u = u + taps[:, 0, k] * padded[:, k : k + length]
    u = _silu(u)

    rank = w[f"{name}dt_proj{b}.weight"].shape[1]
    dt, B, C = (u @ w[f"{name}x_proj{b}.weight"].T).split([rank, D_STATE, D_STATE], dim=-1)
    dt = dt @ w[f"{name}dt_proj{b}.weight"].T + w[f"{name}dt_proj{b}.bias"]
    delta = torch.logaddexp(dt, torch.zeros_like(dt))  # softplus
    A = -torch.exp(w[f"{name}A{b}_log"])

    h = x.new_zeros(x.shape[0], x.shape[2], D_STATE)
    y = torch.empty_like(x)
    for t in range(length):
        decay = torch.exp(delta[:, t, :, None] * A)
        h = decay * h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        y[:, t] = (h @ C[:, t, :, None]).squeeze(-1)
    y = y + w[f"{name}D{b}"] * u
    return y * _silu(z)


def _silu(x):
    return x / (1 + torch.exp(-x))


def relative_error(actual, truth):
    return ((actual.double() - truth).norm() / truth.norm()).item()


def load_state_dict(model, weights, tmp_path):
    model.load_state_dict(weights)


def load_file(model, weights, tmp_path):
    vim.load_checkpoint(model, training_file(weights, tmp_path))


def load_averaged(model, weights, tmp_path):
    vim.load_checkpoint(model, training_file(weights, tmp_path, "model_ema"), use_ema=True)


def load_as_backbone(model, weights, tmp_path):
    holder = torch.nn.ModuleDict({"backbone": model})
    holder.load_state_dict({f"backbone.{name}": tensor for name, tensor in weights.items()})


def training_file(weights, tmp_path, name="model"):
    """Write what the authors' training script does, `weights` under `name`, and return its path."""
    others = {key: torch.zeros_like(tensor) for key, tensor in weights.items()}
    content = {
        "model": others,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]},
        "lr_scheduler": {"t_initial": 300},
        "epoch": 299,
        "model_ema": others,
        "scaler": "none",
        "args": argparse.Namespace(model="vim_tiny", lr=1e-3, output_dir=""),
    }
    torch.save(content | {name: weights}, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


class TestPublishedSizes:
    """224 px in float32, the error that users of published weights would see."""

    def check(self, model, weights):
        images = torch.randn(1, 3, 224, 224)
        truth = authors_logits(weights, images, stride=model.patch_embed.patch_stride[0])
        with torch.no_grad():
            error = relative_error(model(images), truth)
        logger.info(
            "dim %d, %d blocks: relative error %.2e", model.embed_dim, len(model.blocks), error
        )
        assert truth.std() > 0.1
        assert error < FLOAT32_LIMIT

    @pytest.mark.parametrize(
        ("size", "load"),
        [
            ("tiny", load_file),
            ("small", load_state_dict),
            pytest.param("base", load_state_dict, marks=pytest.mark.slow),
        ],
    )
    def test_patch16(self, size, load, tmp_path):
        model = timm.create_model(f"vim_{size}_patch16_224").eval()
        weights = authors_weights(SIZES[size], 24, (14, 14), 16, 1000)
        assert len(weights) == 415
        load(model, weights, tmp_path)
        self.check(model, weights)

    def test_stride8_730_tokens(self):
        model = timm.create_model("vim_tiny_patch16_stride8_224", depth=2).eval()
        weights = authors_weights(SIZES["tiny"], 2, (27, 27), 16, 1000)
        model.load_state_dict(weights)
        self.check(model, weights)


def small_model(grid=(4, 4), patch_size=8, stride=8, **kwargs):
    height, width = (patch_size + (side - 1) * stride for side in grid)
    model = vim.VisionMamba(
        img_size=(height, width),
        patch_size=patch_size,
        patch_stride=stride,
        embed_dim=32,
        depth=3,
        num_classes=10,
        **kwargs,
    )
    return model.double().eval()


def small_error(model, weights, **options):
    """Return the relative error of a small float64 model that holds `weights`."""
    images = torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64)
    truth = authors_logits(weights, images, model.patch_embed.patch_stride[0], **options)
    with torch.no_grad():
        return relative_error(model(images), truth)


@pytest.mark.parametrize("load", [load_state_dict, load_file, load_averaged, load_as_backbone])
def test_ways_of_loading(load, tmp_path):
    model, weights = small_model(), authors_weights()
    load(model, weights, tmp_path)
    assert small_error(model, weights) < FLOAT64_LIMIT


@pytest.mark.parametrize(
    ("grid", "patch_size", "stride"),
    [
        ((4, 4), 8, 8),
        ((3, 3), 8, 8),
        ((2, 5), 8, 8),
        ((5, 2), 8, 8),
        ((2, 8), 8, 8),
        ((7, 7), 8, 4),
        ((3, 6), 8, 4),
        ((1, 1), 8, 8),
        ((1, 2), 8, 8),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_grids(grid, patch_size, stride):
    model, weights = small_model(grid, patch_size, stride), authors_weights(grid=grid)
    model.load_state_dict(weights)
    assert small_error(model, weights) < FLOAT64_LIMIT


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)], ids=["even", "odd"])
@pytest.mark.parametrize("position", ["none", "first", "middle", "last", "both_ends"])
def test_class_token(position, grid):
    pool = "avg" if position == "none" else "token"
    model = small_model(grid, cls_token_position=position, global_pool=pool)
    weights = authors_weights(grid=grid, cls_token=position)
    model.load_state_dict(weights)
    assert small_error(model, weights, cls_token=position) < FLOAT64_LIMIT


def test_sum_of_directions():
    model, weights = small_model(merge="sum"), authors_weights()
    model.load_state_dict(weights)
    assert small_error(model, weights, merge="sum") < FLOAT64_LIMIT


def test_layer_norm():
    model, weights = small_model(norm_layer="layer"), authors_weights(norm="layer")
    model.load_state_dict(weights)
    assert small_error(model, weights) < FLOAT64_LIMIT


def test_no_position_embedding():
    model, weights = small_model(pos_embed="none"), authors_weights(pos_embed=False)
    model.load_state_dict(weights)
    assert small_error(model, weights) < FLOAT64_LIMIT


def test_another_grid_keeps_the_class_token_out_of_the_resampling():
    """Patches whose embeddings are alike stay so on any grid, and the class token keeps its own."""
    weights = authors_weights(grid=(4, 4))
    patch, cls = torch.randn(2, 1, 1, 32)
    weights["pos_embed"] = torch.cat([patch.expand(1, 8, 32), cls, patch.expand(1, 8, 32)], dim=1)
    model = small_model((5, 6))
    model.load_state_dict(weights)
    weights["pos_embed"] = torch.cat([patch.expand(1, 15, 32), cls, patch.expand(1, 15, 32)], 1)
    assert small_error(model, weights) < 1e-6  # timm resamples in float32


@pytest.mark.parametrize("name", sorted(authors_weights(depth=1)))
def test_parity_depends_on_every_weight(name):
    """A weight that goes to the wrong place, or nowhere, would show."""
    model, weights = small_model(), authors_weights()
    model.load_state_dict(weights)
    changed = weights | {name: weights[name] * 1.01}
    assert small_error(model, changed) > 100 * FLOAT64_LIMIT
