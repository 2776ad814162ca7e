"""SSH read from the sizes of its encrypted records: the size algebra, and a state machine over it."""
