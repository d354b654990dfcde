"""Triton kernels and their launchers on plain tensors, installed as `robustloss.kernels`.

Imports torch and triton, nothing of robustloss.
"""
