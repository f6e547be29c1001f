"""Text from q* of two language models: prompts or chats in, text out, all at once or as it comes.

    decoder = OptimalSpeculativeDecoder(policy, teacher, tokenizer=tokenizer, max_new_tokens=80)
    decoder.complete(messages, system="You are a pirate.", teacher_system="You are a chemist.").text

Everything is `qstar.generate`; this keeps the pair, its tokenizer and its `Sampling` together.

What the text of new tokens is: a text that is continued gets what decoding prompt and new tokens
together adds to the decoded prompt, so that the two can be written one behind the other (a token
may stand for a word with the space before it, for a part of a word, or for one byte of a
character). The answer in a chat is a text of its own, decoded alone: it may be put into a message,
and begins without the space that a SentencePiece tokenizer would put between it and the prompt.
Text that is given piece by piece (`qstar.adapters.pieces`) joins to the same, with any tokenizer.
"""

import contextvars
import queue
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..decoding import generate as decode
from ..decoding.generate import Generation
from ..decoding.inputs import Prompts
from ..decoding.kv_cache import KVCache
from ..decoding.sampling_options import Sampling, check_names
from .checkpoints import Messages, chat_ids, check_same_vocabulary
from .pieces import Pieces, new_text

Prompt = str | Messages
"""A text to be continued as it stands, or the messages of a chat (`checkpoints.chat_ids`)."""

OTHERS = ("generator", "draft_model", "draft_ids", "on_tokens")
"""What a decoder takes as options besides the fields of `Sampling`: see `qstar.generate`."""


@dataclass(frozen=True, slots=True)
class Completion:
    """New text, and the tokens it was decoded from.

    Attributes:
        text: The new text; a stop string that ended it is its end.
        generation: The tokens and what was known where each was drawn. The last one may reach
            beyond a stop string.
    """

    text: str
    generation: Generation


