"""Checkpoints: the authors' files, ours, timm's ways of loading, and broken files."""

import argparse
import importlib.util
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf

import vim
from vim.models import read_checkpoint, save_checkpoint, to_native, to_official

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_classes": 5}
ROOT = Path(__file__).parents[2]


def build(**kwargs):
    torch.manual_seed(kwargs.pop("seed", 0))
    return timm.create_model("vim_tiny_patch16_224", **(SMALL | kwargs)).eval()


@pytest.fixture
def model():
    return build()


@pytest.fixture
def official_file(model, tmp_path):
    """What the authors' training script writes, with averaged weights that differ."""
    weights = to_official(model.state_dict())
    path = tmp_path / "official.pth"
    torch.save(
        {
            "model": weights,
            "model_ema": {k: v + 1 for k, v in weights.items()},
            "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
            "lr_scheduler": {"t_initial": 300},
            "epoch": 299,
            "scaler": "none",
            "args": argparse.Namespace(lr=1e-3, model="vim_tiny", output_dir="out"),
        },
        path,
    )
    return path


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


@pytest.mark.parametrize("position", ["none", "first", "middle", "last", "both_ends"])
@pytest.mark.parametrize("img_size", [32, 40])
def test_official_layout_and_back_is_bit_exact(position, img_size):
    pool = "avg" if position == "none" else "token"
    model = build(cls_token_position=position, global_pool=pool, img_size=img_size)
    native = model.state_dict()
    official = to_official(native, position)
    assert "layers.0.mixer.A_b_log" in official
    assert official["layers.0.mixer.conv1d_b.weight"].shape == (64, 1, 4)
    back = to_native(official, position)
    assert back.keys() == native.keys()
    assert all(torch.equal(back[k], native[k]) for k in native)


def test_position_embedding_of_the_class_token_stands_in_the_middle_of_official_files(model):
    pos_embed = model.pos_embed.detach()
    official = to_official(model.state_dict())["pos_embed"]
    assert torch.equal(official[:, 8], pos_embed[:, 0])  # 16 patches: behind the first eight
    assert torch.equal(official[:, :8], pos_embed[:, 1:9])
    assert torch.equal(official[:, 9:], pos_embed[:, 9:])


def test_official_file_loads(model, official_file):
    other = build(seed=1)
    vim.load_checkpoint(other, official_file)
    assert_same_weights(other, model)


