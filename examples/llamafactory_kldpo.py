"""KLDPO in LLaMA-Factory: its own training command with another loss, over all GPUs and all accumulation steps.

python examples/llamafactory_kldpo.py examples/llamafactory_kldpo.yaml
torchrun --nproc_per_node 8 examples/llamafactory_kldpo.py examples/llamafactory_kldpo.yaml learning_rate=1e-6
"""

from robustloss import KLDPOLoss
from robustloss.integrations import llamafactory

if __name__ == "__main__":
    llamafactory.train(KLDPOLoss(beta=0.1, tau=0.5))
