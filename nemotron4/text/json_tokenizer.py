"""Tokenizers described by the ``tokenizer.json`` form of the tokenizers library."""

from __future__ import annotations

import copy
import functools
import json
import re
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from nemotron4.errors import TokenizerError
from nemotron4.text.tokenizer import check_encodable, decode_ids

Spec = dict[str, Any]

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Markers that stay in the decoded text whatever flag the file gives them: Nemotron's prompt is made of them,
# and clients cut it off the reply by its length.
_VISIBLE_MARKER = re.compile(r"<extra_id_\d+>")
_MARKER_SHAPE = re.compile(r"<extra_id_\d+>|<\|.*\|>|<｜.*｜>")


class JsonTokenizer:
    """A ``tokenizer.json``: the tokenizers library executes it, normaliser to decoder, as transformers does.

    Markers are the added tokens flagged special, and those shaped like one (``<|im_end|>``). Special ones
    decode to '' except Nemotron's ``<extra_id_n>``; other added tokens (``<think>``) are ordinary text.
    """

    def __init__(self, spec: Spec, *, source: str, bos: str | None = None, eos: str | None = None) -> None:
        self._spec = _encodable(spec, source)
        self._source = source
        self._given = spec
        self._added = {token["id"]: token for token in spec.get("added_tokens") or ()}
        full = _tokenizer(self._spec, source)
        self._decoding = _Decoding(spec.get("decoder"), full)
        self._full = full
        self._lock = threading.Lock()
        self._vocab_size = max(full.get_vocab().values(), default=-1) + 1
        self._bos_id = self._special_id(bos, "beginning of text")
        self._eos_id = self._special_id(eos, "end of text")
        self._edges = _Edges()

    @property
    def specification(self) -> Spec:
        """The tokenizer as ``tokenizer.json`` holds it, for writing one."""
        return self._given

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def bos_id(self) -> int | None:
        return self._bos_id

    @property
    def eos_id(self) -> int | None:
        return self._eos_id

    @functools.cached_property
    def markers(self) -> tuple[str, ...]:
        return tuple(token["content"] for token in self._added.values() if _is_marker(token))

    @property
    def replaces_each_byte(self) -> bool:
        return not self._decoding.is_byte_level

    @property
    def decodes_each_token(self) -> bool:
        return self._decoding.is_by_token

    def encode(
        self,
        text: str,
        *,
        parse_special: bool = True,
        continues: bool = False,
        after: str = "",
        before: str = "",
    ) -> list[int]:
        check_encodable(text)
        added = {token["content"]: token for token in self._added.values()} if after or before else {}
        # A marker that is no added token is text to the library.
        encoder = self._continuing if continues or (after and after not in added) else self._full
        # The switch belongs to the whole tokenizer, and a second one would hold the vocabulary once more.
        with self._lock:
            start, end = self._edges.around(encoder, added.get(after), added.get(before))
            encoder.encode_special_tokens = not parse_special
            ids: list[int] = encoder.encode(f"{start}{text}{end}", add_special_tokens=False).ids
        ids = ids[bool(start) : len(ids) - bool(end)]
        if not parse_special and not self._marker_ids.isdisjoint(ids):
            found = next(token_id for token_id in ids if token_id in self._marker_ids)
            raise TokenizerError(
                f"{self._source}: the vocabulary cannot spell {self.piece(found)!r} with ordinary tokens",
                hint="remove the marker from the text",
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        if self._decoding.is_by_token:
            return decode_ids(self, ids)
        return self._decoding.text([self.piece(i) for i in ids if not self.is_control(i)])

    def token_bytes(self, token_id: int, *, is_first: bool = False) -> bytes:
        if self.is_control(token_id):
            return b""
        return self._decoding.bytes_of(self.piece(token_id), is_first=is_first)

    def piece(self, token_id: int) -> str:
        piece = self._full.id_to_token(token_id) if 0 <= token_id < self._vocab_size else None
        if piece is None:
            raise TokenizerError(
                f"{self._source}: no piece has id {token_id}; ids are below {self._vocab_size}"
            )
        return piece

    def token_id(self, piece: str) -> int | None:
        return self._full.token_to_id(piece)

    def is_control(self, token_id: int) -> bool:
        token = self._added.get(token_id)
        return token is not None and token["special"] and not _VISIBLE_MARKER.fullmatch(token["content"])

    def __reduce__(self) -> tuple[Any, ...]:
        # The library forgets on the way whether it parses special tokens.
        bos, eos = (None if i is None else self.piece(i) for i in (self._bos_id, self._eos_id))
        return functools.partial(JsonTokenizer, source=self._source, bos=bos, eos=eos), (self._given,)

    @functools.cached_property
    def _marker_ids(self) -> frozenset[int]:
        # The unknown token is what any character may become that the vocabulary lacks.
        unknown = self._spec["model"].get("unk_token")
        unknown_ids = {self._spec["model"].get("unk_id"), unknown and self.token_id(unknown)}
        return frozenset(i for i, token in self._added.items() if _is_marker(token) and i not in unknown_ids)

    def _special_id(self, piece: str | None, meaning: str) -> int | None:
        token_id = None if piece is None else self.token_id(piece)
        if piece is not None and token_id is None:
            raise TokenizerError(f"{self._source}: the {meaning} token {piece!r} is not in the vocabulary")
        return token_id

    @functools.cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """The tokenizer that puts no space before the text."""
        spec = _without_first_space(self._spec)
        return self._full if spec == self._spec else _tokenizer(spec, self._source)


def _is_marker(token: Mapping[str, Any]) -> bool:
    return bool(token["special"]) or _MARKER_SHAPE.fullmatch(token["content"]) is not None


def _encodable(spec: Spec, source: str) -> Spec:
    """The spec as it is used here: nothing cut, padded or added, and every marker flagged special.

    The library can be told to overlook exactly the added tokens that are flagged special.
    """
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise TokenizerError(f"{source}: expected a JSON object with a field 'model'")
    added = spec.get("added_tokens") or []
    fields = (("id", int), ("content", str), ("special", bool))
    for token in added if isinstance(added, list) else [added]:
        for name, kind in fields:
            if not isinstance(token, dict) or not isinstance(token.get(name), kind):
                raise TokenizerError(
                    f"{source}: the added token {str(token)[:60]} "
                    f"has no field {name!r} of type {kind.__name__}"
                )
    flagged = [{**token, "special": _is_marker(token)} for token in added]
    return {**spec, "added_tokens": flagged, "truncation": None, "padding": None, "post_processor": None}


def _tokenizer(spec: Spec, source: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    except Exception as error:  # the library raises the bare class
        raise TokenizerError(f"{source}: not a tokenizer.json that can be read: {error}") from error


def _steps(step: Mapping[str, Any] | None, children: str) -> Iterator[Mapping[str, Any]]:
    """The step itself and, if it is a sequence, all inside it."""
    if step is not None:
        yield step
        for child in step.get(children, ()):
            yield from _steps(child, children)


def _without_first_space(spec: Spec) -> Spec:
    """The spec without the rules that put a space or word mark before the text."""
    spec = {**spec, **copy.deepcopy({name: spec.get(name) for name in ("normalizer", "pre_tokenizer")})}
    for step in _steps(spec["normalizer"], "normalizers"):
        if step.get("type") == "Prepend":
            step["prepend"] = ""  # type: ignore[index]
    for step in _steps(spec["pre_tokenizer"], "pretokenizers"):
        if step.get("type") == "Metaspace":
            step["prepend_scheme"] = "never"  # type: ignore[index]
        if step.get("add_prefix_space"):
            step["add_prefix_space"] = False  # type: ignore[index]
    return spec


class _Edges:
    """Stand-ins for the markers before and after a text, so that the library sees what touches it.

    What a normaliser puts before a text, and the spaces that a marker with ``lstrip`` or ``rstrip`` takes,
    depend on them. Markers themselves cannot be encoded here: the text between them must not become one. The
    stand-ins have random names, which nobody can write into a text.
    """

    def __init__(self) -> None:
        self._names: dict[tuple[str, bool], str] = {}
        self._known: set[tuple[int, str]] = set()

    def around(
        self, encoder: tokenizers.Tokenizer, after: Spec | None, before: Spec | None
    ) -> tuple[str, str]:
        start = "" if after is None else self._name(encoder, "rstrip", bool(after.get("rstrip")))
        end = "" if before is None else self._name(encoder, "lstrip", bool(before.get("lstrip")))
        return start, end

    def _name(self, encoder: tokenizers.Tokenizer, side: str, strips: bool) -> str:
        name = self._names.setdefault((side, strips), f"\ue000{secrets.token_hex(12)}\ue001")
        if (id(encoder), name) not in self._known:
            flags = {side: True} if strips else {}
            encoder.add_tokens([tokenizers.AddedToken(name, normalized=False, special=False, **flags)])
            self._known.add((id(encoder), name))
        return name


def byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters: the byte of each of the 256, as ``Ġ`` is a space.

    Printable bytes of Latin-1 stand for themselves; the others take the code points from 256 on, in order
    (Radford et al. 2019, encoder.py).
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + i): byte for i, byte in enumerate(hidden)})
    return table


