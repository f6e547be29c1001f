"""Forwards over a key-value cache of fixed size: launched once, and replayed on an accelerator.

A GPU runs the kernels of a narrow forward faster than a host can launch them one by one. Over a
cache that never moves, a forward of a given width does the same work on the same memory each time:
what is read, and where, are numbers in tensors. It is launched once, captured as a CUDA graph, and
from then on replayed as a whole. Elsewhere the same code runs uncaptured, so that what it computes
is tested where there is no accelerator.

Nothing is ever cleared. Which slots are of a row's text is told with every forward; others are not
attended to, whatever an earlier text left there, and taking tokens back is to speak of them no
more.
"""

import math
import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from .. import _quiet  # noqa: F401 - before transformers

# isort: split
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from .state import tensor_on
from .traits import address_of, bare, cache_name, log_p_of, modules_of, tensors_of

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Widths of a forward that are captured; one in between is padded. Wider ones, which read prompts,
are launched as they come."""

IDLE_AT_MOST = 4
"""Caches of a model, with their captured forwards, that are kept for its next call."""

ATTENTION = ("sdpa", "eager")
"""Implementations of attention that take a mask of any form."""

PLAIN = (bool, int, float, str, type(None))

OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that say nothing of what a module does; hooks are for `why_not`."""


def why_not(model: Any, core: Any) -> str:
    """Why a model cannot be read from a cache of fixed size, in words; nothing if it can.

    Args:
        model: As it is called.
        core: The causal language model in it.
    """
    text = core.config.get_text_config(decoder=True)
    name = type(core).__name__
    if not getattr(core, "_can_compile_fullgraph", False):
        return f"transformers does not say that {name} takes a static cache"
    try:
        layers = list(StaticCache(config=core.config, max_cache_len=8).layers)
    except Exception as error:
        return f"transformers makes no static cache for it ({type(error).__name__})"
    if not layers or any(type(layer) is not StaticLayer for layer in layers):
        return "not all its layers attend to a whole text"
    if core.config._attn_implementation not in ATTENTION:
        return f"its attention ({core.config._attn_implementation}) takes no mask of any form"
    if getattr(text, "alibi", False):
        return "it works positions out from the mask"
    if hasattr(model, "_orig_mod"):
        return "it is compiled, which captures for itself"
    modules = modules_of(model)
    if any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in modules):
        return "hooks on its modules are to run in every forward"
    if hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks:
        return "hooks on all modules are to run in every forward"
    if len({tensor.device for module in modules for tensor in tensors_of(module)}) != 1:
        return "its weights are on several devices"
    return ""


