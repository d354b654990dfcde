"""Throughput and memory beside what people use today: `python -m pytest bench`, installed as `robustloss.bench`."""
