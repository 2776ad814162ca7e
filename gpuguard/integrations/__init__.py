"""Other people's systems: what they say in the forms that they say it in, one a file."""