def fingerprint(model: Any) -> tuple[Any, ...]:
    """What a captured forward rests on: where the weights are, and what a module's own settings and
    the configuration say that it does. A change of the numbers in a weight is seen by itself."""
    found: list[Any] = []
    for module in modules_of(model):
        own = vars(module)
        found.append(type(module))
        found += [
            (key, value if type(value) in PLAIN else repr(value))
            for key, value in own.items()
            if key not in OF_EVERY_MODULE and type(value) in (*PLAIN, list, tuple, set, dict)
        ]
        found += [(address_of(x), x.dtype, x.shape) for x in tensors_of(module)]
    device = next(model.parameters()).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (
        hash(tuple(found)),
        model.config.to_json_string(use_diff=False),
        model.config._attn_implementation,
        autocast,
        torch.get_float32_matmul_precision(),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Inputs:
    """What a forward of one width is told, always in the same memory.

    Attributes:
        ids: Shape (rows, width).
        told: By row: the position of each column in its text, whether each slot is of it, and how
            many slots were filled before. Shape (rows, width + slots + 1).
    """

    ids: Tensor
    told: Tensor


class Forwards:
    """The forwards of one model over one cache of a fixed number of rows and slots.

    Attributes:
        rows: How many texts it has room for.
        slots: How many tokens of each.
        made_for: The `fingerprint` of the model that forwards were captured of.
        device: Of the model's weights.
        cache: The keys and values. 2 * layers * heads * head size * rows * slots numbers.
    """

    def __init__(self, model: Any, core: Any, rows: int, slots: int, made_for: Any) -> None:
        """Nothing is read or captured yet."""
        self.rows, self.slots, self.made_for = rows, slots, made_for
        self.cache = StaticCache(config=core.config, max_cache_len=slots)
        self._model, self._core = weakref.ref(model), weakref.ref(core)
        self._cache_name = str(cache_name(core))
        self.device = next(model.parameters()).device
        self._inputs: dict[int, _Inputs] = {}
        self._graphs: dict[int, tuple[Any, Tensor]] = {}
        self._captures = self.device.type == "cuda"
        self._memory = torch.cuda.graph_pool_handle() if self._captures else None

    @property
    def layers(self) -> list[Any]:
        """Of the cache: `keys` and `values` of shape (rows, heads, slots, size)."""
        return list(self.cache.layers)

    def read(
        self, ids: Tensor, place: Tensor, seen: Tensor, positions: int, at: Sequence[int]
    ) -> Tensor:
        """Log-probabilities of what follows the last columns, for the rows that have a text.

        Args:
            ids: The tokens, on the device. Shape (texts, width).
            place: Where they stand in their texts, on the CPU. Shape (texts, width).
            seen: Which slots are of the text, these columns' own last. Shape (texts, held + width).
            positions: How many columns to answer for.
            at: The rows of the cache that have these texts; the others are read for nothing.

        Returns:
            In float32, or in float64 if the weights are that wide. Shape (texts, positions, vocab).
        """
        width = ids.shape[-1]
        held = seen.shape[-1] - width
        padded = self.width_of(width, held)
        told = torch.zeros(self.rows, padded + self.slots + 1, dtype=torch.int32)
        told[at, :width] = place.int()
        told[at, padded : padded + held + width] = seen.int()
        told[:, -1] = held
        if padded not in self._inputs or padded > WIDTHS[-1]:
            blank = torch.zeros(self.rows, padded, dtype=torch.long, device=self.device)
            self._inputs[padded] = _Inputs(blank, told.to(self.device))
        to = self._inputs[padded]
        to.told.copy_(told, non_blocking=True)
        everyone = list(at) == list(range(self.rows))
        if everyone:
            to.ids[:, :width].copy_(ids)
        else:
            index = tensor_on(self.device, at)
            to.ids[:, :width].index_copy_(0, index, ids)
        if padded > WIDTHS[-1]:
            log_p = self._forward(to, positions)
            del self._inputs[padded]
        else:
            log_p = self._replayed(padded, to)[:, width - positions : width]
        return log_p if everyone else log_p.index_select(0, index)

    def width_of(self, width: int, held: int) -> int:
        """How many columns are read for so many tokens behind those that it holds."""
        return next((w for w in WIDTHS if w >= width and held + w <= self.slots), width)

    def _replayed(self, width: int, to: _Inputs) -> Tensor:
        """A forward of one width over what was written into its inputs, captured if it can be."""
        if width not in self._graphs:
            if not self._captures or width not in WIDTHS:
                return self._forward(to, width)
            try:
                self._graphs[width] = self._captured(width, to)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._captures = False
                warnings.warn(
                    f"forwards of {type(self._core()).__name__} are launched one kernel at a time, "
                    f"for capturing one raised: {str(error).splitlines()[0][:200]}.",
                    stacklevel=2,
                )
                torch.cuda.synchronize(self.device)
                return self._forward(to, width)
        graph, log_p = self._graphs[width]
        graph.replay()
        return log_p.clone()  # the next replay writes over it

    def _captured(self, width: int, to: _Inputs) -> tuple[Any, Tensor]:
        """The graph of a forward, and what it writes its answer to."""
        with torch.cuda.device(self.device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):  # libraries set themselves up
                    self._forward(to, width)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                log_p = self._forward(to, width)
        return graph, log_p

    def _forward(self, to: _Inputs, positions: int) -> Tensor:
        model, width = self._model(), to.ids.shape[-1]
        assert model is not None
        place, seen = to.told[:, :width].long(), to.told[:, width:-1].bool()
        held = to.told[0, -1].long()
        slot = torch.arange(self.slots, device=self.device)
        column = (slot[:width] + held)[:, None]
        # Each column sees those before it; a column of no text sees itself, so that nothing is nan.
        mask = ((seen[:, None] & (slot <= column)) | (slot == column))[:, None]
        if model.config._attn_implementation == "eager":
            lowest = torch.finfo(model.dtype).min
            mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, lowest)
        lengths = [layer.cumulative_length for layer in self.layers]
        if self.layers[0].is_initialized:  # else nothing is held
            torch._foreach_copy_(lengths, [held] * len(lengths))
        options: dict[str, Any] = {self._cache_name: self.cache}
        if positions != width:
            options["logits_to_keep"] = positions
        out = model(
            to.ids,
            attention_mask=mask,
            position_ids=place,
            use_cache=True,
            **options,
        )
        return log_p_of(out, positions)


