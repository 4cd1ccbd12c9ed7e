"""Servers on loopback for tests: files and tokens with faults, and a real STAC API."""
