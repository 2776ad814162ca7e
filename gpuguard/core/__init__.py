"""What decides: records in, events out. Pure: no file, clock, socket or randomness; data and time are arguments."""
