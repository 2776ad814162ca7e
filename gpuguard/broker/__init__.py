"""The privileged half: what opens, acts and undoes, the journal and the log of it, and whom it never touches.

It is small, so that it can be read whole. What it is asked for is `gpuguard.messages`; the ``grant`` of a sensor, which
opens what needs privileges, runs here too and lies with its sensor.
"""