class OptimalSpeculativeDecoder:
    """Two language models with one vocabulary, whose q* is decoded.

    Attributes:
        policy: A causal language model of transformers.
        teacher: Another one, or the policy itself, which then wants a prompt of its own.
        tokenizer: The policy's; without one only `generate` works.
        teacher_tokenizer: The teacher's: of the same vocabulary, with its own chat template.
        sampling: The options of every call; a call's own come first.
        others: The same for what else `qstar.generate` takes (`OTHERS`).

    Source: the class of this name in the analysis, problem 1, with exact acceptance.
    """

    def __init__(
        self,
        policy: Any,
        teacher: Any,
        *,
        tokenizer: Any = None,
        teacher_tokenizer: Any = None,
        **options: Any,
    ) -> None:
        """Look at the pair: what cannot be decoded is refused here, before any prompt is read.

        Where the models' output layers are padded to different sizes, `vocab` is taken from the
        tokenizer.

        The arguments are the attributes of the class, and the options of every call: fields of
        `Sampling`, and `OTHERS`.

        Raises:
            TypeError: An option is none of these.
            ValueError: A model's cache cannot take tokens back, or the vocabularies differ.
        """
        sizes = [
            KVCache(model, name=name).vocab
            for name, model in (("policy", policy), ("teacher", teacher))
        ]
        if tokenizer is not None and teacher_tokenizer is not None:
            check_same_vocabulary(tokenizer, teacher_tokenizer)
        if tokenizer is not None and sizes[0] != sizes[1]:
            options = {"vocab": min(len(tokenizer), *sizes)} | options
        self.policy = policy
        self.teacher = teacher
        self.tokenizer = tokenizer
        self.teacher_tokenizer = tokenizer if teacher_tokenizer is None else teacher_tokenizer
        fields, self.others = _apart(options)
        self.sampling = Sampling(**fields)

    def generate(
        self, policy_ids: Prompts, teacher_ids: Prompts | None = None, **options: Any
    ) -> Generation:
        """Draw tokens: `qstar.generate` of the pair, with its options, but for these."""
        return self._generate((policy_ids, teacher_ids), *self._asked(options))

    __call__ = generate

    def complete(
        self,
        prompt: Prompt,
        *,
        teacher_prompt: Prompt | None = None,
        system: str | None = None,
        teacher_system: str | None = None,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        **options: Any,
    ) -> Completion:
        """Continue a text, or answer a chat.

        Args:
            prompt: What the policy reads: a text, or messages.
            teacher_prompt: What the teacher reads; None for the policy's.
            system: The policy's system prompt, put before its messages.
            teacher_system: The teacher's; None for the policy's. The empty string is none at all.
            stop: Strings that end the new text as soon as one is in it, and behind that string.
            skip_special_tokens: Leave the tokenizer's special tokens out of the text.
            options: As when the decoder was made; these come first.

        Raises:
            ValueError: There is no tokenizer, or no chat template; the template refuses the
                messages; a system prompt came with a text in place of messages; or as
                `qstar.generate` raises.

        Warns:
            UserWarning: The chat template drops the system prompt, or both parents read one text
                though different ones were asked for.
        """
        _check_stop(stop)
        sampling, others = self._asked(options)
        ids = self._prompts(prompt, teacher_prompt, system, teacher_system)
        context = ids[0].tolist() if isinstance(prompt, str) else []
        pieces = Pieces(self.tokenizer, context, skip_special_tokens=skip_special_tokens)
        if stop:
            sampling = _stopping(sampling, _StopInText(stop, pieces, len(ids[0])))
        result = self._generate(ids, sampling, others)
        tokens = result.tokens[: int(result.lengths)].tolist()
        text = new_text(self.tokenizer, context, tokens, skip_special_tokens=skip_special_tokens)
        return Completion(text[: _end_of_stop(text, stop)], result)

    def stream(
        self,
        prompt: Prompt,
        *,
        teacher_prompt: Prompt | None = None,
        system: str | None = None,
        teacher_system: str | None = None,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        **options: Any,
    ) -> Iterator[str]:
        """The pieces of the text of `complete`, each as soon as its round is over.

        The models run in a thread; closing the iterator ends it with its current round. Whatever
        `complete` would raise is raised here, at the first piece at the latest that it concerns.
        """
        _check_stop(stop)
        sampling, others = self._asked(options)
        ids = self._prompts(prompt, teacher_prompt, system, teacher_system)
        context = ids[0].tolist() if isinstance(prompt, str) else []
        pieces, seen = (
            Pieces(self.tokenizer, context, skip_special_tokens=skip_special_tokens)
            for _ in range(2)
        )
        if stop:
            sampling = _stopping(sampling, _StopInText(stop, seen, len(ids[0])))
        return _up_to_stop(self._pieces(ids, pieces, sampling, others), stop)

    def _pieces(
        self, ids: tuple[Tensor, Tensor], pieces: Pieces, sampling: Sampling, others: dict[str, Any]
    ) -> Iterator[str]:
        rounds: queue.SimpleQueue[list[int] | BaseException | None] = queue.SimpleQueue()
        left = threading.Event()
        listener = others.get("on_tokens")

        def on_tokens(tokens: Tensor) -> None:
            if listener is not None:
                listener(tokens)
            rounds.put(tokens[0].tolist())
            if left.is_set():
                raise _UnreadError

        def run() -> None:
            try:
                with ExitStack() as stack:
                    for autocast in precision:
                        stack.enter_context(autocast)
                    self._generate(ids, sampling, others | {"on_tokens": on_tokens})
                rounds.put(None)
            except _UnreadError:
                pass
            except BaseException as error:  # raised where the text is read, which else waits
                rounds.put(error)

        precision = _autocast_here(self.policy, self.teacher)
        context = contextvars.copy_context()
        worker = threading.Thread(target=lambda: context.run(run), name="qstar-stream", daemon=True)
        worker.start()
        try:
            while isinstance(new := rounds.get(), list):
                if piece := pieces.put(new):
                    yield piece
            if new is not None:
                raise new
            if piece := pieces.rest():
                yield piece
        finally:
            left.set()
            worker.join()

    # --- Text and tokens

    def _prompts(
        self,
        prompt: Prompt,
        teacher_prompt: Prompt | None,
        system: str | None,
        teacher_system: str | None,
    ) -> tuple[Tensor, Tensor]:
        if self.tokenizer is None:
            raise ValueError("text needs a tokenizer: pass tokenizer=... when making the decoder.")
        teacher_prompt = prompt if teacher_prompt is None else teacher_prompt
        teacher_system = system if teacher_system is None else teacher_system
        ids = (
            _ids(self.tokenizer, prompt, system),
            _ids(self.teacher_tokenizer, teacher_prompt, teacher_system),
        )
        asked_alike = teacher_prompt == prompt and (teacher_system or None) == (system or None)
        if not asked_alike and torch.equal(*ids):
            warnings.warn(
                "policy and teacher read the same text, though different prompts or system prompts "
                "were asked for: to the tokenizer and its chat template they are one.",
                stacklevel=3,
            )
        return ids

    # --- Options

    def _asked(self, options: dict[str, Any]) -> tuple[Sampling, dict[str, Any]]:
        """This decoder's options, but for a call's own."""
        fields, others = _apart(options)
        return replace(self.sampling, **fields), self.others | others

    def _generate(
        self, ids: tuple[Prompts, Prompts | None], sampling: Sampling, others: dict[str, Any]
    ) -> Generation:
        return decode.generate(self.policy, self.teacher, *ids, sampling=sampling, **others)


