"""Deliver HTTP callbacks durably and in order."""
