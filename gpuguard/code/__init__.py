"""GPU machine code: from the bytes that a process loads to a verdict per kernel."""
