"""What people look at: the report of an incident, and screens."""
