"""robustloss in OpenRLHF's DPO trainer: a stand-in that calls as 0.11.2 does, and the release where installed."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from released import import_released
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader

from robustloss import (
    AOTPairedLoss,
    AOTUnpairedLoss,
    BetaDPOLoss,
    DPOLoss,
    GroupDROLoss,
    KLDPOLoss,
    WDPOLoss,
)
from robustloss.global_batch import NonFiniteError
from robustloss.integrations import openrlhf

EXAMPLES = Path(__file__).parents[2] / "examples"
PAIRS, TOKENS, PROMPT, VOCABULARY = 12, 6, 2, 7


class StandIn:
    """What OpenRLHF 0.11.2's DPOTrainer does around `loss_fn`, without its logging."""

    def __init__(self, model, ref_model, strategy, optim, train_dataloader, eval_dataloader, scheduler, **options):
        self.model, self.ref_model, self.strategy, self.optimizer = model, ref_model, strategy, optim
        self.train_dataloader, self.eval_dataloader, self.scheduler = train_dataloader, eval_dataloader, scheduler
        self.args, self.epochs, self.beta = strategy.args, options["max_epochs"], options["beta"]
        self.loss_fn = None

    def fit(self, args, consumed_samples=0, num_update_steps_per_epoch=None):
        step = 1
        for _ in range(self.epochs):
            self.model.train()
            self.ref_model.eval()
            assert len(self.train_dataloader) % self.strategy.accumulated_gradient == 0
            assert self.train_dataloader.sampler is not None
            for data in self.train_dataloader:
                loss, chosen, rejected = self.loss_fn(*self.logps(data, no_grad_for_ref=True))
                assert chosen.shape == rejected.shape
                assert not chosen.requires_grad
                self.strategy.backward(loss, self.model, self.optimizer)
                self.strategy.optimizer_step(self.optimizer, self.model, self.scheduler)
                if step % self.strategy.accumulated_gradient == 0:
                    logs, states = {"loss": loss.item()}, {"consumed_samples": step}
                    self.save_logs_and_checkpoints(args, step, None, logs, states)
                step += 1

    def logps(self, data, no_grad_for_ref=False):
        *tensors, prompt_lengths = data
        batch = [*(tensor.squeeze(1) for tensor in tensors), prompt_lengths]
        chosen, rejected, _, _ = self.concatenated_forward(self.model, *batch)
        with torch.no_grad():
            ref_chosen, ref_rejected, _, _ = self.concatenated_forward(self.ref_model, *batch)
        return chosen, rejected, ref_chosen, ref_rejected

    def save_logs_and_checkpoints(self, args, global_step, step_bar, logs_dict=None, client_states=None):
        self.logged.append(logs_dict)

    def evaluate(self, eval_dataloader, steps=0):
        self.model.eval()
        with torch.no_grad():
            values = [self.loss_fn(*self.logps(data))[0].item() for data in eval_dataloader]
        self.model.train()
        return values

    def concatenated_forward(self, model, chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens):
        ids, mask = torch.cat([chosen_ids, reject_ids]), torch.cat([c_mask, r_mask])
        logps, _ = model(ids, attention_mask=mask, return_output=True, return_logprobs=True, ring_attn_group=None)
        counted = mask.bool().clone()
        counted[:, :PROMPT] = False
        chosen, rejected = (logps * counted[:, 1:]).sum(-1).chunk(2)
        return chosen, rejected, [], -chosen.mean()


@pytest.fixture(params=["stand-in", "release"])
def trainer_class(request):
    """A trainer that keeps what it logs."""
    base = StandIn
    if request.param == "release":
        base = import_released("openrlhf.trainer.dpo_trainer", absent="flash_attn pylatexenc").DPOTrainer

    class Recorded(base):
        logged: list

        def save_logs_and_checkpoints(self, args, global_step, step_bar, logs_dict=None, client_states=None):
            self.logged.append(logs_dict)

        def evaluate(self, eval_dataloader, steps=0):
            if base is StandIn:
                return super().evaluate(eval_dataloader, steps)
            told, self.strategy.all_reduce = [], lambda logs: told.append(logs) or logs
            super().evaluate(eval_dataloader, steps)
            return [told[-1]["eval_loss"]]

    return Recorded


