"""The losses in words: each one's formula, options and papers, for the command line, reports and model cards.

Formulas are plain text. Options and papers are read from the classes' own signatures and docstrings, so that nothing is
said twice (under `python -OO`, which drops docstrings, it is not said at all).
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from robustloss.losses import LOSSES, PreferenceLoss
from robustloss.losses.base import PAIRED_NAMES, UNPAIRED_NAMES

PAIRED = "h_i = (policy_chosen - policy_rejected)_i - (ref_chosen - ref_rejected)_i"
# In lines: the loss, then what stands in it.
FORMULAS: dict[str, tuple[str, ...]] = {
    "dpo": ("mean of l(h_i)", PAIRED),
    "kldpo": ("sum of P_i l(h_i)", PAIRED),
    "wdpo": ("mean of l(h_i) + rho R", PAIRED),
    "aot_paired": ("mean of l(h_i)", "h_i = i-th smallest policy margin - i-th smallest reference margin"),
    "aot_unpaired": (
        "mean of l(h_s) over quantile levels s",
        "h_s = s-quantile of the desirable log-ratios - the others'",
    ),
    "kto": (
        "mean of w_i (1 - sigmoid(s_i beta (r_i - z)))",
        "r_i = log-ratio, s_i = 1 if desirable, else -1",
        "z = max(0, mean log-ratio of mismatched pairs)",
    ),
    "dr_dpo": ("-beta_prime log(mean of exp(-l(h_i) / beta_prime))", PAIRED),
    "tv_dpo": ("largest sum of P_i l(h_i) with sum of |P_i - 1/B| / 2 <= rho", PAIRED),
    "chi_po": (
        "mean of l(h_i), beta h_i clipped at +-2 max_reward",
        "h_i = phi(z_chosen) - phi(z_rejected), phi(z) = z + log z, z = policy / reference probability",
    ),
    "beta_dpo": (
        "mean of l(h_i) over the pairs kept, beta x (1 + alpha (their mean h - M)) in place of beta",
        PAIRED,
    ),
    "group_dro": ("sum of P_g (mean of l(h_i) in group g), P_g from P_g exp(step_size x that mean)", PAIRED),
}
LINKS = {
    "logistic": "-log sigmoid(beta h)",
    "smoothed logistic": "-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e = label_smoothing",
    "robust": "(-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e), e = label_smoothing",
    "hinge": "max(0, 1 - beta h)",
    "squared_hinge": "max(0, beta - h)^2",
    "least_squares": "(beta - h)^2",
    "ipo": "(h - 1 / (2 beta))^2",
}
LINK_PAPERS = {"robust": "2403.00409", "hinge": "2305.10425", "ipo": "2310.12036"}  # which `DPOLoss` names all
# A run trains one number, and YAML cannot name an aggregate other than the loss's own.
PYTHON_ONLY = ("reduction", "aggregate")
# What a loss cannot be made without.
_REQUIRED = {"kldpo": {"tau": 0.5}}
_MARKS = {"W": "2502.01930", "A": "2406.05882"}  # as docstrings cite the two papers that this library is about


class Option(NamedTuple):
    """One argument of a loss's constructor."""

    name: str
    default: Any
    words: str  # what the docstring says of it

    @property
    def in_config(self) -> bool:
        return self.name not in PYTHON_ONLY


def with_defaults(loss: Mapping[str, Any]) -> dict[str, Any]:
    """The `loss:` section of a config with every option; of an unknown loss, as it is."""
    known = options(LOSSES[loss["name"]]) if loss["name"] in LOSSES else []
    defaults = {option.name: option.default for option in known if option.in_config}
    return {"name": loss["name"], **defaults, **loss}


def formula(loss: Mapping[str, Any]) -> list[str]:
    """A loss, given as the `loss:` section of a config, in lines of plain text without its options' values; of an
    unknown loss none."""
    name, link = loss["name"], loss.get("link", "logistic")
    if name not in FORMULAS:
        return []
    parts = [*FORMULAS[name]]
    if link == "logistic" and loss.get("label_smoothing"):
        link = "smoothed logistic"
    if name != "kto" and isinstance(link, str) and link in LINKS:
        parts.append(f"l(h) = {LINKS[link]}")
    if name == "kldpo" and not loss.get("normalize", True):
        parts.append("P_i = exp((l(h_i) - mean of l) / tau), neither normalised nor above max_weight")
    elif name == "kldpo":
        solved = ", tau such that KL(P || uniform) = rho" if loss.get("rho") is not None else ""
        parts.append(f"P_i proportional to exp(l(h_i) / tau){solved}")
    if name == "wdpo":
        mean = "mean of |g_i|^2" if loss.get("squared", True) else "root of the mean of |g_i|^2"
        parts.append(f"R = {mean}, g_i = gradient of l(h_i) in the input embeddings")
    return parts


