"""What the integrations share: a classifier's checkpoint in the authors' layout."""

from types import SimpleNamespace

import pytest
import timm
import torch

from vim.models import save_checkpoint, to_official


@pytest.fixture
def authors_checkpoint(tmp_path):
    """Return a function: options of a Vim -> its checkpoint, and a comparison with its features.

    `matches(backbone, x)` asserts that the maps of a `VisionMambaMaps` are the classifier's.
    """

    def make(**options):
        source = timm.create_model("vim_tiny_patch16_224_pyramid", **options).eval()
        with torch.no_grad():
            for parameter in source.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        path = tmp_path / "vim_t_midclstok_76p1acc.pth"
        save_checkpoint(to_official(source.state_dict()), path)

        def matches(backbone, x):
            if not backbone.model.has_class_token:
                source.drop_class_tokens()
            wanted = source.forward_intermediates(
                x, sorted(set(backbone.block_indices)), norm=backbone.norm, intermediates_only=True
            )
            for actual, expected in zip(backbone.eval().maps(x), wanted, strict=True):
                torch.testing.assert_close(actual, expected)

        return SimpleNamespace(path=path, matches=matches)

    return make