class Actor(nn.Module):
    """Called as OpenRLHF's: token ids [B, T] to (log-probabilities [B, T - 1], output)."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(4, VOCABULARY)

    def forward(self, ids, *, attention_mask, return_output, return_logprobs, ring_attn_group):
        logits = self.head(self.dropout(self.embedding(ids)))[:, :-1]
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1), {}


class Strategy:
    """Divides by the microbatches of a step and steps at the last one, as DeepSpeed's engine does."""

    ring_attn_group = None

    def __init__(self, microbatches, **model_options):
        self.accumulated_gradient, self.seen = microbatches, 0
        options = {"beta": 0.1, "label_smoothing": 0.0, "ipo_enable": False, "aux_loss_coef": 0, "nll_loss_coef": 0}
        self.args = SimpleNamespace(
            model=SimpleNamespace(**options | model_options),
            ds=SimpleNamespace(packing_samples=False),
            logger=SimpleNamespace(wandb=SimpleNamespace(key=None), tensorboard_dir=None),
            train=SimpleNamespace(batch_size=4),
            eval=SimpleNamespace(steps=10**9),
            ckpt=SimpleNamespace(save_steps=10**9),
        )

    def is_rank_0(self):
        return False

    def get_grad_norm(self, model):
        return 0.0

    def all_reduce(self, logs):
        return logs

    def backward(self, loss, model, optimizer):
        (loss / self.accumulated_gradient).backward()

    def optimizer_step(self, optimizer, model, scheduler):
        self.seen += 1
        if self.seen % self.accumulated_gradient == 0:
            optimizer.step()
            optimizer.zero_grad()


def rows(pairs=PAIRS):
    """[pairs] rows as OpenRLHF's RewardDataset collates them: tensors [B, 1, T], and the prompts' lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (pairs, 2, 1, TOKENS), generator=generator)
    return [(chosen, torch.ones_like(chosen), rejected, torch.ones_like(rejected)) for chosen, rejected in ids]


def collate(samples):
    return [*(torch.stack(column) for column in zip(*samples, strict=True)), [PROMPT] * len(samples)]


def make_trainer(
    trainer_class, loss, microbatches=1, *, batch=4, dropout=0.0, data=None, strategy=None, **model_options
):
    torch.manual_seed(0)
    model, ref_model = Actor(dropout).double(), Actor().double()
    loader = DataLoader(data or rows(), batch_size=batch // microbatches, collate_fn=collate, drop_last=True)
    trainer = openrlhf.robust(trainer_class)(
        model=model,
        ref_model=ref_model,
        strategy=strategy or Strategy(microbatches, **model_options),
        tokenizer=SimpleNamespace(pad_token_id=0),
        optim=(optimizer := torch.optim.SGD(model.parameters(), lr=0.5)),
        train_dataloader=loader,
        eval_dataloader=None,
        scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        beta=0.1,
        max_epochs=2,
        loss=loss,
    )
    trainer.logged = []
    return trainer


def trained(*arguments, **options):
    """(parameters [P] after two epochs, logged losses)."""
    trainer = make_trainer(*arguments, **options)
    trainer.fit(trainer.args, num_update_steps_per_epoch=3)
    parameters = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return parameters, [logs["loss"] for logs in trainer.logged]


LOSSES = {
    "dpo": lambda: DPOLoss(beta=0.5),
    "kldpo": lambda: KLDPOLoss(beta=0.5, tau=0.1),
    "aot": lambda: AOTPairedLoss(beta=0.5),
    "beta_dpo": lambda: BetaDPOLoss(beta=0.5, alpha=0.1),
}


@pytest.mark.parametrize("make_loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("microbatches", [2, 4])
@pytest.mark.filterwarnings("error::UserWarning")  # of a sort of one pair
def test_accumulated_microbatches_train_as_one_batch(trainer_class, make_loss, microbatches):
    whole, values = trained(trainer_class, make_loss())
    parts, accumulated = trained(trainer_class, make_loss(), microbatches)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)
    if make_loss().coupled:  # of a mean, OpenRLHF logs the last microbatch's
        assert accumulated == pytest.approx(values, rel=1e-12)
    assert len(set(values)) == 6


class Averaging(Strategy):
    """With the mean over the processes that DeepSpeed takes, and the mesh of OpenRLHF's strategy."""

    def __init__(self, microbatches):
        super().__init__(microbatches)
        self.ds_device_mesh = init_device_mesh("cpu", (2, 1, 1), mesh_dim_names=("dp", "sp", "tp"))

    def optimizer_step(self, optimizer, model, scheduler):
        if (self.seen + 1) % self.accumulated_gradient == 0:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        super().optimizer_step(optimizer, model, scheduler)