def formula_with_values(loss: Mapping[str, Any]) -> list[str]:
    """`formula` and the values of all options, in lines; a loss that is not known here gives its options alone."""
    values = with_defaults(loss)
    shown = [f"{key} = {value}" for key, value in values.items() if key != "name" and value is not None]
    return formula(values) + shown


def summary(loss: type[PreferenceLoss]) -> str:
    """The first sentence of its docstring."""
    return " ".join(_docstring(loss).split("\n\n")[0].split())


def papers(loss: type[PreferenceLoss]) -> list[str]:
    """The arXiv numbers of the papers that its docstring names, in order."""
    found = re.findall(r"\[(W|A)\]|\b(\d{4}\.\d{5})\b", _docstring(loss))
    return list(dict.fromkeys(_MARKS[mark] if mark else number for mark, number in found))


def sources(loss: Mapping[str, Any]) -> list[str]:
    """The papers of a loss with its options, given as the `loss:` section of a config: of those on links, its own."""
    own = [number for number in papers(LOSSES[loss["name"]]) if number not in LINK_PAPERS.values()]
    return own + [number for link, number in LINK_PAPERS.items() if link == loss.get("link")]


def options(loss: type[PreferenceLoss]) -> list[Option]:
    """The arguments of its constructor, with their defaults and what the docstring says of them."""
    words = _arguments(loss)
    return [
        Option(name, parameter.default, words.get(name, ""))
        for name, parameter in inspect.signature(loss).parameters.items()
    ]


def example(name: str) -> dict[str, Any]:
    """A valid `loss:` section with the options that matter most, at their defaults where they have one."""
    shown = {
        name: parameter.default
        for name, parameter in inspect.signature(LOSSES[name]).parameters.items()
        if parameter.kind is not parameter.KEYWORD_ONLY and name not in PYTHON_ONLY and parameter.default is not None
    }
    return {"name": name, **shown, **_REQUIRED.get(name, {})}


def as_yaml(section: Mapping[str, Any]) -> str:
    """A `loss:` section in one line of YAML."""
    values = [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in section.items()]
    return f"loss: {{{', '.join(values)}}}"


def as_python(section: Mapping[str, Any]) -> str:
    """The same in Python."""
    values = [f"{key}={value!r}" for key, value in section.items() if key != "name"]
    return f"{LOSSES[section['name']].__name__}({', '.join(values)})"


def python_example(name: str) -> list[str]:
    """Lines of Python that make the loss of `example` and call it; what it is called with is the reader's."""
    loss = LOSSES[name]
    imports, made = f"from robustloss import {loss.__name__}", f"loss = {as_python(example(name))}"
    if loss.needs_embeddings:
        return [
            imports,
            "from robustloss.train import LossModule",
            made,
            "module = LossModule(model, loss)  # a Hugging Face causal LM: the penalty is of its embeddings",
            "module(batch).backward()  # help(LossModule) tells what a batch holds",
            "# one pass at a time, in less memory: help(robustloss.penalty.directional_step)",
        ]
    given = [*(PAIRED_NAMES if loss.paired else (*UNPAIRED_NAMES, "desirable"))]
    given += ["groups=groups"] * loss.needs_groups + ["kl_logratios=kl_logratios"] * loss.needs_mismatched
    return [imports, made, f"loss({', '.join(given)})"]


def option_names() -> set[str]:
    """Every option that some loss takes in a config."""
    return {option.name for loss in LOSSES.values() for option in options(loss) if option.in_config}


def _docstring(loss: type[PreferenceLoss]) -> str:
    return inspect.getdoc(loss) or ""


def _arguments(loss: type[PreferenceLoss]) -> dict[str, str]:
    """The section Args of a docstring by argument; "as `DPOLoss`" is looked up there."""
    elsewhere = {cls.__name__: cls for cls in LOSSES.values() if cls is not loss}
    section = re.search(r"^Args:(.*)\n((?: +.*\n?|\n(?= ))*)", _docstring(loss), re.MULTILINE)
    if section is None:
        return {}
    whole = re.match(r" as `(\w+)`", section[1])
    if whole and whole[1] in elsewhere:
        return _arguments(elsewhere[whole[1]])
    found = {}
    for entry in re.split(r"^ {4}(?=\w)", section[2], flags=re.MULTILINE)[1:]:
        names, _, words = entry.partition(":")
        other = re.match(r" as `(\w+)`", words)
        for name in names.split(", "):
            found[name] = " ".join(words.split())
            if other and other[1] in elsewhere:
                found[name] = _arguments(elsewhere[other[1]]).get(name, found[name])
    return found
