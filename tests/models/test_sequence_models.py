"""The presets beside Vim: sizes, costs, and everything that timm asks of a model."""

import copy
import io
import math
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import create_feature_extractor, get_graph_node_names
from timm.models import list_models
from torch import nn

import vim
from vim import VisionMamba
from vim.layers import MixtureOfExperts, load_balance_loss

NAMES = list_models(module="sequence_models")
TINY = [name for name in NAMES if "tiny" in name]
RECURRENT = ("gru", "lstm", "rnn")
PAGE = Path(__file__).parents[2] / "docs" / "sequence_models.md"
ROWS = dict(re.findall(r"^\| `(\w+_224)` \| (.*) \|$", PAGE.read_text(), re.M))
every_preset = pytest.mark.parametrize("name", NAMES)
every_kind = pytest.mark.parametrize("name", TINY)
REFERENCE = {"tiny": "vim_tiny_patch16_224", "small": "vim_small_patch16_224"}


def size_of(name):
    return "tiny" if "_tiny_" in name else "small"


def parameters(model):
    """Return the parameters of a model, and those that a token meets."""
    total = sum(p.numel() for p in model.parameters())
    idle = sum(
        p.numel() * (layer.num_experts - layer.top_k) // layer.num_experts
        for layer in model.modules()
        if isinstance(layer, MixtureOfExperts)
        for p in (*layer.fc1.parameters(), *layer.fc2.parameters())
    )
    return total, total - idle


