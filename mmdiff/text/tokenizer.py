"""Text to ids and back: a byte-level BPE tokenizer with LLaDA's special tokens and chat template.

Text that a user writes never becomes a special token: only `Tokenizer.chat` places those. Foreign chat templates and
remote code are not read. What an id means to a model (mask, image code) is ``batch``'s and the models'; the order of
a conversation's pieces is ``template``'s.

Source: LLaDA's published tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdiff.batch import IGNORE, IMAGE
from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.text.template import ROLES, Dialogue, Encoded, Script, turns_of

__all__ = ["SPECIAL_TOKENS", "Tokenizer"]

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|startoftext|>",
    "<|mdm_mask|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
"""Spellings every tokenizer here must have; a trained one gives them the ids 0 to 5."""
_MAX_BYTES = 128 << 20
_CACHE = 16_384
_CACHED_CHARS = 256
_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+(?:-\p{L}+)*| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Where BPE may merge: within words, as in GPT-2. "medium-light" is one word here, so that it can be a single token:
masked diffusion must otherwise guess the number of a word's tokens before it knows the word."""


class Tokenizer:
    """A ``tokenizers.Tokenizer`` whose encoding treats special spellings as literal text.

    Args:
        definition: The text of a ``tokenizer.json``.
        settings: The content of a ``tokenizer_config.json``, kept for saving.
        where: Name for messages.
        known: Ids ``mask_id``, ``bos_id``, ``eos_id`` and ``eot_id`` that the network's configuration tells, for a
            tokenizer that spells them in another way (iLLaDA's). Such a tokenizer has no chat template here.

    Raises:
        CheckpointError: Not a tokenizer, or one of `SPECIAL_TOKENS` is missing and ``known`` does not tell.
    """

    def __init__(
        self,
        definition: str,
        settings: Mapping[str, Any] | None = None,
        where: str = "tokenizer.json",
        known: Mapping[str, int] | None = None,
    ) -> None:
        self._definition = definition
        self._settings = dict(settings) if settings is not None else _settings()
        self._core = _core(definition, where)
        ids = {spelling: self._core.token_to_id(spelling) for spelling in SPECIAL_TOKENS}
        missing = [spelling for spelling, i in ids.items() if i is None]
        self.has_template = not missing
        if missing and known is None:
            raise CheckpointError(
                f"{where}: lacks the special tokens {', '.join(missing)}; it is not of LLaDA's family"
            )
        self._known = known if missing else None
        eos, bos, mask, self.start_header_id, self.end_header_id, eot = ids.values()
        self.eos_id: int = eos if self._known is None else self._known["eos_id"]
        self.bos_id: int = bos if self._known is None else self._known["bos_id"]
        self.mask_id: int = mask if self._known is None else self._known["mask_id"]
        self.eot_id: int = eot if self._known is None else self._known["eot_id"]
        added = self._core.get_added_tokens_decoder()
        named = (self.eos_id, self.bos_id, self.mask_id, self.eot_id)
        self._special = frozenset([*named, *(i for i, token in added.items() if token.special)])
        self.vocab_size: int = max(self._core.get_vocab(with_added_tokens=True).values()) + 1
        self._cache: dict[str, tuple[int, ...]] = {}

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[Any, ...]]:
        return type(self), (self._definition, self._settings, "tokenizer.json", self._known)

    @property
    def pad_id(self) -> int:
        """Id that fills up a sequence: end of text, as published."""
        return self.eos_id

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `encode` never returns."""
        return self._special

    def special_id(self, spelling: str) -> int | None:
        """Id of a special token; None if there is none of that spelling."""
        found: int | None = self._core.token_to_id(spelling)
        return found if found in self._special else None

    @classmethod
    def from_pretrained(cls, path: str | Path, *, known: Mapping[str, int] | None = None) -> Tokenizer:
        """Read ``tokenizer.json`` (and ``tokenizer_config.json`` beside it).

        Args:
            path: The file, or its folder.
            known: As in the class.

        Raises:
            CheckpointError: Missing, not a tokenizer, or without `SPECIAL_TOKENS`.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        definition = _read(file)
        beside = file.with_name("tokenizer_config.json")
        try:
            settings = json.loads(_read(beside)) if beside.is_file() else None
        except ValueError as error:
            raise CheckpointError(f"{beside}: is not JSON ({error})") from None
        return cls(definition, settings if isinstance(settings, dict) else None, str(file), known)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``; a tokenizer that was read is written unchanged."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(self._settings, indent=2, ensure_ascii=False) + "\n"
        for name, text in (("tokenizer.json", self._definition), ("tokenizer_config.json", settings)):
            partial = folder / f"{name}.tmp"
            partial.write_text(text, encoding="utf-8")
            partial.replace(folder / name)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE on texts.

        The result is deterministic, covers every byte, and holds `SPECIAL_TOKENS` as ids 0 to 5. The words of the chat
        template (roles, the double newline) are single tokens if ``vocab_size`` leaves room for them.

        Args:
            texts: The corpus.
            vocab_size: Largest number of ids; a small corpus may give fewer.

        Raises:
            ConfigError: ``vocab_size`` below 300 (256 bytes, special tokens, and the words of the template).
        """
        if vocab_size < 300:
            raise ConfigError(f"vocab_size is {vocab_size}; at least 300 is needed (256 bytes and the template)")
        from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Core

        core = Core(models.BPE())
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split("\n\n", "isolated"),
                pre_tokenizers.Split(Regex(_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        core.train_from_iterator(_with_template(texts), trainer)
        return cls(core.to_str(pretty=True))

    def encode(self, text: str) -> list[int]:
        """Ids of literal text: a spelling such as ``<|eot_id|>`` gives the ids of its characters."""
        ids = self._cache.get(text)
        if ids is None:
            ids = self._encode(text)
            if len(text) <= _CACHED_CHARS:
                if len(self._cache) >= _CACHE:
                    self._cache.clear()
                self._cache[text] = ids
        return list(ids)

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Text of ids.

        Args:
            ids: Ids; those that are no text (image slots, image codes) are left out.
            keep_special: Whether special tokens are spelled out instead of left out.
        """
        text = [int(i) for i in ids if 0 <= int(i) < self.vocab_size]
        return self._core.decode(text, skip_special_tokens=not keep_special)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        image_slots: int | Sequence[int] = 0,
        answer: str | None = None,
        *,
        system: str = "",
        compat: str | None = None,
    ) -> Encoded:
        """A conversation in LLaDA's template, ready for an answer or followed by one.

        Surrounding whitespace of every message is removed; the answer is taken as it is and ended by ``<|eot_id|>``.

        Args:
            messages: ``{"role": "system" | "user" | "assistant", "content": ...}``, the last one from the user;
                content is text, a list of ``{"type": "image"}`` and ``{"type": "text", "text": ...}``, or `Content`.
            image_slots: `IMAGE` ids per image: one number for all, or one per image in order.
            answer: What the assistant says, for training and likelihoods.
            system: System message of a conversation that has none; empty: none.
            compat: ``"reference"``: lose the first token after every image, usually the newline, as LLaDA-V's published
                inference does (its training does not).

        Raises:
            ConfigError: Unknown role or part, empty message, or not as many images as ``image_slots`` tells.

        Source: LLaDA's published chat template; LLaDA-V's "<image>" + newline + question.
        """
        self._need_template()
        if not messages or messages[-1].get("role") != "user":
            raise ConfigError("chat: the last message must be from the user")
        turns = [(role, content.stripped()) for role, content in turns_of(messages, system)]
        script = Script(self, image_slots, lose_after_image=compat == "reference")
        for role, content in turns:
            span = script.message(role, content)
        script.slots.check_all_used()
        script.header("assistant")
        script.text(self.encode("\n\n"))
        start = len(script.ids)
        if answer is not None:
            script.text([*self.encode(answer), self.eot_id])
        return Encoded(script.ids, start, span)

    def dialogue(
        self,
        messages: Sequence[Mapping[str, Any]],
        image_slots: int | Sequence[int] = 0,
        *,
        system: str = "",
        compat: str | None = None,
    ) -> Dialogue:
        """A whole conversation with its answers, to be learnt; contents are taken as they are.

        Args:
            messages: As in `chat`, the last one from the assistant.
            image_slots: As in `chat`.
            system: As in `chat`.
            compat: ``"reference"``: label what LLaDA-V's published training labels: of every answer also its header,
                and every special token of the template. Default: the answers, each with its end of turn.

        Raises:
            ConfigError: As `chat`.

        Source: LLaDA-V's published ``preprocess_llada``.
        """
        self._need_template()
        if not messages or messages[-1].get("role") != "assistant":
            raise ConfigError("dialogue: the last message must be from the assistant")
        script, spans = Script(self, image_slots), []
        for role, content in turns_of(messages, system):
            start = len(script.ids)
            body, end = script.message(role, content)
            if role == "assistant":
                spans.append((start, end + 1) if compat == "reference" else (body, end + 1))
        script.slots.check_all_used()
        labels = [IGNORE] * len(script.ids)
        for start, end in spans:
            labels[start:end] = script.ids[start:end]
        if compat == "reference":
            frame = (self.bos_id, self.start_header_id, self.end_header_id, self.eot_id)
            labels = [i if i in frame else label for i, label in zip(script.ids, labels, strict=True)]
        return Dialogue(script.ids, labels, tuple(spans))

    def plain(self, caption: str, image_slots: int = 1) -> Dialogue:
        """An image followed by its caption and a newline, the text to be learnt: LLaDA-V's first stage."""
        text = self.encode(caption + "\n")
        ids = [IMAGE] * image_slots + text
        return Dialogue(ids, [IGNORE] * image_slots + text, ((image_slots, len(ids)),))

    def _need_template(self) -> None:
        if not self.has_template:
            raise ConfigError("chat: this tokenizer lacks the special tokens of LLaDA's template; continue plain text")

    def _encode(self, text: str) -> tuple[int, ...]:
        ids = self._core.encode(text, add_special_tokens=False).ids
        if self._special.isdisjoint(ids):
            return tuple(ids)
        # A normaliser or a whole-word lookup produced a special token after all; single characters cannot.
        pieces = [self._core.encode(c, add_special_tokens=False).ids for c in text]
        return tuple(i for piece in pieces for i in piece if i not in self._special)


def _with_template(texts: Iterable[str]) -> Iterator[str]:
    template = ("\n\n", *ROLES)
    for _ in range(64):
        yield from template
    for n, text in enumerate(texts):
        yield text
        if n % 8 == 0:  # the words of the template are as frequent in training as the samples are
            yield from template


def _core(definition: str, where: str) -> Any:
    """The Rust tokenizer, with every bracketed added token marked special so that text cannot spell it."""
    from tokenizers import Tokenizer as Core

    try:
        tree = json.loads(definition)
        for token in tree.get("added_tokens") or []:
            token["special"] = bool(token["special"]) or token["content"][:1] in ("<", "[")
        core = Core.from_str(json.dumps(tree))
    except Exception as error:  # the Rust library raises the bare class
        raise CheckpointError(f"{where}: is not a tokenizer ({error})") from error
    core.no_padding()
    core.no_truncation()
    core.encode_special_tokens = True
    return core


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, limit {_MAX_BYTES:,}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); a tokenizer.json is needed") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: is not UTF-8 text") from None


def _settings() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mdm_mask|>",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
