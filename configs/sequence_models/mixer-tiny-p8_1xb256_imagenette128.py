"""Any sequence model of Vim-Ti's size from scratch on Imagenette at 128 px, all by one recipe.

`--cfg-options model.backbone.name=lstm_tiny_patch16_224` chooses the model; the names are those of
docs/sequence_models.md. All have Vim-micro's convolutional stem, 256 tokens and the mean of the
patches, so that they differ by their blocks alone.
"""

_base_ = ["../vim/vim-micro-p8_1xb256_imagenette128.py"]
model = dict(
    backbone=dict(
        name="vim_tiny_patch16_224",
        img_size=128,
        patch_size=8,
        embed_layer="conv",
        class_token=False,
        global_pool="avg",
    ),
    cuda_graph=True,
)
default_hooks = dict(
    checkpoint=dict(keep=1, save_best=None),
    # A look at the loss waits for the GPU, which replays of graphs would else leave behind, and the
    # clock that ends a run by train_cfg.max_seconds is the host's.
    finite=dict(interval=10),
)
