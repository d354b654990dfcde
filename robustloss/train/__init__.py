"""Training: data, the DeepSpeed loop and its reports."""

from robustloss.train.loss_module import LossModule

__all__ = ["LossModule"]
