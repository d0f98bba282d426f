"""Compiled files without what only linkers and debuggers read: symbol tables and debugging sections.

`image/wheels.py` puts every compiled file of a wheel through it. What the loader maps stays byte for byte where it was,
so that a file runs as it did; its symbols for dynamic linking are among that. Layout: System V gABI, chapters 4 and 5.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

MAGIC = b"\x7fELF\x02\x01"  # 64-bit, little-endian; others are left as they are
HEADER_BYTES, SECTION, SEGMENT = 64, struct.Struct("<IIQQQQIIQQ"), struct.Struct("<IIQQQQQQ")
SYMTAB, STRTAB, NOBITS, ALLOC = 2, 3, 8, 2
DEBUGGING = (b".debug", b".zdebug", b".gnu_debug", b".gdb_index")


class Section(NamedTuple):
    """A line of the table of sections; offsets and sizes in bytes of the file."""

    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int

    @property
    def end(self) -> int:
        """Where its bytes end in the file."""
        return self.offset + (0 if self.kind == NOBITS else self.size)


def strip(data: bytes) -> bytes:
    """The file without symbol table and debugging sections; as it is where it has none or is of no known kind."""
    if not data.startswith(MAGIC):
        return data
    segments_at, sections_at = struct.unpack_from("<QQ", data, 32)
    num_segments, _, num_sections, names_at = struct.unpack_from("<HHHH", data, 56)
    sections = [Section(*SECTION.unpack_from(data, sections_at + SECTION.size * n)) for n in range(num_sections)]
    gone = _dispensable(data, sections, names_at)
    segments = [SEGMENT.unpack_from(data, segments_at + SEGMENT.size * n) for n in range(num_segments)]
    mapped = [HEADER_BYTES, segments_at + SEGMENT.size * num_segments, *(s[2] + s[5] for s in segments)]
    loaded = max(mapped + [section.end for section in sections if section.flags & ALLOC])
    if not any(sections[n].offset >= loaded for n in gone):
        return data
    numbers = {old: new for new, old in enumerate(n for n in range(num_sections) if n not in gone)}
    out, table = bytearray(data[:loaded]), []
    for number in numbers:
        section = sections[number]
        if section.offset >= loaded and section.kind != NOBITS:
            out += bytes(-len(out) % max(section.alignment, 1))
            content = data[section.offset : section.end]
            section = section._replace(offset=len(out))
            out += content
        table.append(section._replace(link=numbers.get(section.link, 0)))
    out += bytes(-len(out) % 8)
    struct.pack_into("<Q", out, 40, len(out))
    struct.pack_into("<HH", out, 60, len(table), numbers[names_at])
    return bytes(out) + b"".join(SECTION.pack(*section) for section in table)


def _dispensable(data: bytes, sections: list[Section], names_at: int) -> set[int]:
    """Numbers of the sections that no program needs to run."""

    def name(section: Section) -> bytes:
        start = sections[names_at].offset + section.name
        return data[start : data.index(b"\0", start)]

    gone = {
        number
        for number, section in enumerate(sections)
        if not section.flags & ALLOC and (section.kind == SYMTAB or name(section).startswith(DEBUGGING))
    }
    texts = {sections[number].link for number in gone if sections[number].kind == SYMTAB}
    kept = {section.link for number, section in enumerate(sections) if number not in gone} | {names_at}
    return gone | {number for number in texts - kept if sections[number].kind == STRTAB}
