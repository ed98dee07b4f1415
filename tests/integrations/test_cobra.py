"""transformers: visual tokens through a projector into MambaForCausalLM, as in Cobra."""

import pytest
import timm
import torch
import torch.nn.functional as F

from vim import VisionMamba
from vim.layers import PROJECTORS, LDPProjector, build_projector
from vim.models import visual_maps, visual_tokens

transformers = pytest.importorskip("transformers", reason="optional: pip install transformers")

VOCABULARY, WIDTH = 50, 24
every_projector = pytest.mark.parametrize("name", PROJECTORS)


def language_model():
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        state_size=4,
        num_hidden_layers=2,
        bos_token_id=None,
        eos_token_id=None,  # nothing ends a text before its time
        pad_token_id=0,
    )
    return transformers.MambaForCausalLM(config).eval()


def backbones():
    """Return two frozen ones: Vim, and a ViT of another width."""
    vim = VisionMamba(img_size=112, patch_size=8, embed_dim=16, depth=3)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=112, patch_size=8, embed_dim=12, depth=3, num_heads=2
    )
    return [model.eval().requires_grad_(False) for model in (vim, vit)]


def example(batch=2, words=6):
    """Return images' tokens of the fused backbones, and the ids of a text."""
    tokens = visual_tokens(backbones(), torch.randn(batch, 3, 112, 112))
    assert tokens.shape == (batch, 196, 16 + 12)
    return tokens, torch.randint(1, VOCABULARY, (batch, words))


def joined(llm, visual, text):
    return torch.cat([visual, llm.get_input_embeddings()(text)], dim=1)


@every_projector
def test_loss_and_gradients_through_the_projector(name):
    """The loss is that of the text alone, and it reaches every weight but the backbones'."""
    llm = language_model().train()
    projector = build_projector(name, 16 + 12, WIDTH)
    tokens, text = example()
    assert not tokens.requires_grad
    visual = projector(tokens)
    ignored = torch.full(visual.shape[:2], -100)
    output = llm(inputs_embeds=joined(llm, visual, text), labels=torch.cat([ignored, text], dim=1))
    said = output.logits[:, visual.shape[1] - 1 : -1]
    expected = F.cross_entropy(said.reshape(-1, VOCABULARY), text.flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    for module in (projector, llm):
        for parameter_name, parameter in module.named_parameters():
            assert parameter.grad.isfinite().all(), parameter_name
            assert parameter.grad.abs().sum() > 0, parameter_name


def test_gradients_reach_a_backbone_that_is_not_frozen():
    llm, projector = language_model(), build_projector("gelu-mlp", 16, WIDTH)
    backbone = VisionMamba(img_size=32, patch_size=8, embed_dim=16, depth=3)
    text = torch.randint(1, VOCABULARY, (1, 4))
    visual = projector(visual_tokens(backbone, torch.randn(1, 3, 32, 32)))
    labels = torch.cat([torch.full((1, 16), -100), text], dim=1)
    llm(inputs_embeds=joined(llm, visual, text), labels=labels).loss.backward()
    for parameter_name, parameter in backbone.named_parameters():
        behind = parameter_name.startswith(("blocks.2.", "norm.", "head."))
        reached = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert reached != behind, parameter_name


def test_a_projector_learns_to_name_images():
    """Alone, the language model frozen: Cobra's first stage, on two images and two words."""
    llm = language_model().requires_grad_(False)
    projector = build_projector("gelu-mlp", 16, WIDTH)
    backbone = VisionMamba(img_size=16, patch_size=8, embed_dim=16, depth=3).eval()
    with torch.no_grad():
        tokens = visual_tokens(backbone, 3 * torch.randn(2, 3, 16, 16))
    text = torch.tensor([[7], [31]])
    labels = torch.cat([torch.full((2, 4), -100), text], dim=1)
    optimizer = torch.optim.Adam(projector.parameters(), lr=1e-2)
    assert not torch.equal(llm.generate(inputs_embeds=projector(tokens), max_new_tokens=1), text)
    for _ in range(60):
        loss = llm(inputs_embeds=joined(llm, projector(tokens), text), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(llm.generate(inputs_embeds=projector(tokens), max_new_tokens=1), text)


@torch.no_grad()
@every_projector
def test_stepping_behind_an_image_equals_the_full_forward(name):
    """The image is read once, in the prefill; then one word at a time, by the states alone."""
    llm, projector = language_model(), build_projector(name, 16 + 12, WIDTH)
    tokens, text = example()
    visual = projector(tokens)
    full = llm(inputs_embeds=joined(llm, visual, text), use_cache=False).logits
    output = llm(inputs_embeds=visual, use_cache=True)
    steps = [output.logits[:, -1]]
    for word in text.split(1, dim=1):
        output = llm(input_ids=word, cache_params=output.cache_params, use_cache=True)
        assert output.logits.shape[1] == 1
        steps.append(output.logits[:, 0])
    torch.testing.assert_close(torch.stack(steps, dim=1), full[:, visual.shape[1] - 1 :])


@torch.no_grad()
def test_generation_reads_the_image_once_and_equals_generation_without_cache():
    llm, projector = language_model(), build_projector("fused-gelu-mlp", 16 + 12, WIDTH)
    tokens, text = example()
    embeddings = joined(llm, projector(tokens), text)
    lengths = []
    llm.backbone.register_forward_hook(
        lambda _, __, output: lengths.append(output.last_hidden_state.shape[1])
    )
    written = llm.generate(inputs_embeds=embeddings, max_new_tokens=8, do_sample=False)
    assert written.shape == (2, 8)
    assert lengths == [196 + 6, *[1] * 7]

    by_hand = torch.empty(2, 0, dtype=torch.long)
    for _ in range(8):
        logits = llm(inputs_embeds=joined(llm, embeddings, by_hand), use_cache=False).logits
        by_hand = torch.cat([by_hand, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, by_hand)


@torch.no_grad()
def test_what_is_said_depends_on_the_image():
    llm, projector = language_model(), build_projector("fused-gelu-mlp", 16 + 12, WIDTH)
    tokens, text = example()
    text = text[:1].expand(2, -1)
    logits = llm(inputs_embeds=joined(llm, projector(tokens), text)).logits[:, -1]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@torch.no_grad()
def test_an_image_that_is_not_square():
    llm = language_model()
    backbone = VisionMamba(
        img_size=64, embed_dim=16, depth=3, dynamic_img_size=True, dynamic_img_pad=True
    ).eval()
    projector = LDPProjector(16, WIDTH, (WIDTH,), out_grid=(2, 3))
    maps = visual_maps(backbone, torch.randn(1, 3, 60, 130))
    visual = projector(maps.flatten(2).transpose(1, 2), maps.shape[2:])
    assert visual.shape == (1, 6, WIDTH)
    assert llm.generate(inputs_embeds=visual, max_new_tokens=3).shape == (1, 3)
