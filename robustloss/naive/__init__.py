"""The papers in plain PyTorch: readable, float64-capable, what every kernel is tested against."""
