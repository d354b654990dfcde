"""Training: data, the DeepSpeed loop, its reports and its command line."""
