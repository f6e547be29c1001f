"""Linear layers with their weights laid out once for oneDNN: faster narrow forwards on a CPU.

    with packed(policy, teacher):
        result = generate(policy, teacher, ids, max_new_tokens=100)

A forward over a few positions reads every weight and computes little. `torch.nn.functional.linear`
then either streams a matrix as it lies, which two positions already slow down, or lays it out anew
on every call. Laid out once, a forward over several positions costs little more than over one: the
ratio that decides whether verifying several drafts at once pays (`qstar.decoding.costs`).

Attention makes several positions dear too: where a mask says who sees whom, as between two drafts,
transformers copies the keys and values of grouped queries once for every query head. Its switch
`GROUPED` reads them as they lie.
"""

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 8
"""The number of positions that oneDNN is told to expect. Any number but 1 leads to one layout,
which serves one position too; the layout for 1 is slower for several."""

GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"
"""The variable of the environment by which transformers asks torch's attention to share keys and
values between query heads, masked or not. Set to "1" inside `packed`, unless it is set already."""

TOLERANCE = 1e-5
"""How far a packed layer may be from the exact answer, relative to the sum of the absolute values
of the products and the bias that it adds up. Plain layers meet the same bound: both round in
float32, in different orders."""


@dataclass(frozen=True, slots=True)
class Packing:
    """What `packed` did.

    Attributes:
        layers: How many linear layers answer from packed weights.
        plain: How many answer as before.
        num_bytes: Memory of the packed copies, which exist beside the weights: a model whose
            layers are all packed takes about twice its memory.
        reason: Why layers stay plain; None if none do.
    """

    layers: int
    plain: int
    num_bytes: int
    reason: str | None


@contextmanager
def packed(*models: nn.Module) -> Iterator[Packing]:
    """Let the models' `nn.Linear` layers answer from prepacked weights, inside a `with` block.

    Nothing is replaced: modules, parameters, tied weights and hooks are those of the model, and
    only the layers' `forward` is another, until the block ends. A packed layer answers for itself
    where packing applies (gradients off, float32, CPU) and its weight is the one that was packed;
    otherwise, after a change of weight or in a copy of the model too, the plain layer answers, so
    that a stale copy is never used. (A change through `weight.data` goes unnoticed.) Packing
    takes as long as copying the weights; the results differ from the plain ones by rounding, by
    up to `TOLERANCE` for a layer. Blocks may overlap, in one thread or in several: a layer that is
    packed already is not packed again, and is plain again when the last of its blocks has ended.

    While any layer is packed, `GROUPED` is set for the whole process, and then is as it was: other
    models of the process attend through the same switch, with the same answers but for rounding.

    Not packed are subclasses of `nn.Linear` and other layers (GPT-2's Conv1D). A warning says so
    if no layer at all could be packed. A model may be named twice.

    Args:
        models: Models, or any modules.

    Yields:
        A `Packing`.
    """
    modules = dict.fromkeys(m for model in models for m in model.modules())
    linear = [m for m in modules if isinstance(m, nn.Linear)]
    held: list[nn.Linear] = []
    try:
        with _USERS_LOCK:
            reasons = {m: None if m in _USERS else why_not(m) for m in linear}
            for module in linear:
                if reasons[module] is None:
                    if module not in _USERS:
                        module.__dict__["forward"] = MethodType(_packed_forward(module), module)
                    if not _USERS:
                        _set_switch()
                    _USERS[module] = _USERS.get(module, 0) + 1
                    held.append(module)
        reason = next((r for r in reasons.values() if r is not None), None)
        if not linear:
            reason = "there is no nn.Linear layer"
        if not held:
            warnings.warn(
                f"no layer is packed, all answer as before: {reason}.", RuntimeWarning, stacklevel=3
            )
        num_bytes = sum(m.weight.numel() * m.weight.element_size() for m in held)
        yield Packing(len(held), len(linear) - len(held), num_bytes, reason)
    finally:
        with _USERS_LOCK:
            for module in held:
                _USERS[module] -= 1
                if not _USERS[module]:
                    del _USERS[module]
                    module.__dict__.pop("forward", None)
            if held and not _USERS:
                _give_switch_back()


_USERS: dict[nn.Module, int] = {}
"""How many blocks each packed layer is in."""

_USERS_LOCK = threading.Lock()

_SWITCHED: list[str] = []
"""`GROUPED` while this module has set it, which it does only where nobody else has."""


def _set_switch() -> None:
    if GROUPED not in os.environ:
        os.environ[GROUPED] = "1"
        _SWITCHED.append(GROUPED)


def _give_switch_back() -> None:
    while _SWITCHED:
        os.environ.pop(_SWITCHED.pop(), None)


def why_not(module: nn.Module) -> str | None:
    """Why a layer cannot be packed, in words; None if it can."""
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is not nn.Linear itself"
    weight: Tensor = module.weight
    if "forward" in module.__dict__:
        return "the forward of a layer is not its own (is this a copy of a packed model?)"
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return f"packing needs float32 on a CPU, and a weight is {weight.dtype} on {weight.device}"
    if weight.is_inference():
        return "a weight was made in inference mode, where changes to it are not counted"
    return _missing()


@cache
def _missing() -> str | None:
    """Why this build of torch cannot pack, found by trying; None if it can."""
    try:
        weight, x = torch.eye(16).flip(0), torch.arange(32.0).view(1, 2, 16)
        answer = _linear(x, _pack(weight), None)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"this build of torch has no working oneDNN linear layer ({error})"
    if not torch.equal(answer, x.flip(-1)):
        return "the oneDNN linear layer of this build of torch gives wrong answers"
    return None


def _pack(weight: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


def _linear(x: Tensor, packed_weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed_weight, bias, "none", [], "")


def _packed_forward(module: nn.Linear) -> Callable[[Any, Tensor], Tensor]:
    """A forward for this module; bound to a copy of it, it answers as the copy would."""
    weight, packed_weight = module.weight, _pack(module.weight)
    state = weight._version, weight.data_ptr()

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        same = self.weight is weight and (weight._version, weight.data_ptr()) == state
        fits = x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
        if same and fits and not torch.is_grad_enabled():
            return _linear(x, packed_weight, self.bias)
        return nn.Linear.forward(self, x)

    return forward
