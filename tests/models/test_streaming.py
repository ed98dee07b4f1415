"""What a model returns beside tokens: hidden states, caches; and reading a stream in chunks."""

import pytest
import timm
import torch

from vim import VisionMamba
from vim.models import MambaCache, VisionMambaOutput

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_classes": 10}
MAMBA2 = {"name": "causal_mamba2", "head_dim": 16, "d_state": 8, "chunk_size": 8}
NONE = {"class_token": False, "global_pool": "avg"}
STREAMING = {
    "mamba": {"mixer": "mamba", **NONE},
    "causal_mamba2": {"mixer": MAMBA2, **NONE},
    "both": {"mixer": ["mamba", MAMBA2], "norm_layer": "layer", **NONE},
    "last": {"mixer": "mamba", "cls_token_position": "last"},
    "no_embed_class": {"mixer": MAMBA2, "cls_token_position": "last", "no_embed_class": True},
    "no_pos_embed": {"mixer": "mamba", "cls_token_position": "last", "pos_embed": "none"},
    "mlp": {"mixer": "mamba", "ffn": "mlp", **NONE},
    "moe": {
        "mixer": "mamba",
        "ffn": {"name": "moe", "num_experts": 4, "eval_capacity_factor": 4.0},
        **NONE,
    },
    "overlap": {"mixer": "mamba", "patch_stride": 4, "pos_embed": "none", **NONE},
}
streaming = pytest.mark.parametrize("variant", STREAMING)


