"""Text to token ids and back: Hugging Face ``tokenizer.json`` or SentencePiece ``tokenizer.model``.

The ``tokenizers`` package reads the former in milliseconds, where transformers would import for seconds.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_vespo.errors import UserError

if TYPE_CHECKING:
    import tokenizers

Messages = list[dict[str, Any]]


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer.

    Attributes:
        vocab_size: Ids are below it. The model's own vocabulary may be padded beyond.
        eos_id: End of sequence; None if the tokenizer names none.
        pad_id: Padding; None if the tokenizer names none.
    """

    vocab_size: int
    eos_id: int | None
    pad_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; ``add_special_tokens`` adds what the model expects around a text, such as BOS."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens kept."""
        ...

    def encode_chat(
        self, messages: Messages, *, add_generation_prompt: bool = True, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a conversation by the tokenizer's chat template; ``variables`` are further ones that it reads.

        Raises:
            UserError: it has no template, or the template refuses.
        """
        ...


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer in a model folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(folder)
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(folder / "tokenizer.model")
    raise UserError(f"{folder}: no tokenizer here; it needs a tokenizer.json or a SentencePiece tokenizer.model")


class HuggingFaceTokenizer:
    """``tokenizer.json``, with special tokens and chat template from ``tokenizer_config.json``."""

    def __init__(self, folder: Path) -> None:
        import tokenizers

        self._folder = folder
        try:
            self._tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:
            raise UserError(f"{folder / 'tokenizer.json'}: cannot be read: {error}") from error
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self._special_tokens = {
            name: token["content"] if isinstance(token, dict) else token
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (token := settings.get(name)) is not None
        }
        template = folder / "chat_template.jinja"
        self._template = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id = self._special_id("eos_token")
        self.pad_id = self._special_id("pad_token")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """See :class:`Tokenizer`."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`Tokenizer`."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def encode_chat(
        self, messages: Messages, *, add_generation_prompt: bool = True, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """See :class:`Tokenizer`."""
        if not isinstance(self._template, str):
            raise UserError(
                f"{self._folder}: the prompt is a list of messages but this tokenizer has no chat template; "
                "give prompts as text, or add a chat_template.jinja to the folder"
            )
        import jinja2

        try:
            text = _compile(self._template).render(
                {
                    **self._special_tokens,
                    **(variables or {}),
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except jinja2.TemplateError as error:
            raise UserError(f"{self._folder}: the chat template refuses the messages: {error}") from error
        # Templates write the special tokens themselves.
        return self.encode(text, add_special_tokens=False)

    def _special_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)


class SentencePieceTokenizer:
    """A SentencePiece model file; it has no chat template."""

    def __init__(self, file: Path) -> None:
        import sentencepiece

        self._file = file
        try:
            self._model: sentencepiece.SentencePieceProcessor = sentencepiece.SentencePieceProcessor(
                model_file=str(file)
            )
        except (OSError, RuntimeError) as error:
            raise UserError(f"{file}: cannot be read: {error}") from error
        self.vocab_size = int(self._model.vocab_size())
        # SentencePiece says -1 for a token that the model does not have.
        self.eos_id = self._model.eos_id() if self._model.eos_id() >= 0 else None
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """See :class:`Tokenizer`."""
        return list(self._model.encode(text, add_bos=add_special_tokens and self._model.bos_id() >= 0))

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`Tokenizer`."""
        return str(self._model.decode(list(ids)))

    def encode_chat(
        self, messages: Messages, *, add_generation_prompt: bool = True, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """See :class:`Tokenizer`."""
        raise UserError(f"{self._file}: a SentencePiece model has no chat template; give prompts as text")


def _compile(template: str) -> Any:
    """As transformers compiles chat templates: sandboxed, whitespace trimmed, with the helpers that templates use."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # Jinja's own tojson escapes HTML.
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)