def _apart(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of `Sampling`, and what else there is for `qstar.generate`."""
    check_names(options, OTHERS)
    others = {name: options[name] for name in OTHERS if name in options}
    return {name: value for name, value in options.items() if name not in others}, others


# --- Where the text ends -------------------------------------------------------------------------


class _StopInText:
    """A criterion: whether a string is in the new text, asked once after each new token."""

    def __init__(self, stop: Sequence[str], pieces: Pieces, read: int) -> None:
        self._stop = stop
        self._pieces = pieces
        self._read = read
        self._tail = ""  # of what is certain, as much as a string may begin in

    def __call__(self, ids: Tensor, scores: Any) -> bool:
        new = ids[0, self._read :].tolist()
        self._read = ids.shape[-1]
        certain = self._tail + self._pieces.put(new)
        found = _end_of_stop(certain + self._pieces.rest(), self._stop) is not None
        self._tail = certain[-max(map(len, self._stop)) :]
        return found


def _stopping(sampling: Sampling, stop: _StopInText) -> Sampling:
    return replace(sampling, stopping_criteria=[*sampling.stopping_criteria, stop])


def _up_to_stop(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """The pieces up to the end of the first stop string in them."""
    tail, longest = "", max(map(len, stop), default=0)
    try:
        for piece in pieces:
            end = _end_of_stop(tail + piece, stop)
            if end is not None:
                if rest := piece[: max(0, end - len(tail))]:
                    yield rest
                return
            yield piece
            tail = (tail + piece)[-longest:]
    finally:
        pieces.close()  # type: ignore[attr-defined]


def _end_of_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string that is complete first ends, None without any."""
    return min((text.index(s) + len(s) for s in stop if s in text), default=None)


def _check_stop(stop: Sequence[str]) -> None:
    if isinstance(stop, str):
        raise ValueError(f"stop holds strings, in a list: got {stop!r} alone.")
    for string in stop:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop holds strings of at least one character: got {string!r}.")


# --- The thread of a stream ----------------------------------------------------------------------


def _autocast_here(*models: Any) -> list[torch.autocast]:
    """In which precision torch computes now; a new thread would not know."""
    kinds = sorted({"cpu", *(model.device.type for model in models)})
    return [
        torch.autocast(kind, dtype=torch.get_autocast_dtype(kind))
        for kind in kinds
        if torch.is_autocast_enabled(kind)
    ]


class _UnreadError(Exception):
    """Nobody reads the stream any more."""


def _ids(tokenizer: Any, prompt: Prompt, system: str | None) -> Tensor:
    """A prompt as token ids: a chat by the template, ready for the assistant's answer."""
    if not isinstance(prompt, str):
        return chat_ids(tokenizer, prompt, system=system or None)
    if system:
        raise ValueError(
            "a system prompt goes before messages, and the prompt is a text, which is continued as "
            'it stands: pass [{"role": "user", "content": ...}].'
        )
    return torch.tensor(tokenizer(prompt).input_ids, dtype=torch.long)