def make(**kwargs):
    """Return a small float64 model whose weights are not the initial ones."""
    model = VisionMamba(**(SMALL | kwargs)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def images(*size, batch=2):
    return torch.randn(batch, 3, *(size or (32, 32)), dtype=torch.float64)


def patches_of(model, x):
    """Return the pixels of each patch of the images, in the order of the scan."""
    (height, width), (down, right) = model.patch_embed.patch_size, model.patch_embed.patch_stride
    return [
        x[:, :, top : top + height, left : left + width]
        for top in range(0, x.shape[2] - height + 1, down)
        for left in range(0, x.shape[3] - width + 1, right)
    ]


def read(model, chunks, cache=None):
    """Return the tokens of all chunks, and the last cache."""
    parts = []
    for chunk in chunks:
        tokens, cache = model.scan(chunk, cache)
        parts.append(tokens)
    return torch.cat(parts, dim=1), cache


def with_class_token(model, tokens, cache):
    """Return the tokens as forward_features gives them."""
    if model.num_prefix_tokens == 0:
        return tokens
    return torch.cat([model.read_class_token(cache), tokens], dim=1)


def states(cache):
    return [*cache.conv_states, *cache.ssm_states]


# Outputs


@pytest.mark.parametrize("ffn", ["none", "mlp"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "drop_path_in_training"])
def test_hidden_states(ffn, training):
    """They are what the blocks read, and the normed output."""
    model = make(depth=3, ffn=ffn, drop_path_rate=0.5, reg_tokens=2).train(training)
    x, found = images(batch=8), []
    for block in model.blocks:
        block.norm.register_forward_hook(lambda module, args, output: found.append(output[1]))
    output = model.forward_outputs(x, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    for hidden, stream in zip(output.hidden_states, found, strict=False):
        assert torch.equal(hidden, model.token_order.separate(stream))
    assert output.hidden_states[-1] is output.last_hidden_state
    assert torch.equal(output.hidden_states[0], model.token_order.separate(model._embed(x)))
    if not training:
        assert torch.equal(output.last_hidden_state, model.forward_features(x))
        _, features = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True)
        for stream, (patches, prefix) in zip(output.hidden_states[1:3], features[:2], strict=True):
            assert torch.equal(stream, torch.cat([prefix, patches], dim=1))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_of_hidden_states_and_caches(checkpointing):
    model, x = make(mixer="mamba", **NONE).train(), images().requires_grad_()
    model.set_grad_checkpointing(checkpointing)
    output = model.forward_outputs(x, output_hidden_states=True, use_cache=True)
    for value in (*output.hidden_states, *states(output.cache_params)):
        (gradient,) = torch.autograd.grad(value.square().sum(), x, retain_graph=True)
        assert gradient.isfinite().all()
        assert (gradient != 0).any()


def test_outputs_by_attribute_key_and_index():
    model = make(mixer="mamba", **NONE)
    x = images()
    output = model.forward_outputs(x)
    assert isinstance(output, VisionMambaOutput)
    assert output.hidden_states is output.cache_params is None
    assert list(output) == output.keys() == ["last_hidden_state"]
    assert output["last_hidden_state"] is output[0] is output.last_hidden_state
    with pytest.raises(KeyError, match="'hidden_states' is not among last_hidden_state"):
        output["hidden_states"]
    output = model.forward_outputs(x, use_cache=True)
    assert len(output) == 2
    assert output.to_tuple() == output[:2] == tuple(dict(output).values())
    assert output[1] is output["cache_params"]


@streaming
def test_the_cache_holds_the_states_after_the_scan(variant):
    """By what each mixer itself says of the tokens that it has read."""
    model, x = make(**STREAMING[variant]), images()
    tokens = {}
    for i, block in enumerate(model.blocks):
        block.norm.register_forward_hook(
            lambda module, args, output, i=i: tokens.__setitem__(i, output[0])
        )
    output = model.forward_outputs(x, use_cache=True)
    cache = output.cache_params
    torch.testing.assert_close(output.last_hidden_state, model.forward_features(x))
    for i, block in enumerate(model.blocks):
        _, expected = block.mixer.scan(tokens[i])
        torch.testing.assert_close((cache.conv_states[i], cache.ssm_states[i]), expected)


def test_caches_of_models_that_cannot_stream():
    model, x = make(mixer=["bimamba", {"name": "mamba", "reverse": True}]), images()
    cache = model.forward_outputs(x, use_cache=True).cache_params
    assert cache.conv_states[0] is cache.ssm_states[0] is None
    assert cache.conv_states[1].shape == (2, 3, 64)
    assert cache.ssm_states[1].shape == (2, 64, 16)
    with pytest.raises(ValueError, match="this cache is to be looked at alone"):
        model.scan(x, cache)
    last = make(mixer="mamba", cls_token_position="last")
    cache = last.forward_outputs(x, use_cache=True).cache_params
    with pytest.raises(ValueError, match="it has read more than patches"):
        last.scan(x, cache)
    with pytest.raises(ValueError, match="BidirectionalMamba, gives for a token what depends on"):
        make().forward_outputs(x, use_cache=True)


# Streams


@streaming
def test_token_by_token_equals_the_whole(variant):
    model, x = make(**STREAMING[variant]), images()
    cache, parts = None, []
    for patch in patches_of(model, x):
        token, cache = model.step(patch, cache)
        parts.append(token)
    assert cache.patches == len(parts) == model.patch_embed.num_patches
    tokens = with_class_token(model, torch.stack(parts, dim=1), cache)
    torch.testing.assert_close(tokens, model.forward_features(x))
    torch.testing.assert_close(model.forward_head(tokens), model(x))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("variant", [v for v in STREAMING if v != "overlap"])
def test_bands_equal_the_whole_and_pass_gradients(variant, checkpointing):
    model, x = make(**STREAMING[variant]), images().requires_grad_()
    wanted = [x, *(p for n, p in model.named_parameters() if not n.startswith("head."))]
    expected = model.forward_features(x)
    model.set_grad_checkpointing(checkpointing)
    tokens, cache = read(model, x.split([8, 16, 8], dim=2))
    tokens = with_class_token(model, tokens, cache)
    torch.testing.assert_close(tokens, expected)
    weights = torch.randn_like(tokens)
    torch.testing.assert_close(
        torch.autograd.grad((tokens * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted),
    )


def test_a_gradient_passes_by_the_cache_alone_until_it_is_detached():
    model, x = make(mixer=["mamba", MAMBA2], **NONE), images()
    first = x.clone().requires_grad_()
    _, cache = model.scan(first)
    (gradient,) = torch.autograd.grad(model.scan(x, cache)[0].square().sum(), first)
    assert (gradient != 0).any(-1).all()
    cut = model.scan(first)[1].detach()
    assert not any(state.requires_grad for state in states(cut))
    assert cut.patches == cache.patches
    torch.testing.assert_close(model.scan(x, cut)[0], model.scan(x, cache)[0])


@pytest.mark.parametrize("height", [8, 32])
def test_a_strip_of_any_length_needs_a_cache_of_one_size(height):
    """A strip of one row is the whole sequence; of more rows it is read chunk by chunk."""
    options = {**STREAMING["no_pos_embed"], "mixer": ["mamba", MAMBA2]}
    model = make(dynamic_img_size=True, **options)
    strip = images(height, 8 * 15)
    tokens, cache = read(model, strip.split([8, 40, 72], dim=3))
    _, short = read(model, [strip[..., :8]])
    assert [s.shape for s in states(cache)] == [s.shape for s in states(short)]
    assert cache.patches == height // 8 * 15
    sequence = [
        patch for chunk in strip.split([8, 40, 72], 3) for patch in patches_of(model, chunk)
    ]
    row = torch.cat(sequence, dim=3)  # the same patches, as one row
    whole = with_class_token(model, tokens, cache)
    torch.testing.assert_close(whole, model.forward_features(row))
    torch.testing.assert_close(model.forward_head(whole), model(row))


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_mambas_presets_read_streams(size):
    name, options = f"mamba_{size}_patch16_224", {"img_size": 64, "depth": 2, "num_classes": 3}
    model, x = timm.create_model(name, **options).eval(), images(64, 64).float()
    tokens, cache = read(model, x.split(16, dim=2))
    logits = model.forward_head(with_class_token(model, tokens, cache))
    torch.testing.assert_close(logits, model(x))


def test_frames_share_their_positions():
    """The position embedding of a video starts again with each frame."""
    model = make(mixer="mamba", **NONE)
    frames = images(batch=3)
    tokens, cache = read(model, [frame[None] for frame in frames])
    assert cache.patches == 3 * 16
    plain = make(mixer="mamba", pos_embed="none", **NONE)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "pos_embed"})
    x = (plain.patch_embed(frames) + model.pos_embed).flatten(0, 1)[None]
    residual = None
    for block in plain.blocks:
        x, residual, _ = block(x, residual)
    torch.testing.assert_close(tokens, plain.norm(x, residual)[0])


