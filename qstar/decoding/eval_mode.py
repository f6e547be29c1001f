"""Dropout off and torch's generators untouched, whoever else decodes with the same modules."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .traits import modules_of

_MODES: dict[Any, tuple[int, bool]] = {}
"""Of each module that somebody decodes with: how many do, and the mode to give it back in."""

_MODES_LOCK = threading.Lock()


@contextmanager
def eval_mode(*models: Any) -> Iterator[None]:
    """Dropout off while inside; every module gets its mode back when the last user has left."""
    modules = dict.fromkeys(module for model in models for module in modules_of(model))
    with _MODES_LOCK:
        for module in modules:
            users, training = _MODES.get(module, (0, module.training))
            _MODES[module] = users + 1, training
        if any(module.training for module in modules):
            for model in models:
                model.eval()
    try:
        yield
    finally:
        with _MODES_LOCK:
            for module in modules:
                users, training = _MODES.pop(module)
                if users > 1:
                    _MODES[module] = users - 1, training
                elif module.training != training:
                    module.training = training


@contextmanager
def quiet(model: Any) -> Iterator[None]:
    """Dropout off, no gradients, and torch's generators as they were afterwards."""
    devices = [model.device] if model.device.type == "cuda" else []
    with eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
        yield