def make(name, **kwargs):
    """Return a small model of the kind whose weights are not the initial ones."""
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_classes": 10}
    model = timm.create_model(name, **(options | kwargs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def images(batch=2, size=(32, 32)):
    return torch.randn(batch, 3, *size)


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_there_are_presets():
    assert len(NAMES) == 24
    assert len(TINY) == 12
    assert not any(name.startswith("vim") for name in NAMES)


@every_preset
def test_presets(name):
    model = timm.create_model(name, device="meta", img_size=32)
    x = torch.empty(1, 3, 32, 32, device="meta")
    assert isinstance(model, VisionMamba)
    assert model(x).shape == (1, 1000)
    assert model.pretrained_cfg["tag"] == "untrained"
    model.reset_classifier(0)
    assert model(x).shape == (1, model.num_features)


@every_preset
def test_as_many_parameters_as_vim(name):
    _, active = parameters(timm.create_model(name, device="meta"))
    vims, _ = parameters(timm.create_model(REFERENCE[size_of(name)], device="meta"))
    assert active == pytest.approx(vims, rel=0.035)


def test_the_table_in_the_docs_is_complete():
    assert sorted(ROWS) == sorted([*NAMES, *REFERENCE.values()])


@pytest.mark.parametrize("name", ROWS)
def test_parameters_in_the_table(name):
    model = timm.create_model(name, device="meta")
    total, active = parameters(model)
    vims, _ = parameters(timm.create_model(REFERENCE[size_of(name)], device="meta"))
    count = f"{total / 1e6:.2f}" + (f" ({active / 1e6:.2f} a token)" if active != total else "")
    assert ROWS[name].split(" | ")[1:-1] == [
        str(len(model.blocks)),
        count,
        f"{active / vims - 1:+.1%}",
    ]


@pytest.mark.parametrize("name", ROWS)
def test_flops_in_the_table(name):
    if name.startswith(RECURRENT):  # taken apart into their steps to be counted: two blocks say all
        one, two = (vim.flops(timm.create_model(name, depth=n, device="meta")) for n in (1, 2))
        depth = len(timm.create_model(name, device="meta").blocks)
        flops = one + (depth - 1) * (two - one)
    else:
        flops = vim.flops(timm.create_model(name, device="meta"))
    assert ROWS[name].split(" | ")[-1] == f"{flops / 1e9:.2f}"


@every_kind
def test_forward_and_backward(name):
    model = make(name).train()
    x = images()
    assert model(x).shape == (2, 10)
    names = [parameter for parameter, _ in model.named_parameters()]
    for parameter, gradient in zip(names, gradients(model, x), strict=True):
        assert gradient.isfinite().all(), parameter


@every_kind
def test_features_pooling_and_classifier_are_forward(name):
    model, x = make(name), images()
    tokens = model.forward_features(x)
    assert tokens.shape == (2, model.num_prefix_tokens + 16, 64)
    assert torch.equal(model.forward_head(tokens), model(x))
    final, features = model.forward_intermediates(x, output_fmt="NLC", norm=True)
    assert torch.equal(final, tokens)
    assert len(features) == 2
    torch.testing.assert_close(features[-1], tokens[:, model.num_prefix_tokens :])
    assert model.forward_intermediates(x, [0], intermediates_only=True)[0].shape == (2, 64, 4, 4)


@every_kind
def test_a_blocks_feature_is_the_stream_that_the_next_block_reads(name):
    model, streams = make(name), []
    for norm in [block.norm for block in model.blocks[1:]] + [model.norm]:
        norm.register_forward_hook(lambda module, args, output: streams.append(output[1]))
    _, features = model.forward_intermediates(images(), return_prefix_tokens=True, output_fmt="NLC")
    for feature, stream in zip(features, streams, strict=True):
        feature = torch.cat(feature[::-1], dim=1) if model.num_prefix_tokens else feature
        assert torch.equal(feature, model.token_order.separate(stream))


@every_kind
def test_checkpointing_changes_nothing(name):
    model, x = make(name).train(), images()
    expected = gradients(model, x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(model, x), expected)


@every_kind
def test_state_dict_and_copies(name):
    model, x = make(name), images()
    model(x)  # what a pass leaves behind is no obstacle
    other = make(name)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@every_kind
def test_another_size(name):
    model = make(name)
    model.set_input_size((40, 24))
    assert model(images(size=(40, 24))).shape == (2, 10)
    assert make(name, dynamic_img_size=True)(images(size=(16, 56))).shape == (2, 10)


@every_kind
def test_initial_weights_are_drawn_anew(name):
    """From the distribution that the constructor draws from."""
    model = timm.create_model(name, depth=2, embed_dim=64, img_size=32)
    before = {k: v.clone() for k, v in model.state_dict().items() if v.numel() > 1000}
    model.init_weights()
    for key, value in before.items():
        assert not torch.equal(model.state_dict()[key], value) or key.endswith(("A_log", "A_imag"))
        torch.testing.assert_close(model.state_dict()[key].std(), value.std(), rtol=0.2, atol=1e-4)


@every_kind
def test_no_weight_decay_for_what_stands_in_exponents(name):
    model = make(name)
    exempt = model.no_weight_decay()
    for key, p in model.named_parameters():
        if p.ndim > 1 and key.rpartition(".")[2] in ("A_log", "A_imag", "D", "dt_bias"):
            assert key in exempt
    groups = model.group_matcher()
    assert timm.models.group_parameters(model, groups)


@every_kind
def test_fx(name):
    model, x = make(name), images()
    traced = create_feature_extractor(model, {get_graph_node_names(model)[1][-1]: "logits"})
    torch.testing.assert_close(traced(x)["logits"], model(x))


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.load(file)


@every_kind
def test_torchscript(name):
    model, x = make(name), images()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    torch.testing.assert_close(saved_and_loaded(model)(x), model(x))
    model.train()
    torch.testing.assert_close(gradients(saved_and_loaded(model), x), gradients(model, x))


# What a pass leaves in the experts' layers is no part of a program, and PyTorch says so.
@pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export")
@every_kind
def test_export_of_any_batch(name):
    model, x = make(name), images(2)
    with torch.no_grad():
        program = torch.export.export(
            model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", max=64)}}
        )
        for batch in (1, 2, 5):
            x = images(batch)
            torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize(
    "mixer", [{"name": "causal_mamba2"}, {"name": "attention", "window_size": 5}], ids=str
)
def test_ways_of_running_mixers_without_a_preset(mixer):
    model, x = make("attention_tiny_patch16_224", mixer=mixer), images()
    expected = model(x)
    torch.testing.assert_close(saved_and_loaded(model)(x), expected)
    traced = create_feature_extractor(model, {get_graph_node_names(model)[1][-1]: "logits"})
    torch.testing.assert_close(traced(x)["logits"], expected)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    with torch.no_grad():
        shapes = {"x": {0: torch.export.Dim("batch", max=64)}}
        program = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    x = images(5)
    torch.testing.assert_close(program(x), model(x))


@pytest.mark.parametrize("kind", ["hybrid", "mamba2", "moe_mamba", "s4d"])
def test_compile(kind):
    torch.compiler.reset()
    name = f"{kind}_tiny_patch16_224"
    model, x = make(name).train(), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(x), gradients(model, x)
    torch.testing.assert_close((compiled(x), gradients(compiled, x)), expected)


@every_kind
def test_bfloat16(name):
    model = make(name).bfloat16()
    y = model(images().bfloat16())
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


@every_kind
def test_flops_by_hand(name):
    """Of the mixers, a product for each weight and what each adds by itself."""
    dim, depth, tokens = 64, 2, 16 + (0 if "gated_conv" in name else 1)
    model = make(name)
    kinds = ("in_proj", "out_proj", "fc1", "fc2", "x_proj", "dt_proj", "router", "rnn")
    weights = 0
    for key, p in model.blocks.named_parameters():
        matrix = p.ndim >= 2 and not key.endswith(".bias")
        if matrix and any(f".{kind}." in key for kind in kinds):
            experts = p.shape[0] if p.ndim == 3 else 1
            share = math.ceil(2 * tokens / experts) * experts if experts > 1 else tokens
            weights += 2 * p.numel() // experts * share
            if "mamba2" in name and ".in_proj." in key:
                weights += 2 * (-p.shape[0] % 8) * p.shape[1] * tokens
    inner, heads = 2 * dim, 2 * dim // 64
    scan = inner * (9 * 16 + 2 * 4) * tokens  # with its convolution
    size = -(-tokens // 8) * 8
    chunk = 2 * size * size * (64 + inner) + 4 * size * 64 * inner + 2 * heads * 4 * 64 * 64
    kernel = 2 * 2 * inner * 25 * 2 * 32  # 17 tokens in 4 rows and 5 columns, cut below
    fft = 2.5 * 40 * math.log2(40) * 3 * inner
    own = {
        "attention": 4 * tokens * tokens * dim,
        "gated_conv": 2 * 7 * inner * (tokens + 3),  # zeros behind the last one
        "gru": 0,
        "hybrid": 4 * tokens * tokens * dim,
        "lstm": 0,
        "mamba": scan,
        "mamba_alternating": scan,
        "mamba2": 2 * (chunk + 2 * 4 * (inner + 128) * tokens),
        "mamba3": 2 * heads * (4 * size * size * 64 + 4 * size * 64 * 64 + 2 * 64 * 64),
        "moe_mamba": 2 * scan,
        "rnn": 0,
        "s4d": kernel * 20 / 25 + fft,
    }[name.split("_tiny")[0]]
    rest = 2 * 16 * 3 * 64 * dim + 2 * dim * 10
    assert vim.flops(model) == pytest.approx(rest + weights + depth * own, rel=1e-6)


def test_flops_of_mixers_without_a_preset():
    """By what they add to attention over all 17 tokens, and to Mamba-2 of both directions."""
    dim, depth, inner, tokens = 64, 2, 128, 17

    def flops(mixer):
        return vim.flops(make("attention_tiny_patch16_224", mixer=mixer, ffn="none"))

    windows = {"name": "attention", "window_size": 5}
    assert flops("attention") - flops(windows) == depth * 4 * dim * (17 * 17 - (3 * 5 * 5 + 2 * 2))
    size = 24  # tokens of the one chunk
    chunk = 2 * size * size * (64 + inner) + 4 * size * 64 * inner + 2 * 2 * 4 * 64 * 64
    # 644 outputs of the input projection, padded to 648, against 514, padded to 520
    one = chunk + 2 * 4 * (inner + 128) * tokens + 2 * dim * (648 - 520) * tokens
    assert flops("mamba2") - flops("causal_mamba2") == depth * one


# Choices of a model


def test_drop_path_stands_behind_mixer_and_feed_forward():
    model = VisionMamba(embed_dim=32, depth=3, ffn="mlp", drop_path_rate=0.4)
    rates = [
        (getattr(b.drop_path, "drop_prob", 0), getattr(b.ffn.drop_path, "drop_prob", 0))
        for b in model.blocks
    ]
    assert rates == [(0, 0), (0, 0.2), (0.2, 0.4)]
    assert model.drop_path.drop_prob == 0.4


def test_the_stream_is_the_sum_of_mixers_and_feed_forwards():
    model = make("attention_tiny_patch16_224").double()
    x = images().double()
    stream = model._embed(x)
    for block in model.blocks:
        for norm, layer in ((block.norm, block.mixer), (block.ffn.norm, block.ffn.layer)):
            normed = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-5)
            stream = stream + layer(normed * norm.weight)
    normed = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-5)
    expected = model.token_order.separate(normed * model.norm.weight)
    torch.testing.assert_close(model.forward_features(x), expected)


def test_a_mixer_of_ones_own():
    class Mean(nn.Module):
        def __init__(self, dim, device=None, dtype=None):
            super().__init__()

        def forward(self, x):
            return x.mean(1, keepdim=True).expand_as(x)

    model = VisionMamba(embed_dim=32, depth=2, mixer=["bimamba", Mean], ffn=["none", "swiglu"])
    assert isinstance(model.blocks[1].mixer, Mean)
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


def test_options_of_another_mixer():
    with pytest.raises(ValueError, match="d_state of the model go to 'bimamba' alone"):
        VisionMamba(embed_dim=32, depth=2, mixer="s4d", d_state=8)


def test_load_balance_loss_of_a_model():
    model = make("moe_mamba_tiny_patch16_224").train()
    x = images()
    model(x)
    loss = load_balance_loss(model)
    torch.testing.assert_close(loss, sum(b.ffn.layer.aux_loss for b in model.blocks))
    loss.backward()
    assert model.blocks[0].ffn.layer.router.weight.grad.abs().sum() > 0
    assert load_balance_loss(make("mamba_tiny_patch16_224")) == 0
