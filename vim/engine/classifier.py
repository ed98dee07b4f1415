"""The classifier that a training run trains: a backbone of timm, its loss, perhaps a teacher."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from vim.layers import ConvStem, MixtureOfExperts, load_balance_loss
from vim.models import backbone_weights, read_checkpoint

from .training_graph import TrainingGraph

__all__ = ["Distillation", "VimClassifier", "build_backbone", "build_loss"]

logger = logging.getLogger(__name__)

LOSSES = ("soft-target", "cross-entropy", "bce")


def build_loss(
    kind: Literal["soft-target", "cross-entropy", "bce"] = "soft-target",
    label_smoothing: float = 0.0,
    **options: Any,
) -> nn.Module:
    """Return a loss of (logits (B, C), targets (B,) or (B, C)).

    Args:
        kind: "soft-target" for the soft targets that mixup makes (smoothing is mixup's),
            "cross-entropy" for labels, "bce" for one binary decision a class, of either.
        label_smoothing: of labels.
        options: of `timm.loss.BinaryCrossEntropy`: target_threshold, sum_classes.
    """
    if kind not in LOSSES:
        raise ValueError(f"loss.kind must be one of {', '.join(LOSSES)}, got {kind!r}")
    if kind == "bce":
        return BinaryCrossEntropy(smoothing=label_smoothing, **options)
    if options:
        raise ValueError(f"loss {kind!r} takes no {', '.join(options)}")
    if kind == "soft-target":
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(label_smoothing) if label_smoothing else nn.CrossEntropyLoss()


class Distillation(nn.Module):
    """A teacher's part of the loss, as in DeiT: (student logits, images) -> scalar.

    Source: Touvron et al. 2021, arXiv:2012.12877, section 4. Without a distillation token, the
    student's one head learns from both.

    Args:
        teacher: name of a timm model, which sees the student's images.
        checkpoint: its weights; by default timm's pretrained ones.
        kind: "soft" (KL divergence at temperature `tau`) or "hard" (the teacher's decision).
        weight: of this loss; the other one has 1 - weight.
        tau: temperature.
        options: further arguments of `timm.create_model`, such as num_classes.
    """

    def __init__(
        self,
        teacher: str,
        checkpoint: str | None = None,
        kind: Literal["soft", "hard"] = "soft",
        weight: float = 0.5,
        tau: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__()
        if kind not in ("soft", "hard"):
            raise ValueError(f"distillation.kind must be 'soft' or 'hard', got {kind!r}")
        if not 0 <= weight <= 1:
            raise ValueError(f"distillation.weight must be from 0 to 1, got {weight}")
        self.kind, self.weight, self.tau = kind, weight, tau
        model = timm.create_model(teacher, pretrained=checkpoint is None, **options)
        if checkpoint is not None:
            model.load_state_dict(read_checkpoint(checkpoint))
        # Out of the student's state and parameters: it is neither trained nor saved.
        object.__setattr__(self, "teacher", model.eval().requires_grad_(False))

    def forward(self, logits: Tensor, images: Tensor) -> Tensor:
        self.teacher.to(images.device)
        with torch.no_grad():
            wanted = self.teacher(images)
        if wanted.shape != logits.shape:
            raise ValueError(
                f"the teacher knows {wanted.shape[-1]} classes, the student {logits.shape[-1]}: "
                "give distillation.num_classes"
            )
        if self.kind == "hard":
            return F.cross_entropy(logits, wanted.argmax(-1))
        student = F.log_softmax(logits.float() / self.tau, dim=-1)
        target = F.log_softmax(wanted.float() / self.tau, dim=-1)
        divergence = F.kl_div(student, target, reduction="batchmean", log_target=True)
        return divergence * self.tau**2


@MODELS.register_module()
class VimClassifier(BaseModel):
    """A timm model in training and evaluation.

    Args:
        backbone: `name` of a timm model and its arguments, of which `embed_layer` may be "conv"
            for timm's own ViTs, too; `checkpoint` to start from (the authors' file or ours;
            position embeddings are resampled, a classifier for other classes is left out, said in
            the log), `use_ema` for its averaged weights; `grad_checkpointing`.
        loss: see `build_loss`; by default "cross-entropy". Where the preprocessor mixes images or
            smooths labels, targets are shares, which "soft-target" and "bce" take.
        distillation: arguments of `Distillation`, or None.
        load_balance: factor of the load-balance loss of mixtures of experts, where the backbone has
            them.
        cuda_graph: whether a GPU replays the backbone's forward and backward in training, see
            `TrainingGraph`; without `grad_checkpointing`, `torch.compile` and FSDP.
        data_preprocessor: config of `VimPreprocessor`.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        loss: Mapping[str, Any] | None = None,
        distillation: Mapping[str, Any] | None = None,
        load_balance: float = 0.01,
        cuda_graph: bool = False,
        data_preprocessor: Mapping[str, Any] | nn.Module | None = None,
        init_cfg: None = None,
    ) -> None:
        if isinstance(data_preprocessor, Mapping):
            data_preprocessor = dict(data_preprocessor)
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.backbone = build_backbone(backbone)
        self.load_balance = load_balance
        self.has_experts = any(isinstance(m, MixtureOfExperts) for m in self.backbone.modules())
        self.cuda_graph = cuda_graph
        self._training_graph: TrainingGraph | None = None
        self.loss = build_loss(**(loss or {"kind": "cross-entropy"}))
        self.distillation = Distillation(**distillation) if distillation else None

    def forward(
        self, images: Tensor, targets: Tensor | None = None, mode: str = "tensor"
    ) -> Tensor | dict[str, Tensor]:
        """Return logits, losses or predictions.

        Args:
            images: (B, C, H, W), normalised.
            targets: (B,) labels or (B, classes) shares.
            mode: "tensor" for logits (B, classes); "loss" for a dict of scalars whose names start
                with "loss"; "predict" for a dict of `logits` and `targets`.
        """
        if self.cuda_graph and self._training_graph is None:
            # Made here and not before, since averaged copies of this model must not share it.
            self._training_graph = TrainingGraph(self.backbone)
        run = self._training_graph or self.backbone
        logits = run(images)
        if mode == "tensor":
            return logits
        if mode == "predict":
            return {"logits": logits, "targets": targets}
        if mode != "loss":
            raise ValueError(f"mode must be 'tensor', 'loss' or 'predict', got {mode!r}")
        loss = self.loss(logits.float(), targets)
        losses = {"loss": loss}
        if self.distillation is not None:
            weight = self.distillation.weight
            losses = {
                "loss_classification": (1 - weight) * loss,
                "loss_distillation": weight * self.distillation(logits, images),
            }
        if self.has_experts:
            losses["loss_balance"] = self.load_balance * load_balance_loss(self.backbone)
        return losses