class _Decoding:
    """How pieces become text: the file's ``decoder``, asked for one piece if it looks at no more."""

    _ANCHOR = "a"

    def __init__(self, spec: Mapping[str, Any] | None, full: tokenizers.Tokenizer) -> None:
        kinds = [str(step["type"]) for step in _steps(spec, "decoders") if step.get("type") != "Sequence"]
        self._decoder = full.decoder
        self.is_byte_level = kinds == ["ByteLevel"]
        self._has_byte_pieces = "ByteFallback" in kinds
        self.is_by_token = self.is_byte_level or _looks_at_one_token(kinds, list(_steps(spec, "decoders")))
        self._bytes = byte_of_character()
        self._known: dict[tuple[str, bool], bytes] = {}

    def text(self, pieces: list[str]) -> str:
        # Without a decoder the library joins the pieces with spaces.
        return " ".join(pieces) if self._decoder is None else str(self._decoder.decode(pieces))

    def bytes_of(self, piece: str, *, is_first: bool) -> bytes:
        if self.is_byte_level:
            try:
                return bytes([self._bytes[character] for character in piece])
            except KeyError:
                return piece.encode()
        if self._has_byte_pieces and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        if (piece, is_first) not in self._known:
            # Behind a word there is no first space to drop.
            before = [] if is_first else [self._ANCHOR]
            text = self.text([*before, piece]).removeprefix(self._ANCHOR if before else "")
            self._known[piece, is_first] = text.encode()
        return self._known[piece, is_first]


def _looks_at_one_token(kinds: Sequence[str], steps: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each token adds its own text, except that the first may lose a space.

    CTC joins equal neighbours, BPEDecoder knows the last token, and what follows Fuse sees the whole text.
    """
    if "ByteLevel" in kinds or not set(kinds) <= _BY_TOKEN or any(step.get("stop") for step in steps):
        return False
    return "Fuse" not in kinds or set(kinds[kinds.index("Fuse") + 1 :]) <= {"Strip"}


_BY_TOKEN = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece"}
