"""The optimizers of the family: every rule, with the variants of its arguments, and what they stand for."""

from __future__ import annotations

import numpy as np
from phase_cases import pairwise

import fastadam
from fastadam import schedules
from fastadam.kernels import rules

L2 = {"weight_decay": 0.05}

VARIANTS = {
    "adam": ("Adam", {}),
    "adam-betas-l2": ("Adam", {"betas": (0.5, 0.9), **L2}),
    "adam-amsgrad": ("Adam", {"amsgrad": True, "maximize": True}),
    "adamw": ("AdamW", {}),
    "adamw-amsgrad-maximize": ("AdamW", {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    "nadam": ("NAdam", {}),
    "nadam-l2-maximize": ("NAdam", {"betas": (0.5, 0.9), "maximize": True, **L2}),
    "nadam-decoupled": ("NAdam", {"decoupled_weight_decay": True, "momentum_decay": 0.1, **L2}),
    "nadam-beta1-0": ("NAdam", {"betas": (0.0, 0.9), "momentum_decay": 0.0}),
    "radam": ("RAdam", {}),
    "radam-l2-maximize": ("RAdam", {"betas": (0.5, 0.9), "maximize": True, **L2}),
    "radam-decoupled": ("RAdam", {"decoupled_weight_decay": True, "betas": (0.9, 0.5), **L2}),
    "adamax": ("Adamax", {}),
    "adamax-l2-maximize": ("Adamax", {"betas": (0.5, 0.9), "maximize": True, **L2}),
    "sgd": ("SGD", {}),
    "sgd-l2-maximize": ("SGD", {"maximize": True, **L2}),
    "sgd-momentum": ("SGD", {"momentum": 0.9}),
    "sgd-dampening": ("SGD", {"momentum": 0.9, "dampening": 0.3, **L2}),
    "sgd-nesterov": ("SGD", {"momentum": 0.9, "nesterov": True, "maximize": True, **L2}),
    "adagrad": ("Adagrad", {}),
    "adagrad-start": ("Adagrad", {"initial_accumulator_value": 0.3}),
    "adagrad-lr-decay": ("Adagrad", {"lr_decay": 0.01, "maximize": True, "eps": 1e-3, **L2}),
    "rmsprop": ("RMSprop", {}),
    "rmsprop-l2-maximize": ("RMSprop", {"alpha": 0.5, "maximize": True, "eps": 1e-3, **L2}),
    "rmsprop-centered": ("RMSprop", {"centered": True}),
    "rmsprop-momentum": ("RMSprop", {"momentum": 0.9, **L2}),
    "rmsprop-centered-momentum": ("RMSprop", {"centered": True, "momentum": 0.5, "maximize": True}),
    "adadelta": ("Adadelta", {}),
    "adadelta-l2-maximize": ("Adadelta", {"rho": 0.5, "lr": 0.1, "eps": 1e-3, "maximize": True, **L2}),
}
"""What stands for a class of PyTorch: its name, and the arguments of both."""

LION = {
    "lion": {},
    "lion-decay": {"lr": 1e-3, "betas": (0.5, 0.9), "weight_decay": 0.3},
    "lion-maximize": {"weight_decay": 0.1, "maximize": True},
}
"""What stands for none: the arguments."""

RULES = {
    "adam": ("FusedAdam", {}),
    "amsgrad": ("FusedAdam", {"amsgrad": True}),
    "nadam": ("FusedNAdam", {}),
    "radam": ("FusedRAdam", {"betas": (0.9, 0.9)}),
    "adamax": ("FusedAdamax", {}),
    "lion": ("FusedLion", {}),
    "sgd": ("FusedSGD", {"lr": 0.01}),
    "momentum": ("FusedSGD", {"lr": 0.01, "momentum": 0.9, "dampening": 0.1}),
    "nesterov": ("FusedSGD", {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    "adagrad": ("FusedAdagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    "rmsprop": ("FusedRMSprop", {}),
    "rmsprop-centered": ("FusedRMSprop", {"centered": True}),
    "rmsprop-momentum": ("FusedRMSprop", {"momentum": 0.5}),
    "rmsprop-centered-momentum": ("FusedRMSprop", {"centered": True, "momentum": 0.5}),
    "adadelta": ("FusedAdadelta", {}),
}
"""Every equation once."""

RELATIVES = [name for name in RULES if name not in {"adam", "amsgrad"}]
"""Those that Adam's own tests do not have."""

HAS_DECOUPLED = {"adam", "amsgrad", "nadam", "radam"}
HAS_BETAS = {*HAS_DECOUPLED, "adamax", "lion"}
HAS_EPS = {name for name in RULES if name not in {"lion", "sgd", "momentum", "nesterov"}}


def shipped_rules():
    """Return the equations of the package by their coefficients.

    Tests and the examples in docstrings define rules of their own, in modules of any name.
    """
    return {
        kind: rule for kind, rule in rules.RULES.items() if kind.__module__.startswith("fastadam.kernels.")
    }


def make(name, **options):
    """Return an optimizer of a rule, with more options."""
    kind, own = RULES[name]
    return getattr(fastadam, kind)(**{**own, **options})


def stepped(name, gradients, dtype="float32", **options):
    """Return an optimizer and parameters after a step with each gradient."""
    opt = make(name, **options)
    params = np.linspace(-1, 1, gradients[0].size).astype(dtype)
    for grads in gradients:
        opt.step(params, grads.copy())
    return opt, params


FACTORS = {
    "rule": RELATIVES,
    "grad_scale": [None, 3.0],
    "max_grad_norm": [None, 0.5],
    "max_grad_value": [None, 0.02],
    "skip_nonfinite": [False, True],
    "ema_decay": [None, 0.9],
    "zero_grads": [False, True],
    "telemetry": [False, True],
    "maximize": [False, True],
    "weight_decay": [0.0, 0.05],
    "segments": [False, True],
    "accumulated": [1, 2],
    "lr": [0.01, schedules.linear_warmup(schedules.cosine(0.01, steps=9), steps=3)],
    "dtype": ["float64", "float32"],
}
"""What one step can do besides, and with which rules."""

CASES = [
    {name: values[i] for (name, values), i in zip(FACTORS.items(), case, strict=True)}
    for case in pairwise(list(FACTORS.values()))
]
"""Every pair of levels of two features is in one of these."""


def case_id(case):
    parts = [case["rule"], case["dtype"]]
    parts += [name.split("_")[-1] for name in FACTORS if case[name] is True]
    parts += [
        f"{name.split('_')[-1]}{case[name]:g}"
        for name in ("grad_scale", "max_grad_norm", "max_grad_value", "ema_decay", "weight_decay")
        if case[name]
    ]
    parts += ["accumulated"] if case["accumulated"] > 1 else []
    return "-".join([*parts, *(["schedule"] if callable(case["lr"]) else [])])


def options(case):
    """Return the options of an optimizer, without those of a step."""
    others = ("rule", "grad_scale", "segments", "accumulated", "dtype")
    return {name: value for name, value in case.items() if name not in others}
