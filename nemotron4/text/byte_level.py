"""GPT-2's spelling of bytes as printable characters, used in byte-level BPE vocabularies: ``Ġ`` is space."""

from __future__ import annotations


def byte_of_character() -> dict[str, int]:
    """The byte that each of the 256 characters stands for.

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
