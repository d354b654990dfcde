"""Every `>>>` example in a docstring of the package prints what it says."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import robustloss

# Importing these starts something, or needs a framework that is not everywhere.
SKIPPED = ("robustloss.__main__", "robustloss.kernels", "robustloss.integrations", "robustloss.bench")


def modules_with_examples():
    for found in pkgutil.walk_packages(robustloss.__path__, "robustloss.", onerror=lambda name: None):
        if found.name.startswith(SKIPPED) or found.ispkg:
            continue
        source = importlib.util.find_spec(found.name).loader.get_source(found.name)
        if source and ">>> " in source:
            yield found.name


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in modules_with_examples():
        module = importlib.import_module(name)
        for example in finder.find(module, extraglobs={"torch": torch}):
            if example.examples:
                yield pytest.param(example, id=example.name.removeprefix("robustloss."))


@pytest.mark.parametrize("example", examples())
def test_example_of_a_docstring_prints_what_it_says(example):
    told = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=told.append)
    assert not told, "".join(told)


# What a user calls first: each shows what it does.
SHOWN = [
    *(module.__name__ for module in robustloss.LOSSES.values()),
    *("Mean", "KLTilt", "CVaR", "ChiSquare", "TotalVariation", "SoftMin", "GlobalBatch"),
    *("token_logps", "sequence_logps", "linear_sequence_logps"),
    *("soft_sort", "soft_rank", "sinkhorn_sort", "sorted_transport"),
]


@pytest.mark.parametrize("name", SHOWN)
def test_main_public_names_have_an_example(name):
    assert ">>> " in getattr(robustloss, name).__doc__