def _is_ours(name: str) -> bool:
    return timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith("vim.")


def build_backbone(
    config: Mapping[str, Any], wrap: Callable[[nn.Module], nn.Module] | None = None
) -> nn.Module:
    """Return the timm model of a config's `model.backbone`; see `VimClassifier`.

    Args:
        config: of the model.
        wrap: what makes the backbone of the timm model; it takes its weights, too.
    """
    options = dict(config)
    name = options.pop("name", None)
    if not name:
        raise ValueError("model.backbone needs the key 'name', a model of timm.list_models()")
    checkpoint, use_ema = options.pop("checkpoint", None), options.pop("use_ema", False)
    grad_checkpointing = options.pop("grad_checkpointing", False)
    named = isinstance(options.get("embed_layer"), str) and not _is_ours(name)
    if named and options.pop("embed_layer") == "conv":
        options["embed_layer"] = ConvStem  # timm's ViTs take the class, and have the other one
    model = timm.create_model(name, **options)
    if wrap is not None:
        model = wrap(model)
    if checkpoint:
        _start_from(model, checkpoint, use_ema)
    if grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def _start_from(model: nn.Module, checkpoint: str, use_ema: bool) -> None:
    """Load weights; a classifier for other classes stays as it is."""
    weights = backbone_weights(read_checkpoint(checkpoint, use_ema=use_ema))
    own = model.state_dict()
    classifier = tuple(
        f"{name}.{part}"
        for name in _classifier_names(model)
        for part in ("weight", "bias")
        if f"{name}.{part}" in own
    )
    others = [n for n in classifier if n in weights and weights[n].shape != own[n].shape]
    if others:
        logger.warning(
            "%s has %d classes, the model %d: its classifier is left out",
            checkpoint,
            weights[others[0]].shape[0],
            own[others[0]].shape[0],
        )
        weights = {name: x for name, x in weights.items() if name not in classifier}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if name not in classifier]
    if missing or unexpected:
        raise RuntimeError(
            f"{checkpoint} does not fit the model: it lacks {missing[:5]} and has {unexpected[:5]} "
            "besides; build the model with the arguments that it was trained with"
        )


def _classifier_names(model: nn.Module) -> tuple[str, ...]:
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)
