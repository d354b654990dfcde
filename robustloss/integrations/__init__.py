"""robustloss's losses in trainers that others own; each module imports its framework, and this one none."""