class FixedCache:
    """The keys and values of some texts, in the memory of a `Forwards` that is its own meanwhile.

    What `KVCache` asks of a cache, which keeps the books of what is read.
    """

    def __init__(self, model: Any, core: Any, rows: int, room: int) -> None:
        """Take forwards that are idle, or make new ones.

        Args:
            model: As it is called.
            core: The causal language model in it.
            rows: How many texts there are.
            room: How many tokens they will have at the most, as far as is known.
        """
        self._model, self._core = model, core
        self._made_for = fingerprint(model)
        self._at = list(range(rows))
        self._filled = 0
        self._forwards = self._borrowed(rows, room + WIDTHS[-1])

    @property
    def layers(self) -> list[Any]:
        """Of the memory, idle slots included."""
        return self._forwards.layers

    def get_seq_length(self) -> int:
        """How many slots are filled."""
        return self._filled

    def crop(self, less: int) -> None:
        """Forget so many slots at the end; a negative number, as transformers has it."""
        self._filled += less

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Forget the other rows. Their memory stays, and is read for nothing."""
        self._at = [self._at[row] for row in rows]

    def reorder(self, order: Tensor) -> None:
        """Move slots to the front. Shape (texts, fewer slots)."""
        kept = order.shape[-1]
        device = self._forwards.device
        at, moved = tensor_on(device, self._at), order.to(device, non_blocking=True)
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                own = tensor.index_select(0, at)
                index = moved[:, None, :, None].expand(-1, own.shape[1], -1, own.shape[-1])
                own[:, :, :kept] = own.gather(2, index)
                tensor.index_copy_(0, at, own)
        self._filled = kept

    def has_room(self, width: int) -> bool:
        """Whether so many columns can be read."""
        return self._filled + width <= self._forwards.slots

    def read(self, ids: Tensor, place: Tensor, seen: Tensor, positions: int) -> Tensor:
        """`Forwards.read`, with more memory if it takes more."""
        if not self.has_room(ids.shape[-1]):
            self._grow(2 * (self._filled + ids.shape[-1]))
        log_p = self._forwards.read(ids, place, seen, positions, self._at)
        self._filled = seen.shape[-1]
        return log_p

    def _grow(self, slots: int) -> None:
        small = self._forwards
        self._forwards = self._borrowed(small.rows, slots)
        for old, new in zip(small.layers, self.layers, strict=True):
            if old.is_initialized:
                if not new.is_initialized:
                    new.lazy_initialization(old.keys, old.values)
                new.keys[:, :, : small.slots] = old.keys
                new.values[:, :, : small.slots] = old.values

    def _borrowed(self, rows: int, slots: int) -> Forwards:
        with _LOCK:
            idle = _IDLE.setdefault(self._model, [])
            idle[:] = [kept for kept in idle if kept.made_for == self._made_for]
            most = 2 * _rounded(slots)
            fits = [f for f in idle if f.rows == rows and slots <= f.slots <= most]
            found = min(fits, key=lambda f: f.slots, default=None)
            if found is not None:
                idle.remove(found)
        if found is None:
            found = Forwards(self._model, self._core, rows, _rounded(slots), self._made_for)
        weakref.finalize(self, _give_back, weakref.ref(self._model), found).atexit = False
        return found


_LOCK = threading.RLock()  # a finalizer may run while it is held
_IDLE: weakref.WeakKeyDictionary[Any, list[Forwards]] = weakref.WeakKeyDictionary()


def _give_back(model: Any, forwards: Forwards) -> None:
    if model() is not None:
        with _LOCK:
            idle = _IDLE.setdefault(model(), [])
            idle.append(forwards)
            del idle[:-IDLE_AT_MOST]


def forget(model: Any) -> None:
    """Give back the memory of a model's idle caches and captured forwards."""
    with _LOCK:
        _IDLE.pop(bare(model), None)


def _rounded(slots: int) -> int:
    """A few more, so that calls of about one size share one cache: at most a quarter."""
    step = max(64, 2 ** (math.floor(math.log2(slots)) - 2))
    return -(-slots // step) * step
