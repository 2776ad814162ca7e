"""Recordings: every block of a run on disk, and back.

A recording file is a line of JSON that names format and schema, then frames, each closed by its checksum, so that a
file cut at any byte can be read up to the last whole frame:

    {"format":"gpuguard-recording","schema":1}\\n
    length u32 | crc32 u32 | frame: zlib(msgpack({blocks, counts, packets}))   little-endian, of the compressed bytes

Packet rows of a frame lie together as columns (`columns`), which brings a packet to some ten or twenty bytes on disk.
"""