def train_in_this_process(folder):
    dist.init_process_group("gloo")
    rank, every = dist.get_rank(), rows()
    own = [row for index, row in enumerate(every) if index % 4 // 2 == rank]  # two of each batch of four
    found = {}
    for name, make_loss in LOSSES.items():
        parameters, values = trained(StandIn, make_loss(), 2, batch=2, data=own, strategy=Averaging(2))
        found[name] = parameters.tolist(), values
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_of_two_microbatches_train_as_one_batch(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, __file__, tmp_path]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert finished.returncode == 0, finished.stderr[-4000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, make_loss in LOSSES.items():
            parameters, values = trained(StandIn, make_loss())
            torch.testing.assert_close(
                torch.tensor(found[name][0], dtype=torch.float64), parameters, rtol=1e-12, atol=1e-14
            )
            if make_loss().coupled:
                assert found[name][1] == pytest.approx(values, rel=1e-12)


def test_the_trainer_minimises_the_loss_of_the_pairs_it_is_given(trainer_class):
    trainer = make_trainer(trainer_class, KLDPOLoss(beta=0.5, tau=0.1), batch=PAIRS)
    expected = KLDPOLoss(beta=0.5, tau=0.1)
    data = collate(rows())
    batch = [*(tensor.squeeze(1) for tensor in data[:-1]), data[-1]]
    with torch.no_grad():
        chosen, rejected, _, _ = trainer.concatenated_forward(trainer.model, *batch)
        ref_chosen, ref_rejected, _, _ = trainer.concatenated_forward(trainer.ref_model, *batch)
    told = expected(chosen, rejected, ref_chosen, ref_rejected).item()
    assert trainer.evaluate([data]) == pytest.approx([told], rel=1e-12)
    trainer.fit(trainer.args, num_update_steps_per_epoch=1)
    assert trainer.logged[0]["loss"] == pytest.approx(told, rel=1e-12)
    assert trainer.logged[1]["loss"] < told
    assert 1 <= trainer.logged[0]["tilt/effective_sample_size"] <= PAIRS


def test_dropout_masks_are_the_same_in_both_passes(trainer_class, monkeypatch):
    trainer = make_trainer(trainer_class, KLDPOLoss(beta=0.5, tau=0.1), 2, dropout=0.5)
    seen, before, after = [], [], []
    forward = Actor.forward

    def recorded(self, ids, **options):
        if self is trainer.model:
            before.append(torch.get_rng_state())
        result = forward(self, ids, **options)
        if self is trainer.model:
            seen.append((ids, result[0].detach()))
            after.append(torch.get_rng_state())
        return result

    monkeypatch.setattr(Actor, "forward", recorded)
    torch.manual_seed(3)
    trainer.fit(trainer.args, num_update_steps_per_epoch=3)
    assert len(seen) == 6 * 3  # each step: the second microbatch without its graph, the first, the second again
    parameters_differ = False
    for step in range(6):
        ahead, first, again = seen[3 * step : 3 * step + 3]
        assert torch.equal(ahead[0], again[0])
        torch.testing.assert_close(ahead[1], again[1], rtol=0, atol=0)
        assert torch.equal(after[3 * step], after[3 * step + 2])
        if step % 3 < 2:  # else an epoch ends, and its data loader has drawn a seed
            assert torch.equal(before[3 * step + 3], after[3 * step + 1])  # no mask is drawn in two steps
        parameters_differ |= not torch.equal(first[1], ahead[1])
    assert parameters_differ


def test_the_first_passes_are_done_before_there_is_a_graph(trainer_class, monkeypatch):
    trainer = make_trainer(trainer_class, KLDPOLoss(beta=0.5, tau=0.1), 4)
    graphs, forward = [], Actor.forward

    def watched(self, ids, **options):
        if self is trainer.model:
            graphs.append(torch.is_grad_enabled())
        return forward(self, ids, **options)

    monkeypatch.setattr(Actor, "forward", watched)
    trainer.fit(trainer.args, num_update_steps_per_epoch=3)
    assert graphs == 6 * [False, False, False, True, True, True, True]


def test_the_reference_is_run_once_a_microbatch(trainer_class, monkeypatch):
    trainer = make_trainer(trainer_class, KLDPOLoss(beta=0.5, tau=0.1), 4)
    calls = []
    forward = Actor.forward

    def counted(self, ids, **options):
        calls.append(self is trainer.ref_model)
        return forward(self, ids, **options)

    monkeypatch.setattr(Actor, "forward", counted)
    trainer.fit(trainer.args, num_update_steps_per_epoch=3)
    assert (calls.count(True), calls.count(False)) == (2 * PAIRS, 6 * (4 + 3))


def test_microbatches_that_make_no_whole_step_are_left_out_of_the_epoch(trainer_class):
    loss = KLDPOLoss(beta=0.5, tau=0.1)
    parameters, values = trained(trainer_class, loss, 4)
    longer, more = trained(trainer_class, loss, 4, data=rows(PAIRS + 3))  # the first twelve are the same
    assert (len(values), more) == (6, values)
    assert torch.equal(longer, parameters)


def test_an_evaluation_leaves_the_state_of_the_loss(trainer_class):
    loss = BetaDPOLoss(beta=0.5, alpha=0.1)
    trainer = make_trainer(trainer_class, loss, 2)
    trainer.evaluate([collate(rows())])
    assert loss.batches == 0
    trainer.fit(trainer.args, num_update_steps_per_epoch=3)
    assert loss.batches == 6


def test_nan_is_refused_before_any_backward(trainer_class):
    trainer = make_trainer(trainer_class, KLDPOLoss(beta=0.5, tau=0.1), 2)
    with torch.no_grad():
        trainer.model.head.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="policy_chosen_logps"):
        trainer.fit(trainer.args, num_update_steps_per_epoch=3)
    assert trainer.model.head.weight.grad is None


@pytest.mark.parametrize(
    ("loss", "options", "error", "told"),
    [
        (WDPOLoss(), {}, ValueError, "WDPOLoss differentiates embeddings.*robustloss train"),
        (GroupDROLoss(), {}, ValueError, "GroupDROLoss needs the group"),
        (AOTUnpairedLoss(), {}, TypeError, "unpaired.*AOTPairedLoss"),
        (nn.Identity(), {}, TypeError, "got Identity"),
        (KLDPOLoss(tau=0.1), {"beta": 0.3}, ValueError, r"--model.beta 0.3 would be ignored.*KLDPOLoss\(beta=0.1\)"),
        (KLDPOLoss(tau=0.1), {"label_smoothing": 0.1}, ValueError, "label_smoothing"),
        (KLDPOLoss(tau=0.1), {"ipo_enable": True}, ValueError, "link='ipo'"),
    ],
)
def test_what_it_cannot_train_is_refused_by_name(loss, options, error, told):
    with pytest.raises(error, match=told):
        make_trainer(StandIn, loss, **options)


def test_loss_fn_alone_refuses_to_split_a_coupled_batch():
    strategy = Strategy(2)
    with pytest.raises(ValueError, match=r"one of the 2 microbatches.*--train.micro_batch_size"):
        openrlhf.loss_fn(KLDPOLoss(tau=0.1), strategy)
    assert openrlhf.loss_fn(DPOLoss(), strategy).microbatches == 1


def test_loss_fn_alone_gives_the_loss_and_the_rewards():
    logps = [-torch.rand(5, generator=torch.Generator().manual_seed(i)).double() for i in range(4)]
    logps[0].requires_grad_()
    loss = KLDPOLoss(beta=0.5, tau=0.1)
    value, chosen, rejected = openrlhf.loss_fn(loss, Strategy(1))(*logps)
    assert value.item() == loss(*logps).item()
    assert value.requires_grad
    assert not chosen.requires_grad
    torch.testing.assert_close(chosen, 0.5 * (logps[0] - logps[2]).detach())
    torch.testing.assert_close(rejected, 0.5 * (logps[1] - logps[3]))


def test_a_run_cannot_be_resumed_without_the_state_of_its_loss():
    trainer = make_trainer(StandIn, BetaDPOLoss(), 2)
    with pytest.raises(ValueError, match=r"BetaDPOLoss has a state.*load_enable"):
        trainer.fit(trainer.args, consumed_samples=8)


def test_train_dpo_runs_openrlhfs_command_with_the_loss(monkeypatch):
    """`openrlhf.cli.train_dpo` imports its trainer from `openrlhf.trainer.dpo_trainer` and calls it by keywords."""
    package, trainers, module = (ModuleType(name) for name in ("openrlhf", "trainer", "dpo_trainer"))
    package.trainer, trainers.dpo_trainer, module.DPOTrainer = trainers, module, StandIn
    monkeypatch.setitem(sys.modules, "openrlhf", package)
    monkeypatch.setitem(sys.modules, "openrlhf.trainer", trainers)
    monkeypatch.setitem(sys.modules, "openrlhf.trainer.dpo_trainer", module)
    ran = []

    def command(name, run_name):
        model = Actor()
        options = dict.fromkeys(("eval_dataloader", "scheduler", "optim", "train_dataloader", "tokenizer"))
        strategy = Strategy(2)
        options |= {"model": model, "ref_model": model, "strategy": strategy, "max_epochs": 1, "beta": 0.1}
        ran.append((name, run_name, module.DPOTrainer(**options)))

    monkeypatch.setattr(openrlhf.runpy, "run_module", command)
    loss = KLDPOLoss(tau=0.1)
    openrlhf.train_dpo(loss)
    ((name, run_name, trainer),) = ran
    assert (name, run_name) == ("openrlhf.cli.train_dpo", "__main__")
    assert isinstance(trainer, StandIn)
    assert trainer.loss_fn.global_batch.loss is loss
    assert module.DPOTrainer is StandIn


def test_the_example_runs_openrlhfs_command_with_kldpo(monkeypatch):
    monkeypatch.setattr(openrlhf, "train_dpo", (ran := []).append)
    runpy.run_path(str(EXAMPLES / "openrlhf_dpo.py"), run_name="__main__")
    assert [type(loss) for loss in ran] == [KLDPOLoss]


if __name__ == "__main__":
    train_in_this_process(sys.argv[1])
