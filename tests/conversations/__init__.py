"""Conversations drawn at random, as a host that dialled sees them: ordinary ones and shells. See `wire`."""
