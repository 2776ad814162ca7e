"""Bounded readers of whatever GPU code travels in; every byte they read is somebody else's."""