def test_averaged_weights_load_by_choice(model, official_file):
    other = build(seed=1)
    vim.load_checkpoint(other, official_file, use_ema=True)
    assert torch.equal(other.head.weight, model.head.weight + 1)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_own_files_load(model, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    save_checkpoint(model.state_dict(), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    other = build(seed=1)
    vim.load_checkpoint(other, path)
    assert_same_weights(other, model)


def test_timm_checkpoint_path(model, official_file):
    """timm prefers averaged weights, by its own rule."""
    other = build(seed=1, checkpoint_path=str(official_file))
    assert torch.equal(other.head.weight, model.head.weight + 1)


def test_timm_file_overlay(model, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_checkpoint(to_official(model.state_dict()), path)
    overlay = {"file": str(path), "num_classes": 5}
    other = build(seed=1, pretrained=True, pretrained_cfg_overlay=overlay)
    assert_same_weights(other, model)


def test_timm_file_overlay_adapts_channels_and_classes(model, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_checkpoint(to_official(model.state_dict()), path)
    overlay = {"file": str(path), "num_classes": 5}
    other = build(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=3)
    torch.testing.assert_close(
        other.patch_embed.proj.weight, model.patch_embed.proj.weight.sum(1, keepdim=True)
    )
    assert other.head.weight.shape == (3, 32)


def test_timm_local_dir(model, tmp_path):
    save_for_hf(model, str(tmp_path / "hub"), model_args=SMALL, safe_serialization=True)
    other = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    assert_same_weights(other, model)


def test_hub_dictionary_gives_the_plain_weights(model, official_file):
    """What timm hands to the filter when it downloads an official file."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(official_file, weights_only=True)
    other = build(seed=1)
    other.load_state_dict(vim.models._checkpoint.checkpoint_filter_fn(content, other))
    assert_same_weights(other, model)


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_presets_name_the_published_files(name):
    cfg = timm.get_pretrained_cfg(f"vim_{name}_patch16_224.in1k")
    assert cfg.hf_hub_id == f"hustvl/Vim-{name}-midclstok"
    assert cfg.hf_hub_filename.startswith(f"vim_{name[0]}_midclstok_")


def test_weights_load_inside_another_module(model, official_file):
    """A detector that holds the backbone loads official names behind its own prefix."""
    detector = torch.nn.ModuleDict({"backbone": build(seed=1)})
    weights = {f"backbone.{k}": v for k, v in read_checkpoint(official_file).items()}
    detector.load_state_dict(weights)
    assert_same_weights(detector["backbone"], model)


@pytest.mark.parametrize(
    "target",
    [
        {"img_size": (48, 32)},
        {"img_size": 64},
        {"patch_stride": 4},
        {"patch_stride": 4, "depth": 2},
    ],
    ids=["non-square", "larger", "overlap", "overlap-same"],
)
def test_position_embedding_is_resampled_around_the_class_token(target):
    """On a plane a bicubic resampling is exact inside; the class token keeps its own value."""
    source = build(img_size=64)
    rows = torch.arange(8.0).view(8, 1, 1).expand(8, 8, 32)
    with torch.no_grad():
        source.pos_embed[:, 1:] = rows.reshape(1, 64, 32)
        source.pos_embed[:, 0] = 100.0
    other = build(**({"img_size": 64} | target))
    other.load_state_dict(to_official(source.state_dict()))
    height, width = other.patch_embed.grid_size
    grid = other.pos_embed[0, 1:].view(height, width, 32)
    assert torch.equal(other.pos_embed[0, 0], torch.full((32,), 100.0))
    assert grid.max() < 9
    assert torch.allclose(grid, grid[:, :1].expand_as(grid), atol=1e-4)
    expected = (torch.arange(height) + 0.5) * 8 / height - 0.5
    inner = slice(height // 4, -(height // 4))
    torch.testing.assert_close(grid[inner, 0, 0], expected[inner], atol=0.05, rtol=0)


def test_set_input_size_resamples_as_loading_does(model):
    state_dict = model.state_dict()
    loaded = build(img_size=(48, 64))
    loaded.load_state_dict(state_dict)
    model.set_input_size((48, 64))
    assert torch.equal(model.pos_embed, loaded.pos_embed)


def test_nan_weights_are_named(model):
    state_dict = model.state_dict()
    state_dict["blocks.1.mixer.out_proj.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite.*blocks\.1\.mixer\.out_proj\.weight"):
        model.load_state_dict(state_dict)


def test_state_dict_of_the_caller_is_left_alone_by_the_filter(model, official_file):
    weights = read_checkpoint(official_file)
    before = set(weights)
    build(seed=1).load_state_dict(weights)
    assert set(weights) == before


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


def test_pickle_that_wants_to_run_code_is_refused(model, tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"model": {}, "args": Malicious()}, path)
    with pytest.raises(ValueError, match=r"refused.*can run code"):
        vim.load_checkpoint(model, path)


def test_bare_pickle_is_refused(model, tmp_path):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(ValueError, match="refused"):
        vim.load_checkpoint(model, path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 100, 5000], ids=["empty", "header", "truncated"])
def test_damaged_file(model, tmp_path, suffix, keep):
    path = tmp_path / f"weights{suffix}"
    save_checkpoint(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged"):
        vim.load_checkpoint(model, path)


def test_missing_file(model):
    with pytest.raises(FileNotFoundError, match="no checkpoint at nowhere"):
        vim.load_checkpoint(model, "nowhere.pth")


def test_file_without_weights(model, tmp_path):
    path = tmp_path / "log.pth"
    torch.save({"epoch": 3, "loss": 0.5}, path)
    with pytest.raises(ValueError, match=r"no weights under model.*holds: epoch, loss"):
        vim.load_checkpoint(model, path)


def test_file_without_averaged_weights(model, tmp_path):
    path = tmp_path / "weights.pth"
    save_checkpoint(model.state_dict(), path)
    with pytest.raises(ValueError, match=r"no weights under model_ema"):
        vim.load_checkpoint(model, path, use_ema=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 7}, r"head\.weight: the checkpoint has \(5, 32\).*num_classes=5"),
        ({"in_chans": 1}, r"patch_embed\.proj\.weight.*in_chans=3"),
        ({"embed_dim": 48}, r"norm\.weight: the checkpoint has \(32,\), the model \(48,\)"),
        ({"d_state": 8}, r"A_log.*build the model with the sizes"),
        ({"depth": 3}, r"Missing key.*blocks\.2"),
        ({"depth": 1}, r"Unexpected key.*blocks\.1"),
    ],
    ids=["classes", "channels", "width", "state", "deeper", "shallower"],
)
def test_mismatch_names_key_shapes_and_remedy(model, change, message):
    other = build(**change)
    with pytest.raises(RuntimeError, match=rf"(?s){message}"):
        other.load_state_dict(to_official(model.state_dict()))


def test_grid_of_unknown_shape_is_not_guessed():
    source = build(img_size=(16, 40))  # 2 x 5 patches
    with pytest.raises(RuntimeError, match=r"pos_embed.*set_input_size"):
        build(img_size=32).load_state_dict(source.state_dict())


def test_first_version_of_vim_is_refused(model):
    weights = to_official(model.state_dict()) | {"rope.freqs_cos": torch.zeros(2)}
    with pytest.raises(ValueError, match="first version of Vim"):
        model.load_state_dict(weights)


@pytest.mark.parametrize("options", [{"mixer": "mamba2"}, {"mixer": "lstm"}, {"ffn": "mlp"}])
def test_other_mixers_have_no_place_in_official_files(options):
    with pytest.raises(ValueError, match=r"no place for blocks\.0\."):
        to_official(build(**options).state_dict())


def test_registers_have_no_place_in_official_files():
    with pytest.raises(ValueError, match="no place for reg_token"):
        to_official(build(reg_tokens=2).state_dict())
    with pytest.raises(ValueError, match=r"no place for patch_embed\.stem\.0\.conv\.weight, "):
        to_official(build(embed_layer="conv").state_dict())


def test_tool_converts_there_and_back(model, official_file, tmp_path):
    main = load_tool("convert_checkpoint").main
    native, back = tmp_path / "native.safetensors", tmp_path / "back.pth"
    assert main([str(official_file), str(native)]) == 0
    assert main([str(native), str(back), "--to", "official"]) == 0
    assert_same_weights(model, build(seed=1, checkpoint_path=str(native)))
    before, after = read_checkpoint(official_file), read_checkpoint(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert set(safetensors.torch.load_file(native)) == set(model.state_dict())


def test_tool_exports_the_average_of_a_training_run(tmp_path):
    """In half the size, and without what only training needs."""
    main = load_tool("convert_checkpoint").main
    model, average = build(seed=1, embed_layer="conv"), build(seed=2, embed_layer="conv")
    states = {
        key: {f"backbone.{name}": x for name, x in m.state_dict().items()}
        for key, m in (("model", model), ("model_ema", average))
    }
    torch.save({**states, "iteration": 7, "optimizer": {"step": 1}}, tmp_path / "run.pth")
    arguments = [str(tmp_path / "run.pth"), str(tmp_path / "out.safetensors"), "--use-ema"]
    assert main([*arguments, "--dtype", "float16"]) == 0
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    expected = average.state_dict()
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        half = x.half() if x.is_floating_point() else x
        assert found[name].dtype == half.dtype
        assert torch.equal(found[name], half), name


def test_tool_refuses_weights_that_a_dtype_cannot_hold(tmp_path, caplog):
    main = load_tool("convert_checkpoint").main
    torch.save({"head.weight": torch.tensor([1e6])}, tmp_path / "large.pth")
    arguments = [str(tmp_path / "large.pth"), str(tmp_path / "out.safetensors")]
    assert main([*arguments, "--dtype", "float16"]) == 1
    assert "torch.float16 cannot hold the values of head.weight" in caplog.text


def test_tool_reports_bad_files(tmp_path, caplog):
    main = load_tool("convert_checkpoint").main
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    assert main([str(tmp_path / "broken.pth"), str(tmp_path / "out.safetensors")]) == 1
    assert "damaged" in caplog.text
    assert not (tmp_path / "out.safetensors").exists()


def test_tool_replaces_only_by_force(model, official_file, tmp_path):
    main = load_tool("convert_checkpoint").main
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"precious")
    with pytest.raises(SystemExit) as error:
        main([str(official_file), str(target)])
    assert error.value.code == 2
    assert target.read_bytes() == b"precious"
    assert main([str(official_file), str(target), "--force"]) == 0
