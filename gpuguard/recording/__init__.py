"""Recordings: every block of a run on disk, and back.

A recording file is a line of JSON that names format and schema, then frames, each closed by its checksum, so that a
file cut at any byte can be read up to the last whole frame:

    {"format":"gpuguard-recording","schema":1}\\n
    length u32 | crc32 u32 | frame: zlib(msgpack([block, ...]))      little-endian, length and crc of the compressed bytes

Rows travel as (dtype name, count, bytes), the bytes transposed so that each column's high bytes lie together: that is
worth a factor of three to zlib.
"""
