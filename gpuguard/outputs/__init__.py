"""What others read: metrics, and the log of events."""
