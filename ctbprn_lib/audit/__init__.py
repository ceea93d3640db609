"""Checks of the project itself: the original protocol run again, the speed measured, the statistics simulated."""