def test_reading_the_class_token_leaves_the_stream_alone():
    model, x = make(mixer="mamba", cls_token_position="last"), images()
    _, cache = model.scan(x[:, :, :8])
    before = [state.clone() for state in states(cache)]
    early = model.read_class_token(cache)
    assert all(torch.equal(*pair) for pair in zip(states(cache), before, strict=True))
    rest, cache = model.scan(x[:, :, 8:], cache)
    assert not torch.allclose(early, model.read_class_token(cache))
    torch.testing.assert_close(rest, model.forward_features(x)[:, 5:])


def test_a_stream_goes_on_from_the_outputs_of_an_image():
    model, x = make(mixer="mamba", **NONE), images(64, 32)
    output = model.forward_outputs(x[:, :, :32], use_cache=True)
    tokens, _ = model.scan(x[:, :, 32:], output.cache_params)
    torch.testing.assert_close(tokens, read(model, [x])[0][:, 16:])


def test_later_patches_change_nothing():
    model, x = make(mixer=["mamba", MAMBA2], **NONE), images()
    other = x.clone()
    other[:, :, 16:] += 1
    first, second = model.scan(x)[0], model.scan(other)[0]
    assert torch.equal(first[:, :8], second[:, :8])
    assert (first[:, 8:] != second[:, 8:]).any(-1).all()


def test_whole_images_through_a_convolutional_stem():
    model = make(mixer="mamba", embed_layer="conv", **NONE)
    x = images()
    torch.testing.assert_close(model.scan(x)[0], model.forward_features(x))
    with pytest.raises(ValueError, match="give whole images of 32x32, got"):
        model.scan(x[:, :, :16])


def test_bfloat16():
    model = make(mixer=["mamba", MAMBA2], cls_token_position="last").bfloat16()
    x = images().bfloat16()
    tokens, cache = read(model, x.split(8, dim=2))
    assert tokens.dtype == model.read_class_token(cache).dtype == torch.bfloat16
    assert {s.dtype for s in cache.ssm_states} == {torch.float32}
    whole = model.forward_features(x)[:, 1:].float()
    assert (tokens.float() - whole).norm() / whole.norm() < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "block 0, BidirectionalMamba, gives for a token what depends on tokens still to come"),
        ({"mixer": ["mamba", "attention"]}, "the mixer of block 1, Attention, gives for a token"),
        (
            {"mixer": ["mamba", {"name": "mamba", "reverse": True}], **NONE},
            "the mixer of block 1, Mamba, reads from the last token",
        ),
        ({"mixer": "mamba"}, "1 class token.s. at 'middle' and 0 register.s. stand depends on"),
        ({"mixer": "mamba", "cls_token_position": "both_ends"}, "a class token may be 'last' or"),
        ({"mixer": "mamba", "reg_tokens": 2, **NONE}, "2 register.s. stand depends on how many"),
        ({"mixer": "mamba", "ffn": "moe", **NONE}, "num_experts / top_k = 8 at least"),
    ],
    ids=["both", "attention", "reverse", "middle", "both_ends", "registers", "moe"],
)
def test_models_that_cannot_stream(options, message):
    model = make(**({"embed_dim": 64} | options))
    for way in (lambda: model.scan(images()), lambda: model.step(images(8, 8))):
        with pytest.raises(ValueError, match=f"cannot read a stream: .*{message}"):
            way()


def test_chunks_that_do_not_fit():
    model = make(mixer="mamba", **NONE)
    with pytest.raises(ValueError, match="a chunk of 2x2 patches has no places in a position"):
        model.scan(images(16, 16))
    assert model.scan(images(8, 16))[0].shape == (2, 2, 32)
    with pytest.raises(ValueError, match="do not cover an image size of 12x32 exactly"):
        model.scan(images(12, 32))
    with pytest.raises(ValueError, match="a step takes one patch of 8x8 pixels, got"):
        model.step(images(8, 16))
    with pytest.raises(ValueError, match="there is no class token to read: pool the patches"):
        model.read_class_token(model.scan(images())[1])
    _, cache = model.scan(images())
    with pytest.raises(ValueError, match="the cache is of a model of 1 blocks, this one has 2"):
        model.scan(images(), MambaCache(cache.conv_states[:1], cache.ssm_states[:1], cache.patches))
