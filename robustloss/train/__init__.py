"""Training: data, the DeepSpeed loop, its reports and its command line."""

from robustloss.train.loss_module import LossModule

__all__ = ["LossModule"]
