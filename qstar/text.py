"""Text from q* of two language models: prompts or chats in, text out, all at once or as it comes.

    decoder = OptimalSpeculativeDecoder(policy, teacher, tokenizer=tokenizer, max_new_tokens=80)
    decoder.complete(messages, system="You are a pirate.", teacher_system="You are a chemist.").text

Everything is `qstar.decode.generate`; this keeps the pair, its tokenizer and its options together.
"""

import inspect
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import StopStringCriteria

from . import decode
from .decode import Generation, Prompts
from .models import chat_ids, check_same_vocabulary
from .reader import Reader

Prompt = str | Sequence[Mapping[str, str]]
"""A text to be continued as it stands, or the messages of a chat: {"role": ..., "content": ...}."""

OPTIONS = frozenset(
    name
    for name, parameter in inspect.signature(decode.generate).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
)
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for the bytes of a character that has not come to its end."""


@dataclass(frozen=True, slots=True)
class Completion:
    """New text, and the tokens it was decoded from.

    Attributes:
        text: The new text, without special tokens; a stop string that ended it is its end.
        generation: The tokens and what was known where each was drawn.
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
        options: Options of `qstar.decode.generate` for every call; a call's own come first.

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

        Raises:
            TypeError: An option is none of `qstar.decode.generate`.
            ValueError: A model's cache cannot take tokens back, or the vocabularies differ.
        """
        _check_options(options)
        sizes = [
            Reader(model, name=name).vocab
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
        self.options = options

    def generate(
        self, policy_ids: Prompts, teacher_ids: Prompts | None = None, **options: Any
    ) -> Generation:
        """Draw tokens: `qstar.decode.generate` of the pair, with its options and these."""
        _check_options(options)
        options = self.options | options
        return decode.generate(self.policy, self.teacher, policy_ids, teacher_ids, **options)

    __call__ = generate

    def complete(
        self,
        prompt: Prompt,
        *,
        teacher_prompt: Prompt | None = None,
        system: str | None = None,
        teacher_system: str | None = None,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> Completion:
        """Continue a text, or answer a chat.

        Args:
            prompt: What the policy reads: a text, or messages.
            teacher_prompt: What the teacher reads; None for the policy's.
            system: The policy's system prompt, put before its messages.
            teacher_system: The teacher's; None for the policy's. The empty string is none at all.
            stop: Strings that end the text as soon as one is in it.
            options: Of `qstar.decode.generate`.

        Raises:
            ValueError: There is no tokenizer, or no chat template; a system prompt came with a text
                in place of messages; or as `qstar.decode.generate` raises.
        """
        ids = self._prompts(prompt, teacher_prompt, system, teacher_system)
        result = self.generate(*ids, **self._stopping(stop, options))
        return Completion(self._text(result.tokens[: int(result.lengths)].tolist()), result)

    def stream(
        self,
        prompt: Prompt,
        *,
        teacher_prompt: Prompt | None = None,
        system: str | None = None,
        teacher_system: str | None = None,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> Iterator[str]:
        """The pieces of the text of `complete`, each as soon as its round is over.

        The models run in a thread; closing the iterator ends it with its current round. Whatever
        `complete` would raise is raised here, at the first piece at the latest that it concerns.
        """
        ids = self._prompts(prompt, teacher_prompt, system, teacher_system)
        options = self._stopping(stop, options)
        _check_options(options)
        return self._pieces(ids, options)

    def _pieces(self, ids: tuple[Tensor, Tensor], options: dict[str, Any]) -> Iterator[str]:
        rounds: queue.SimpleQueue[list[int] | Exception | None] = queue.SimpleQueue()
        left = threading.Event()
        listener = options.pop("on_tokens", self.options.get("on_tokens"))

        def on_tokens(tokens: Tensor) -> None:
            rounds.put(tokens[0].tolist())
            if listener is not None:
                listener(tokens)
            if left.is_set():
                raise _UnreadError

        def run() -> None:
            try:
                self.generate(*ids, on_tokens=on_tokens, **options)
                rounds.put(None)
            except _UnreadError:
                pass
            except Exception as error:  # raised where the text is read
                rounds.put(error)

        worker = threading.Thread(target=run, name="qstar-stream", daemon=True)
        worker.start()
        tokens: list[int] = []
        given = ""
        try:
            while isinstance(new := rounds.get(), list):
                tokens += new
                text = self._text(tokens)
                if text.startswith(given) and not text.endswith(INCOMPLETE):
                    yield text[len(given) :]
                    given = text
            if new is not None:
                raise new
            if rest := self._text(tokens)[len(given) :]:
                yield rest
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
        return (
            _ids(self.tokenizer, prompt, system),
            _ids(self.teacher_tokenizer, teacher_prompt, teacher_system),
        )

    def _stopping(self, stop: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
        if isinstance(stop, str):
            raise ValueError(f"stop holds strings, in a list: got {stop!r} alone.")
        if not stop:
            return dict(options)
        criteria = options.get("stopping_criteria", self.options.get("stopping_criteria", ()))
        ends = StopStringCriteria(self.tokenizer, list(stop))
        return options | {"stopping_criteria": [*criteria, ends]}

    def _text(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


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


def _check_options(options: Mapping[str, Any]) -> None:
    unknown = sorted(options.keys() - OPTIONS)
    if unknown:
        raise TypeError(
            f"qstar.decode.generate has no option {', '.join(unknown)}; it has "
            f"{', '.join(sorted(OPTIONS))}."
        )
